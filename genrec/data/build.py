"""Raw logs in, one directory of sequences, items, vocabulary and summary out."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq

from genrec.data.catalogue import save_catalogue
from genrec.data.config import FeaturesConfig
from genrec.data.files import atomic_directory
from genrec.data.item_features import item_features
from genrec.data.lines import Malformed
from genrec.data.log import LogCounts, build_vocabulary, count_pairs, cut_log, order_log, read_users
from genrec.data.readers import LogColumns, read_events, read_items
from genrec.data.sequences import to_table
from genrec.data.vocabulary import Vocabulary
from genrec.interfaces import Catalogue


def build_features(config: FeaturesConfig) -> dict[str, Any]:
    """Read the log and the item file, write `config.out` (see docs/data.md) and return its summary.json.

    Raises ValueError, FileNotFoundError or FileExistsError with one sentence; nothing is left behind then.
    """
    malformed = Malformed(config.max_malformed)
    inputs = [path for path in (config.events, config.items) if path]
    with atomic_directory(config.out, config.overwrite, inputs) as directory, _database(config) as connection:
        with _step(f"reading {config.events}"):
            columns = read_events(connection, config, malformed)
            read_items(connection, config, columns.item, malformed)
        with _step("ordering and counting events"):
            counts = order_log(connection, config)
            vocabulary = build_vocabulary(connection, config, columns)
            cut_log(connection, config, vocabulary)
        with _step("writing sequences"):
            _write_sequences(connection, config, vocabulary, counts.users, directory)
        with _step(f"making features of {vocabulary.items:,} items"):
            save_catalogue(directory, _catalogue(connection, config))
        vocabulary.save(directory)
        summary = _summary(config, columns, counts, vocabulary, malformed)
        text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
        (directory / "summary.json").write_text(text, encoding="utf-8")
    return summary


@contextmanager
def _database(config: FeaturesConfig) -> Iterator[duckdb.DuckDBPyConnection]:
    """DuckDB in memory, spilling into a directory of its own."""
    with tempfile.TemporaryDirectory(prefix="genrec-features-") as spill:
        settings = {"temp_directory": spill, "threads": config.threads, "memory_limit": config.memory_limit}
        try:
            connection = duckdb.connect(config={name: value for name, value in settings.items() if value is not None})
        except duckdb.Error as error:
            raise ValueError(
                f"memory_limit is {config.memory_limit!r}; expected a size such as 2GB ({error})"
            ) from None
        with connection:
            try:
                yield connection
            except duckdb.OutOfMemoryException:
                limit = config.memory_limit or "80 % of the machine's memory"
                raise OSError(f"DuckDB needs more memory than memory_limit allows, {limit}; raise it") from None


def _write_sequences(
    connection: duckdb.DuckDBPyConnection, config: FeaturesConfig, vocabulary: Vocabulary, users: int, directory: Path
) -> None:
    (directory / "sequences").mkdir()
    starts = range(0, users, config.rows_per_file)
    for part, first in enumerate(starts):
        sequences = read_users(connection, vocabulary, first, min(first + config.rows_per_file, users))
        path = directory / "sequences" / f"part-{part:05d}-of-{len(starts):05d}.parquet"
        pq.write_table(to_table(sequences), path, compression="zstd")


def _catalogue(connection: duckdb.DuckDBPyConnection, config: FeaturesConfig) -> Catalogue:
    rows = connection.execute("""
        SELECT items.item, coalesce(nullif(title, ''), items.item), coalesce(text, ''), count
        FROM items LEFT JOIN item_file USING (item) ORDER BY index""").fetchall()
    item_ids, titles, texts, counts = zip(*rows, strict=True)
    pairs = count_pairs(connection, config)
    features = item_features(texts, pairs, config.text_dim, config.cooccurrence_dim, config.text_encoder, config.seed)
    return Catalogue(
        item_ids=np.array(["", *item_ids], dtype=np.object_),
        titles=np.array(["", *titles], dtype=np.object_),
        counts=np.array([0, *counts], dtype=np.int64),
        features=features,
    )


def _summary(
    config: FeaturesConfig, columns: LogColumns, counts: LogCounts, vocabulary: Vocabulary, malformed: Malformed
) -> dict[str, Any]:
    return {
        "users": counts.users,
        "items": vocabulary.items,
        "events": counts.events,
        "dropped_users": counts.dropped_users,
        "dropped_events": counts.dropped_events,
        "cut_events": counts.cut_events,
        "malformed_lines": malformed.count,
        "malformed_examples": malformed.examples,
        "columns": vars(columns) | {"context": list(columns.context)},
        "config": config.to_json(),
    }


@contextmanager
def _step(what: str) -> Iterator[None]:
    """One line on stderr per step, with its seconds."""
    print(f"features: {what} …", end="", file=sys.stderr, flush=True)
    start = time.monotonic()
    try:
        yield
    except BaseException:
        print(file=sys.stderr)
        raise
    print(f" {time.monotonic() - start:.1f} s", file=sys.stderr)
