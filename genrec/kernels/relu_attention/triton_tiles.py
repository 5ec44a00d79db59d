# mypy: ignore-errors
"""What the Triton kernels of ReLU attention share: where a sequence lies, what its rows see, a tile of weights, and
matrices, which are kept as tiles of CHUNK columns: one of them as a rule, several where one would not fit in registers.

All kernels read (B, H, L, D) tensors and packed (T, H, D) tensors through the same three strides: of the batch (0 where
packed), of the head and of the row. Offsets of rows are int64, so tensors may be larger than 2³¹ elements.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sequence(cu_seqlens, b, length):
    """First token and number of tokens of sequence b; without offsets all sequences have `length` rows of their own."""
    first = tl.zeros((), tl.int64)
    if cu_seqlens is not None:
        first = tl.load(cu_seqlens + b).to(tl.int64)
        length = (tl.load(cu_seqlens + b + 1) - first).to(tl.int32)
    return first, length


@triton.jit
def head_of(pointer, b, h, stride_b, stride_h):
    """Where the rows of one head and sequence begin."""
    return pointer + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h


@triton.jit
def matrix(pointer, first, stride, row, inside, DIM: tl.constexpr, CHUNK: tl.constexpr, LATE: tl.constexpr = False):
    """Rows `row` of a matrix from row `first` on, 0 where not `inside`: (tiles, pointers to the rows, inside).

    The tiles, of CHUNK columns, are loaded now, which lets the compiler copy them ahead of time. LATE leaves them to
    be loaded where they are used, every time, which takes the fewest registers.
    """
    pointers = pointer + (first + row) * stride
    tiles = ()
    if not LATE:
        for i in tl.static_range(0, tl.cdiv(max(DIM, 1), CHUNK)):
            tiles = tiles + (load(pointers, inside, i * CHUNK, DIM, CHUNK),)
    return tiles, pointers, inside


@triton.jit
def load(pointers, inside, column, DIM: tl.constexpr, CHUNK: tl.constexpr):
    columns = column + tl.arange(0, CHUNK)
    mask = inside[:, None]
    if DIM % CHUNK != 0 or DIM == 0:
        mask = mask & (columns < DIM)[None, :]
    return tl.load(pointers[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def tile(matrix, i, DIM: tl.constexpr, CHUNK: tl.constexpr):
    """Columns i · CHUNK … (i + 1) · CHUNK − 1 of a matrix."""
    tiles, pointers, inside = matrix
    if len(tiles) > 0:
        return tiles[i]
    return load(pointers, inside, i * CHUNK, DIM, CHUNK)


@triton.jit
def store(pointer, first, stride, row, inside, tiles, DIM: tl.constexpr, CHUNK: tl.constexpr):
    for i in tl.static_range(len(tiles)):
        columns = i * CHUNK + tl.arange(0, CHUNK)
        pointers = pointer + (first + row)[:, None] * stride + columns[None, :]
        tl.store(pointers, tiles[i].to(pointer.dtype.element_ty), mask=inside[:, None] & (columns < DIM)[None, :])


@triton.jit
def zeros(ROWS: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(0, max(DIM, 1), CHUNK):
        tiles = tiles + (tl.zeros((ROWS, CHUNK), tl.float32),)
    return tiles


@triton.jit
def plus(a, b):
    tiles = ()
    for i in tl.static_range(len(a)):
        tiles = tiles + (a[i] + b[i],)
    return tiles


@triton.jit
def times(tiles, factor):
    """Tiles times a number, or a column of numbers."""
    result = ()
    for i in tl.static_range(len(tiles)):
        result = result + (tiles[i] * factor,)
    return result


@triton.jit
def inner(a, b, DIM: tl.constexpr, CHUNK: tl.constexpr):
    """A Bᵀ of two matrices, in float32."""
    if len(a[0]) > 0:
        product = tl.dot(a[0][0], tl.trans(b[0][0]), input_precision="tf32x3")
        for i in tl.static_range(1, len(a[0])):
            product = tl.dot(a[0][i], tl.trans(b[0][i]), product, input_precision="tf32x3")
    else:
        product = tl.zeros((a[1].shape[0], b[1].shape[0]), tl.float32)
        for column in tl.range(0, DIM, CHUNK, num_stages=2):
            a_c, b_c = load(a[1], a[2], column, DIM, CHUNK), load(b[1], b[2], column, DIM, CHUNK)
            product = tl.dot(a_c, tl.trans(b_c), product, input_precision="tf32x3")
    return product


@triton.jit
def outer(sums, a, b, DIM: tl.constexpr, CHUNK: tl.constexpr):
    """sums + A B of a tile and a matrix, A rounded to the dtype of B."""
    tiles = ()
    for i in tl.static_range(len(sums)):
        b_i = tile(b, i, DIM, CHUNK)
        tiles = tiles + (tl.dot(a.to(b_i.dtype), b_i, sums[i], input_precision="tf32x3"),)
    return tiles


@triton.jit
def clear_slack(pointer, stride, start, end, step, DIM: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """Zeros in the rows start … end − 1 that are this program's: ROWS of them every `step` rows."""
    for first in range(start, end, step):
        row = tl.arange(0, ROWS)
        store(pointer, first, stride, row, first + row < end, zeros(ROWS, DIM, CHUNK), DIM, CHUNK)


