"""Event sequences from disk, and the ways training and evaluation cut them. All cuts are plain numpy, without loops."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from genrec.interfaces import OOV, EventSequences, TokenType

SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("type_ids", pa.list_(pa.int8())),
        ("positions", pa.list_(pa.int32())),
        ("item_ids", pa.list_(pa.int32())),
        ("ratings", pa.list_(pa.float32())),
        ("timestamps", pa.list_(pa.int64())),
    ]
)
# Dictionaries for the columns of few values alone: those of items and times would be as large as the columns.
PARQUET: dict[str, Any] = {
    "compression": "zstd",
    "use_dictionary": ["user_id", "type_ids.list.element", "positions.list.element", "ratings.list.element"],
}


RowGroups = Mapping[Path, Sequence[int] | None]  # of part files, None for all of a file


def load_sequences(directory: Path | str) -> EventSequences:
    """The sequences that `genrec features` wrote into `directory`, all files in order.

    Raises FileNotFoundError if a file is missing, ValueError if one is not what it should be.
    """
    return read_parts(dict.fromkeys(part_files(Path(directory) / "sequences")))


def read_parts(parts: RowGroups) -> EventSequences:
    """The sequences of these row groups of part files, all of a file where it says None, one after the other;
    ValueError if a file is not what it should be."""
    table = pa.concat_tables([_read_part(path, groups) for path, groups in parts.items()])
    cu_tokens, token_ids = _flatten(table, "token_ids")
    cu_events, item_ids = _flatten(table, "item_ids")
    return EventSequences(
        user_ids=np.array(table["user_id"].to_pylist(), dtype=np.object_),
        cu_tokens=cu_tokens,
        token_ids=token_ids,
        type_ids=_flatten(table, "type_ids")[1],
        positions=_flatten(table, "positions")[1],
        cu_events=cu_events,
        item_ids=item_ids,
        ratings=_flatten(table, "ratings")[1],
        timestamps=_flatten(table, "timestamps")[1],
    )


def to_table(sequences: EventSequences) -> pa.Table:
    """One row per user, as `load_sequences` reads it; ratings that are NaN become null."""
    ratings = pa.array(sequences.ratings, pa.float32(), from_pandas=True)
    columns = [
        pa.array(sequences.user_ids, pa.string()),
        _lists(sequences.cu_tokens, pa.array(sequences.token_ids, pa.int32())),
        _lists(sequences.cu_tokens, pa.array(sequences.type_ids, pa.int8())),
        _lists(sequences.cu_tokens, pa.array(sequences.positions, pa.int32())),
        _lists(sequences.cu_events, pa.array(sequences.item_ids, pa.int32())),
        _lists(sequences.cu_events, ratings),
        _lists(sequences.cu_events, pa.array(sequences.timestamps, pa.int64())),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def leave_out(sequences: EventSequences, n: int) -> tuple[EventSequences, NDArray[np.int32]]:
    """Hide the last n events of every user: (what is left, targets (U,) int32).

    targets[u] is the item of the first hidden event, event −n. Rows stay aligned with `sequences`: a user with fewer
    than n events keeps an empty history and target 0 (OOV), so leave out users whose target is 0 when you score.
    Raises ValueError if n < 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}; expected at least 1 event to leave out")
    ends = sequences.cu_events[1:]
    long_enough = np.diff(sequences.cu_events) >= n
    targets = np.full(len(sequences), OOV, np.int32)
    targets[long_enough] = sequences.item_ids[ends[long_enough] - n]
    return keep_events(sequences, _events_from_end(sequences) > n), targets


def last_events(sequences: EventSequences, n: int) -> EventSequences:
    """Only the last n events of every user, numbered from 0 again. Raises ValueError if n < 0."""
    if n < 0:
        raise ValueError(f"n is {n}; expected 0 or more events to keep")
    return keep_events(sequences, _events_from_end(sequences) <= n)


def take_users(sequences: EventSequences, users: NDArray[np.int64] | Sequence[int]) -> EventSequences:
    """The users at these row numbers, in this order; IndexError if one does not exist."""
    if np.asarray(users).dtype == np.bool_:
        raise TypeError("users is a boolean mask; expected row numbers (np.flatnonzero gives them)")
    rows = np.asarray(users, dtype=np.int64)
    if rows.size and (rows.min() < 0 or rows.max() >= len(sequences)):
        raise IndexError(f"users are {rows.min()} … {rows.max()}; expected rows in 0 … {len(sequences) - 1}")
    tokens, cu_tokens = _elements(sequences.cu_tokens, rows)
    events, cu_events = _elements(sequences.cu_events, rows)
    return EventSequences(
        user_ids=sequences.user_ids[rows],
        cu_tokens=cu_tokens,
        token_ids=sequences.token_ids[tokens],
        type_ids=sequences.type_ids[tokens],
        positions=sequences.positions[tokens],
        cu_events=cu_events,
        item_ids=sequences.item_ids[events],
        ratings=sequences.ratings[events],
        timestamps=sequences.timestamps[events],
    )


