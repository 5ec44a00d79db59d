"""What every operator asks of its arguments. Shapes and dtypes are always checked; values only where that is free of a
device synchronisation: in eager mode, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

INTEGERS = (torch.int32, torch.int64)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def check_dims(name: str, tensor: Tensor, layout: str) -> None:
    """`layout` names the dimensions, as in "(B, H, Lq, D)"."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor {layout}")
    dims = layout.count(",") + (not layout.endswith(",)"))
    if tensor.dim() != dims:
        raise ValueError(f"{name} has shape {shape_of(tensor)}; expected {dims} dimensions {layout}")


def check_shape(name: str, tensor: Tensor, expected: Sequence[int], layout: str) -> None:
    if tensor.shape != tuple(expected):
        raise ValueError(f"{name} has shape {shape_of(tensor)}; expected {layout} = {tuple(expected)}")


def check_int(name: str, value: int) -> None:
    """Sizes are int, or symbolic while a graph is traced."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; expected an int")


def check_floating(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} is {tensor.dtype}; expected a floating-point tensor")


def check_same_dtype(**tensors: Tensor) -> None:
    """Floating tensors of one dtype. Under autocast they are cast to one later, so all but float64 may differ here."""
    (first, reference), *others = tensors.items()
    if reference.dtype.is_floating_point and all(tensor.dtype == reference.dtype for _, tensor in others):
        return
    check_floating(**tensors)
    for name, tensor in others:
        kept = torch.float64 in (tensor.dtype, reference.dtype) or not torch.is_autocast_enabled(reference.device.type)
        if tensor.dtype != reference.dtype and kept:
            raise TypeError(f"{name} is {tensor.dtype} and {first} is {reference.dtype}; expected one dtype")


def check_integer(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor of torch.int32 or torch.int64")
    if tensor.dtype not in INTEGERS:
        raise TypeError(f"{name} is {tensor.dtype}; expected torch.int32 or torch.int64")


def check_device(device: torch.device, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}; expected {device}, where the other arguments are")


def has_values(tensor: Tensor) -> bool:
    """Whether the values can be looked at now for free: not on a GPU, not while tracing."""
    return (
        not torch.compiler.is_compiling()
        and tensor.is_cpu
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.numel() > 0
    )


def check_range(name: str, tensor: Tensor, size: int, what: str) -> None:
    """IndexError where an index lies outside [0, size) and the values can be looked at."""
    if has_values(tensor):
        ends = torch.aminmax(tensor)
        low, high = ends.min.item(), ends.max.item()
        if low < 0 or high >= size:
            raise IndexError(f"{name} holds {low if low < 0 else high}; expected 0 … {size - 1}, one of {size} {what}")
