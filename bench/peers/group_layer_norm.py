"""Group layer norm in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gathered(x: Tensor, weight: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
    """Fair: one fused norm and one gathered affine; compiled, a single pass over memory."""
    return F.layer_norm(x, x.shape[-1:]) * weight[ids] + bias[ids]


def group_by_group(x: Tensor, weight: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
    """Fair: with few groups it gathers no affine, and its gradients are those of the fused norm."""
    y = torch.zeros_like(x)
    for g in range(len(weight)):
        rows = (ids == g).nonzero().squeeze(1)
        y = y.index_copy(0, rows, F.layer_norm(x.index_select(0, rows), x.shape[-1:], weight[g], bias[g]))
    return y
