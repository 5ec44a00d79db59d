"""Logs and item files of every accepted format as tables of DuckDB.

Delimited files and JSON lines become one list of strings per record inside DuckDB; everything after that is the same
SQL for both. The one-object formats (X.inter.json, X.item.json, one line a user) are read into such lists directly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from genrec.data.columns import choose_column, require_column
from genrec.data.config import FeaturesConfig
from genrec.data.lines import Malformed, first_record, read_header, read_lines, sniff_delimiter

_KEYS_FROM_LINES = 1000  # JSON lines may leave keys out: the columns are the keys of this many first lines
_EXAMPLES = 5


@dataclass(frozen=True)
class Source:
    """A file inside DuckDB: the table `name` has line BIGINT, text VARCHAR, problem VARCHAR (NULL if the record can be
    used) and fields VARCHAR[], one per column."""

    path: Path
    name: str
    columns: list[str]

    def field(self, column: str | None) -> str:
        """SQL for the value of a column, NULL if it is absent or empty."""
        return "NULL" if column is None else f"nullif(fields[{self.columns.index(column) + 1}], '')"


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
    source = _open(connection, config.events, "raw_events")
    columns = _log_columns(config, source)
    context = "".join(f", {source.field(name)} AS context_{i}" for i, name in enumerate(columns.context))
    connection.execute(f"""
        CREATE TABLE parsed AS
        WITH named AS (
            SELECT line, text, problem, {source.field(columns.user)} AS user, {source.field(columns.item)} AS item,
                {source.field(columns.rating)} AS rating, {source.field(columns.time)} AS time,
                {source.field(columns.action)} AS action{context} FROM {source.name}),
        numbers AS (
            SELECT * REPLACE (TRY_CAST(rating AS FLOAT) AS rating, {_WHOLE_NUMBER} AS time),
                rating AS rating_text, time AS time_text FROM named)
        SELECT * EXCLUDE (text, problem, rating_text, time_text), CASE
            WHEN problem IS NOT NULL THEN problem
            WHEN user IS NULL OR trim(user) = '' THEN 'has no user'
            WHEN item IS NULL OR trim(item) = '' THEN 'has no item'
            WHEN rating_text IS NOT NULL AND (rating IS NULL OR NOT isfinite(rating))
                THEN 'has rating ' || left(rating_text, 40) || ', expected a number'
            WHEN {"time IS NULL" if columns.time else "false"}
                THEN 'has time ' || coalesce(left(time_text, 40), '(empty)') || ', expected a number of seconds'
            END AS problem, CASE WHEN problem IS NOT NULL THEN left(text, 120) END AS quote
        FROM numbers""")
    connection.execute(f"DROP TABLE {source.name}")
    _collect_malformed(connection, "parsed", source.path, malformed)
    connection.execute("CREATE TABLE events AS SELECT * EXCLUDE (problem, quote) FROM parsed WHERE problem IS NULL")
    connection.execute("DROP TABLE parsed")
    if not connection.execute("SELECT count(*) FROM events").fetchone()[0]:  # type: ignore[index]
        raise ValueError(f"{config.events} has no events; expected at least one line after its header")
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
    source = _open(connection, config.items, "raw_items")
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
            FROM {source.name} AS raw(line, text, problem, fields))""")
    _collect_malformed(connection, "parsed_items", source.path, malformed)
    connection.execute(
        "INSERT INTO item_file SELECT item, title, text FROM parsed_items WHERE problem IS NULL ORDER BY line"
    )
    connection.execute(f"DROP TABLE parsed_items; DROP TABLE {source.name}")


_WHOLE_NUMBER = "coalesce(TRY_CAST(time AS BIGINT), TRY_CAST(TRY_CAST(time AS DOUBLE) AS BIGINT))"


def _log_columns(config: FeaturesConfig, source: Source) -> LogColumns:
    names, path = source.columns, source.path
    return LogColumns(
        user=require_column("user", config.user, names, path),
        item=require_column("item", config.item, names, path),
        rating=choose_column("rating", config.rating, names, path),
        time=choose_column("time", config.time, names, path),
        action=require_column("action", config.action, names, path) if config.action else None,
        context=tuple(require_column("context", name, names, path) for name in config.context),
    )


def _item_column(config: FeaturesConfig, source: Source, log_item: str) -> str:
    """The item file may call the id as the log does, or otherwise."""
    names = [name for name in (config.item, log_item) if name in source.columns]
    return names[0] if names else require_column("item", None, source.columns, source.path)  # type: ignore[return-value]


