"""Which events are training data, and what is predicted for validation and test."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from genrec.data.files import atomic_file, read_json
from genrec.data.sequences import keep_events, leave_out
from genrec.interfaces import EventSequences

Part = Literal["valid", "test"]
PARTS: tuple[Part, ...] = ("valid", "test")
NOBODY = -1  # in place of an event: this user is not scored


class Split(Protocol):
    """Where histories are cut. What comes before "valid" is the training data, what comes before "test" is what a refit
    trains on; both are also the histories that the events to predict are predicted from."""

    def cut(self, sequences: EventSequences, part: Part) -> tuple[EventSequences, NDArray[np.int64]]:
        """(what comes before `part`, with a row for every user; (U,) the event of `sequences` to predict for each,
        NOBODY for a user who has none)."""
        ...

    def nobody(self, part: Part) -> str:
        """The sentence to say where no user can be scored."""
        ...

    def to_json(self) -> dict[str, Any]:
        """What split_from_json reads."""
        ...


@dataclass(frozen=True)
class LeaveOneOut:
    """The last event of every user is for the test, the one before it for validation."""

    def cut(self, sequences: EventSequences, part: Part) -> tuple[EventSequences, NDArray[np.int64]]:
        """See Split."""
        n = {"valid": 2, "test": 1}[part]
        lengths = np.diff(sequences.cu_events)
        return leave_out(sequences, n)[0], np.where(lengths >= n, sequences.cu_events[1:] - n, NOBODY)

    def nobody(self, part: Part) -> str:
        """See Split."""
        if part == "valid":
            return "no user has three events or more; expected some, to train, validate and test on"
        return "no user has two events; expected some, one to read and one to predict"

    def to_json(self) -> dict[str, Any]:
        """See Split."""
        return {"split": "leave_one_out"}


@dataclass(frozen=True)
class ByTime:
    """Training data ends where validation begins, for everybody at once. What is predicted is the first event of a
    user in each window. Raises ValueError unless valid_from < test_from."""

    valid_from: int  # unix seconds; validation events are in valid_from … test_from - 1
    test_from: int  # unix seconds; test events are from here on

    def __post_init__(self) -> None:
        if self.valid_from >= self.test_from:
            raise ValueError(
                f"valid_from is {time_text(self.valid_from)}; expected a time before test_from, "
                f"{time_text(self.test_from)}"
            )

    def cut(self, sequences: EventSequences, part: Part) -> tuple[EventSequences, NDArray[np.int64]]:
        """See Split."""
        begin = self.valid_from if part == "valid" else self.test_from
        before = sequences.timestamps < begin
        histories = keep_events(sequences, before)
        first = sequences.cu_events[:-1] + np.diff(histories.cu_events)  # events are in time order
        there = first < sequences.cu_events[1:]
        if part == "valid":
            there[there] = sequences.timestamps[first[there]] < self.test_from
        return histories, np.where(there, first, NOBODY)

    def nobody(self, part: Part) -> str:
        """See Split."""
        begin, name = (self.valid_from, "valid_from") if part == "valid" else (self.test_from, "test_from")
        until = f" and before test_from = {time_text(self.test_from)}" if part == "valid" else ""
        return (
            f"no user has an event from {name} = {time_text(begin)} on{until}, and one earlier; expected some, "
            "one to read and one to predict"
        )

    def to_json(self) -> dict[str, Any]:
        """See Split."""
        return {"split": "time", "valid_from": self.valid_from, "test_from": self.test_from}


def targets_of(sequences: EventSequences, events: NDArray[np.int64]) -> NDArray[np.int32]:
    """(U,) items of the events to predict that `cut` gave, 0 for NOBODY."""
    items = np.zeros(len(events), np.int32)
    items[events >= 0] = sequences.item_ids[events[events >= 0]]
    return items


def split_from_json(value: dict[str, Any]) -> Split:
    """The split that to_json wrote, perhaps among other things; leave-one-out where nothing was, as before there was a
    choice. Raises ValueError, KeyError or TypeError if it is none.
    """
    name = value.get("split", "leave_one_out")
    if name == "leave_one_out":
        return LeaveOneOut()
    if name != "time":
        raise ValueError(f"split is {name!r}; expected leave_one_out or time")
    return ByTime(int(value["valid_from"]), int(value["test_from"]))


def save_split(directory: Path, split: Split) -> None:
    """Write split.json into `directory`."""
    with atomic_file(directory / "split.json") as path:
        path.write_text(json.dumps(split.to_json()) + "\n", encoding="utf-8")


def load_split(directory: Path | str) -> Split:
    """How the features in `directory` are split; ValueError if split.json is not what it should be."""
    path = Path(directory) / "split.json"
    if not path.exists():
        return LeaveOneOut()
    try:
        return split_from_json(read_json(path, "genrec features"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a split ({error!r}); run genrec features again") from None


def parse_time(name: str, text: str | int) -> int:
    """Unix seconds of a date or time in ISO 8601, in UTC unless it names a zone, or of a number of seconds.

    Fractions of a second are rounded up, as those of events are rounded down. Raises ValueError that begins with `name`
    for anything else.
    """
    if re.fullmatch(r"-?\d+", str(text)):
        return int(text)
    try:
        moment = datetime.fromisoformat(str(text))
    except ValueError:
        raise ValueError(f"{name} is {text!r}; expected a date such as 2015-01-31, a time, or unix seconds") from None
    return math.ceil((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def time_text(seconds: int) -> str:
    """How messages write a time."""
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat().replace("T00:00:00", "").removesuffix("+00:00")
    except (ValueError, OverflowError, OSError):  # beyond the year 9999
        return str(seconds)
