"""A table of a benchmark run, small enough to be checked by hand."""

import math

import pytest

from genrec.benchmarks.results import ABSENT, Row


def row(op, case, contender, seconds, **changes):
    values = {
        "series": "", "axis": "", "at": math.nan, "spread": 0.1, "flops": math.nan, "bytes": math.nan,
        "memory": math.nan, "goal": math.nan, "matmul_rate": 1e11, "copy_rate": 2e10, "device": "a CPU", "threads": 2,
        "torch": "2.13.0", "date": "2026-01-01",
    }  # fmt: skip
    return Row(op=op, case=case, contender=contender, seconds=seconds, **{**values, **changes})


@pytest.fixture
def rows():
    """One operator along an axis, forward and backward, one training step, one race that is no comparison."""
    found = []
    for n in (64, 256, 1024):
        for way, slower in (("", 1.0), (" with backward", 3.0)):
            series = {"series": f"norm{way}", "axis": "width", "at": n, "flops": 7e3 * n, "bytes": 8e3 * n, "goal": 3.0}
            case = f"norm 1000×{n}{way}"
            found.append(row("group_layer_norm", case, "genrec", 1e-6 * n * slower, memory=4e6, **series))
            found.append(row("group_layer_norm", case, "eager", 2e-6 * n * slower, memory=8e6, **series))
            found.append(row("group_layer_norm", case, "compiled", 1.5e-6 * n * slower, memory=6e6, **series))
    found.append(row("training", "training step", "genrec", 0.2))
    found.append(row("training", "training step", "plain", 0.1))
    found.append(row("overhead", "smallest call", "genrec", 1e-5))
    found.append(row("overhead", "smallest call", "ATen", 2e-6))
    found.append(row("training", "alone", "genrec", 0.2))
    found.append(row("", ABSENT, "faiss-cpu", math.nan))
    return found
