import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from op_contract import DEVICE, assert_compiles, assert_measured, assert_same, permuted, strided

from genrec.kernels import group_layer_norm
from genrec.kernels.group_layer_norm import reference
from genrec.kernels.library import PLAIN


def inputs(shape=(3, 5), d=8, groups=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(*shape, d, dtype=dtype, generator=g) for _ in range(2))
    weight, bias = (torch.randn(groups, d, dtype=dtype, generator=g) for _ in range(2))
    ids = torch.randint(0, groups, shape, generator=g)
    return tuple(tensor.to(DEVICE) for tensor in (ids, x, residual, weight, bias))


def both(module, ids):
    """The two forms as functions of (x, weight, bias) and (x, residual, weight, bias)."""
    return (
        lambda x, w, b: module(x, ids, w, b),
        lambda x, r, w, b: module(x, ids, w, b, residual=r),
    )


def test_formula():
    ids, x, residual, weight, bias = inputs()
    expected = torch.stack(
        [F.layer_norm(row, (8,), weight[i], bias[i]) for row, i in zip(x.view(-1, 8), ids.view(-1), strict=True)]
    ).view(x.shape)
    torch.testing.assert_close(group_layer_norm(x, ids, weight, bias), expected)
    y, s = group_layer_norm(x - residual, ids, weight, bias, residual=residual)
    torch.testing.assert_close(s, x)
    torch.testing.assert_close(y, expected)


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 6), min_size=0, max_size=3), st.integers(1, 20), st.integers(1, 5),
    st.sampled_from([torch.int32, torch.int64]), st.booleans(),
)  # fmt: skip
def test_any_shape(shape, d, groups, index, scattered):
    ids, x, residual, weight, bias = inputs(tuple(shape), d, groups)
    ids = ids.to(index)
    if scattered:
        ids, x, residual, weight, bias = (strided(t) for t in (ids, x, residual, weight, bias))
    ours, ours_add = both(group_layer_norm, ids)
    plain, plain_add = both(reference.group_layer_norm, ids)
    assert_same(ours, plain, [x, weight, bias], 1e-9)
    assert_same(ours_add, plain_add, [x, residual, weight, bias], 1e-9)


