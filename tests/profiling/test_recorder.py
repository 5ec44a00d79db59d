"""The table of a window: what was inside what, how often, and for how long."""

import csv
import threading

import pytest
import torch

from genrec.kernels.ranges import SINKS, span
from genrec.profiling import recorder as module
from genrec.profiling.recorder import Recorder, by_name, recording, rows, write_csv


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def work(seconds):
        now[0] += seconds

    return work


def record(run):
    recorder = Recorder(torch.device("cpu"))
    with recording(recorder):
        run()
    return list(rows(recorder.finish()))


def test_times_and_own_times(clock):
    def run():
        for step in range(2):
            with span("step", number=step):
                clock(1.0)
                with span("inner", x=torch.ones(3, 4), books=[torch.ones(2, 5)] * 2):
                    clock(2.0)
                    with span("leaf"):
                        clock(4.0)
                with span("leaf"):
                    clock(0.5)

    found = record(run)
    assert [(row.depth, row.name, row.calls, row.seconds, row.own) for row in found] == [
        (0, "step", 2, 15.0, 2.0),
        (1, "inner", 2, 12.0, 4.0),
        (2, "leaf", 2, 8.0, 8.0),
        (1, "leaf", 2, 1.0, 1.0),
    ]
    assert found[0].values == "number=1"
    assert found[1].values == "x=3×4 books=[2×5, 2×5]"
    assert [(row.name, row.calls, row.own) for row in by_name(found)] == [
        ("leaf", 4, 9.0),
        ("inner", 2, 4.0),
        ("step", 2, 2.0),
    ]
    assert sum(row.own for row in found) == 15.0


def test_a_range_of_another_thread_stands_in_what_the_main_thread_waits_in(clock):
    """Autograd runs the backward pass of a GPU in threads of its own."""

    def run():
        with span("backward"):

            def elsewhere():
                with span("operator"):
                    clock(1.0)

            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()

    assert [(row.depth, row.name) for row in record(run)] == [(0, "backward"), (1, "operator")]


def test_nothing_is_recorded_outside(clock):
    with pytest.raises(KeyError), recording(Recorder(torch.device("cpu"))):
        raise KeyError
    assert SINKS == []


def test_the_file_has_every_row(clock, tmp_path):
    def run():
        with span("step"), span("inner", x=torch.ones(3)):
            clock(0.25)

    write_csv(tmp_path / "table.csv", record(run))
    with open(tmp_path / "table.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["range"] for row in table] == ["step", "inner"]
    assert (float(table[1]["seconds"]), float(table[0]["own_seconds"]), table[1]["shapes"]) == (0.25, 0.0, "x=3")
