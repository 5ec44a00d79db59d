"""The Triton kernels of the mixture of experts, through the public functions: in the interpreter, or on CUDA."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from op_contract import DEVICE, assert_measured, permuted, run, strided

from genrec.kernels import moe_experts, moe_ffn, moe_route
from genrec.kernels.moe import reference

pytest.importorskip("triton", reason="Triton has wheels for Linux only")
pytestmark = pytest.mark.usefixtures("triton_kernels")
few = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def inputs(t=10, d=6, f=5, e=4, dtype=torch.float32, seed=0):
    """x, w_gate_up, w_down"""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(t, d, dtype=dtype, generator=g)
    gate_up = torch.randn(e, 2 * f, d, dtype=dtype, generator=g) / d**0.5
    down = torch.randn(e, d, f, dtype=dtype, generator=g) / f**0.5
    return tuple(tensor.to(DEVICE) for tensor in (x, gate_up, down))


def routing(t=10, k=2, e=4, dtype=torch.float32, seed=1):
    """weights, and indices that may name an expert twice for one token"""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(t, k, dtype=dtype, generator=g).to(DEVICE), torch.randint(e, (t, k), generator=g).to(DEVICE)


def results(*tensors, indices, function=moe_experts):
    """y, and the gradients of x, weights, gate_up and down"""
    (y,), gradients = run(lambda x, w, a, b: function(x, w, indices, a, b), tensors)
    return [y, *gradients]


def equal(ours, others):
    return all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


@few
@given(st.integers(0, 70), st.integers(1, 20), st.data())
def test_route_is_the_definition(t, e, data):
    k, biased, renormalize = data.draw(st.integers(1, e)), data.draw(st.booleans()), data.draw(st.booleans())
    view = data.draw(st.sampled_from([torch.clone, permuted, strided]))
    g = torch.Generator().manual_seed(t * 20 + e)
    logits = view(torch.randint(-2, 3, (t, e), generator=g).float().to(DEVICE)).requires_grad_()  # many exact ties
    bias = view(torch.randint(-1, 2, (e,), generator=g).float().to(DEVICE)) if biased else None
    weights, indices = moe_route(logits, k, bias=bias, renormalize=renormalize)
    expected, order = reference.moe_route(logits, k, bias=bias, renormalize=renormalize)
    assert indices.dtype == torch.int32
    assert torch.equal(indices, order)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-7)
    grad = permuted(torch.randn(t, k, generator=g).to(DEVICE))
    ours, truth = (torch.autograd.grad(w, logits, grad)[0] for w in (weights, expected))
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)


@DTYPES
@pytest.mark.parametrize("renormalize", [True, False])
def test_measured_error_of_routing(dtype, renormalize):
    logits = inputs(t=50, d=9)[0]
    assert_measured(
        lambda x: moe_route(x, 4, renormalize=renormalize)[0],
        lambda x: reference.moe_route(x, 4, renormalize=renormalize)[0],
        [logits],
        dtype,
    )


@pytest.mark.parametrize(("e", "k"), [(300, 5), (33, 33), (1, 1)])
def test_many_experts(e, k):
    logits = inputs(t=3, d=e)[0]
    weights, indices = moe_route(logits, k)
    expected, order = reference.moe_route(logits, k)
    assert torch.equal(indices, order)
    torch.testing.assert_close(weights, expected)


@pytest.mark.filterwarnings("ignore:(All-NaN slice|invalid value):RuntimeWarning")  # numpy's, of what is tested
@pytest.mark.parametrize("renormalize", [True, False])
def test_routing_of_what_is_not_finite(renormalize):
    """Every index stays one of an expert, and is the definition's."""
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[0, 1, nan, 2], [nan] * 4, [-inf] * 4, [-inf, 1, -inf, 0], [0, inf, 1, 2]], device=DEVICE)
    negative = torch.tensor([0, 0, -(2**22), 0], dtype=torch.int32, device=DEVICE).view(torch.float32)  # a NaN
    for bias in (None, negative):
        weights, indices = moe_route(logits, 3, bias=bias, renormalize=renormalize)
        expected, order = reference.moe_route(logits, 3, bias=bias, renormalize=renormalize)
        assert torch.equal(indices, order)
        torch.testing.assert_close(weights, expected, equal_nan=True)


