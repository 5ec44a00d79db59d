"""Group layer norm in PyTorch, and on the fused norms of others."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers import installed, on_gpu


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


def fused(backward: bool) -> dict[str, Callable[..., Tensor]]:
    """Fair: the norm in a kernel of its own that people install for it, and one gathered affine behind it."""
    found: dict[str, Callable[..., Tensor]] = {}
    if not on_gpu():
        return found

    def behind(norm: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        def form(x: Tensor, weight: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
            one, zero = torch.ones_like(x[0], dtype=torch.float32), torch.zeros_like(x[0], dtype=torch.float32)
            return norm(x, one, zero) * weight[ids] + bias[ids]

        return form

    if liger := installed("liger_kernel.ops.layer_norm", "liger-kernel"):
        function = liger.LigerLayerNormFunction
        found["liger, gathered"] = behind(
            lambda x, one, zero: function.apply(x, one.to(x.dtype), zero.to(x.dtype), 1e-5)
        )
    quack = installed("quack.rmsnorm", "quack-kernels")
    if quack and not backward:  # its gradient is not recorded
        found["quack, gathered"] = behind(lambda x, one, zero: quack.layernorm_fwd(x, one, zero, eps=1e-5))
    return found
