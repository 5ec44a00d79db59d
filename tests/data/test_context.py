"""CONTEXT tokens that are no values of a column: hashes of unknown items, weights, places in sessions."""

import hashlib
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genrec.data.buckets import place_in_session
from genrec.data.context import ContextIds, context_from_json, context_tokens, hash_bucket
from genrec.data.sequences import load_sequences
from genrec.data.vocabulary import encode_events, load_vocabulary
from genrec.interfaces import TokenType

LOG = """user,item,time,play,device
u,a,0,10,tv
u,b,5,,tv
u,rare,10,1.5,phone
u,a,70,20,tv
v,b,0,30,tv
v,ü,59,-0,tv
v,a,60,10,tv
"""
SETTINGS = {"min_count": 2, "context": ["device"], "hash_buckets": 5, "weight": "play", "session_gap": 60}


def contexts(directory):
    """(E, tokens) ids."""
    sequences = load_sequences(directory)
    context = sequences.token_ids[sequences.type_ids == TokenType.CONTEXT]
    return context.reshape(len(sequences.item_ids), -1)


def test_all_kinds(build):
    directory, _ = build({"log.csv": LOG}, "log.csv", **SETTINGS)
    vocabulary = load_vocabulary(directory)
    assert vocabulary.context == (
        ContextIds("device", ("tv",)),
        ContextIds("item", kind="hash", buckets=5),
        ContextIds("play", kind="weight", edges=(0.0, 1.5, 10.0, 20.0, 30.0)),
        ContextIds("time", kind="session", edges=(1, 2, 3, 5, 9), gap=60),
    )
    assert vocabulary.type_sizes[TokenType.CONTEXT] == 1 + 1 + 5 + 5 + 5
    rare, odd = hash_bucket(np.array(["rare", "ü"], np.object_), 5)
    expected = [
        [1, 0, 6 + 3, 11 + 1], [1, 0, 0, 11 + 2], [0, 1 + rare, 6 + 2, 11 + 3], [1, 0, 6 + 4, 11 + 1],
        [1, 0, 6 + 5, 11 + 1], [1, 1 + odd, 6 + 1, 11 + 2], [1, 0, 6 + 3, 11 + 3],
    ]  # fmt: skip
    assert contexts(directory).tolist() == expected


def test_what_is_not_known_at_request_time_is_unknown(build):
    vocabulary = load_vocabulary(build({"log.csv": LOG}, "log.csv", **SETTINGS)[0])
    users, offsets, items = np.array(["you"], np.object_), np.array([0, 2]), np.array([1, 0], np.int32)
    bare = encode_events(vocabulary, users, offsets, items)
    assert not bare.token_ids[bare.type_ids == TokenType.CONTEXT].any()
    names = np.array([None, "rare"], np.object_)
    told = encode_events(vocabulary, users, offsets, items, unknown_items=names, timestamps=np.array([5, 9]))
    context = told.token_ids[told.type_ids == TokenType.CONTEXT].reshape(2, -1)
    assert context.tolist() == [[0, 0, 0, 12], [0, 1 + hash_bucket(names, 5)[1], 0, 13]]


def test_weights_that_do_not_train_make_no_buckets(build):
    directory, _ = build({"log.csv": LOG}, "log.csv", weight="play", holdout=2, out="held")
    assert load_vocabulary(directory).context[0].edges == (10.0, 30.0)
    directory, _ = build({"log.csv": LOG}, "log.csv", weight="play", weight_buckets=2, out="two")
    assert load_vocabulary(directory).context[0].edges == (0.0, 20.0)


def test_the_hash_is_what_the_documentation_says():
    expected = [1 + int(hashlib.sha256(item.encode()).hexdigest()[:16], 16) % 1000 for item in ("a", "物")]
    assert hash_bucket(np.array(["a", None, "物", "a"], np.object_), 1000).tolist() == [
        expected[0], 0, expected[1], expected[0],
    ]  # fmt: skip
    assert hash_bucket(np.array([None, None], np.object_), 3).tolist() == [0, 0]
    assert hash_bucket(np.array([], np.object_), 3).tolist() == []


@given(st.lists(st.lists(st.integers(0, 20), max_size=8).map(sorted), max_size=5), st.integers(1, 5))
def test_places_in_sessions(users, gap):
    expected = []
    for times in users:
        for n, time in enumerate(times):
            expected.append(expected[-1] + 1 if n and time - times[n - 1] < gap else 1)
    flat = np.array([time for times in users for time in times], np.int64)
    offsets = np.cumsum([0, *map(len, users)])
    assert place_in_session(flat, offsets, gap).tolist() == expected


def test_later_runs_of_a_column_are_the_same_token():
    runs = (ContextIds("day", ("Mo",)), ContextIds("item", kind="hash", buckets=2), ContextIds("day", ("Di", "Mi")))
    given_ids = np.array([1, 4, 5], np.int32)
    tokens = context_tokens(runs, np.array([0, 3]), [given_ids], np.array(["x", None, None], np.object_))
    assert [token.tolist() for token in tokens] == [[1, 4, 5], [1 + hash_bucket(np.array(["x"], object), 2)[0], 0, 0]]
    for run in runs:
        assert context_from_json(run.to_json()) == run


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"session_gap": 60, "time": ""}, "session_gap is 60, but"),
        ({"session_gap": -1}, "session_gap is -1; expected at least 0"),
        ({"hash_buckets": -1}, "hash_buckets is -1; expected at least 0"),
        ({"weight": "plays"}, "log.csv has no column 'plays' for weight"),
        ({"weight": "device"}, "has weight tv, expected a number"),
    ],
)
def test_refusals(build, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build({"log.csv": LOG}, "log.csv", **settings)


def test_an_extension_keeps_buckets_and_adds_values(build):
    old, _ = build({"log.csv": LOG}, "log.csv", out="v1", **SETTINGS)
    longer = LOG + "w,rare,0,999,phone\nw,c,1,-7,watch\n"
    new, _ = build({"log.csv": longer}, "log.csv", out="v2", extend=old, **SETTINGS)
    before, after = load_vocabulary(old).context, load_vocabulary(new).context
    assert after == (*before, ContextIds("device", ("phone",)))
    assert contexts(new)[-2:].tolist() == [
        [17, 0, 6 + 5, 12],
        [0, 1 + hash_bucket(np.array(["c"], object), 5)[0], 0, 13],
    ]
    assert contexts(new)[2].tolist() == [17, 0, 6 + 2, 11 + 3], "rare is known now"
