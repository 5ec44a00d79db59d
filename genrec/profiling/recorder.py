"""How long every range of genrec.kernels.ranges took: what a profiler's timeline shows, as a table."""

from __future__ import annotations

import csv
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from genrec.data.files import atomic_file
from genrec.kernels.ranges import SINKS, Values


@dataclass
class Node:
    """All calls of one range inside one parent. `seconds` by the host's clock; `device_seconds` between the moments at
    which the GPU reached its begin and its end, 0 on the CPU."""

    name: str
    calls: int = 0
    seconds: float = 0.0
    device_seconds: float = 0.0
    values: Values = field(default_factory=dict)  # of the latest call
    children: dict[str, Node] = field(default_factory=dict)

    def child(self, name: str) -> Node:
        return self.children.setdefault(name, Node(name))


class Recorder:
    """A sink of ranges. It also opens torch.profiler's ranges, so that its trace shows them with their shapes."""

    def __init__(self, device: torch.device) -> None:
        self.root, self.cuda = Node(""), device.type == "cuda"
        self.main = threading.get_ident()
        self.open: dict[int, list[tuple[Node, float, Any, Any]]] = {self.main: []}  # by thread
        self.events: list[tuple[Node, Any, Any]] = []

    def push(self, name: str, values: Values) -> None:
        node = self._here().child(name)
        node.values = values
        shown = torch.profiler.record_function(name, " ".join(f"{key}={value}" for key, value in values.items()))
        shown.__enter__()
        event = self._event()
        self.open.setdefault(threading.get_ident(), []).append((node, time.perf_counter(), event, shown))

    def pop(self) -> None:
        end = time.perf_counter()
        node, begin, event, shown = self.open[threading.get_ident()].pop()
        if event is not None:
            self.events.append((node, event, self._event()))
        node.calls += 1
        node.seconds += end - begin
        shown.__exit__(None, None, None)

    def _here(self) -> Node:
        """The innermost open range; that of the main thread for the threads that autograd starts."""
        for thread in (threading.get_ident(), self.main):
            if self.open.get(thread):
                return self.open[thread][-1][0]
        return self.root

    def _event(self) -> Any:
        if not self.cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def finish(self) -> Node:
        """The root of the ranges, when all of them are closed."""
        if self.cuda:
            torch.cuda.synchronize()
        for node, begin, end in self.events:
            node.device_seconds += begin.elapsed_time(end) / 1e3
        self.events.clear()
        return self.root


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Ranges go to `recorder` as well, inside the block."""
    SINKS.append(recorder)
    try:
        yield
    finally:
        SINKS.remove(recorder)


@dataclass(frozen=True)
class Row:
    """A line of the table; `own` is what no range inside of this one took."""

    depth: int
    name: str
    calls: int
    seconds: float
    own: float
    device_seconds: float
    values: str


def rows(node: Node, depth: int = 0) -> Iterator[Row]:
    """Every range below `node`, outer before inner, longest first."""
    for child in sorted(node.children.values(), key=lambda child: -child.seconds):
        inside = sum(grandchild.seconds for grandchild in child.children.values())
        values = " ".join(f"{key}={_short(value)}" for key, value in child.values.items())
        own = max(child.seconds - inside, 0.0)
        yield Row(depth, child.name, child.calls, child.seconds, own, child.device_seconds, values)
        yield from rows(child, depth + 1)


def _short(value: Any) -> str:
    """A shape as 2×4×64."""
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return "×".join(map(str, value)) if isinstance(value, tuple) else str(value)


def by_name(found: list[Row]) -> list[Row]:
    """One line for each name, wherever it stands; by the time that no range inside took, longest first."""
    total: dict[str, Row] = {}
    for row in found:
        one = total.get(row.name, Row(0, row.name, 0, 0.0, 0.0, 0.0, ""))
        total[row.name] = Row(
            0, row.name, one.calls + row.calls, one.seconds + row.seconds, one.own + row.own,
            one.device_seconds + row.device_seconds, "",
        )  # fmt: skip
    return sorted(total.values(), key=lambda row: -row.own)


def table(title: str, found: list[Row], whole: float, times: int) -> Table:
    """Milliseconds for each of `times` repetitions, which took `whole` seconds together."""
    device = any(row.device_seconds for row in found)
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    shown.add_column("range", no_wrap=True)
    for heading in ("calls", "ms", *(["GPU ms"] if device else []), "own ms", "own share"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in found:
        on_device = [f"{row.device_seconds / times * 1e3:.2f}"] if device else []
        shown.add_row(
            "  " * row.depth + row.name, f"{row.calls / times:g}", f"{row.seconds / times * 1e3:.2f}", *on_device,
            f"{row.own / times * 1e3:.2f}", f"{row.own / whole:.1%}",
        )  # fmt: skip
    return shown


def write_csv(path: Path, found: list[Row]) -> None:
    """The rows as they are, in seconds of the whole window."""
    with atomic_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["depth", "range", "calls", "seconds", "own_seconds", "device_seconds", "shapes"])
        for row in found:
            times = f"{row.seconds:.6g}", f"{row.own:.6g}", f"{row.device_seconds:.6g}"
            writer.writerow([row.depth, row.name, row.calls, *times, row.values])
