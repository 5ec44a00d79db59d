"""The search over launch tables: on a clock of our own, so that it needs no GPU, and on the tables of the operators."""

import importlib
import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

import toy_kernels

from genrec.kernels import launch, tuning
from genrec.kernels.compilation import operators
from genrec.kernels.tuning import Case, Trial, Tuner, compiles, neighbours, own_rows, save, users

FP16, FP32 = (Case("toy_kernels", dtype, "scale") for dtype in (torch.float16, torch.float32))


def rows_of(text):
    return [dict(zip(("kernel", "arch", "dtype", "BLOCK"), line.split(), strict=True)) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("before", "arch", "after"),
    [
        ("a 80 * 1\nb 80 fp16 2", 90, "a 80 * 1\na 90 * 1\nb 80 fp16 2\nb 90 fp16 2"),
        ("a 80 * 1\na 90 * 2", 90, "a 80 * 1\na 90 * 2"),
        ("a 80 * 1\na 90 * 2", 120, "a 80 * 1\na 90 * 2\na 120 * 2"),
        ("a 80 * 1\na 90 * 2", 86, "a 80 * 1\na 86 * 1\na 90 * 2"),
        ("a 80 * 1\na 90 fp16 2", 90, "a 80 * 1\na 90 fp16 2\na 90 bf16 1\na 90 fp32 1"),
        ("a 80 * 1\na 90 fp16 2", 100, "a 80 * 1\na 90 fp16 2\na 100 bf16 1\na 100 fp32 1\na 100 fp16 2"),
        ("a 90 * 1", 80, "a 80 * 1\na 90 * 1"),
        ("b 80 * 1\na 80 * 2\nb 80 * 3", 80, "b 80 * 1\nb 80 * 3\na 80 * 2"),
    ],
)
def test_an_architecture_gets_copies_of_the_rows_that_serve_it(before, arch, after):
    rows = rows_of(before)
    found = own_rows(rows, arch)
    assert found == rows_of(after)
    for kernel, dtype in itertools.product("ab", launch.DTYPES.values()):
        blocks = [[row["BLOCK"] for row in launch.serving(some, kernel, arch, dtype)] for some in (rows, found)]
        assert blocks[0] == blocks[1]  # what is launched has not changed


