"""The kernels in a plugin library: those that a model needs, compiled ahead of time by the launch code that runs them
in torch. No GPU is needed for it.

A library serves the sizes it was built for: width, heads and experts of models are fixed, while batches, lengths and
numbers of tokens are free. Every image has a name, such as "moe_route fp16 E=4 k=2 renormalize=1", which csrc/tensorrt
forms again from the shapes it meets, and the largest size it serves, as the rows of a launch table do.

Each architecture gets machine code of its own, and what has none gets PTX, which the driver compiles.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genrec.kernels.compilation import SHARED, Image, compiled, obstacle
from genrec.kernels.launch import DTYPES, serving
from genrec.models.ugt.config import UGTConfig

ALL = tuple(SHARED)  # architectures that get machine code of their own
PTX = 0  # what all others get: for sm_80, and in the sizes of sm_86, which has the least shared memory
EVERY = 2**31 - 1  # the largest size of a kernel that serves them all
PARTS = 4  # of the work for one model, dtype and architecture
WORKER = {"TRITON_DISABLE_LINE_INFO": "1", "TRITON_INTERPRET": "0"}  # images without paths, 2.5 times smaller

# Arguments that may be compiled as 1 or as a multiple of 16: those which a model fixes, as far as that makes them so.
STATIC = {
    "_forward": {"dim", "x_stride", "residual_stride"},
    "forward": {"heads", "stride_l", *(f"stride_{tensor}{name}" for tensor in "qkvo" for name in ("b", "h", ""))},
    "route_kernel": {"experts", "top_k", "stride_lt", "stride_le", "stride_b"},
    "count_kernel": {"experts", "top_k", "stride_it", "stride_ik"},
    "order_kernel": {"experts", "top_k", "stride_it", "stride_ik"},
    "hidden_kernel": {"experts", "top_k", "dim", "width", *(f"stride_{at}" for at in ("xt", "xd", "we", "wf", "wd"))},
    "rows_kernel": {"experts", "inner", "width", "stride_we", "stride_wk", "stride_wn"},
    "combine_kernel": {"experts", "top_k", "dim", "stride_wt", "stride_wk", "stride_it", "stride_ik"},
}


@dataclass(frozen=True)
class Shapes:
    """The sizes of a model that its kernels are compiled for."""

    d_model: int
    """width of every token"""
    heads: int
    """attention heads; d_model is a multiple of it, and a head holds at most 256"""
    experts: int
    """experts of a layer"""
    top_k: int
    """experts that a token is sent to"""
    d_expert: int
    """hidden width of one expert"""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}; expected 1 or more")
        if self.d_model % self.heads or self.d_model > 256 * self.heads:
            raise ValueError(
                f"d_model is {self.d_model}; expected a multiple of heads ({self.heads}), at most 256 times"
            )
        if self.top_k > self.experts:
            raise ValueError(f"top_k is {self.top_k}; expected 1 to experts ({self.experts})")

    @classmethod
    def of(cls, config: UGTConfig) -> Shapes:
        """The sizes of a UGT."""
        return cls(config.d_model, config.heads, config.experts, config.top_k, config.d_expert)


class Case(NamedTuple):
    """Launches to compile. Sizes that are free at run time are odd and not 1: their products with what the model fixes
    are multiples of 16 where the model alone makes them so."""

    name: str
    most: int  # the largest size served
    call: Callable[[], Any]


@dataclass(frozen=True)
class Compiled:
    """A kernel as the library holds it."""

    name: str
    kernel: str
    most: int
    arch: int
    is_ptx: bool
    shared: int  # bytes of a block
    threads: int  # of a block
    parameters: tuple[tuple[str, str], ...]  # (code, name), in the order of the launch; see _code
    constants: tuple[tuple[str, int], ...]
    entry: str
    content: bytes

    @property
    def key(self) -> tuple[str, str, int, int, bool]:
        """What no two images of a library share."""
        return self.name, self.kernel, self.most, self.arch, self.is_ptx


class Job(NamedTuple):
    shapes: Shapes
    dtype: torch.dtype
    arch: int
    part: int


def compile_kernels(shapes: Sequence[Shapes], dtypes: Sequence[torch.dtype], archs: Sequence[int]) -> list[Compiled]:
    """Every image of a library, on all cores; see build_plugins."""
    from rich.console import Console
    from rich.progress import Progress

    _check(shapes, dtypes, archs)
    console, start = Console(stderr=True), time.perf_counter()
    jobs = [Job(*job) for job in product(dict.fromkeys(shapes), dict.fromkeys(dtypes), {*archs, PTX}, range(PARTS))]
    images: dict[Any, Compiled] = {}
    # the workers inherit the variables; they are fresh processes, for a fork would hold torch's threads
    with (
        _environment(WORKER),
        ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool,
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        done = as_completed([pool.submit(work, job) for job in jobs])
        for future in progress.track(done, len(jobs), description="compiling"):
            images.update((image.key, image) for image in future.result())
    console.print(f"{len(images)} kernels compiled in {time.perf_counter() - start:.0f} s", highlight=False)
    return [images[key] for key in sorted(images)]


def _check(shapes: Sequence[Shapes], dtypes: Sequence[torch.dtype], archs: Sequence[int]) -> None:
    if find_spec("triton") is None:
        raise RuntimeError(obstacle())
    if not shapes or not dtypes:
        raise ValueError(f"shapes are {list(shapes)} and dtypes {list(dtypes)}; expected at least one of each")
    if wrong := [dtype for dtype in dtypes if dtype not in DTYPES]:
        raise ValueError(f"dtypes hold {wrong[0]}; expected {', '.join(map(str, DTYPES))}")
    if unknown := [arch for arch in archs if arch not in ALL]:
        raise ValueError(f"archs hold {unknown[0]}; expected some of {', '.join(map(str, ALL))}")


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def work(job: Job) -> list[Compiled]:
    """Compile one part of the cases of a model; RuntimeError where an image cannot be launched by the library."""
    rows = 86 if job.arch == PTX else job.arch
    options = {"ptx_version": 80} if job.arch == PTX else {}  # what drivers of CUDA 12.0 can read
    found = []
    for case in list(cases(job.shapes, job.dtype, rows))[job.part :: PARTS]:
        for image in compiled(case.name, case.call, job.arch or 80, rows, **options):
            _check_image(image, rows)
            found.append(_compiled(image, case, job.arch == PTX))
    return found


def cases(shapes: Shapes, dtype: torch.dtype, arch: int) -> Iterator[Case]:
    """Launches that reach every kernel of a model in every size class of the launch tables of an architecture."""
    yield from _norms(shapes, dtype)
    yield from _attentions(shapes, dtype)
    yield from _routes(shapes, dtype)
    yield from _experts(shapes, dtype, arch)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _name(operator: str, dtype: torch.dtype, **sizes: int) -> str:
    return " ".join([operator, DTYPES[dtype], *(f"{name}={size}" for name, size in sizes.items())])


def _norms(shapes: Shapes, dtype: torch.dtype) -> Iterator[Case]:
    from genrec.kernels.group_layer_norm import triton as norm

    dim = shapes.d_model
    x, affine = _empty(5, dim, dtype=dtype), _empty(3, dim, dtype=dtype)
    for ids in _empty(5, dtype=torch.int32), _empty(5, dtype=torch.int64):
        bits = 8 * ids.itemsize
        plain = partial(norm._group_layer_norm, x, ids, affine, affine, 1e-5)
        yield Case(_name("group_layer_norm", dtype, D=dim, ids=bits, residual=0), EVERY, plain)
        added = partial(norm._add_group_layer_norm, x, x, ids, affine, affine, 1e-5)
        yield Case(_name("group_layer_norm", dtype, D=dim, ids=bits, residual=1), EVERY, added)


def _attentions(shapes: Shapes, dtype: torch.dtype) -> Iterator[Case]:
    from genrec.kernels.relu_attention.triton_call import dense
    from genrec.kernels.relu_attention.triton_forward import FEW, attention

    heads, dim = shapes.heads, shapes.d_model // shapes.heads
    rel_bias, k = _empty(heads, 3, dtype=dtype), _empty(3, heads, 5, dim, dtype=dtype)
    for most, rows in (16, 15), (FEW, FEW - 1), (EVERY, FEW + 1):
        q, limit = _empty(3, heads, rows, dim, dtype=dtype), _empty(3, rows, dtype=torch.int64)
        for limited, causal, visible in (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1):
            key_limit = limit if limited else None
            call = dense(q, k, k, key_limit, rel_bias, None, bool(causal), 0.1, 0.0, bool(visible))
            sizes = {"H": heads, "D": dim, "Dv": dim, "limited": limited, "causal": causal, "visible": visible}
            yield Case(_name("relu_attention", dtype, **sizes), most, partial(attention, call, may_split=False))


def _routes(shapes: Shapes, dtype: torch.dtype) -> Iterator[Case]:
    from genrec.kernels.moe.triton_route import route

    e, k = shapes.experts, shapes.top_k
    logits, bias = _empty(5, e, dtype=dtype), _empty(e, dtype=dtype)
    for renormalize in 0, 1:
        name = _name("moe_route", dtype, E=e, k=k, renormalize=renormalize)
        yield Case(name, EVERY, partial(route, logits, k, bias, bool(renormalize)))


def _experts(shapes: Shapes, dtype: torch.dtype, arch: int) -> Iterator[Case]:
    from genrec.kernels.moe.triton_experts import experts
    from genrec.kernels.moe.triton_order import TABLE

    e, k, d, f = shapes.experts, shapes.top_k, shapes.d_model, shapes.d_expert
    name = _name("moe_experts", dtype, E=e, k=k, D=d, F=f)
    w_gate_up, w_down = _empty(e, 2 * f, d, dtype=dtype), _empty(e, d, f, dtype=dtype)
    rows = [row for kernel in ("hidden", "rows") for row in serving(TABLE.rows, kernel, arch, DTYPES[dtype])]
    classes = sorted({int(row["rows"]) for row in rows})  # rows per expert
    blocks = max(int(row["BLOCK"]) for row in TABLE.rows if row["kernel"] == "order")
    sizes = [(most, most * e // k) for most in classes]
    sizes.append((classes[-1], max(classes[-1] * e, blocks) // k + 1))  # past one block of pairs
    for most, tokens in sizes:
        x, weights = _empty(tokens, d, dtype=dtype), _empty(tokens, k, dtype=torch.float32)
        indices = _empty(tokens, k, dtype=torch.int32)
        yield Case(name, most, partial(experts, x, weights, indices, w_gate_up, w_down))


def _compiled(image: Image, case: Case, is_ptx: bool) -> Compiled:
    metadata, asm = image.metadata, image.asm
    content = re.sub(r"\s*//[^\n]*", "", asm["ptx"]).encode() + b"\0" if is_ptx else asm["cubin"]
    return Compiled(
        *(case.name, image.kernel, _most(image, case), image.arch, is_ptx),
        shared=metadata.shared,
        threads=32 * metadata.num_warps,
        parameters=tuple((_code(image, name), name) for name in image.signature if not name.isupper()),
        constants=tuple((name, int(value)) for name, value in image.constants.items() if _is_number(name, value)),
        entry=metadata.name,
        content=content,
    )


def _is_number(name: str, value: Any) -> bool:
    return name.isupper() and isinstance(value, int)


def _most(image: Image, case: Case) -> int:
    """The largest size that an image serves; the kernels about the order of pairs have classes of their own."""
    if image.kernel in ("count_kernel", "combine_kernel"):
        return EVERY
    if image.kernel == "order_kernel":
        return image.constants["BLOCK"] if image.constants["ALONE"] else EVERY
    return case.most


def _code(image: Image, name: str) -> str:
    """How a parameter is passed: "p" a pointer, "i" an int32, "l" an int64, "f" a float; a capital letter promises a
    multiple of 16. What the kernel was compiled for is not passed: "n" is None, "1" the number 1."""
    if name in image.constants:
        return "n" if image.constants[name] is None else "1"
    kind = image.signature[name]
    code = "p" if kind.startswith("*") else {"i32": "i", "i64": "l", "fp32": "f"}[kind]
    return code.upper() if name in image.divisible else code


def _check_image(image: Image, rows: int) -> None:
    """The library launches plain kernels, within the shared memory of a block, and nothing else."""
    where, metadata = f"{image.kernel} for sm_{image.arch} ({image.case})", image.metadata
    allowed = STATIC[image.kernel] | ({"stride_lb", "stride_l"} if image.constants.get("limit", 0) is None else set())
    pointers = {name for name, kind in image.signature.items() if kind.startswith("*")}
    numbers = {name for name, value in image.constants.items() if value is not None and not name.isupper()}
    if wrong := (image.divisible - pointers | numbers) - allowed:
        raise RuntimeError(f"{where} is compiled for one value of {sorted(wrong)[0]}; expected that it serves any")
    if metadata.shared > SHARED[rows] * 1024:
        raise RuntimeError(
            f"{where} takes {metadata.shared / 1024:g} KB of shared memory; a block can have {SHARED[rows]}"
        )
    scratch = metadata.global_scratch_size or metadata.profile_scratch_size
    if metadata.num_ctas != 1 or scratch or metadata.tensordesc_meta or metadata.launch_pdl:
        raise RuntimeError(f"{where} needs clusters, scratch memory or tensor descriptors; expected a plain kernel")
    entry = image.asm["ptx"].split(".entry", 1)[1].split(")", 1)[0]
    taken = [kind[1:] for kind in re.findall(r"\.param \.(\w+)", entry)]
    codes = [_code(image, name) for name in image.signature if not name.isupper()]
    passed = ["32" if code in "iIf" else "64" for code in codes if code not in "n1"]
    if taken != [*passed, "64", "64"]:  # the last two are pointers to scratch memory, null here
        raise RuntimeError(f"{where} takes parameters of {taken} bits; expected {passed} and two pointers")
