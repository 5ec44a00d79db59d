# mypy: allow-untyped-defs

"""The forward pass of ReLU attention: one program for each block of rows, head and sequence.

    out_i = Σ_j visible_ij · relu(scale · q_i·k_j + rel_bias[h, d_ij]) · v_j / n_i

A program keeps its rows of q and its sum on chip and goes through the keys block by block, as far as any of its rows
sees. A block whose weights are all 0 skips the second product. Nothing is normalised over the keys, so nothing but the
output is written. Blocks of one head and sequence are neighbours in the grid and find its keys in L2; the last rows,
which see most under a causal mask, go first.

Floor: 2 · (D + Dv) flops for each visible pair of row and key of a head; q, k, v and out once through memory.

Few rows and many keys, as in decoding, where the beams of a request are rows that share its keys: blocks of rows are
small, and the sum is a sum over parts of PART keys each, added in their order. Either a program goes through all parts
for its rows, or, where that would leave the GPU idle, every part has a program and `combine` adds the parts. Both give
the same bits, so the choice may depend on the size of the batch. Which form a packed sequence takes depends on the
number of its own rows alone: no result depends on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from genrec.kernels.launch import launch
from genrec.kernels.relu_attention.triton_call import Call
from genrec.kernels.relu_attention.triton_tiles import (
    any_positive,
    clear_slack,
    divisor_of,
    head_of,
    inner,
    matrix,
    outer,
    plus,
    sequence,
    sight,
    store,
    times,
    weights_of,
    zeros,
)


@triton.jit
def first_slot(cu_k, first_k, b, parts, PART: tl.constexpr):
    """Where the parts of sequence b are kept: no other sequence's slots overlap."""
    if cu_k is not None:
        return first_k // PART + b
    return (b * parts).to(tl.int64)


@triton.jit(do_not_specialize=["batch", "length_q", "length_k", "tokens", "least", "most", "blocks", "parts"])
def forward(
    q, k, v, out, partial, cu_q, cu_k, limit, rel_bias, divisors,
    stride_qb, stride_qh, stride_q, stride_kb, stride_kh, stride_k, stride_vb, stride_vh, stride_v,
    stride_ob, stride_oh, stride_o, stride_lb, stride_l,
    batch, heads, length_q, length_k, tokens, least, most, blocks, parts, buckets, scale, divisor,
    CAUSAL: tl.constexpr, VISIBLE: tl.constexpr, SPLIT: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    CHUNK: tl.constexpr, CHUNK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SKIP: tl.constexpr, STAGES: tl.constexpr, LATE: tl.constexpr = False, PART: tl.constexpr = None,
):  # fmt: skip
    """Sequences of `least` … `most` rows; where packed, one sequence past the last stands for the slack rows."""
    program = tl.program_id(0)
    block = blocks - 1 - program % blocks
    h = program // blocks % heads
    part = program // blocks // heads % parts
    b = program // blocks // heads // parts
    out = head_of(out, b, h, stride_ob, stride_oh)
    if cu_q is not None:
        if b == batch:
            start = tl.load(cu_q + batch).to(tl.int64) + (part * blocks + block) * BLOCK_M
            clear_slack(out, stride_o, start, tokens, parts * blocks * BLOCK_M, DIM_V, CHUNK_V, BLOCK_M)
            return
    first_q, length_q = sequence(cu_q, b, length_q)
    first_k, length_k = sequence(cu_k, b, length_k)
    first_row = block * BLOCK_M
    if (first_row >= length_q) | (length_q < least) | (length_q > most):
        return
    if limit is not None:
        limit += b.to(tl.int64) * stride_lb + first_q * stride_l
    if rel_bias is not None:
        rel_bias += h * buckets
    row = first_row + tl.arange(0, BLOCK_M)
    anchor, end, nearest, furthest, all_see, none_sees = sight(
        row, first_row, limit, stride_l, length_q, length_k, CAUSAL, BLOCK_M
    )
    q = head_of(q, b, h, stride_qb, stride_qh)
    k = head_of(k, b, h, stride_kb, stride_kh)
    v = head_of(v, b, h, stride_vb, stride_vh)
    q_MD = matrix(q, first_q, stride_q, row, row < length_q, DIM, CHUNK, LATE)
    total_MD = zeros(BLOCK_M, DIM_V, CHUNK_V)
    sum_MD = zeros(BLOCK_M, DIM_V, CHUNK_V)
    tl.static_assert(PART is None or PART % BLOCK_N == 0, "a part of the keys is whole blocks")
    low, high = 0, none_sees
    if SPLIT:
        low = part * PART
        high = tl.minimum(none_sees, low + PART)
    for first_key in tl.range(low, high, BLOCK_N, num_stages=STAGES):
        key = first_key + tl.arange(0, BLOCK_N)
        k_ND = matrix(k, first_k, stride_k, key, key < none_sees, DIM, CHUNK, LATE)
        v_ND = matrix(v, first_k, stride_v, key, key < none_sees, DIM_V, CHUNK_V, LATE)
        weights_MN = weights_of(
            inner(q_MD, k_ND, DIM, CHUNK), anchor[:, None], end[:, None], key[None, :],
            nearest, furthest, all_see, first_key, rel_bias, buckets, scale, BLOCK_N,
        )  # fmt: skip
        if any_positive(weights_MN, SKIP):
            sum_MD = outer(sum_MD, weights_MN, v_ND, DIM_V, CHUNK_V)
        if PART is not None:
            if (first_key + BLOCK_N) % PART == 0:
                total_MD = plus(total_MD, sum_MD)
                sum_MD = zeros(BLOCK_M, DIM_V, CHUNK_V)
    total_MD = plus(total_MD, sum_MD)
    inside = row < length_q
    if SPLIT:
        slot = first_slot(cu_k, first_k, b, parts, PART) + part
        if part * PART < tl.maximum(length_k, 1):
            store(partial, (slot * heads + h) * most, DIM_V, row, inside, total_MD, DIM_V, CHUNK_V)
    else:
        n = divisor_of(divisors, divisor, b, length_k, VISIBLE)
        if VISIBLE:
            n = tl.maximum(end, 1).to(tl.float32)[:, None]
        store(out, first_q, stride_o, row, inside, times(total_MD, 1 / n), DIM_V, CHUNK_V)


