# mypy: allow-untyped-defs
"""Routing on the GPU: softmax, top-k and renormalisation of a few tokens per program, in one pass over the logits.

A program holds the scores of BLOCK_T tokens in registers and takes the best of each k times. Score and expert share one
64-bit key, the score's bits in an order that integers compare, the expert counted down below it, so one maximum gives
the value, the index and the lowest index among equals. NaN counts as the largest score, as in torch.sort: a token with
a NaN logit chooses the experts 0 … k−1, all of its indices lie in [0, E), and its weights are those of the definition.

Floor: T·E logits read once, T·k weights and indices written once; backward reads and writes the logits once more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from genrec.kernels.launch import launch
from genrec.kernels.moe.triton_order import TABLE

LOWEST = tl.constexpr(-(2**63))  # below every key


@triton.jit
def softmax_rows(x):
    """float32 softmax of every row, with divisions rounded as torch rounds them."""
    power = tl.exp(x - tl.max(x, 1)[:, None])
    return tl.div_rn(power, tl.sum(power, 1)[:, None])


@triton.jit(do_not_specialize=["tokens"])
def route_kernel(
    logits, bias, weights, indices,
    tokens, experts, top_k, stride_lt, stride_le, stride_b,
    RENORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, EXPERTS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert, slot = tl.arange(0, EXPERTS), tl.arange(0, SLOTS)
    row = tl.minimum(token, tokens - 1)[:, None] * stride_lt
    column = expert.to(tl.int64)[None, :] * stride_le
    logit = tl.load(logits + row + column, mask=(expert < experts)[None, :], other=-float("inf")).to(tl.float32)
    probability = softmax_rows(logit)
    score = probability
    if bias is not None:
        offset = tl.load(bias + expert.to(tl.int64) * stride_b, mask=expert < experts, other=0).to(tl.float32)
        score += offset[None, :]

    bits = score.to(tl.int32, bitcast=True)
    ordered = tl.where(score == score, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    key = (ordered.to(tl.int64) << 32) | (EXPERTS - 1 - expert)[None, :]
    key = tl.where((expert < experts)[None, :], key, LOWEST)

    kept = tl.full((BLOCK_T, SLOTS), -float("inf"), tl.float32)
    kept_index = tl.zeros((BLOCK_T, SLOTS), tl.int32)
    for j in range(top_k):
        best = EXPERTS - 1 - (tl.max(key, 1) & 0xFFFFFFFF).to(tl.int32)
        hit = expert[None, :] == best[:, None]
        value = tl.sum(tl.where(hit, logit if RENORMALIZE else probability, 0), 1)
        kept = tl.where((slot == j)[None, :], value[:, None], kept)
        kept_index = tl.where((slot == j)[None, :], best[:, None], kept_index)
        key = tl.where(hit, LOWEST, key)
    if RENORMALIZE:  # p_j / Σ p over the kept = softmax over the kept logits, and never 0 / 0
        kept = softmax_rows(kept)

    place = token[:, None] * top_k + slot[None, :]
    inside = (token < tokens)[:, None] & (slot < top_k)[None, :]
    tl.store(weights + place, kept, mask=inside)
    tl.store(indices + place, kept_index, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def route_backward_kernel(
    grad, logits, indices, grad_logits,
    tokens, experts, top_k, stride_gt, stride_gk, stride_lt, stride_le, stride_it, stride_ik,
    RENORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row, expert = tl.minimum(token, tokens - 1), tl.arange(0, EXPERTS)
    kept = tl.zeros((BLOCK_T, EXPERTS), tl.int1)
    grad_weight = tl.zeros((BLOCK_T, EXPERTS), tl.float32)
    grad_j, index_j = grad + row * stride_gt, indices + row * stride_it
    for _ in range(top_k):
        hit = expert[None, :] == tl.load(index_j)[:, None]
        kept = kept | hit
        grad_weight = tl.where(hit, tl.load(grad_j).to(tl.float32)[:, None], grad_weight)
        grad_j += stride_gk
        index_j += stride_ik

    logit = logits + row[:, None] * stride_lt + expert.to(tl.int64)[None, :] * stride_le
    seen = kept if RENORMALIZE else (expert < experts)[None, :] & tl.full((BLOCK_T, 1), True, tl.int1)
    weight = softmax_rows(tl.load(logit, mask=seen, other=-float("inf")).to(tl.float32))
    grad_logit = weight * (grad_weight - tl.sum(tl.where(kept, grad_weight * weight, 0), 1)[:, None])

    place = token[:, None] * experts + expert[None, :]
    inside = (token < tokens)[:, None] & (expert < experts)[None, :]
    tl.store(grad_logits + place, tl.where(seen, grad_logit, 0), mask=inside)


def route(logits: Tensor, top_k: int, bias: Tensor | None, renormalize: bool) -> tuple[Tensor, Tensor]:
    tokens, experts = logits.shape
    weights = logits.new_empty((tokens, top_k), dtype=torch.float32)
    indices = logits.new_empty((tokens, top_k), dtype=torch.int32)
    width = triton.next_power_of_2(experts)
    config = TABLE.config("route", logits, experts=width)
    launch(
        route_kernel, (triton.cdiv(tokens, config["BLOCK_T"]),), logits, bias, weights, indices,
        tokens, experts, top_k, *logits.stride(), 0 if bias is None else bias.stride(0),
        RENORMALIZE=renormalize, EXPERTS=width, SLOTS=triton.next_power_of_2(top_k), **config,
    )  # fmt: skip
    return weights, indices


def route_backward(grad: Tensor, logits: Tensor, indices: Tensor, renormalize: bool) -> Tensor:
    tokens, experts = logits.shape
    grad_logits = logits.new_empty(logits.shape)
    width = triton.next_power_of_2(experts)
    config = TABLE.config("route", logits, experts=width)
    launch(
        route_backward_kernel, (triton.cdiv(tokens, config["BLOCK_T"]),), grad, logits, indices, grad_logits,
        tokens, experts, indices.shape[1], *grad.stride(), *logits.stride(), *indices.stride(),
        RENORMALIZE=renormalize, EXPERTS=width, **config,
    )  # fmt: skip
    return grad_logits
