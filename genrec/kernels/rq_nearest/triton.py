# mypy: allow-untyped-defs
"""Residual nearest-code search on the GPU: genrec::rq_nearest and its backward pass.

The search is 2·N·D·ΣK FLOP; no distance leaves the chip. A program has BLOCK_N rows and passes over the codes in tiles
of BLOCK_K; of every tile of products it keeps the least ‖c‖² − 2 r·c and its index.

    many rows   one launch for all levels: the program subtracts the code from its rows and goes on (`_search`)
    few rows    for each level several programs share a tile of rows, each with a part of the codes (`_search_part`),
                then one takes the nearest of the parts and subtracts it (`_choose`)

Both compute the same bits, whatever the batch: one tile shape, one order of summation for all.

Precision. A float32 is exactly the sum of three bfloat16 of 8 bits each, its planes. A float32 product on tensor cores
is six products of planes, added from the small ones to the large; the three left out are below 2⁻²⁵ of |r·c|, less than
float32 rounds. Three products in TF32 take the same time and leave out up to 2⁻²⁰. bfloat16 and float16 codebooks have
one and two planes, hence three and five products. Sums are float32, rounded to nearest after every BLOCK_D features, so
that the error stays inside D · 2⁻²³ · (‖c‖² + 2 ‖r‖ ‖c‖), the rounding of the expression itself.

`_split` makes the planes once per call, padded with zeros to whole tiles; all that follows reads planes, without masks,
strides or dtypes. They take 6·(N + ΣK)·D bytes. The residuals live in planes too: the tile of a program, 192 KB at
BLOCK_N = 128 and D = 256, is more than shared memory has room for beside the codes, and stays in the L2 cache instead.

The gradient of a code is the sum of the gradients of its rows: a stable sort of the codes lays them side by side, and a
program for each code adds them in that order. No atomics, the same bits every time. Floor: grad read once per level,
the gradients of the codebooks written. A code that has most of the rows has them all in one program: slow, not wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genrec.kernels.launch import Table, launch
from genrec.kernels.library import implement

TABLE = Table(Path(__file__).with_name("launch.csv"))
PLANES = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 1}
PROGRAMS = 512  # that a search has at least, if there are codes enough: a few for every multiprocessor


@triton.jit(do_not_specialize=["rows", "padded"])
def _split(
    x, planes, squares, rows, padded, dim, width, stride_row, stride_dim,
    PLANES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x (N, D) → planes (PLANES, N and padding, D and padding), and ‖x‖² in float32, infinite for the padding."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for chunk in range(0, width, BLOCK_D):
        feature = chunk + tl.arange(0, BLOCK_D)
        mask = (row < rows)[:, None] & (feature < dim)[None, :]
        at = row[:, None] * stride_row + feature.to(tl.int64)[None, :] * stride_dim
        rest = tl.load(x + at, mask=mask, other=0).to(tl.float32)
        total += rest * rest
        for plane in tl.static_range(PLANES):
            part = rest.to(tl.bfloat16)
            at = (plane * padded + row)[:, None] * width + feature[None, :]
            tl.store(planes + at, part, mask=(row < padded)[:, None] & (feature < width)[None, :])
            rest -= part.to(tl.float32)
    tl.store(squares + row, tl.where(row < rows, tl.sum(total, 1), float("inf")), mask=row < padded)


@triton.jit
def _value(planes, row, feature, padded, width, PLANES: tl.constexpr):
    """The float32 values back; every sum is exact."""
    value = tl.load(planes + row[:, None] * width + feature[None, :]).to(tl.float32)
    for plane in tl.static_range(1, PLANES):
        value += tl.load(planes + (plane * padded + row)[:, None] * width + feature[None, :]).to(tl.float32)
    return value


@triton.jit
def _nearest(
    residual, book, squares, row, first, last, rows, codes, width,
    PLANES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Distance less ‖r‖² and index of the nearest of codes first … last − 1; `first` where no distance is finite."""
    best = tl.full((BLOCK_N,), float("inf"), tl.float32)
    index = tl.zeros((BLOCK_N,), tl.int32) + first
    for start in range(first, last, BLOCK_K):
        code = start + tl.arange(0, BLOCK_K).to(tl.int64)
        product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for chunk in range(0, width, BLOCK_D):
            feature = chunk + tl.arange(0, BLOCK_D)
            some = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            for smaller in tl.static_range(3):  # 2⁻¹⁶ of the whole, 2⁻⁸, and most of it
                for plane in tl.static_range(3 - smaller):
                    if 2 - smaller - plane < PLANES:
                        r_row, c_row = plane * rows + row, (2 - smaller - plane) * codes + code
                        r = tl.load(residual + r_row[:, None] * width + feature[None, :])
                        c = tl.load(book + c_row[:, None] * width + feature[None, :])
                        some = tl.dot(r, tl.trans(c), some)
            product += some
        distance = tl.load(squares + code)[None, :] - 2 * product
        distance = tl.where(distance == distance, distance, float("inf"))  # what is not a number is infinitely far
        least, at = tl.min(distance, 1, return_indices=True)
        closer = least < best  # not where equal: ties go to the lowest index
        best = tl.where(closer, least, best)
        index = tl.where(closer, start + at, index)
    return best, index


