# mypy: allow-untyped-defs
"""The gradient of rel_bias: dbias[d] = Σ of dS over all pairs of a row and a key at distance d, without atomics.

Entries of the same distance lie on diagonals of a tile of dS. Shifting every row of the tile by its anchor, a gather on
chip, turns the diagonals into rows, which are then added up.

A program has a window of BLOCK_W distances of one head, keeps their sums in registers, and computes only the tiles that
hold them: BLOCK_W + BLOCK_M keys for each block of rows, 2 products each. All windows compute about 2 · min(R, L) · L
pairs of a sequence. Pieces of at most ROWS rows are dealt out to at most GROUPS programs per window: the partial sums,
(GROUPS, H, R) float32, do not grow with the batch. torch adds them in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from genrec.kernels.launch import launch
from genrec.kernels.relu_attention.triton_call import Call
from genrec.kernels.relu_attention.triton_tiles import divisor_of, head_of, inner, matrix, sequence, sight, weights_of

GROUPS = 64
ROWS = 1024


@triton.jit
def sums_by_distance(
    tile_NM, anchor, first_key, distance, AHEAD: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Sums of a tile's entries at each `distance`, of keys ahead of the anchor of their row or of the others."""
    if AHEAD:
        index_WM = anchor[None, :] + distance[:, None] - first_key
        found_WM = (index_WM >= 0) & (index_WM < BLOCK_N) & (distance > 0)[:, None]
    else:
        index_WM = anchor[None, :] - distance[:, None] - first_key
        found_WM = (index_WM >= 0) & (index_WM < BLOCK_N)
    shifted_WM = tl.gather(tile_NM, tl.where(found_WM, index_WM, 0), 0)
    return tl.sum(tl.where(found_WM, shifted_WM, 0.0), 1)


