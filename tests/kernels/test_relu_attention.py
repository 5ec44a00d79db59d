import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from op_contract import DEVICE, assert_compiles, assert_measured, assert_same, permuted, strided

from genrec.kernels import native_operators, relu_attention, relu_attention_varlen
from genrec.kernels.relu_attention import reference

HALF = [torch.float32, torch.bfloat16, torch.float16]
MASKS = ["none", "causal", "limit"]
compiled = pytest.mark.skipif(
    "relu_attention" not in native_operators(DEVICE.type), reason="plain PyTorch promises less than the kernels"
)


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def randint(*shape, high):
    return torch.randint(-1, high, shape, generator=torch.Generator().manual_seed(4)).to(DEVICE)


def dense(mask="causal", dtype=torch.float64, b=2, h=3, lq=5, lk=7, d=4, dv=6, r=4):
    shapes = (b, h, lq, d), (b, h, lk, d), (b, h, lk, dv), (h, r)
    tensors = [randn(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]
    limit = randint(b, lq, high=lk + 3) if mask == "limit" else None
    return tensors, {"causal": mask == "causal", "key_limit": limit}


def offsets(lengths, dtype=torch.int64):
    return torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, dtype)


def packed(lengths_q, lengths_k, slack=3, h=2, d=4, dv=6, r=5, mask="causal", dtype=torch.float64, index=torch.int64):
    tq, tk = sum(lengths_q) + slack, sum(lengths_k) + slack
    shapes = (tq, h, d), (tk, h, d), (tk, h, dv), (h, r)
    tensors = [randn(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]
    limit = randint(tq, high=9) if mask == "limit" else None
    cu = offsets(lengths_q, index), offsets(lengths_k, index)
    return tensors, cu, {"causal": mask == "causal", "key_limit": limit}


def varlen(cu, options, lengths_q, lengths_k):
    most = max(lengths_q, default=0), max(lengths_k, default=0)
    return lambda q, k, v, bias=None: relu_attention_varlen(q, k, v, *cu, *most, rel_bias=bias, **options)


def loop(cu, options):
    return lambda q, k, v, bias=None: reference.relu_attention_varlen(q, k, v, *cu, rel_bias=bias, **options)


def by_hand(q, k, v, causal, key_limit, rel_bias, normalizer):
    """The formula of the docstring, one number at a time: an oracle that shares nothing with the reference."""
    (b, h, lq, d), lk, out = q.shape, k.shape[2], q.new_zeros(*q.shape[:3], v.shape[3])
    for n, head, i in torch.cartesian_prod(torch.arange(b), torch.arange(h), torch.arange(lq)).tolist():
        seen = min(max(int(key_limit[n, i]), 0), lk) if key_limit is not None else i + lk - lq + 1 if causal else lk
        for j in range(max(min(seen, lk), 0)):
            away = seen - 1 - j if causal or key_limit is not None else abs(i + lk - lq - j)
            score = float(q[n, head, i] @ k[n, head, j]) / d**0.5 + float(
                rel_bias[head, min(away, rel_bias.shape[1] - 1)]
            )
            divisor = {"length": lk, "visible": seen}.get(normalizer, normalizer)
            out[n, head, i] += max(score, 0.0) * v[n, head, j] / divisor
    return out


@pytest.mark.parametrize("mask", ["none", "causal", "limit"])
@pytest.mark.parametrize("normalizer", ["length", "visible", 2.5])
@pytest.mark.parametrize(("lq", "lk"), [(5, 7), (7, 5)])
def test_formula(mask, normalizer, lq, lk):
    (q, k, v, bias), options = dense(mask, lq=lq, lk=lk)
    expected = by_hand(q, k, v, rel_bias=bias, normalizer=normalizer, **options)
    torch.testing.assert_close(relu_attention(q, k, v, rel_bias=bias, normalizer=normalizer, **options), expected)
    torch.testing.assert_close(
        reference.relu_attention(q, k, v, rel_bias=bias, normalizer=normalizer, **options), expected
    )


@pytest.mark.parametrize("mask", ["none", "causal", "limit"])
@pytest.mark.parametrize("normalizer", ["length", "visible", 2.5, torch.tensor([1.5, 3.0], device=DEVICE)])
def test_dense_gradients(mask, normalizer):
    tensors, options = dense(mask)
    options |= {"normalizer": normalizer, "scale": 0.3}
    assert_same(
        lambda q, k, v, b: relu_attention(q, k, v, rel_bias=b, **options),
        lambda q, k, v, b: reference.relu_attention(q, k, v, rel_bias=b, **options),
        tensors,
    )


LENGTHS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=5)


