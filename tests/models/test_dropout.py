"""Dropout of the UGT, which draws its bits itself on a CPU."""

import pytest
import torch

from genrec.models.ugt.layers import Dropout

N = 1 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_and_scale(p, dtype):
    """A share of p, in steps of 2⁻¹⁶, falls out, up to five standard deviations of a fair draw; the rest makes up."""
    p, y = round(p * 2**16) / 2**16, Dropout(p)(torch.ones(N, dtype=dtype))
    assert abs((y == 0).double().mean() - p) < 5 * (p * (1 - p) / N) ** 0.5
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / (1 - p)))


def test_elements_that_share_a_draw_are_independent():
    kept = (Dropout(0.5)(torch.ones(N)) != 0).double().view(-1, 4) - 0.5
    correlation = kept.T @ kept / len(kept) * 4 - torch.eye(4, dtype=torch.float64)
    assert correlation.abs().max() < 5 / len(kept) ** 0.5
    assert (kept[1:] * kept[:-1]).mean().abs() * 4 < 5 / N**0.5


@pytest.mark.parametrize("shape", [(0,), (), (3,), (5, 7), (2, 3, 8)])
def test_every_shape_and_its_gradient(shape):
    x = torch.randn(shape, requires_grad=True)
    y = Dropout(0.3)(x)
    assert y.shape == x.shape
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(y, x * grad)


def test_the_seed_decides():
    def drawn(seed):
        torch.manual_seed(seed)
        return Dropout(0.5)(torch.ones(64))

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_nothing_falls_out_of_an_evaluated_model_or_at_zero():
    x = torch.randn(100)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x
    assert not Dropout(1.0)(x).any()


def test_compiled():
    y = torch.compile(Dropout(0.5), fullgraph=True, backend="eager")(torch.ones(N))
    assert abs((y == 0).double().mean() - 0.5) < 5 * (0.25 / N) ** 0.5
