import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from op_contract import DEVICE, assert_compiles, assert_same, strided

from genrec.kernels import rq_nearest
from genrec.kernels.library import native_isa
from genrec.kernels.rq_nearest import reference


def inputs(n=20, d=6, sizes=(5, 17, 40), dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, *codebooks = (torch.randn(rows, d, dtype=dtype, generator=g).to(DEVICE) for rows in (n, *sizes))
    return x, codebooks


def assert_nearest(x, codebooks, codes, quantized):
    """Every code is the nearest in float64 distance; a farther one is accepted only inside the rounding that the
    documented expression ‖c‖² − 2 r·c has in x's precision, D · eps · (‖c‖² + 2 ‖r‖ ‖c‖)."""
    residual, total = x, torch.zeros_like(x)
    for level, codebook in enumerate(codebooks):
        wide, book, chosen = residual.double(), codebook.double(), codes[:, level]
        distances = (wide[:, None] - book).square().sum(2)
        norm = book.norm(dim=1)
        error = x.shape[1] * torch.finfo(x.dtype).eps * (norm.square() + 2 * wide.norm(dim=1)[:, None] * norm)
        got, rounding = distances.gather(1, chosen[:, None])[:, 0], error.amax(1)
        assert (got - distances.amin(1) <= 2 * rounding).all()
        second = distances.topk(min(2, len(book)), largest=False).values[:, -1]
        clear = (second - distances.amin(1) > 2 * rounding) | (len(book) == 1)
        assert torch.equal(chosen[clear], distances.argmin(1)[clear])
        residual, total = residual - codebook[chosen], total + codebook[chosen]
    assert torch.equal(quantized, total)


@settings(max_examples=60)
@given(
    st.integers(0, 40), st.integers(1, 33), st.lists(st.integers(1, 70), min_size=1, max_size=4), st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_nearest(n, d, sizes, scattered, dtype):
    x, codebooks = inputs(n, d, sizes, dtype)
    if scattered:
        x, codebooks = strided(x), [strided(c) for c in codebooks]
    assert_nearest(x, codebooks, *rq_nearest(x, codebooks))
    assert_nearest(x, codebooks, *reference.rq_nearest(x, codebooks))


def test_large():
    x, codebooks = inputs(500, 32, (1024, 300, 257))
    assert_nearest(x, codebooks, *rq_nearest(x, codebooks))


@settings(max_examples=40)
@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 90))
def test_ties_go_to_the_lowest_index(n, d, k):
    rng = np.random.default_rng(n * 100 + d)
    x, book = rng.integers(-2, 3, (n, d)).astype(np.float32), rng.integers(-1, 2, (k, d)).astype(np.float32)
    expected = ((x[:, None] - book) ** 2).sum(2).argmin(1)  # small integers: every distance is exact
    for search in (rq_nearest, reference.rq_nearest):
        codes, _ = search(torch.from_numpy(x).to(DEVICE), [torch.from_numpy(book).to(DEVICE)])
        np.testing.assert_array_equal(codes[:, 0].cpu().numpy(), expected)


