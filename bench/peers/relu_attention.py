"""ReLU attention in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """(B, L, D) with bias (…, Lq, Lk), -inf where a key is hidden. Fair: two matrix products of the vendor's library,
    and the bias added inside the first."""
    return torch.baddbmm(bias, q * q.shape[-1] ** -0.5, k.transpose(1, 2)).relu() @ v / k.shape[1]


def padded(lengths: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Packed causal histories (T, H, D) with a bias by distance. Fair: what is padded is as long as the longest history
    and no longer, and the mask and the distances are made once."""
    batch, longest = len(lengths), int(lengths.max())
    grid = torch.arange(longest)
    hidden = torch.full((longest, longest), -torch.inf).triu(1)
    real = grid < lengths[:, None]

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        heads, d = q.shape[1:]
        distance = (grid[:, None] - grid).clamp(0, bias.shape[1] - 1)
        q, k, v = (q.new_zeros(batch, longest, heads, d).index_put((real,), x).transpose(1, 2) for x in (q, k, v))
        scores = q * d**-0.5 @ k.transpose(2, 3) + (bias[:, distance] + hidden.to(q.dtype))
        return (scores.relu() @ v / lengths[:, None, None, None]).transpose(1, 2)[real]

    return attention