@settings(max_examples=60)
@given(
    LENGTHS, st.integers(0, 4), st.sampled_from(["none", "causal", "limit"]), st.integers(1, 12), st.booleans(),
    st.sampled_from(["length", "visible", 2.5, "tensor"]), st.sampled_from([torch.int32, torch.int64]), st.booleans(),
)  # fmt: skip
def test_varlen_is_one_sequence_after_the_other(lengths, slack, mask, r, biased, normalizer, index, scattered):
    lengths_q, lengths_k = [a for a, _ in lengths], [b for _, b in lengths]
    tensors, cu, options = packed(lengths_q, lengths_k, slack, r=r, mask=mask, index=index)
    if normalizer == "tensor":
        normalizer = torch.arange(1.0, len(lengths) + 1, device=DEVICE)
    options["normalizer"] = normalizer
    tensors = tensors if biased else tensors[:3]
    if scattered:
        tensors = [strided(x) for x in tensors]
    assert_same(varlen(cu, options, lengths_q, lengths_k), loop(cu, options), tensors)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("mask", ["none", "causal", "limit"])
def test_measured_error(dtype, mask):
    lengths_q, lengths_k = [30, 0, 17, 40], [20, 6, 33, 40]
    tensors, cu, options = packed(lengths_q, lengths_k, d=32, dv=24, r=16, mask=mask)
    assert_measured(varlen(cu, options, lengths_q, lengths_k), loop(cu, options), tensors, dtype)
    tensors, options = dense(mask, lq=40, lk=50, d=32, dv=24, r=16)
    assert_measured(
        lambda q, k, v, b: relu_attention(q, k, v, rel_bias=b, **options),
        lambda q, k, v, b: reference.relu_attention(q, k, v, rel_bias=b, **options),
        tensors,
        dtype,
    )


def test_slack_may_hold_anything():
    lengths = [4, 0, 5]
    tensors, cu, options = packed(lengths, lengths, slack=3)
    leaves = [x.clone() for x in tensors]
    for x in leaves[:3]:
        x[-3:] = float("nan")
    leaves = [x.requires_grad_() for x in leaves]
    out = varlen(cu, options, lengths, lengths)(*leaves)
    assert torch.equal(out[-3:], torch.zeros_like(out[-3:]))
    grad = torch.ones_like(out)
    grad[-3:] = float("nan")
    gradients = torch.autograd.grad(out, leaves, grad)
    assert all(torch.equal(g[-3:], torch.zeros_like(g[-3:])) for g in gradients[:3])
    assert all(g.isfinite().all() for g in gradients)


def test_rows_without_keys_are_zero():
    (q, k, v, bias), _ = dense(lq=7, lk=5)
    out = relu_attention(q, k, v, causal=True, rel_bias=bias + 10, normalizer="visible")
    assert torch.equal(out[:, :, :2], torch.zeros_like(out[:, :, :2]))
    limit = torch.tensor([[0, 3, -5, 9, 0, 1, 0]], device=DEVICE).expand(2, -1)
    out = relu_attention(q, k, v, key_limit=limit, rel_bias=bias + 10)
    assert [bool(row.any()) for row in out[0, 0]] == [False, True, False, True, False, True, False]
    empty = relu_attention(q, k[:, :, :0], v[:, :, :0], rel_bias=bias)
    assert torch.equal(empty, q.new_zeros(2, 3, 7, 6))


def test_decoding_step_by_step_equals_the_full_pass():
    (q, k, v, bias), _ = dense(lq=6, lk=6)
    full = relu_attention(q, k, v, causal=True, rel_bias=bias, normalizer="visible")
    for i in range(6):
        step = relu_attention(
            q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], causal=True, rel_bias=bias, normalizer="visible"
        )
        torch.testing.assert_close(step, full[:, :, i : i + 1])


