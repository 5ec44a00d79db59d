"""Ordering, counting, cutting and numbering against plain loops over random logs, and the options that change them."""

import json
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.data.build import build_features
from genrec.data.catalogue import load_catalogue
from genrec.data.config import FeaturesConfig
from genrec.data.context import ContextIds
from genrec.data.engine import DuckEngine, local_database
from genrec.data.formats import open_sources
from genrec.data.inputs import find_files
from genrec.data.log import build_vocabulary, count_pairs, order_log
from genrec.data.previous import nothing_before
from genrec.data.readers import choose_log_columns
from genrec.data.sequences import load_sequences
from genrec.data.vocabulary import load_vocabulary
from genrec.interfaces import TokenType

rows = st.tuples(
    st.sampled_from("pqrst"),  # user
    st.sampled_from("abcdef"),  # item
    st.integers(0, 4),  # time, with many ties
    st.sampled_from(["view", "buy", ""]),
    st.sampled_from(["phone", "tv", ""]),
)
FIRST = [("z", "a", 0, "view", "tv"), ("z", "b", 1, "view", "tv")] * 3  # always something to keep, and to co-occur


@settings(max_examples=25, deadline=None)
@given(
    st.lists(rows, max_size=30),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 3),
)
def test_whole_way(tmp_path_factory, log, min_events, max_events, min_count, holdout, window):
    directory = tmp_path_factory.mktemp("log")
    log = FIRST + log
    lines = [",".join(map(str, row)) for row in log]
    (directory / "log.csv").write_text("\n".join(["user,item,time,did,device", *lines]))
    config = FeaturesConfig(
        directory / "log.csv", directory / "out", min_events=min_events, max_events=max_events, min_count=min_count,
        holdout=holdout, window=window, action="did", context=["device"], cooccurrence_dim=3, text_dim=0, threads=1,
    )  # fmt: skip
    summary = build_features(config)
    users = defaultdict(list)
    for row in log:
        users[row[0]].append(row)
    kept = {user: sorted(events, key=lambda row: row[2]) for user, events in users.items() if len(events) >= min_events}

    catalogue, vocabulary = load_catalogue(directory / "out"), load_vocabulary(directory / "out")
    everything = [row for events in kept.values() for row in events]
    train = Counter(row[1] for events in kept.values() for row in events[: len(events) - holdout])
    items = number(Counter(row[1] for row in everything), min_count, train)
    actions = number(Counter(row[3] for row in everything if row[3]), min_count)
    devices = number(Counter(row[4] for row in everything if row[4]), min_count)
    assert list(catalogue.item_ids) == ["", *items]
    assert catalogue.counts.tolist() == [0, *(train[item] for item in items)]
    assert vocabulary.action_names == tuple(actions)
    assert vocabulary.context == (ContextIds("device", tuple(devices)),)

    sequences = load_sequences(directory / "out")
    expected = []
    for events in kept.values():
        for n, row in enumerate(events[-max_events:]):
            gap = 0 if n == 0 else {0: 1, 1: 2, 2: 2, 3: 2, 4: 3}[row[2] - events[-max_events:][n - 1][2]]
            ids = (items.get(row[1], 0), actions.get(row[3], 0), gap, devices.get(row[4], 0))
            expected += [(token, kind, n) for kind, token in enumerate(ids)]
    tokens = zip(sequences.token_ids.tolist(), sequences.type_ids.tolist(), sequences.positions.tolist(), strict=True)
    assert list(sequences.user_ids) == list(kept)
    assert list(tokens) == expected
    assert np.isnan(sequences.ratings).all()
    assert summary["dropped_users"] == len(users) - len(kept)
    assert summary["dropped_events"] + summary["events"] + summary["cut_events"] == len(log)


def number(counts, min_count, order=None):
    """{value: id from 1} by falling order count, then by name."""
    order = counts if order is None else order
    kept = sorted((value for value in counts if counts[value] >= min_count), key=lambda value: (-order[value], value))
    return {value: i for i, value in enumerate(kept, 1)}


RATED = "user,item,rating\n" + "".join(
    f"u{u},{'abc'[(u + k) % 3]},{rating}\n" for u in range(4) for k, rating in enumerate(["1", "", "4.5", "3"])
)


def test_ratings_become_action_tokens(build, read_back):
    directory, _ = build({"log.csv": RATED}, "log.csv")
    sequences = load_sequences(directory)
    assert load_vocabulary(directory).rating_edges == (1.0, 3.0, 4.5)
    actions = sequences.token_ids[sequences.type_ids == TokenType.ACTION]
    assert actions.tolist() == [1, 0, 3, 2] * 4  # an event without a rating is unknown
    assert [rating for _, rating, _ in read_back(directory)["u0"]] == [1.0, None, 4.5, 3.0]


def test_many_ratings_become_quantiles(build):
    ratings = [f"{value / 7:.3f}" for value in range(100)]
    content = "user,item,rating\n" + "".join(f"u{i % 5},{i % 9},{rating}\n" for i, rating in enumerate(ratings))
    directory, _ = build({"log.csv": content}, "log.csv", rating_buckets=4)
    assert load_vocabulary(directory).rating_edges == tuple(float(ratings[i]) for i in (0, 25, 50, 75))
    sequences = load_sequences(directory)
    assert Counter(sequences.token_ids[sequences.type_ids == TokenType.ACTION].tolist()) == {1: 25, 2: 25, 3: 25, 4: 25}


