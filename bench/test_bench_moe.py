"""A mixture-of-experts layer, forward and backward: moe_ffn against the definition."""

import pytest
import torch

from genrec.kernels import moe_ffn
from genrec.kernels.moe import reference


def genrec(x, router, gate_up, down, k):
    return moe_ffn(x, router, gate_up, down, k)


def definition(x, router, gate_up, down, k):
    weights, indices = reference.moe_route(x @ router.T, k)
    return reference.moe_experts(x, weights, indices, gate_up, down)


@pytest.mark.parametrize("layer", [genrec, definition], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("experts", "k"), [(4, 2), (16, 4)])
def test_forward_and_backward(benchmark, randn, layer, experts, k):
    tokens, d, f = 2048, 64, 128
    shapes = (tokens, d), (experts, d), (experts, 2 * f, d), (experts, d, f)
    inputs = [(randn(*shape) / d**0.25).requires_grad_() for shape in shapes]
    benchmark.group = f"moe_ffn forward and backward, {tokens} tokens of {d}, {experts} experts of {f}, top {k}"
    torch.testing.assert_close(layer(*inputs, k), definition(*inputs, k), rtol=1e-3, atol=1e-4)

    def step():
        torch.autograd.grad(layer(*inputs, k).sum(), inputs)

    benchmark(step)
