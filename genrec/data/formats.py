"""Files of every accepted format as something that DuckDB can read: a header, the records, and SQL for their fields.

The ending of the file name decides the format. Delimited files and JSON lines are split inside DuckDB; the formats that
are one JSON object are read whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from genrec.data.inputs import COMPRESSIONS, InputFile
from genrec.data.lines import LINE_SCHEMA, first_record, read_bytes, read_header, read_lines, sniff_delimiter

_KEYS_FROM_LINES = 1000  # JSON lines may leave keys out: the columns are the keys of this many first lines


@dataclass(frozen=True)
class Source:
    """A file on its way into DuckDB. `query`, over the registered view `input`, gives line BIGINT, text VARCHAR,
    problem VARCHAR (NULL if the record can be used) and what `fields` takes its columns from."""

    file: InputFile
    fields: dict[str, str]  # column → SQL, VARCHAR, empty or NULL if the record leaves it out
    data: Callable[[], pa.Table | Iterator[pa.RecordBatch]] | None  # what to register as `input`
    query: str

    @property
    def columns(self) -> list[str]:
        return list(self.fields)

    def field(self, column: str | None) -> str:
        """SQL for the value of a column, NULL if it is absent or empty."""
        return "NULL::VARCHAR" if column is None else f"nullif({self.fields[column]}, '')"

    @contextmanager
    def registered(self, connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
        """While the block runs, `query` can be used once. ValueError says why a file cannot be read."""
        failures: list[ValueError] = []
        try:
            data = self.data() if self.data else None
            if data is not None and not isinstance(data, pa.Table):
                data = pa.RecordBatchReader.from_batches(LINE_SCHEMA, _remember_failure(data, failures))
            if data is not None:
                connection.register("input", data)
            yield
        except UnicodeEncodeError:  # JSON can escape what no text can hold
            expected = "half of a surrogate pair (\\ud800 … \\udfff); expected text"
            raise ValueError(f"{self.file.path} holds {expected}") from None
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            if failures:
                raise failures[0] from None
            if self.data is None and not isinstance(error, duckdb.OperationalError):  # which is the machine's fault
                raise ValueError(f"{self.file.path} is damaged ({str(error).splitlines()[0]})") from None
            raise


def open_sources(files: Sequence[InputFile]) -> list[Source]:
    """The files of one input, all with the same columns; those of JSON lines, which may leave keys out, are united.

    Raises ValueError for a name that tells no format, for content that is not that format at all, and for a file whose
    columns are not those of the first.
    """
    sources = [open_source(file) for file in files]
    if all(_reader_of(source.file) is _read_json_lines for source in sources):
        columns = list(dict.fromkeys(column for source in sources for column in source.columns))
        return [open_source(source.file, columns) if source.columns != columns else source for source in sources]
    for source in sources:
        if set(source.columns) != set(sources[0].columns):
            raise ValueError(
                f"{source.file.path} has the columns {', '.join(source.columns)}; expected those of "
                f"{sources[0].file.path}: {', '.join(sources[0].columns)}"
            )
    return sources


def open_source(file: InputFile, columns: Sequence[str] | None = None) -> Source:
    """One file; `columns` are those that JSON lines may have, if they are known. Errors as `open_sources`."""
    reader = _reader_of(file)
    if columns is not None:
        columns = [column for column in columns if column not in file.partition]
    names, data, query = reader(file.path, columns) if reader is _read_json_lines else reader(file.path)
    fields = dict(names) if isinstance(names, dict) else {name: f"fields[{i}]" for i, name in enumerate(names, 1)}
    for column, value in file.partition.items():
        if column in fields:
            raise ValueError(f"{file.path}: column {column!r} is in the file and in the name of its folder")
        fields[column] = _literal(value)
    return Source(file, fields, data, query)


def _reader_of(file: InputFile) -> Callable[..., _Parts]:
    for ending, reader in _READERS.items():
        if file.plain_name.endswith(ending):
            return reader
    expected = f"{', '.join(_READERS)}, or one of these and {' or '.join(COMPRESSIONS)}"
    raise ValueError(f"{file.path} has an unknown format; expected a name ending in one of {expected}")


def _remember_failure(batches: Iterator[pa.RecordBatch], failures: list[ValueError]) -> Iterator[pa.RecordBatch]:
    """DuckDB wraps what goes wrong in here into a traceback; keep the sentence."""
    try:
        yield from batches
    except ValueError as error:
        failures.append(error)
        raise


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


# columns (for Parquet with the SQL of their values), input, query
_Parts = tuple[list[str] | dict[str, str], Callable[[], pa.Table | Iterator[pa.RecordBatch]] | None, str]


def _read_parquet(path: Path) -> _Parts:
    """Values as text, as a CSV file would have them; timestamps as microseconds, dates as their first second."""
    try:
        schema = pq.read_schema(path)
    except pa.ArrowInvalid:
        raise ValueError(f"{path} is not a readable Parquet file") from None
    values = []
    for name, kind in zip(schema.names, schema.types, strict=True):
        value = 'columns."' + name.replace('"', '""') + '"'
        if pa.types.is_timestamp(kind):
            value = f"epoch_us({value})"
        elif pa.types.is_date(kind):
            value = f"epoch({value})::BIGINT"
        values.append(f"{value}::VARCHAR")
    named = "".join(f", {value} AS field_{i}" for i, value in enumerate(values))
    query = f"""SELECT file_row_number + 1 AS line, NULL::VARCHAR AS text, NULL::VARCHAR AS problem{named}
        FROM read_parquet({_literal(str(path))}, file_row_number = true, hive_partitioning = false) AS columns"""
    return {name: f"field_{i}" for i, name in enumerate(schema.names)}, None, query


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
    return columns, lambda: read_lines(path, quoted_by=delimiter, skip=1), _split_query(split, stray, len(columns))


def _read_recbole(path: Path) -> _Parts:
    """RecBole's atomic files: tab separated, never quoted, headers `name:type`."""
    columns = read_header(path, "\t", quoting=False)
    query = _split_query("string_split(text, '\t')", "false", len(columns))
    return [column.rsplit(":", 1)[0] for column in columns], lambda: read_lines(path, skip=1), query


