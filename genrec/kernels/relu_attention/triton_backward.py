# mypy: allow-untyped-defs

"""The backward pass of ReLU attention. With P the weights of forward and G = dO / n

    dV = Pᵀ G    dS = (G Vᵀ) ⊙ [P > 0]    dQ = scale · dS K    dK = scale · dSᵀ Q    dbias[d] = Σ of dS at distance d

Nothing is saved but the inputs: tiles of P are computed again, and a tile of zeros skips all other products.

The deterministic form gives every sum to one program, which adds in the order of its loop:

    backward_keys     dK and dV of a block of keys, going through the rows that see it: 4 products
    backward_queries  dQ of a block of rows, going through the keys they see: 3 products; and the block's sum of dS over
                      all pairs at least R − 1 apart, for the last entry of the table
    backward_bias     the other entries (triton_bias.py)

Floor: 5 products, 10 · D flops for each visible pair, where Dv = D; here 7, for P and G Vᵀ are computed twice. The
atomic form is `backward_keys` alone, with 5: it adds its tiles of dQ and of the table to float32 sums in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from genrec.kernels.launch import launch
from genrec.kernels.relu_attention.triton_bias import add_by_distance, near_gradient
from genrec.kernels.relu_attention.triton_call import Call, along_rows
from genrec.kernels.relu_attention.triton_tiles import (
    any_positive,
    clear_slack,
    divisor_of,
    head_of,
    inner,
    matrix,
    outer,
    sequence,
    sight,
    store,
    times,
    weights_of,
    zeros,
)


@triton.jit(do_not_specialize=["batch", "length_q", "length_k", "tokens", "blocks"])
def backward_queries(
    grad, q, k, v, grad_q, far, cu_q, cu_k, limit, rel_bias, divisors,
    stride_gb, stride_gh, stride_g, stride_qb, stride_qh, stride_q, stride_kb, stride_kh, stride_k,
    stride_vb, stride_vh, stride_v, stride_ob, stride_oh, stride_o, stride_lb, stride_l,
    batch, heads, length_q, length_k, tokens, blocks, buckets, scale, divisor,
    CAUSAL: tl.constexpr, VISIBLE: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    CHUNK: tl.constexpr, CHUNK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SKIP: tl.constexpr, STAGES: tl.constexpr, LATE: tl.constexpr = False,
):  # fmt: skip
    """dQ of a block of rows, and far[b, block, h]: its part of the gradient of the last bias."""
    program = tl.program_id(0)
    block = blocks - 1 - program % blocks
    h = program // blocks % heads
    b = program // blocks // heads
    grad_q = head_of(grad_q, b, h, stride_ob, stride_oh)
    if cu_q is not None:
        if b == batch:
            start = tl.load(cu_q + batch).to(tl.int64) + block * BLOCK_M
            clear_slack(grad_q, stride_o, start, tokens, blocks * BLOCK_M, DIM, CHUNK, BLOCK_M)
            return
    first_q, length_q = sequence(cu_q, b, length_q)
    first_k, length_k = sequence(cu_k, b, length_k)
    first_row = block * BLOCK_M
    if first_row >= length_q:
        return
    if limit is not None:
        limit += b.to(tl.int64) * stride_lb + first_q * stride_l
    if rel_bias is not None:
        rel_bias += h * buckets
    row = first_row + tl.arange(0, BLOCK_M)
    anchor, end, nearest, furthest, all_see, none_sees = sight(
        row, first_row, limit, stride_l, length_q, length_k, CAUSAL, BLOCK_M
    )
    grad = head_of(grad, b, h, stride_gb, stride_gh)
    q = head_of(q, b, h, stride_qb, stride_qh)
    k = head_of(k, b, h, stride_kb, stride_kh)
    v = head_of(v, b, h, stride_vb, stride_vh)
    inside = row < length_q
    q_MD = matrix(q, first_q, stride_q, row, inside, DIM, CHUNK, LATE)
    grad_MD = matrix(grad, first_q, stride_g, row, inside, DIM_V, CHUNK_V, LATE)
    sum_MD = zeros(BLOCK_M, DIM, CHUNK)
    far_M = tl.zeros((BLOCK_M,), tl.float32)
    for first_key in tl.range(0, none_sees, BLOCK_N, num_stages=STAGES):
        key = first_key + tl.arange(0, BLOCK_N)
        k_ND = matrix(k, first_k, stride_k, key, key < none_sees, DIM, CHUNK, LATE)
        v_ND = matrix(v, first_k, stride_v, key, key < none_sees, DIM_V, CHUNK_V, LATE)
        weights_MN = weights_of(
            inner(q_MD, k_ND, DIM, CHUNK), anchor[:, None], end[:, None], key[None, :],
            nearest, furthest, all_see, first_key, rel_bias, buckets, scale, BLOCK_N,
        )  # fmt: skip
        if any_positive(weights_MN, SKIP):
            grad_weights_MN = inner(grad_MD, v_ND, DIM_V, CHUNK_V)
            grad_scores_MN = tl.where(weights_MN <= 0, 0.0, grad_weights_MN)  # NaN passes, as in plain PyTorch
            sum_MD = outer(sum_MD, grad_scores_MN, k_ND, DIM, CHUNK)
            if rel_bias is not None:
                if (furthest - first_key >= buckets - 1) | (first_key + BLOCK_N - 1 - nearest >= buckets - 1):
                    is_far = tl.abs(anchor[:, None] - key[None, :]) >= buckets - 1
                    far_M += tl.sum(tl.where(is_far, grad_scores_MN, 0.0), 1)
    n = divisor_of(divisors, divisor, b, length_k, VISIBLE)
    if VISIBLE:
        n = tl.maximum(end, 1).to(tl.float32)[:, None]
    store(grad_q, first_q, stride_o, row, inside, times(sum_MD, scale / n), DIM, CHUNK)
    if rel_bias is not None:
        tl.store(far + (b.to(tl.int64) * blocks + block) * heads + h, tl.sum(far_M[:, None] / n))


@triton.jit
def rows_that_see(first_key, limit, stride_l, length_q, length_k, CAUSAL: tl.constexpr, BLOCK: tl.constexpr):
    """The first row that sees keys from first_key on, and one past the last."""
    first, last = 0, length_q
    if CAUSAL:
        first = tl.maximum(first_key - (length_k - length_q), 0)
    if limit is not None:
        first, last = length_q, 0
        for start in tl.range(0, length_q, BLOCK, num_stages=1):
            row = start + tl.arange(0, BLOCK)
            sees = tl.load(limit + row.to(tl.int64) * stride_l, mask=row < length_q, other=0) > first_key
            first = tl.minimum(first, tl.min(tl.where(sees, row, length_q)))
            last = tl.maximum(last, tl.max(tl.where(sees, row + 1, 0)))
    return first, last


@triton.jit
def add(pointer, first, stride, row, inside, tiles, DIM: tl.constexpr, CHUNK: tl.constexpr):
    """`store`, added to what is there."""
    for i in tl.static_range(len(tiles)):
        columns = i * CHUNK + tl.arange(0, CHUNK)
        pointers = pointer + (first + row)[:, None] * stride + columns[None, :]
        tl.atomic_add(pointers, tiles[i], mask=inside[:, None] & (columns < DIM)[None, :], sem="relaxed")


@triton.jit(do_not_specialize=["batch", "length_q", "length_k", "tokens", "blocks"])
def backward_keys(
    grad, q, k, v, grad_q, grad_k, grad_v, grad_bias, cu_q, cu_k, limit, rel_bias, divisors,
    stride_gb, stride_gh, stride_g, stride_qb, stride_qh, stride_q, stride_kb, stride_kh, stride_k,
    stride_vb, stride_vh, stride_v, stride_oqb, stride_oqh, stride_oq, stride_okb, stride_okh, stride_ok,
    stride_ovb, stride_ovh, stride_ov, stride_lb, stride_l,
    batch, heads, length_q, length_k, tokens, blocks, buckets, scale, divisor,
    CAUSAL: tl.constexpr, VISIBLE: tl.constexpr, ATOMIC: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    CHUNK: tl.constexpr, CHUNK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SKIP: tl.constexpr, STAGES: tl.constexpr, LATE: tl.constexpr = False,
):  # fmt: skip
    """dK and dV of a block of keys. If ATOMIC, add to grad_q and grad_bias as well, both float32."""
    program = tl.program_id(0)
    block = program % blocks
    h = program // blocks % heads
    b = program // blocks // heads
    if ATOMIC:
        grad_q = head_of(grad_q, b, h, stride_oqb, stride_oqh)
    grad_k = head_of(grad_k, b, h, stride_okb, stride_okh)
    grad_v = head_of(grad_v, b, h, stride_ovb, stride_ovh)
    if cu_k is not None:
        if b == batch:
            start = tl.load(cu_k + batch).to(tl.int64) + block * BLOCK_N
            clear_slack(grad_k, stride_ok, start, tokens, blocks * BLOCK_N, DIM, CHUNK, BLOCK_N)
            clear_slack(grad_v, stride_ov, start, tokens, blocks * BLOCK_N, DIM_V, CHUNK_V, BLOCK_N)
            return
    first_q, length_q = sequence(cu_q, b, length_q)
    first_k, length_k = sequence(cu_k, b, length_k)
    first_key = block * BLOCK_N
    if first_key >= length_k:
        return
    if limit is not None:
        limit += b.to(tl.int64) * stride_lb + first_q * stride_l
    if rel_bias is not None:
        rel_bias += h * buckets
        if ATOMIC:
            grad_bias += h * buckets
    grad = head_of(grad, b, h, stride_gb, stride_gh)
    q = head_of(q, b, h, stride_qb, stride_qh)
    k = head_of(k, b, h, stride_kb, stride_kh)
    v = head_of(v, b, h, stride_vb, stride_vh)
    key = first_key + tl.arange(0, BLOCK_N)
    exists = key < length_k
    k_ND = matrix(k, first_k, stride_k, key, exists, DIM, CHUNK, LATE)
    v_ND = matrix(v, first_k, stride_v, key, exists, DIM_V, CHUNK_V, LATE)
    sum_k_ND = zeros(BLOCK_N, DIM, CHUNK)
    sum_v_ND = zeros(BLOCK_N, DIM_V, CHUNK_V)
    n = divisor_of(divisors, divisor, b, length_k, VISIBLE)
    first, last = rows_that_see(first_key, limit, stride_l, length_q, length_k, CAUSAL, 1024)
    for first_row in tl.range(first, last, BLOCK_M, num_stages=STAGES):
        row = first_row + tl.arange(0, BLOCK_M)
        inside = row < length_q
        q_MD = matrix(q, first_q, stride_q, row, inside, DIM, CHUNK, LATE)
        grad_MD = matrix(grad, first_q, stride_g, row, inside, DIM_V, CHUNK_V, LATE)
        anchor, end, nearest, furthest, all_see, _ = sight(
            row, first_row, limit, stride_l, length_q, length_k, CAUSAL, BLOCK_M
        )
        weights_NM = weights_of(
            inner(k_ND, q_MD, DIM, CHUNK), anchor[None, :], end[None, :], key[:, None],
            nearest, furthest, all_see, first_key, rel_bias, buckets, scale, BLOCK_N,
        )  # fmt: skip
        if any_positive(weights_NM, SKIP):
            grad_weights_NM = inner(v_ND, grad_MD, DIM_V, CHUNK_V)
            grad_scores_NM = tl.where(weights_NM <= 0, 0.0, grad_weights_NM)
            if VISIBLE:
                share_M = 1 / tl.maximum(end, 1).to(tl.float32)
                weights_NM *= share_M[None, :]
                grad_scores_NM *= share_M[None, :]
            sum_v_ND = outer(sum_v_ND, weights_NM, grad_MD, DIM_V, CHUNK_V)
            sum_k_ND = outer(sum_k_ND, grad_scores_NM, q_MD, DIM, CHUNK)
            if ATOMIC:
                part_MD = outer(zeros(BLOCK_M, DIM, CHUNK), tl.trans(grad_scores_NM), k_ND, DIM, CHUNK)
                add(grad_q, first_q, stride_oq, row, inside, times(part_MD, scale / n), DIM, CHUNK)
                if rel_bias is not None:
                    add_by_distance(
                        grad_bias, grad_scores_NM * (1 / n), anchor, key, nearest, furthest, first_key, buckets,
                        AHEAD=not CAUSAL and limit is None, BLOCK_N=BLOCK_N, BLOCK_W=BLOCK_M,
                    )  # fmt: skip
    store(grad_k, first_k, stride_ok, key, exists, times(sum_k_ND, scale / n), DIM, CHUNK)
    store(grad_v, first_k, stride_ov, key, exists, times(sum_v_ND, 1 / n), DIM_V, CHUNK_V)


Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def gradients(grad: Tensor, call: Call, atomic: bool) -> Gradients:
    """dQ, dK, dV and dbias, which is empty without one, in the layouts and dtypes of q, k, v and rel_bias."""
    grad = along_rows(grad)
    grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (call.k, call.v))
    grad_bias = call.q.new_zeros(call.q.shape[1] if call.buckets else 0, call.buckets, dtype=torch.float32)
    if atomic:
        sums = call.q.new_zeros(call.q.shape, dtype=torch.float32)
        _keys(grad, call, grad_k, grad_v, sums, grad_bias)
        grad_q = sums.to(call.q.dtype)
    else:
        _keys(grad, call, grad_k, grad_v)
        grad_q, far = _queries(grad, call)
        if call.buckets:
            grad_bias[:, -1] = far.sum(0)
            near_gradient(grad, call, grad_bias)
    if call.rel_bias is None:
        return grad_q, grad_k, grad_v, call.q.new_empty(0)
    return grad_q, grad_k, grad_v, grad_bias.to(call.rel_bias.dtype)


def _queries(grad: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """dQ, and the parts (…, H) of the last bias's gradient."""
    constants = call.constants("backward_queries" + call.form)
    grad_q = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
    blocks = max(1, triton.cdiv(call.length_q, constants["BLOCK_M"]))
    far = grad.new_zeros(call.batch * blocks, call.heads, dtype=torch.float32)
    launch(
        backward_queries, (blocks * call.heads * (call.batch + call.is_packed),),
        grad, call.q, call.k, call.v, grad_q, far, call.cu_q, call.cu_k, call.limit, call.rel_bias, call.divisors,
        *call.strides(grad, call.q, call.k, call.v, grad_q), *call.limit_strides(),
        call.batch, call.heads, call.length_q, call.length_k, call.q.shape[0], blocks,
        call.buckets, call.scale, call.divisor, **constants,
    )  # fmt: skip
    return grad_q, far


def _keys(
    grad: Tensor, call: Call, grad_k: Tensor, grad_v: Tensor,
    sums_q: Tensor | None = None, sums_bias: Tensor | None = None,
) -> None:  # fmt: skip
    """Write dK and dV; given float32 sums of dQ and dbias, add to those too."""
    atomic = sums_q is not None
    constants = call.constants("backward_atomic" if atomic else "backward_keys" + call.form)
    blocks = max(1, triton.cdiv(call.length_k, constants["BLOCK_N"]))
    launch(
        backward_keys, (blocks * call.heads * (call.batch + call.is_packed),),
        grad, call.q, call.k, call.v, sums_q, grad_k, grad_v, sums_bias,
        call.cu_q, call.cu_k, call.limit, call.rel_bias, call.divisors,
        *call.strides(grad, call.q, call.k, call.v, call.q if sums_q is None else sums_q, grad_k, grad_v),
        *call.limit_strides(),
        call.batch, call.heads, call.length_q, call.length_k, call.k.shape[0], blocks,
        call.buckets, call.scale, call.divisor, ATOMIC=atomic, **constants,
    )  # fmt: skip
