"""A speed is reported only where the result is right: every case checks its contenders against each other first.

pytest bench                 small cases once, as tests: "smoke"
pytest bench --benchmark     the speeds
    --bench-op NAME          of one operator, or "model" or "overhead": test_bench_<NAME>.py
    --bench-size SIZE        smoke, default or full
    --bench-device DEVICE    cpu, or cuda where there is one
    --bench-threads N, --bench-seconds S, --bench-csv FILE
    --benchmark-json FILE    pytest-benchmark's own format: the rounds of genrec, the peers as extra_info
"""

import csv
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from bench.peers import ABSENT
from bench.race import Result, copy_rate, keep_freed_memory, matmul_rate
from bench.race import race as run_race

RESULTS: list[Result] = []
SIZES = ["smoke", "default", "full"]
OPERATORS = sorted(path.stem.removeprefix("test_bench_") for path in Path(__file__).parent.glob("test_bench_*.py"))


def pytest_addoption(parser):
    group = parser.getgroup("genrec")
    group.addoption("--benchmark", action="store_true", help="measure; without it every case runs once, as a test")
    group.addoption("--bench-op", choices=OPERATORS, action="append", help="only these; may be repeated")
    group.addoption("--bench-size", choices=SIZES, help="smoke is for tests; default takes some seven minutes")
    group.addoption("--bench-device", default="cpu", choices=["cpu", "cuda"], help="where the tensors are")
    group.addoption("--bench-threads", type=int, default=2, help="threads of torch on the CPU")
    group.addoption("--bench-seconds", type=float, default=0.6, help="for each contender of each case")
    group.addoption("--bench-csv", type=Path, help="also write the table to this file")


def pytest_configure(config):
    config.addinivalue_line("markers", "size(name): the smallest --bench-size that runs this case")
    config.option.benchmark_quiet = True  # pytest-benchmark's table has rounds where ours has calls


def size_of(config):
    return config.getoption("--bench-size") or ("default" if config.getoption("--benchmark") else "smoke")


def pytest_collection_modifyitems(config, items):
    largest, operators = SIZES.index(size_of(config)), config.getoption("--bench-op") or OPERATORS
    left_out = []
    for item in items:
        marks = [SIZES.index(mark.args[0]) for mark in item.iter_markers("size")]
        wanted = item.path.stem.removeprefix("test_bench_") in operators
        if not wanted or max(marks, default=0) > largest:
            left_out.append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(autouse=True)
def machine(request):
    device = request.config.getoption("--bench-device")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.exit("--bench-device cuda: torch finds no CUDA device; expected one", returncode=2)
    if device != "cpu":
        torch.set_default_device(device)
    torch.set_num_threads(request.config.getoption("--bench-threads"))
    if sys.platform == "linux":
        keep_freed_memory()


@pytest.fixture
def compiled(request):
    """compiled(name, function): the function compiled for its shape, or for any if `dynamic`, as a contender; none in
    smoke tests, where it takes minutes."""

    def contender(name, function, dynamic=False):
        return {} if size_of(request.config) == "smoke" else {name: torch.compile(function, dynamic=dynamic)}

    return contender


@pytest.fixture
def randn():
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator)


@pytest.fixture
def race(request):
    """race(case, contenders, flops=, bytes=, goal=): "genrec" and its peers, functions without arguments that return
    the same tensors, or tensors whose `measure` is the same; tolerance=None for contenders that compute something
    else. `within` has contexts for some of them."""

    def run(case, contenders, *, flops=0.0, bytes=0.0, goal=None, tolerance=1e-3, within=None, measure=None):
        torch.set_default_device(None)  # it serves to prepare a case, and would slow every call down
        results = {}
        for name, function in contenders.items():
            with (within or {}).get(name, nullcontext)():
                results[name] = measure(function()) if measure else function()
        if tolerance is not None:
            _assert_equal(results, tolerance)
        if request.config.getoption("--benchmark"):
            benchmark, seconds = request.getfixturevalue("benchmark"), request.config.getoption("--bench-seconds")
            RESULTS.append(Result(case, run_race(benchmark, contenders, seconds, within or {}), flops, bytes, goal))
            benchmark.extra_info |= {
                "case": case,
                "median_seconds": RESULTS[-1].seconds,
                "flops": flops,
                "bytes": bytes,
            }

    return run


def _assert_equal(results, tolerance):
    expected = _tensors(next(result for name, result in results.items() if name != "genrec"))
    for name, result in results.items():
        for ours, theirs in zip(_tensors(result), expected, strict=True):
            assert torch.isfinite(ours).all(), name
            assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max(), name


def _tensors(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def pytest_terminal_summary(terminalreporter, config):
    if not RESULTS:
        return
    write = terminalreporter.write_line
    rates = f"matmul {matmul_rate() / 1e9:.0f} GFLOP/s, copy {copy_rate() / 1e9:.1f} GB/s"
    write(f"\n{torch.get_num_threads()} threads: {rates}")
    write(f"{'case':64} {'genrec':>9} {'strongest peer':>24} {'ratio':>7} {'goal':>5} {'share':>6}")
    for r in RESULTS:
        peer = f"{r.best_peer} {_time(r.seconds[r.best_peer])}"
        goal = f"{r.goal:.1f}×" if r.goal else ""
        share = f"{r.share:.0%}" if r.flops or r.bytes else ""
        write(f"{r.case:64} {_time(r.ours):>9} {peer:>24} {r.ratio:6.2f}× {goal:>5} {share:>6}")
    if ABSENT:
        write(f"absent, not installed: {', '.join(sorted(ABSENT))}")
    if path := config.getoption("--bench-csv"):
        _write_csv(path)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds > 1e-3 else f"{seconds * 1e6:.1f} µs"


def _write_csv(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["case", "contender", "seconds", "spread", "flops", "bytes", "matmul_rate", "copy_rate", "threads"]
        )
        for r in RESULTS:
            for name, seconds in r.seconds.items():
                work = f"{r.flops:.4g}", f"{r.bytes:.4g}", f"{matmul_rate():.4g}", f"{copy_rate():.4g}"
                writer.writerow(
                    [r.case, name, f"{seconds:.4g}", f"{r.spread(name):.3f}", *work, torch.get_num_threads()]
                )
