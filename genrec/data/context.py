"""What the ids of CONTEXT tokens stand for, and the tokens of events."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from genrec.data.buckets import place_in_session, value_bucket

# Place of an event in its session: 1, 2, 3 … 4, 5 … 8, 9 and more.
SESSION_EDGES = (1, 2, 3, 5, 9)


@dataclass(frozen=True)
class ContextIds:
    """A run of CONTEXT ids. The ids of all runs follow each other, so that adding one renumbers nothing.

    values: one id for each value of `column`; several runs of a column are one token, the later ones hold the values
    that later versions of the vocabulary added.
    hash: buckets of the hashes of the ids of items that the vocabulary does not know; a known item has id 0.
    weight: buckets of the number in `column`. session: buckets of the place in the session, which ends where `gap`
    seconds or more pass between two events.
    """

    column: str  # of the log; item and time for hash and session, whatever the log calls them
    values: tuple[str, ...] = ()
    kind: Literal["values", "hash", "weight", "session"] = "values"
    edges: tuple[float, ...] = ()  # weight, session: lower bounds of the buckets
    buckets: int = 0  # hash: how many
    gap: int = 0  # session: seconds

    @property
    def size(self) -> int:
        """How many ids."""
        return len(self.values) + len(self.edges) + self.buckets

    @property
    def token(self) -> str:
        """What tells the tokens of an event apart; runs that have it in common are one token."""
        size = {"values": "", "hash": f" in {self.buckets} buckets", "weight": "", "session": f" after {self.gap} s"}
        return f"{self.kind} of {self.column}{size[self.kind]}"

    def to_json(self) -> dict[str, Any]:
        """What context_from_json reads."""
        if self.kind == "values":
            return {"column": self.column, "values": list(self.values)}
        if self.kind == "hash":
            return {"column": self.column, "kind": "hash", "buckets": self.buckets}
        gap = {"gap": self.gap} if self.kind == "session" else {}
        return {"column": self.column, "kind": self.kind, **gap, "edges": list(self.edges)}


def context_from_json(value: dict[str, Any]) -> ContextIds:
    """The run that to_json wrote; KeyError or TypeError if it is none."""
    kind = value.get("kind", "values")
    values = tuple(value["values"]) if kind == "values" else ()
    edges = () if kind in ("values", "hash") else tuple(value["edges"])
    return ContextIds(value["column"], values, kind, edges, value.get("buckets", 0), value.get("gap", 0))


def first_runs(runs: Sequence[ContextIds]) -> Iterator[tuple[int, ContextIds]]:
    """For every CONTEXT token of an event the first id of its first run, and that run."""
    first, seen = 1, set()
    for run in runs:
        if run.token not in seen:
            yield first, run
        seen.add(run.token)
        first += run.size


def context_tokens(
    runs: Sequence[ContextIds],
    cu_events: NDArray[np.int64],
    columns: Sequence[NDArray[np.int32]] = (),
    unknown_items: NDArray[np.object_] | None = None,
    weights: NDArray[np.float32] | None = None,
    timestamps: NDArray[np.int64] | None = None,
) -> list[NDArray[np.int32]]:
    """(E,) ids of every CONTEXT token; all 0, unknown, where it is not given what the token is made of.

    cu_events (U + 1,); columns: for every run of values that starts a token (E,) ids, ready to use; unknown_items (E,)
    ids of the log, None where the vocabulary knows the item; weights (E,); timestamps (E,) unix seconds.
    """
    tokens, given = [], iter(columns)
    for first, run in first_runs(runs):
        ids = np.zeros(cu_events[-1], np.int32)
        if run.kind == "values":
            tokens.append(next(given, ids))
            continue
        if run.kind == "hash" and unknown_items is not None:
            ids = hash_bucket(unknown_items, run.buckets)
        elif run.kind == "weight" and weights is not None:
            ids = value_bucket(run.edges, weights)
        elif run.kind == "session" and timestamps is not None:
            ids = value_bucket(run.edges, place_in_session(timestamps, cu_events, run.gap).astype(np.float32))
        tokens.append(np.where(ids > 0, ids + first - 1, 0).astype(np.int32))
    return tokens


def hash_bucket(item_ids: NDArray[np.object_], buckets: int) -> NDArray[np.int32]:
    """1 + the first 8 bytes, most significant first, of the SHA-256 of the UTF-8 of every id, modulo `buckets`; 0 for
    None. (E,)"""
    encoded = pa.array(item_ids, pa.string()).dictionary_encode()
    hashes = [hashlib.sha256(item.encode()).digest()[:8] for item in encoded.dictionary.to_pylist()]
    numbers = np.array([0] + [1 + int.from_bytes(hashed, "big") % buckets for hashed in hashes], np.int32)
    return numbers[encoded.indices.fill_null(-1).to_numpy() + 1]
