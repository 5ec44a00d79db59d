"""No event crosses the cut: in the sequences that train, in the histories, in what is counted and numbered."""

import json
import re

import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.cli import main
from genrec.data.build import build_features
from genrec.data.catalogue import load_catalogue
from genrec.data.config import FeaturesConfig
from genrec.data.sequences import leave_out, load_sequences
from genrec.data.split import PARTS, ByTime, LeaveOneOut, load_split, parse_time, save_split, targets_of

times = st.lists(st.lists(st.integers(0, 30), max_size=12).map(sorted), min_size=1, max_size=8)


def log_of(users):
    """Sequences with these times; event e is item e + 1."""
    items = np.arange(1, sum(map(len, users)) + 1)
    plain = small.sequences(
        [items[at - len(user) : at].tolist() for at, user in zip(np.cumsum([*map(len, users)]), users, strict=True)]
    )
    return small.with_times(plain, [time for user in users for time in user])


@given(times, st.integers(0, 15), st.integers(16, 31))
def test_by_time(users, valid_from, test_from):
    log, split = log_of(users), ByTime(valid_from, test_from)
    for part, begin, end in (("valid", valid_from, test_from), ("test", test_from, 10**9)):
        histories, predicted = split.cut(log, part)
        assert (histories.timestamps < begin).all()
        assert np.array_equal(histories.user_ids, log.user_ids)
        targets = targets_of(log, predicted)
        for user, (first, stop) in enumerate(zip(log.cu_events[:-1], log.cu_events[1:], strict=True)):
            mine = slice(*histories.cu_events[user : user + 2])
            events = [event for event in range(first, stop) if log.timestamps[event] < begin]
            assert histories.item_ids[mine].tolist() == log.item_ids[events].tolist()
            window = [event for event in range(first, stop) if begin <= log.timestamps[event]]
            if window and log.timestamps[window[0]] < end:
                assert predicted[user] == window[0]
                assert targets[user] == log.item_ids[window[0]]
            else:
                assert (predicted[user], targets[user]) == (-1, 0)


@given(times)
def test_leave_one_out_is_leave_out(users):
    log = log_of(users)
    for part, n in (("valid", 2), ("test", 1)):
        histories, predicted = LeaveOneOut().cut(log, part)
        expected, targets = leave_out(log, n)
        assert histories.item_ids.tolist() == expected.item_ids.tolist()
        assert targets_of(log, predicted).tolist() == targets.tolist()


rows = st.tuples(
    st.sampled_from("pqrst"),
    st.sampled_from("abcdef"),
    st.integers(0, 29),
    st.sampled_from(["view", "buy", ""]),
    st.integers(1, 5),
)
BASE = [("z", "a", 0, "view", 1), ("z", "b", 1, "view", 2), ("z", "c", 12, "buy", 3), ("z", "a", 25, "buy", 4)]
WINDOWS = {"split": "time", "valid_from": 10, "test_from": 20}


def write_features(directory, log, **settings):
    directory.mkdir()
    lines = [",".join(map(str, row)) for row in log]
    (directory / "log.csv").write_text("\n".join(["user,item,time,did,rating", *lines]))
    settings = {"min_events": 1, "text_dim": 0, "cooccurrence_dim": 3, "threads": 1, **WINDOWS} | settings
    build_features(FeaturesConfig(directory / "log.csv", directory / "out", **settings))
    return directory / "out"


def what_training_sees(directory):
    """Everything that a model before its first validation is made of."""
    train, _ = load_split(directory).cut(load_sequences(directory), "valid")
    of_user = {
        user: train.token_ids[slice(*train.cu_tokens[row : row + 2])].tolist()
        for row, user in enumerate(train.user_ids)
        if train.cu_events[row] < train.cu_events[row + 1]
    }
    vocabulary = json.loads((directory / "vocabulary.json").read_text())
    return (directory / "items.parquet").read_bytes(), vocabulary, of_user