def _text_columns(
    connection: duckdb.DuckDBPyConnection, config: FeaturesConfig, source: Source, item: str
) -> list[str]:
    if config.text is not None:
        return [require_column("text", name, source.columns, source.path) for name in config.text]
    names = [name for name in source.columns if name != item]
    if not names:
        return []
    words = ", ".join(
        f"bool_or({source.field(n)} IS NOT NULL AND TRY_CAST({source.field(n)} AS DOUBLE) IS NULL)" for n in names
    )
    found = connection.execute(f"SELECT {words} FROM {source.name} WHERE problem IS NULL").fetchone()
    return [name for name, holds_words in zip(names, found or (), strict=True) if holds_words]


def _collect_malformed(connection: duckdb.DuckDBPyConnection, table: str, path: Path, malformed: Malformed) -> None:
    count = connection.execute(f"SELECT count(*) FROM {table} WHERE problem IS NOT NULL").fetchone()[0]  # type: ignore[index]
    if count:
        first = connection.execute(
            f"SELECT line, problem, quote FROM {table} WHERE problem IS NOT NULL ORDER BY line LIMIT {_EXAMPLES}"
        ).fetchall()
        malformed.add(path, count, [f"line {line} {problem}: {quote!r}" for line, problem, quote in first])


# Formats --------------------------------------------------------------------------------------------------------------


def _open(connection: duckdb.DuckDBPyConnection, path: Path, name: str) -> Source:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; expected a file")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    for ending, reader in _READERS.items():
        if path.name.lower().endswith(ending):
            return Source(path, name, reader(connection, path, name))
    raise ValueError(f"{path} has an unknown format; expected a name ending in one of {', '.join(_READERS)}")


def _read_csv(connection: duckdb.DuckDBPyConnection, path: Path, name: str) -> list[str]:
    return _read_delimited(connection, path, name, sniff_delimiter(path), quoting=True)


def _read_tsv(connection: duckdb.DuckDBPyConnection, path: Path, name: str) -> list[str]:
    return _read_delimited(connection, path, name, "\t", quoting=True)


def _read_recbole(connection: duckdb.DuckDBPyConnection, path: Path, name: str) -> list[str]:
    """RecBole's atomic files: tab separated, never quoted, headers `name:type`."""
    columns = _read_delimited(connection, path, name, "\t", quoting=False)
    return [column.rsplit(":", 1)[0] for column in columns]


def _read_delimited(
    connection: duckdb.DuckDBPyConnection, path: Path, name: str, delimiter: str, quoting: bool
) -> list[str]:
    columns = read_header(path, quoting, delimiter)
    lines = read_lines(path, quoting, skip=1)  # noqa: F841 – DuckDB finds it by its name
    mark = "\\" + delimiter
    pieces = f"""regexp_extract_all('{delimiter}' || text, '{mark}("([^"]|"")*"|[^{mark}"]*)')"""
    split = f"string_split(text, '{delimiter}')"
    unquoted = "CASE WHEN x[2] = '\"' THEN replace(x[3:-2], '\"\"', '\"') ELSE x[2:] END"
    fields = f"CASE WHEN contains(text, '\"') THEN list_transform({pieces}, lambda x: {unquoted}) ELSE {split} END"
    broken = f"contains(text, '\"') AND array_to_string({pieces}, '') <> '{delimiter}' || text"
    connection.execute(f"""
        CREATE TABLE {name} AS
        WITH stripped AS (SELECT line, rtrim(text, e'\\r\\n') AS text FROM lines),
        split AS (SELECT line, text, {fields if quoting else split} AS fields, {broken if quoting else "false"} AS broken
            FROM stripped)
        SELECT line, text, CASE
            WHEN broken THEN 'has a stray double quote'
            WHEN len(fields) <> {len(columns)} THEN 'has ' || len(fields) || ' columns, expected {len(columns)}'
            END AS problem, fields FROM split""")
    return columns


def _read_json_lines(connection: duckdb.DuckDBPyConnection, path: Path, name: str) -> list[str]:
    columns = _json_keys(path)
    lines = read_lines(path, quoting=False)  # noqa: F841 – DuckDB finds it by its name
    pointers = ["/" + column.replace("~", "~0").replace("/", "~1") for column in columns]
    listed = ", ".join("'" + pointer.replace("'", "''") + "'" for pointer in pointers)
    connection.execute(f"""
        CREATE TABLE {name} AS
        WITH checked AS (SELECT line, rtrim(text, e'\\r\\n') AS text, json_valid(text) AS valid FROM lines),
        objects AS (SELECT *, CASE WHEN valid THEN json_type(text) = 'OBJECT' ELSE false END AS usable FROM checked)
        SELECT line, text, CASE WHEN NOT usable THEN 'is not a JSON object' END AS problem,
            CASE WHEN usable THEN json_extract_string(text, [{listed}]) END AS fields FROM objects""")
    return columns


