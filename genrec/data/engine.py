"""What the pipeline asks of an engine that runs its SQL, and DuckDB as that engine.

Queries are written once, in DuckDB's SQL and without what other engines cannot say. Rows have no order but what a query
sorts by.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import duckdb
import pyarrow as pa

from genrec.data.config import FeaturesConfig
from genrec.data.formats import Source
from genrec.data.readers import LogColumns, event_schema, events_query

BATCH_ROWS = 1 << 16


class Engine(Protocol):
    """Tables and SQL over them."""

    def read_events(self, sources: Sequence[Source], columns: LogColumns) -> None:
        """Make table `parsed` of what `events_query` says about every file. ValueError says why one cannot be read."""

    def create(self, name: str, query: str) -> None:
        """Make a table of the rows of a query."""

    def put(self, name: str, table: pa.Table) -> None:
        """Make a table of these rows."""

    def fetch(self, query: str) -> pa.Table:
        """The rows of a query whose result fits into memory."""

    def drop(self, *names: str) -> None:
        """Free tables."""

    def write_parts(self, query: str, parts: int, write: Callable[[Iterable[pa.RecordBatch]], None]) -> None:
        """Hand the rows of a query with columns part (INTEGER, 0 … parts − 1), user and n to `write`, in this order. It
        may be called in other processes, each time with all rows of some parts."""


class DuckEngine:
    """DuckDB in this process."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._connection = connection

    def read_events(self, sources: Sequence[Source], columns: LogColumns) -> None:
        self._connection.register("no_events", event_schema(columns).empty_table())
        self._connection.execute("CREATE TABLE parsed AS SELECT * FROM no_events")
        for number, source in enumerate(sources):
            with source.registered(self._connection):
                self._connection.execute(f"INSERT INTO parsed {events_query(source, columns, number)}")

    def create(self, name: str, query: str) -> None:
        self._connection.execute(f"CREATE TABLE {name} AS {query}")

    def put(self, name: str, table: pa.Table) -> None:
        self._connection.register(f"{name}_rows", table)
        self.create(name, f"SELECT * FROM {name}_rows")
        self._connection.unregister(f"{name}_rows")

    def fetch(self, query: str) -> pa.Table:
        return self._connection.sql(query).to_arrow_table()

    def drop(self, *names: str) -> None:
        for name in names:
            self._connection.execute(f"DROP TABLE {name}")

    def write_parts(self, query: str, parts: int, write: Callable[[Iterable[pa.RecordBatch]], None]) -> None:
        write(self._connection.sql(f"{query} ORDER BY part, user, n").to_arrow_reader(BATCH_ROWS))


@contextmanager
def local_database(config: FeaturesConfig) -> Iterator[duckdb.DuckDBPyConnection]:
    """DuckDB in memory; what does not fit it moves to files in a directory of its own, which go with it.

    Raises ValueError for a memory_limit that is none, OSError if it is too little or a disk is full.
    """
    with tempfile.TemporaryDirectory(prefix="genrec-features-") as scratch:
        settings: dict[str, Any] = {
            "temp_directory": scratch,
            "threads": config.threads,
            "memory_limit": _share_of_duckdb(config.memory_limit),
            "preserve_insertion_order": False,  # or every batch waits for the one before it, in memory
        }
        given = {name: value for name, value in settings.items() if value is not None}
        with duckdb.connect(config=given) as connection:
            try:
                connection.execute("SET enable_progress_bar = false")  # it would be drawn into the command's output
                yield connection
            except duckdb.OutOfMemoryException as error:
                if "max_temp_directory_size" in str(error):  # which is the room that its disk had
                    folder = f"the folder for temporary files, {tempfile.gettempdir()}, is full"
                    raise OSError(f"{folder}; set TMPDIR to one with more room, or raise memory_limit") from None
                limit = config.memory_limit or "80 % of the machine's memory"
                raise OSError(f"DuckDB needs more memory than memory_limit allows, {limit}; raise it") from None
            except duckdb.IOException as error:
                raise OSError(str(error).splitlines()[0]) from None


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
OUTSIDE_DUCKDB = 400 * 10**6  # bytes of a process for Python, its libraries and the batches between them and DuckDB


def parse_memory(size: str) -> int:
    """Bytes of a size such as 2GB or 1.5GiB; ValueError if it is none."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", size, re.IGNORECASE)
    if match is None:
        raise ValueError(f"memory_limit is {size!r}; expected a size such as 2GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _share_of_duckdb(memory_limit: str | None) -> str | None:
    """The limit holds for the process; DuckDB's own leaves out what it does not see."""
    if memory_limit is None:
        return None
    limit = parse_memory(memory_limit)
    return f"{max(limit - OUTSIDE_DUCKDB, limit // 4) // 1000}KB"