@triton.jit(do_not_specialize=["batch", "length_q", "length_k", "parts"])
def combine(
    partial, out, cu_q, cu_k, limit, divisors, stride_ob, stride_oh, stride_o, stride_lb, stride_l,
    batch, heads, length_q, length_k, parts, divisor,
    CAUSAL: tl.constexpr, VISIBLE: tl.constexpr, DIM_V: tl.constexpr, CHUNK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Add the parts of BLOCK_M rows of one head and sequence in their order, and divide."""
    most = length_q
    blocks = tl.cdiv(most, BLOCK_M)
    program = tl.program_id(0)
    first_row = program % blocks * BLOCK_M
    h = program // blocks % heads
    b = program // blocks // heads
    first_q, length_q = sequence(cu_q, b, length_q)
    first_k, length_k = sequence(cu_k, b, length_k)
    if first_row >= length_q:
        return
    if limit is not None:
        limit += b.to(tl.int64) * stride_lb + first_q * stride_l
    row = first_row + tl.arange(0, BLOCK_M)
    inside = row < length_q
    total_MD = zeros(BLOCK_M, DIM_V, CHUNK_V)
    slot = first_slot(cu_k, first_k, b, parts, PART)
    for part in range(0, tl.cdiv(tl.maximum(length_k, 1), PART)):
        first = ((slot + part) * heads + h) * most
        total_MD = plus(total_MD, matrix(partial, first, DIM_V, row, inside, DIM_V, CHUNK_V)[0])
    n = divisor_of(divisors, divisor, b, length_k, VISIBLE)
    if VISIBLE:
        _, end, _, _, _, _ = sight(row, first_row, limit, stride_l, length_q, length_k, CAUSAL, BLOCK_M)
        n = tl.maximum(end, 1).to(tl.float32)[:, None]
    out = head_of(out, b, h, stride_ob, stride_oh)
    store(out, first_q, stride_o, row, inside, times(total_MD, 1 / n), DIM_V, CHUNK_V)


FEW = 64  # a sequence of at most so many rows takes the form for few rows
BUSY = 256  # programs that keep a GPU busy


def attention(call: Call, may_split: bool = True) -> Tensor:
    """The output of a call, in the layout of q. Whether parts may have programs of their own changes no bit of it."""
    out = call.q.new_empty(*call.q.shape[:-1], call.v.shape[-1])
    if out.numel() == 0:
        return out
    if call.is_packed:
        _attend(call, out, "forward_64", 0, FEW, may_split)
        if call.length_q > FEW:
            _attend(call, out, "forward", FEW + 1, call.length_q, may_split)
    else:
        form = "forward_16" if call.length_q <= 16 else "forward_64" if call.length_q <= FEW else "forward"
        _attend(call, out, form, 0, call.length_q, may_split)
    return out


def _attend(call: Call, out: Tensor, form: str, least: int, most: int, may_split: bool) -> None:
    """Write the rows of sequences of `least` … `most` rows."""
    constants = call.constants(form)
    part, rows = constants.get("PART", 0), min(most, call.length_q)
    blocks = max(1, triton.cdiv(rows, constants["BLOCK_M"]))
    idle = rows == call.length_q and call.batch * call.heads * blocks < BUSY
    split = may_split and idle and 0 < part < call.length_k
    parts = triton.cdiv(call.length_k, part) if split else 1
    partial = None
    if split:
        slots = call.k.shape[0] // part + call.batch if call.is_packed else call.batch * parts
        partial = out.new_empty(slots, call.heads, rows, out.shape[-1], dtype=torch.float32)
    launch(
        forward, (blocks * call.heads * parts * (call.batch + call.is_packed),),
        call.q, call.k, call.v, out, partial, call.cu_q, call.cu_k, call.limit, call.rel_bias, call.divisors,
        *call.strides(call.q, call.k, call.v, out), *call.limit_strides(),
        call.batch, call.heads, call.length_q, call.length_k, call.q.shape[0], least, rows, blocks, parts,
        call.buckets, call.scale, call.divisor, SPLIT=split, **constants,
    )  # fmt: skip
    if split:
        launch(
            combine, (triton.cdiv(rows, 16) * call.heads * call.batch,),
            partial, out, call.cu_q, call.cu_k, call.limit, call.divisors, *call.strides(out), *call.limit_strides(),
            call.batch, call.heads, rows, call.length_k, parts, call.divisor,
            CAUSAL=call.causal, VISIBLE=call.visible, DIM_V=out.shape[-1], CHUNK_V=constants["CHUNK_V"],
            BLOCK_M=16, PART=part,
        )  # fmt: skip
