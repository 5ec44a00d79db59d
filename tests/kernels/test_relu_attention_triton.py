"""The Triton kernels of ReLU attention: on a GPU where there is one, in Triton's interpreter elsewhere."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from op_contract import DEVICE, FORWARD, assert_measured, difference, permuted, root_mean_square, rounding, run, strided
from test_relu_attention import dense, loop, offsets, packed, varlen

from genrec.kernels import relu_attention
from genrec.kernels.relu_attention import reference

pytestmark = pytest.mark.usefixtures("triton_kernels")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MASKS = ["none", "causal", "limit"]


def assert_dense(tensors, options, dtype, arrange=lambda x: x):
    assert_measured(
        lambda q, k, v, *bias: relu_attention(q, k, v, rel_bias=bias[0] if bias else None, **options),
        lambda q, k, v, *bias: reference.relu_attention(q, k, v, rel_bias=bias[0] if bias else None, **options),
        [arrange(x) for x in tensors],
        dtype,
    )


def assert_packed(tensors, cu, options, lengths_q, lengths_k, dtype=torch.float32):
    assert_measured(varlen(cu, options, lengths_q, lengths_k), loop(cu, options), tensors, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("normalizer", ["length", "visible"])
def test_measured_error(dtype, mask, normalizer):
    tensors, options = dense(mask, b=1, h=1, lq=40, lk=50, d=20, dv=24, r=16)
    assert_dense(tensors, options | {"normalizer": normalizer}, dtype)
    lengths_q, lengths_k = [17, 0, 66], [20, 6, 40]
    tensors, cu, options = packed(lengths_q, lengths_k, h=1, d=20, dv=17, r=16, mask=mask)
    assert_packed(tensors, cu, options | {"normalizer": normalizer}, lengths_q, lengths_k, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("d", "dv"), [(1, 1), (16, 65), (100, 3), (200, 256)])
def test_any_width_of_a_head(dtype, d, dv):
    tensors, options = dense("causal", b=1, h=1, lq=17, lk=35, d=d, dv=dv)
    assert_dense(tensors, options, dtype)


def test_wider_heads_run_in_plain_pytorch():
    tensors, options = dense("causal", b=1, h=1, d=257, dv=4)
    assert_dense(tensors, options, torch.float32)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("r", [1, 2, 33, 300])
def test_any_number_of_distances(mask, r):
    """Tables that end before, inside and after the distances that occur; rows that lie far from every key."""
    for lq, lk in (40, 70), (50, 20):
        tensors, options = dense(mask, b=1, h=1, lq=lq, lk=lk, r=r)
        assert_dense(tensors, options, torch.float16)


@pytest.mark.parametrize("normalizer", [2.5, torch.tensor([1.5, 3.0], device=DEVICE)])
@pytest.mark.parametrize("biased", [True, False])
def test_normalizers(normalizer, biased):
    tensors, options = dense("causal")
    assert_dense(tensors if biased else tensors[:3], options | {"normalizer": normalizer, "scale": -0.3}, torch.float32)
    tensors, cu, options = packed([3, 4], [5, 4])
    options |= {"normalizer": normalizer, "scale": 0.0}
    assert_packed(tensors if biased else tensors[:3], cu, options, [3, 4], [5, 4])


@pytest.mark.parametrize("arrange", [permuted, strided, lambda x: x.mT.contiguous().mT])
def test_strides(arrange):
    tensors, options = dense("limit", h=2, lq=20, lk=18)
    options["key_limit"] = strided(options["key_limit"])
    assert_dense(tensors, options, torch.float32, arrange)
    tensors, cu, options = packed([20, 3], [18, 5], mask="limit")
    options["key_limit"] = strided(options["key_limit"])
    assert_packed([arrange(x) for x in tensors], tuple(strided(x) for x in cu), options, [20, 3], [18, 5])


def test_expanded_inputs_and_gradients():
    (q, k, v, bias), options = dense()
    shared = k[:1, :1].expand(2, 3, -1, -1).float()
    assert_measured(
        lambda q, v, b: relu_attention(q, shared, v, rel_bias=b, **options),
        lambda q, v, b: reference.relu_attention(q, shared.to(q.dtype), v, rel_bias=b, **options),
        [q, v, bias],
        torch.float32,
    )
    leaf = q.float().requires_grad_()
    relu_attention(leaf, shared, v.float()).sum().backward()  # the gradient of sum() is an expanded scalar
    leaf_too = q.float().requires_grad_()
    reference.relu_attention(leaf_too, shared, v.float()).sum().backward()
    torch.testing.assert_close(leaf.grad, leaf_too.grad)


@pytest.mark.parametrize(
    ("b", "lq", "lk", "d", "dv"), [(0, 3, 3, 2, 2), (1, 0, 3, 2, 2), (1, 3, 0, 2, 2), (1, 3, 3, 2, 0)]
)
def test_empty(b, lq, lk, d, dv):
    tensors, options = dense(b=b, h=2, lq=lq, lk=lk, d=d, dv=dv)
    assert_dense(tensors, options, torch.float32)


def test_heads_without_width():
    """All scores are biases."""
    tensors, options = dense(d=0)
    assert_dense(tensors, options | {"scale": 1.0}, torch.float32)


@pytest.mark.parametrize("mask", MASKS)
def test_slack_may_hold_anything(mask):
    lengths = [4, 0, 40]
    tensors, cu, options = packed(lengths, lengths, slack=150, mask=mask, dtype=torch.float32)
    leaves = [x.clone() for x in tensors]
    for x in leaves[:3]:
        x[-150:] = float("nan")
    leaves = [x.requires_grad_() for x in leaves]
    out = varlen(cu, options, lengths, lengths)(*leaves)
    grad = torch.ones_like(out)
    grad[-150:] = float("nan")
    gradients = torch.autograd.grad(out, leaves, grad)
    for x in (out, *gradients[:3]):
        assert torch.equal(x[-150:], torch.zeros_like(x[-150:]))
    assert all(x.isfinite().all() for x in (out, *gradients))


def test_nothing_but_slack():
    tensors, cu, options = packed([], [], slack=3, dtype=torch.float32)
    outputs, gradients = run(varlen(cu, options, [], []), tensors)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in (*outputs, *gradients))


LENGTHS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 40)), max_size=4)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    LENGTHS, st.integers(0, 4), st.sampled_from(MASKS), st.integers(1, 50), st.integers(1, 40), st.booleans(),
    st.sampled_from(["length", "visible"]), st.sampled_from([torch.int32, torch.int64]), st.sampled_from(DTYPES),
)  # fmt: skip
def test_varlen_is_one_sequence_after_the_other(lengths, slack, mask, r, d, biased, normalizer, index, dtype):
    lengths_q, lengths_k = [a for a, _ in lengths], [b for _, b in lengths]
    tensors, cu, options = packed(lengths_q, lengths_k, slack, h=1, d=d, dv=9, r=r, mask=mask, index=index)
    options["normalizer"] = normalizer
    assert_packed(tensors if biased else tensors[:3], cu, options, lengths_q, lengths_k, dtype)


@pytest.mark.parametrize("hidden", ["k", "v"])
def test_what_no_row_sees_reaches_no_row(hidden):
    """A score that is not a number stays with the rows that see it; a value does where a tile ends before it."""
    (q, k, v, bias), options = dense(b=1, h=1, lq=150, lk=150, dtype=torch.float32)
    {"k": k, "v": v}[hidden][:, :, -1] = float("nan")
    out = relu_attention(q, k, v, rel_bias=bias, **options)
    clean = 149 if hidden == "k" else 128
    assert out[:, :, :clean].isfinite().all()
    assert out[:, :, 149:].isnan().all()


@pytest.mark.parametrize("mask", MASKS)
def test_tiles_without_a_positive_score(mask):
    """Zeros; and where only distant keys score, only they count."""
    (q, k, v, _), options = dense(mask, b=1, h=1, lq=40, lk=70)
    bias = torch.full((1, 40), -100.0, device=DEVICE, dtype=q.dtype)
    assert not relu_attention(q.float(), k.float(), v.float(), rel_bias=bias, **options).any()
    bias[:, -1] = 0
    assert_dense([q, k, v, bias], options, torch.float32)


@pytest.mark.usefixtures("exact_dots")
@pytest.mark.parametrize("mask", MASKS)
def test_a_result_does_not_depend_on_the_batch(mask):
    """To the bit, whatever the neighbours and the bounds: short and long, with few rows and many keys, and both."""
    lengths_q, lengths_k = [66, 3], [40, 260]
    (q, k, v, bias), cu, options = packed(lengths_q, lengths_k, slack=0, h=1, r=40, mask=mask, dtype=torch.float32)
    limit = options.pop("key_limit")
    call = varlen(cu, options | {"key_limit": limit}, lengths_q, lengths_k)
    outputs, gradients = run_sum(lambda *x: call(*x, bias), q, k, v)
    ends = [list(itertools.accumulate(lengths, initial=0)) for lengths in (lengths_q, lengths_k)]
    for b, (lq, lk) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        rows, keys = (slice(end[b], end[b + 1]) for end in ends)
        own = options | {"key_limit": None if limit is None else limit[rows]}
        alone = varlen((offsets([lq]), offsets([lk])), own, [lq], [lk])
        outputs_alone, gradients_alone = run_sum(lambda *x, alone=alone: alone(*x, bias), q[rows], k[keys], v[keys])
        assert torch.equal(outputs[rows], outputs_alone)
        for together, apart, part in zip(gradients, gradients_alone, (rows, keys, keys), strict=True):
            assert torch.equal(together[part], apart)


def run_sum(function, *inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return out.detach(), torch.autograd.grad(out.sum(), leaves)


def test_the_same_bits_every_time():
    lengths = [40, 33, 5]
    tensors, cu, options = packed(lengths, lengths, h=1, r=20, dtype=torch.float32)
    call = varlen(cu, options, lengths, lengths)
    for once, again in zip(run(call, tensors), run(call, tensors), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.fixture
def one_program_for_all_parts(monkeypatch):
    from genrec.kernels.relu_attention import triton_forward

    return lambda: monkeypatch.setattr(triton_forward, "BUSY", 0)


def assert_parts(call, plain, tensors, dtype, one_program_for_all_parts):
    """The right output; and the same bits whether one program adds the parts or a second kernel."""
    inputs = [x.to(dtype) for x in tensors]
    split, truth = call(*inputs), plain(*(x.double() for x in inputs))
    error, plain_error = (root_mean_square(difference(y, truth)) for y in (split, plain(*inputs)))
    assert error <= FORWARD * max(plain_error, rounding(root_mean_square(truth), dtype))
    one_program_for_all_parts()
    assert torch.equal(split, call(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lq", [1, 50])
def test_few_rows_and_many_keys(dtype, mask, lq, one_program_for_all_parts):
    tensors, options = dense(mask, b=2, h=1, lq=lq, lk=300, d=8, dv=20, r=30)
    if mask == "limit":
        options["key_limit"] = options["key_limit"] * 3 // 2
    options["normalizer"] = "visible"
    assert_parts(
        lambda q, k, v, b: relu_attention(q, k, v, rel_bias=b, **options),
        lambda q, k, v, b: reference.relu_attention(q, k, v, rel_bias=b, **options),
        tensors,
        dtype,
        one_program_for_all_parts,
    )


def test_few_rows_and_many_keys_packed(one_program_for_all_parts):
    lengths_q, lengths_k = [3, 0, 20, 1, 2], [260, 5, 0, 256, 513]
    tensors, cu, options = packed(lengths_q, lengths_k, slack=40, h=1, r=300)
    call = varlen(cu, options, lengths_q, lengths_k)
    assert_parts(call, loop(cu, options), tensors, torch.float32, one_program_for_all_parts)


def test_beams_share_the_keys_of_their_request():
    """As rows of one block, or expanded without a copy: the same numbers."""
    (q, k, v, _), _ = dense(b=1, h=2, lq=3, lk=300, dtype=torch.float32)
    rows = relu_attention(q, k, v)
    beams = relu_attention(q.permute(2, 1, 0, 3), k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1))
    torch.testing.assert_close(beams.permute(2, 1, 0, 3), rows)


@pytest.fixture
def nondeterministic():
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.mark.usefixtures("nondeterministic")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
def test_atomic_gradients(dtype, mask):
    from genrec.kernels.relu_attention.triton import atomic_gradients

    lengths_q, lengths_k = [20, 0, 40], [35, 5, 40]
    tensors, cu, options = packed(lengths_q, lengths_k, h=1, d=20, dv=17, r=16, mask=mask)
    with atomic_gradients():
        assert_packed(tensors, cu, options | {"normalizer": "visible"}, lengths_q, lengths_k, dtype)
        tensors, options = dense(mask, b=1, h=1, lq=20, lk=40, r=60)
        assert_dense(tensors, options, dtype)
        assert_dense(tensors[:3], options, dtype)


def test_atomic_gradients_are_a_choice_that_determinism_overrides(monkeypatch):
    from genrec.kernels.relu_attention import triton, triton_backward

    kinds = []
    keys = triton_backward._keys
    monkeypatch.setattr(triton_backward, "_keys", lambda *args: kinds.append(len(args) > 4) or keys(*args))
    tensors = [x.float().requires_grad_() for x in dense()[0][:3]]

    def backward():
        torch.autograd.grad(relu_attention(*tensors).sum(), tensors)
        return kinds.pop()

    assert not backward()
    with triton.atomic_gradients():
        assert not backward()
        torch.use_deterministic_algorithms(False)
        try:
            assert backward()
        finally:
            torch.use_deterministic_algorithms(True, warn_only=True)
    assert not backward()
