"""The plugins of libgenrec_trt.so without TensorRT: on tensors of a GPU, or on shapes beside a recording driver."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import small
import torch

from genrec.export.kernel_images import Shapes

TINY = Shapes.of(small.config())  # heads and experts whose rows are no multiples of 16 elements
EVEN = Shapes(d_model=64, heads=2, experts=4, top_k=2, d_expert=64)  # every size class has kernels of its own
TYPES = {torch.float32: 0, torch.float16: 1, torch.int32: 3, torch.bfloat16: 7, torch.int64: 8}  # nvinfer1::DataType
FLOAT, INT, LONG = 1, 5, 10  # nvinfer1::PluginFieldType
C_TYPES = {FLOAT: ctypes.c_float, INT: ctypes.c_int32, LONG: ctypes.c_int64}


class Field(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("type", ctypes.c_int32), ("data", ctypes.c_void_p)]


class TensorOf(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int32), ("rank", ctypes.c_int32), ("shape", ctypes.c_int64 * 8),
        ("largest", ctypes.c_int64 * 8), ("data", ctypes.c_void_p),
    ]  # fmt: skip


@dataclass
class Fake:
    """A tensor that is nowhere."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    address: int
    largest: tuple[int, ...] = field(default=())


class Failure(Exception):
    """The step that failed, and what the plugin said."""


class Plugins:
    """The plugins of a library."""

    def __init__(self, harness: Path, library: Path) -> None:
        self.library = library
        self.function = ctypes.CDLL(str(harness)).harness_run
        self.function.restype = ctypes.c_size_t

    def run(
        self,
        op: str,
        attributes: dict[str, Any],
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        workspace: int | None = None,
        stream: int = 0,
        launches: bool = True,
    ) -> int:
        """One enqueue on contiguous tensors; returns the bytes of workspace for their largest shapes.

        Attributes are float or int, or (value, field type). Raises Failure.
        """
        values = [_typed(value) for value in attributes.values()]
        fields = [
            Field(name.encode(), kind, ctypes.cast(ctypes.pointer(data), ctypes.c_void_p))
            for name, (data, kind) in zip(attributes, values, strict=True)
        ]
        tensors = [_described(tensor) for tensor in (*inputs, *outputs)]
        message = ctypes.create_string_buffer(4096)
        bytes_needed = self.function(
            str(self.library).encode(), op.encode(), (Field * len(fields))(*fields), len(fields),
            (TensorOf * len(tensors))(*tensors), len(inputs), len(outputs), ctypes.c_bool(launches),
            ctypes.c_void_p(workspace), ctypes.c_void_p(stream), message, ctypes.c_size_t(len(message)),
        )  # fmt: skip
        if message.value:
            raise Failure(message.value.decode().strip())
        return bytes_needed


def _typed(value: Any) -> tuple[Any, int]:
    value, kind = value if isinstance(value, tuple) else (value, FLOAT if isinstance(value, float) else INT)
    return C_TYPES[kind](value), kind


def _described(tensor: Any) -> TensorOf:
    fake = isinstance(tensor, Fake)
    assert fake or tensor.is_contiguous()  # as TensorRT's are
    sizes, largest = tuple(tensor.shape), (fake and tensor.largest) or tuple(tensor.shape)
    eight = ctypes.c_int64 * 8
    return TensorOf(
        TYPES[tensor.dtype], len(sizes), eight(*sizes), eight(*largest), tensor.address if fake else tensor.data_ptr()
    )


class Stub:
    """The recording driver, libcuda_stub.c."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.stub_calls.restype = ctypes.c_char_p
        self.contexts = 0

    def use(self, capability: int) -> None:
        """A new context on a device of this compute capability."""
        self.contexts += 1
        self.library.stub_use(capability, ctypes.c_size_t(self.contexts))

    def use_none(self) -> None:
        """No current context."""
        self.library.stub_use(0, ctypes.c_size_t(0))

    def calls(self, kind: str | None = None) -> list[dict[str, Any]]:
        """What the driver was asked to do since the last time."""
        lines = map(json.loads, self.library.stub_calls().decode().splitlines())
        return [line for line in lines if kind in (None, line["call"])]
