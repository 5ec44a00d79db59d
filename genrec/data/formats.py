"""Files of every accepted format as tables of DuckDB with one list of strings per record.

The ending of the file name decides the format. Delimited files and JSON lines are split inside DuckDB; the formats that
are one JSON object are read whole.
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

from genrec.data.lines import LINE_SCHEMA, first_record, read_header, read_lines, sniff_delimiter

_KEYS_FROM_LINES = 1000  # JSON lines may leave keys out: the columns are the keys of this many first lines


@dataclass(frozen=True)
class Source:
    """A file on its way into DuckDB. `query`, over the registered view `input`, gives line BIGINT, text VARCHAR,
    problem VARCHAR (NULL if the record can be used) and fields VARCHAR[], one per column. It can be run once."""

    path: Path
    columns: list[str]
    query: str
    failures: list[ValueError]  # what ended the reading of a file that is not text

    def field(self, column: str | None) -> str:
        """SQL for the value of a column, NULL if it is absent or empty."""
        return "NULL::VARCHAR" if column is None else f"nullif(fields[{self.columns.index(column) + 1}], '')"

    def execute(self, connection: duckdb.DuckDBPyConnection, statement: str) -> None:
        """Run a statement that contains the query. ValueError says in its own words why the file cannot be read."""
        try:
            connection.execute(statement)
        except duckdb.Error:
            if self.failures:
                raise self.failures[0] from None
            raise


def open_source(connection: duckdb.DuckDBPyConnection, path: Path) -> Source:
    """Register `path` as the view `input`. Raises FileNotFoundError, IsADirectoryError, or ValueError for a name that
    tells no format and for content that is not that format at all."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; expected a file")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    for ending, reader in _READERS.items():
        if path.name.lower().endswith(ending):
            try:
                columns, data, query = reader(path)
            except UnicodeEncodeError:  # JSON can escape what no text can hold
                raise ValueError(f"{path} holds half of a surrogate pair (\\ud800 … \\udfff); expected text") from None
            source = Source(path, columns, query, failures=[])
            if not isinstance(data, pa.Table):
                data = pa.RecordBatchReader.from_batches(LINE_SCHEMA, _remember_failure(data, source.failures))
            connection.register("input", data)
            return source
    raise ValueError(f"{path} has an unknown format; expected a name ending in one of {', '.join(_READERS)}")


def _remember_failure(batches: Iterator[pa.RecordBatch], failures: list[ValueError]) -> Iterator[pa.RecordBatch]:
    """DuckDB wraps what goes wrong in here into a traceback; keep the sentence."""
    try:
        yield from batches
    except ValueError as error:
        failures.append(error)
        raise


_Parts = tuple[list[str], pa.Table | Iterator[pa.RecordBatch], str]  # columns, input, query


def _read_csv(path: Path) -> _Parts:
    return _read_quoted(path, sniff_delimiter(path))


def _read_tsv(path: Path) -> _Parts:
    return _read_quoted(path, "\t")


def _read_quoted(path: Path, delimiter: str) -> _Parts:
    """Fields may be in double quotes, doubled inside. Records without a quote take the short way."""
    columns = read_header(path, delimiter, quoting=True)
    # Every field with the delimiter before it; if these do not add up to the record, a quote stands where it may not.
    pieces = f"""regexp_extract_all('{delimiter}' || text, '[{delimiter}]("([^"]|"")*"|[^{delimiter}"]*)')"""
    unquoted = "CASE WHEN x[2] = '\"' THEN replace(x[3:-2], '\"\"', '\"') ELSE x[2:] END"
    split = f"""CASE WHEN contains(text, '"') THEN list_transform({pieces}, lambda x: {unquoted})
        ELSE string_split(text, '{delimiter}') END"""
    # CASE, because AND would run the regular expression on records without a quote as well.
    stray = (
        f"""CASE WHEN contains(text, '"') THEN array_to_string({pieces}, '') <> '{delimiter}' || text ELSE false END"""
    )
    return columns, read_lines(path, quoted_by=delimiter, skip=1), _split_query(split, stray, len(columns))


def _read_recbole(path: Path) -> _Parts:
    """RecBole's atomic files: tab separated, never quoted, headers `name:type`."""
    columns = read_header(path, "\t", quoting=False)
    query = _split_query("string_split(text, '\t')", "false", len(columns))
    return [column.rsplit(":", 1)[0] for column in columns], read_lines(path, skip=1), query


def _split_query(split: str, stray: str, columns: int) -> str:
    return f"""
        WITH stripped AS (SELECT line, rtrim(text, e'\\r\\n') AS text FROM input),
        split AS (SELECT line, text, {split} AS fields, {stray} AS stray FROM stripped)
        SELECT line, text, CASE
            WHEN stray THEN 'has a stray double quote'
            WHEN len(fields) <> {columns} THEN 'has ' || len(fields) || ' columns, expected {columns}'
            END AS problem, fields FROM split"""


