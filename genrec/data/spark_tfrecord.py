"""TFRecord as a data source of Spark, so that a cluster writes any DataFrame in parallel:

spark.dataSource.register(TFRecordDataSource)
frame.write.format("tfrecord").mode("append").save(path)
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyspark import TaskContext
from pyspark.sql.datasource import DataSource, DataSourceArrowWriter, WriterCommitMessage
from pyspark.sql.types import StructType

from genrec.data.tfrecord import encode_examples


class TFRecordDataSource(DataSource):
    """Writes one tf.train.Example per row (see `encode_examples` for the types) into `path`, a folder that every
    executor reaches: one file per partition, `part-00000-<run>.tfrecord`, and `_SUCCESS` once all are whole."""

    @classmethod
    def name(cls) -> str:
        return "tfrecord"

    def writer(self, schema: StructType, overwrite: bool) -> DataSourceArrowWriter:
        """Raises ValueError without a path, and for mode overwrite: what is there is never deleted."""
        path = self.options.get("path")
        if not path:
            raise ValueError("tfrecord has no path; expected .save(path)")
        if overwrite:
            raise ValueError(f"tfrecord cannot overwrite {path}; expected mode append and a folder of your own")
        return _Writer(Path(path), uuid.uuid4().hex[:8])


@dataclass
class _Written(WriterCommitMessage):
    temporary: Path
    final: Path


class _Writer(DataSourceArrowWriter):
    """Tasks write under hidden names; the driver renames when all are done, so that a task that runs twice, or a job
    that fails, leaves nothing that readers see."""

    def __init__(self, folder: Path, run: str) -> None:
        self._folder = folder
        self._run = run

    def write(self, iterator: Iterator[pa.RecordBatch]) -> WriterCommitMessage:
        task = TaskContext.get()
        assert task is not None
        name = f"part-{task.partitionId():05d}-{self._run}.tfrecord"
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._folder / f".tmp-{name}-{task.taskAttemptId()}"
        with open(temporary, "wb") as file:
            for batch in iterator:
                file.write(encode_examples(pa.Table.from_batches([batch])))
        return _Written(temporary, self._folder / name)

    def commit(self, messages: list[Any]) -> None:
        for message in messages:
            message.temporary.replace(message.final)
        self._remove_leftovers()
        (self._folder / "_SUCCESS").touch()

    def abort(self, messages: list[Any]) -> None:
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        for leftover in self._folder.glob(f".tmp-part-*-{self._run}.tfrecord-*"):
            leftover.unlink(missing_ok=True)