def _json_keys(path: Path) -> list[str]:
    keys: dict[str, None] = {}
    for batch in read_lines(path, quoting=False):
        for text in islice(batch["text"], _KEYS_FROM_LINES):
            try:
                record = json.loads(text.as_py())
            except ValueError:
                continue
            if isinstance(record, dict):
                keys |= dict.fromkeys(record)
        break
    else:
        raise ValueError(f"{path} is empty; expected one JSON object a line")
    if not keys:
        raise ValueError(f"{path} line 1 is not a JSON object; expected one a line: {first_record(path, False)[:80]!r}")
    return list(keys)


def _read_user_lists(connection: duckdb.DuckDBPyConnection, path: Path, name: str) -> list[str]:
    """X.inter.json: {user: [item, …]}."""

    def records() -> Iterator[_Record]:
        for user, items in _load_object(path, "user → [item, …]").items():
            if not isinstance(items, list):
                yield None, f"gives user {user!r} no list of items", str(items)[:120]
                continue
            for item in items:
                plain = isinstance(item, str | int) and not isinstance(item, bool)
                problem = None if plain else f"gives user {user!r} an item that is neither text nor number"
                yield [user, str(item)], problem, str(item)[:120]

    return _insert(connection, name, ["user", "item"], records)


def _read_text_lists(connection: duckdb.DuckDBPyConnection, path: Path, name: str) -> list[str]:
    """One line a user: user item item …, separated by blanks."""
    first_record(path, quoting=False)
    lines = read_lines(path, quoting=False)  # noqa: F841 – DuckDB finds it by its name
    connection.execute(f"""
        CREATE TABLE {name} AS
        WITH words AS (SELECT line, string_split_regex(trim(text, e' \\t\\r\\n'), '\\s+') AS words FROM lines),
        pairs AS (SELECT line, words[1] AS user, unnest(words[2:]) AS item FROM words)
        SELECT row_number() OVER () AS line, item AS text, NULL::VARCHAR AS problem, [user, item] AS fields FROM pairs""")
    return ["user", "item"]


def _read_item_object(connection: duckdb.DuckDBPyConnection, path: Path, name: str) -> list[str]:
    """X.item.json: {item: {title, description, …}}."""
    items = _load_object(path, "item → {title, …}")
    columns = list(dict.fromkeys(key for values in items.values() if isinstance(values, dict) for key in values))

    def records() -> Iterator[_Record]:
        for item, values in items.items():
            problem = None if isinstance(values, dict) else f"gives item {item!r} no object"
            yield [item, *(_plain_text(values.get(key)) for key in columns)] if problem is None else None, problem, item

    if "item_id" in columns:
        raise ValueError(f"{path}: items have a key 'item_id'; expected the id to be the key of the object only")
    return _insert(connection, name, ["item_id", *columns], records)


_Record = tuple[list[str] | None, str | None, str]


def _insert(
    connection: duckdb.DuckDBPyConnection, name: str, columns: list[str], records: Callable[[], Iterator[_Record]]
) -> list[str]:
    rows = list(records())
    table = pa.table(  # noqa: F841 – DuckDB finds it by its name
        {
            "line": pa.array(range(1, len(rows) + 1), pa.int64()),
            "text": pa.array([quote for _, _, quote in rows], pa.string()),
            "problem": pa.array([problem for _, problem, _ in rows], pa.string()),
            "fields": pa.array([fields for fields, _, _ in rows], pa.list_(pa.string())),
        }
    )
    connection.execute(f"CREATE TABLE {name} AS FROM table")
    return columns


def _load_object(path: Path, shape: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8; convert the file first") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} line {error.lineno} is not JSON ({error.msg}); expected one object {shape}") from None
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{path} holds no JSON object; expected {shape}")
    return value


def _plain_text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return " ".join(map(_plain_text, value.values()))
    return " ".join(map(_plain_text, value)) if isinstance(value, list) else str(value)


_READERS: dict[str, Callable[[duckdb.DuckDBPyConnection, Path, str], list[str]]] = {
    ".inter.json": _read_user_lists,
    ".item.json": _read_item_object,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json_lines,
    ".inter": _read_recbole,
    ".item": _read_recbole,
    ".txt": _read_text_lists,
}
