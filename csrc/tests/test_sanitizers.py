"""The compiled kernels under sanitizers, which watch our code alone: Python and torch are as they always are.

AddressSanitizer and UndefinedBehaviorSanitizer watch the kernels' own tests, and shapes drawn at random. torch's
allocations go through the sanitizer too: one element past the end of a tensor is an error.

ThreadSanitizer watches both passes of every operator on four threads, which threads.cpp starts in torch's place. It
reports what is not ordered by a start or a join, whether or not it happened to go wrong; the bits are compared besides.

Every sanitizer has to find what was planted for it before its silence means anything.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = [f"tests/kernels/test_{name}.py" for name in ("relu_attention", "group_layer_norm", "moe", "rq_nearest")]
PASSES = "csrc/tests/passes.py"
INSTRUCTION_SETS = ["avx512", "avx2", "portable"]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = built(tmp_path_factory.mktemp("memory"), "address,undefined")
    options = "detect_leaks=0"  # Python keeps much until the end
    return partial(run, folder, "libasan.so", ASAN_OPTIONS=options, OMP_NUM_THREADS="2")


@pytest.fixture(scope="module")
def threads(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = built(tmp_path_factory.mktemp("threads"), "thread")
    return partial(run, folder, "libtsan.so", TSAN_OPTIONS="halt_on_error=1", OMP_NUM_THREADS="1")


def built(folder: Path, sanitizers: str) -> Path:
    """`folder`, whose `genrec` is now the package with sanitized kernels."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    build = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder / "objects"]
    environment = {**os.environ, "GENREC_SANITIZERS": sanitizers}
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert list(folder.glob("genrec/_C*")), done.stderr[-3000:]
    for entry in (ROOT / "genrec").iterdir():
        if not entry.name.startswith("_C"):
            (folder / "genrec" / entry.name).symlink_to(entry)
    return folder


def run(folder: Path, runtime: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python with the package of `folder`. It must not look for it in the directory where it starts: PYTHONSAFEPATH."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "LD_PRELOAD": f"{library(runtime)} {library('libstdc++.so')}",  # the latter for exceptions under libasan
            "PYTHONPATH": f"{folder}{os.pathsep}{ROOT / 'tests' / 'kernels'}",
            "PYTHONSAFEPATH": "1",
            **environment,
        },
        capture_output=True,
        text=True,
    )


def library(name: str) -> str:
    found = subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
    if found == name:
        pytest.skip(f"g++ has no {name} here")
    return found


def assert_clean(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_nothing_is_found(memory, isa):
    widest = memory("-c", "from genrec.kernels.library import native_isa; print(native_isa())", GENREC_CPU_ISA=isa)
    assert widest.stdout.strip() in INSTRUCTION_SETS, widest.stderr[-3000:]
    if widest.stdout.strip() != isa:
        pytest.skip(f"this machine does not run {isa}")
    assert_clean(memory("-m", "pytest", "-q", "-x", *TESTS, GENREC_CPU_ISA=isa))
    assert_clean(memory(PASSES, "shapes", GENREC_CPU_ISA=isa))


LIES = {
    "AddressSanitizer: heap-buffer-overflow": "from_address((memory := torch.zeros(40)).data_ptr())",
    "load of misaligned address": "from_buffer(bytearray(400), 2)",
}


@pytest.mark.parametrize("finding", LIES)
def test_a_tensor_that_lies_about_its_memory_would_be_found(memory, finding):
    program = (
        "import ctypes, torch, genrec.kernels as kernels;"
        f"lie = torch.frombuffer((ctypes.c_float * 64).{LIES[finding]}, dtype=torch.float32);"
        "kernels.rq_nearest(lie.view(1, 64), [torch.zeros(3, 64)])"
    )
    assert finding in memory("-c", program).stderr


def test_no_race_is_found(threads):
    assert_clean(threads(PASSES, "threads", "0"))


@pytest.mark.parametrize("operator", ["group_layer_norm", "moe_experts", "rq_nearest"])
def test_shares_that_overlap_would_be_found(threads, operator):
    """relu_attention is not among them: its threads take from a queue and never look at their shares."""
    result = threads(PASSES, "threads", "1", operator)
    assert "ThreadSanitizer: data race" in result.stderr, result.stderr[-3000:]