@DTYPES
@pytest.mark.parametrize(("t", "d", "f", "e", "k"), [(70, 48, 16, 5, 3), (21, 37, 19, 6, 1), (9, 16, 33, 4, 4)])
def test_measured_error_of_experts(dtype, t, d, f, e, k):
    x, gate_up, down = inputs(t, d, f, e)
    weights, indices = reference.moe_route(inputs(t, e, seed=2)[0], k)
    assert_measured(
        lambda x, w, a, b: moe_experts(x, w, indices, a, b),
        lambda x, w, a, b: reference.moe_experts(x, w, indices, a, b),
        [x, weights, gate_up, down],
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_measured_error_with_float32_weights(dtype):
    _, x, gate_up, down = (None, *inputs(40, 24, 40, 3, dtype))
    weights, indices = routing(40, 2, 3)

    def layer(function):
        return lambda x, a, b: function(x, weights.to(torch.promote_types(x.dtype, torch.float32)), indices, a, b)

    assert_measured(layer(moe_experts), layer(reference.moe_experts), [x, gate_up, down], dtype)


@few
@given(st.integers(0, 12), st.integers(1, 20), st.integers(1, 9), st.integers(1, 5), st.integers(0, 3), st.data())
def test_experts_are_the_definition(t, d, f, e, k, data):
    x, gate_up, down = inputs(t, d, f, e)
    weights, indices = routing(t, k, e)
    indices = indices.to(data.draw(st.sampled_from([torch.int32, torch.int64])))
    tensors = [data.draw(st.sampled_from([torch.clone, permuted, strided]))(v) for v in (x, weights, gate_up, down)]
    indices = data.draw(st.sampled_from([torch.clone, permuted, strided]))(indices)
    expected = results(*tensors, function=reference.moe_experts, indices=indices)
    for ours, truth in zip(results(*tensors, indices=indices), expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


def test_expanded_inputs_and_gradients():
    x, gate_up, down = (v.requires_grad_() for v in inputs(t=1))
    weights, indices = torch.ones(1, 1, device=DEVICE), torch.tensor([[3]], device=DEVICE)
    one = moe_experts(x, weights, indices, gate_up, down)
    many = moe_experts(x.expand(5, 6), weights.expand(5, 2), indices.expand(5, 2), gate_up, down)
    torch.testing.assert_close(many, 2 * one.expand(5, 6))
    for ours, expected in zip(*(torch.autograd.grad(y.sum(), (x, gate_up, down)) for y in (many, one)), strict=True):
        torch.testing.assert_close(ours, 10 * expected)  # of ten pairs; the gradient of the sum has stride 0


@pytest.mark.parametrize("chosen", [0, 3])
def test_all_tokens_to_one_expert(chosen):
    """The others have no gradient, and what they hold does not matter."""
    x, gate_up, down = inputs(t=80, e=5)
    weights, indices = torch.ones(80, 1, device=DEVICE), torch.full((80, 1), chosen, device=DEVICE)
    y, _, _, *gradients = results(x, weights, gate_up, down, indices=indices)
    idle = torch.arange(5, device=DEVICE) != chosen
    assert all(g[idle].eq(0).all() and g[chosen].ne(0).any() for g in gradients)
    gate_up[idle] = down[idle] = float("nan")
    assert torch.equal(y, moe_experts(x, weights, indices, gate_up, down))
    torch.testing.assert_close(y, reference.moe_experts(x, weights, indices, gate_up, down))


@pytest.mark.parametrize(("t", "k", "e"), [(800, 3, 4), (37, 2, 1), (70, 4, 130), (0, 2, 3), (5, 0, 3)])
def test_order_of_the_pairs(t, k, e):
    """Stable, over several blocks, leaving out what has no expert."""
    from genrec.kernels.moe.triton_order import Order

    g = torch.Generator().manual_seed(t)
    indices = torch.randint(-1, e + 1, (t, k), generator=g).to(DEVICE)  # -1 and e are no experts
    ours = Order(strided(indices), e, torch.empty(0, device=DEVICE))
    flat = indices.flatten()
    known = (flat >= 0) & (flat < e)
    counts = torch.bincount(flat[known], minlength=e)
    assert ours.offsets.tolist() == [0, *counts.cumsum(0).tolist()]
    expected = flat.where(known, e).sort(stable=True).indices[: ours.offsets[-1]]
    assert ours.order[: len(expected)].tolist() == expected.tolist()
    for block in (16, 64):
        assert ours.tiles(block) >= ((counts + block - 1) // block).sum()


@DTYPES
@pytest.mark.parametrize(("d", "f"), [(48, 32), (17, 9)])
def test_a_token_does_not_depend_on_the_batch(dtype, d, f, exact_dots):
    """To the bit: outputs and gradients of three tokens alone, among 100 and among 280, with other tiles of rows."""
    x, gate_up, down = inputs(280, d, f, 2, dtype)
    weights, indices = routing(280, 1, 2)
    grad = torch.randn(280, d, generator=torch.Generator().manual_seed(5)).to(DEVICE, dtype)

    def first_tokens(t):
        leaves = [v.detach().requires_grad_() for v in (x[:t], weights[:t])]
        y = moe_experts(*leaves, indices[:t], gate_up, down)
        return [v[:3] for v in (y, *torch.autograd.grad(y, leaves, grad[:t]))]

    alone = first_tokens(3)
    assert equal(alone, first_tokens(100))
    assert equal(alone, first_tokens(280))


def test_same_inputs_same_bits():
    x, gate_up, down = inputs(60, 32, 16, 3, torch.bfloat16)
    weights, indices = routing(60, 3, 3)
    first = results(x, weights, gate_up, down, indices=indices)
    assert all(equal(first, results(x, weights, gate_up, down, indices=indices)) for _ in range(2))


def test_tiles_do_not_change_the_order_of_sums():
    """What the kernels promise about bits holds if the launch table keeps these sizes in every class of rows."""
    from genrec.kernels.moe.triton_experts import TABLE

    kept = {"hidden": ["BLOCK_K"], "rows": ["BLOCK_K"], "hidden_backward": ["BLOCK_K", "BLOCK_N"]}
    classes: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for row in TABLE.rows:
        if row["kernel"] in kept:
            warp_group = row["arch"] in ("90", "100")
            assert not warp_group or int(row["BLOCK_M"]) >= 64, "fewer rows take another matrix instruction"
            key = tuple(row[name] for name in ("kernel", "arch", "dtype", "align"))
            classes.setdefault(key, set()).add(tuple(row[name] for name in kept[row["kernel"]]))
    assert len(classes) == 3 * 4 * 3 * 2
    assert all(len(sizes) == 1 for sizes in classes.values())


@pytest.mark.parametrize("stray", [-1, 4, 2**40])
def test_an_index_that_is_no_expert(stray, exact_dots):
    """NaN for its token and its weight, nothing for the experts, and no one else is touched."""
    x, gate_up, down = inputs()
    weights, indices = routing()
    kept = torch.arange(10, device=DEVICE) != 4
    strayed = indices.clone()
    strayed[4, 1] = stray

    def backward(*arguments):
        grad = torch.ones_like(arguments[0])
        return torch.ops.genrec.moe_experts_backward(grad, *arguments, gate_up, down)

    y = torch.ops.genrec.moe_experts(x, weights, strayed, gate_up, down)
    assert y[4].isnan().all()
    assert torch.equal(y[kept], moe_experts(x, weights, indices, gate_up, down)[kept])

    grad_x, grad_weights, *grad_experts = backward(x, weights, strayed)
    whole_x, whole_weights, *_ = backward(x, weights, indices)
    assert grad_x[4].isnan().all()
    assert grad_weights[4].isnan().tolist() == [False, True]
    assert equal((grad_x[kept], grad_weights[kept]), (whole_x[kept], whole_weights[kept]))
    weights[4, 1] = 0  # nothing of this pair in the experts' gradients
    for ours, expected in zip(grad_experts, backward(x, weights, indices)[2:], strict=True):
        torch.testing.assert_close(ours, expected)


def test_rows_of_pairs_without_expert_are_not_read():
    from genrec.kernels.moe.triton_experts import combine

    indices = torch.tensor([[0, 1], [1, -1], [2, 0]], device=DEVICE)
    y = combine(torch.ones(6, 5, device=DEVICE), torch.full((3, 2), 2.0, device=DEVICE), indices, 2)
    assert y[0].eq(4).all()
    assert y[1:].isnan().all()


def test_ffn():
    x, gate_up, down = inputs(30, 20, 12, 6)
    router = torch.randn(6, 20, generator=torch.Generator().manual_seed(3)).to(DEVICE)

    def parts(x, router, gate_up, down):
        weights, indices = reference.moe_route(x @ router.T, 3)
        return reference.moe_experts(x, weights, indices, gate_up, down)

    tensors = [x, router, gate_up, down]
    assert_measured(lambda x, r, a, b: moe_ffn(x, r, a, b, 3), parts, tensors, torch.float32)


def test_shapes_and_strides_are_those_of_the_fakes():
    x, gate_up, down = inputs()
    weights, indices = routing()
    logits = permuted(inputs(d=4)[0])
    experts = (permuted(x), permuted(weights), indices, permuted(gate_up), permuted(down))
    for operator, arguments in (
        (torch.ops.genrec.moe_route, (logits, 2, None, True)),
        (torch.ops.genrec.moe_route_backward, (weights, logits, moe_route(logits, 2)[1], False)),
        (torch.ops.genrec.moe_experts, experts),
        (torch.ops.genrec.moe_experts_backward, (x, *experts)),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))
