"""What one file says about events and items, in SQL that is the same for every format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import duckdb
import pyarrow as pa

from genrec.data.columns import choose_column, require_column
from genrec.data.config import FeaturesConfig
from genrec.data.formats import Source, open_sources
from genrec.data.inputs import InputFile, find_files
from genrec.data.lines import Malformed

_EXAMPLES = 5
_MOST_LINES = 40  # bits of a record's place that count its line; the others count its file


@dataclass(frozen=True)
class LogColumns:
    """Which columns of the log were used, None for what it does not have."""

    user: str
    item: str
    rating: str | None
    time: str | None
    action: str | None
    context: tuple[str, ...]
    weight: str | None


def choose_log_columns(config: FeaturesConfig, source: Source) -> LogColumns:
    """The columns that the options name, or that have usual names; ValueError if one cannot be found."""
    names, path = source.columns, source.file.path
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
        weight=require_column("weight", config.weight, names, path) if config.weight else None,
    )


def event_schema(columns: LogColumns) -> pa.Schema:
    """Columns of `events_query`."""
    texts = ["user", "item", "action", *(f"context_{i}" for i in range(len(columns.context))), "problem", "quote"]
    numbers = [("place", pa.int64()), ("rating", pa.float32()), ("weight", pa.float32()), ("time", pa.int64())]
    return pa.schema([*numbers, *((name, pa.string()) for name in texts)])


def events_query(source: Source, columns: LogColumns, number: int) -> str:
    """SQL for the records of the file with this number, with the columns of `event_schema`.

    place orders records as the files do; time is as in the file; problem says what is wrong with the record that quote
    begins with, both NULL if it can be used.
    """
    context = "".join(f", {source.field(name)} AS context_{i}" for i, name in enumerate(columns.context))
    no_time = "time IS NULL" if columns.time else "false"
    return f"""
        WITH named AS (
            SELECT {_place(number)} AS place, text, problem,
                {source.field(columns.user)} AS user, {source.field(columns.item)} AS item,
                {source.field(columns.rating)} AS rating_text, {source.field(columns.time)} AS time_text,
                TRY_CAST(rating_text AS FLOAT) + 0::FLOAT AS rating, -- makes -0 the 0 that it equals
                {source.field(columns.weight)} AS weight_text, TRY_CAST(weight_text AS FLOAT) + 0::FLOAT AS weight,
                coalesce(TRY_CAST(time_text AS BIGINT), TRY_CAST(TRY_CAST(time_text AS DOUBLE) AS BIGINT)) AS time,
                {source.field(columns.action)} AS action{context} FROM ({source.query})),
        judged AS (
            SELECT * REPLACE (CASE
                WHEN problem IS NOT NULL THEN problem
                WHEN user IS NULL OR trim(user) = '' THEN 'has no user'
                WHEN item IS NULL OR trim(item) = '' THEN 'has no item'
                WHEN rating_text IS NOT NULL AND (rating IS NULL OR NOT isfinite(rating))
                    THEN 'has rating ' || left(rating_text, 40) || ', expected a number'
                WHEN weight_text IS NOT NULL AND (weight IS NULL OR NOT isfinite(weight))
                    THEN 'has weight ' || left(weight_text, 40) || ', expected a number'
                WHEN {no_time} THEN 'has time ' || coalesce(left(time_text, 40), '(empty)') || ', expected unix seconds'
                END AS problem) FROM named)
        SELECT {", ".join(event_schema(columns).names[:-1])}, CASE WHEN problem IS NOT NULL THEN
            left(coalesce(text, concat_ws(', ', user, item, rating_text, weight_text, time_text)), 120) END AS quote
        FROM judged"""


def first_malformed(table: str) -> str:
    """SQL for how many records of `table` are malformed, and for its first few: place, problem, quote."""
    return f"""SELECT count(*) OVER () AS count, place, problem, quote FROM {table} WHERE problem IS NOT NULL
        ORDER BY place LIMIT {_EXAMPLES}"""


def report_malformed(found: pa.Table, files: Sequence[InputFile], malformed: Malformed) -> None:
    """Hand what `first_malformed` found to `malformed`, with the names of files and the numbers of lines."""
    examples = []
    for row in found.to_pylist():
        name, line = files[row["place"] >> _MOST_LINES].name, row["place"] % 2**_MOST_LINES
        examples.append(f"{name} line {line} {row['problem']}: {row['quote']!r}")
    if examples:
        malformed.add(found["count"][0].as_py(), examples)


def read_items(
    connection: duckdb.DuckDBPyConnection, config: FeaturesConfig, log_item: str, malformed: Malformed
) -> None:
    """Make table `item_file` (item, title, text VARCHAR) from the item file; empty if there is none.

    Of a repeated item the first record counts and the others are malformed. Raises ValueError for a file that is not
    what its name says, a column that cannot be found, or too many bad lines.
    """
    connection.execute("CREATE TABLE item_file (item VARCHAR, title VARCHAR, text VARCHAR)")
    if config.items is None:
        return
    sources = open_sources(find_files(config.items))
    columns, path = sources[0].columns, sources[0].file.path
    connection.execute("CREATE TABLE raw_items (place BIGINT, text VARCHAR, problem VARCHAR, fields VARCHAR[])")
    for number, source in enumerate(sources):
        fields = ", ".join(map(source.field, columns))
        with source.registered(connection):
            connection.execute(
                f"INSERT INTO raw_items SELECT {_place(number)}, text, problem, [{fields}] FROM ({source.query})"
            )
    field = {name: f"fields[{i}]" for i, name in enumerate(columns, 1)}
    item = _item_column(config, sources[0], log_item)
    title = choose_column("title", config.title, columns, path)
    texts = _text_columns(connection, config, sources[0], item)
    # The title says most in the fewest words, so it counts twice; a long description must not drown the rest.
    parts = [field[name] for name in [title] if name in texts] + [f"left({field[name]}, 600)" for name in texts]
    connection.execute(f"""
        CREATE TABLE parsed_items AS
        SELECT * REPLACE (CASE
            WHEN problem IS NOT NULL THEN problem
            WHEN item IS NULL OR trim(item) = '' THEN 'has no item'
            WHEN row_number() OVER (PARTITION BY item ORDER BY place) > 1 THEN 'repeats item ' || item END AS problem)
        FROM (SELECT place, {field[item]} AS item, {field[title] if title else "NULL::VARCHAR"} AS title,
            {f"concat_ws(' ', {', '.join(parts)})" if parts else "''"} AS text, problem,
            left(coalesce(text, concat_ws(', ', {", ".join(field.values())})), 120) AS quote
            FROM raw_items)""")
    found = connection.sql(first_malformed("parsed_items")).to_arrow_table()
    report_malformed(found, [source.file for source in sources], malformed)
    connection.execute("INSERT INTO item_file SELECT item, title, text FROM parsed_items WHERE problem IS NULL")
    connection.execute("DROP TABLE parsed_items; DROP TABLE raw_items")


def _place(number: int) -> str:
    return f"({number}::BIGINT << {_MOST_LINES}) + line"


def _item_column(config: FeaturesConfig, source: Source, log_item: str) -> str:
    """The item file may call the id as the log does, or otherwise."""
    names = [name for name in (config.item, log_item) if name in source.columns]
    return names[0] if names else require_column("item", None, source.columns, source.file.path)


def _text_columns(
    connection: duckdb.DuckDBPyConnection, config: FeaturesConfig, source: Source, item: str
) -> list[str]:
    columns, path = source.columns, source.file.path
    if config.text is not None:
        return [require_column("text", name, columns, path) for name in config.text]
    names = [name for name in columns if name != item]
    if not names:
        return []
    values = [f"fields[{columns.index(name) + 1}]" for name in names]
    words = ", ".join(f"bool_or({value} IS NOT NULL AND TRY_CAST({value} AS DOUBLE) IS NULL)" for value in values)
    (found,) = connection.execute(f"SELECT {words} FROM raw_items WHERE problem IS NULL").fetchall()
    return [name for name, holds_words in zip(names, found, strict=True) if holds_words]
