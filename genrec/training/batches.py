"""Windows over histories, and the packed batches cut from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from genrec.data.sequences import filter_token_types, ragged_ranges
from genrec.interfaces import EventSequences, TokenType
from genrec.models.ugt import TargetBatch, TokenBatch, UGTConfig

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Windows:
    """Stretches of one user's events that are trained on in one pass, as event numbers over all users.

    Events begin … end - 2 are read, events first_target … end - 1 are predicted, each from what lies before it.
    """

    begin: IntArray  # (W,)
    first_target: IntArray  # (W,) > begin
    end: IntArray  # (W,)

    def __len__(self) -> int:
        return len(self.begin)

    def take(self, index: IntArray) -> Windows:
        """The windows at these positions."""
        return Windows(self.begin[index], self.first_target[index], self.end[index])


def all_positions(cu_events: IntArray, max_events: int) -> Windows:
    """Windows in which every event but a user's first is a target exactly once.

    Histories longer than max_events are cut into overlapping windows, so that every target beyond the first window
    still sees at least half of max_events events.
    """
    first, last, stride = cu_events[:-1], cu_events[1:], max(1, max_events // 2)
    beyond = np.maximum(last - first - 1 - max_events, 0)  # targets that the first window does not reach
    windows = np.where(last - first > 1, 1 - (-beyond // stride), 0)
    number, _ = ragged_ranges(np.zeros_like(windows), windows)  # of the window within its user
    first, last = np.repeat(first, windows), np.repeat(last, windows)
    reach = first + max_events + 1 + number * stride
    end = np.minimum(reach, last)
    first_target = np.where(number == 0, first + 1, reach - stride)
    return Windows(np.maximum(first, end - max_events - 1), first_target, end)


def last_positions(cu_events: IntArray, max_events: int, targets: int) -> Windows:
    """One window per user, whose targets are the user's last `targets` events."""
    able = np.diff(cu_events) > 1
    first, end = cu_events[:-1][able], cu_events[1:][able]
    begin = np.maximum(first, end - max_events - 1)
    return Windows(begin, np.maximum(begin + 1, end - targets), end)


def liked_events(sequences: EventSequences, liked_from: float) -> NDArray[np.bool_]:
    """(E,) the events that the user valued: rated liked_from or better, or not rated at all."""
    return np.isnan(sequences.ratings) | (sequences.ratings >= liked_from)


class TrainingSet:
    """Windows over event sequences, and the packed batches cut from them."""

    def __init__(
        self, sequences: EventSequences, windows: Windows, wanted: NDArray[np.bool_], config: UGTConfig
    ) -> None:
        """wanted (E,): which events may be targets; out-of-vocabulary events never are."""
        self.sequences = filter_token_types(sequences, config.types)
        self.wanted = wanted & (sequences.item_ids > 0)
        self._targets_before = np.concatenate([[0], np.cumsum(self.wanted)])
        self._event_tokens = np.append(
            np.flatnonzero(self.sequences.type_ids == TokenType.ITEM), len(self.sequences.token_ids)
        )  # the first token of every event
        self.windows = windows.take(np.flatnonzero(self.targets(windows)))

    def __len__(self) -> int:
        return len(self.windows)

    def tokens(self, windows: Windows) -> IntArray:
        """(W,) how many tokens each window reads."""
        return self._event_tokens[windows.end - 1] - self._event_tokens[windows.begin]

    def targets(self, windows: Windows) -> IntArray:
        """(W,) how many targets each window has."""
        return self._targets_before[windows.end] - self._targets_before[windows.first_target]

    def batch(self, windows: Windows) -> tuple[TokenBatch, TargetBatch]:
        """The packed histories and targets of some windows, at least one."""
        first, last = self._event_tokens[windows.begin], self._event_tokens[windows.end - 1]
        rows, cu_tokens = ragged_ranges(first, last - first)
        owner = np.repeat(np.arange(len(windows)), last - first)
        tokens = self.sequences
        positions = tokens.positions[rows] - tokens.positions[first][owner]

        events, cu_events = ragged_ranges(windows.first_target, windows.end - windows.first_target)
        kept = self.wanted[events]
        target_owner = np.repeat(np.arange(len(windows)), np.diff(cu_events))[kept]
        events = events[kept]
        cu_targets = np.searchsorted(target_owner, np.arange(len(windows) + 1))
        last_tokens = self._event_tokens[events] - 1 - first[target_owner] + cu_tokens[target_owner]

        def to(array: NDArray, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)

        return (
            TokenBatch(
                to(tokens.token_ids[rows]), to(tokens.type_ids[rows]), to(positions), to(cu_tokens, torch.int32),
                int((last - first).max()),
            ),
            TargetBatch(
                to(tokens.item_ids[events]), to(last_tokens), to(cu_targets, torch.int32),
                int(np.diff(cu_targets).max()),
            ),
        )  # fmt: skip
