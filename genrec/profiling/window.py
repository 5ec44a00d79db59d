"""One window, three ways to look at it: Nsight Systems, Nsight Compute, or torch.profiler; and always the table.

Under Nsight the command starts itself once more as the profiler's child. The profiler records while the NVTX range
"window" is open, so that neither set-up nor warm-up is in its report.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from genrec.data.files import atomic_file
from genrec.kernels.ranges import span
from genrec.profiling.recorder import Recorder, Row, by_name, recording, rows, table, write_csv

Tool = Literal["auto", "nsys", "ncu", "torch"]
INSIDE = "GENREC_PROFILED_BY"  # the environment variable that tells the child so
NSIGHT = {
    "nsys": (
        *("profile", "--trace=cuda,nvtx,cublas,osrt", "--capture-range=nvtx", "--nvtx-capture=window@genrec"),
        *("--capture-range-end=stop", "--env-var=NSYS_NVTX_PROFILER_REGISTER_ONLY=0", "--force-overwrite=true"),
    ),
    "ncu": ("--nvtx", "--nvtx-include", "genrec@window/", "--set", "full", "--force-overwrite"),
}
SUFFIX = {"nsys": ".nsys-rep", "ncu": ".ncu-rep"}
TRACED = 3  # repetitions in the trace of torch.profiler: enough to see, and small enough to open


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """What every window can be told."""

    steps: int = 10
    """repetitions inside the window"""
    warmup: int = 3
    """repetitions before it"""
    tool: Tool = "auto"
    """nsys, ncu, torch, or auto: the Nsight tool that is on PATH, else torch.profiler"""

    def check(self) -> None:
        """Raises ValueError for a window without repetitions or a tool that is not there."""
        if self.steps < 1 or self.warmup < 0:
            raise ValueError(f"steps is {self.steps} and warmup {self.warmup}; expected at least 1 and at least 0")
        if self.tool in NSIGHT and shutil.which(self.tool) is None:
            raise ValueError(f"tool is {self.tool}, which is not on PATH; expected it there, or --tool torch")


def nsight_tool(config: WindowConfig, preferred: tuple[str, ...]) -> str | None:
    """The Nsight tool that shall start this window; None inside of one, and where torch.profiler is meant."""
    if os.environ.get(INSIDE) or config.tool == "torch":
        return None
    names = preferred if config.tool == "auto" else (config.tool,)
    return next((name for name in names if shutil.which(name)), None)


def relaunch(tool: str, kind: str, config: Any, report: Path) -> None:
    """Run `genrec profile <kind>` with this configuration as a child of the profiler, which writes `report`.

    Raises OSError with the profiler's exit code where it fails, and leaves no report then.
    """
    temporary = report.with_name(f".tmp-{report.name}")
    with atomic_file(report.with_name(f".{kind}.json")) as settings:
        settings.write_text(json.dumps(asdict(config), default=str))
        genrec = [sys.executable, "-m", "genrec", "profile", kind, "--config", str(settings)]
        command = [tool, *NSIGHT[tool], {"nsys": "--output", "ncu": "--export"}[tool], str(temporary), *genrec]
        done = subprocess.run(command, env={**os.environ, INSIDE: tool}, check=False)
    report.with_name(f".{kind}.json").unlink()
    if done.returncode or not temporary.exists():
        temporary.unlink(missing_ok=True)
        raise OSError(f"{tool} ended with exit code {done.returncode} and no report; its own words are above")
    temporary.replace(report)


def run_window(name: str, step: Callable[[int], object], config: WindowConfig, out: Path, device: torch.device) -> None:
    """Warm up, run the window, print where the time went, write <out>/<name>.ranges.csv and, where no profiler does
    better, <out>/<name>.trace.json.gz for Perfetto. step(i) is the i-th repetition."""
    for i in range(config.warmup):
        step(i)
    window, *found = _recorded(step, range(config.warmup, config.warmup + config.steps), device)
    found = [replace(row, depth=row.depth - 1) for row in found]
    console = Console()
    each = window.seconds / config.steps * 1e3
    console.print(table(f"{name}: {each:.1f} ms a step, mean of {config.steps}", found, window.seconds, config.steps))
    if any(row.depth for row in found):
        console.print(table("the same by name", by_name(found), window.seconds, config.steps))
    write_csv(out / f"{name}.ranges.csv", found)
    print(f"table → {out / f'{name}.ranges.csv'}")
    if not os.environ.get(INSIDE):
        trace = out / f"{name}.trace.json.gz"
        _trace(step, range(min(TRACED, config.steps)), device, trace)
        print(f"trace → {trace}, for https://ui.perfetto.dev")


def _recorded(step: Callable[[int], object], numbers: range, device: torch.device) -> list[Row]:
    recorder = Recorder(device)
    with recording(recorder), span("window"):
        for i in numbers:
            step(i)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return list(rows(recorder.finish()))


def _trace(step: Callable[[int], object], numbers: range, device: torch.device, path: Path) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        _recorded(step, numbers, device)
    with atomic_file(path) as temporary:
        named = temporary.with_name(f"{temporary.name}.json.gz")  # torch compresses where the name says so
        profiler.export_chrome_trace(str(named))
        named.replace(temporary)
