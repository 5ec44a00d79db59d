"""The events and the items of the input as clean tables of DuckDB, whatever the format of the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import duckdb

from genrec.data.columns import choose_column, require_column
from genrec.data.config import FeaturesConfig
from genrec.data.formats import Source, open_source
from genrec.data.lines import Malformed

_EXAMPLES = 5


@dataclass(frozen=True)
class LogColumns:
    """Which columns of the log were used, None for what it does not have."""

    user: str
    item: str
    rating: str | None
    time: str | None
    action: str | None
    context: tuple[str, ...]


def read_events(connection: duckdb.DuckDBPyConnection, config: FeaturesConfig, malformed: Malformed) -> LogColumns:
    """Make table `events` (line BIGINT, user, item VARCHAR, rating FLOAT, time BIGINT, action, context_0 … VARCHAR);
    line orders the records as the file does, time is as in the file.

    Raises ValueError for a file that is not what its name says, a column that cannot be found, or too many bad lines.
    """
    source = open_source(connection, config.events)
    columns = _log_columns(config, source)
    context = "".join(f", {source.field(name)} AS context_{i}" for i, name in enumerate(columns.context))
    no_time = "time IS NULL" if columns.time else "false"
    source.execute(
        connection,
        f"""
        CREATE TABLE parsed AS
        WITH named AS (
            SELECT line, text, problem, {source.field(columns.user)} AS user, {source.field(columns.item)} AS item,
                {source.field(columns.rating)} AS rating_text, {source.field(columns.time)} AS time_text,
                TRY_CAST(rating_text AS FLOAT) AS rating,
                coalesce(TRY_CAST(time_text AS BIGINT), TRY_CAST(TRY_CAST(time_text AS DOUBLE) AS BIGINT)) AS time,
                {source.field(columns.action)} AS action{context} FROM ({source.query})),
        judged AS (
            SELECT * REPLACE (CASE
                WHEN problem IS NOT NULL THEN problem
                WHEN user IS NULL OR trim(user) = '' THEN 'has no user'
                WHEN item IS NULL OR trim(item) = '' THEN 'has no item'
                WHEN rating_text IS NOT NULL AND (rating IS NULL OR NOT isfinite(rating))
                    THEN 'has rating ' || left(rating_text, 40) || ', expected a number'
                WHEN {no_time} THEN 'has time ' || coalesce(left(time_text, 40), '(empty)') || ', expected unix seconds'
                END AS problem) FROM named)
        SELECT * EXCLUDE (text, rating_text, time_text), CASE WHEN problem IS NOT NULL THEN left(text, 120) END AS quote
        FROM judged""",
    )
    _collect_malformed(connection, "parsed", source.path, malformed)
    connection.execute("CREATE TABLE events AS SELECT * EXCLUDE (problem, quote) FROM parsed WHERE problem IS NULL")
    connection.execute("DROP TABLE parsed")
    if not one_row(connection, "SELECT count(*) FROM events")[0]:
        raise ValueError(f"{config.events} has no usable events; expected at least one record after its header")
    return columns


def read_items(
    connection: duckdb.DuckDBPyConnection, config: FeaturesConfig, log_item: str, malformed: Malformed
) -> None:
    """Make table `item_file` (item, title, text VARCHAR) from the item file; empty if there is none.

    Of a repeated item the first record counts and the others are malformed. Errors as read_events.
    """
    connection.execute("CREATE TABLE item_file (item VARCHAR, title VARCHAR, text VARCHAR)")
    if config.items is None:
        return
    source = open_source(connection, config.items)
    source.execute(connection, f"CREATE TABLE raw_items AS {source.query}")
    item = _item_column(config, source, log_item)
    title = choose_column("title", config.title, source.columns, source.path)
    texts = _text_columns(connection, config, source, item)
    # The title says most in the fewest words, so it counts twice; a long description must not drown the rest.
    parts = [source.field(title)] * (title in texts) + [f"left({source.field(name)}, 600)" for name in texts]
    connection.execute(f"""
        CREATE TABLE parsed_items AS
        SELECT * REPLACE (CASE
            WHEN problem IS NOT NULL THEN problem
            WHEN item IS NULL OR trim(item) = '' THEN 'has no item'
            WHEN row_number() OVER (PARTITION BY item ORDER BY line) > 1 THEN 'repeats item ' || item END AS problem)
        FROM (SELECT line, {source.field(item)} AS item, {source.field(title)} AS title,
            {f"concat_ws(' ', {', '.join(parts)})" if parts else "''"} AS text, problem, left(text, 120) AS quote
            FROM raw_items)""")
    _collect_malformed(connection, "parsed_items", source.path, malformed)
    connection.execute(
        "INSERT INTO item_file SELECT item, title, text FROM parsed_items WHERE problem IS NULL ORDER BY line"
    )
    connection.execute("DROP TABLE parsed_items; DROP TABLE raw_items")
    if not one_row(connection, "SELECT count(*) FROM item_file SEMI JOIN events USING (item)")[0]:
        known, seen = one_row(connection, "SELECT (SELECT min(item) FROM item_file), (SELECT min(item) FROM events)")
        raise ValueError(
            f"{config.items} describes no item of the log: it has items such as {known!r}, the log {seen!r}"
        )


def _log_columns(config: FeaturesConfig, source: Source) -> LogColumns:
    names, path = source.columns, source.path
    user = require_column("user", config.user, names, path)
    item = require_column("item", config.item, names, path)
    if user == item:
        raise ValueError(f"{path}: column {user!r} cannot be both user and item; pass --user and --item")
    return LogColumns(
        user=user,
        item=item,
        rating=choose_column("rating", config.rating, names, path),
        time=choose_column("time", config.time, names, path),
        action=require_column("action", config.action, names, path) if config.action else None,
        context=tuple(require_column("context", name, names, path) for name in config.context),
    )


def _item_column(config: FeaturesConfig, source: Source, log_item: str) -> str:
    """The item file may call the id as the log does, or otherwise."""
    names = [name for name in (config.item, log_item) if name in source.columns]
    return names[0] if names else require_column("item", None, source.columns, source.path)


def _text_columns(
    connection: duckdb.DuckDBPyConnection, config: FeaturesConfig, source: Source, item: str
) -> list[str]:
    if config.text is not None:
        return [require_column("text", name, source.columns, source.path) for name in config.text]
    names = [name for name in source.columns if name != item]
    if not names:
        return []
    values = [source.field(name) for name in names]
    words = ", ".join(f"bool_or({value} IS NOT NULL AND TRY_CAST({value} AS DOUBLE) IS NULL)" for value in values)
    found = one_row(connection, f"SELECT {words} FROM raw_items WHERE problem IS NULL")
    return [name for name, holds_words in zip(names, found, strict=True) if holds_words]


def _collect_malformed(connection: duckdb.DuckDBPyConnection, table: str, path: Path, malformed: Malformed) -> None:
    count = one_row(connection, f"SELECT count(*) FROM {table} WHERE problem IS NOT NULL")[0]
    if count:
        first = connection.execute(
            f"SELECT line, problem, quote FROM {table} WHERE problem IS NOT NULL ORDER BY line LIMIT {_EXAMPLES}"
        ).fetchall()
        malformed.add(path, count, [f"line {line} {problem}: {quote!r}" for line, problem, quote in first])


def one_row(connection: duckdb.DuckDBPyConnection, query: str) -> tuple:
    """The only row of a query that always has one."""
    row = connection.execute(query).fetchone()
    assert row is not None
    return row
