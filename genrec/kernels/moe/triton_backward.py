# mypy: allow-untyped-defs
"""SwiGLU experts on the GPU, backward: every gradient from the inputs alone, nothing saved by the forward pass.

    B = dY Wd     dw = ⟨B, A⟩     dA = w ⊙ B     dU = dA ⊙ silu(G)     dG = dA ⊙ U ⊙ silu'(G)
    dWd = dYᵀ (w ⊙ A)     dWgu = [dG, dU]ᵀ X     dX = [dG, dU] Wgu

  1. hidden_backward: G, U and B share the inner dimension D and one loop: three products in one program. Its epilogue
     writes [dG, dU] (T·k, 2F) and w ⊙ A (T·k, F) in the order of the experts, and ⟨B, A⟩ over its own columns.
  2. weights_gradient: sums these partial products over the column tiles, left to right.
  3. expert_gradient, for dWd and then dWgu: one program per tile of one expert's weight goes through the expert's rows
     in order and gathers dY or X by token. Experts without rows write zeros. The gathered load waits for the token's
     number, so half of num_stages go into fetching numbers ahead: 7 stages hold 3 tiles.
  4. rows and combine of the forward pass, for dX.

Deterministic without atomics; the gradients of a token do not depend on the batch, for the reasons given in
triton_experts.py (BLOCK_N of hidden_backward is the same in all shape classes too, as it groups the sum of dw).
w ⊙ A is freed before the rows of dX are written: scratch is (T·k, 2F) + (T·k, max(D, F)).

Floor: 18·T·k·D·F FLOP, three times the forward pass: 2 of its 9 products of 2·T·k·D·F recompute G and U.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from genrec.kernels.launch import launch
from genrec.kernels.moe.triton_experts import PRECISION, alignment, combine, load_rows, load_weight, multiply, product
from genrec.kernels.moe.triton_order import TABLE, Order, expert_of, find_tile, swizzle


@triton.jit(do_not_specialize=["row_tiles", "pairs"])
def hidden_backward_kernel(
    grad, x, weights, w_gate_up, w_down, order, offsets, grad_gate_up, weighted, partial,
    row_tiles, pairs, experts, top_k, dim, width, stride_gt, stride_gd, stride_xt, stride_xd, stride_wt, stride_wk,
    stride_ue, stride_uf, stride_ud, stride_de, stride_dd, stride_df,
    WHOLE: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """[dG, dU], w ⊙ A and the partial ⟨B, A⟩ of a tile of rows and hidden columns."""
    tile, column = swizzle(tl.program_id(0), row_tiles, tl.cdiv(width, BLOCK_N), GROUP)
    expert, part = find_tile(offsets, tile, experts, BLOCK_M, EXPERTS)
    if expert >= experts:
        return
    row = tl.load(offsets + expert) + part * BLOCK_M + tl.arange(0, BLOCK_M)
    end = tl.load(offsets + expert + 1)
    pair = tl.load(order + row, mask=row < end, other=0)
    token = pair // top_k
    f, d = column * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)

    w_gate = w_gate_up + expert.to(tl.int64) * stride_ue
    w_up = w_gate + tl.cast(width, tl.int64) * stride_uf
    w_back = w_down + expert.to(tl.int64) * stride_de
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    back = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, dim, BLOCK_K):
        x_MK = load_rows(x, token, start + d, dim, stride_xt, stride_xd, WHOLE)
        gate_KN = load_weight(w_gate, start + d, f, dim, width, stride_ud, stride_uf, WHOLE)
        gate = tl.dot(x_MK, gate_KN, gate, input_precision=PRECISION)
        up_KN = load_weight(w_up, start + d, f, dim, width, stride_ud, stride_uf, WHOLE)
        up = tl.dot(x_MK, up_KN, up, input_precision=PRECISION)
        grad_MK = load_rows(grad, token, start + d, dim, stride_gt, stride_gd, WHOLE)
        back_KN = load_weight(w_back, start + d, f, dim, width, stride_dd, stride_df, WHOLE)
        back = tl.dot(grad_MK, back_KN, back, input_precision=PRECISION)

    slot = (pair % top_k).to(tl.int64)
    weight = tl.load(weights + token.to(tl.int64) * stride_wt + slot * stride_wk).to(tl.float32)[:, None]
    inside = (row < end)[:, None] & (f < width)[None, :]
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    act = silu * up
    score = tl.sum(tl.where((f < width)[None, :], back * act, 0), 1)
    tl.store(partial + column.to(tl.int64) * pairs + pair, score, mask=row < end)
    place = row.to(tl.int64)[:, None] * width + f[None, :]
    tl.store(weighted + place, (weight * act).to(weighted.dtype.element_ty), mask=inside)
    back *= weight
    grad_gate = back * up * (sigmoid + silu * (1 - sigmoid))
    place += row.to(tl.int64)[:, None] * width  # rows of 2F
    tl.store(grad_gate_up + place, grad_gate.to(grad_gate_up.dtype.element_ty), mask=inside)
    tl.store(grad_gate_up + place + width, (back * silu).to(grad_gate_up.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["pairs"])
def weights_gradient_kernel(
    partial, indices, grad_weights, pairs, columns, experts, top_k, stride_it, stride_ik, BLOCK: tl.constexpr
):
    """Σ over the column tiles of partial (columns, T·k); NaN where an index has no expert."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = expert_of(indices, pair, pairs, experts, top_k, stride_it, stride_ik)
    total = tl.zeros((BLOCK,), tl.float32)
    tile = partial + pair
    for _ in range(columns):
        total += tl.load(tile, mask=expert >= 0, other=float("nan"))
        tile += pairs
    tl.store(grad_weights + pair, total.to(grad_weights.dtype.element_ty), mask=pair < pairs)


