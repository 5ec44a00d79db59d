"""Compile the Triton kernels without a GPU, by calling the operators' own launch functions on meta tensors: what is
checked is what is launched. Every `triton.py` says what to call in `examples(dtype, device)`.

    python -m genrec.kernels.compilation --op moe --arch 90 100

prints one row per kernel and architecture and fails where a kernel needs more shared memory than a block can have,
keeps values on the stack, or multiplies matrices outside the tensor cores. `EXACT = {"kernel", …}` in a `triton.py`
names kernels whose float32 products are float32 on purpose (input_precision="ieee"): no tensor core computes those.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from genrec.kernels import launch, machine_code

if TYPE_CHECKING:
    from rich.table import Table

# KB of shared memory that a block can have: CUDA C++ Programming Guide, technical specifications by compute capability
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
TENSOR_MEMORY = 512  # columns that a block can have on sm_100
REGISTERS = 65536  # that a block can have


class Image(NamedTuple):
    """A kernel compiled for one architecture. It takes the parameters of `signature` less those of `constants`."""

    kernel: str
    arch: int
    case: str
    signature: dict[str, str]  # parameter → its type as Triton writes it: "*fp16", "i32", "constexpr"
    constants: dict[str, Any]  # parameter → value: constexprs, arguments that are None, integers that are 1
    divisible: frozenset[str]  # parameters compiled as multiples of 16: aligned pointers, even strides
    metadata: Any  # Triton's: hash, name, shared, num_warps, tmem_size, …
    asm: dict[str, Any]  # text of "ttir", "ttgir", "ptx"; bytes of "cubin"


class Resources(NamedTuple):
    """What an image takes, and where its matrix products are computed."""

    operator: str
    kernel: str
    arch: int
    dtype: str
    case: str
    shared: int  # bytes of a block
    tensor_memory: int  # columns of a block
    threads: int
    registers: int  # of a thread
    stack: int  # bytes of a thread
    dots: int  # tl.dot in the kernel
    exact_dots: int  # computed by the ordinary cores: float32 products that shall not be rounded
    fma_dots: int  # computed by the ordinary cores: all others
    instructions: frozenset[str]  # of the tensor cores


class _Driver:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> str:
        return f"sm_{self.arch}"  # compiled kernels are kept under this name, which no device has

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


@contextlib.contextmanager
def _compiling(arch: int, rows: int, record: launch.Recorder) -> Iterator[None]:
    from triton.runtime import driver

    active = driver._active  # the public `driver.active` would look for a GPU
    driver.set_active(_Driver(arch))
    launch.target = launch.Target(rows, record)
    try:
        yield
    finally:
        launch.target = None
        driver.set_active(active)


def compiled(case: str, call: Callable[[], Any], arch: int, rows: int | None = None, **options: Any) -> list[Image]:
    """Every kernel that `call` launches on meta tensors, compiled for sm_<arch>; needs no GPU and launches nothing.

    `rows` takes the launch tables' rows of another architecture; `options` are Triton's, such as ptx_version.
    Raises RuntimeError where TRITON_INTERPRET is set, and whatever Triton raises about a kernel that does not compile.
    """
    if reason := obstacle():
        raise RuntimeError(reason)
    kernels: list[Any] = []

    def record(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        kernels.append(kernel.warmup(*args, grid=grid, **constants, **options))

    with _compiling(arch, rows or arch, record):
        call()
    return [_image(kernel, case, arch) for kernel in kernels]


def _image(kernel: Any, case: str, arch: int) -> Image:
    signature = dict(kernel.src.signature)
    names = list(signature)
    constants = {names[path[0]]: value for path, value in kernel.src.constants.items()}
    divisible = {names[path[0]] for path, hints in kernel.src.attrs.items() if ["tt.divisibility", 16] in hints}
    return Image(kernel.name, arch, case, signature, constants, frozenset(divisible), kernel.metadata, kernel.asm)


def resources(operator: str, dtype: str, images: Sequence[Image]) -> list[Resources]:
    """What the images, all of one architecture, take."""
    names = machine_code.opcodes([image.asm["cubin"] for image in images], images[0].arch) if images else []
    return [_resources(operator, dtype, image, opcodes) for image, opcodes in zip(images, names, strict=True)]


def _resources(operator: str, dtype: str, image: Image, opcodes: set[str]) -> Resources:
    usage = machine_code.usage(image.asm["cubin"])
    ordinary = re.findall(r" tt\.dot .*-> tensor<[^>]*#(?!mma).*", image.asm["ttgir"])
    exact = [dot for dot in ordinary if "inputPrecision" not in dot and dot.count("xf32,") == 3]
    return Resources(
        *(operator, image.kernel, image.arch, dtype, image.case),
        shared=image.metadata.shared,
        tensor_memory=image.metadata.tmem_size or 0,
        threads=32 * image.metadata.num_warps,
        registers=usage["REG"],
        stack=usage["STACK"] + usage["LOCAL"],
        dots=image.asm["ttir"].count(" tt.dot "),
        exact_dots=len(exact),
        fma_dots=len(ordinary) - len(exact),
        instructions=frozenset(name for name in opcodes if name.endswith("MMA")),
    )


def faults(found: Resources, exact: Container[str] = ()) -> Iterator[str]:
    """One sentence for each thing that must not be; `exact` names the kernels that may multiply in float32."""
    where = f"{found.operator}: {found.kernel} in {found.dtype} for sm_{found.arch} ({found.case})"
    if found.shared > SHARED[found.arch] * 1024:
        yield f"{where} takes {found.shared / 1024:g} KB of shared memory; a block can have {SHARED[found.arch]}"
    if found.tensor_memory > TENSOR_MEMORY:
        yield f"{where} takes {found.tensor_memory} columns of tensor memory; a block can have {TENSOR_MEMORY}"
    if found.registers * found.threads > REGISTERS:
        yield f"{where} takes {found.registers} registers in {found.threads} threads; a block can have {REGISTERS}"
    if found.stack:
        yield f"{where} has {found.stack} bytes on the stack beside {found.registers} registers; expected none"
    wrong = found.fma_dots + (0 if found.kernel in exact else found.exact_dots)
    if wrong:
        yield f"{where} computes {wrong} dots outside the tensor cores; expected all of them there"
    elif found.dots and not found.exact_dots and not found.instructions:
        yield f"{where} has {found.dots} dots and no instruction of the tensor cores"


class Job(NamedTuple):
    module: str
    dtype: torch.dtype
    arch: int


class Outcome(NamedTuple):
    launches: int
    found: list[Resources]
    faults: list[str]


def check(job: Job) -> Outcome:
    """Compile the examples of one module in one dtype for one architecture."""
    try:
        module = importlib.import_module(job.module)
        cases = list(module.examples(job.dtype))
    except Exception as error:
        return Outcome(0, [], [f"{job.module} gives no examples: {_sentence(error)}"])
    dtype = launch.DTYPES[job.dtype]
    images: dict[str, Image] = {}
    wrong, launches = [], 0
    for case, call in cases:
        try:
            kernels = compiled(case, call, job.arch)
        except Exception as error:
            wrong.append(f"{job.module} in {dtype} for sm_{job.arch} ({case}) does not compile: {_sentence(error)}")
            continue
        launches += len(kernels)
        for image in kernels:
            images.setdefault(image.metadata.hash, image)
    if not launches and not wrong:
        wrong.append(f"{job.module} in {dtype} for sm_{job.arch} launches nothing; expected examples of every kernel")
    found = resources(_operator(job.module), dtype, list(images.values()))
    wrong += [fault for one in found for fault in faults(one, getattr(module, "EXACT", ()))]
    return Outcome(launches, found, wrong)


def _operator(module: str) -> str:
    return module.removeprefix("genrec.kernels.").removesuffix(".triton")


def _sentence(error: BaseException) -> str:
    """The last line of the first cause: Triton wraps an error once for each function it is inside of."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'without a message'}"


