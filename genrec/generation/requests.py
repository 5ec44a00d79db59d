"""Event sequences as the model's packed tensors."""

from __future__ import annotations

import numpy as np
import torch

from genrec.data.sequences import filter_token_types
from genrec.interfaces import EventSequences
from genrec.models.ugt import TokenBatch, UGTConfig


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