def test_a_result_does_not_depend_on_the_batch():
    lengths = [4, 9, 1]
    (q, k, v, bias), cu, options = packed(lengths, lengths, slack=0, dtype=torch.float32)
    together = varlen(cu, options, lengths, lengths)(q, k, v, bias)
    alone = varlen((offsets([4]), offsets([4])), options, [4], [4])(q[:4], k[:4], v[:4], bias)
    torch.testing.assert_close(together[:4], alone)


def test_expanded_inputs_and_gradients():
    (q, k, v, bias), options = dense()
    shared = k[:1, :1].expand(2, 3, -1, -1)
    assert_same(
        lambda q, v, b: relu_attention(q, shared, v, rel_bias=b, **options),
        lambda q, v, b: reference.relu_attention(q, shared, v, rel_bias=b, **options),
        [q, v, bias],
    )
    leaf = q.clone().requires_grad_()
    relu_attention(leaf, shared, v).sum().backward()  # the gradient of sum() is an expanded scalar
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("mask", ["none", "causal", "limit"])
def test_gradcheck(mask):
    tensors, options = dense(mask, b=1, h=2, lq=3, lk=4, d=2, dv=3, r=3)
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda q, k, v, b: relu_attention(q, k, v, rel_bias=b, **options), leaves)
    tensors, cu, options = packed([2, 0, 1], [3, 1, 0], slack=1, d=2, dv=2, r=2, mask=mask)
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(varlen(cu, options, [2, 0, 1], [3, 1, 0]), leaves)


