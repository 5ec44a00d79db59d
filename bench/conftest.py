"""A speed is reported only where the result is right: every case checks its contenders against each other first.

pytest bench                 small cases once, as tests: "smoke"
pytest bench --benchmark     speed and peak memory
    --bench-op NAME          of one operator, or of "training", "generation" …: test_bench_<NAME>.py
    --bench-size SIZE        smoke, default or full
    --bench-device DEVICE    cpu, or cuda where there is one
    --bench-threads N, --bench-seconds S
    --bench-csv FILE         the table, for genrec bench report
    --bench-baseline FILE    such a table: fail where a ratio fell by more than --bench-tolerance
    --benchmark-json FILE    pytest-benchmark's own format: the rounds of genrec, the peers as extra_info
"""

import datetime
import json
import math
import platform
import statistics
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.memory import measured_in_child, peak_memory
from bench.peers import ABSENT
from bench.race import copy_rate, keep_freed_memory, matmul_rate, spread
from bench.race import race as run_race
from genrec.benchmarks import results as table
from genrec.benchmarks.results import Row

# See _distance: between results that were rounded and summed in different orders.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 4e-3}

NOTES: list[str] = []  # what went wrong, for the end
ROWS: list[Row] = []
MEMORY: dict[str, dict[str, int]] = {}  # case → contender → bytes, in the child that measures it
SIZES = ["smoke", "default", "full"]
ON_THE_CPU = {"training", "generation", "tokenizer", "features"}  # wherever the operators' tensors are
DTYPES = ["float32", "bfloat16", "float16"]
OPERATORS = sorted(path.stem.removeprefix("test_bench_") for path in Path(__file__).parent.glob("test_bench_*.py"))


def pytest_addoption(parser):
    group = parser.getgroup("genrec")
    group.addoption("--benchmark", action="store_true", help="measure; without it every case runs once, as a test")
    group.addoption("--bench-op", choices=OPERATORS, action="append", help="only these; may be repeated")
    group.addoption("--bench-size", choices=SIZES, help="smoke is for tests; default takes some nine minutes")
    group.addoption("--bench-device", default="cpu", choices=["cpu", "cuda"], help="where the tensors are")
    group.addoption("--bench-dtype", choices=DTYPES, help="float32 unless told otherwise; bfloat16 on CUDA")
    group.addoption("--bench-threads", type=int, default=2, help="threads of torch on the CPU")
    group.addoption("--bench-seconds", type=float, default=0.2, help="for each contender of each case")
    group.addoption("--bench-csv", type=Path, help="also write the table to this file")
    group.addoption("--bench-baseline", type=Path, help="a table of before: fail where a ratio fell")
    group.addoption("--bench-tolerance", type=float, default=0.3, help="share of itself that a ratio may fall by")
    group.addoption("--bench-memory", type=Path, help="instead of speed, peak memory, into this file: for the child")


def pytest_configure(config):
    config.addinivalue_line("markers", "size(name): the smallest --bench-size that runs this case")
    config.option.benchmark_quiet = True  # pytest-benchmark's table has rounds where ours has calls
    if baseline := config.getoption("--bench-baseline"):
        table.read_results(baseline)  # what is wrong with it is said before anything is measured


def size_of(config):
    return config.getoption("--bench-size") or ("default" if config.getoption("--benchmark") else "smoke")


def pytest_collection_modifyitems(config, items):
    largest, operators = SIZES.index(size_of(config)), config.getoption("--bench-op") or OPERATORS
    left_out = []
    for item in items:
        marks = [SIZES.index(mark.args[0]) for mark in item.iter_markers("size")]
        name = item.path.stem.removeprefix("test_bench_")
        wanted = name in operators and not (name in ON_THE_CPU and config.getoption("--bench-device") != "cpu")
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
    if sys.platform == "linux" and not request.config.getoption("--bench-memory"):
        keep_freed_memory()


