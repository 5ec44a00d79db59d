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
from typing import Any

import torch
from torch import Tensor

Function = Callable[[], object]
ROUND = 0.02  # seconds that a contender runs at a time, at least one call


@dataclass(frozen=True)
class Result:
    """Seconds per call in every round of every contender, and the work that one call does."""

    case: str
    rounds: dict[str, list[float]]
    flops: float
    bytes: float
    goal: float | None

    @functools.cached_property
    def seconds(self) -> dict[str, float]:
        """The median of each."""
        return {name: statistics.median(rounds) for name, rounds in self.rounds.items()}

    def spread(self, name: str) -> float:
        """Interquartile range over median."""
        low, _, high = statistics.quantiles(self.rounds[name], n=4)
        return (high - low) / self.seconds[name]

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
    benchmark: Any,
    contenders: dict[str, Function],
    seconds: float,
    within: dict[str, Callable[[], AbstractContextManager[None]]],
) -> dict[str, list[float]]:
    """Seconds per call in every round of every contender, about `seconds` for each. pytest-benchmark's `benchmark`
    times "genrec", and before each of its rounds every peer has one. Contenders in `within` run in that context."""
    entered = {name: within.get(name, nullcontext) for name in contenders}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    calls, total = {}, 0.0
    for name, function in contenders.items():
        with entered[name]():
            function()
            once = _seconds(function, 1)
        calls[name] = max(1, round(ROUND / once))
        total += calls[name] * once

    def round_of(name: str) -> float:
        with entered[name]():
            return _seconds(contenders[name], calls[name]) / calls[name]

    def peers() -> None:
        for name in contenders:
            if name != "genrec":
                times[name].append(round_of(name))

    rounds = max(5, round(seconds * len(contenders) / total))
    benchmark.extra_info["calls_per_round"] = calls["genrec"]
    benchmark.pedantic(round_of, ("genrec",), setup=peers, rounds=rounds)
    times["genrec"] = [t / calls["genrec"] for t in benchmark.stats.stats.data]
    return times


def _seconds(function: Function, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _finish()
    return time.perf_counter() - start


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
