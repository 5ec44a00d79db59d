"""The Triton kernels of group layer norm: on a GPU where there is one, in Triton's interpreter elsewhere."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from op_contract import DEVICE, assert_measured, permuted, strided

from genrec.kernels import group_layer_norm
from genrec.kernels.group_layer_norm import reference

pytestmark = pytest.mark.usefixtures("triton_kernels")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(shape=(3, 5), d=8, groups=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(*shape, d, generator=g) for _ in range(2))
    weight, bias = (torch.randn(groups, d, generator=g) for _ in range(2))
    ids = torch.randint(0, groups, shape, generator=g)
    return ids.to(DEVICE), *(tensor.to(DEVICE, dtype) for tensor in (x, residual, weight, bias))


def assert_both_measured(ids, x, residual, weight, bias, dtype):
    """The norm alone and with a residual, outputs and all gradients."""
    assert_measured(
        lambda x, w, b: group_layer_norm(x, ids, w, b),
        lambda x, w, b: reference.group_layer_norm(x, ids, w, b),
        [x, weight, bias],
        dtype,
    )
    assert_measured(
        lambda x, r, w, b: group_layer_norm(x, ids, w, b, residual=r),
        lambda x, r, w, b: reference.group_layer_norm(x, ids, w, b, residual=r),
        [x, residual, weight, bias],
        dtype,
    )


def gradients(ids, x, weight, bias, upstream=None):
    """Output and gradients of (x, weight, bias)."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = torch.ops.genrec.group_layer_norm(leaves[0], ids, *leaves[1:], 1e-5)  # unchecked: ids may be out of range
    return y, *torch.autograd.grad(y, leaves, torch.ones_like(y) if upstream is None else upstream)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "offset"), [(5, 0.0), (300, 50.0)])
def test_measured_error(dtype, d, offset):
    ids, x, residual, weight, bias = inputs((5, 3), d, 4)
    assert_both_measured(ids, x + offset, residual, weight, bias, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_longer_than_a_chunk(dtype):
    assert_both_measured(*inputs((3,), 8200, 2), dtype)


@pytest.mark.parametrize("groups", [1, 4, 5, 11])
def test_any_number_of_groups(groups):
    """Some of them without a token: their gradient is 0."""
    ids, *tensors = inputs((70,), 20, groups)
    ids[ids == groups - 1] = 0
    assert_both_measured(ids, *tensors, torch.float32)
    _, _, grad_weight, grad_bias = gradients(ids, tensors[0], *tensors[2:])
    empty = torch.bincount(ids, minlength=groups) == 0
    assert (grad_weight[empty] == 0).all()
    assert (grad_bias[empty] == 0).all()


def test_more_tokens_than_one_program_has():
    ids, *tensors = inputs((3, 50), 9, 2)
    assert_both_measured(ids, *tensors, torch.float32)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 4), min_size=0, max_size=3), st.integers(1, 40), st.integers(1, 6),
    st.sampled_from([torch.int32, torch.int64]), st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([None, strided, permuted]),
)  # fmt: skip
def test_any_shape(shape, d, groups, index, dtype, move):
    """Not in float16: where a row has no variance, eps^-3/2 overflows in the plain form's gradient."""
    ids, *tensors = inputs(tuple(shape), d, groups)
    ids = ids.to(index)
    if move:
        ids, *tensors = (move(t) for t in (ids, *tensors))
    assert_both_measured(ids, *tensors, dtype)


def test_strides():
    ids, x, residual, weight, bias = inputs((4, 6), 10, 3)
    expected, expected_s = group_layer_norm(x, ids, weight, bias, residual=residual)
    wide = torch.full((4, 6, 16), float("nan"), device=DEVICE)
    wide[..., :10] = x
    swapped = residual.transpose(0, 1).contiguous().transpose(0, 1)
    y, s = group_layer_norm(wide[..., :10], permuted(ids), permuted(weight), strided(bias), residual=swapped)
    assert torch.equal(y, expected)
    assert torch.equal(s, expected_s)
    row, first = x[0, 0].expand_as(x), ids[0, 0].expand_as(ids)
    y = group_layer_norm(row, first, weight, bias)
    assert torch.equal(y, group_layer_norm(row.contiguous(), first.contiguous(), weight, bias))


