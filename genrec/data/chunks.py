"""Event sequences in chunks that fit into memory: what is read, shuffled and let go together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from heapq import heapreplace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Protocol

from genrec.data.sequences import part_files, read_parts, row_groups
from genrec.interfaces import EventSequences


class Read(Protocol):
    """Reads one lane of a chunk, or all of it."""

    def __call__(self, chunk: int, lane: int | None = None) -> EventSequences: ...


@dataclass(frozen=True)
class Chunks:
    """`count` pieces of a log, each with all events of its users; reading one twice gives the same.

    Every chunk is in `lanes` parts of about one size that can be read by themselves, so that no rank has to read what
    others train on.
    """

    count: int
    read: Read
    lanes: int = 1

    @classmethod
    def of(cls, sequences: EventSequences) -> Chunks:
        """The one chunk of a log that is in memory."""
        return cls(1, lambda chunk, lane=None: sequences)

    def map(self, change: Callable[[EventSequences], EventSequences]) -> Chunks:
        """The same chunks, changed as they are read; a single one now and for good."""
        if self.count == self.lanes == 1:
            return Chunks.of(change(self.read(0)))
        return Chunks(self.count, lambda chunk, lane=None: change(self.read(chunk, lane)), self.lanes)

    def __iter__(self) -> Iterator[EventSequences]:
        return map(self.read, range(self.count))


def stream_sequences(directory: Path | str, events: int, lanes: int = 1) -> Chunks:
    """The sequences that `genrec features` wrote into `directory`, in chunks of about `events` events.

    A chunk is row groups from all over the log. It has as many lanes as divide `lanes` and leave each two row groups or
    more; a log of one chunk has one. Errors as load_sequences.
    """
    paths = part_files(Path(directory) / "sequences")
    groups = [(path, group, size) for path in paths for group, size in enumerate(row_groups(path))]
    count = min(len(groups), -(-sum(size for *_, size in groups) // events))
    if count <= 1:
        return Chunks.of(read_parts(dict.fromkeys(paths)))
    most = max(1, len(groups) // (2 * count))
    lanes = max(divisor for divisor in range(1, lanes + 1) if lanes % divisor == 0 and divisor <= most)
    shares = _shares(groups, count * lanes)

    def read(chunk: int, lane: int | None = None) -> EventSequences:
        wanted = range(lanes) if lane is None else (lane,)
        found = sorted(group for one in wanted for group in shares[one * count + chunk])
        return read_parts({path: [number for _, number, _ in rows] for path, rows in groupby(found, itemgetter(0))})

    return Chunks(count, read, lanes)


def _shares(groups: list[tuple[Path, int, int]], count: int) -> list[list[tuple[Path, int, int]]]:
    """Row groups (path, number, events) dealt into `count` shares of about as many events: the largest first, each to
    whoever has least."""
    shares: list[list[tuple[Path, int, int]]] = [[] for _ in range(count)]
    least = [(0, share) for share in range(count)]
    for path, group, size in sorted(groups, key=lambda each: -each[2]):
        events, share = least[0]
        shares[share].append((path, group, size))
        heapreplace(least, (events + size, share))
    return shares