def test_permuted_inputs_and_gradients():
    ids, *tensors = inputs((3, 5))
    x, residual, weight, bias = (permuted(t) for t in tensors)
    ours, ours_add = both(group_layer_norm, ids)
    plain, plain_add = both(reference.group_layer_norm, ids)
    assert_same(lambda *a: ours(*a).permute(2, 1, 0), lambda *a: plain(*a).permute(2, 1, 0), [x, weight, bias], 1e-9)
    assert_same(ours_add, plain_add, [x, residual, weight, bias], 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_measured_error(dtype, offset):
    ids, x, residual, weight, bias = inputs((40, 7), 96, 4)
    x = x + offset  # a mean far from zero is where one-pass variances and half-precision statistics fail
    ours, ours_add = both(group_layer_norm, ids)
    plain, plain_add = both(reference.group_layer_norm, ids)
    assert_measured(ours, plain, [x, weight, bias], dtype)
    assert_measured(ours_add, plain_add, [x, residual, weight, bias], dtype)


def test_gradcheck():
    ids, *tensors = inputs((2, 3), 4)
    x, residual, weight, bias = (t.requires_grad_() for t in tensors)
    ours, ours_add = both(group_layer_norm, ids)
    assert torch.autograd.gradcheck(ours, (x, weight, bias))
    assert torch.autograd.gradcheck(ours_add, (x, residual, weight, bias))


def test_only_one_of_two_outputs_used():
    ids, *tensors = inputs((2, 3), 4)
    x, residual, weight, bias = (t.requires_grad_() for t in tensors)
    _, s = group_layer_norm(x, ids, weight, bias, residual=residual)
    gradients = torch.autograd.grad(s.sum(), (x, residual, weight))
    assert [g.unique().tolist() for g in gradients] == [[1.0], [1.0], [0.0]]


def test_opcheck():
    ids, *tensors = inputs(dtype=torch.float32)
    x, residual, weight, bias = (t.requires_grad_() for t in tensors)
    torch.library.opcheck(torch.ops.genrec.group_layer_norm.default, (x, ids, weight, bias, 1e-5))
    torch.library.opcheck(torch.ops.genrec.add_group_layer_norm.default, (x, residual, ids, weight, bias, 1e-5))
    plain = [t.detach() for t in (x, x, weight, bias)]
    torch.library.opcheck(
        torch.ops.genrec.group_layer_norm_backward.default, (plain[0], plain[1], ids, *plain[2:], 1e-5)
    )
    moved = [permuted(t) for t in plain]
    torch.library.opcheck(torch.ops.genrec.add_group_layer_norm.default, (moved[0], moved[1], ids, *moved[2:], 1e-5))


def test_compiles():
    calls = []
    for shape in ((3, 5), (4, 6)):
        ids, x, residual, weight, bias = inputs(shape, dtype=torch.float32)
        calls.append([x, residual, weight, bias, ids.float()])
    assert_compiles(lambda x, r, w, b, ids: group_layer_norm(x, ids.long(), w, b, residual=r), *calls)
    assert_compiles(lambda x, r, w, b, ids: group_layer_norm(x, ids.long(), w, b), *calls)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    ids, x, residual, weight, bias = inputs(dtype=torch.float32)
    outside = group_layer_norm(x, ids, weight, bias)
    with torch.autocast(DEVICE.type, dtype=dtype):
        assert torch.equal(group_layer_norm(x, ids, weight, bias), outside)
        y, s = group_layer_norm(x.to(dtype), ids, weight, bias, residual=residual)
    assert y.dtype == s.dtype == torch.float32  # a low-precision branch joins a float32 residual stream
    assert group_layer_norm(x.to(dtype), ids, weight, bias).dtype == dtype


def test_mixed_dtypes_have_gradients_of_their_own():
    ids, x, residual, weight, bias = inputs(dtype=torch.float32)
    leaves = [x.bfloat16().requires_grad_(), *(t.clone().requires_grad_() for t in (residual, weight, bias))]
    y, _ = group_layer_norm(leaves[0], ids, *leaves[2:], residual=leaves[1])
    gradients = torch.autograd.grad(y.square().sum(), leaves)
    assert [g.dtype for g in gradients] == [leaf.dtype for leaf in leaves]


def test_affine_in_float64_beside_a_narrower_x():
    ids, x, _, weight, bias = inputs()
    leaves = [x.float().requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    y = group_layer_norm(leaves[0], ids, *leaves[1:])
    assert y.dtype == torch.float32
    gradients = torch.autograd.grad(y.sum(), leaves)
    expected = torch.autograd.grad(reference.group_layer_norm(x, ids, *leaves[1:]).sum(), leaves[1:])
    assert [g.dtype for g in gradients] == [leaf.dtype for leaf in leaves]
    for ours, truth in zip(gradients[1:], expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)


def test_unknown_group():
    ids, x, _, weight, bias = inputs(dtype=torch.float32)
    for bad in (-1, 3):
        ids[1, 2] = bad
        if DEVICE.type == "cpu":
            sentence = f"group_ids holds {bad}; expected 0 … 2, one of 3 groups"
            with pytest.raises(IndexError, match=sentence):
                group_layer_norm(x, ids, weight, bias)
            with pytest.raises((IndexError, RuntimeError), match=sentence):
                torch.compile(group_layer_norm, backend="eager", fullgraph=True)(x, ids, weight, bias)
            with pytest.raises(IndexError, match=sentence):  # where csrc/ was not built
                PLAIN["group_layer_norm"](x, ids, weight, bias, 1e-5)
        else:  # a GPU is not asked for values
            y = group_layer_norm(x, ids, weight, bias)
            assert y[1, 2].isnan().all()
            assert y.isnan().sum() == 8


X, IDS, W = torch.zeros(2, 3, 4), torch.zeros(2, 3).long(), torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: group_layer_norm(X, IDS[:1], W, W), ValueError, r"group_ids has shape \(1, 3\)"),
        (lambda: group_layer_norm(X, IDS.float(), W, W), TypeError, r"group_ids is torch.float32"),
        (lambda: group_layer_norm(X.int(), IDS, W, W), TypeError, r"x is torch.int32"),
        (lambda: group_layer_norm(X, IDS, W[:, 1:], W), ValueError, r"weight has shape \(5, 3\)"),
        (lambda: group_layer_norm(X, IDS, W[0], W), ValueError, r"weight has shape \(4,\)"),
        (lambda: group_layer_norm(X, IDS, W, W[1:]), ValueError, r"bias has shape \(4, 4\)"),
        (lambda: group_layer_norm(X, IDS, W[:0], W[:0]), ValueError, r"weight has 0 groups"),
        (lambda: group_layer_norm(X[..., :0], IDS, W, W), ValueError, r"x has shape \(2, 3, 0\)"),
        (lambda: group_layer_norm(X, IDS, W, W, residual=X[0]), ValueError, r"residual has shape \(3, 4\)"),
        (lambda: group_layer_norm(X, IDS, W.to("meta"), W), ValueError, r"weight is on meta"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
