# mypy: allow-untyped-defs
"""SwiGLU experts on the GPU, forward: two grouped products and one sum; x is never gathered in memory.

  1. hidden: the load of a tile gathers rows of x by token, gate and up are two products in one program, and SwiGLU is
     the epilogue. hidden (T·k, F), in the dtype of x, lies in the order of the experts.
  2. rows: hidden · Wdᵀ of the row's expert, scattered to the row's (token, slot) place.
  3. combine: y_t = Σ_j w_tj · row_tj in float32, slot after slot. The rows (T·k, D) are one more pass over memory; in
     exchange there are no atomics, so no sum depends on timing, and a routing weight multiplies before it is rounded.

Same token, same bits, whatever else is in the batch: no tile splits the inner dimension, its steps run in order, and
all shape classes of an architecture have one BLOCK_K and one matrix instruction. For the latter BLOCK_M is at least 64
where a warp group multiplies (sm_90) or the tensor memory (sm_100), though a decoding step could do with 16. It reads
every weight once, which is 1 FLOP per byte and row in half precision: 64 rows still leave it limited by memory.

Floor: 6·T·k·D·F FLOP; the experts in use, x and y once; hidden and rows, (T·k, F + D), written and read.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from genrec.kernels.launch import launch
from genrec.kernels.moe.triton_order import TABLE, Order, find_tile, swizzle

PRECISION = tl.constexpr("tf32x3")  # of float32 products: three of TF32, on tensor cores and close to float32


@triton.jit
def load_rows(x, row, d, dim, stride_row, stride_d, WHOLE: tl.constexpr):
    """x[row, d], (rows, d): the left side of a product. WHOLE: d stays below dim in every tile."""
    tile = x + row.to(tl.int64)[:, None] * stride_row + d.to(tl.int64)[None, :] * stride_d
    return tl.load(tile) if WHOLE else tl.load(tile, mask=(d < dim)[None, :], other=0)


@triton.jit
def load_weight(w, k, n, inner, width, stride_k, stride_n, WHOLE: tl.constexpr):
    """w[k, n], (inner, width): the right side of a product, zero outside. WHOLE: there is no outside in any tile."""
    tile = w + n.to(tl.int64)[None, :] * stride_n + k.to(tl.int64)[:, None] * stride_k
    return tl.load(tile) if WHOLE else tl.load(tile, mask=(k < inner)[:, None] & (n < width)[None, :], other=0)


@triton.jit(do_not_specialize=["row_tiles"])
def hidden_kernel(
    x, w_gate_up, order, offsets, hidden,
    row_tiles, experts, top_k, dim, width, stride_xt, stride_xd, stride_we, stride_wf, stride_wd,
    WHOLE: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """hidden[row] = silu(x_t Wgᵀ) ⊙ (x_t Wuᵀ) with t the token of the row."""
    tile, column = swizzle(tl.program_id(0), row_tiles, tl.cdiv(width, BLOCK_N), GROUP)
    expert, part = find_tile(offsets, tile, experts, BLOCK_M, EXPERTS)
    if expert >= experts:
        return
    row = tl.load(offsets + expert) + part * BLOCK_M + tl.arange(0, BLOCK_M)
    end = tl.load(offsets + expert + 1)
    token = tl.load(order + row, mask=row < end, other=0) // top_k
    f, d = column * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)

    w_gate = w_gate_up + expert.to(tl.int64) * stride_we
    w_up = w_gate + tl.cast(width, tl.int64) * stride_wf
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, dim, BLOCK_K):
        x_MK = load_rows(x, token, start + d, dim, stride_xt, stride_xd, WHOLE)
        gate_KN = load_weight(w_gate, start + d, f, dim, width, stride_wd, stride_wf, WHOLE)
        up_KN = load_weight(w_up, start + d, f, dim, width, stride_wd, stride_wf, WHOLE)
        gate = tl.dot(x_MK, gate_KN, gate, input_precision=PRECISION)
        up = tl.dot(x_MK, up_KN, up, input_precision=PRECISION)

    act = gate * tl.sigmoid(gate) * up
    place = row.to(tl.int64)[:, None] * width + f[None, :]
    tl.store(hidden + place, act.to(hidden.dtype.element_ty), mask=(row < end)[:, None] & (f < width)[None, :])


@triton.jit(do_not_specialize=["row_tiles"])
def rows_kernel(
    left, w, order, offsets, out,
    row_tiles, experts, inner, width, stride_we, stride_wk, stride_wn,
    WHOLE: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[pair of the row] = left[row] · w[expert], (inner,) times (inner, width)."""
    tile, column = swizzle(tl.program_id(0), row_tiles, tl.cdiv(width, BLOCK_N), GROUP)
    expert, part = find_tile(offsets, tile, experts, BLOCK_M, EXPERTS)
    if expert >= experts:
        return
    row = tl.load(offsets + expert) + part * BLOCK_M + tl.arange(0, BLOCK_M)
    end = tl.load(offsets + expert + 1)
    n, k = column * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inner, BLOCK_K):
        left_MK = load_rows(left, tl.minimum(row, end - 1), start + k, inner, inner, 1, WHOLE)
        w_KN = load_weight(w + expert.to(tl.int64) * stride_we, start + k, n, inner, width, stride_wk, stride_wn, WHOLE)
        total = tl.dot(left_MK, w_KN, total, input_precision=PRECISION)

    pair = tl.load(order + row, mask=row < end, other=0)
    place = pair.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(row < end)[:, None] & (n < width)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def combine_kernel(
    rows, weights, indices, y,
    tokens, experts, top_k, dim, stride_wt, stride_wk, stride_it, stride_ik,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y_t = Σ_j w_tj · rows[t · k + j], every weight 1 without `weights`; NaN where an index has no expert."""
    BLOCK_T: tl.constexpr = BLOCK // BLOCK_D
    columns = tl.cdiv(dim, BLOCK_D)
    token = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (token < tokens)[:, None] & (d < dim)[None, :]
    row = rows + token[:, None] * top_k * dim + d[None, :]
    index = indices + token * stride_it
    if weights is not None:
        weight = weights + token * stride_wt
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for _ in range(top_k):
        expert = tl.load(index, mask=token < tokens, other=0)
        known = (expert >= 0) & (expert < experts)
        value = tl.load(row, mask=inside & known[:, None], other=float("nan")).to(tl.float32)
        if weights is not None:
            value *= tl.load(weight, mask=token < tokens, other=0).to(tl.float32)[:, None]
            weight += stride_wk
        total += value
        row += dim
        index += stride_ik
    tl.store(y + token[:, None] * dim + d[None, :], total.to(y.dtype.element_ty), mask=inside)


def product(kernel: str, order: Order, inner: int, width: int, *tensors: Tensor) -> dict[str, Any]:
    """The constants of a grouped product of (inner,) with (inner, width) that reads these tensors."""
    config = TABLE.config(kernel, tensors[0], align=alignment(*tensors), rows=order.rows)
    whole = inner % config["BLOCK_K"] == 0 and width % config["BLOCK_N"] == 0
    return config | {"WHOLE": whole, "EXPERTS": order.width}


def alignment(*tensors: Tensor) -> int:
    """The shape class for loads: 16 where they all take 16 bytes at once, 1 where any goes element by element."""
    aligned = all(1 in x.stride() and all(stride == 1 or stride % 16 == 0 for stride in x.stride()) for x in tensors)
    return 16 if aligned else 1


def multiply(left: Tensor, w: Tensor, order: Order) -> Tensor:
    """left (T·k, K) in the order of the experts, w (E, K, N) → (T·k, N), every row at its pair."""
    inner, width = w.shape[1:]
    out = left.new_empty((order.pairs, width))
    config = product("rows", order, inner, width, left, w)
    row_tiles = order.tiles(config["BLOCK_M"])
    launch(
        rows_kernel, (row_tiles * triton.cdiv(width, config["BLOCK_N"]),), left, w, order.order, order.offsets, out,
        row_tiles, order.experts, inner, width, *w.stride(), **config,
    )  # fmt: skip
    return out


def combine(rows: Tensor, weights: Tensor | None, indices: Tensor, experts: int) -> Tensor:
    """rows (T·k, D) → (T, D), the weighted sum of every token's rows."""
    (tokens, top_k), dim = indices.shape, rows.shape[1]
    y = rows.new_empty((tokens, dim))
    config = TABLE.config("combine", rows)
    block_d = max(min(triton.next_power_of_2(dim), config["BLOCK"]), 1)
    blocks = triton.cdiv(tokens, config["BLOCK"] // block_d) * triton.cdiv(dim, block_d)
    launch(
        combine_kernel, (blocks,), rows, weights, indices, y, tokens, experts, top_k, dim,
        *((0, 0) if weights is None else weights.stride()), *indices.stride(), BLOCK_D=block_d, **config,
    )  # fmt: skip
    return y


def experts(x: Tensor, weights: Tensor, indices: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """(T, D), (T, k), (T, k), (E, 2F, D), (E, D, F) → (T, D)"""
    order = Order(indices, w_gate_up.shape[0], x)
    dim, width = w_down.shape[1:]
    hidden = x.new_empty((order.pairs, width))
    config = product("hidden", order, dim, width, x, w_gate_up)
    row_tiles = order.tiles(config["BLOCK_M"])
    launch(
        hidden_kernel, (row_tiles * triton.cdiv(width, config["BLOCK_N"]),),
        x, w_gate_up, order.order, order.offsets, hidden,
        row_tiles, order.experts, order.top_k, dim, width, *x.stride(), *w_gate_up.stride(), **config,
    )  # fmt: skip
    return combine(multiply(hidden, w_down.mT, order), weights, indices, order.experts)
