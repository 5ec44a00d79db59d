"""Inputs of a UGT: packed for training, sequences laid end to end; padded for generation, one row a request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

B = TypeVar("B")


@dataclass(frozen=True)
class TokenBatch:
    """The histories of B users, T tokens in all."""

    token_ids: Tensor  # (T,) int64, id within the token's type
    type_ids: Tensor  # (T,) int64, TokenType
    positions: Tensor  # (T,) int64, number of the token's event, from 0
    cu_seqlens: Tensor  # (B + 1,) int32, offsets of the sequences
    max_seqlen: int

    def padded(self) -> PaddedTokens:
        """The same histories, one row each."""
        lengths = self.cu_seqlens.diff().long()
        real = torch.arange(self.max_seqlen, device=lengths.device) < lengths[:, None]

        def rows(values: Tensor) -> Tensor:
            return values.new_zeros(real.shape).masked_scatter_(real, values)

        return PaddedTokens(rows(self.token_ids), rows(self.type_ids), rows(self.positions), lengths)


@dataclass(frozen=True)
class PaddedTokens:
    """The histories of B requests, each at the beginning of a row of S tokens; nobody sees the rest of a row."""

    token_ids: Tensor  # (B, S) int64, id within the token's type
    type_ids: Tensor  # (B, S) int64, TokenType
    positions: Tensor  # (B, S) int64, number of the token's event, from 0
    lengths: Tensor  # (B,) int64, tokens that are there

    @property
    def last(self) -> Tensor:
        """(B, 1) int64, the column of the last token; 0 where there is none."""
        return (self.lengths - 1).clamp(min=0)[:, None]


@dataclass(frozen=True)
class TargetBatch:
    """M items to be predicted, each from its own past. Targets of one sequence are consecutive and in time order."""

    items: Tensor  # (M,) int64, item index ≥ 1
    last_tokens: Tensor  # (M,) int64, row in the TokenBatch of the last token the target may see
    cu_seqlens: Tensor  # (B + 1,) int32, which targets belong to which sequence
    max_seqlen: int  # most targets of one sequence


def map_tensors(function: Callable[[Tensor], Tensor], batch: B) -> B:
    """The same dataclass with `function` applied to every tensor in it, also in dataclasses inside."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}  # type: ignore[arg-type]
    changed = {
        name: function(value) if isinstance(value, Tensor) else map_tensors(function, value)
        for name, value in values.items()
        if isinstance(value, Tensor) or is_dataclass(value)
    }
    return replace(batch, **changed)  # type: ignore[type-var]
