"""The compiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer: built once more with both, and run by the
kernels' own tests. torch's allocations go through the sanitizer too: one element past the end of a tensor is an error.

ThreadSanitizer does not understand the barriers of GNU OpenMP, on which torch's threads meet, and would report every
parallel loop. That no thread writes what another one reads is shown by equal bits on any number of threads instead.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = ["relu_attention", "group_layer_norm", "moe", "rq_nearest"]
SELECTED = "not compile and not opcheck and not hypothesis and not overhead"


def library(name: str) -> str:
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose `genrec` is the package with sanitized kernels."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    folder = tmp_path_factory.mktemp("sanitized")
    build = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder / "objects"]
    environment = {**os.environ, "GENREC_SANITIZERS": "address,undefined"}
    subprocess.run(build, cwd=ROOT, env=environment, check=True, capture_output=True)
    for entry in (ROOT / "genrec").iterdir():
        if not entry.name.startswith("_C"):
            (folder / "genrec" / entry.name).symlink_to(entry)
    assert list((folder / "genrec").glob("_C*")), "the sanitized kernels did not compile"
    return folder


def run(sanitized: Path, arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
            "ASAN_OPTIONS": "detect_leaks=0,allocator_may_return_null=1",
            "PYTHONPATH": str(sanitized),
            "OMP_NUM_THREADS": "2",
            **environment,
        },
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_nothing_is_found(sanitized, isa):
    files = [f"tests/kernels/test_{name}.py" for name in TESTS]
    result = run(sanitized, ["-m", "pytest", "-q", "-x", "--no-cov", *files, "-k", SELECTED], GENREC_CPU_ISA=isa)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def test_an_overrun_would_be_found(sanitized):
    """The kernels trust the strides they are given: a tensor that lies about its memory must stop the process."""
    program = (
        "import torch, genrec.kernels as k; assert k.NATIVE_ERROR is None;"
        "x = torch.zeros(40);"
        "from ctypes import c_float; memory = (c_float * 64).from_address(x.data_ptr());"
        "lie = torch.frombuffer(memory, dtype=torch.float32);"
        "k.group_layer_norm(lie.view(1, 64), torch.zeros(1, dtype=torch.int64), torch.ones(1, 64), torch.zeros(1, 64))"
    )
    result = run(sanitized, ["-c", program])
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr, result.stderr[-3000:]
