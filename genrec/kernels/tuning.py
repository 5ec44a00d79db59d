"""Search the launch tables on this GPU, and rewrite them.

    python -m genrec.kernels.tuning --op moe

Every row of `launch.csv` that serves this architecture is timed on an example that uses it, against the candidates that
the operator's `triton.py` gives in `candidates(row)`, or else `neighbours` here. A candidate must compile within the
limits of genrec.kernels.compilation and compute what the row computes now; the fastest replaces the row.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib
import itertools
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from genrec.kernels import compilation, launch

Row = dict[str, str]
Candidate = dict[str, int]
GAIN = 1.02  # what a candidate must be faster by: repeated timings of one kernel differ by about a percent


class Case(NamedTuple):
    """An example of an operator, by name: its tensors are made where they are needed."""

    module: str
    dtype: torch.dtype
    name: str

    def call(self, device: torch.device | str) -> Callable[[], Any]:
        examples = importlib.import_module(self.module).examples(self.dtype, device)
        return next(call for name, call in examples if name == self.name)


class Trial(NamedTuple):
    """A table with the values of a candidate in row `place`."""

    rows: list[Row]
    place: int
    candidate: Candidate

    def install(self, table: launch.Table) -> None:
        row = self.rows[self.place] | {name: str(value) for name, value in self.candidate.items()}
        table.rows = [*self.rows[: self.place], row, *self.rows[self.place + 1 :]]
        table.found.clear()


def own_rows(rows: list[Row], arch: int) -> list[Row]:
    """The rows, with copies for `arch` of the older ones that serve it; by kernel, then by architecture."""
    copies = []
    for row in rows:
        if int(row["arch"]) != arch:
            served = [d for d in launch.DTYPES.values() if row in launch.serving(rows, row["kernel"], arch, d)]
            dtypes = ["*"] if len(served) == len(launch.DTYPES) else served
            copies += [row | {"arch": str(arch), "dtype": dtype} for dtype in dtypes]
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    return sorted([*rows, *copies], key=lambda row: (kernels.index(row["kernel"]), int(row["arch"])))


def neighbours(row: Row) -> Iterator[Candidate]:
    """Each BLOCK_* halved, kept and doubled, with 4 or 8 warps and 2 to 4 stages."""
    choices: dict[str, list[int]] = {}
    for name, value in row.items():
        if name.startswith("BLOCK") and value:
            choices[name] = [size for size in (int(value) // 2, int(value), int(value) * 2) if size >= 16]
        elif name in ("num_warps", "num_stages") and value:
            choices[name] = [4, 8] if name == "num_warps" else [2, 3, 4]
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def users(table: launch.Table, module: str, arch: int) -> list[list[Case]]:
    """For every row of the table, the examples that are launched with it on sm_<arch>."""
    cases: list[list[Case]] = [[] for _ in table.rows]
    launch.target = launch.Target(arch, lambda *_: None)
    try:
        for dtype in launch.DTYPES:
            for name, call in importlib.import_module(module).examples(dtype):
                table.found.clear()
                call()
                used = {id(row) for row, _ in table.found.values()}
                for row, its_cases in zip(table.rows, cases, strict=True):
                    if id(row) in used:
                        its_cases.append(Case(module, dtype, name))
    finally:
        launch.target = None
    return cases


@dataclass
class Tuner:
    device: torch.device
    timer: Callable[[Callable[[], Any]], float]  # milliseconds of a call
    fits: Callable[[Sequence[Trial], Case], Iterable[bool]]  # whether each trial compiles within the limits

    def tune(self, module: str) -> Iterator[str]:
        """Tune every row that this device uses, and save the table after each; yields a line of text per row."""
        operator = importlib.import_module(module)
        table, arch = operator.TABLE, launch.architecture(self.device)
        candidates = getattr(operator, "candidates", neighbours)
        table.rows = own_rows(table.rows, arch)
        for place, cases in enumerate(users(table, module, arch)):
            row = table.rows[place]
            if int(row["arch"]) == arch:
                trials = [Trial(table.rows, place, candidate) for candidate in candidates(row)]
                result = self._best(table, place, trials, cases) if cases else "no example uses it; left as it is"
                save(table)
                names = [value for name, value in row.items() if value and launch.looks_up(name)]
                yield f"{' '.join(names)}: {result}"

    def _best(self, table: launch.Table, place: int, trials: list[Trial], cases: list[Case]) -> str:
        """Leave the fastest right trial in the table. The first case ranks them; the winner must do in all."""
        now = Trial(table.rows, place, {})
        trials = list(itertools.compress(trials, self.fits(trials, cases[0])))
        call = cases[0].call(self.device)
        times = []
        for trial in (now, *trials):
            trial.install(table)
            times.append(self.timer(call))
        for time, trial in sorted(zip(times[1:], trials, strict=True), key=lambda timed: timed[0]):
            if time * GAIN < times[0] and all(self._does(table, now, trial, case) for case in cases):
                trial.install(table)
                values = ", ".join(f"{name} {value}" for name, value in trial.candidate.items())
                return f"{times[0]:.4g} → {time:.4g} ms with {values}"
        now.install(table)
        return f"{times[0]:.4g} ms, not beaten by {len(trials)} others"

    def _does(self, table: launch.Table, now: Trial, trial: Trial, case: Case) -> bool:
        """Whether the trial fits the case and computes what the row computes now, but for rounding."""
        if not all(self.fits([trial], case)):
            return False
        call = case.call(self.device)
        now.install(table)
        expected = tree_leaves(call())
        trial.install(table)
        return all(_close(y, e) for y, e in zip(tree_leaves(call()), expected, strict=True) if isinstance(e, Tensor))


def _close(actual: Tensor, expected: Tensor) -> bool:
    """Up to sums in another order and, in integers, the near-ties that these decide."""
    if not expected.dtype.is_floating_point:
        return bool((actual != expected).sum() <= expected.numel() / 1000)
    tolerance = torch.finfo(expected.dtype).eps ** 0.5 * expected.abs().nan_to_num().amax() if expected.numel() else 0
    return torch.allclose(actual, expected, rtol=0, atol=float(tolerance), equal_nan=True)


def save(table: launch.Table) -> None:
    """Write the table back, whole or not at all."""
    path = table.path.with_suffix(".csv.new")
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(table.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table.rows)
    path.replace(table.path)


def compiles(trial: Trial, case: Case, arch: int) -> bool:
    """Whether all that the case launches compiles within the limits; for a process of its own."""
    operator = importlib.import_module(case.module)
    trial.install(operator.TABLE)
    try:
        images = compilation.compiled(case.name, case.call("meta"), arch)
    except Exception:  # Triton has many ways to say that tiles are too large, or of an impossible shape
        return False
    found = compilation.resources(case.module, launch.DTYPES[case.dtype], images)
    return not any(fault for one in found for fault in compilation.faults(one, getattr(operator, "EXACT", ())))


def main(arguments: Sequence[str] | None = None) -> int:
    operators = compilation.operators()
    parser = argparse.ArgumentParser(prog="python -m genrec.kernels.tuning", description="Tune the launch tables.")
    parser.add_argument("--op", nargs="+", default=operators, choices=operators, help="default: all")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tuning: no CUDA device found; expected one", file=sys.stderr)
        return 2
    if reason := compilation.obstacle():
        print(reason, file=sys.stderr)
        return 2
    from triton.testing import do_bench

    device = torch.device("cuda", torch.cuda.current_device())
    arch = launch.architecture(device)
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:

        def timer(call: Callable[[], Any]) -> float:
            return do_bench(call, return_mode="median")

        def fits(trials: Sequence[Trial], case: Case) -> Iterable[bool]:
            return pool.map(functools.partial(compiles, case=case, arch=arch), trials)

        for name in options.op:
            for line in Tuner(device, timer, fits).tune(f"genrec.kernels.{name}.triton"):
                print(name, line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
