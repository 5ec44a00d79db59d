"""Triton kernels without a GPU: the interpreter runs them on CPU tensors, behind the same operators."""

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch


@pytest.fixture
def triton_kernels(device: torch.device) -> Iterator[None]:
    """Let the Triton kernels stand behind the operators on `device`: on CUDA they do already."""
    if device.type == "cuda":
        yield
        return
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    from genrec.kernels.library import TRITON, load_triton

    _repair_bfloat16()
    load_triton()
    with warnings.catch_warnings(), torch.library._scoped_library("genrec", "IMPL") as library:
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name, kernel in TRITON.items():
            library.impl(name, kernel, "CPU", allow_override=True)
        yield


@pytest.fixture
def exact_dots(triton_kernels: None, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests to the bit: numpy rounds a row's float32 products by its place in the tile, as no tensor core does."""
    if device.type == "cuda":
        return
    import triton.language as tl
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def exact(self, a, b, total, *rest):
        wide = interpreter.TensorHandle(total.data.astype(np.float64), tl.float64)
        return interpreter.TensorHandle(create_dot(self, a, b, wide, *rest).data.astype(np.float32), tl.float32)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", exact)


def _repair_bfloat16() -> None:
    """The interpreter cuts float32 to bfloat16 where hardware rounds, and multiplies bfloat16's bits as integers."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert, create_dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
    if hasattr(create_dot, "repaired"):
        return

    def round_to_nearest(values, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        return torch.tensor(values).bfloat16().view(torch.uint16).numpy()

    def widen(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = operand.data.view(np.uint16).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def dot(self, a, b, *rest):
        return create_dot(self, widen(a), widen(b), *rest)

    dot.repaired = True
    interpreter._convert_float = round_to_nearest
    interpreter.InterpreterBuilder.create_dot = dot
