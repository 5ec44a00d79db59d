"""The tidy table of a benchmark run: one row for each contender of each case, and what follows from it."""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from genrec.data.files import atomic_file

OURS = "genrec"
ABSENT = "absent"  # instead of a case: a peer that was not installed


@dataclass(frozen=True)
class Row:
    """One contender of one case. What is not known or does not apply is empty: "" or nan."""

    op: str
    case: str
    series: str
    """cases of one series differ along one axis alone"""
    axis: str
    """what a series runs along: "sequence length", "tokens" …"""
    at: float
    """where on it this case stands"""
    contender: str
    seconds: float
    """median time of a call"""
    spread: float
    """interquartile range over median"""
    flops: float
    """that a call must do"""
    bytes: float
    """that a call must move"""
    memory: float
    """bytes that a call takes at its peak, results included, arguments not"""
    goal: float
    """ratio that was aimed at"""
    matmul_rate: float
    """FLOP/s of the device's own matrix product, in the same session"""
    copy_rate: float
    """bytes per second, read and written, of the device's own copy"""
    device: str
    threads: int
    """0 on a GPU"""
    torch: str
    date: str


@dataclass(frozen=True)
class Case:
    """All contenders of one case."""

    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        return self.rows[0].case

    @functools.cached_property
    def ours(self) -> Row:
        return next(row for row in self.rows if row.contender == OURS)

    @property
    def peers(self) -> list[Row]:
        return [row for row in self.rows if row.contender != OURS]

    @functools.cached_property
    def peer(self) -> Row:
        """The strongest."""
        return min(self.peers, key=lambda row: row.seconds)

    @property
    def ratio(self) -> float:
        """How many times as long the strongest peer takes."""
        return self.peer.seconds / self.ours.seconds

    def ratio_to(self, contenders: Iterable[str]) -> float:
        """The ratio to the strongest of these; nan where none of them ran."""
        chosen = set(contenders)
        return min((row.seconds for row in self.peers if row.contender in chosen), default=math.nan) / self.ours.seconds

    @property
    def memory_ratio(self) -> float:
        """How many times the memory of ours the most frugal peer takes; nan where it was not measured."""
        measured = [row.memory for row in self.peers if row.memory > 0]
        return min(measured) / self.ours.memory if measured and self.ours.memory > 0 else math.nan

    def share(self, row: Row) -> float:
        """Of what the device's own matmul and copy would take for the same work; nan without work to count."""
        work = max(_over(row.flops, row.matmul_rate), _over(row.bytes, row.copy_rate))
        return work / row.seconds if work else math.nan


def _over(work: float, rate: float) -> float:
    return work / rate if work > 0 else 0.0


def write_results(path: Path, rows: Iterable[Row]) -> None:
    """The table as CSV, whole or not at all; numbers with four digits."""
    with atomic_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows([_text(value) for value in astuple(row)] for row in rows)


def _text(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return "" if math.isnan(value) else f"{value:.4g}"


def read_results(path: Path) -> list[Row]:
    """Rows of a table that `write_results` wrote. Raises ValueError that names the file, the line and what is wrong."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected the table of pytest bench/ --benchmark --bench-csv")
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in _COLUMNS if name not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(f"{path} has no column {missing[0]}; expected {', '.join(_COLUMNS)}")
        rows = [_row(path, reader.line_num, record) for record in reader]
    if not rows:
        raise ValueError(f"{path} has no rows; expected at least one case")
    return rows


def _row(path: Path, line: int, record: dict[str, str]) -> Row:
    values: dict[str, str | float] = {}
    for field in fields(Row):
        text = record[field.name]
        if text is None:
            raise ValueError(f"{path} line {line} ends before {field.name}; expected {len(_COLUMNS)} values")
        try:
            values[field.name] = text if field.type == "str" else float(text) if text else math.nan
        except ValueError:
            raise ValueError(f"{path} line {line}: {field.name} is {text!r}; expected a number") from None
    return Row(**values)  # type: ignore[arg-type]


def cases(rows: Sequence[Row]) -> list[Case]:
    """In the order of the table; those without ours or without a peer are left out."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.case != ABSENT:
            found.setdefault((row.op, row.case), []).append(row)
    grouped = [Case(tuple(group)) for group in found.values()]
    return [case for case in grouped if case.peers and len(case.peers) < len(case.rows)]


def absent(rows: Sequence[Row]) -> list[str]:
    """Peers that were not installed."""
    return [row.contender for row in rows if row.case == ABSENT]


@dataclass(frozen=True)
class Change:
    """A case in two runs. Both ratios are to the strongest peer that ran in both."""

    case: Case
    before: float
    now: float

    @property
    def factor(self) -> float:
        return self.now / self.before

    def fell(self, tolerance: float) -> bool:
        """Whether the ratio lost more than the share `tolerance` of itself, or is no number any more."""
        return not self.factor >= 1 - tolerance


def changes(baseline: Sequence[Row], results: Sequence[Row]) -> list[Change]:
    """Every case of both tables, in the order of `results`. Times are not compared: two runs need not have had the
    same machine for themselves."""
    before = {(case.ours.op, case.name): case for case in cases(baseline)}
    found = []
    for case in cases(results):
        old = before.get((case.ours.op, case.name))
        if old is not None:
            common = {row.contender for row in old.peers} & {row.contender for row in case.peers}
            if common:
                found.append(Change(case, old.ratio_to(common), case.ratio_to(common)))
    return found


_COLUMNS = [field.name for field in fields(Row)]
