"""Training batches as a pure function of (seed, epoch, step): there is no loader state to save or to lose."""

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
    stride = max(1, max_events // 2)
    rows = []
    for begin, end in zip(cu_events[:-1].tolist(), cu_events[1:].tolist(), strict=True):
        first_target, window_end = begin + 1, min(end, begin + max_events + 1)
        while first_target < end:
            rows.append((max(begin, window_end - max_events - 1), first_target, window_end))
            first_target, window_end = window_end, min(end, window_end + stride)
    return _windows(rows)


def last_positions(cu_events: IntArray, max_events: int, targets: int) -> Windows:
    """One window per user, whose targets are the user's last `targets` events."""
    rows = []
    for begin, end in zip(cu_events[:-1].tolist(), cu_events[1:].tolist(), strict=True):
        if end - begin > 1:
            begin = max(begin, end - max_events - 1)
            rows.append((begin, max(begin + 1, end - targets), end))
    return _windows(rows)


def liked_events(sequences: EventSequences, liked_from: float) -> NDArray[np.bool_]:
    """(E,) the events that the user valued: rated liked_from or better, or not rated at all."""
    return np.isnan(sequences.ratings) | (sequences.ratings >= liked_from)


def _windows(rows: list[tuple[int, int, int]]) -> Windows:
    table = np.array(rows, np.int64).reshape(-1, 3)
    return Windows(*table.T)


class TrainingSet:
    """Windows over event sequences, and the packed batches cut from them."""

    def __init__(
        self, sequences: EventSequences, windows: Windows, wanted: NDArray[np.bool_], config: UGTConfig
    ) -> None:
        """wanted (E,): which events may be targets; out-of-vocabulary events never are."""
        self.sequences = filter_token_types(sequences, config.types)
        self.wanted = wanted & (sequences.item_ids > 0)
        targets_before = np.concatenate([[0], np.cumsum(self.wanted)])
        self._event_tokens = np.append(
            np.flatnonzero(self.sequences.type_ids == TokenType.ITEM), len(self.sequences.token_ids)
        )  # the first token of every event
        has_target = targets_before[windows.end] > targets_before[windows.first_target]
        self.windows = windows.take(np.flatnonzero(has_target))

    def __len__(self) -> int:
        return len(self.windows)

    def batch(self, windows: Windows, device: torch.device | str) -> tuple[TokenBatch, TargetBatch]:
        """The packed histories and targets of some windows."""
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
            return torch.from_numpy(np.ascontiguousarray(array)).to(device=device, dtype=dtype)

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


class EpochOrder:
    """Which windows go into the batch of a step: windows of like length together, batches in random order."""

    def __init__(self, windows: Windows, batch_size: int, seed: int) -> None:
        self.windows, self.batch_size, self.seed = windows, batch_size, seed
        self.steps = -(-len(windows) // batch_size)
        self._epoch, self._batches = -1, [np.zeros(0, np.int64)]

    def __getitem__(self, step: int) -> Windows:
        """The windows of `step`, counted from 0 over all epochs."""
        epoch, index = divmod(step, self.steps)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffle(epoch)
        return self.windows.take(self._batches[index])

    def _shuffle(self, epoch: int) -> list[IntArray]:
        rng = np.random.default_rng([self.seed, epoch])
        lengths = self.windows.end - self.windows.begin
        by_length = np.argsort(lengths + 2 * rng.random(len(lengths)), kind="stable")
        batches = np.split(by_length, range(self.batch_size, len(by_length), self.batch_size))
        return [batches[i] for i in rng.permutation(len(batches))]