def join_users(parts: Sequence[EventSequences]) -> EventSequences:
    """The users of all parts, one after the other; at least one part."""

    def joined(name: str) -> NDArray:
        return np.concatenate([getattr(part, name) for part in parts])

    def offsets(name: str) -> NDArray[np.int64]:
        lengths = [np.diff(getattr(part, name)) for part in parts]
        return np.concatenate([[0], np.cumsum(np.concatenate(lengths), dtype=np.int64)])

    names = ("user_ids", "token_ids", "type_ids", "positions", "item_ids", "ratings", "timestamps")
    return EventSequences(
        cu_tokens=offsets("cu_tokens"), cu_events=offsets("cu_events"), **{name: joined(name) for name in names}
    )


def filter_token_types(sequences: EventSequences, types: Iterable[TokenType]) -> EventSequences:
    """Only tokens of these types; item tokens always stay. Events are untouched."""
    keep = np.isin(sequences.type_ids, [int(TokenType.ITEM), *(int(token_type) for token_type in types)])
    return replace(
        sequences,
        cu_tokens=_count_before(keep)[sequences.cu_tokens],
        token_ids=sequences.token_ids[keep],
        type_ids=sequences.type_ids[keep],
        positions=sequences.positions[keep],
    )


def ragged_ranges(begins: NDArray[np.int64], lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """begins[0] … begins[0] + lengths[0] - 1, begins[1] … laid end to end, and the offsets of each stretch."""
    cu_lengths = np.concatenate([[0], np.cumsum(lengths)])
    return np.arange(cu_lengths[-1]) + np.repeat(begins - cu_lengths[:-1], lengths), cu_lengths


def keep_events(sequences: EventSequences, keep: NDArray[np.bool_]) -> EventSequences:
    """Only the events that `keep` (E,) marks, with their tokens; events are numbered anew."""
    before = _count_before(keep)
    user_of_token = np.repeat(np.arange(len(sequences)), np.diff(sequences.cu_tokens))
    event_of_token = sequences.cu_events[user_of_token] + sequences.positions
    keep_token = keep[event_of_token]
    new_positions = before[event_of_token] - before[sequences.cu_events[user_of_token]]
    return EventSequences(
        user_ids=sequences.user_ids,
        cu_tokens=_count_before(keep_token)[sequences.cu_tokens],
        token_ids=sequences.token_ids[keep_token],
        type_ids=sequences.type_ids[keep_token],
        positions=new_positions[keep_token].astype(np.int32),
        cu_events=before[sequences.cu_events],
        item_ids=sequences.item_ids[keep],
        ratings=sequences.ratings[keep],
        timestamps=sequences.timestamps[keep],
    )


def _events_from_end(sequences: EventSequences) -> NDArray[np.int64]:
    """(E,) 1 for the last event of a user, 2 for the one before, …"""
    ends = np.repeat(sequences.cu_events[1:], np.diff(sequences.cu_events))
    return ends - np.arange(len(sequences.item_ids))


def _count_before(keep: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(len + 1,) how many are kept before each place."""
    return np.concatenate([[0], np.cumsum(keep, dtype=np.int64)])


def _elements(offsets: NDArray[np.int64], rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the elements of these rows one after the other, and the offsets of the result."""
    return ragged_ranges(offsets[rows], offsets[rows + 1] - offsets[rows])


def part_files(directory: Path) -> list[Path]:
    """part-00000-of-N.parquet … in their order; FileNotFoundError unless all N of them are there."""
    paths = sorted(directory.glob("part-*-of-*.parquet"))
    if not paths:
        raise FileNotFoundError(f"{directory} holds no part-*.parquet; expected the output of genrec features")
    expected = int(paths[0].stem.rsplit("-", 1)[1])
    if len(paths) != expected:
        raise FileNotFoundError(
            f"{directory} holds {len(paths)} of its {expected} part files; run genrec features again"
        )
    return paths


def row_groups(path: Path) -> list[int]:
    """How many events every row group of a part file has, from its footer alone. Errors as read_parts."""
    with _opened(path) as file:
        footer = file.metadata
        names = [footer.schema.column(number).path.split(".")[0] for number in range(footer.num_columns)]
        column = names.index("item_ids")
        return [footer.row_group(number).column(column).num_values for number in range(footer.num_row_groups)]


def _read_part(path: Path, groups: Sequence[int] | None) -> pa.Table:
    with _opened(path) as file:
        return file.read() if groups is None else file.read_row_groups(groups)


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path) as file:
            if not file.schema_arrow.equals(SCHEMA, check_metadata=False):
                found = file.schema_arrow.names
                raise ValueError(f"{path} has columns {found}; expected {SCHEMA.names} as genrec features writes them")
            yield file
    except pa.ArrowInvalid:
        raise ValueError(f"{path} is not a readable Parquet file; run genrec features again") from None


def _flatten(table: pa.Table, name: str) -> tuple[NDArray[np.int64], NDArray]:
    """(offsets (U + 1,), values) of a list column; null values of floats become NaN."""
    chunks = table[name].chunks
    lengths = [np.diff(np.asarray(chunk.offsets)) for chunk in chunks]
    values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks]
    return np.concatenate([[0], np.cumsum(np.concatenate(lengths), dtype=np.int64)]), np.concatenate(values)


def _lists(offsets: NDArray[np.int64], values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
