"""memory_limit bounds the process, and one user with half of all events is a user like others."""

import subprocess
import sys

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pyarrow import csv

from genrec.data.build import build_features
from genrec.data.config import FeaturesConfig
from genrec.data.engine import parse_memory
from genrec.data.sequences import load_sequences

EVENTS = 2_000_000


@pytest.fixture(scope="module")
def skewed_log(tmp_path_factory):
    """Half of the events are one user's; ids are long, so that the log in memory would be far larger than the limit."""
    path = tmp_path_factory.mktemp("skewed") / "log.csv"
    rng = np.random.default_rng(0)
    users = np.where(rng.random(EVENTS) < 0.5, 0, rng.integers(1, 20_000, EVENTS))
    columns = {
        "user": long_names("user", users),
        "item": long_names("item", rng.integers(0, 5_000, EVENTS)),
        "time": rng.integers(0, 10**9, EVENTS),
    }
    csv.write_csv(pa.table(columns), path, csv.WriteOptions(quoting_style="none"))
    return path, np.bincount(users)


def long_names(prefix, numbers):
    return pc.binary_join_element_wise(prefix * 8, pa.array(numbers).cast(pa.string()), "-")


BUILD = """
import re, sys
from pathlib import Path
from genrec.data.build import build_features
from genrec.data.config import FeaturesConfig
limits = {"memory_limit": "600MB", "threads": 2}
build_features(FeaturesConfig(Path(sys.argv[1]), Path(sys.argv[2]), text_dim=0, cooccurrence_dim=4, window=1, **limits))
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])  # ru_maxrss includes the parent's
"""


def test_peak_memory_stays_below_the_limit(skewed_log, tmp_path):
    path, counts = skewed_log
    command = [sys.executable, "-c", BUILD, str(path), str(tmp_path / "out")]
    peak = 1024 * int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert peak < parse_memory("600MB")
    sequences = load_sequences(tmp_path / "out")
    lengths = dict(zip(sequences.user_ids.tolist(), np.diff(sequences.cu_events).tolist(), strict=True))
    assert lengths == {f"{'user' * 8}-{user}": min(count, 200) for user, count in enumerate(counts) if count >= 3}


def test_a_full_folder_for_temporary_files_is_named(skewed_log, tmp_path, monkeypatch):
    connect = duckdb.connect
    full = {"max_temp_directory_size": "1MB", "memory_limit": "50MB"}
    monkeypatch.setattr("duckdb.connect", lambda config: connect(config=config | full))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = FeaturesConfig(skewed_log[0], tmp_path / "out", text_dim=0)
    with pytest.raises(OSError, match=rf"^the folder for temporary files, {tmp_path}, is full; set TMPDIR to one with"):
        build_features(config)
    assert list(tmp_path.iterdir()) == []


def test_rows_do_not_depend_on_how_they_are_cut(movielens, movielens_features, tmp_path, monkeypatch):
    """Batches of the engine and pieces of the writer are how memory is bounded, and nothing else."""
    monkeypatch.setattr("genrec.data.engine.BATCH_ROWS", 7)
    monkeypatch.setattr("genrec.data.parts._MOST_EVENTS_AT_ONCE", 400)
    config = FeaturesConfig(movielens / "ratings.csv", tmp_path / "out", text_dim=0, cooccurrence_dim=2, window=1)
    build_features(config)
    one, many = load_sequences(movielens_features[0]), load_sequences(tmp_path / "out")
    for field in ("user_ids", "cu_tokens", "token_ids", "cu_events", "item_ids", "ratings", "timestamps"):
        np.testing.assert_array_equal(getattr(one, field), getattr(many, field))


@pytest.mark.parametrize("size", ["a lot", "1", "GB", "-1GB", "1.GB"])
def test_sizes_that_are_refused(size):
    with pytest.raises(ValueError, match=r"^memory_limit is .*; expected a size such as 2GB$"):
        parse_memory(size)


def test_sizes():
    assert parse_memory("1.5GB") == 1_500_000_000
    assert parse_memory("2 mib") == 2 * 2**20