@triton.jit
def sight(row, first_row, limit, stride_limit, length_q, length_k, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr):
    """What a block of rows sees: (anchor, end, nearest, furthest, all_see, none_sees).

    A row sees the keys before its `end`, and keys are as far away as they are from its `anchor`, which lies between
    nearest and furthest. All rows of the block see the keys before all_see, none sees one from none_sees on.
    """
    inside = row < length_q
    diagonal = row + (length_k - length_q)
    if limit is not None:
        seen = tl.load(limit + row.to(tl.int64) * stride_limit, mask=inside, other=0)
        end = tl.minimum(tl.maximum(seen, 0), length_k).to(tl.int32)
        anchor = end - 1
        all_see = tl.min(tl.where(inside, end, length_k))
        none_sees = tl.max(end)
        nearest, furthest = all_see - 1, none_sees - 1
    else:
        nearest = first_row + (length_k - length_q)
        furthest = tl.minimum(first_row + BLOCK_M, length_q) - 1 + (length_k - length_q)
        anchor = diagonal
        if CAUSAL:
            end = diagonal + 1
            all_see, none_sees = nearest + 1, furthest + 1
        else:
            end = tl.zeros_like(diagonal) + length_k
            all_see, none_sees = length_k, length_k
    return anchor, end, nearest, furthest, all_see, none_sees


@triton.jit
def divisor_of(divisors, divisor, b, length_k, VISIBLE: tl.constexpr):
    """n of all rows of sequence b, as in op.py; 1 where every row has its own, the number of keys it sees."""
    if divisors is not None:
        return tl.load(divisors + b).to(tl.float32)
    if VISIBLE:
        return 1.0
    return tl.where(divisor > 0, divisor, tl.maximum(length_k, 1).to(tl.float32))


@triton.jit
def weights_of(
    scores, anchor, end, key, nearest, furthest, all_see, first_key, rel_bias, buckets, scale, BLOCK_N: tl.constexpr
):  # fmt: skip
    """relu(scale · scores + rel_bias[distance]), 0 where a row does not see a key.

    A tile of distant keys takes one bias for all, and a tile that all rows see is not masked. anchor, end and key
    broadcast to the scores, whichever way they lie.
    """
    scores *= scale
    if rel_bias is not None:
        last = buckets - 1
        if (nearest - (first_key + BLOCK_N - 1) >= last) | (first_key - furthest >= last):
            scores += tl.load(rel_bias + last).to(tl.float32)
        else:
            scores += tl.load(rel_bias + tl.minimum(tl.abs(anchor - key), last)).to(tl.float32)
    weights = tl.maximum(scores, 0.0, propagate_nan=tl.PropagateNan.ALL)  # as relu of plain PyTorch does
    if first_key + BLOCK_N > all_see:
        weights = tl.where(key < end, weights, 0.0)
    return weights


@triton.jit
def any_positive(weights, SKIP: tl.constexpr):
    """Whether a tile of weights, each ≥ 0 or not a number, holds anything but zeros; without SKIP nobody looks.

    As integers, for then NaN counts as well and the reduction is one instruction.
    """
    if SKIP:
        return tl.max(weights.to(tl.uint32, bitcast=True)) != 0
    return True
