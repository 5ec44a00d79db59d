"""Event sequences for the evaluation tests: hand-made ones, and the first users of the shipped MovieLens log."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from genrec.interfaces import EventSequences

RATINGS = Path(__file__).parents[2] / "data" / "ml-latest-small" / "ratings.csv"


def as_sequences(users: Sequence[Sequence[int]]) -> EventSequences:
    """One token an event: the item."""
    cu_events = np.cumsum([0, *map(len, users)]).astype(np.int64)
    items = np.array([item for user in users for item in user], dtype=np.int32)
    return EventSequences(
        user_ids=np.array([str(user) for user in range(len(users))], dtype=object),
        cu_tokens=cu_events,
        token_ids=items,
        type_ids=np.zeros(len(items), np.int8),
        positions=np.array([place for user in users for place in range(len(user))], dtype=np.int32),
        cu_events=cu_events,
        item_ids=items,
        ratings=np.full(len(items), np.nan, np.float32),
        timestamps=np.zeros(len(items), np.int64),
    )


@pytest.fixture(scope="session")
def sequences_of() -> Callable[[Sequence[Sequence[int]]], EventSequences]:
    return as_sequences


@pytest.fixture(scope="session")
def movielens() -> list[list[int]]:
    """The 60 first users in time order; items are numbered by first appearance, from 1."""
    events = []
    with open(RATINGS, encoding="utf-8", newline="") as file:
        for place, row in enumerate(csv.DictReader(file)):
            if int(row["userId"]) > 60:
                break
            events.append((int(row["userId"]), int(row["timestamp"]), place, row["movieId"]))
    numbers: dict[str, int] = {}
    users: dict[int, list[int]] = {}
    for user, _, _, movie in sorted(events):
        users.setdefault(user, []).append(numbers.setdefault(movie, len(numbers) + 1))
    return list(users.values())
