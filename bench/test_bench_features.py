"""`genrec features` from a log on disk to Parquet, against Polars. Both take all cores, whatever --bench-threads says.

Item features, which cannot be left out, are made of next neighbours alone and have eight dimensions: the SVD behind
them is the same code in both, and in full it would hide the rest.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pyarrow import csv

from bench.peers import installed
from bench.peers.features import build_with_polars
from bench.sizes import sizes
from genrec.data.build import build_features
from genrec.data.catalogue import load_catalogue
from genrec.data.config import FeaturesConfig
from genrec.data.sequences import load_sequences


@pytest.mark.parametrize("events", sizes([20_000], [500_000], [1_000_000, 5_000_000]))
def test_features(race, tmp_path, events):
    if not (polars := installed("polars", "polars")):
        pytest.skip("polars is not installed")
    write_log(tmp_path / "log.csv", events)
    ours, theirs = (
        FeaturesConfig(
            tmp_path / "log.csv", tmp_path / name, overwrite=True, min_count=5, text_dim=0, cooccurrence_dim=8, window=1
        )
        for name in ("genrec", "polars")
    )
    contenders = {
        "genrec": lambda: build_features(ours) and ours.out,
        "Polars": lambda: build_with_polars(polars, theirs),
    }
    *expected, expected_features = written(contenders["Polars"]())

    def assert_the_same(directory):
        *arrays, features = written(directory)
        for array, as_expected in zip(arrays, expected, strict=True):
            np.testing.assert_array_equal(array, as_expected)
        np.testing.assert_allclose(features, expected_features, atol=1e-6)

    race(f"features of {events} events", contenders, tolerance=None, measure=assert_the_same)


def write_log(path, events):
    """Some users are busy and most are not, a few items are known to all, and events arrive in no order."""
    rng = np.random.default_rng(0)
    users, items = events // 50, max(100, events // 250)
    activity, popularity = rng.lognormal(0, 1.2, users), np.arange(1.0, items + 1) ** -0.8
    columns = {
        "user_id": names("u", rng.choice(users, events, p=activity / activity.sum())),
        "item_id": names("i", rng.choice(items, events, p=popularity / popularity.sum())),
        "rating": rng.integers(1, 11, events) / 2,
        "timestamp": rng.integers(1_500_000_000, 1_700_000_000, events),
    }
    csv.write_csv(pa.table(columns), path, csv.WriteOptions(quoting_style="none"))


def names(prefix, numbers):
    return pc.binary_join_element_wise(prefix, pa.array(numbers).cast(pa.string()), "")


def written(directory):
    """All arrays in sequences and items, the features last."""
    return [*vars(load_sequences(directory)).values(), *vars(load_catalogue(directory)).values()]
