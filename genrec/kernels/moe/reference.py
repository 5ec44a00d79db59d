"""Mixture of experts, defined in plain PyTorch: readable, differentiable by autograd, right in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def moe_route(
    logits: Tensor, top_k: int = 4, *, bias: Tensor | None = None, renormalize: bool = True
) -> tuple[Tensor, Tensor]:
    """(T, E) → weights (T, k), indices (T, k) int32; arguments as in genrec.kernels.moe_route."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    probabilities = logits.softmax(1)
    scores = probabilities if bias is None else probabilities + bias.to(logits.dtype)
    indices = scores.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    if renormalize:  # p_j / Σ p over the kept = softmax over the kept logits, and never 0 / 0
        return logits.gather(1, indices).softmax(1), indices.int()
    return probabilities.gather(1, indices), indices.int()


def moe_experts(x: Tensor, weights: Tensor, indices: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """(T, D), (T, k), (T, k), (E, 2F, D), (E, D, F) → (T, D); arguments as in genrec.kernels.moe_experts."""
    y = torch.zeros_like(x)
    for expert in range(len(w_gate_up)):
        token, slot = torch.where(indices == expert)
        gate, up = (x[token] @ w_gate_up[expert].T).chunk(2, 1)
        out = (F.silu(gate) * up) @ w_down[expert].T
        y = y.index_add(0, token, (weights[token, slot, None] * out).to(x.dtype))
    return y
