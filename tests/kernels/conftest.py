"""Triton kernels without a GPU: the interpreter runs them on CPU tensors, behind the same operators."""

import os
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when a kernel is defined


@pytest.fixture
def triton_kernels(device: torch.device) -> Iterator[None]:
    """Let the Triton kernels stand behind the operators on `device`: on CUDA they do already."""
    if device.type == "cuda":
        yield
        return
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    from genrec.kernels.library import TRITON, load_triton

    _repair_bfloat16_dot()
    load_triton()
    with warnings.catch_warnings(), torch.library._scoped_library("genrec", "IMPL") as library:
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name, kernel in TRITON.items():
            library.impl(name, kernel, "CPU", allow_override=True)
        yield


def _repair_bfloat16_dot() -> None:
    """The interpreter multiplies the bits of bfloat16 as if they were integers; give it the values instead."""
    import triton.language as tl
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot
    if hasattr(create_dot, "repaired"):
        return

    def widen(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = operand.data.view(np.uint16).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def repaired(self, a, b, *rest):
        return create_dot(self, widen(a), widen(b), *rest)

    repaired.repaired = True
    interpreter.InterpreterBuilder.create_dot = repaired