@triton.jit
def _subtract(
    residual, book, row, code, rows, codes, width,
    PLANES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """r −= c. All threads have read the old residual before, and see the new one after."""
    tl.debug_barrier()
    for chunk in range(0, width, BLOCK_D):
        feature = chunk + tl.arange(0, BLOCK_D)
        rest = _value(residual, row, feature, rows, width, 3)
        rest -= _value(book, code.to(tl.int64), feature, codes, width, PLANES)
        for plane in tl.static_range(3):
            part = rest.to(tl.bfloat16)
            tl.store(residual + (plane * rows + row)[:, None] * width + feature[None, :], part)
            rest -= part.to(tl.float32)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["rows"])
def _search(
    residual, books, squares, sizes, codes, rows, padded, width,
    LEVELS: tl.constexpr, PLANES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All levels of one tile of rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    for level in tl.static_range(LEVELS):
        book, size = books[level], sizes[level]
        _, code = _nearest(
            residual, book, squares[level], row, 0, size, padded, size, width, PLANES, BLOCK_N, BLOCK_K, BLOCK_D
        )
        tl.store(codes + row * LEVELS + level, code.to(tl.int64), mask=row < rows)
        if level + 1 < LEVELS:
            _subtract(residual, book, row, code, padded, size, width, PLANES, BLOCK_N, BLOCK_D)


@triton.jit(do_not_specialize=["share"])
def _search_part(
    residual, book, squares, best, index, share, padded, size, width,
    PLANES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One level of one tile of rows, codes part · share … + share."""
    row, part = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    first, last = part * share, tl.minimum((part + 1) * share, size)
    distance, code = _nearest(
        residual, book, squares, row, first, last, padded, size, width, PLANES, BLOCK_N, BLOCK_K, BLOCK_D
    )
    tl.store(best + part * padded + row, distance)
    tl.store(index + part * padded + row, code)


@triton.jit(do_not_specialize=["level", "parts", "rows"])
def _choose(
    residual, book, best, index, codes, level, levels, parts, rows, padded, size, width,
    PLANES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The nearest of the parts, the first of equals, and the residual without it."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    distance, code = tl.load(best + row), tl.load(index + row)
    for part in range(1, parts):
        other = tl.load(best + part * padded + row)
        closer = other < distance
        distance = tl.where(closer, other, distance)
        code = tl.where(closer, tl.load(index + part * padded + row), code)
    tl.store(codes + row * levels + level, code.to(tl.int64), mask=row < rows)
    _subtract(residual, book, row, code, padded, size, width, PLANES, BLOCK_N, BLOCK_D)


@triton.jit(do_not_specialize=["rows"])
def _quantize(
    books, strides_row, strides_dim, codes, quantized, rows, dim,
    LEVELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Σ_l books[l][codes[:, l]], level after level in float32."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    for chunk in range(0, dim, BLOCK_D):
        feature = chunk + tl.arange(0, BLOCK_D).to(tl.int64)
        mask = (row < rows)[:, None] & (feature < dim)[None, :]
        total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for level in tl.static_range(LEVELS):
            code = tl.load(codes + row * LEVELS + level, mask=row < rows, other=0)
            at = code[:, None] * strides_row[level] + feature[None, :] * strides_dim[level]
            total += tl.load(books[level] + at, mask=mask, other=0).to(tl.float32)
        tl.store(quantized + row[:, None] * dim + feature[None, :], total.to(quantized.dtype.element_ty), mask=mask)


@triton.jit
def _gather(grad, order, bounds, grad_book, dim, grad_stride, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Gradient of one code: the sum of grad[order[begin … end]], BLOCK_N rows at a time."""
    code, feature = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin, end = tl.load(bounds + code), tl.load(bounds + code + 1)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        row = tl.load(order + place, mask=place < end, other=0)
        mask = (place < end)[:, None] & (feature < dim)[None, :]
        total += tl.load(grad + row[:, None] * grad_stride + feature[None, :], mask=mask, other=0).to(tl.float32)
    tl.store(grad_book + code * dim + feature, tl.sum(total, 0).to(grad_book.dtype.element_ty), mask=feature < dim)


def _rq_nearest(x: Tensor, codebooks: list[Tensor]) -> tuple[Tensor, Tensor]:
    (rows, dim), levels, count = x.shape, len(codebooks), PLANES[codebooks[0].dtype]
    search, each = TABLE.config("search", codebooks[0]), TABLE.config("rows", codebooks[0])
    width = triton.cdiv(dim, search["BLOCK_D"]) * search["BLOCK_D"]
    residual, _ = _planes(x, 3, search["BLOCK_N"], width)
    books, squares = zip(*(_planes(book, count, search["BLOCK_K"], width) for book in codebooks), strict=True)

    codes, padded = x.new_empty(rows, levels, dtype=torch.int64), residual.shape[1]
    tiles = padded // search["BLOCK_N"]
    parts = PROGRAMS // max(tiles, 1)
    if parts <= 1:
        sizes = tuple(book.shape[1] for book in books)
        tensors = (residual, books, squares, sizes, codes)
        launch(_search, (tiles,), *tensors, rows, padded, width, LEVELS=levels, PLANES=count, **search)
    else:
        for level, (book, square) in enumerate(zip(books, squares, strict=True)):
            _search_level(residual, book, square, codes, level, parts, search, each)

    quantized, grid = codebooks[0].new_empty(x.shape), (triton.cdiv(rows, each["BLOCK_N"]),)
    strides_row, strides_dim = zip(*(book.stride() for book in codebooks), strict=True)
    arguments = (tuple(codebooks), strides_row, strides_dim, codes, quantized, rows, dim)
    launch(_quantize, grid, *arguments, LEVELS=levels, **each)
    return quantized, codes


def _planes(x: Tensor, count: int, block: int, width: int) -> tuple[Tensor, Tensor]:
    """x (N, D) → its planes (count, padded, width), N padded to whole blocks, and the squared norms of its rows."""
    (rows, dim), padded = x.shape, triton.cdiv(len(x), block) * block
    config = TABLE.config("split", x)
    planes = x.new_empty(count, padded, width, dtype=torch.bfloat16)
    squares = x.new_empty(padded, dtype=torch.float32)
    grid = (triton.cdiv(padded, config["BLOCK_N"]),)
    launch(_split, grid, x, planes, squares, rows, padded, dim, width, *x.stride(), PLANES=count, **config)
    return planes, squares


def _search_level(
    residual: Tensor, book: Tensor, squares: Tensor, codes: Tensor, level: int, parts: int,
    search: dict[str, int], each: dict[str, int],
) -> None:  # fmt: skip
    """codes[:, level], found by `parts` programs for each tile of rows, fewer where there are few codes."""
    count, size, width = book.shape
    padded = residual.shape[1]
    share = triton.cdiv(size, search["BLOCK_K"] * parts) * search["BLOCK_K"]
    parts = triton.cdiv(size, share)
    best = residual.new_empty(parts, padded, dtype=torch.float32)
    index = residual.new_empty(parts, padded, dtype=torch.int32)
    grid = (padded // search["BLOCK_N"], parts)
    launch(_search_part, grid, residual, book, squares, best, index, share, padded, size, width, PLANES=count, **search)
    arguments = (residual, book, best, index, codes, level, codes.shape[1], parts, len(codes), padded, size, width)
    launch(_choose, (padded // each["BLOCK_N"],), *arguments, PLANES=count, **each)


def _rq_nearest_backward(grad: Tensor, codes: Tensor, sizes: list[int]) -> list[Tensor]:
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    dim, config = grad.shape[1], TABLE.config("gather", grad)
    ordered, order = torch.sort(codes.to(torch.int32).T.contiguous(), dim=1, stable=True)
    first = torch.arange(max(sizes) + 1, dtype=torch.int32, device=codes.device).expand(len(sizes), -1)
    bounds = torch.searchsorted(ordered, first.contiguous())
    grads = [grad.new_empty(size, dim) for size in sizes]
    for level, grad_book in enumerate(grads):
        grid = (len(grad_book), triton.cdiv(dim, config["BLOCK_D"]))
        launch(_gather, grid, grad, order[level], bounds[level], grad_book, dim, grad.stride(0), **config)
    return grads


def examples(dtype: torch.dtype, device: torch.device | str = "meta") -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches for compilation without a GPU: few and many rows, D that fills its tiles and D that does not."""
    for rows, dim in (64, 256), (100_000, 20):
        x = torch.empty(rows, dim, dtype=dtype, device=device)
        books = [torch.empty(size, dim, dtype=dtype, device=device) for size in (1024, 4096, 16384)]
        codes = torch.empty(rows, 3, dtype=torch.int64, device=device)
        yield f"N={rows} D={dim}", partial(_rq_nearest, x, books)
        yield f"N={rows} D={dim}, backward", partial(_rq_nearest_backward, x, codes, [1024, 4096, 16384])


implement("rq_nearest", _rq_nearest)
implement("rq_nearest_backward", _rq_nearest_backward)
