"""Metrics of a run, one JSON object a line, mirrored to TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import TextIO

from torch.utils.tensorboard import SummaryWriter

from genrec.data.files import atomic_file


class MetricsLog:
    """Append metrics to `<directory>/metrics.jsonl` and `<directory>/tensorboard/`."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "metrics.jsonl"
        self._file = self._open()
        self._board = SummaryWriter(str(directory / "tensorboard"))

    def rewind(self, stage: str, step: int) -> None:
        """Forget what an interrupted run logged of `stage` after `step`, or of all of it where `step` is 0."""
        kept = [row for row in read_metrics(self.path) if row["stage"] != stage or (step and row["step"] <= step)]
        self._file.close()
        with atomic_file(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self._file = self._open()

    def _open(self) -> TextIO:
        return open(self.path, "a", encoding="utf-8")

    def write(self, stage: str, step: int, **values: float | list[float]) -> None:
        """Log `values` at `step` of `stage`; lists (one number per level, per expert) become one curve an element."""
        self._file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, list):
                for i, element in enumerate(value):
                    self._board.add_scalar(f"{stage}/{name}/{i}", element, step)
            else:
                self._board.add_scalar(f"{stage}/{name}", value, step)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._board.close()


class NoLog(MetricsLog):
    """For the ranks that do not write."""

    def __init__(self) -> None:
        pass

    def rewind(self, stage: str, step: int) -> None:
        pass

    def write(self, stage: str, step: int, **values: float | list[float]) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line cut short by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