def _split_query(split: str, stray: str, columns: int) -> str:
    return f"""
        WITH stripped AS (SELECT line, rtrim(text, e'\\r\\n') AS text FROM input),
        split AS (SELECT line, text, {split} AS fields, {stray} AS stray FROM stripped)
        SELECT line, text, CASE
            WHEN stray THEN 'has a stray double quote'
            WHEN len(fields) <> {columns} THEN 'has ' || len(fields) || ' columns, expected {columns}'
            END AS problem, fields FROM split"""


def _read_json_lines(path: Path, columns: list[str] | None = None) -> _Parts:
    columns = _json_keys(path) if columns is None else columns
    pointers = ["/" + column.replace("~", "~0").replace("/", "~1") for column in columns]
    listed = ", ".join(map(_literal, pointers))
    query = f"""
        WITH stripped AS (SELECT line, rtrim(text, e'\\r\\n') AS text FROM input),
        checked AS (SELECT *, json_valid(text) AND starts_with(ltrim(text, e' \\t'), '{{') AS usable FROM stripped)
        SELECT line, text, CASE WHEN NOT usable THEN 'is not a JSON object' END AS problem,
            CASE WHEN usable THEN json_extract_string(text, [{listed}]) END AS fields FROM checked"""
    return columns, lambda: read_lines(path), query


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
    return ["user", "item"], lambda: read_lines(path), query


def _read_user_lists(path: Path) -> _Parts:
    """X.inter.json: {user: [item, …]}."""
    records: list[_Record] = []
    for user, items in _load_object(path, "user → [item, …]").items():
        if isinstance(items, list):
            records += [_user_event(user, item) for item in items]
        else:
            records.append((None, f"gives user {user!r} no list of items", str(items)[:120]))
    return ["user", "item"], lambda: _as_table(records), "FROM input"


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
    return ["item_id", *columns], lambda: _as_table(records), "FROM input"


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
        value = json.loads(read_bytes(path), object_pairs_hook=_unique_keys)
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


_READERS: dict[str, Callable[..., _Parts]] = {
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
    ".parquet": _read_parquet,
}
