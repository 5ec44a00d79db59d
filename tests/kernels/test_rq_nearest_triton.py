"""The Triton kernels of nearest-code search: on a GPU where there is one, in Triton's interpreter elsewhere."""

import importlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_contract import DEVICE, assert_measured, permuted, strided
from test_rq_nearest import assert_nearest, inputs

from genrec.kernels import rq_nearest
from genrec.kernels.rq_nearest import reference

pytestmark = pytest.mark.usefixtures("triton_kernels")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["one launch for all levels", "one launch for each level"])
def form(request, triton_kernels, monkeypatch):
    """Which of the two depends on the number of rows; here it is chosen."""
    kernels = importlib.import_module("genrec.kernels.rq_nearest.triton")
    monkeypatch.setattr(kernels, "PROGRAMS", 1 if request.param == "one launch for all levels" else 512)


@pytest.mark.usefixtures("form")
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 20), st.integers(1, 40), st.lists(st.integers(1, 90), min_size=1, max_size=3),
    st.sampled_from([None, strided, permuted]),
)  # fmt: skip
def test_nearest(n, d, sizes, move):
    x, codebooks = inputs(n, d, sizes)
    if move:
        x, codebooks = move(x), [move(c) for c in codebooks]
    assert_nearest(x, codebooks, *rq_nearest(x, codebooks))


@pytest.mark.usefixtures("form")
def test_more_rows_and_codes_than_a_tile():
    x, codebooks = inputs(131, 40, (150, 65))
    assert_nearest(x, codebooks, *rq_nearest(x, codebooks))


@pytest.mark.parametrize("scale", [1.0, 1e-12])
def test_products_are_those_of_float32(scale):
    """Codes around a row, each farther than the last by little more than float32 may confuse: TF32, or two planes of
    bfloat16 for three, choose wrongly here."""
    g = torch.Generator().manual_seed(0)
    for _ in range(10):
        x, angle = torch.randn(1, 2, generator=g), 6.2832 * torch.rand(40, generator=g)
        radius = 1 + 2.0**-17 * torch.randperm(40, generator=g)
        book = x + radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
        x, book = (scale * t.to(DEVICE) for t in (x, book))
        assert_nearest(x, [book], *rq_nearest(x, [book]))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(("n", "d", "k"), [(7, 1, 20), (30, 3, 150)])
def test_ties_go_to_the_lowest_index(n, d, k):
    rng = np.random.default_rng(n)
    x, book = rng.integers(-2, 3, (n, d)).astype(np.float32), rng.integers(-1, 2, (k, d)).astype(np.float32)
    expected = ((x[:, None] - book) ** 2).sum(2).argmin(1)  # small integers: every distance is exact
    codes, _ = rq_nearest(torch.from_numpy(x).to(DEVICE), [torch.from_numpy(book).to(DEVICE)])
    np.testing.assert_array_equal(codes[:, 0].cpu().numpy(), expected)


def test_duplicate_codes_are_one_distance_wherever_they_lie():
    x, (book,) = inputs(20, 19, (37,))
    if DEVICE.type == "cpu":  # numpy's products are: their last bit depends on the column
        x, book = ((4 * t).round() / 4 for t in (x, book))
    codes, _ = rq_nearest(x, [book.repeat(5, 1)])
    assert torch.equal(codes, rq_nearest(x, [book])[0])


@pytest.mark.parametrize(
    ("x_dtype", "dtype"),
    [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.float16, torch.float16)],
)
def test_half_precision_is_searched_in_float32(x_dtype, dtype):
    x, codebooks = inputs(40, 16, (50, 60), dtype)
    x = x.to(x_dtype)
    codes, quantized = rq_nearest(x, codebooks)
    exact, total = rq_nearest(x.float(), [c.float() for c in codebooks])
    assert torch.equal(codes, exact)
    assert torch.equal(quantized, total.to(dtype))
    assert_nearest(x.float(), [c.float() for c in codebooks], codes, total)


