"""Sequences as numbered part files, written from a stream of events in bounded memory and, on a cluster, by many."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from genrec.data.files import atomic_file
from genrec.data.sequences import PARQUET, SCHEMA, to_table
from genrec.data.tfrecord import encode_examples
from genrec.data.vocabulary import Vocabulary, encode_events
from genrec.interfaces import EventSequences

_MOST_EVENTS_AT_ONCE = 1 << 20  # if every user has as many as are kept


@dataclass(frozen=True)
class SequenceParts:
    """The files that `users` sequences go to; `write` can run in several processes, each with parts of its own."""

    directory: Path
    format: str  # parquet, tfrecord or tfrecord.gz
    vocabulary: Vocabulary
    users: int
    rows_per_file: int
    max_events: int

    @property
    def count(self) -> int:
        return -(-self.users // self.rows_per_file)

    def write(self, batches: Iterable[pa.RecordBatch]) -> None:
        """Write the parts that these events belong to: rows as `kept_events` says, ordered by part, user and n, all
        rows of every part that occurs."""
        for part, pieces in groupby(self._pieces(batches), key=lambda piece: piece["part"][0].as_py()):
            name = f"part-{part:05d}-of-{self.count:05d}.{self.format}"
            with atomic_file(self.directory / name) as path, _WRITERS[self.format](path) as write:
                for piece in pieces:
                    write(to_table(_sequences(self.vocabulary, piece)))

    def _pieces(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
        """The events of a fixed range of users at a time, so that the files do not depend on the batches."""
        users_at_once = max(1, _MOST_EVENTS_AT_ONCE // self.max_events)
        pending: list[pa.RecordBatch] = []
        current = None
        for batch in batches:
            part, user = batch["part"].to_numpy().astype(np.int64), batch["user"].to_numpy()
            piece = np.stack([part, (user - part * self.rows_per_file) // users_at_once])
            changes = np.flatnonzero((np.diff(piece) != 0).any(axis=0)) + 1
            for begin, end in pairwise([0, *changes.tolist(), len(batch)]):
                if pending and piece[:, begin].tolist() != current:
                    yield pa.Table.from_batches(pending)
                    pending = []
                current = piece[:, begin].tolist() if end > begin else current
                pending += [batch.slice(begin, end - begin)] if end > begin else []
        if pending:
            yield pa.Table.from_batches(pending)


def _sequences(vocabulary: Vocabulary, events: pa.Table) -> EventSequences:
    """Tokens of whole users, ordered by user and n."""
    user = events["user"].to_numpy()
    starts = np.flatnonzero(np.diff(user, prepend=user[0] - 1))
    ratings = pc.fill_null(events["rating"], np.nan).to_numpy().astype(np.float32)

    def of_log(name: str, kind: type) -> NDArray | None:
        return events[name].to_numpy().astype(kind) if name in events.column_names else None

    return encode_events(
        vocabulary,
        user_ids=np.array(events["user_id"].drop_null().to_pylist(), dtype=np.object_),
        cu_events=np.append(starts, len(user)).astype(np.int64),
        item_ids=events["item"].to_numpy().astype(np.int32),
        ratings=ratings,
        timestamps=events["time"].to_numpy() if vocabulary.gap_edges else None,
        actions=events["action"].to_numpy() if vocabulary.action_names else None,
        unknown_items=of_log("unknown_item", np.object_),
        weights=of_log("weight", np.float32),
        context=[events[f"context_{k}"].to_numpy() for k in range(len(vocabulary.context_columns))],
    )


@contextmanager
def _parquet(path: Path) -> Iterator[Callable[[pa.Table], object]]:
    with pq.ParquetWriter(path, SCHEMA, **PARQUET) as writer:
        yield writer.write_table


@contextmanager
def _tfrecord(path: Path) -> Iterator[Callable[[pa.Table], object]]:
    with open(path, "wb") as file:
        yield lambda table: file.write(encode_examples(table))


@contextmanager
def _tfrecord_gz(path: Path) -> Iterator[Callable[[pa.Table], object]]:
    # no name and no date inside, so that the same input gives the same bytes
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as file:
        yield lambda table: file.write(encode_examples(table))


_WRITERS = {"parquet": _parquet, "tfrecord": _tfrecord, "tfrecord.gz": _tfrecord_gz}
