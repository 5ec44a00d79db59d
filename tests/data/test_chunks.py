"""Sequences in chunks are the sequences of the whole log."""

import dataclasses

import numpy as np
import pyarrow.parquet as pq
import pytest
import small

from genrec.data.chunks import Chunks, stream_sequences
from genrec.data.sequences import join_users, leave_out, load_sequences, take_users, to_table

LOG = small.sequences(small.random_users(23, 30, 12), types=small.ALL_TYPES)


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "sequences").mkdir()
    for part, first in enumerate(range(0, 23, 5)):
        users = take_users(LOG, np.arange(first, min(first + 5, 23)))
        pq.write_table(to_table(users), tmp_path / "sequences" / f"part-{part:05d}-of-00005.parquet")
    return tmp_path


def same(one, other):
    return all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name), equal_nan=field.name == "ratings")
        for field in dataclasses.fields(one)
    )


@pytest.mark.parametrize(("events", "count"), [(10**6, 1), (70, 3), (1, 5)])
def test_chunks_have_every_user_once(directory, events, count):
    chunks = stream_sequences(directory, events)
    assert chunks.count == count
    users = np.concatenate([chunk.user_ids for chunk in chunks])
    assert sorted(users) == sorted(LOG.user_ids)
    in_order = take_users(join_users(list(chunks)), [int(np.flatnonzero(users == user)[0]) for user in LOG.user_ids])
    assert same(in_order, LOG)
    assert same(load_sequences(directory), LOG)


@pytest.fixture
def row_groups(tmp_path):
    """The log in two files of row groups of two users, the last of one."""
    (tmp_path / "sequences").mkdir()
    for part, users in enumerate((range(12), range(12, 23))):
        path = tmp_path / "sequences" / f"part-{part:05d}-of-00002.parquet"
        pq.write_table(to_table(take_users(LOG, list(users))), path, row_group_size=2)
    return tmp_path


@pytest.mark.parametrize(
    ("events", "most", "count", "lanes"),
    [(10**6, 4, 1, 1), (100, 4, 2, 2), (100, 6, 2, 3), (60, 4, 3, 2), (1, 4, 12, 1)],
)
def test_lanes_have_every_user_once(row_groups, events, most, count, lanes):
    chunks = stream_sequences(row_groups, events, most)
    assert (chunks.count, chunks.lanes) == (count, lanes)
    parts = [[chunks.read(chunk, lane) for lane in range(lanes)] for chunk in range(count)]
    assert sorted(user for chunk in parts for lane in chunk for user in lane.user_ids) == sorted(LOG.user_ids)
    for chunk, of_chunk in enumerate(parts):
        whole, sizes = chunks.read(chunk), [len(lane.item_ids) for lane in of_chunk]
        assert sorted(whole.user_ids) == sorted(user for lane in of_chunk for user in lane.user_ids)
        assert max(sizes) <= 2 * min(sizes)
    changed = chunks.map(lambda sequences: leave_out(sequences, 1)[0])
    last = (count - 1, lanes - 1)
    assert same(changed.read(*last), leave_out(chunks.read(*last), 1)[0])


def test_map_changes_what_is_read(directory):
    chunks = stream_sequences(directory, 70).map(lambda chunk: leave_out(chunk, 1)[0])
    expected = leave_out(LOG, 1)[0]
    assert sum(len(chunk.item_ids) for chunk in chunks) == len(expected.item_ids)
    assert same(Chunks.of(LOG).map(lambda chunk: leave_out(chunk, 1)[0]).read(0), expected)


def test_a_missing_part_is_one_sentence(directory):
    (directory / "sequences" / "part-00002-of-00005.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="holds 4 of its 5 part files"):
        stream_sequences(directory, 70)


def test_a_damaged_part_is_one_sentence(directory):
    (directory / "sequences" / "part-00002-of-00005.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"part-00002-of-00005\.parquet is not a readable Parquet file"):
        list(stream_sequences(directory, 70))
