"""Metrics of a run, one JSON object a line, mirrored to TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter


class MetricsLog:
    """Append metrics to `<directory>/metrics.jsonl` and `<directory>/tensorboard/`.

    A resumed run passes `resume_at`: lines of that stage from that step on were written by the part of the run that was
    lost, and are dropped, so that the file reads as if nothing had happened.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "metrics.jsonl"
        self._file = open(self.path, "a", encoding="utf-8")
        self._board = SummaryWriter(str(directory / "tensorboard"))

    def write(self, stage: str, step: int, **values: float | list[float]) -> None:
        """Log `values` at `step` of `stage`; lists (one number per level, per expert) become one curve an element."""
        self._file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, list):
                self._board.add_scalars(f"{stage}/{name}", {str(i): v for i, v in enumerate(value)}, step)
            else:
                self._board.add_scalar(f"{stage}/{name}", value, step)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line cut short by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
