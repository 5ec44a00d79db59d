import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from op_contract import DEVICE, assert_compiles, assert_measured, assert_same, permuted, strided

from genrec.kernels import moe_experts, moe_ffn, moe_route, native_operators
from genrec.kernels.moe import reference
from genrec.kernels.moe import sorted as sorted_rows


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


@settings(max_examples=60)
@given(
    st.integers(0, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.integers(1, 3), st.integers(0, 9)
)
def test_sizes_around_the_tiles(t, d, f, e, k, seed):
    """Output and gradients against the plain form in float64. The largest of so few errors is too much a matter of luck
    to compare with PyTorch: allowed are 20 roundings of the terms that are summed, 1 of what is stored in bfloat16."""
    g = torch.Generator().manual_seed(seed)
    _, x, _, gate_up, down = inputs(t, d, f, e, 1, seed=seed)
    indices = torch.randint(0, e, (t, k), generator=g).to(DEVICE)
    weights, grad = (torch.rand(t, n, generator=g).to(DEVICE) for n in (k, d))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        grad, x, gate_up, down = (tensor.to(dtype) for tensor in (grad, x, gate_up, down))
        args = x, weights, indices, gate_up, down
        ours = [moe_experts(*args), *torch.ops.genrec.moe_experts_backward(grad, *args)]
        exact = [v if v is indices else v.double() for v in args]
        truth = [sorted_rows.forward(*exact), *sorted_rows.backward(grad.double(), *exact)]
        for y, expected in zip(ours, truth, strict=True):
            largest = expected.abs().max().item() if y.numel() else 0
            roundings = 1 if y.dtype == torch.bfloat16 else 20
            tolerance = (
                roundings * torch.finfo(y.dtype).eps * max(1, largest)
            )  # the inputs, and so the terms, are about 1
            torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("one_expert", [False, True])
def test_many_rows(dtype, one_expert):
    """More rows than are summed at once, and than are sorted at once."""
    indices, *tensors = inputs(t=900, d=20, f=24, e=3, k=2)
    if one_expert:
        indices = torch.ones_like(indices)
    ours, definition = (lambda x, w, a, b, f=f: f(x, w, indices, a, b) for f in (moe_experts, reference.moe_experts))
    if dtype == torch.float64:
        assert_same(ours, definition, tensors)
    else:
        assert_measured(ours, definition, tensors, dtype)


def forward_and_backward(x, weights, indices, gate_up, down):
    grad = torch.cos(torch.arange(x.shape[1], device=x.device)).to(x.dtype).expand(x.shape)
    return (
        moe_experts(x, weights, indices, gate_up, down),
        *torch.ops.genrec.moe_experts_backward(grad, x, weights, indices, gate_up, down),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_the_same_alone_and_in_company(dtype):
    indices, x, weights, gate_up, down = inputs(t=700, d=40, f=24, e=3, k=2, dtype=torch.float32)
    x, gate_up, down = (v.to(dtype) for v in (x, gate_up, down))
    company = forward_and_backward(x, weights, indices, gate_up, down)
    for chosen in ([0], [699, 3], list(range(300, 311)), torch.randperm(700).tolist()):
        alone = forward_and_backward(x[chosen], weights[chosen], indices[chosen], gate_up, down)
        for of_token, of_all in zip(alone[:3], company[:3], strict=True):  # output, gradients of x and of the weights
            assert torch.equal(of_token, of_all[chosen])


@pytest.mark.skipif(DEVICE.type != "cpu", reason="threads are the CPU's")
@pytest.mark.parametrize("t", [1, 37, 900])
def test_the_same_bits_on_any_number_of_threads(t):
    indices, x, weights, gate_up, down = inputs(t, d=96, f=200, e=3, k=2, dtype=torch.float32)
    logits = torch.randn(t * 100, 9)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append((*forward_and_backward(x, weights, indices, gate_up, down), *moe_route(logits, 3)))
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_with_its_token(bad):
    indices, x, weights, gate_up, down = inputs(t=30, d=20, f=12, e=3, dtype=torch.float32)
    y = moe_experts(x, weights, indices, gate_up, down)
    poisoned, others = x.clone(), torch.arange(30, device=DEVICE) != 7
    poisoned[7] = bad
    z = moe_experts(poisoned, weights, indices, gate_up, down)
    assert torch.equal(z[others], y[others])
    assert not z[7].isfinite().any()


def test_views_of_the_weights_and_expanded_rows():
    indices, x, weights, gate_up, down = inputs(t=12, d=20, f=8, e=4, dtype=torch.float32)
    views = []
    for w in (gate_up, down):
        wide = torch.full((2 * len(w), w.shape[1] + 3, w.shape[2] + 5), float("nan"), device=DEVICE)
        views.append(wide[::2, 1:-2, 2:-3].copy_(w))
    for rows in (x, x[:1].expand(12, 20)):
        expected = forward_and_backward(rows.contiguous(), weights, indices, gate_up, down)
        for y, z in zip(forward_and_backward(rows, weights, indices.long(), *views), expected, strict=True):
            assert torch.equal(y, z)


@settings(max_examples=40)
@given(st.integers(1, 40), st.data())
def test_route_of_nan_is_valid(e, data):
    k, values = data.draw(st.integers(1, e)), st.sampled_from([0.0, 1.0, -200.0, float("nan"), float("inf")])
    logits = torch.tensor([data.draw(st.lists(values, min_size=e, max_size=e))], device=DEVICE)
    for bias in (None, torch.full((e,), float("nan"), device=DEVICE), logits[0]):
        kept = moe_route(logits, k, bias=bias)[1][0].tolist()
        assert len(set(kept)) == k
        assert all(0 <= index < e for index in kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("renormalize", [True, False])
def test_route_weights_are_right_to_rounding(dtype, renormalize):
    """Also where probabilities are tiny, and for more experts than a vector has lanes."""
    logits = 20 * torch.randn(200, 37, dtype=dtype, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    weights, indices = moe_route(logits, 5, renormalize=renormalize)
    kept = logits.double().softmax(1).gather(1, indices.long())
    expected = kept / kept.sum(1, keepdim=True) if renormalize else kept
    spread = (logits.max() - logits.min()).item()  # exponents are rounded to eps / 2 of their size
    torch.testing.assert_close(weights.double(), expected, rtol=(spread + 20) * torch.finfo(dtype).eps / 2, atol=1e-37)


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


@pytest.mark.skipif("moe_experts" not in native_operators("cpu"), reason="the compiled kernels were not built")
@pytest.mark.skipif(DEVICE.type != "cpu", reason="what the CPU kernels check themselves")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: op.moe_experts(X, WT, IX + 3, GU, DN), r"indices holds 3; expected 0 … 2, one of 3 experts"),
        (lambda op: op.moe_experts(X, WT, IX.long() - 1, GU, DN), r"indices holds -1"),
        (lambda op: op.moe_experts(X, WT, IX.short(), GU, DN), r"indices must be int32 or int64"),
        (lambda op: op.moe_experts(X, WT[:4], IX, GU, DN), r"weights and indices must be \(T, k\)"),
        (lambda op: op.moe_experts(X[0], WT, IX, GU, DN), r"expected x \(T, D\)"),
        (lambda op: op.moe_experts(X, WT, IX, GU[:, 1:], DN), r"w_gate_up must be \(E, 2F, D\)"),
        (lambda op: op.moe_experts(X, WT, IX, GU.double(), DN), r"must have one dtype"),
        (lambda op: op.moe_experts_backward(X[1:], X, WT, IX, GU, DN), r"grad must be \(T, D\)"),
        (lambda op: op.moe_route(X, 5, None, True), r"top_k is 5; expected 1 … 4"),
        (lambda op: op.moe_route(X, 2, X[0, 1:], True), r"bias must be \(E,\)"),
        (lambda op: op.moe_route_backward(WT, X, IX + 4, True), r"indices holds 4; expected 0 … 3"),
        (lambda op: op.moe_route_backward(WT, X, IX[1:], True), r"expected grad \(T, k\)"),
    ],
)
def test_direct_calls_are_checked(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.ops.genrec)