@pytest.fixture
def compiled(request):
    """compiled(name, function): the function compiled for its shape, or for any if `dynamic`, as a contender; none in
    smoke tests, where it takes minutes."""

    def contender(name, function, dynamic=False):
        return {} if size_of(request.config) == "smoke" else {name: torch.compile(function, dynamic=dynamic)}

    return contender


def dtype_of(config):
    cpu = config.getoption("--bench-device") == "cpu"
    return getattr(torch, config.getoption("--bench-dtype") or ("float32" if cpu else "bfloat16"))


@pytest.fixture
def randn(request):
    """randn(*shape, dtype=None): normal numbers, in the dtype of the run unless told otherwise."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    usual = dtype_of(request.config)
    return lambda *shape, dtype=None: torch.randn(shape, generator=generator).to(dtype or usual)


@pytest.fixture
def race(request):
    """race(case, contenders, flops=, bytes=, goal=): "genrec" and its peers, functions without arguments that return
    the same tensors, or tensors whose `measure` is the same; tolerance=None for contenders that compute something
    else. `within` has contexts for some of them. `along` is (series, axis, value) of a case that is one of a series."""
    option = request.config.getoption

    def run(
        case, contenders, *, flops=math.nan, bytes=math.nan, goal=math.nan, tolerance=TOLERANCE, within=None,
        measure=None, along=("", "", math.nan),
    ):  # fmt: skip
        torch.set_default_device(None)  # it serves to prepare a case, and would slow every call down
        within = {name: (within or {}).get(name, nullcontext) for name in contenders}
        if option("--bench-memory"):
            for name, function in contenders.items():
                with within[name]():
                    peak = peak_memory(function, torch.device(option("--bench-device")))
                MEMORY.setdefault(case, {})[name] = peak
            return
        results = {}
        for name, function in contenders.items():
            with within[name]():
                results[name] = measure(function()) if measure else function()
        if tolerance is not None:
            _assert_equal(results, tolerance[dtype_of(request.config)])
        if option("--benchmark"):
            benchmark = request.getfixturevalue("benchmark")
            rounds = run_race(benchmark, contenders, option("--bench-seconds"), within)
            op = request.path.stem.removeprefix("test_bench_")
            for name, seconds in rounds.items():
                median = statistics.median(seconds)
                ROWS.append(_row(option, op, case, along, name, median, spread(seconds), flops, bytes, goal))
            medians = {name: statistics.median(seconds) for name, seconds in rounds.items()}
            work = {name: None if math.isnan(value) else value for name, value in (("flops", flops), ("bytes", bytes))}
            benchmark.extra_info |= {"case": case, "median_seconds": medians, **work}

    return run


def _row(option, op, case, along, contender, seconds, spread, flops, bytes, goal):
    """Memory and the device's rates are filled in at the end."""
    unknown, cpu = math.nan, option("--bench-device") == "cpu"
    return Row(
        op, case, *along, contender, seconds, spread, flops, bytes, unknown, goal, unknown, unknown,
        _device_name(cpu), torch.get_num_threads() if cpu else 0, torch.__version__, str(datetime.date.today()),
    )  # fmt: skip


def _device_name(cpu: bool) -> str:
    if not cpu:
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _assert_equal(results, tolerance):
    expected = _tensors(next(result for name, result in results.items() if name != "genrec"))
    for name, result in results.items():
        for ours, theirs in zip(_tensors(result), expected, strict=True):
            assert torch.isfinite(ours).all(), name
            assert _distance(ours, theirs) <= tolerance, name


def _distance(ours, theirs):
    """The largest difference beside the largest number. In 16 bits by root mean squares instead: there a score next to
    the kink of a ReLU is rounded to either side of it, and one element differs by much."""
    difference, theirs = ours.float() - theirs.float(), theirs.float()
    if ours.dtype in (torch.float16, torch.bfloat16):
        return difference.norm() / theirs.norm()
    return difference.abs().max() / theirs.abs().max()


