"""How the Triton kernels are launched: configurations come from a small table beside the kernels, never from a search
at run time, and every launch goes through `launch`, so that compilation without a GPU sees exactly what runs with one.

`launch.csv` of an operator has one row per kernel, architecture and shape class. Lower-case columns are what a launch
is looked up by, the others are what it gets: constants of the kernel (upper case), num_warps, num_stages and, where the
assembler would rather spill than use more registers, maxnreg.

    kernel,arch,dtype,dim,BLOCK_M,BLOCK_N,num_warps,num_stages
    forward,80,fp16,64,128,64,4,3

A row serves its architecture and later ones up to the next row, every dtype if it says `*`, and sizes up to its own;
sizes beyond the last row take the last.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
INTERPRETED = 80  # the rows that the interpreter runs with
OPTIONS = ("num_warps", "num_stages", "maxnreg")

Recorder = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]


class Target(NamedTuple):
    """Compilation for an architecture instead of launching."""

    arch: int
    record: Recorder


target: Target | None = None  # set by genrec.kernels.compilation


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """kernel[grid](*args, **constants) on the device of the first tensor; an empty grid launches nothing."""
    if target is not None:
        target.record(kernel, grid, args, constants)
    elif 0 not in grid:
        device = _device_of(args)
        if device < 0 or device == torch.cuda.current_device():
            kernel[grid](*args, **constants)
        else:
            with torch.cuda.device(device):
                kernel[grid](*args, **constants)


def _device_of(args: tuple[Any, ...]) -> int:
    """The index of the GPU, -1 for the CPU."""
    for arg in args:
        if isinstance(arg, Tensor):
            return arg.get_device()
    raise TypeError("a kernel is launched without a tensor; expected one, whose device it runs on")


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def architecture(device: torch.device) -> int:
    """80 for sm_80, and so on."""
    if target is not None:
        return target.arch
    return _capability(device) if device.type == "cuda" else INTERPRETED


class Table:
    """The launch table of one operator."""

    def __init__(self, path: Path) -> None:
        with open(path, newline="") as file:
            self.rows = [dict(row) for row in csv.DictReader(file)]
        self.path = path
        self.found: dict[tuple[Any, ...], tuple[dict[str, str], dict[str, int]]] = {}  # clear it after changing a row

    def config(self, kernel: str, tensor: Tensor, **sizes: int) -> dict[str, int]:
        """The launch of `kernel` for the tensor's device and dtype and the sizes that the table asks for."""
        key = (kernel, tensor.dtype, target.arch if target else tensor.get_device(), *sizes.items())
        if key not in self.found:
            row = self.row(kernel, architecture(tensor.device), DTYPES[tensor.dtype], sizes)
            self.found[key] = row, launch_of(row)
        return self.found[key][1]

    def row(self, kernel: str, arch: int, dtype: str, sizes: dict[str, int]) -> dict[str, str]:
        rows = serving(self.rows, kernel, arch, dtype)
        for name, size in sizes.items():
            values = {int(row[name]) for row in rows}
            nearest = min((v for v in values if v >= size), default=max(values, default=0))
            rows = [row for row in rows if int(row[name]) == nearest]
        if len(rows) != 1:
            raise LookupError(f"{len(rows)} launches of {kernel} for sm_{arch}, {dtype}, {sizes}; expected one")
        return rows[0]


def serving(rows: list[dict[str, str]], kernel: str, arch: int, dtype: str) -> list[dict[str, str]]:
    """The rows of the newest architecture that is not newer than `arch`; of the oldest, where all are newer."""
    rows = [row for row in rows if row["kernel"] == kernel and row["dtype"] in ("*", dtype)]
    archs = {int(row["arch"]) for row in rows}
    newest = max((a for a in archs if a <= arch), default=min(archs, default=0))
    return [row for row in rows if int(row["arch"]) == newest]


def launch_of(row: dict[str, str]) -> dict[str, int]:
    """The constants and options of a row; empty cells are left to the kernel."""
    return {name: int(value) for name, value in row.items() if value and not looks_up(name)}


def looks_up(column: str) -> bool:
    return column.islower() and column not in OPTIONS
