"""Small logs, and features built from them."""

from pathlib import Path

import numpy as np
import pytest

from genrec.data.build import build_features
from genrec.data.catalogue import load_catalogue
from genrec.data.config import FeaturesConfig
from genrec.data.sequences import load_sequences

MOVIELENS = Path(__file__).parents[2] / "data" / "ml-latest-small"


@pytest.fixture(scope="session")
def movielens():
    """The folder of the log that is shipped."""
    return MOVIELENS


@pytest.fixture(scope="session")
def movielens_features(tmp_path_factory):
    """(output directory, summary) of the shipped log with the default settings."""
    out = tmp_path_factory.mktemp("movielens") / "features"
    config = FeaturesConfig(events=MOVIELENS / "ratings.csv", items=MOVIELENS / "movies.csv", out=out)
    return out, build_features(config)


@pytest.fixture
def build(tmp_path):
    """Write files and build features from them: build({"log.csv": "…"}, events="log.csv", …) → (directory, summary)."""

    def run(files, events, items=None, **settings):
        for name, content in files.items():
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        settings = {"text_dim": 4, "cooccurrence_dim": 4, "min_events": 1, "holdout": 0, "threads": 1} | settings
        out = tmp_path / settings.pop("out", "features")
        events = [Path(path) for path in events] if isinstance(events, list) else tmp_path / events
        config = FeaturesConfig(events, out, items=tmp_path / items if items else None, **settings)
        return out, build_features(config)

    return run


@pytest.fixture(scope="session")
def read_back():
    """read_back(directory) → {user: [(item id, rating or None, timestamp), …]} in the order of the file."""
    return _read_back


def _read_back(directory):
    sequences, items = load_sequences(directory), load_catalogue(directory).item_ids
    events = [
        (items[item], None if np.isnan(rating) else float(rating), int(time))
        for item, rating, time in zip(sequences.item_ids, sequences.ratings, sequences.timestamps, strict=True)
    ]
    bounds = zip(sequences.user_ids, sequences.cu_events[:-1], sequences.cu_events[1:], strict=True)
    return {user: events[start:end] for user, start, end in bounds}
