"""Which tensor was the first to hold a NaN or an infinity."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class _Found(Exception):
    """Raised inside a forward pass by the first bad output."""


def first_bad_tensor(model: nn.Module, loss: Callable[[], tuple[Tensor, Any]], scale: float) -> str | None:
    """Name of the first tensor with a value that is not finite: a parameter, the output of a module in the order of
    computation, the loss, or the gradient of a parameter; None if all are finite.

    loss() computes the loss of the batch in question with `model`, and what it would log; gradients are taken of
    `scale` times it, and go nowhere.
    """
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"parameter {name}"
    try:
        with _watched(model):
            value, _ = loss()
    except _Found as found:
        return str(found)
    if not _finite(value):
        return "the loss"
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(value * scale, parameters, allow_unused=True)
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is not None and not _finite(gradient):
            return f"gradient of {name}"
    return None


@contextmanager
def _watched(model: nn.Module) -> Iterator[None]:
    """Every module's output is looked at as it is made."""

    def watch(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if any(isinstance(tensor, Tensor) and not _finite(tensor) for tensor in tensors):
                raise _Found(f"output of {name or 'the model'}")

        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.detach().isfinite().all())
