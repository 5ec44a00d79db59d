"""Raw logs in, one directory of sequences, items, vocabulary and summary out."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from genrec.data.catalogue import save_catalogue, vocabulary_hash
from genrec.data.config import FeaturesConfig
from genrec.data.engine import DuckEngine, Engine, local_database
from genrec.data.files import atomic_directory
from genrec.data.formats import open_sources
from genrec.data.inputs import find_files
from genrec.data.item_features import item_features
from genrec.data.lines import Malformed
from genrec.data.log import LogCounts, build_vocabulary, count_pairs, count_split, kept_events, order_log
from genrec.data.parts import SequenceParts
from genrec.data.previous import Previous, load_previous, nothing_before
from genrec.data.readers import LogColumns, choose_log_columns, first_malformed, read_items, report_malformed
from genrec.data.split import ByTime, save_split
from genrec.data.vocabulary import Vocabulary
from genrec.interfaces import Catalogue


def build_features(config: FeaturesConfig) -> dict[str, Any]:
    """Read the log and the item file, write `config.out` (see docs/data.md) and return its summary.json.

    Raises ValueError, FileNotFoundError, FileExistsError or OSError with one sentence; nothing is left behind then.
    """
    malformed = Malformed(config.max_malformed)
    files, item_files = find_files(config.events), find_files(config.items) if config.items else []
    inputs = [file.path for file in (*files, *item_files)]
    previous = load_previous(config.extend) if config.extend else nothing_before()
    if config.extend and config.extend.resolve() != config.out.resolve():  # it may be extended in place
        inputs.append(config.extend)
    with atomic_directory(config.out, config.overwrite, inputs) as directory:
        with local_database(config) as connection, _engine(config, connection) as engine:
            with _step(f"reading {config.events_name}"):
                sources = open_sources(files)
                columns = choose_log_columns(config, sources[0])
                if config.extend:
                    previous.check(config, columns, config.extend)
                engine.read_events(sources, columns)
                report_malformed(engine.fetch(first_malformed("parsed")), files, malformed)
                read_items(connection, config, columns.item, malformed)
                if config.include_unseen:
                    engine.put("described_items", connection.sql("SELECT item FROM item_file").to_arrow_table())
            with _step("ordering and counting events"):
                counts = order_log(engine, config, columns)
                split = config.cuts()
                split_counts = count_split(engine, split) if isinstance(split, ByTime) else {}
                vocabulary = build_vocabulary(engine, config, columns, previous)
                items = _items(engine, connection, config, previous)
            with _step("writing sequences"):
                _write_sequences(engine, config, vocabulary, counts.users, directory)
            with _step("counting pairs of items"):
                pairs = count_pairs(engine, config) if config.cooccurrence_dim else None
        with _step(f"making features of {vocabulary.items:,} items"):  # in the memory that the engine gave back
            catalogue = _catalogue(items, pairs, config)
            save_catalogue(directory, catalogue)
        vocabulary = replace(vocabulary, hash=vocabulary_hash(catalogue, vocabulary))
        vocabulary.save(directory)
        save_split(directory, split)
        summary = _summary(config, columns, counts, vocabulary, malformed) | split_counts
        text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
        (directory / "summary.json").write_text(text, encoding="utf-8")
    return summary


@contextmanager
def _engine(config: FeaturesConfig, connection: duckdb.DuckDBPyConnection) -> Iterator[Engine]:
    if config.engine == "duckdb":
        yield DuckEngine(connection)
        return
    from genrec.data.spark_engine import spark_engine  # pyspark is an extra

    with spark_engine(config) as engine:
        yield engine


def _write_sequences(
    engine: Engine, config: FeaturesConfig, vocabulary: Vocabulary, users: int, directory: Path
) -> None:
    folder = (directory / "sequences").resolve()
    folder.mkdir()
    parts = SequenceParts(folder, config.format, vocabulary, users, config.rows_per_file, config.max_events)
    engine.write_parts(kept_events(config, vocabulary), parts.count, parts.write)


def _items(
    engine: Engine, connection: duckdb.DuckDBPyConnection, config: FeaturesConfig, previous: Previous
) -> pa.Table:
    """item, title, text and count of every item of the vocabulary, in the order of their index."""
    connection.register("old_titles", previous.items)
    connection.register("known_items", engine.fetch("SELECT item, index, seen, count FROM items"))
    if config.items:
        _require_common_items(connection, config)
    return connection.sql("""
        SELECT k.item, coalesce(nullif(f.title, ''), o.title, k.item) AS title, coalesce(text, '') AS text, count
        FROM known_items k LEFT JOIN item_file f ON k.item = f.item LEFT JOIN old_titles o ON k.item = o.item
        ORDER BY k.index""").to_arrow_table()


def _catalogue(items: pa.Table, pairs: dict[str, NDArray[Any]] | None, config: FeaturesConfig) -> Catalogue:
    texts = items["text"].to_pylist()
    features = item_features(texts, pairs, config.text_dim, config.cooccurrence_dim, config.text_encoder, config.seed)
    return Catalogue(
        item_ids=np.array(["", *items["item"].to_pylist()], dtype=np.object_),
        titles=np.array(["", *items["title"].to_pylist()], dtype=np.object_),
        counts=np.array([0, *items["count"].to_pylist()], dtype=np.int64),
        features=features,
    )


def _require_common_items(connection: duckdb.DuckDBPyConnection, config: FeaturesConfig) -> None:
    ((common, described, seen),) = connection.execute("""
        SELECT count(*) FILTER (WHERE seen > 0 AND item IN (SELECT item FROM item_file)),
            (SELECT min(item) FROM item_file), min(item) FILTER (WHERE seen > 0) FROM known_items""").fetchall()
    if not common:
        raise ValueError(
            f"{config.items_name} describes no item of the log: it has items such as {described!r}, the log {seen!r}"
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
