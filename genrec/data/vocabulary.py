"""What the ids of every token type mean, and the one place where events become tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genrec.data.buckets import gap_bucket, value_bucket
from genrec.data.context import ContextIds, context_from_json, context_tokens, first_runs
from genrec.data.files import atomic_file
from genrec.interfaces import EventSequences, TokenType

# Seconds since the event before: 0, 1, 4, 16, 64, … 2 years. Every bucket is four times as wide as the one before.
GAP_EDGES = (0, *(4**power for power in range(14)))


@dataclass(frozen=True)
class Vocabulary:
    """Ids of the four token types; 0 is "unknown" in each. A bucket id is the number of edges that are ≤ the value."""

    items: int  # N, item ids are 1 … N
    action_names: tuple[str, ...]  # action id − 1 → behaviour; empty where actions come from ratings
    rating_edges: tuple[
        float, ...
    ]  # lower bounds of the rating buckets; empty where actions have names or there are none
    gap_edges: tuple[int, ...]  # seconds, lower bounds of the gap buckets; empty where the log has no times
    context: tuple[ContextIds, ...]  # ids run on from one to the next
    min_count: int
    version: int = 1  # how many vocabularies there were, each an extension of the one before
    hash: str = ""  # genrec.data.catalogue.vocabulary_hash; empty where vocabulary.json is older than that
    extends: str | None = None  # hash of the version before

    @property
    def type_sizes(self) -> tuple[int, ...]:
        """Number of ids per TokenType, the unknown one included; 1 for a type that the log does not have."""
        actions = len(self.action_names) + len(self.rating_edges)
        return (
            1 + self.items,
            1 + actions,
            1 + len(self.gap_edges),
            1 + sum(run.size for run in self.context),
        )

    @property
    def context_tokens(self) -> tuple[ContextIds, ...]:
        """The CONTEXT tokens of every event, each as its first run of ids."""
        return tuple(run for _, run in first_runs(self.context))

    @property
    def context_columns(self) -> tuple[str, ...]:
        """The columns whose values are CONTEXT tokens."""
        return tuple(run.column for run in self.context_tokens if run.kind == "values")

    def meaning(self) -> dict[str, Any]:
        """What the ids of actions, gaps and contexts stand for."""
        return {
            "action_names": list(self.action_names),
            "rating_edges": list(self.rating_edges),
            "gap_edges": list(self.gap_edges),
            "context": [run.to_json() for run in self.context],
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "type_sizes": {t.name.lower(): size for t, size in zip(TokenType, self.type_sizes, strict=True)},
            "special_ids": {"unknown": 0},
            **self.meaning(),
            "min_count": self.min_count,
            "version": self.version,
            "hash": self.hash,
            "extends": self.extends,
        }

    def save(self, directory: Path) -> None:
        """Write vocabulary.json."""
        with atomic_file(directory / "vocabulary.json") as path:
            path.write_text(json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_vocabulary(directory: Path | str) -> Vocabulary:
    """The vocabulary.json that `genrec features` wrote into `directory`."""
    path = Path(directory) / "vocabulary.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected the output of genrec features")
    try:
        value = json.loads(path.read_bytes())
        return Vocabulary(
            items=value["type_sizes"]["item"] - 1,
            action_names=tuple(value["action_names"]),
            rating_edges=tuple(value["rating_edges"]),
            gap_edges=tuple(value["gap_edges"]),
            context=tuple(map(context_from_json, value["context"])),
            min_count=value["min_count"],
            version=value.get("version", 1),
            hash=value.get("hash", ""),
            extends=value.get("extends"),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a vocabulary ({error!r}); run genrec features again") from None


def encode_events(
    vocabulary: Vocabulary,
    user_ids: NDArray[np.object_],
    cu_events: NDArray[np.int64],
    item_ids: NDArray[np.int32],
    ratings: NDArray[np.float32] | None = None,
    timestamps: NDArray[np.int64] | None = None,
    actions: NDArray[np.int32] | None = None,
    context: Sequence[NDArray[np.int32]] = (),
    unknown_items: NDArray[np.object_] | None = None,
    weights: NDArray[np.float32] | None = None,
) -> EventSequences:
    """Tokens of events in time order, user after user: per event ITEM, then ACTION, TIME and the CONTEXT tokens, as far
    as the vocabulary has them.

    cu_events (U + 1,); item_ids, ratings, timestamps (unix seconds), actions (E,); context: (E,) ids as in the
    vocabulary for each of its context_columns; unknown_items (E,) the log's ids of items whose item_ids are 0, else
    None; weights (E,). What is not given is unknown (id 0, rating NaN, timestamp 0).
    """
    events = len(item_ids)
    ratings = np.full(events, np.nan, np.float32) if ratings is None else ratings
    kinds = [(TokenType.ITEM, item_ids)]
    if vocabulary.action_names:
        kinds.append((TokenType.ACTION, np.zeros(events, np.int32) if actions is None else actions))
    elif vocabulary.rating_edges:
        kinds.append((TokenType.ACTION, value_bucket(vocabulary.rating_edges, ratings)))
    if vocabulary.gap_edges:
        gaps = (
            np.zeros(events, np.int32)
            if timestamps is None
            else gap_bucket(vocabulary.gap_edges, timestamps, cu_events)
        )
        kinds.append((TokenType.TIME, gaps))
    tokens = context_tokens(vocabulary.context, cu_events, context, unknown_items, weights, timestamps)
    kinds += [(TokenType.CONTEXT, ids) for ids in tokens]
    number = np.arange(events) - np.repeat(cu_events[:-1], np.diff(cu_events))
    return EventSequences(
        user_ids=user_ids,
        cu_tokens=cu_events * len(kinds),
        token_ids=np.stack([ids for _, ids in kinds], axis=1).astype(np.int32).ravel(),
        type_ids=np.tile(np.array([kind for kind, _ in kinds], np.int8), events),
        positions=np.repeat(number, len(kinds)).astype(np.int32),
        cu_events=cu_events,
        item_ids=item_ids,
        ratings=ratings,
        timestamps=np.zeros(events, np.int64) if timestamps is None else timestamps,
    )