def _read_json_lines(path: Path) -> _Parts:
    columns = _json_keys(path)
    pointers = ["/" + column.replace("~", "~0").replace("/", "~1") for column in columns]
    listed = ", ".join("'" + pointer.replace("'", "''") + "'" for pointer in pointers)
    query = f"""
        WITH stripped AS (SELECT line, rtrim(text, e'\\r\\n') AS text FROM input),
        checked AS (SELECT *, json_valid(text) AND starts_with(ltrim(text, e' \\t'), '{{') AS usable FROM stripped)
        SELECT line, text, CASE WHEN NOT usable THEN 'is not a JSON object' END AS problem,
            CASE WHEN usable THEN json_extract_string(text, [{listed}]) END AS fields FROM checked"""
    return columns, read_lines(path), query


def _json_keys(path: Path) -> list[str]:
    batch = next(read_lines(path), None)
    if batch is None:
        raise ValueError(f"{path} is empty; expected one JSON object a line")
    keys: dict[str, None] = {}
    for text in islice(batch["text"], _KEYS_FROM_LINES):
        try:
            record = json.loads(text.as_py())
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            keys |= dict.fromkeys(record)
    if not keys:
        raise ValueError(f"{path} holds no JSON object; expected one a line, not {first_record(path)[:80]!r}")
    return list(keys)


def _read_text_lists(path: Path) -> _Parts:
    """One line a user: user item item …, separated by blanks."""
    first_record(path)
    query = """
        WITH split AS (SELECT line, string_split_regex(trim(text, e' \\t\\r\\n'), '\\s+') AS words FROM input),
        lists AS (SELECT line, words[1] AS user,
            CASE WHEN len(words) > 1 THEN words[2:] ELSE [NULL] END AS items FROM split),
        pairs AS (SELECT line, user, unnest(items) AS item, generate_subscripts(items, 1) AS place FROM lists)
        SELECT row_number() OVER (ORDER BY line, place) AS line, user AS text, NULL::VARCHAR AS problem,
            [user, item] AS fields FROM pairs"""
    return ["user", "item"], read_lines(path), query


def _read_user_lists(path: Path) -> _Parts:
    """X.inter.json: {user: [item, …]}."""
    records: list[_Record] = []
    for user, items in _load_object(path, "user → [item, …]").items():
        if isinstance(items, list):
            records += [_user_event(user, item) for item in items]
        else:
            records.append((None, f"gives user {user!r} no list of items", str(items)[:120]))
    return ["user", "item"], _as_table(records), "FROM input"


def _user_event(user: str, item: object) -> _Record:
    plain = isinstance(item, str | int) and not isinstance(item, bool)
    problem = None if plain else f"gives user {user!r} an item that is neither text nor a whole number"
    return [user, str(item)], problem, str(item)[:120]


def _read_item_object(path: Path) -> _Parts:
    """X.item.json: {item: {title, description, …}}."""
    items = _load_object(path, "item → {title, …}")
    columns = list(dict.fromkeys(key for values in items.values() if isinstance(values, dict) for key in values))
    if "item_id" in columns:
        raise ValueError(f"{path}: items have a key 'item_id'; expected only the key of each object to be its id")
    records: list[_Record] = []
    for item, values in items.items():
        if isinstance(values, dict):
            records.append(([item, *(_plain_text(values.get(key)) for key in columns)], None, item))
        else:
            records.append((None, f"gives item {item!r} no object", str(values)[:120]))
    return ["item_id", *columns], _as_table(records), "FROM input"


class _RepeatedKeyError(Exception):
    """json would keep the last value of a repeated key and forget the others."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKeyError(next(key for key in keys if keys.count(key) > 1))
    return record


def _load_object(path: Path, shape: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=_unique_keys)
    except _RepeatedKeyError as error:
        raise ValueError(f"{path} has the key {error.args[0]!r} twice; expected one object {shape}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8; convert the file first") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply; expected one object {shape}") from None
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


_Record = tuple[list[str] | None, str | None, str]  # fields, problem, what to quote


def _as_table(records: list[_Record]) -> pa.Table:
    return pa.table(
        {
            "line": pa.array(range(1, len(records) + 1), pa.int64()),
            "text": pa.array([quote for _, _, quote in records], pa.string()),
            "problem": pa.array([problem for _, problem, _ in records], pa.string()),
            "fields": pa.array([fields for fields, _, _ in records], pa.list_(pa.string())),
        }
    )


_READERS: dict[str, Callable[[Path], _Parts]] = {
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
