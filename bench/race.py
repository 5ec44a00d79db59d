"""Timing of several functions that compute the same thing, interleaved in one run, and the ceilings of the machine.

A shared machine has slow and fast seconds: contenders take turns in short rounds, so that all of them see both, and the
median of their rounds is compared.
"""

from __future__ import annotations

import ctypes
import functools
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

Function = Callable[[], object]
ROUND = 0.02  # seconds that a contender runs at a time, at least one call


@dataclass(frozen=True)
class Result:
    """Seconds per call, and the work that one call does."""

    case: str
    seconds: dict[str, float]
    spread: dict[str, float]  # interquartile range over median
    flops: float
    bytes: float
    goal: float | None

    @property
    def ours(self) -> float:
        return self.seconds["genrec"]

    @property
    def best_peer(self) -> str:
        return min((name for name in self.seconds if name != "genrec"), key=self.seconds.__getitem__)

    @property
    def ratio(self) -> float:
        """How many times the strongest peer takes what we take."""
        return self.seconds[self.best_peer] / self.ours

    @property
    def share(self) -> float:
        """Of what the machine's own matmul and copy would take for the same FLOPs and bytes, one after the other."""
        return max(self.flops / matmul_rate(), self.bytes / copy_rate()) / self.ours


def passes(
    forms: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]], inputs: list[Tensor], backward: bool
) -> dict[str, Function]:
    """Calls without arguments: each form's output, and, if `backward`, the gradients of half its sum of squares."""

    def bind(form: Callable[..., Tensor | tuple[Tensor, ...]]) -> Function:
        leaves = [x.detach().requires_grad_(backward) for x in inputs]

        def call() -> list[Tensor]:
            out = form(*leaves)
            outputs = [out] if isinstance(out, Tensor) else list(out)
            grads = torch.autograd.grad(outputs, leaves, [x.detach() for x in outputs]) if backward else ()
            return [*(x.detach() for x in outputs), *grads]

        return call

    return {name: bind(form) for name, form in forms.items()}


def race(
    contenders: dict[str, Function], seconds: float, within: dict[str, Callable[[], AbstractContextManager[None]]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds per call of every contender, and their spread; about `seconds` for each. The rounds of a contender
    named in `within` run in that context."""
    entered = {name: within.get(name, nullcontext) for name in contenders}
    calls = {}
    for name, function in contenders.items():
        with entered[name]():
            calls[name] = _calls_per_round(function)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds * len(contenders)
    while time.perf_counter() < end or len(times["genrec"]) < 5:
        for name, function in contenders.items():
            with entered[name]():
                start = time.perf_counter()
                for _ in range(calls[name]):
                    function()
                _finish()
                times[name].append((time.perf_counter() - start) / calls[name])
    medians = {name: statistics.median(rounds) for name, rounds in times.items()}
    quartiles = {name: statistics.quantiles(rounds, n=4) for name, rounds in times.items()}
    return medians, {name: (q[2] - q[0]) / medians[name] for name, q in quartiles.items()}


def _calls_per_round(function: Function) -> int:
    function()
    _finish()
    start = time.perf_counter()
    function()
    _finish()
    return max(1, round(ROUND / (time.perf_counter() - start)))


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def keep_freed_memory() -> None:
    """Let the C library keep what tensors free. It would map tensors of 32 MB and more anew for every call, and then
    the page faults take longer than a norm, whoever computes it."""
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_max, 0)


@functools.cache
def matmul_rate() -> float:
    """FLOP/s of torch's float32 matrix product here, with the threads that torch has now."""
    a, b = torch.randn(2, 1536, 1536)
    return 2 * 1536**3 / _best(lambda: a @ b)


@functools.cache
def copy_rate() -> float:
    """Bytes read and written per second by a copy larger than the caches."""
    source = torch.randn(1 << 25)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source))


def _best(function: Function) -> float:
    function()
    times = []
    for _ in range(20):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)
