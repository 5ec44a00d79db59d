"""Cross-entropy over a large vocabulary without its matrix of logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 20  # logits held at a time: they stay in cache on a CPU and fill a GPU …
CHUNK_ROWS = 64  # … but never fewer rows than pay for one pass over the weights


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one sweep over chunks of rows, so that only one chunk of logits ever exists.

    Sums over chunks are float32: in bfloat16 they would lose what is small beside them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        rows = len(x)
        chunk = max(CHUNK_ROWS, CHUNK_ELEMENTS // len(weight))
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = torch.zeros_like(bias, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        for begin in range(0, rows, chunk):
            x_chunk, target = x[begin : begin + chunk], targets[begin : begin + chunk, None]
            logits = torch.addmm(bias, x_chunk, weight.T).float()
            at_target = logits.gather(1, target)
            largest = logits.amax(1, keepdim=True)
            softmax = logits.sub_(largest).exp_()
            norm = softmax.sum(1, keepdim=True)
            total += (norm.log() + largest - at_target).sum()
            softmax.div_(norm * rows).scatter_add_(1, target, softmax.new_full(target.shape, -1.0 / rows))
            grad_bias += softmax.sum(0)
            error = softmax.to(x.dtype)
            torch.mm(error, weight, out=grad_x[begin : begin + chunk])
            grad_weight += error.T @ x_chunk
        ctx.save_for_backward(grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype))
        return total / rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        grad_x, grad_weight, grad_bias = ctx.saved_tensors
        return grad_x * grad, grad_weight * grad, grad_bias * grad, None


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """mean over rows of -log softmax(x · weightᵀ + bias)[target].

    x (M, D), weight (V, D), bias (V,), targets (M,) int64 → scalar, float32. Products run in the autocast dtype where
    one is active, the softmax in float32. Equals F.cross_entropy(F.linear(x, weight, bias), targets) at a fraction of
    its memory: the (M, V) logits are never whole (Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language
    Models").
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    return _LinearCrossEntropy.apply(x, weight, bias, targets)
