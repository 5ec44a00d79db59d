"""Event sequences in chunks that fit into memory: what is read, shuffled and let go together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from genrec.data.sequences import part_files, read_parts
from genrec.interfaces import EventSequences


@dataclass(frozen=True)
class Chunks:
    """`count` pieces of a log, each with all events of its users; reading one twice gives the same."""

    count: int
    read: Callable[[int], EventSequences]

    @classmethod
    def of(cls, sequences: EventSequences) -> Chunks:
        """The one chunk of a log that is in memory."""
        return cls(1, lambda _: sequences)

    def map(self, change: Callable[[EventSequences], EventSequences]) -> Chunks:
        """The same chunks, changed as they are read; a single one now and for good."""
        if self.count == 1:
            return Chunks.of(change(self.read(0)))
        return Chunks(self.count, lambda chunk: change(self.read(chunk)))

    def __iter__(self) -> Iterator[EventSequences]:
        return map(self.read, range(self.count))


def stream_sequences(directory: Path | str, events: int) -> Chunks:
    """The sequences that `genrec features` wrote into `directory`, in chunks of about `events` events.

    A chunk is every n-th part file, so that it mixes users from all over the log. Errors as load_sequences.
    """
    paths = part_files(Path(directory) / "sequences")
    total = sum(_events(path) for path in paths)
    count = min(len(paths), max(1, -(-total // events)))
    if count == 1:
        return Chunks.of(read_parts(paths))
    return Chunks(count, lambda chunk: read_parts(paths[chunk::count]))


def _events(path: Path) -> int:
    """Events of a part file, from its footer alone; 0 where it has none that can be read, which reading then says."""
    try:
        footer = pq.read_metadata(path)
    except (OSError, ValueError):
        return 0
    names = [footer.schema.column(i).path.split(".")[0] for i in range(footer.num_columns)]
    if "item_ids" not in names:
        return 0
    column = names.index("item_ids")
    return sum(footer.row_group(i).column(column).num_values for i in range(footer.num_row_groups))
