"""The shipped log against the csv module and plain Python loops."""

import csv
import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from genrec.data.build import build_features
from genrec.data.catalogue import load_catalogue
from genrec.data.config import FeaturesConfig
from genrec.data.sequences import load_sequences
from genrec.data.vocabulary import GAP_EDGES, load_vocabulary
from genrec.interfaces import TokenType


@pytest.fixture(scope="module")
def histories(movielens):
    """{user: [(item, rating, time), …]} in time order, ties as in the file."""
    users = defaultdict(list)
    with open(movielens / "ratings.csv", newline="") as file:
        for row in csv.DictReader(file):
            users[row["userId"]].append((row["movieId"], float(row["rating"]), int(row["timestamp"])))
    return {user: sorted(events, key=lambda event: event[2]) for user, events in users.items()}


def test_counts(movielens_features, histories):
    directory, summary = movielens_features
    cut = sum(max(len(events) - 200, 0) for events in histories.values())
    assert (summary["users"], summary["items"], summary["malformed_lines"]) == (671, 9066, 0)
    assert summary["events"] + summary["cut_events"] == sum(map(len, histories.values())) == 100_004
    assert summary["cut_events"] == cut
    assert load_catalogue(directory).size == len({item for events in histories.values() for item, _, _ in events})


def test_events(movielens_features, histories, read_back):
    assert read_back(movielens_features[0]) == {user: events[-200:] for user, events in histories.items()}
    assert list(read_back(movielens_features[0])) == list(histories)


def test_tokens(movielens_features, histories):
    """Three tokens an event: item, rating bucket (one per half star), gap to the event before."""
    directory, _ = movielens_features
    sequences, catalogue = load_sequences(directory), load_catalogue(directory)
    index = {item: i for i, item in enumerate(catalogue.item_ids)}
    expected = []
    for events in histories.values():
        before = None
        for n, (item, rating, time) in enumerate(events[-200:]):
            gap = 0 if before is None else sum(edge <= time - before for edge in GAP_EDGES)
            expected += [
                (index[item], TokenType.ITEM, n),
                (int(rating * 2), TokenType.ACTION, n),
                (gap, TokenType.TIME, n),
            ]
            before = time
    found = zip(sequences.token_ids.tolist(), sequences.type_ids.tolist(), sequences.positions.tolist(), strict=True)
    assert list(found) == expected
    vocabulary = load_vocabulary(directory)
    assert vocabulary.type_sizes == (9067, 11, 1 + len(GAP_EDGES), 1)
    assert vocabulary.rating_edges == tuple(half / 2 for half in range(1, 11))


def test_items_are_ordered_by_their_count_outside_the_holdout(movielens_features, histories):
    catalogue = load_catalogue(movielens_features[0])
    counts = Counter(item for events in histories.values() for item, _, _ in events[:-2])
    everything = {item for events in histories.values() for item, _, _ in events}
    assert list(catalogue.item_ids[1:]) == sorted(everything, key=lambda item: (-counts[item], item))
    assert catalogue.counts.tolist() == [0, *(counts[item] for item in catalogue.item_ids[1:])]


def test_titles(movielens_features, movielens):
    catalogue = load_catalogue(movielens_features[0])
    with open(movielens / "movies.csv", newline="", encoding="utf-8") as file:
        titles = {row["movieId"]: row["title"] for row in csv.DictReader(file)}
    assert list(catalogue.titles[1:]) == [titles[item] for item in catalogue.item_ids[1:]]


def test_features_know_films(movielens_features):
    """Both halves are unit rows, and the nearest film to one of a series is another of it."""
    catalogue = load_catalogue(movielens_features[0])
    assert catalogue.features.shape == (9067, 256)
    assert catalogue.features.dtype == np.float32
    assert not catalogue.features[0].any()
    for half in (catalogue.features[1:, :128], catalogue.features[1:, 128:]):
        lengths = np.linalg.norm(half, axis=1)
        assert np.all(np.isclose(lengths, 1, atol=1e-5) | (lengths == 0))
    titles = list(catalogue.titles)
    for film, relative in (
        ("Toy Story (1995)", "Toy Story 2 (1999)"),
        ("Star Wars: Episode IV - A New Hope (1977)", "Star Wars: Episode V - The Empire Strikes Back (1980)"),
    ):
        nearest = np.argsort(-(catalogue.features @ catalogue.features[titles.index(film)]))
        assert relative in [titles[i] for i in nearest[1:4]]


def test_same_bytes_on_any_number_of_threads(movielens_features, movielens, tmp_path):
    directory, _ = movielens_features
    config = FeaturesConfig(
        movielens / "ratings.csv", tmp_path / "again", items=movielens / "movies.csv", threads=1, memory_limit="1GB"
    )
    build_features(config)
    assert _contents(tmp_path / "again") == _contents(directory)


def test_nothing_of_the_holdout_reaches_counts_and_features(movielens, tmp_path, histories):
    """Shuffling the last two events among users changes neither counts nor co-occurrence."""
    fields = {"holdout": 2, "text_dim": 0, "cooccurrence_dim": 16, "max_events": 10_000}
    few = dict(list(histories.items())[:60])
    last = [event[0] for events in few.values() for event in events[-2:]]
    swapped = iter(last[::-1])
    moved = {u: events[:-2] + [(next(swapped), r, t) for _, r, t in events[-2:]] for u, events in few.items()}
    assert moved != few
    catalogues = []
    for name, users in (("before", few), ("after", moved)):
        lines = [f"{u},{item},{time}" for u, events in users.items() for item, _, time in events]
        (tmp_path / f"{name}.csv").write_text("\n".join(["user,item,time", *lines]))
        build_features(FeaturesConfig(tmp_path / f"{name}.csv", tmp_path / name, **fields))
        catalogues.append(load_catalogue(tmp_path / name))
    for column in ("item_ids", "counts", "features"):
        np.testing.assert_array_equal(getattr(catalogues[0], column), getattr(catalogues[1], column))


def test_rows_per_file(movielens, movielens_features, tmp_path):
    config = FeaturesConfig(
        movielens / "ratings.csv", tmp_path / "out", rows_per_file=100, text_dim=0, cooccurrence_dim=2
    )
    build_features(config)
    parts = sorted(path.name for path in (tmp_path / "out" / "sequences").iterdir())
    assert parts == [f"part-{part:05d}-of-00007.parquet" for part in range(math.ceil(671 / 100))]
    one, many = load_sequences(movielens_features[0]), load_sequences(tmp_path / "out")
    for field in ("user_ids", "cu_tokens", "token_ids", "cu_events", "item_ids", "ratings", "timestamps"):
        np.testing.assert_array_equal(getattr(one, field), getattr(many, field))


def _contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
