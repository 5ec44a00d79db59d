"""ReLU attention on padded batches with explicit gradients: what runs where no compiled kernel does.

    S = scale · Q Kᵀ + bias[d]     P = mask ⊙ relu(S)     O = P V / n
    G = dO / n     dV = Pᵀ G     dS = (G Vᵀ) ⊙ [P > 0]     dQ = scale · dS K     dK = scale · dSᵀ Q     dbias[d] += dS

Sequences of different lengths are padded at the FRONT: then i + Lk − Lq − j, the distance of a row and a key, is the
same number in every sequence, and the bias of a whole batch is one (H, Lq, Lk) table.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Options(NamedTuple):
    """The operator's arguments after the tensors; see op.py for the divisor."""

    key_limit: Tensor | None
    rel_bias: Tensor | None
    divisors: Tensor | None
    causal: bool
    scale: float
    divisor: float
    visible: bool


class Batch(NamedTuple):
    """Which keys a padded row sees, and what its bias and its divisor are. Lq and Lk are padded lengths."""

    end: Tensor  # (B or 1, Lq) one past the last key the row sees
    anchor: Tensor  # (B or 1, Lq) the key at distance 0
    divisor: Tensor | float  # (B or 1, 1, Lq or 1, 1)


def dense_batch(q: Tensor, k: Tensor, options: Options) -> Batch:
    """The batch of (B, H, Lq, D) queries and (B, H, Lk, D) keys, all of full length."""
    lengths = torch.full((1, 1), k.shape[2], dtype=torch.int64, device=q.device)
    return _batch(torch.zeros_like(lengths), lengths, q.shape[2], k.shape[2], options.key_limit, options)


def packed_batch(rows: Packing, keys: Packing, options: Options) -> Batch:
    """The batch of packed sequences."""
    key_limit = None if options.key_limit is None else rows.pad(options.key_limit[:, None, None])[:, 0, :, 0]
    return _batch(keys.first, keys.lengths, rows.length, keys.length, key_limit, options)


def _batch(
    first: Tensor, lengths: Tensor, length_q: int, length_k: int, key_limit: Tensor | None, options: Options
) -> Batch:
    diagonal = torch.arange(length_q, device=first.device)[None] + length_k - length_q
    if key_limit is not None:
        end = first + torch.minimum(key_limit.clamp(min=0), lengths)
        anchor = end - 1
    else:
        end = diagonal + 1 if options.causal else torch.full_like(diagonal, length_k)
        anchor = diagonal
    divisor: Tensor | float = options.divisor
    if options.divisors is not None:
        divisor = options.divisors[:, None, None, None]
    elif options.visible:
        divisor = (end - first).clamp(min=1)[:, None, :, None]
    elif not divisor:
        divisor = lengths.clamp(min=1)[:, None, :, None]
    return Batch(end, anchor, divisor)


def forward(q: Tensor, k: Tensor, v: Tensor, rel_bias: Tensor | None, scale: float, batch: Batch) -> Tensor:
    """(B, H, Lq, D), (B, H, Lk, D), (B, H, Lk, Dv) → (B, H, Lq, Dv)"""
    return _weights(q, k, rel_bias, scale, batch) @ v / _divisor(batch, q.dtype)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rel_bias: Tensor | None, scale: float, batch: Batch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and rel_bias; the last is empty without one."""
    weights = _weights(q, k, rel_bias, scale, batch)
    grad = grad / _divisor(batch, q.dtype)
    grad_v = weights.transpose(2, 3) @ grad
    grad_scores = torch.ops.aten.threshold_backward(grad @ v.transpose(2, 3), weights, 0)  # 0 where relu gave 0
    grad_q = (grad_scores @ k).mul_(scale)
    grad_k = (grad_scores.transpose(2, 3) @ q).mul_(scale)
    grad_bias = q.new_empty(0) if rel_bias is None else _bias_gradient(grad_scores, rel_bias, batch)
    return grad_q, grad_k, grad_v, grad_bias


def _divisor(batch: Batch, dtype: torch.dtype) -> Tensor | float:
    return batch.divisor.to(dtype) if isinstance(batch.divisor, Tensor) else batch.divisor


def _weights(q: Tensor, k: Tensor, rel_bias: Tensor | None, scale: float, batch: Batch) -> Tensor:
    scores = (q * scale) @ k.transpose(2, 3)
    table = q.new_zeros(1, 1) if rel_bias is None else rel_bias
    table = torch.cat([table, table.new_full((len(table), 1), -torch.inf)], 1)
    distance = _distance(batch, k.shape[2], table.shape[1] - 1)
    bias = table.index_select(1, distance.flatten()).view(len(table), *distance.shape)
    scores += bias.transpose(0, 1)
    return scores.relu_()


def _distance(batch: Batch, length_k: int, size: int) -> Tensor:
    """(B or 1, Lq, Lk) column of the bias table: the distance, at most size − 1, and `size` where the key is hidden.

    Keys before the first of a sequence need no mask: they are padding, and with k = v = 0 they add nothing anywhere.
    """
    keys = torch.arange(length_k, device=batch.anchor.device)
    distance = (batch.anchor[:, :, None] - keys).abs_().clamp_(max=size - 1)
    return distance.masked_fill_(keys >= batch.end[:, :, None], size)


def _bias_gradient(grad_scores: Tensor, rel_bias: Tensor, batch: Batch) -> Tensor:
    heads, size = rel_bias.shape
    distance = _distance(batch, grad_scores.shape[3], size)
    if distance.shape[0] == 1:
        grad_scores = grad_scores.sum(0, keepdim=True)
    rows = grad_scores.transpose(0, 1).flatten(1)
    columns = rel_bias.new_zeros(heads, size + 1).scatter_add_(1, distance.flatten().expand_as(rows), rows)
    return columns[:, :size].contiguous()


class Packing:
    """Where the tokens of packed sequences lie in a batch padded at the front to `length`."""

    def __init__(self, cu_seqlens: Tensor, tokens: int, length: int) -> None:
        cu_seqlens = cu_seqlens.long()
        self.length = length
        self.lengths = cu_seqlens.diff()[:, None]  # (B, 1)
        self.first = length - self.lengths  # (B, 1)
        token = torch.arange(tokens, device=cu_seqlens.device)
        sequence = torch.searchsorted(cu_seqlens[1:], token, right=True)  # B for slack tokens
        slack = sequence >= len(self.lengths)
        ends = torch.cat([cu_seqlens[1:], cu_seqlens[-1:]])
        slot = sequence * length + length - ends[sequence] + token
        self.slot = torch.where(slack, len(self.lengths) * length, slot)  # slack tokens share one slot past the batch

    def pad(self, tokens: Tensor) -> Tensor:
        """(T, H, D) → (B, H, length, D)"""
        batch = len(self.lengths)
        padded = tokens.new_zeros(batch * self.length + 1, *tokens.shape[1:])
        padded.index_copy_(0, self.slot, tokens)
        return padded[:-1].view(batch, self.length, *tokens.shape[1:]).transpose(1, 2)

    def unpad(self, padded: Tensor) -> Tensor:
        """(B, H, length, D) → (T, H, D); slack tokens are 0"""
        rows = padded.transpose(1, 2).flatten(0, 1)
        rows = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
        return rows.index_select(0, self.slot)
