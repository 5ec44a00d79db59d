"""genrec bench as a user types it, on the table that a short real run wrote."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from genrec.benchmarks.results import cases, read_results
from genrec.cli import main

ROOT = Path(__file__).parents[2]


def benchmark(*arguments):
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark", "--bench-size=smoke", "--bench-op=moe"]
    environment = {name: value for name, value in os.environ.items() if "XDIST" not in name} | {"NO_COLOR": "1"}
    return subprocess.run(
        [*command, "--bench-seconds=0.01", *arguments], cwd=ROOT, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "now.csv"
    done = benchmark(f"--bench-csv={path}")
    assert done.returncode == 0, done.stdout
    assert "strongest peer" in done.stdout
    return path


def test_a_run_measures_time_and_memory(table):
    found = {case.name: case for case in cases(read_results(table))}
    assert set(found) == {"experts 32×64, F 128", "experts 32×64, F 128 with backward", "route 32 tokens"}
    experts = found["experts 32×64, F 128 with backward"]
    assert experts.ours.seconds > 0
    assert experts.ours.memory >= 4 * 16 * 3 * 64 * 128, "at least the gradients of the weights"
    assert experts.ours.copy_rate > 0
    assert len(experts.peers) >= 2


def test_report_and_compare(table, tmp_path, capsys):
    page, chart = tmp_path / "page.html", tmp_path / "chart.svg"
    files = ["--results", str(table), "--baseline", str(table)]
    assert main(["bench", "report", *files, "--out", str(page), "--chart", str(chart)]) == 0
    assert "experts 32×64, F 128" in page.read_text()
    assert chart.read_text().startswith("<svg")
    assert main(["bench", "compare", *files]) == 0
    assert "none of 3 ratios fell" in capsys.readouterr().out


@pytest.fixture
def better(table, tmp_path):
    """A baseline in which genrec was a thousand times as fast: no noise makes up for that."""
    lines = [
        re.sub(r",genrec,([^,]+)", lambda match: f",genrec,{float(match[1]) / 1000:.4g}", line)
        for line in table.read_text().splitlines()
    ]
    path = tmp_path / "better.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_ratio_that_fell_fails(table, better, refused):
    arguments = ["bench", "compare", "--results", str(table), "--baseline", str(better)]
    refused(arguments, 2, "3 of 3 ratios fell by more than 30%, first")
    done = benchmark(f"--bench-baseline={better}")
    assert done.returncode == 1
    assert done.stdout.count("ratio fell: ") == 3


def test_refusals(table, tmp_path, refused):
    empty = tmp_path / "empty.csv"
    empty.touch()
    refused(["bench", "report", "--results", str(empty)], 2, str(empty), "has no column")
    refused(["bench", "compare", "--results", str(table), "--baseline", "none.csv"], 2, "none.csv does not exist")
    refused(["bench", "report", "--results", str(table), "--tolerance", "2"], 2, "tolerance is 2.0")
    assert benchmark(f"--bench-baseline={empty}").returncode != 0