def report(modules: Sequence[str], archs: Sequence[int]) -> int:
    """Check the modules on all cores and print the table; returns 1 where anything is wrong."""
    from rich.console import Console
    from rich.progress import Progress

    console, start = Console(), time.perf_counter()
    if not console.is_terminal:
        console = Console(width=120)  # in a log nothing is narrower
    jobs = [Job(module, dtype, arch) for module in modules for dtype in launch.DTYPES for arch in archs]
    # Each worker is a fresh process: a fork of this one would carry torch's threads along.
    with (
        ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool,
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        done = as_completed([pool.submit(check, job) for job in jobs])
        outcomes = [future.result() for future in progress.track(done, len(jobs), description="compiling")]
    found = [one for outcome in outcomes for one in outcome.found]
    wrong = sorted({fault for outcome in outcomes for fault in outcome.faults})
    console.print(_table(found))
    for fault in wrong:
        console.print(fault, style="red", markup=False, highlight=False, soft_wrap=True)
    launches, seconds = sum(outcome.launches for outcome in outcomes), time.perf_counter() - start
    console.print(f"{len(found)} kernels of {launches} launches compiled in {seconds:.0f} s, faults: {len(wrong)}")
    return 1 if wrong else 0


def _table(found: Sequence[Resources]) -> Table:
    """One row per kernel and architecture: the most that any of its dtypes and cases takes."""
    from rich.table import Table

    rows = defaultdict(list)
    for one in found:
        rows[one.operator, one.kernel, one.arch].append(one)
    table = Table(box=None, header_style="bold")
    for heading in ("operator", "kernel"):
        table.add_column(heading)
    for heading in ("sm", "images", "shared KB", "of", "registers", "stack"):
        table.add_column(heading, justify="right")
    table.add_column("matrix instructions")
    for (operator, kernel, arch), images in sorted(rows.items()):
        instructions = set().union(*(image.instructions for image in images))
        exact = ["float32 FMA"] if any(image.exact_dots for image in images) else []
        table.add_row(
            *(operator, kernel, str(arch), str(len(images))),
            *(f"{max(image.shared for image in images) / 1024:.1f}", str(SHARED[arch])),
            *(str(max(image.registers for image in images)), str(max(image.stack for image in images))),
            ", ".join([*sorted(instructions), *exact]) or "–",
        )
    return table


def obstacle() -> str | None:
    """Why this process cannot compile; None if it can."""
    try:
        from triton import knobs
    except ImportError:
        return "Triton is not installed (it has wheels for Linux only); expected pip install triton"
    return (
        "TRITON_INTERPRET is set: the interpreter compiles nothing; expected it unset"
        if knobs.runtime.interpret
        else None
    )


def operators() -> list[str]:
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/op.py"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m genrec.kernels.compilation", description="Compile the Triton kernels."
    )
    parser.add_argument("--op", nargs="+", default=operators(), choices=operators(), help="default: all")
    parser.add_argument("--arch", nargs="+", type=int, default=list(SHARED), choices=list(SHARED), help="default: all")
    options = parser.parse_args(arguments)
    if reason := obstacle():
        print(reason, file=sys.stderr)
        return 2
    return report([f"genrec.kernels.{name}.triton" for name in options.op], options.arch)


if __name__ == "__main__":
    sys.exit(main())
