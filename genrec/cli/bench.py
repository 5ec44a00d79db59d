"""What a benchmark run says: a page of charts, and whether anything became slower.

pytest bench/ --benchmark --bench-csv now.csv
genrec bench report  --results now.csv --out bench.html --baseline bench/results/cpu-zen3/2026-11-23.csv
genrec bench compare --results now.csv --baseline bench/results/cpu-zen3/2026-11-23.csv

Runs are compared by the ratio to the strongest peer that is in both, never by time: it survives a slower machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from genrec.benchmarks.page import write_chart, write_page
from genrec.benchmarks.results import Change, changes, read_results


@dataclass(frozen=True)
class Report:
    """The page."""

    results: Path
    """table that pytest bench/ --benchmark --bench-csv wrote"""
    out: Path = Path("bench.html")
    """page to write"""
    baseline: Path | None = None
    """table of a run to compare with"""
    tolerance: float = 0.3
    """share of itself that a ratio may move by before the page says so"""
    chart: Path | None = None
    """also write the overview alone, as an SVG"""


@dataclass(frozen=True)
class Compare:
    """The check."""

    results: Path
    """table of the run to be judged"""
    baseline: Path
    """table of the run before"""
    tolerance: float = 0.3
    """share of itself that a ratio may fall by"""


COMMANDS = {"report": Report, "compare": Compare}


def run(config: Report | Compare) -> None:
    """Write the page, or print what moved; ValueError where a ratio fell."""
    if not 0 < config.tolerance < 1:
        raise ValueError(f"tolerance is {config.tolerance}; expected a share between 0 and 1")
    results = read_results(config.results)
    baseline = read_results(config.baseline) if config.baseline else []
    if isinstance(config, Compare):
        _compare(changes(baseline, results), config.tolerance)
        return
    write_page(config.out, results, baseline, config.tolerance)
    print(f"page → {config.out}")
    if config.chart:
        write_chart(config.chart, results)
        print(f"chart → {config.chart}")


def _compare(found: list[Change], tolerance: float) -> None:
    if not found:
        raise ValueError("the two tables have no case and peer in common; expected at least one")
    table = Table(box=SIMPLE_HEAD)
    table.add_column("case", overflow="fold")
    for heading in ("before", "now", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for change in sorted(found, key=lambda change: change.factor):
        style = "red" if change.fell(tolerance) else None
        numbers = f"{change.before:.2f}×", f"{change.now:.2f}×", f"{change.factor - 1:+.0%}"
        table.add_row(change.case.name, *numbers, style=style)
    Console().print(table)
    fell = [change.case.name for change in found if change.fell(tolerance)]
    if fell:
        raise ValueError(f"{len(fell)} of {len(found)} ratios fell by more than {tolerance:.0%}, first {fell[0]}")
    print(f"none of {len(found)} ratios fell by more than {tolerance:.0%}")