def test_duplicate_codes_are_one_distance_wherever_they_lie():
    x, (book,) = inputs(64, 19, (37,))
    codes, _ = rq_nearest(x, [book.repeat(9, 1)])
    assert torch.equal(codes, rq_nearest(x, [book])[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_searched_in_float32(dtype):
    x, codebooks = inputs(200, 16, (50, 60), dtype)
    codes, quantized = rq_nearest(x, codebooks)
    exact, total = rq_nearest(x.float(), [c.float() for c in codebooks])
    assert torch.equal(codes, exact)
    assert torch.equal(quantized, total.to(dtype))


def test_autocast_changes_nothing():
    x, codebooks = inputs()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        codes, quantized = rq_nearest(x, codebooks)
        mixed = rq_nearest(x.bfloat16(), codebooks)[1]
    assert torch.equal(codes, rq_nearest(x, codebooks)[0])
    assert quantized.dtype == mixed.dtype == torch.float32


def test_not_a_number_gets_a_valid_code():
    x, codebooks = inputs()
    x[0, 0], x[1], x[2] = float("nan"), float("inf"), -float("inf")
    codes, quantized = rq_nearest(x, codebooks)
    sizes = torch.tensor([len(c) for c in codebooks], device=DEVICE)
    assert ((codes >= 0) & (codes < sizes)).all()
    assert torch.equal(codes[3:], rq_nearest(x[3:], codebooks)[0])
    assert quantized.isfinite().all()


def test_gradient_goes_to_the_codebooks_only():
    x, codebooks = inputs(dtype=torch.float64)
    x.requires_grad_()
    assert_same(lambda *c: rq_nearest(x, c)[1], lambda *c: reference.rq_nearest(x, c)[1], codebooks)
    leaves = [c.requires_grad_() for c in codebooks]
    codes, quantized = rq_nearest(x, leaves)
    assert not codes.requires_grad
    quantized.sum().backward()
    assert x.grad is None
    used = [torch.bincount(codes[:, level], minlength=len(c)) for level, c in enumerate(leaves)]
    for count, c in zip(used, leaves, strict=True):
        torch.testing.assert_close(c.grad, count[:, None].double().expand_as(c))


def test_gradcheck():
    x, codebooks = inputs(6, 3, (4, 5), torch.float64)
    assert torch.autograd.gradcheck(lambda *c: rq_nearest(x, c)[1], [c.requires_grad_() for c in codebooks])


def test_opcheck():
    x, codebooks = inputs()
    torch.library.opcheck(torch.ops.genrec.rq_nearest.default, (x, [c.requires_grad_() for c in codebooks]))
    codes, quantized = rq_nearest(x, codebooks)
    torch.library.opcheck(torch.ops.genrec.rq_nearest_backward.default, (quantized.detach(), codes, [5, 17, 40]))


def test_compiles():
    calls = [[x, *codebooks] for x, codebooks in (inputs(20), inputs(23))]
    assert_compiles(lambda x, *c: rq_nearest(x, c)[1], *calls)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_instruction_set(isa, dtype, monkeypatch):
    monkeypatch.setenv("GENREC_CPU_ISA", isa)
    assert native_isa() in (None, "portable", "avx2", "avx512")
    for n, d, sizes in ((70, 9, (5, 33, 100)), (1, 3, (2,)), (400, 16, (64, 65))):
        x, codebooks = inputs(n, d, sizes, dtype)
        assert_nearest(x, codebooks, *rq_nearest(x, codebooks))
        x, codebooks = (x * 3).round(), [(c * 3).round() for c in codebooks]  # small integers: exact, with many ties
        assert torch.equal(rq_nearest(x, codebooks)[0], reference.rq_nearest(x, codebooks)[0])


X, BOOK = torch.zeros(5, 4), torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rq_nearest(X[0], [BOOK]), ValueError, r"x has shape \(4,\); expected 2 dimensions \(N, D\)"),
        (lambda: rq_nearest(X.int(), [BOOK]), TypeError, r"x is torch.int32"),
        (lambda: rq_nearest(X, []), ValueError, r"codebooks is empty"),
        (lambda: rq_nearest(X, [BOOK, BOOK[:, 1:]]), ValueError, r"codebooks\[1\] has shape \(3, 3\)"),
        (lambda: rq_nearest(X, [BOOK, BOOK[0]]), ValueError, r"codebooks\[1\] has shape \(4,\)"),
        (lambda: rq_nearest(X, [BOOK[:0]]), ValueError, r"codebooks\[0\] has 0 codes"),
        (lambda: rq_nearest(X, [BOOK, BOOK.double()]), TypeError, r"codebooks\[1\] is torch.float64"),
        (lambda: rq_nearest(X, [BOOK.int()]), TypeError, r"codebooks\[0\] is torch.int32"),
        (lambda: rq_nearest(X, [BOOK.to("meta")]), ValueError, r"codebooks\[0\] is on meta"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
