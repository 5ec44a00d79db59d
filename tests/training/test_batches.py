"""Windows and batches against loops over single events."""

import numpy as np
import small
import torch
from hypothesis import given
from hypothesis import strategies as st

from genrec.data.sequences import ragged_ranges
from genrec.interfaces import TokenType
from genrec.training.batches import (
    TrainingSet,
    all_positions,
    last_positions,
    liked_events,
)

LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=8)
MAX_EVENTS = st.integers(1, 9)


def offsets(lengths):
    return np.cumsum([0, *lengths]).astype(np.int64)


def rows_of(windows):
    return list(zip(windows.begin.tolist(), windows.first_target.tolist(), windows.end.tolist(), strict=True))


@given(LENGTHS, MAX_EVENTS)
def test_every_event_but_the_first_is_a_target_once(lengths, max_events):
    cu_events = offsets(lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    seen_of = {}
    for begin, first_target, end in rows_of(all_positions(cu_events, max_events)):
        assert len(set(owner[begin:end])) == 1, "a window over two users"
        assert end - 1 - begin <= max_events, "more events than the model reads"
        for target in range(first_target, end):
            assert target not in seen_of
            seen_of[target] = target - begin
    starts = set(cu_events[:-1].tolist())
    assert set(seen_of) == {event for event in range(len(owner)) if event not in starts}
    for target, seen in seen_of.items():
        past = target - cu_events[owner[target]]
        assert 1 <= seen <= past
        assert seen == past or seen >= max_events // 2


@given(LENGTHS, MAX_EVENTS, st.integers(1, 12))
def test_last_positions_are_the_last_events_of_every_user(lengths, max_events, targets):
    cu_events = offsets(lengths)
    rows = rows_of(last_positions(cu_events, max_events, targets))
    able = [user for user, length in enumerate(lengths) if length > 1]
    assert len(rows) == len(able)
    for user, (begin, first_target, end) in zip(able, rows, strict=True):
        assert end == cu_events[user + 1]
        assert cu_events[user] <= begin == max(cu_events[user], end - 1 - max_events)
        assert first_target == max(begin + 1, end - targets)


def test_liked_events_are_rated_well_or_not_at_all():
    log = small.sequences([[1, 2, 3], [4]], [[4.0, 3.9, np.nan], [5.0]])
    assert liked_events(log, 4.0).tolist() == [True, False, True, True]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 6)), min_size=1, max_size=10))
def test_ragged_ranges(stretches):
    begins, lengths = (np.array(column, np.int64) for column in zip(*stretches, strict=True))
    indices, cu_lengths = ragged_ranges(begins, lengths)
    assert indices.tolist() == [begin + i for begin, length in stretches for i in range(length)]
    assert cu_lengths.tolist() == np.cumsum([0, *lengths]).tolist()


def naive_batch(log, windows, wanted, types, max_events):
    """Token by token: [(tokens, targets)] per window, tokens as (id, type, position), targets as (item, last token)."""
    out = []
    for begin, first_target, end in rows_of(windows):
        user = int(np.searchsorted(log.cu_events, begin, side="right")) - 1
        first_event = log.cu_events[user]
        tokens, targets = [], []
        for event in range(begin, end):
            if event >= first_target and wanted[event] and log.item_ids[event] > 0:
                targets.append((int(log.item_ids[event]), len(tokens) - 1))
            if event == end - 1:
                break
            for row in range(log.cu_tokens[user], log.cu_tokens[user + 1]):
                name = TokenType(int(log.type_ids[row])).name.lower()
                if log.positions[row] == event - first_event and name in types:
                    tokens.append((int(log.token_ids[row]), int(log.type_ids[row]), event - begin))
        assert max(position for _, _, position in tokens) < max_events
        out.append((tokens, targets))
    return out


@given(st.integers(0, 10_000), MAX_EVENTS, st.sampled_from([("item",), ("item", "time"), small.ALL_TYPES]))
def test_batches_are_what_the_windows_say(seed, max_events, types):
    rng = np.random.default_rng(seed)
    users = [rng.integers(0, 6, rng.integers(0, 14)).tolist() for _ in range(5)]
    log = small.sequences(users, types=small.ALL_TYPES, seed=seed)
    wanted = rng.random(len(log.item_ids)) < 0.6
    config = small.config(max_events=max_events, token_types=types)
    data = TrainingSet(log, all_positions(log.cu_events, max_events), wanted, config)
    with_target = [
        row
        for row in rows_of(all_positions(log.cu_events, max_events))
        if any(wanted[event] and log.item_ids[event] > 0 for event in range(row[1], row[2]))
    ]
    assert rows_of(data.windows) == with_target
    counted = naive_batch(log, data.windows, wanted, types, max_events)
    assert data.tokens(data.windows).tolist() == [len(tokens) for tokens, _ in counted]
    assert data.targets(data.windows).tolist() == [len(targets) for _, targets in counted]
    assert len(data) == len(with_target)
    if not with_target:
        return
    windows = data.windows.take(rng.permutation(len(data)))
    tokens, targets = data.batch(windows)
    expected = naive_batch(log, windows, wanted, types, max_events)

    assert tokens.cu_seqlens.tolist() == np.cumsum([0] + [len(t) for t, _ in expected]).tolist()
    assert targets.cu_seqlens.tolist() == np.cumsum([0] + [len(t) for _, t in expected]).tolist()
    assert tokens.max_seqlen == max(len(t) for t, _ in expected)
    assert targets.max_seqlen == max(len(t) for _, t in expected)
    got = list(zip(tokens.token_ids.tolist(), tokens.type_ids.tolist(), tokens.positions.tolist(), strict=True))
    assert got == [token for window, _ in expected for token in window]
    starts = tokens.cu_seqlens[:-1].tolist()
    aims = [(item, start + last) for start, (_, t) in zip(starts, expected, strict=True) for item, last in t]
    assert list(zip(targets.items.tolist(), targets.last_tokens.tolist(), strict=True)) == aims
    assert 0 not in targets.items
    assert {tokens.token_ids.dtype, tokens.type_ids.dtype, targets.items.dtype} == {torch.int64}
    assert {tokens.cu_seqlens.dtype, targets.cu_seqlens.dtype} == {torch.int32}


def test_no_windows():
    nothing = all_positions(offsets([1, 0, 1]), 5)
    assert len(nothing) == 0
    log = small.sequences([[1], [2]])
    assert len(TrainingSet(log, all_positions(log.cu_events, 5), np.ones(2, bool), small.config())) == 0


def test_a_batch_of_one_token_each():
    log = small.sequences([[1, 2], [3, 4]])
    data = TrainingSet(log, all_positions(log.cu_events, 5), np.ones(4, bool), small.config())
    tokens, targets = data.batch(data.windows)
    assert tokens.token_ids.tolist() == [1, 3]
    assert targets.items.tolist() == [2, 4]
    assert targets.last_tokens.tolist() == [0, 1]
