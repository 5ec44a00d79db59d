"""ReLU attention, defined in plain PyTorch: readable, differentiable by autograd, right in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def relu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    key_limit: Tensor | None = None,
    rel_bias: Tensor | None = None,
    scale: float | None = None,
    normalizer: str | float | Tensor = "length",
) -> Tensor:
    """(B, H, Lq, D), (B, H, Lk, D), (B, H, Lk, Dv) → (B, H, Lq, Dv); arguments as in genrec.kernels.relu_attention."""
    length_q, length_k = q.shape[2], k.shape[2]
    keys = torch.arange(length_k, device=q.device)
    diagonal = torch.arange(length_q, device=q.device)[None, :, None] + length_k - length_q  # (1, Lq, 1)
    if key_limit is not None:
        last = key_limit.clamp(0, length_k)[:, :, None] - 1  # (B, Lq, 1), the last key a row may see
    else:
        last = diagonal if causal else torch.full_like(diagonal, length_k - 1)
    visible = (keys <= last)[:, None]  # (B or 1, 1, Lq, Lk)

    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    if rel_bias is not None:
        start = last if causal or key_limit is not None else diagonal
        distance = (start - keys).abs().clamp(max=rel_bias.shape[1] - 1)
        scores = scores + rel_bias[:, distance].transpose(0, 1)
    weights = torch.where(visible, scores.relu(), 0)

    n: Tensor | float
    if isinstance(normalizer, Tensor):
        n = normalizer.to(weights.dtype)[:, None, None, None]
    elif normalizer == "visible":
        n = visible.sum(3, keepdim=True, dtype=weights.dtype).clamp(min=1)
    else:
        n = max(length_k, 1) if normalizer == "length" else float(normalizer)
    return weights @ v / n


def relu_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    key_limit: Tensor | None = None,
    normalizer: str | float | Tensor = "length",
    **options: object,
) -> Tensor:
    """(Tq, H, D), (Tk, H, D), (Tk, H, Dv) → (Tq, H, Dv): `relu_attention` of one sequence after the other."""
    outputs = []
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(starts_q) - 1):
        rows, keys = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        sequence = (x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys]))
        limit = None if key_limit is None else key_limit[None, rows]
        n = normalizer[b : b + 1] if isinstance(normalizer, Tensor) else normalizer
        outputs.append(relu_attention(*sequence, key_limit=limit, normalizer=n, **options)[0].transpose(0, 1))  # type: ignore[arg-type]
    slack = q.new_zeros(q.shape[0] - starts_q[-1], q.shape[1], v.shape[2])
    return torch.cat([*outputs, slack])
