"""Residual nearest-code search, defined in plain PyTorch: readable, differentiable by autograd, right in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 1 << 24  # distances held at a time


def rq_nearest(x: Tensor, codebooks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(N, D), L × (K_l, D) → codes (N, L) int64, quantized (N, D); arguments as in genrec.kernels.rq_nearest."""
    residual = x.detach()
    quantized = torch.zeros(1, dtype=codebooks[0].dtype, device=x.device)
    codes = []
    for codebook in codebooks:
        code = nearest(residual, codebook.detach())
        residual = residual - codebook.detach()[code]
        quantized = quantized + codebook[code]
        codes.append(code)
    return torch.stack(codes, 1), quantized


def nearest(residual: Tensor, codebook: Tensor) -> Tensor:
    """argmin_c ‖r − c‖² as argmin_c ‖c‖² − 2 r·c, the lowest of equals, a few rows at a time."""
    squares = codebook.square().sum(1)
    rows = max(1, CHUNK // codebook.shape[0])
    return torch.cat([torch.addmm(squares, r, codebook.T, alpha=-2).argmin(1) for r in residual.split(rows)])
