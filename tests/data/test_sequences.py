"""The cuts of event sequences against loops over users, and the way to disk and back."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genrec.data.sequences import filter_token_types, last_events, leave_out, load_sequences, take_users, to_table
from genrec.interfaces import EventSequences, TokenType


@st.composite
def event_sequences(draw):
    """Users of 0 to 6 events; every event has an item token and any of the other types."""
    users = draw(
        st.lists(st.lists(st.tuples(st.integers(0, 9), st.sets(st.sampled_from([1, 2, 3]))), max_size=6), max_size=5)
    )
    tokens = [
        [(item + 10 * kind, kind, n) for n, (item, kinds) in enumerate(events) for kind in [0, *sorted(kinds)]]
        for events in users
    ]
    flat = np.array([token for user in tokens for token in user], dtype=np.int32).reshape(-1, 3)
    items = np.array([item for events in users for item, _ in events], dtype=np.int32)
    return EventSequences(
        user_ids=np.array([f"user {u}" for u in range(len(users))], dtype=np.object_),
        cu_tokens=np.cumsum([0, *map(len, tokens)]).astype(np.int64),
        token_ids=flat[:, 0],
        type_ids=flat[:, 1].astype(np.int8),
        positions=flat[:, 2],
        cu_events=np.cumsum([0, *map(len, users)]).astype(np.int64),
        item_ids=items,
        ratings=np.where(items % 3 == 0, np.nan, items / 2).astype(np.float32),
        timestamps=np.arange(len(items), dtype=np.int64) * 1000,
    )


def as_lists(sequences):
    """[(user, [(item, rating, time, [(token, type), …]), …]), …], after checking that positions count from 0."""
    assert sequences.cu_tokens.dtype == sequences.cu_events.dtype == np.int64
    assert sequences.positions.dtype == sequences.token_ids.dtype == sequences.item_ids.dtype == np.int32
    assert sequences.type_ids.dtype == np.int8
    users = []
    for u, user in enumerate(sequences.user_ids):
        events = []
        for e in range(sequences.cu_events[u], sequences.cu_events[u + 1]):
            rating = None if np.isnan(sequences.ratings[e]) else float(sequences.ratings[e])
            events.append((int(sequences.item_ids[e]), rating, int(sequences.timestamps[e]), []))
        for t in range(sequences.cu_tokens[u], sequences.cu_tokens[u + 1]):
            events[sequences.positions[t]][3].append((int(sequences.token_ids[t]), int(sequences.type_ids[t])))
        users.append((user, events))
    return users


@given(event_sequences(), st.integers(1, 4))
def test_leave_out(sequences, n):
    left, targets = leave_out(sequences, n)
    full = as_lists(sequences)
    assert as_lists(left) == [(user, events[: max(len(events) - n, 0)]) for user, events in full]
    assert targets.tolist() == [events[-n][0] if len(events) >= n else 0 for _, events in full]
    assert targets.dtype == np.int32


@given(event_sequences(), st.integers(0, 4))
def test_last_events(sequences, n):
    expected = [(user, events[max(len(events) - n, 0) :]) for user, events in as_lists(sequences)]
    assert as_lists(last_events(sequences, n)) == expected


@given(event_sequences(), st.sets(st.sampled_from(list(TokenType))))
def test_filter_token_types(sequences, types):
    kept = {int(TokenType.ITEM), *map(int, types)}
    expected = [
        (user, [(*event[:3], [token for token in event[3] if token[1] in kept]) for event in events])
        for user, events in as_lists(sequences)
    ]
    assert as_lists(filter_token_types(sequences, types)) == expected


@given(event_sequences(), st.data())
def test_take_users(sequences, data):
    rows = data.draw(st.lists(st.integers(0, len(sequences) - 1), max_size=8) if len(sequences) else st.just([]))
    full = as_lists(sequences)
    assert as_lists(take_users(sequences, np.array(rows, dtype=np.int64))) == [full[row] for row in rows]


@given(event_sequences(), st.integers(1, 3), st.integers(0, 3))
def test_cuts_compose(sequences, n, keep):
    """What is left after hiding n events and keeping some equals one slice."""
    expected = [
        (user, events[: max(len(events) - n, 0)][-keep or len(events) :]) for user, events in as_lists(sequences)
    ]
    assert as_lists(last_events(leave_out(sequences, n)[0], keep)) == expected


@given(event_sequences())
def test_disk_round_trip(tmp_path_factory, sequences):
    directory = tmp_path_factory.mktemp("out")
    (directory / "sequences").mkdir()
    half = len(sequences) // 2
    for part, rows in enumerate([range(half), range(half, len(sequences))]):
        table = to_table(take_users(sequences, list(rows)))
        pq.write_table(table, directory / "sequences" / f"part-{part:05d}-of-00002.parquet")
    assert as_lists(load_sequences(directory)) == as_lists(sequences)


def test_ratings_are_null_on_disk_where_absent():
    sequences = EventSequences(
        np.array(["u"], np.object_), np.array([0, 2]), np.array([1, 2], np.int32), np.zeros(2, np.int8),
        np.arange(2, dtype=np.int32), np.array([0, 2]), np.array([1, 2], np.int32),
        np.array([np.nan, 4], np.float32), np.zeros(2, np.int64),
    )  # fmt: skip
    assert to_table(sequences)["ratings"].to_pylist() == [[None, 4.0]]


def test_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no part-\*\.parquet; expected the output of genrec features"):
        load_sequences(tmp_path)
    (tmp_path / "sequences").mkdir()
    broken = tmp_path / "sequences" / "part-00000-of-00002.parquet"
    broken.write_bytes(b"PAR1 no PAR1")
    with pytest.raises(FileNotFoundError, match="holds 1 of its 2 part files"):
        load_sequences(tmp_path)
    broken.rename(tmp_path / "sequences" / "part-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="is not a readable Parquet file"):
        load_sequences(tmp_path)


@given(event_sequences())
def test_bad_arguments(sequences):
    with pytest.raises(ValueError, match="n is 0; expected at least 1"):
        leave_out(sequences, 0)
    with pytest.raises(ValueError, match="n is -1; expected 0 or more"):
        last_events(sequences, -1)
    with pytest.raises(IndexError, match="expected rows in 0"):
        take_users(sequences, [len(sequences)])
    with pytest.raises(IndexError, match="expected rows in 0"):
        take_users(sequences, [-1])
    with pytest.raises(TypeError, match="boolean mask"):
        take_users(sequences, np.ones(len(sequences), bool))
