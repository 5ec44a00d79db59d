"""Event sequences as the model's tensors: packed for training, padded for generation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from genrec.data.sequences import filter_token_types
from genrec.interfaces import OOV, EventSequences, TokenType
from genrec.models.ugt import TokenBatch, UGTConfig

UNKNOWN = -1  # an event with an item that the vocabulary does not hold, in a history where 0 is padding


class Request(NamedTuple):
    """The arguments of Recommender.forward."""

    history: Tensor  # (B, L) int64
    fields: tuple[Tensor, ...]  # one for each further token type of the model, in the order of TokenType


def padded_request(
    sequences: EventSequences, types: tuple[TokenType, ...], device: torch.device | str = "cpu"
) -> Request:
    """The whole histories, each at the beginning of its row, and what a model of these token types reads of them."""
    sequences = filter_token_types(sequences, types)
    lengths, events = np.diff(sequences.cu_events), len(sequences.item_ids)
    tokens = sequences.token_ids.reshape(events, -1 if events else len(types))
    kinds = sequences.type_ids[: tokens.shape[1]]
    place = np.arange(lengths.max(initial=1)) < lengths[:, None]

    def padded(values: np.ndarray) -> Tensor:
        rows = np.zeros((*place.shape, *values.shape[1:]), np.int64)
        rows[place] = values
        return torch.from_numpy(rows).to(device)

    items = np.where(sequences.item_ids == OOV, UNKNOWN, sequences.item_ids)
    fields = {kind: padded(tokens[:, kinds == kind]) for kind in types if kind != TokenType.ITEM}
    return Request(
        padded(items),
        tuple(field if kind == TokenType.CONTEXT else field.squeeze(-1) for kind, field in fields.items()),
    )


def token_batch(sequences: EventSequences, config: UGTConfig, device: torch.device | str = "cpu") -> TokenBatch:
    """The tokens of `sequences` that the model reads. Every sequence holds 1 … config.max_events events."""
    sequences = filter_token_types(sequences, config.types)
    lengths = np.diff(sequences.cu_tokens)

    def to(array: np.ndarray, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.from_numpy(array).to(device=device, dtype=dtype)

    return TokenBatch(
        token_ids=to(sequences.token_ids),
        type_ids=to(sequences.type_ids),
        positions=to(sequences.positions),
        cu_seqlens=to(sequences.cu_tokens, torch.int32),
        max_seqlen=int(lengths.max()) if len(lengths) else 0,
    )
