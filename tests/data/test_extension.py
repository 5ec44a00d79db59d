"""A vocabulary that extends another: old ids keep their meaning, new ones follow, and the tokenizer goes along."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.cli import main
from genrec.data.build import build_features
from genrec.data.catalogue import load_catalogue, load_semantic_ids, vocabulary_hash
from genrec.data.config import FeaturesConfig
from genrec.data.context import ContextIds
from genrec.data.sequences import load_sequences
from genrec.data.vocabulary import load_vocabulary
from genrec.interfaces import TokenType

HEADER = "user,item,time,did,device,shop\n"
rows = st.tuples(
    st.sampled_from("pqrs"), st.sampled_from("abcdefgh"), st.sampled_from(["view", "buy", "like", ""]),
    st.sampled_from(["tv", "phone", "watch", ""]), st.sampled_from(["x", "y", "z"]),
)  # fmt: skip
FIRST = [("z", "a", "view", "tv", "x"), ("z", "b", "view", "tv", "x")] * 2
SETTINGS = {"min_events": 1, "holdout": 0, "text_dim": 0, "cooccurrence_dim": 3, "threads": 1}


def write_features(directory, name, log, **changes):
    lines = [f"{user},{item},{time},{did},{device},{shop}" for time, (user, item, did, device, shop) in enumerate(log)]
    (directory / f"{name}.csv").write_text(HEADER + "\n".join(lines))
    given = SETTINGS | {"action": "did", "context": ["device", "shop"]} | changes
    build_features(FeaturesConfig(directory / f"{name}.csv", directory / name, **given))
    return directory / name


def added(old, counts, min_count):
    """What follows the old values: the others that are frequent enough, by falling count, then by name."""
    new = [value for value in counts if value and value not in old and counts[value] >= min_count]
    return sorted(new, key=lambda value: (-counts[value], value))


@settings(max_examples=20, deadline=None)
@given(st.lists(rows, max_size=20), st.lists(rows, max_size=30), st.integers(1, 3))
def test_old_ids_stay_and_new_ones_follow(tmp_path_factory, first, second, min_count):
    directory = tmp_path_factory.mktemp("log")
    v1 = write_features(directory, "v1", FIRST + first, min_count=2)
    log = FIRST + second
    v2 = write_features(directory, "v2", log, min_count=min_count, extend=v1)
    (old, before), (new, after) = ((load_catalogue(path), load_vocabulary(path)) for path in (v1, v2))
    counts = Counter(row[1] for row in log)
    known = old.item_ids[1:].tolist()
    assert new.item_ids[1:].tolist() == known + added(known, counts, min_count)
    assert new.counts[1:].tolist() == [counts[item] for item in new.item_ids[1:]]
    actions = list(before.action_names)
    assert list(after.action_names) == actions + added(actions, Counter(row[2] for row in log), min_count)
    assert after.context[: len(before.context)] == before.context
    expected = []
    for run in before.context:
        values = added(run.values, Counter(row[3 if run.column == "device" else 4] for row in log), min_count)
        expected += [ContextIds(run.column, tuple(values))] if values else []
    assert list(after.context[len(before.context) :]) == expected
    assert after.context_columns == ("device", "shop")
    assert (before.version, before.extends, after.version) == (1, None, 2)
    assert before.hash == vocabulary_hash(old, before) == after.extends
    assert after.hash == vocabulary_hash(new, after)

    meaning = [""] + [(run.column, value) for run in after.context for value in run.values]
    sequences = load_sequences(v2)
    context = sequences.token_ids[sequences.type_ids == TokenType.CONTEXT].reshape(-1, 2)
    in_order = [row for user in dict.fromkeys(row[0] for row in log) for row in log if row[0] == user]
    for (device, shop), row in zip(context.tolist(), in_order, strict=True):
        for token, place in ((device, ("device", row[3])), (shop, ("shop", row[4]))):
            assert meaning[token] == (place if place in meaning else "")


def test_edges_stay(build):
    old = "user,item,rating,time\n" + "".join(f"u,{'ab'[n % 2]},{n % 3},{n}\n" for n in range(6))
    v1, _ = build({"log.csv": old}, "log.csv", out="v1")
    new = old + "u,c,9,99\nu,a,-4,100\n"
    v2, _ = build({"log.csv": new}, "log.csv", out="v2", extend=v1)
    second = load_vocabulary(v2)
    v3, _ = build({"log.csv": new}, "log.csv", out="v2", extend=v2, overwrite=True)  # in place
    third = load_vocabulary(v3)
    assert second.rating_edges == third.rating_edges == (0.0, 1.0, 2.0)
    assert (second.version, third.version) == (2, 3)
    assert third.extends == third.hash == second.hash, "nothing was new"
    sequences = load_sequences(v3)
    assert sequences.token_ids[sequences.type_ids == TokenType.ACTION].tolist() == [1, 2, 3, 1, 2, 3, 3, 0]
    assert load_catalogue(v3).item_ids.tolist() == ["", "a", "b", "c"]


def test_items_that_are_gone_keep_their_titles(build):
    log, items = "user,item\nu,a\nu,b\nu,a\n", "item,title\na,Alpha\nb,Beta\n"
    v1, _ = build({"log.csv": log, "items.csv": items}, "log.csv", items="items.csv", out="v1")
    log, items = "user,item\nu,a\nu,c\n", "item,title\na,Alpha anew\nc,Gamma\n"
    v2, _ = build({"log.csv": log, "items.csv": items}, "log.csv", items="items.csv", out="v2", extend=v1)
    catalogue = load_catalogue(v2)
    assert list(zip(catalogue.item_ids, catalogue.titles, catalogue.counts, strict=True))[1:] == [
        ("a", "Alpha anew", 1), ("b", "Beta", 0), ("c", "Gamma", 1),
    ]  # fmt: skip


def test_tokenizer_goes_along(tmp_path, movielens):
    """Features, tokenizer, features of a longer log, tokenizer: an item's index and codes never change."""
    lines = (movielens / "ratings.csv").read_text().splitlines(keepends=True)
    for name, count in (("v1", 2500), ("v2", 4000)):
        (tmp_path / f"{name}.csv").write_text("".join(lines[:count]))
        build_features(
            FeaturesConfig(
                tmp_path / f"{name}.csv", tmp_path / name, items=movielens / "movies.csv", text_dim=8,
                cooccurrence_dim=8, min_count=2, threads=1, extend=tmp_path / "v1" if name == "v2" else None,
            )
        )  # fmt: skip
    learn = ["--codebook_sizes", "[16,16,16]", "--hidden_sizes", "[]", "--latent_dim", "16", "--epochs", "1"]
    for name, how in (("v1", learn), ("v2", ["--add_to", str(tmp_path / "ids-v1")])):
        paths = ["--features", str(tmp_path / name), "--out", str(tmp_path / f"ids-{name}")]
        assert main(["tokenize", *paths, *how]) == 0
    old, new = (load_catalogue(tmp_path / name) for name in ("v1", "v2"))
    assert old.size < new.size
    assert new.item_ids[: old.size + 1].tolist() == old.item_ids.tolist()
    before = load_semantic_ids(tmp_path / "ids-v1", old).codes
    after = load_semantic_ids(tmp_path / "ids-v2", new).codes
    assert np.array_equal(after[: len(before)], before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action": None}, "v1 was made with actions; expected the same columns"),
        ({"time": ""}, "v1 was made with times; expected the same columns"),
        (
            {"context": ["shop"]},
            "v1 was made with the context tokens ['values of device', 'values of shop']; expected the same, not ['val",
        ),
        ({"hash_buckets": 5}, "expected the same, not ['values of device', 'values of shop', 'hash of item in 5 bu"),
    ],
)
def test_other_columns_are_refused(tmp_path, changes, message):
    v1 = write_features(tmp_path, "v1", FIRST)
    with pytest.raises(ValueError, match=re.escape(message)):
        write_features(tmp_path, "v2", FIRST, extend=v1, **changes)
    assert not (tmp_path / "v2").exists()


def test_what_cannot_be_extended(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"items.parquet does not exist; expected the output of genrec features"
    ):
        write_features(tmp_path, "v2", FIRST, extend=tmp_path)
    v1 = write_features(tmp_path, "v1", FIRST)
    path = v1 / "vocabulary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"action_names": ["sell"]}))
    with pytest.raises(ValueError, match=r"items.parquet and vocabulary.json of two runs; run genrec features again"):
        write_features(tmp_path, "v2", FIRST, extend=v1)
