"""How much memory a call takes at its peak.

On a GPU torch's allocator knows. On a CPU the kernel knows the most that a process ever had resident and forgets it on
request. This needs an allocator that gives freed memory back at once: memory is measured in a child process that
measures nothing else.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

# Every tensor in a mapping of its own, gone when it is freed; a heap that shrinks with every free would take minutes.
FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}
Memory = dict[str, dict[str, int]]  # case → contender → bytes


def peak_memory(function: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call of `function` takes above what is taken before it; its result counts, its arguments do not."""
    function()  # what is kept from the first call on is not the call's
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        del result
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak, see proc(5)
    before = _status("VmRSS")
    result = function()
    del result
    return max(_status("VmHWM") - before, 0)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def measured_in_child(arguments: list[str]) -> Memory:
    """Run the same benchmarks in a process that measures their memory; empty on systems without /proc. Cases that fail
    there are left out; RuntimeError where it brings nothing home."""
    if not sys.platform.startswith("linux"):
        return {}
    with TemporaryDirectory() as directory:
        path = Path(directory) / "memory.json"
        command = [sys.executable, "-m", "pytest", *arguments, "--bench-memory", str(path), "-p", "no:cacheprovider"]
        environment = {**os.environ, **FREED_AT_ONCE}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if not path.exists():
            raise RuntimeError(f"exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return json.loads(path.read_text())
