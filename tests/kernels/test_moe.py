import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from op_contract import DEVICE, assert_compiles, assert_measured, assert_same, permuted, strided

from genrec.kernels import moe_experts, moe_ffn, moe_route
from genrec.kernels.moe import reference


def inputs(t=10, d=6, f=5, e=4, k=2, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, logits = torch.randn(t, d, dtype=dtype, generator=g), torch.randn(t, e, dtype=dtype, generator=g)
    gate_up = torch.randn(e, 2 * f, d, dtype=dtype, generator=g) / d**0.5
    down = torch.randn(e, d, f, dtype=dtype, generator=g) / f**0.5
    weights, indices = reference.moe_route(logits, k)
    return tuple(tensor.to(DEVICE) for tensor in (indices, x, weights, gate_up, down))


def numpy_route(logits, k, bias):
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    order = np.argsort(-(p + bias), axis=1, kind="stable")[:, :k]
    return np.take_along_axis(p, order, 1), order


@settings(max_examples=40)
@given(st.integers(0, 12), st.integers(1, 9), st.data())
def test_route_against_numpy(t, e, data):
    k, biased = data.draw(st.integers(1, e)), data.draw(st.booleans())
    g = torch.Generator().manual_seed(t * 10 + e)
    logits = torch.randint(-2, 3, (t, e), generator=g).double().to(DEVICE)  # many exact ties
    bias = (torch.randint(-1, 2, (e,), generator=g) if biased else torch.zeros(e)).double().to(DEVICE)
    kept, order = numpy_route(logits.cpu().numpy(), k, bias.cpu().numpy())
    weights, indices = moe_route(strided(logits), k, bias=bias if biased else None, renormalize=False)
    assert indices.dtype == torch.int32
    np.testing.assert_array_equal(indices.cpu().numpy(), order)
    np.testing.assert_allclose(weights.cpu().numpy(), kept, rtol=1e-12)
    weights, again = moe_route(logits, k, bias=bias if biased else None)
    assert torch.equal(again, indices)
    np.testing.assert_allclose(weights.cpu().numpy(), kept / kept.sum(1, keepdims=True), rtol=1e-12)


def test_bias_selects_and_does_not_weigh():
    logits = torch.tensor([[2.0, 1.0, 0.0, -200.0]], device=DEVICE)
    weights, indices = moe_route(logits, 2, bias=torch.tensor([0.0, 0.0, 9.0, 10.0], device=DEVICE))
    assert indices.tolist() == [[3, 2]]
    torch.testing.assert_close(
        weights, torch.tensor([[0.0, 1.0]])
    )  # and finite, though the kept probability underflows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_route_is_float32(dtype):
    logits = inputs(t=50, e=9)[1].to(dtype)
    weights, indices = moe_route(logits, 4)
    assert (weights.dtype, indices.dtype) == (torch.float32, torch.int32)
    torch.testing.assert_close(weights.double(), moe_route(logits.double(), 4)[0], rtol=1e-6, atol=1e-7)
    for renormalize in (True, False):
        assert_measured(
            lambda x, r=renormalize: moe_route(x, 3, renormalize=r)[0],
            lambda x, r=renormalize: reference.moe_route(x, 3, renormalize=r)[0],
            [inputs(t=50, e=9)[1]],
            dtype,
        )


@settings(max_examples=40)
@given(st.integers(0, 12), st.integers(1, 7), st.integers(1, 6), st.integers(1, 5), st.integers(0, 3), st.booleans())
def test_experts_against_the_definition(t, d, f, e, k, scattered):
    g = torch.Generator().manual_seed(1)
    _, x, _, gate_up, down = inputs(t, d, f, e, 1)
    indices = torch.randint(0, e, (t, k), generator=g).to(DEVICE)  # a token may name one expert twice
    weights = torch.randn(t, k, dtype=torch.float64, generator=g).to(DEVICE)
    tensors = [x, weights, gate_up, down]
    if scattered:
        indices, *tensors = (strided(v) for v in (indices, *tensors))
    assert_same(
        lambda x, w, a, b: moe_experts(x, w, indices, a, b),
        lambda x, w, a, b: reference.moe_experts(x, w, indices, a, b),
        tensors,
    )


def test_formula_token_by_token():
    indices, x, weights, gate_up, down = inputs()
    expected = torch.zeros_like(x)
    for t in range(len(x)):
        for j in range(2):
            e = int(indices[t, j])
            gate, up = (gate_up[e] @ x[t]).split(5)
            expected[t] += weights[t, j] * (down[e] @ (F.silu(gate) * up))
    torch.testing.assert_close(moe_experts(x, weights, indices, gate_up, down), expected)
    torch.testing.assert_close(reference.moe_experts(x, weights, indices, gate_up, down), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_measured_error(dtype):
    indices, *tensors = inputs(t=120, d=64, f=48, e=6, k=3)
    assert_measured(
        lambda x, w, a, b: moe_experts(x, w, indices, a, b),
        lambda x, w, a, b: reference.moe_experts(x, w, indices, a, b),
        tensors,
        dtype,
    )


def test_idle_experts_have_zero_gradient():
    _, x, weights, gate_up, down = inputs()
    indices = torch.full((10, 2), 3, device=DEVICE)
    leaves = [v.clone().requires_grad_() for v in (gate_up, down)]
    with_nan = [v.detach().clone() for v in leaves]
    for v in with_nan:
        v[:3] = float("nan")  # what an unused expert holds must not matter
    gradients = torch.autograd.grad(moe_experts(x, weights, indices, *leaves).sum(), leaves)
    assert all(g[:3].eq(0).all() and g[3].ne(0).any() for g in gradients)
    assert moe_experts(x, weights, indices, *with_nan).isfinite().all()


def test_gradcheck():
    indices, *tensors = inputs(t=5, d=3, f=2, e=3)
    leaves = [v.requires_grad_() for v in tensors]
    assert torch.autograd.gradcheck(lambda x, w, a, b: moe_experts(x, w, indices, a, b), leaves)
    logits = torch.randn(4, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    for renormalize in (True, False):
        assert torch.autograd.gradcheck(lambda x, r=renormalize: moe_route(x, 3, renormalize=r)[0], logits)


def test_ffn_is_route_then_experts():
    _, x, _, gate_up, down = inputs()
    router = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(DEVICE)

    def parts(x, router, gate_up, down):
        weights, indices = reference.moe_route(x @ router.T, 2)
        return reference.moe_experts(x, weights, indices, gate_up, down)

    assert_same(lambda x, r, a, b: moe_ffn(x, r, a, b, 2), parts, [x, router, gate_up, down])


def test_opcheck():
    indices, *tensors = inputs(dtype=torch.float32)
    x, weights, gate_up, down = (v.requires_grad_() for v in tensors)
    logits = torch.randn(10, 4, device=DEVICE, requires_grad=True)
    for renormalize in (True, False):
        torch.library.opcheck(
            torch.ops.genrec.moe_route.default, (logits, 2, torch.zeros(4, device=DEVICE), renormalize)
        )
        torch.library.opcheck(
            torch.ops.genrec.moe_route_backward.default, (weights.detach(), logits.detach(), indices, renormalize)
        )
    torch.library.opcheck(torch.ops.genrec.moe_experts.default, (x, weights, indices, gate_up, down))
    torch.library.opcheck(
        torch.ops.genrec.moe_experts_backward.default,
        (
            torch.randn(10, 6, device=DEVICE),
            *(v.detach() for v in (x, weights)),
            indices,
            gate_up.detach(),
            down.detach(),
        ),
    )


def test_gradients_of_permuted_weights_have_the_strides_of_the_fake():
    indices, x, weights, gate_up, down = inputs(dtype=torch.float32)
    experts = (x, x, weights, indices, permuted(gate_up), permuted(down))
    torch.library.opcheck(torch.ops.genrec.moe_experts_backward.default, experts)
    logits = permuted(torch.randn(10, 4, device=DEVICE))
    torch.library.opcheck(torch.ops.genrec.moe_route_backward.default, (weights, logits, indices, True))


def test_compiles():
    router = torch.randn(4, 6, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    calls = []
    for t in (10, 13):
        _, x, _, gate_up, down = inputs(t, dtype=torch.float32)
        calls.append([x, router, gate_up, down])
    assert_compiles(lambda x, r, a, b: moe_ffn(x, r, a, b, 2), *calls)


def test_backward_inside_autocast():
    """The backward pass of a float32 result is float32 also where someone calls it under autocast."""
    indices, *leaves = inputs(dtype=torch.float32)
    x, weights, gate_up, down = leaves = [v.requires_grad_() for v in leaves]
    out = moe_experts(x, weights, indices, gate_up, down)
    expected = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        gradients = torch.autograd.grad(out.sum(), leaves)
    assert all(torch.equal(g, e) for g, e in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    indices, x, weights, gate_up, down = inputs(dtype=torch.float32)
    x.requires_grad_()
    with torch.autocast(DEVICE.type, dtype=dtype):
        y = moe_experts(x, weights, indices, gate_up, down.to(dtype))
        routed, _ = moe_route(x[:, :4], 2)
    assert (y.dtype, routed.dtype) == (dtype, torch.float32)
    assert torch.equal(y, moe_experts(x.to(dtype), weights, indices, gate_up.to(dtype), down.to(dtype)))
    y.sum().backward()
    assert x.grad.dtype == torch.float32


X, GU, DN = torch.zeros(5, 4), torch.zeros(3, 6, 4), torch.zeros(3, 4, 3)
WT, IX = torch.zeros(5, 2), torch.zeros(5, 2).int()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: moe_route(X[0]), ValueError, r"logits has shape \(4,\)"),
        (lambda: moe_route(X.int()), TypeError, r"logits is torch.int32"),
        (lambda: moe_route(X, 5), ValueError, r"top_k is 5; expected 1 … 4"),
        (lambda: moe_route(X, 0), ValueError, r"top_k is 0; expected 1 … 4"),
        (lambda: moe_route(X, 2.0), TypeError, r"top_k is 2\.0; expected an int"),
        (lambda: moe_route([[1.0]], 1), TypeError, r"logits is a list; expected a tensor"),
        (lambda: moe_route(X, bias=torch.zeros(3)), ValueError, r"bias has shape \(3,\)"),
        (lambda: moe_experts(X[:, 1:], WT, IX, GU, DN), ValueError, r"w_gate_up has shape \(3, 6, 4\)"),
        (lambda: moe_experts(X, WT, IX, GU[:, 1:], DN), ValueError, r"w_gate_up has 5 rows per expert"),
        (lambda: moe_experts(X, WT, IX, GU, DN[..., 1:]), ValueError, r"w_down has shape \(3, 4, 2\)"),
        (lambda: moe_experts(X, WT, IX[1:], GU, DN), ValueError, r"indices has shape \(4, 2\)"),
        (lambda: moe_experts(X, WT[:, 1:], IX, GU, DN), ValueError, r"weights has shape \(5, 1\)"),
        (lambda: moe_experts(X, WT, IX.float(), GU, DN), TypeError, r"indices is torch.float32"),
        (lambda: moe_experts(X, WT, IX, GU.double(), DN), TypeError, r"w_gate_up is torch.float64 and x is"),
        (lambda: moe_experts(X, WT, IX + 3, GU, DN), IndexError, r"indices holds 3; expected 0 … 2, one of 3 experts"),
        (lambda: moe_experts(X, WT, IX - 1, GU, DN), IndexError, r"indices holds -1"),
        (lambda: moe_ffn(X, torch.zeros(2, 4), GU, DN, 2), ValueError, r"router_weight has shape \(2, 4\)"),
        (lambda: moe_ffn(X, torch.zeros(3, 4), GU[0, 0, 0], DN, 2), ValueError, r"w_gate_up has shape \(\)"),
        (lambda: moe_ffn(X, torch.zeros(3, 4).to("meta"), GU, DN, 2), ValueError, r"router_weight is on meta"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