def _tensors(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def pytest_sessionfinish(session):
    """Complete the table and write it; a ratio that fell fails the session."""
    option = session.config.getoption
    if path := option("--bench-memory"):
        path.write_text(json.dumps(MEMORY))
    if not ROWS:
        return
    device = option("--bench-device")
    rates = {"matmul_rate": matmul_rate(device, dtype_of(session.config)), "copy_rate": copy_rate(device)}
    memory, arguments = {}, _same_cases(session.config)
    if arguments and session.exitstatus != pytest.ExitCode.INTERRUPTED:
        try:
            memory = measured_in_child(arguments)
        except RuntimeError as error:  # what was timed is not thrown away for it
            NOTES.append(f"memory was not measured: {error}")
    ROWS[:] = [replace(row, memory=memory.get(row.case, {}).get(row.contender, math.nan), **rates) for row in ROWS]
    blank = replace(ROWS[0], op="", case=table.ABSENT, series="", axis="", at=math.nan, goal=math.nan,
                    seconds=math.nan, spread=math.nan, flops=math.nan, bytes=math.nan, memory=math.nan)  # fmt: skip
    ROWS.extend(replace(blank, contender=package) for package in sorted(ABSENT))
    if path := option("--bench-csv"):
        table.write_results(path, ROWS)
    if any(change.fell(option("--bench-tolerance")) for change in _changes(session.config)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _same_cases(config):
    """Arguments of a run of the same cases that take memory; none where there are none."""
    measured = sorted({row.op for row in ROWS} - {"overhead"})  # whose calls take none
    if not measured:
        return []
    device, threads = config.getoption("--bench-device"), config.getoption("--bench-threads")
    dtype = str(dtype_of(config)).removeprefix("torch.")
    return [
        *config.args, *(f"--bench-op={name}" for name in measured), "-k", config.getoption("keyword"),
        f"--bench-size={size_of(config)}", f"--bench-device={device}", f"--bench-threads={threads}",
        f"--bench-dtype={dtype}",
    ]  # fmt: skip


def _changes(config):
    baseline = config.getoption("--bench-baseline")
    return table.changes(table.read_results(baseline), ROWS) if baseline else []


def pytest_terminal_summary(terminalreporter, config):
    if not ROWS:
        return
    write, first = terminalreporter.write_line, ROWS[0]
    rates = f"matmul {first.matmul_rate / 1e9:.0f} GFLOP/s, copy {first.copy_rate / 1e9:.1f} GB/s"
    write(f"\n{first.device}, {first.threads} threads, torch {first.torch}: {rates}")
    write(f"{'case':64} {'genrec':>9} {'strongest peer':>34} {'ratio':>7} {'goal':>5} {'share':>6} {'memory':>16}")
    for case in table.cases(ROWS):
        peer = f"{case.peer.contender} {_time(case.peer.seconds)}"
        goal = "" if math.isnan(case.ours.goal) else f"{case.ours.goal:.1f}×"
        share = case.share(case.ours)
        write(
            f"{case.name:64} {_time(case.ours.seconds):>9} {peer:>34} {case.ratio:6.2f}× {goal:>5} "
            f"{'' if math.isnan(share) else f'{share:.0%}':>6} {_memory(case):>16}"
        )
    for note in NOTES:
        write(note, red=True)
    if ABSENT:
        write(f"absent, not installed: {', '.join(sorted(ABSENT))}")
    tolerance = config.getoption("--bench-tolerance")
    for change in _changes(config):
        if change.fell(tolerance):
            write(f"ratio fell: {change.case.name}: {change.before:.2f}× → {change.now:.2f}×", red=True)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds > 1e-3 else f"{seconds * 1e6:.1f} µs"


def _memory(case) -> str:
    """Ours, and how many times that the most frugal peer takes."""
    ours = case.ours.memory
    if math.isnan(ours):
        return ""
    times = "" if math.isnan(case.memory_ratio) else f" {case.memory_ratio:.1f}×"
    return f"{ours / 2**20:.1f} MB{times}"
