"""What the parts of genrec hand each other: small frozen dataclasses and protocols, nothing else.

Item indices are dense: 1 … N are the items of the catalogue, 0 is the out-of-vocabulary item. Everything that has one
row per item (codes, embeddings, titles) has N + 1 rows, so that an item index is a row number.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

OOV = 0  # token id of anything the vocabulary does not hold; it is 0 in every token type


class TokenType(IntEnum):
    """What a token of an event sequence says about its event; each type has its own id space."""

    ITEM = 0  # which item: the item index
    ACTION = 1  # what was done to it: a rating bucket, a behaviour name
    TIME = 2  # how long after the event before: a gap bucket
    CONTEXT = 3  # anything else the log says about the event: hour, device, …


@dataclass(frozen=True)
class EventSequences:
    """Event logs of U users as packed tokens. Events are in time order; the tokens of one event are consecutive and
    start with its item token. T tokens, E events over all users."""

    user_ids: NDArray[np.object_]  # (U,) the ids of the log, as strings
    cu_tokens: NDArray[np.int64]  # (U + 1,) user u owns tokens cu_tokens[u] … cu_tokens[u + 1] - 1
    token_ids: NDArray[np.int32]  # (T,) id within the token's type, 0 = out of vocabulary
    type_ids: NDArray[np.int8]  # (T,) TokenType
    positions: NDArray[np.int32]  # (T,) number of the token's event within its user, from 0
    cu_events: NDArray[np.int64]  # (U + 1,) user u owns events cu_events[u] … cu_events[u + 1] - 1
    item_ids: NDArray[np.int32]  # (E,) item index of every event (the ITEM tokens once more, for direct reading)
    ratings: NDArray[np.float32]  # (E,) what the user said of the event, NaN where the log does not say
    timestamps: NDArray[np.int64]  # (E,) unix seconds, 0 where the log has no times

    def __len__(self) -> int:
        return len(self.user_ids)


@dataclass(frozen=True)
class Catalogue:
    """The N items of a vocabulary and their features; row 0 stands for the out-of-vocabulary item."""

    item_ids: NDArray[np.object_]  # (N + 1,) the ids of the log, as strings; row 0 is ""
    titles: NDArray[np.object_]  # (N + 1,) what to show a person
    counts: NDArray[np.int64]  # (N + 1,) events per item
    features: NDArray[np.float32]  # (N + 1, 256) row 0 is zero

    @property
    def size(self) -> int:
        """N, the number of items, without the out-of-vocabulary row."""
        return len(self.item_ids) - 1


@dataclass(frozen=True)
class SemanticIds:
    """One code per level for every item; no two items of 1 … N share a row. Codes are local to their level, 0-based."""

    codes: NDArray[np.int64]  # (N + 1, levels), row 0 is zero and means nothing
    codebook_sizes: tuple[int, ...]


@dataclass(frozen=True)
class Transitions:
    """Items that came soon after each item in a log, the strongest first; 0 with weight 0 where there are fewer."""

    items: NDArray[np.int32]  # (N + 1, K)
    weights: NDArray[np.float32]  # (N + 1, K)


class Ranker(Protocol):
    """Anything that recommends: the model and the baselines are evaluated through this one call."""

    def rank(self, histories: EventSequences, top_k: int) -> NDArray[np.int64]:
        """(U, top_k) item indices, best first, without the items of the user's own history; 0 where there are fewer."""
        ...
