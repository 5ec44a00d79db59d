"""Spark as the engine of the pipeline: the same SQL, translated; files are read and written by its executors.

Every executor parses its files with DuckDB, as one machine would, so that there is one definition of what a record is;
it needs genrec, and the folders of input and output at the same paths as the driver.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import duckdb
import pyarrow as pa

from genrec.data.config import FeaturesConfig
from genrec.data.engine import BATCH_ROWS, parse_memory
from genrec.data.formats import Source, open_source
from genrec.data.inputs import InputFile
from genrec.data.readers import LogColumns, event_schema, events_query

_NEEDS = "engine spark needs pyspark and sqlglot; pip install 'genrec[spark]'"
_MEMORY_OF_READER = "1GB"  # one file at a time goes through it, record by record
_SETTINGS = {
    "spark.app.name": "genrec features",
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.log.level": "OFF",  # what goes wrong becomes a sentence
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.ansi.enabled": "true",
    "spark.sql.execution.arrow.maxRecordsPerBatch": str(BATCH_ROWS),
}
_LOCAL_SETTINGS = {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}  # whatever its name


class SparkEngine:
    """A session of Spark; tables are views that it keeps on its executors."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def read_events(self, sources: Sequence[Source], columns: LogColumns) -> None:
        files = [(source.file, source.columns) for source in sources]

        def read(numbers: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in numbers:
                for number in map(int, batch["id"].to_pylist()):
                    file, names = files[number]
                    yield from _parse(number, file, names, columns)

        numbers = self._session.range(0, len(files), 1, len(files))
        self._keep("parsed", numbers.mapInArrow(read, _spark_schema(event_schema(columns))))
        failed = self.fetch("SELECT problem FROM parsed WHERE place < 0 ORDER BY place DESC LIMIT 1")
        if len(failed):
            raise ValueError(failed["problem"][0].as_py())

    def create(self, name: str, query: str) -> None:
        self._keep(name, self._sql(query))

    def put(self, name: str, table: pa.Table) -> None:
        self._keep(name, self._session.createDataFrame(table))

    def fetch(self, query: str) -> pa.Table:
        with _one_sentence():
            return self._sql(query).toArrow()

    def drop(self, *names: str) -> None:
        """Views that others are computed from stay: Spark may have to compute them again."""

    def write_parts(self, query: str, parts: int, write: Callable[[Iterable[pa.RecordBatch]], None]) -> None:
        def written(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            write(batches)
            yield pa.record_batch({"done": pa.array([True])})

        with _one_sentence():
            # Every part as a whole in one partition, sorted on disk where memory does not suffice.
            events = self._sql(query).repartitionById(parts, "part").sortWithinPartitions("part", "user", "n")
            events.mapInArrow(written, "done boolean").collect()

    def _sql(self, query: str) -> Any:
        from sqlglot import transpile

        (translated,) = transpile(query, read="duckdb", write="spark")
        with _one_sentence():
            return self._session.sql(translated)

    def _keep(self, name: str, rows: Any) -> None:
        from pyspark import StorageLevel

        with _one_sentence():
            rows.persist(StorageLevel.MEMORY_AND_DISK).createOrReplaceTempView(name)


@contextmanager
def spark_engine(config: FeaturesConfig) -> Iterator[SparkEngine]:
    """A session with the settings that `config.spark` and spark-submit give, here on `threads` cores if they name no
    master; it ends with the block, unless it was there before.

    Raises ValueError if pyspark, sqlglot or Java are missing, OSError for what Spark cannot do.
    """
    try:
        import sqlglot  # noqa: F401
        from pyspark import SparkConf
        from pyspark.sql import SparkSession
    except ModuleNotFoundError:
        raise ValueError(_NEEDS) from None
    if not (os.environ.get("JAVA_HOME") or shutil.which("java")):
        raise ValueError("engine spark needs Java 17 or later; install it, or set JAVA_HOME")
    settings = SparkConf()
    given = {name: str(value) for name, value in config.spark.items()}
    if config.memory_limit:
        given.setdefault("spark.driver.memory", f"{parse_memory(config.memory_limit) // 2**20}m")
    here = not settings.contains("spark.master") and "spark.master" not in given
    defaults = _SETTINGS | (_LOCAL_SETTINGS | {"spark.master": f"local[{config.threads or '*'}]"} if here else {})
    for name, value in defaults.items():
        settings.setIfMissing(name, value)
    settings.setAll(list(given.items()))
    if here:
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # or the first python3 of the path
    running = SparkSession.getActiveSession()
    with _one_sentence():
        session = SparkSession.builder.config(conf=settings).getOrCreate()
    logging.getLogger("SQLQueryContextLogger").setLevel(logging.CRITICAL)
    try:
        yield SparkEngine(session)
    finally:
        if running is None:
            session.stop()


def _parse(number: int, file: InputFile, names: list[str], columns: LogColumns) -> Iterator[pa.RecordBatch]:
    """The records of one file; if it cannot be read, one that says why, with place −1 − number."""
    schema = event_schema(columns)
    try:
        source = open_source(file, names)
        with _reader() as connection, source.registered(connection):
            reader = connection.sql(events_query(source, columns, number)).to_arrow_reader(BATCH_ROWS)
            for batch in reader:
                yield pa.RecordBatch.from_arrays(
                    [batch[name].cast(kind) for name, kind in _kinds(schema)], schema=schema
                )
    except (ValueError, OSError) as error:
        failed = {"place": [-1 - number], "problem": [str(error)]}
        rows = [pa.array(failed.get(name, [None]), kind) for name, kind in _kinds(schema)]
        yield pa.RecordBatch.from_arrays(rows, schema=schema)


def _reader() -> duckdb.DuckDBPyConnection:
    return duckdb.connect(config={"threads": 1, "memory_limit": _MEMORY_OF_READER})


def _kinds(schema: pa.Schema) -> list[tuple[str, pa.DataType]]:
    return list(zip(schema.names, schema.types, strict=True))


def _spark_schema(schema: pa.Schema) -> Any:
    from pyspark.sql.pandas.types import from_arrow_schema

    return from_arrow_schema(schema)


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Spark reports what goes wrong with the stack traces of two languages; OSError keeps what they say."""
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        yield
    except (PySparkException, Py4JError) as error:
        raise OSError(f"Spark: {_sentence(str(error)) or type(error).__name__}") from None


def _sentence(report: str) -> str:
    """The error that a Python worker raised, or else the first line."""
    raised = re.findall(r"^(?:\w+\.)*(\w+(?:Error|Exception): .+)$", report, re.MULTILINE)
    if "Python worker" in report and raised:
        return raised[0]
    return next((line.strip() for line in report.splitlines() if line.strip()), "")