@pytest.mark.parametrize("biased", [True, False])
def test_opcheck(biased):
    (q, k, v, bias), options = dense("limit", dtype=torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    rel_bias = bias.requires_grad_() if biased else None
    rest = (options["key_limit"], rel_bias, torch.ones(2, device=DEVICE), False, 0.5, 0.0, False)
    torch.library.opcheck(torch.ops.genrec.relu_attention.default, (*leaves, *rest))
    lengths = [3, 0, 4]
    (q, k, v, bias), cu, _ = packed(lengths, lengths, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    rest = (*cu, 4, 4, None, bias.requires_grad_() if biased else None, None, True, 0.5, 0.0, True)
    torch.library.opcheck(torch.ops.genrec.relu_attention_varlen.default, (*leaves, *rest))


def test_opcheck_backward():
    (q, k, v, bias), options = dense("limit", dtype=torch.float32)
    rest = (options["key_limit"], bias, None, False, 0.5, 0.0, True)
    torch.library.opcheck(torch.ops.genrec.relu_attention_backward.default, (randn(2, 3, 5, 6).float(), q, k, v, *rest))
    lengths = [3, 0, 4]
    (q, k, v, bias), cu, _ = packed(lengths, lengths, dtype=torch.float32)
    rest = (*cu, 4, 4, None, bias, None, True, 0.5, 0.0, True)
    grad = torch.zeros(q.shape[0], 2, 6, device=DEVICE)
    torch.library.opcheck(torch.ops.genrec.relu_attention_varlen_backward.default, (grad, q, k, v, *rest))


def test_compiles():
    dense_calls = [dense(dtype=torch.float32, lq=n, lk=n + 2)[0] for n in (5, 8)]
    assert_compiles(lambda q, k, v, b: relu_attention(q, k, v, causal=True, rel_bias=b), *dense_calls)

    def packed_call(q, k, v, bias, cu):
        return relu_attention_varlen(q, k, v, cu.long(), cu.long(), 9, 9, causal=True, rel_bias=bias)

    calls = [
        [*packed(lengths, lengths, dtype=torch.float32)[0], offsets(lengths).float()] for lengths in ([4, 0, 5], [9, 2])
    ]
    assert_compiles(packed_call, *calls)


def test_backward_inside_autocast():
    """The backward pass of a float32 result is float32 also where someone calls it under autocast."""
    (q, k, v, bias), options = dense(dtype=torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v, bias)]
    out = relu_attention(*leaves[:3], rel_bias=bias, **options)
    expected = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        gradients = torch.autograd.grad(out.sum(), leaves)
    assert all(torch.equal(g, e) for g, e in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    (q, k, v, bias), options = dense(dtype=torch.float32)
    q.requires_grad_()
    with torch.autocast(DEVICE.type, dtype=dtype):
        out = relu_attention(q, k.to(dtype), v, rel_bias=bias, **options)
    expected = relu_attention(q.to(dtype), k.to(dtype), v.to(dtype), rel_bias=bias, **options)
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    out.sum().backward()
    assert q.grad.dtype == torch.float32
    lengths = [3, 4]
    (q, k, v, bias), cu, options = packed(lengths, lengths, dtype=torch.float32)
    with torch.autocast(DEVICE.type, dtype=dtype):
        assert varlen(cu, options, lengths, lengths)(q, k, v, bias).dtype == dtype


def test_autocast_leaves_float64_alone():
    (q, k, v, _), options = dense()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16), pytest.raises(TypeError, match=r"k is torch.float32"):
        relu_attention(q, k.float(), v, **options)


Q, CU = torch.zeros(2, 3, 5, 4), torch.tensor([0, 2, 4])
T = torch.zeros(5, 3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: relu_attention(Q[0], Q, Q), ValueError, r"q has shape \(3, 5, 4\); expected 4 dimensions"),
        (
            lambda: relu_attention(Q, Q[..., :3], Q),
            ValueError,
            r"k has shape \(2, 3, 5, 3\); expected .*\(2, 3, 5, 4\)",
        ),
        (lambda: relu_attention(Q, Q, Q[:, :, 1:]), ValueError, r"v has shape"),
        (lambda: relu_attention(Q, Q.double(), Q), TypeError, r"k is torch.float64 and q is torch.float32"),
        (lambda: relu_attention(Q.int(), Q, Q), TypeError, r"q is torch.int32"),
        (lambda: relu_attention(Q, Q, Q, key_limit=torch.zeros(2, 5)), TypeError, r"key_limit is torch.float32"),
        (
            lambda: relu_attention(Q, Q, Q, key_limit=torch.zeros(2, 4).int()),
            ValueError,
            r"key_limit has shape \(2, 4\)",
        ),
        (
            lambda: relu_attention(Q, Q, Q, causal=True, key_limit=torch.zeros(2, 5).int()),
            ValueError,
            "causal is True and key_limit is given",
        ),
        (lambda: relu_attention(Q, Q, Q, rel_bias=torch.zeros(2, 4)), ValueError, r"rel_bias has shape \(2, 4\)"),
        (lambda: relu_attention(Q, Q, Q, rel_bias=torch.zeros(3, 0)), ValueError, r"rel_bias has 0 distances"),
        (lambda: relu_attention(Q, Q, Q, normalizer="mean"), ValueError, r"normalizer is 'mean'; expected \"length\""),
        (lambda: relu_attention(Q, Q, Q, normalizer=None), TypeError, r"normalizer is None; expected \"length\""),
        (lambda: relu_attention(Q, Q, Q, normalizer=-1.0), ValueError, r"normalizer is -1.0; expected a positive"),
        (lambda: relu_attention(Q, Q, Q, normalizer=torch.ones(3)), ValueError, r"normalizer has shape \(3,\)"),
        (lambda: relu_attention(Q, Q.to("meta"), Q), ValueError, r"k is on meta; expected cpu"),
        (lambda: relu_attention_varlen(T, T, T, CU + 1, CU, 2, 2), ValueError, r"cu_seqlens_q goes from 1 to 5"),
        (lambda: relu_attention_varlen(T, T, T, CU, CU * 2, 4, 4), ValueError, r"cu_seqlens_k goes from 0 to 8"),
        (lambda: relu_attention_varlen(T, T, T, CU, CU, 1, 2), ValueError, r"max_seqlen_q is 1; expected at least 2"),
        (lambda: relu_attention_varlen(T, T, T, CU[:1], CU[:1], -1, 0), ValueError, r"max_seqlen_q is -1; expected"),
        (lambda: relu_attention_varlen(T, T, T, CU, CU[1:] - 2, 2, 2), ValueError, r"cu_seqlens_k has shape \(2,\)"),
        (lambda: relu_attention_varlen(T, T, T, CU.float(), CU, 2, 2), TypeError, r"cu_seqlens_q is torch.float32"),
        (lambda: relu_attention_varlen(T, T, T, CU[None], CU, 2, 2), ValueError, r"cu_seqlens_q has shape \(1, 3\)"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


SIZES = st.sampled_from([0, 1, 2, 5, 6, 7, 15, 16, 17, 31, 33, 63, 64, 65, 95, 97, 130, 200])
DIMS = st.sampled_from([1, 3, 4, 7, 8, 9, 16, 17, 32, 40])
LAYOUTS = st.sampled_from(["as is", "odd", "turned"])


@settings(max_examples=60)
@given(
    SIZES, SIZES, DIMS, DIMS, st.integers(1, 150), st.sampled_from(MASKS), st.sampled_from(["as is", "odd", "turned"])
)
def test_sizes_around_the_tiles(lq, lk, d, dv, r, mask, layout):
    tensors, options = dense(mask, b=1, h=2, lq=lq, lk=lk, d=d, dv=dv, r=r)
    tensors = [{"as is": lambda x: x, "odd": strided, "turned": permuted}[layout](x) for x in tensors]
    assert_same(
        lambda q, k, v, b: relu_attention(q, k, v, rel_bias=b, **options),
        lambda q, k, v, b: reference.relu_attention(q, k, v, rel_bias=b, **options),
        tensors,
    )


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("mask", MASKS)
def test_measured_error_of_long_sequences(dtype, mask):
    tensors, options = dense(mask, b=1, h=2, lq=150, lk=170, d=64, dv=40, r=64)
    assert_measured(
        lambda q, k, v, b: relu_attention(q, k, v, rel_bias=b, **options),
        lambda q, k, v, b: reference.relu_attention(q, k, v, rel_bias=b, **options),
        tensors,
        dtype,
    )


def both_passes(call, leaves, grad):
    """The output and its gradients for one gradient of the output."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS)
def test_a_sequence_has_the_same_bits_in_any_company(dtype, mask):
    lengths = [70, 9, 0, 130, 33]
    (q, k, v, bias), cu, options = packed(lengths, lengths, slack=0, h=2, d=24, dv=16, mask=mask, dtype=dtype)
    grad, starts = torch.randn_like(v), cu[0].tolist()
    together = both_passes(varlen(cu, options, lengths, lengths), (q, k, v, bias), grad)
    for order in ([0], [3], [4, 3, 1, 0], [1, 1, 2, 4]):
        tokens = torch.cat([torch.arange(starts[b], starts[b + 1]) for b in order]).to(DEVICE)
        some, new = [lengths[b] for b in order], dict(options)
        if mask == "limit":
            new["key_limit"] = options["key_limit"][tokens]
        call = varlen((offsets(some), offsets(some)), new, some, some)
        apart = both_passes(call, (q[tokens], k[tokens], v[tokens], bias), grad[tokens])
        assert all(torch.equal(a, t[tokens]) for a, t in zip(apart[:4], together[:4], strict=True))


@compiled
@pytest.mark.parametrize("lengths", [[300], [400, 7, 30, 0, 1]])
@pytest.mark.parametrize("mask", MASKS)
def test_the_number_of_threads_changes_no_bit(mask, lengths):
    tensors, cu, options = packed(lengths, lengths, h=1, d=16, dv=8, r=90, mask=mask, dtype=torch.float32)
    grad, threads = torch.randn_like(tensors[2]), torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 16):  # the long sequences are cut into pieces where there are many threads
            torch.set_num_threads(number)
            results.append(both_passes(varlen(cu, options, lengths, lengths), tensors, grad))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


@compiled
def test_decoding_has_the_bits_of_the_full_pass():
    (q, k, v, bias), _ = dense(lq=150, lk=150, d=16, dtype=torch.float32)
    options = {"causal": True, "rel_bias": bias, "normalizer": "visible"}
    full = relu_attention(q, k, v, **options)
    for n in (1, 16, 17, 64, 65, 150):
        assert torch.equal(
            relu_attention(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n], **options), full[:, :, n - 1 : n]
        )


@compiled
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("poisoned", ["k", "v", "both"])
def test_a_hidden_key_may_hold_anything(poisoned, bad):
    tensors, _ = dense(b=1, h=2, lq=40, lk=40, d=8, dv=8, dtype=torch.float32)
    limit = torch.randint(0, 41, (1, 40), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    hidden = limit[0] <= 25  # rows that do not see key 25
    call = lambda q, k, v, b: relu_attention(q, k, v, key_limit=limit, rel_bias=b)  # noqa: E731
    grad = torch.randn(1, 2, 40, 8).to(DEVICE)
    expected = both_passes(call, tensors, grad)
    q, k, v, bias = (x.clone() for x in tensors)
    for x in {"k": [k], "v": [v], "both": [k, v]}[poisoned]:
        x[:, :, 25] = bad
    out, grad_q, *_ = both_passes(call, (q, k, v, bias), grad)
    assert torch.equal(out[:, :, hidden], expected[0][:, :, hidden])
    assert torch.equal(grad_q[:, :, hidden], expected[1][:, :, hidden])
    assert not out[:, :, ~hidden].isfinite().all()  # a row that sees it is not spared


@compiled
def test_a_key_is_not_spoiled_by_rows_that_do_not_see_it():
    (q, k, v, _), _ = dense(b=1, h=1, lq=40, lk=40, d=8, dv=8, dtype=torch.float32)
    grad = torch.randn(1, 1, 40, 8).to(DEVICE)
    call = lambda q, k, v: relu_attention(q, k, v, causal=True)  # noqa: E731
    expected = both_passes(call, (q, k, v), grad)
    q, grad = q.clone(), grad.clone()
    q[:, :, 20], grad[:, :, 21] = float("nan"), float("nan")
    gradients = both_passes(call, (q, k, v), grad)[1:]
    for gradient, clean in zip(gradients[1:], expected[2:], strict=True):
        assert torch.equal(gradient[:, :, 22:], clean[:, :, 22:])


@compiled
def test_bias_of_another_dtype():
    tensors, options = dense("causal", dtype=torch.bfloat16)
    *qkv, bias = tensors
    grad = torch.ones_like(tensors[0][..., :1]).expand(-1, -1, -1, 6)
    results = both_passes(
        lambda q, k, v, b: relu_attention(q, k, v, rel_bias=b, **options), (*qkv, bias.double()), grad
    )
    assert [x.dtype for x in results] == [torch.bfloat16] * 4 + [torch.float64]


CALL = torch.ops.genrec.relu_attention
PACKED_CALL = torch.ops.genrec.relu_attention_varlen
REST = (None, None, None, False, 0.5, 0.0, False)


@compiled
@pytest.mark.skipif(DEVICE.type != "cpu", reason="the offsets of a GPU are not looked at")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CALL(Q, Q[:, :2], Q, *REST), r"k must be \(B, H, Lk, D\)"),
        (lambda: CALL(Q, Q, Q[:, :, :4], *REST), r"v must be \(B, H, Lk, Dv\)"),
        (lambda: CALL(Q, Q.double(), Q, *REST), "one dtype"),
        (lambda: CALL(Q[0], Q[0], Q[0], *REST), "4 dimensions"),
        (lambda: CALL(Q.int(), Q.int(), Q.int(), *REST), "q must be float64"),
        (lambda: CALL(Q, Q, Q, torch.zeros(2, 4).long(), *REST[1:]), r"key_limit must be \(B, Lq\)"),
        (lambda: CALL(Q, Q, Q, torch.zeros(2, 5), *REST[1:]), "key_limit must be int32 or int64"),
        (lambda: CALL(Q, Q, Q, None, torch.zeros(3, 0), *REST[2:]), r"rel_bias must be \(H, R\)"),
        (lambda: CALL(Q, Q, Q, None, None, torch.ones(3), *REST[3:]), r"divisors must be \(B,\)"),
        (lambda: PACKED_CALL(T, T, T, CU, CU + 4, 2, 2, *REST), "cu_seqlens_k must start at 0"),
        (lambda: PACKED_CALL(T, T, T, CU * 2, CU, 2, 2, *REST), "end at most at 5, the number of tokens"),
        (
            lambda: PACKED_CALL(T, T, T, torch.tensor([0, 3, 1]), CU, 2, 2, *REST),
            "cu_seqlens_q must start at 0, never fall",
        ),
        (lambda: PACKED_CALL(T, T, T, CU[:2], CU, 2, 2, *REST), "one shape"),
        (
            lambda: torch.ops.genrec.relu_attention_backward(Q[..., :3], Q, Q, Q, *REST),
            "grad must have the shape of the output",
        ),
    ],
)
def test_the_kernel_itself_refuses_what_it_cannot_do(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
