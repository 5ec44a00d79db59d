"""The compile check: it passes what is right, refuses what is not, and reads machine code correctly.

Compiling needs a process without the interpreter, so everything that compiles goes through a worker of its own.
"""

import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from triton import knobs

from genrec.kernels import compilation, machine_code
from genrec.kernels.compilation import REGISTERS, SHARED, TENSOR_MEMORY, Image, Job, Resources, check, faults, report

FINE = Resources("toy", "multiply", 86, "fp16", "a case", 99 * 1024, 512, 256, 255, 0, 1, 0, 0, frozenset({"HMMA"}))


@pytest.fixture(scope="module")
def no_interpreter() -> Iterator[None]:
    """Processes that start now compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0")
        yield


@pytest.fixture(scope="module")
def compiler(no_interpreter: None) -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize(("arch", "instruction"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA"), (120, "HMMA")])
def test_right_kernels_pass_and_their_instructions_are_named(compiler, arch, instruction):
    outcome = compiler.submit(check, Job("toy_kernels", torch.float32, arch)).result()
    assert outcome.faults == []
    assert outcome.launches == 4
    found = {one.kernel: one for one in outcome.found}
    assert len(found) == len(outcome.found) == 3  # what is launched twice alike is one kernel
    assert found["multiply"].instructions == {instruction}
    assert found["exact_multiply"].instructions == found["scale"].instructions == frozenset()
    assert (found["exact_multiply"].exact_dots, found["scale"].dots) == (1, 0)
    assert found["multiply"].shared > 0
    assert 0 < found["scale"].registers < found["multiply"].registers <= 255


def test_wrong_kernels_are_refused_each_with_a_sentence(compiler):
    refused = compiler.submit(check, Job("toy_faults", torch.float32, 86)).result().faults
    expected = [
        "toy_faults in fp32 for sm_86 (does not compile) does not compile: ValueError: arange's range must be a power",
        "toy_faults: multiply in fp32 for sm_86 (shared memory) takes 256 KB of shared memory; a block can have 99",
        "toy_faults: multiply in fp32 for sm_86 (spill) has # bytes on the stack beside 255 registers; expected none",
        "toy_faults: multiply in fp32 for sm_86 (no tensor cores) computes 1 dots outside the tensor cores",
    ]
    assert len(refused) == len(expected)
    for sentence, beginning in zip(refused, expected, strict=True):
        assert re.sub(r"\d+ bytes", "# bytes", sentence).startswith(beginning)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, None),
        ({"shared": 99 * 1024 + 1}, "KB of shared memory; a block can have 99"),
        ({"arch": 90, "shared": 227 * 1024}, None),
        ({"tensor_memory": TENSOR_MEMORY + 1}, "takes 513 columns of tensor memory"),
        ({"threads": 512, "registers": REGISTERS // 512 + 1}, "takes 129 registers in 512 threads"),
        ({"stack": 8}, "has 8 bytes on the stack"),
        ({"fma_dots": 1}, "computes 1 dots outside the tensor cores"),
        ({"exact_dots": 2}, "computes 2 dots outside the tensor cores"),
        ({"exact_dots": 2, "kernel": "exact"}, None),
        ({"exact_dots": 2, "fma_dots": 1, "kernel": "exact"}, "computes 1 dots outside the tensor cores"),
        ({"instructions": frozenset()}, "has 1 dots and no instruction of the tensor cores"),
        ({"instructions": frozenset(), "dots": 0}, None),
    ],
)
def test_limits(change, sentence):
    refused = list(faults(FINE._replace(**change), {"exact"}))
    assert len(refused) == (sentence is not None)
    assert not refused or sentence in refused[0]


def test_every_limit_is_that_of_its_architecture():
    assert SHARED == {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


def images(arch: int) -> list[Image]:
    """For the worker: the toy kernels, less what cannot travel between processes."""
    import toy_kernels

    from genrec.kernels.compilation import compiled

    found = [compiled(case, call, arch) for case, call in toy_kernels.examples(torch.float32)]
    return [image._replace(metadata=image.metadata._asdict(), asm=dict(image.asm)) for some in found for image in some]


def test_an_image_says_how_to_launch_it(compiler):
    image = compiler.submit(images, 90).result()[0]
    assert (image.kernel, image.arch, image.case) == ("scale", 90, "scale")
    assert image.signature == {"x": "*fp32", "y": "*fp32", "n": "i32", "factor": "fp32", "BLOCK": "constexpr"}
    assert image.constants == {"BLOCK": 128}
    assert image.divisible == {"x", "y", "n"}
    assert image.metadata["num_warps"] == 4
    assert image.asm["cubin"].startswith(b"\x7fELF")
    assert ".target sm_90a" in image.asm["ptx"]


@pytest.mark.parametrize("arch", [80, 100])
def test_instructions_are_those_of_each_kernel_alone(compiler, arch, tmp_path):
    """All code goes through the disassembler as one block; its pieces must come back to the right kernels."""
    cubins = [image.asm["cubin"] for image in compiler.submit(images, arch).result()]
    for cubin, names in zip(cubins, machine_code.opcodes(cubins, arch), strict=True):
        path = tmp_path / "cubin"
        path.write_bytes(cubin)
        listing = subprocess.check_output([knobs.nvidia.nvdisasm.path, "-c", path], text=True)
        lines = re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?\w+ +)?(.*?) *;", listing)
        assert len(lines) > 20
        assert names == {line.split()[0].partition(".")[0] for line in lines}


def test_a_module_that_launches_nothing_is_a_fault(monkeypatch):
    monkeypatch.setitem(sys.modules, "idle", SimpleNamespace(examples=lambda dtype: iter([("a case", lambda: None)])))
    monkeypatch.setattr(compilation, "obstacle", lambda: None)
    outcome = check(Job("idle", torch.float16, 80))
    assert outcome.faults == ["idle in fp16 for sm_80 launches nothing; expected examples of every kernel"]


def test_the_report_names_every_fault_and_fails(no_interpreter, capsys):
    assert report(["toy_kernels", "toy_faults", "not_there"], [80]) == 1
    text = capsys.readouterr().out
    assert re.search(r"toy_kernels +exact_multiply +80 +1 +16\.0 +163 +\d+ +0 +float32 FMA", text)
    assert re.search(r"toy_kernels +multiply +80 +3 +32\.0 +163 +\d+ +0 +HMMA", text)
    assert text.count("not_there gives no examples: ModuleNotFoundError: No module named 'not_there'\n") == 1
    assert "toy_faults: multiply in fp32 for sm_80 (shared memory) takes 256 KB of shared memory" in text
    assert text.splitlines()[-1].endswith(f"faults: {text.count('toy_faults: ') + text.count('toy_faults in') + 1}")


def test_a_report_without_faults_succeeds(no_interpreter, capsys):
    assert report(["toy_kernels"], [80]) == 0
    assert re.search(r"^7 kernels of 10 launches compiled in \d+ s, faults: 0$", capsys.readouterr().out, re.M)


def test_the_command_says_what_it_needs():
    refused = subprocess.run(
        [sys.executable, "-m", "genrec.kernels.compilation"],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert refused.returncode == 2
    assert refused.stderr == "TRITON_INTERPRET is set: the interpreter compiles nothing; expected it unset\n"