def test_neighbours_are_powers_of_two_around_the_row():
    row = {"kernel": "a", "arch": "80", "dim": "64", "BLOCK_M": "16", "BLOCK_N": "64", "GROUP": "8", "num_stages": ""}
    found = list(neighbours(row))
    assert found == [{"BLOCK_M": m, "BLOCK_N": n} for m in (16, 32) for n in (32, 64, 128)]
    found = list(neighbours({"BLOCK": "64", "BLOCK_K": "", "num_warps": "2", "num_stages": "1"}))
    assert len(found) == 3 * 2 * 3
    assert {"BLOCK": 32, "num_warps": 8, "num_stages": 4} in found


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The toy table, as a file that may be written."""
    table = launch.Table(toy_kernels.TABLE.path)
    table.path = tmp_path / "launch.csv"
    monkeypatch.setattr(toy_kernels, "TABLE", table)
    return table


def test_users_are_the_examples_that_a_row_serves(table):
    assert users(table, "toy_kernels", 80) == [[FP16], [Case("toy_kernels", torch.bfloat16, "scale")], [], [FP32]]
    assert launch.target is None


def tune(table, device, milliseconds, candidates, monkeypatch, fits=lambda trial: True):
    """Tune the toy table on a clock that shows `milliseconds[BLOCK]`; returns the lines and the BLOCKs timed."""
    monkeypatch.setattr(toy_kernels, "candidates", lambda row: iter(candidates), raising=False)
    timed = []

    def timer(call):
        call()
        timed.append(next(row["BLOCK"] for row, _ in table.found.values()))
        return milliseconds[int(timed[-1])]

    tuner = Tuner(device, timer, lambda trials, case: [fits(trial) for trial in trials])
    return list(tuner.tune("toy_kernels")), timed


def test_the_fastest_right_candidate_takes_the_row(table, device, monkeypatch):
    candidates = [
        {"BLOCK": 256, "PROGRAMS": 4},
        {"BLOCK": 512, "PROGRAMS": 1},  # leaves half of the result unwritten
        {"BLOCK": 1024, "PROGRAMS": 1},
        {"BLOCK": 64, "PROGRAMS": 16},  # does not fit
    ]
    milliseconds = {128: 5.0, 256: 4.0, 512: 1.0, 1024: 2.0, 64: 0.5}
    lines, timed = tune(table, device, milliseconds, candidates, monkeypatch, lambda t: t.candidate["BLOCK"] != 64)
    arch = launch.architecture(device)
    assert timed == 3 * ["128", "256", "512", "1024"]
    assert lines == [
        f"scale {arch} fp16 4096: 5 → 2 ms with BLOCK 1024, PROGRAMS 1",
        f"scale {arch} bf16 4096: 5 → 2 ms with BLOCK 1024, PROGRAMS 1",
        f"scale {arch} fp32 512: no example uses it; left as it is",
        f"scale {arch} fp32 4096: 5 → 2 ms with BLOCK 1024, PROGRAMS 1",
    ]
    saved = launch.Table(table.path)
    assert saved.rows == table.rows
    assert saved.config("scale", torch.empty(0, device=device), size=1024) == {
        "BLOCK": 1024, "PROGRAMS": 1, "num_warps": 4
    }  # fmt: skip
    assert saved.config("scale", torch.empty(0, device=device), size=512)["BLOCK"] == 64
    assert list(table.path.parent.iterdir()) == [table.path]


def test_a_row_stays_unless_something_is_clearly_faster(table, device, monkeypatch):
    before = [dict(row) for row in table.rows]
    lines, _ = tune(table, device, {128: 5.0, 256: 4.95}, [{"BLOCK": 256, "PROGRAMS": 4}], monkeypatch)
    assert lines[0] == f"scale {launch.architecture(device)} fp16 4096: 5 ms, not beaten by 1 others"
    assert launch.Table(table.path).rows == own_rows(before, launch.architecture(device))


def test_rounding_is_forgiven_and_errors_are_not():
    x = torch.randn(100)
    assert tuning._close(x * (1 + 1e-6), x)
    assert not tuning._close(x + (torch.arange(100) == 7), x)
    assert not tuning._close(torch.where(x == x.max(), torch.nan, x), x)
    codes = torch.arange(10_000)
    assert tuning._close(codes + (codes < 10), codes)
    assert not tuning._close(codes + (codes < 11), codes)
    assert tuning._close(x[:0], x[:0])


def test_candidates_must_compile_within_the_limits(table, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    trials = [
        Trial(table.rows, 3, {"BLOCK": 1024, "PROGRAMS": 1}),
        Trial(table.rows, 3, {"BLOCK": 100, "PROGRAMS": 1}),  # not a power of two
        Trial(table.rows, 3, {"BLOCK": 2**17, "PROGRAMS": 1}),  # far more values than registers
    ]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(compiles, trials, [FP32] * 3, [80] * 3)) == [True, False, False]


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tuning.main(["--op", "moe"]) == 2
    assert capsys.readouterr().err == "tuning: no CUDA device found; expected one\n"


@pytest.mark.parametrize("operator", operators())
def test_every_row_of_an_operator_is_used_by_an_example(operator):
    """Else it would be neither compiled by the check nor tuned."""
    module = f"genrec.kernels.{operator}.triton"
    table = importlib.import_module(module).TABLE
    for arch in sorted({int(row["arch"]) for row in table.rows}):
        for row, cases in zip(table.rows, users(table, module, arch), strict=True):
            assert cases or int(row["arch"]) != arch, f"no example uses {row}"


@pytest.mark.parametrize("operator", operators())
def test_saving_a_table_keeps_it_as_it_is(operator, tmp_path):
    table = launch.Table(importlib.import_module(f"genrec.kernels.{operator}.triton").TABLE.path)
    text = table.path.read_text()
    table.path = tmp_path / "launch.csv"
    save(table)
    assert table.path.read_text() == text