@triton.jit
def add_by_distance(
    table, tile_NM, anchor, key, nearest, furthest, first_key, buckets,
    AHEAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Add a tile of dS to the table with atomics."""
    last = buckets - 1
    last_key = first_key + BLOCK_N - 1
    if (furthest - first_key >= last) | (last_key - nearest >= last):
        far_NM = tl.where(tl.abs(anchor[None, :] - key[:, None]) >= last, tile_NM, 0.0)
        tl.atomic_add(table + last, tl.sum(far_NM), sem="relaxed")
    for first in range(tl.maximum(nearest - last_key, 0), tl.minimum(furthest - first_key + 1, last), BLOCK_W):
        distance = first + tl.arange(0, BLOCK_W)
        sums = sums_by_distance(tile_NM, anchor, first_key, distance, False, BLOCK_N)
        tl.atomic_add(table + distance, sums, mask=distance < last, sem="relaxed")
    if AHEAD:
        for first in range(tl.maximum(first_key - furthest, 0), tl.minimum(last_key - nearest + 1, last), BLOCK_W):
            distance = first + tl.arange(0, BLOCK_W)
            sums = sums_by_distance(tile_NM, anchor, first_key, distance, True, BLOCK_N)
            tl.atomic_add(table + distance, sums, mask=distance < last, sem="relaxed")


@triton.jit(do_not_specialize=["batch", "length_q", "length_k", "near", "windows", "groups", "pieces"])
def backward_bias(
    grad, q, k, v, partial, cu_q, cu_k, limit, rel_bias, divisors,
    stride_gb, stride_gh, stride_g, stride_qb, stride_qh, stride_q, stride_kb, stride_kh, stride_k,
    stride_vb, stride_vh, stride_v, stride_lb, stride_l,
    batch, heads, length_q, length_k, near, windows, groups, pieces, buckets, scale, divisor,
    CAUSAL: tl.constexpr, VISIBLE: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    CHUNK: tl.constexpr, CHUNK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr, ROWS: tl.constexpr, LATE: tl.constexpr = False,
):  # fmt: skip
    """partial[group, h, d] of a window of distances d < near, over every groups-th piece of a sequence."""
    program = tl.program_id(0)
    group = program % groups
    h = program // groups % heads
    first_distance = program // groups // heads * BLOCK_W
    distance = first_distance + tl.arange(0, BLOCK_W)
    rel_bias += h * buckets
    sums = tl.zeros((BLOCK_W,), tl.float32)
    for item in tl.range(group, batch * pieces, groups, num_stages=1):
        b = item // pieces
        first_q, rows = sequence(cu_q, b, length_q)
        first_k, keys = sequence(cu_k, b, length_k)
        n = divisor_of(divisors, divisor, b, keys, VISIBLE)
        limit_b = limit
        if limit is not None:
            limit_b = limit + b.to(tl.int64) * stride_lb + first_q * stride_l
        first_piece = item % pieces * ROWS
        for first_row in tl.range(first_piece, tl.minimum(first_piece + ROWS, rows), BLOCK_M, num_stages=1):
            row = first_row + tl.arange(0, BLOCK_M)
            anchor, end, nearest, furthest, all_see, none_sees = sight(
                row, first_row, limit_b, stride_l, rows, keys, CAUSAL, BLOCK_M
            )
            q_MD = matrix(head_of(q, b, h, stride_qb, stride_qh), first_q, stride_q, row, row < rows, DIM, CHUNK, LATE)
            grad_bh = head_of(grad, b, h, stride_gb, stride_gh)
            grad_MD = matrix(grad_bh, first_q, stride_g, row, row < rows, DIM_V, CHUNK_V, LATE)
            k_bh, v_bh = head_of(k, b, h, stride_kb, stride_kh), head_of(v, b, h, stride_vb, stride_vh)
            share = 1 / n
            if VISIBLE:
                share = 1 / tl.maximum(end, 1).to(tl.float32)[None, :]
            for AHEAD in tl.static_range(0, 1 if CAUSAL or limit is not None else 2):
                if AHEAD:
                    low, high = nearest + first_distance, furthest + first_distance + BLOCK_W
                else:
                    low, high = nearest - first_distance - BLOCK_W + 1, furthest - first_distance + 1
                for first_key in tl.range(tl.maximum(low, 0), tl.minimum(high, none_sees), BLOCK_N, num_stages=1):
                    key = first_key + tl.arange(0, BLOCK_N)
                    seen = key < none_sees
                    k_ND = matrix(k_bh, first_k, stride_k, key, seen, DIM, CHUNK, LATE)
                    v_ND = matrix(v_bh, first_k, stride_v, key, seen, DIM_V, CHUNK_V, LATE)
                    weights_NM = weights_of(
                        inner(k_ND, q_MD, DIM, CHUNK), anchor[None, :], end[None, :],
                        key[:, None], nearest, furthest, all_see, first_key, rel_bias, buckets, scale, BLOCK_N,
                    )  # fmt: skip
                    grad_weights_NM = inner(v_ND, grad_MD, DIM_V, CHUNK_V) * share
                    grad_scores_NM = tl.where(weights_NM <= 0, 0.0, grad_weights_NM)
                    sums += sums_by_distance(grad_scores_NM, anchor, first_key, distance, AHEAD, BLOCK_N)
    tl.store(partial + (group * heads + h) * near + distance, sums, mask=distance < near)


def near_gradient(grad: Tensor, call: Call, grad_bias: Tensor) -> None:
    """Write the gradients of all entries but the last."""
    near = min(call.buckets - 1, max(call.length_q, call.length_k))  # farther apart no pair is
    pieces = triton.cdiv(call.length_q, ROWS)
    groups = min(GROUPS, call.batch * pieces)
    if near == 0 or groups == 0:
        return
    constants = call.constants("backward_bias")
    windows = triton.cdiv(near, constants["BLOCK_W"])
    partial = torch.empty(groups, call.heads, near, dtype=torch.float32, device=grad.device)
    launch(
        backward_bias, (groups * call.heads * windows,),
        grad, call.q, call.k, call.v, partial, call.cu_q, call.cu_k, call.limit, call.rel_bias, call.divisors,
        *call.strides(grad, call.q, call.k, call.v), *call.limit_strides(),
        call.batch, call.heads, call.length_q, call.length_k, near, windows, groups, pieces,
        call.buckets, call.scale, call.divisor, ROWS=ROWS, **constants,
    )  # fmt: skip
    grad_bias[:, :near] = partial.sum(0)