@triton.jit
def expert_gradient_kernel(
    left, right, order, offsets, out,
    top_k, height, width, stride_rt, stride_rn, stride_oe, stride_om, stride_on,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[e] = Σ over the rows of e of left[row] ⊗ right[token of the row]: (height,) ⊗ (width,)."""
    rows, columns = tl.cdiv(height, BLOCK_M), tl.cdiv(width, BLOCK_N)
    expert = tl.program_id(0) // (rows * columns)
    tile, column = swizzle(tl.program_id(0) % (rows * columns), rows, columns, GROUP)
    first, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    m, n = tile * BLOCK_M + tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N)

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        token = tl.load(order + row, mask=row < end, other=0) // top_k
        left_tile = left + row.to(tl.int64)[None, :] * height + m[:, None]
        right_tile = right + token.to(tl.int64)[:, None] * stride_rt + n.to(tl.int64)[None, :] * stride_rn
        left_MK = tl.load(left_tile, mask=(row < end)[None, :] & (m < height)[:, None], other=0)
        right_KN = tl.load(right_tile, mask=(row < end)[:, None] & (n < width)[None, :], other=0)
        total = tl.dot(left_MK, right_KN, total, input_precision=PRECISION)

    place = m.to(tl.int64)[:, None] * stride_om + n.to(tl.int64)[None, :] * stride_on
    inside = (m < height)[:, None] & (n < width)[None, :]
    tl.store(out + expert.to(tl.int64) * stride_oe + place, total.to(out.dtype.element_ty), mask=inside)


def expert_gradient(left: Tensor, right: Tensor, out: Tensor, order: Order) -> None:
    """left (T·k, M) in the order of the experts, right (T, N): fills out (E, M, N)."""
    experts, height, width = out.shape
    config = TABLE.config("expert_gradient", left, align=alignment(left, right))
    tiles = triton.cdiv(height, config["BLOCK_M"]) * triton.cdiv(width, config["BLOCK_N"])
    launch(
        expert_gradient_kernel, (experts * tiles,), left, right, order.order, order.offsets, out,
        order.top_k, height, width, *right.stride(), *out.stride(), **config,
    )  # fmt: skip


def experts_backward(
    grad: Tensor, x: Tensor, weights: Tensor, indices: Tensor, w_gate_up: Tensor, w_down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, w_gate_up and w_down."""
    order = Order(indices, w_gate_up.shape[0], x)
    dim, width = w_down.shape[1:]
    config = product("hidden_backward", order, dim, width, x, grad, w_gate_up, w_down)
    row_tiles, columns = order.tiles(config["BLOCK_M"]), triton.cdiv(width, config["BLOCK_N"])
    grad_hidden, weighted = x.new_empty((order.pairs, 2 * width)), x.new_empty((order.pairs, width))
    partial = x.new_empty((columns, order.pairs), dtype=torch.float32)
    launch(
        hidden_backward_kernel, (row_tiles * columns,),
        grad, x, weights, w_gate_up, w_down, order.order, order.offsets, grad_hidden, weighted, partial,
        row_tiles, order.pairs, order.experts, order.top_k, dim, width,
        *grad.stride(), *x.stride(), *weights.stride(), *w_gate_up.stride(), *w_down.stride(), **config,
    )  # fmt: skip

    grad_weights = weights.new_empty(weights.shape)
    config = TABLE.config("weights_gradient", x)
    launch(
        weights_gradient_kernel, (triton.cdiv(order.pairs, config["BLOCK"]),), partial, indices, grad_weights,
        order.pairs, columns, order.experts, order.top_k, *indices.stride(), **config,
    )  # fmt: skip
    grad_gate_up, grad_down = w_gate_up.new_empty(w_gate_up.shape), w_down.new_empty(w_down.shape)
    expert_gradient(weighted, grad, grad_down.mT, order)
    expert_gradient(grad_hidden, x, grad_gate_up, order)
    del weighted, partial  # the rows of dX go where they lay
    grad_x = combine(multiply(grad_hidden, w_gate_up, order), None, indices, order.experts)
    return grad_x, grad_weights, grad_gate_up, grad_down