def test_not_a_number_gets_a_valid_code():
    x, codebooks = inputs()
    x[0, 0], x[1], x[2] = float("nan"), float("inf"), -float("inf")
    codes, quantized = rq_nearest(x, codebooks)
    sizes = torch.tensor([len(c) for c in codebooks], device=DEVICE)
    assert ((codes >= 0) & (codes < sizes)).all()
    assert torch.equal(codes[3:], rq_nearest(x[3:], codebooks)[0])
    assert quantized.isfinite().all()


def test_a_code_that_is_not_a_number_is_never_chosen():
    x, (book,) = inputs(20, 6, (40,))
    expected, _ = rq_nearest(x, [book[1:]])
    book[0] = float("nan")
    assert torch.equal(rq_nearest(x, [book])[0], expected + 1)


@pytest.mark.usefixtures("form")
def test_a_row_does_not_depend_on_the_others():
    x, codebooks = inputs(140, 33, (70, 30))
    codes, quantized = rq_nearest(x, codebooks)
    for rows in (slice(5, 6), slice(100, 140)):
        alone = rq_nearest(x[rows], codebooks)
        assert torch.equal(alone[0], codes[rows])
        assert torch.equal(alone[1], quantized[rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient(dtype):
    """Codes with no row, with one and with more than a block of rows."""
    x, codebooks = inputs(60, 10, (3, 70))
    codes, _ = rq_nearest(x, [c.to(dtype) for c in codebooks])
    book = [c.to(dtype).double() for c in codebooks]

    def gather(*books):
        return sum(book[codes[:, level]] for level, book in enumerate(books))

    assert_measured(lambda *c: rq_nearest(x, c)[1], gather, codebooks, dtype)
    assert torch.equal(gather(*book).to(dtype), rq_nearest(x, [c.to(dtype) for c in codebooks])[1])


def test_gradient_of_any_layout_is_the_same_twice():
    x, codebooks = inputs(60, 10, (3, 70))
    leaves = [c.requires_grad_() for c in codebooks]
    _, quantized = rq_nearest(x, leaves)
    upstream = torch.randn(10, 60, generator=torch.Generator().manual_seed(1)).to(DEVICE).T
    expected = torch.autograd.grad(quantized, leaves, upstream.contiguous(), retain_graph=True)
    wide = torch.full((60, 24), float("nan"), device=DEVICE)
    wide[:, :10] = upstream
    for layout in (upstream, wide[:, :10], strided(upstream)):
        found = torch.autograd.grad(quantized, leaves, layout, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    ones = torch.autograd.grad(quantized.sum(), leaves)
    codes, _ = rq_nearest(x, codebooks)
    for level, grad in enumerate(ones):
        count = torch.bincount(codes[:, level], minlength=len(grad))
        assert torch.equal(grad, count[:, None].float().expand_as(grad))


def test_no_rows():
    x, codebooks = inputs(0, 6, (5, 17))
    leaves = [c.requires_grad_() for c in codebooks]
    codes, quantized = rq_nearest(x, leaves)
    assert codes.shape == (0, 2)
    assert quantized.shape == (0, 6)
    for grad in torch.autograd.grad(quantized.sum(), leaves):
        assert (grad == 0).all()


def test_opcheck():
    x, codebooks = inputs(20, 6, (5, 17))
    torch.library.opcheck(torch.ops.genrec.rq_nearest.default, (x, [c.requires_grad_() for c in codebooks]))
    codes, quantized = rq_nearest(x, codebooks)
    torch.library.opcheck(torch.ops.genrec.rq_nearest_backward.default, (quantized.detach(), codes, [5, 17]))


def test_the_plain_form_agrees():
    x, codebooks = inputs(40, 12, (30, 50, 70))
    for ours, plain in zip(rq_nearest(x, codebooks), reference.rq_nearest(x, codebooks), strict=True):
        assert torch.equal(ours, plain)