@settings(max_examples=15, deadline=None)
@given(
    st.lists(rows, max_size=25), st.lists(rows, max_size=25), st.integers(1, 2), st.integers(2, 5),
    st.sampled_from([{"action": "did"}, {"rating_buckets": 2}]),
)  # fmt: skip
def test_nothing_after_the_cut_is_seen(tmp_path_factory, log, other, min_count, max_events, kind):
    """Other events after the cut, by other users, with other items: the same items, counts, vocabulary and training
    events."""
    directory, base = tmp_path_factory.mktemp("log"), BASE + BASE[:2]
    log = base + log
    changed = [row for row in log if row[2] < 10] + base[2:4] + [row for row in other if row[2] >= 10]
    made = [
        write_features(directory / name, events, min_count=min_count, max_events=max_events, **kind)
        for name, events in (("log", log), ("changed", changed))
    ]
    assert what_training_sees(made[0]) == what_training_sees(made[1])


def test_windows_of_the_features(tmp_path):
    log = [("u", "abcdefgh"[n], time, "", 1) for n, time in enumerate([1, 2, 9, 10, 11, 19, 20, 21])]
    directory = write_features(tmp_path / "log", log, max_events=2)
    sequences, items = load_sequences(directory), load_catalogue(directory)
    assert sequences.timestamps.tolist() == [2, 9, 10, 11, 19, 20, 21], "max_events cuts before valid_from alone"
    assert items.item_ids.tolist() == ["", "a", "b", "c"], "what comes later is unknown"
    assert items.counts.tolist() == [0, 1, 1, 1]
    split = load_split(directory)
    assert split == ByTime(10, 20)
    assert [sequences.timestamps[split.cut(sequences, part)[1]].tolist() for part in PARTS] == [[10], [20]]
    summary = json.loads((directory / "summary.json").read_text())
    assert {key: summary[key] for key in ("training_events", "valid_users", "test_users", "cut_events")} == {
        "training_events": 3, "valid_users": 1, "test_users": 1, "cut_events": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2015-01-01", 1420070400), ("2015-01-01T01:00:00+01:00", 1420070400), ("2015-01-01T00:00:00Z", 1420070400),
        ("2015-01-01T00:00:00.5", 1420070401), ("1420070400", 1420070400), (1420070400, 1420070400), ("-5", -5),
    ],
)  # fmt: skip
def test_times(text, seconds):
    assert parse_time("valid_from", text) == seconds


@pytest.mark.parametrize("written", ["2015-01-01", "'2015-01-01'", "1420070400"])
def test_times_in_a_file(tmp_path, written):
    events = (("a", 1), ("b", 2), ("a", 1420070400), ("b", 1433116800))
    log = "user,item,time\n" + "".join(f"{user},{item},{time}\n" for user in "uv" for item, time in events)
    (tmp_path / "log.csv").write_text(log)
    (tmp_path / "features.yaml").write_text(
        f"events: {tmp_path}/log.csv\nout: {tmp_path}/out\nsplit: time\nvalid_from: {written}\ntest_from: 2015-06-01\n"
    )
    assert main(["features", "--config", str(tmp_path / "features.yaml")]) == 0
    assert load_split(tmp_path / "out") == ByTime(1420070400, 1433116800)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"valid_from": None}, "valid_from is None; expected a time with split time"),
        ({"split": "leave_one_out"}, "valid_from is 10; expected none with split leave_one_out"),
        ({"test_from": "2015-13-01"}, "test_from is '2015-13-01'; expected a date such as 2015-01-31, a time, or"),
        (
            {"valid_from": "2015-01-01"},
            "valid_from is 2015-01-01; expected a time before test_from, 1970-01-01T00:00:20",
        ),
        ({"time": ""}, "log.csv has no column of times; pass --time"),
        ({"valid_from": 0}, "valid_from is 1970-01-01, but the first event is at 1970-01-01; expected events before"),
        ({"valid_from": 13}, "no user has an event from valid_from = 1970-01-01T00:00:13 on and before test_from = "),
        ({"test_from": 26}, "no user has an event from test_from = 1970-01-01T00:00:26 on, and one earlier"),
    ],
)
def test_refusals(tmp_path, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        write_features(tmp_path / "log", BASE, **settings)
    assert not (tmp_path / "log" / "out").exists()


def test_split_on_disk(tmp_path):
    assert load_split(tmp_path) == LeaveOneOut(), "as before there was a choice"
    for split in (LeaveOneOut(), ByTime(-3, 10**10)):
        save_split(tmp_path, split)
        assert load_split(tmp_path) == split
    for text in ('{"split": "by moon"}', '{"split": "time"}', "[]"):
        (tmp_path / "split.json").write_text(text)
        with pytest.raises(ValueError, match=r"is not a split .*; run genrec features again"):
            load_split(tmp_path)