def test_columns_can_be_named_and_left_out(build, read_back):
    content = "who,what,rating,timestamp\nx,a,1,9\nx,b,2,3\n"
    directory, summary = build({"log.csv": content}, "log.csv", user="who", item="what", rating="", time="")
    assert read_back(directory) == {"x": [("a", None, 0), ("b", None, 0)]}
    assert summary["columns"] == {
        "user": "who", "item": "what", "rating": None, "time": None, "action": None, "context": [], "weight": None
    }  # fmt: skip
    assert load_vocabulary(directory).type_sizes == (3, 1, 1, 1)


def test_unseen_items_are_kept_on_request(build):
    log = "user,item\nu,a\nu,b\nu,a\nv,b\nv,rare\n"
    items = "item,title\na,Alpha\nnew,Alpha again\nb,Beta\nrare,Rare\n"
    files = {"log.csv": log, "items.csv": items}
    directory, _ = build(files, "log.csv", items="items.csv", min_count=2)
    assert list(load_catalogue(directory).item_ids) == ["", "a", "b"]
    directory, summary = build(files, "log.csv", items="items.csv", min_count=2, include_unseen=True, out="all")
    catalogue = load_catalogue(directory)
    assert list(catalogue.item_ids) == ["", "a", "b", "new"]
    assert list(catalogue.titles) == ["", "Alpha", "Beta", "Alpha again"]
    assert catalogue.counts.tolist() == [0, 2, 2, 0]
    assert catalogue.features[3].any()
    assert summary["items"] == 3


def test_heaviest_pairs(tmp_path):
    """a and b meet three times beside each other, b and c twice, a and c once at a distance of two."""
    (tmp_path / "log.csv").write_text("user,item\nu,a\nu,b\nv,b\nv,a\nw,a\nw,b\nw,c\nx,c\nx,b\n")
    found = {}
    for most in (1, 2, 3):
        config = FeaturesConfig(tmp_path / "log.csv", tmp_path, min_events=1, holdout=0, window=2, max_pairs=most)
        with local_database(config) as connection:
            engine = DuckEngine(connection)
            sources = open_sources(find_files(config.events))
            columns = choose_log_columns(config, sources[0])
            engine.read_events(sources, columns)
            order_log(engine, config, columns)
            build_vocabulary(engine, config, columns, nothing_before())
            pairs = count_pairs(engine, config)
            index = {row["index"]: row["item"] for row in engine.fetch("SELECT item, index FROM items").to_pylist()}
        rows = zip(pairs["a"].tolist(), pairs["b"].tolist(), pairs["weight"].tolist(), strict=True)
        found[most] = {"".join(sorted(index[a] + index[b])): weight for a, b, weight in rows}
    assert found[3] == {"ab": 6, "bc": 4, "ac": 1}  # in halves: the least common multiple of the distances is 2
    assert found[2] == {"ab": 6, "bc": 4}
    assert found[1] == {"ab": 6}


def test_summary_names_no_folder_and_no_machine(build, tmp_path):
    directory, summary = build({"log.csv": RATED}, "log.csv", threads=2)
    written = (directory / "summary.json").read_text()
    assert json.loads(written) == json.loads(json.dumps(summary))
    assert str(tmp_path) not in written
    assert not {"out", "overwrite", "threads", "memory_limit"} & set(summary["config"])
    assert summary["config"]["events"] == "log.csv"


def test_existing_output_is_kept_unless_told(build):
    directory, _ = build({"log.csv": RATED}, "log.csv")
    before = (directory / "items.parquet").read_bytes()
    with pytest.raises(FileExistsError, match="already exists; pass --overwrite true to replace it"):
        build({"log.csv": RATED}, "log.csv")
    with pytest.raises(ValueError, match="has no usable events"):
        build({"log.csv": "user,item\n"}, "log.csv", overwrite=True)
    assert (directory / "items.parquet").read_bytes() == before  # a run that fails takes nothing away
    build({"log.csv": RATED + "new,a,1\n"}, "log.csv", overwrite=True)
    assert (directory / "items.parquet").read_bytes() != before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_events": 0}, "min_events is 0; expected at least 1"),
        ({"max_malformed": -1}, "max_malformed is -1; expected at least 0"),
        ({"text_dim": 0, "cooccurrence_dim": 0}, "both 0; expected at least one feature dimension"),
        ({"threads": 0}, "threads is 0; expected at least 1"),
        ({"window": 21}, "window is 21; expected at most 20"),
        ({"max_pairs": 0}, "max_pairs is 0; expected at least 1"),
        ({"memory_limit": "a lot"}, "memory_limit is 'a lot'; expected a size such as 2GB"),
        ({"min_count": 99}, "no item has min_count = 99 events"),
    ],
)
def test_settings_that_are_refused(build, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build({"log.csv": RATED}, "log.csv", **settings)


def test_vocabulary_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the output of genrec features"):
        load_vocabulary(tmp_path)
    (tmp_path / "vocabulary.json").write_text('{"type_sizes": {}}')
    with pytest.raises(ValueError, match="is not a vocabulary"):
        load_vocabulary(tmp_path)
