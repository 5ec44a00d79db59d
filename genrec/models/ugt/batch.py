"""Packed inputs of a UGT: no padding anywhere, sequences laid end to end."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """The histories of B users, T tokens in all."""

    token_ids: Tensor  # (T,) int64, id within the token's type
    type_ids: Tensor  # (T,) int64, TokenType
    positions: Tensor  # (T,) int64, number of the token's event, from 0
    cu_seqlens: Tensor  # (B + 1,) int32, offsets of the sequences
    max_seqlen: int


@dataclass(frozen=True)
class TargetBatch:
    """M items to be predicted, each from its own past. Targets of one sequence are consecutive and in time order."""

    items: Tensor  # (M,) int64, item index ≥ 1
    last_tokens: Tensor  # (M,) int64, row in the TokenBatch of the last token the target may see
    cu_seqlens: Tensor  # (B + 1,) int32, which targets belong to which sequence
    max_seqlen: int  # most targets of one sequence