def test_expanded_gradient():
    ids, x, _, weight, bias = inputs((4, 6), 10, 3)
    one = torch.ones((), device=DEVICE)
    row = torch.randn(10, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for upstream in (one.expand_as(x), row.expand_as(x), permuted(row.expand_as(x))):
        expected = gradients(ids, x, weight, bias, upstream.contiguous())
        for ours, truth in zip(gradients(ids, x, weight, bias, upstream), expected, strict=True):
            assert torch.equal(ours, truth)


@pytest.mark.parametrize(
    ("x_dtype", "residual_dtype", "sum_dtype"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_mixed_dtypes(x_dtype, residual_dtype, sum_dtype):
    """float32 affines beside half precision; s is rounded before it is normed, and every gradient has its own dtype."""
    ids, x, residual, weight, bias = inputs((4, 6), 33, 3)
    leaves = [x.to(x_dtype), residual.to(residual_dtype), weight, bias]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    y, s = group_layer_norm(leaves[0], ids, *leaves[2:], residual=leaves[1])
    assert y.dtype == s.dtype == sum_dtype
    assert torch.equal(s, (leaves[0].float() + leaves[1].float()).to(sum_dtype))
    assert torch.equal(y, group_layer_norm(s, ids, *leaves[2:]))
    found = torch.autograd.grad(y.float().square().sum(), leaves)
    assert [g.dtype for g in found] == [leaf.dtype for leaf in leaves]


def test_unknown_groups():
    """A row of NaN, forward and backward; the affine gets nothing from it, and nothing out of bounds is read."""
    ids, x, _, weight, bias = inputs((40,), 12, 5)
    upstream = torch.cos(torch.arange(x.numel(), device=DEVICE)).view(x.shape)
    for index, bad in ((torch.int64, [-1, 5, 1 << 40]), (torch.int32, [-1, 5, 1 << 30])):
        broken = ids.to(index)
        broken[[3, 20, 39]] = torch.tensor(bad, dtype=index, device=DEVICE)
        known = torch.ones(40, dtype=torch.bool, device=DEVICE)
        known[[3, 20, 39]] = False
        y, grad_x, grad_weight, grad_bias = gradients(broken, x, weight, bias, upstream)
        assert y[~known].isnan().all()
        assert grad_x[~known].isnan().all()
        clean = gradients(broken[known], x[known], weight, bias, upstream[known])
        assert torch.equal(y[known], clean[0])
        assert torch.equal(grad_x[known], clean[1])
        torch.testing.assert_close(grad_weight, clean[2])
        torch.testing.assert_close(grad_bias, clean[3])


def test_a_token_that_is_not_a_number_stays_alone():
    ids, x, _, weight, bias = inputs((40,), 12, 3)
    ids[7], ids[8] = 0, 1
    expected = gradients(ids, x, weight, bias)
    x[7] = float("nan")
    y, grad_x, grad_weight, grad_bias = gradients(ids, x, weight, bias)
    others = torch.arange(40, device=DEVICE) != 7
    assert torch.equal(y[others], expected[0][others])
    assert torch.equal(grad_x[others], expected[1][others])
    assert torch.equal(grad_weight[1:], expected[2][1:])
    assert grad_weight[0].isnan().all()
    assert torch.equal(grad_bias, expected[3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_the_others(dtype):
    ids, x, _, weight, bias = inputs((100,), 24, 6, dtype)
    y, grad_x, *affine = gradients(ids, x, weight, bias)
    for rows in (slice(17, 18), slice(60, 93)):
        alone = gradients(ids[rows], x[rows], weight, bias)
        assert torch.equal(alone[0], y[rows])
        assert torch.equal(alone[1], grad_x[rows])
    again = gradients(ids, x, weight, bias)
    for first, second in zip((y, grad_x, *affine), again, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), ()])
def test_empty_and_single(shape):
    ids, *tensors = inputs(shape, 6, 2)
    assert_both_measured(ids, *tensors, torch.float32)


def test_opcheck():
    ids, x, residual, weight, bias = inputs()
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    torch.library.opcheck(torch.ops.genrec.add_group_layer_norm.default, (*leaves[:2], ids, *leaves[2:], 1e-5))
    plain = [t.detach() for t in (x, x, weight, bias)]
    torch.library.opcheck(
        torch.ops.genrec.group_layer_norm_backward.default, (plain[0], plain[1], ids, *plain[2:], 1e-5)
    )
