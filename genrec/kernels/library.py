"""The `genrec` operator library: one torch.library namespace, and the compiled kernels that register into it.

Every operator is defined once and registers its plain PyTorch form for all devices. Compiled kernels register for their
device key, which the dispatcher prefers, so nothing in Python ever chooses.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.machinery
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genrec.kernels.ranges import NOTHING, SINKS, span

LIBRARY = torch.library.Library("genrec", "DEF")
OPERATORS: list[str] = []  # every public operator, in the order of definition
PLAIN: dict[str, Callable[..., Any]] = {}  # the plain PyTorch form of every operator, which runs on any device
DIFFERENTIABLE: dict[str, Callable[..., Any]] = {}  # every public operator with its gradient, below autocast
TRITON: dict[str, Callable[..., Any]] = {}  # the Triton form of those that have one


def define(
    schema: str,
    *,
    impl: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    autocast: Callable[..., tuple[Any, ...]] | None = None,
) -> None:
    """Define `genrec::<schema>`; `impl` runs on every device that has no kernel of its own.

    Operators without a `backward` are the backward passes themselves: explicit formulas, differentiable once.
    `autocast(dtype, *args)` returns the arguments as they shall be under autocast; without it they stay as they are.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema)
    LIBRARY.impl(name, impl, "CompositeExplicitAutograd")
    PLAIN[name] = impl
    torch.library.register_fake(f"genrec::{name}", fake, lib=LIBRARY)
    _register_autocast(name, autocast)
    if backward is not None:
        _register_autograd(name, setup_context, backward, "[]" in schema)
        OPERATORS.append(name)


def _register_autograd(
    name: str, setup_context: Callable[..., None] | None, backward: Callable[..., Any], has_lists: bool
) -> None:
    """What torch.library.register_autograd does, without the 20 µs that it adds to a call, 70 µs with lists of tensors.

    An autograd.Function sees only tensors that are arguments of its own: lists are spread out on the way in and
    gathered again. `lengths` says how, None for an argument that is not a list.
    """
    operator = getattr(torch.ops.genrec, name).default._op

    def forward(ctx: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            result = operator(*arguments)
        if setup_context is not None:
            setup_context(ctx, arguments, result)
        return result

    def marked_backward(ctx: Any, *grads: Any) -> Any:
        with span(f"{name} backward", grad=grads[0]):
            return backward(ctx, *grads)

    def forward_spread(ctx: Any, *spread: Any) -> Any:
        return forward(ctx, *_gather(*spread))

    def backward_spread(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return *_spread(marked_backward(ctx, *grads)), None

    passes = (forward_spread, backward_spread) if has_lists else (forward, marked_backward)
    methods = dict(zip(("forward", "backward"), map(staticmethod, passes), strict=True))
    function: Any = type(f"Differentiable_{name}", (torch.autograd.Function,), methods)
    # function.apply asks every argument for torch.func's wrappers first, which takes longer than the rest of it
    apply = super(torch.autograd.Function, function).apply

    def kernel(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            if torch._C._are_functorch_transforms_active():
                return function.apply(*arguments)
            if not has_lists:
                return apply(*arguments)
            lengths = [len(argument) if isinstance(argument, list) else None for argument in arguments]
            return apply(*_spread(arguments), lengths)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    LIBRARY.impl(name, kernel, "Autograd")
    DIFFERENTIABLE[name] = kernel


def entry(name: str, explain: Callable[..., None] | None = None) -> Callable[..., Any]:
    """torch.ops.genrec.<name> for the public functions. In eager mode it calls the operator's gradient itself, which
    the dispatcher would call with all arguments converted twice more: longer than a small operator takes.

    The kernels look at every index anyway: where one raises RuntimeError, `explain(*arguments)` may name the argument.
    """
    operator, differentiable = getattr(torch.ops.genrec, name), DIFFERENTIABLE[name]
    names = [argument.name for argument in operator.default._schema.arguments]

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return operator(*arguments)
        others = torch._C._is_any_autocast_enabled() or torch._C._are_functorch_transforms_active()
        try:
            with span(name, **_tensors(names, arguments)) if SINKS else NOTHING:
                return (operator if others else differentiable)(*arguments)
        except RuntimeError:
            if explain is not None:
                explain(*arguments)
            raise

    return call


def _tensors(names: list[str], arguments: tuple[Any, ...]) -> dict[str, Any]:
    return {key: x for key, x in zip(names, arguments, strict=False) if isinstance(x, Tensor | list)}


def _spread(arguments: tuple[Any, ...]) -> list[Any]:
    return [x for argument in arguments for x in (argument if isinstance(argument, list) else (argument,))]


def _gather(*spread: Any) -> tuple[Any, ...]:
    *values, lengths = spread
    rest = iter(values)
    return tuple(next(rest) if length is None else [next(rest) for _ in range(length)] for length in lengths)


def _register_autocast(name: str, cast: Callable[..., tuple[Any, ...]] | None) -> None:
    """Every operator runs with autocast off, or the plain PyTorch inside it would be cast once more."""
    operator = getattr(torch.ops.genrec, name).default
    for device in ("cpu", "cuda"):
        key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")

        def kernel(*args: Any, device: str = device, key: Any = key) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return operator(*(cast(torch.get_autocast_dtype(device), *args) if cast else args))

        LIBRARY.impl(name, kernel, f"Autocast{device.upper()}")


def implement(name: str, kernel: Callable[..., Any]) -> None:
    """Let `kernel`, which launches Triton, be the operator's form on CUDA; float64 stays in plain PyTorch."""

    def run(*args: Any) -> Any:
        wide = any(isinstance(arg, Tensor) and arg.dtype == torch.float64 for arg in args)
        return (PLAIN[name] if wide else kernel)(*args)

    LIBRARY.impl(name, run, "CUDA")
    TRITON[name] = run


def lower(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in autocast's dtype; float64 stays, as in torch's own rules."""
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def native_library() -> Path | None:
    """The compiled CPU kernels beside the package, None where they were not built."""
    package = Path(__file__).parent.parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        if (path := package / f"_C{suffix}").exists():
            return path
    return None


def load_native() -> str | None:
    """Load the compiled kernels; returns why not, None when they are loaded. Never raises."""
    path = native_library()
    if path is None:
        return (
            "the compiled kernels were not built; run pip install --no-build-isolation -e . with a C++ compiler and "
            "setuptools>=77"
        )
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return f"{path} does not load into torch {torch.__version__} ({error}); build it again"
    return None


def load_triton() -> None:
    """Register the Triton kernels; torch's CUDA builds bring triton along."""
    for operator in ("relu_attention", "group_layer_norm", "moe", "rq_nearest"):
        importlib.import_module(f"genrec.kernels.{operator}.triton")


def native_isa() -> str | None:
    """Instruction set of the compiled kernels on this machine: "avx512", "avx2" or "portable"; None without them.

    The environment variable GENREC_CPU_ISA, set to one of these names, forbids the wider ones.
    """
    path = native_library()
    if path is None or not native_operators("cpu"):
        return None
    function = ctypes.CDLL(str(path)).genrec_cpu_isa
    function.restype = ctypes.c_char_p
    return function().decode()


def native_operators(device: str) -> list[str]:
    """Operators that have a kernel of their own on "cpu" or "cuda"; the others run as plain PyTorch there."""
    return [
        name for name in OPERATORS if torch._C._dispatch_has_kernel_for_dispatch_key(f"genrec::{name}", device.upper())
    ]
