"""A mixture of SwiGLU experts in PyTorch, and in the kernels of others: arguments x (T, D), weights (T, k), w_gate_up
(E, 2F, D), w_down (E, D, F), indices (T, k)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers import installed, on_gpu


def sorted_loop(x: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, indices: Tensor) -> Tensor:
    """Fair: a matrix product of the vendor's library for every expert, over its rows alone, without padding."""
    order, token, counts = _by_expert(indices, len(w_down))
    rows, out = x.index_select(0, token).split(counts.tolist()), []
    for row, gate_up, down in zip(rows, w_gate_up.unbind(), w_down.unbind(), strict=True):
        if len(row):
            gate, up = (row @ gate_up.T).chunk(2, 1)
            out.append((F.silu(gate) * up) @ down.T)
    return _weighted_sum(weights, torch.cat(out), order)


def grouped_product(x: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, indices: Tensor) -> Tensor:
    """Fair: torch's own grouped product, one call for all experts."""
    order, token, counts = _by_expert(indices, len(w_down))
    offsets = counts.cumsum(0).int()
    gate, up = torch._grouped_mm(x.index_select(0, token), w_gate_up.mT, offs=offsets).chunk(2, 1)
    return _weighted_sum(weights, torch._grouped_mm(F.silu(gate) * up, w_down.mT, offs=offsets), order)


def _by_expert(indices: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The order of the (token, slot) pairs by expert, their tokens, and how many every expert has."""
    order = indices.flatten().argsort(stable=True)
    return order, order // indices.shape[1], torch.bincount(indices.flatten(), minlength=experts)


def _weighted_sum(weights: Tensor, out: Tensor, order: Tensor) -> Tensor:
    position = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    return torch.bmm(weights[:, None].to(out.dtype), out.index_select(0, position).view(*weights.shape, -1))[:, 0]


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Fair: two fused operators of PyTorch and a division."""
    kept, indices = logits.softmax(1).topk(top_k)
    return kept / kept.sum(1, keepdim=True), indices.int()


def fused(dtype: torch.dtype) -> dict[str, Callable[..., Tensor]]:
    """Fair: whole dropless mixtures in kernels of their own, with the routing given, as ours has it."""
    found: dict[str, Callable[..., Tensor]] = {}
    if not on_gpu():
        return found
    if liger := installed("liger_kernel.ops.fused_moe", "liger-kernel"):
        function = liger.LigerFusedMoEFunction
        found["liger"] = lambda x, w, up, down, ids: function.apply(x, up, down, ids, w.to(x.dtype))
    sonic = installed("sonicmoe.functional", "sonic-moe")
    if sonic and dtype != torch.float32:  # it computes in 16 bits alone
        found["sonic-moe"] = lambda x, w, up, down, ids: _sonic(sonic, x, w, up, down, ids)
    return found


def _sonic(sonic: Any, x: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, indices: Tensor) -> Tensor:
    tokens = torch.arange(len(x), dtype=torch.int32, device=x.device).repeat_interleave(indices.shape[1])
    return sonic.moe_general_routing_inputs(
        x, weights.flatten(), tokens, indices.flatten(), w_gate_up.permute(1, 2, 0), None, w_down.permute(1, 2, 0),
        None, len(w_down), torch.cuda.current_stream().cuda_stream, sonic.ActivationType.SWIGLU,
        is_concatenated_gate_up=True,
    )[0]  # fmt: skip
