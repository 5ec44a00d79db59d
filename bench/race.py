"""Timing of several functions that compute the same thing, interleaved in one run, and the ceilings of the device.

A shared machine has slow and fast seconds: contenders take turns in short rounds, so that all of them see both, and the
median of their rounds is compared.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

Function = Callable[[], object]
Contexts = dict[str, Callable[[], AbstractContextManager[None]]]
ROUND = 0.02  # seconds that a contender runs at a time, at least one call
ROUNDS = 5  # at least
ROTATED = 1 << 28  # bytes: several times the last level of any cache
MOST_COPIES = 64  # what is small even then is bound by its call


def passes(
    forms: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]],
    inputs: list[Tensor],
    backward: bool,
    rotated: bool = False,
) -> dict[str, Function]:
    """Calls without arguments: each form's output, and, if `backward`, the gradients of half its sum of squares.

    `rotated`, for what is bound by memory: every call takes the next of several copies of the inputs, which together
    are larger than any cache."""
    size = sum(x.nbytes for x in inputs)
    copies = min(max(1, ROTATED // size), MOST_COPIES) if rotated else 1
    sets = [inputs, *([x.clone() for x in inputs] for _ in range(copies - 1))]

    def bind(form: Callable[..., Tensor | tuple[Tensor, ...]]) -> Function:
        turns = itertools.cycle([[x.detach().requires_grad_(backward) for x in one] for one in sets])

        def call() -> list[Tensor]:
            leaves = next(turns)
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
    within: Contexts,
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

    rounds = max(ROUNDS, round(seconds * len(contenders) / total))
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


def spread(rounds: list[float]) -> float:
    """Interquartile range over median."""
    low, _, high = statistics.quantiles(rounds, n=4)
    return (high - low) / statistics.median(rounds)


@functools.cache
def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of torch's matrix product there, with the threads that torch has now."""
    n = 1536 if device == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return 2 * n**3 / _best(lambda: a @ b)


@functools.cache
def copy_rate(device: str) -> float:
    """Bytes read and written per second by a copy larger than the caches."""
    source = torch.randn(1 << 25, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source))


def _best(function: Function) -> float:
    function()
    times = []
    for _ in range(20):
        start = time.perf_counter()
        function()
        _finish()
        times.append(time.perf_counter() - start)
    return min(times)
