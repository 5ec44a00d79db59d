"""Group layer norm, defined in plain PyTorch: readable, differentiable by autograd, right in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def group_layer_norm(
    x: Tensor, group_ids: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """(…, D), (…), (G, D), (G, D) → (…, D); arguments as in genrec.kernels.group_layer_norm."""
    s = x if residual is None else x + residual
    known = (group_ids >= 0) & (group_ids < len(weight))
    group = torch.where(known, group_ids, 0)
    mean = s.mean(-1, keepdim=True)
    variance = (s - mean).square().mean(-1, keepdim=True)
    normed = (s - mean) * torch.rsqrt(variance + eps)
    y = torch.where(known[..., None], normed * weight[group] + bias[group], float("nan"))
    return y if residual is None else (y, s)
