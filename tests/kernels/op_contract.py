"""The op contract as functions: what every operator is held to (docs/kernels/README.md, "The contract")."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DEVICE = torch.device(os.environ.get("GENREC_TEST_DEVICE", "cpu"))
FORWARD, GRADIENT = 2.0, 5.0
Function = Callable[..., Tensor | tuple[Tensor, ...]]


def run(function: Function, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Floating outputs, and the gradients of their weighted sum with respect to the inputs."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    result = function(*leaves)
    outputs = [y for y in (result if isinstance(result, tuple) else (result,)) if y.is_floating_point()]
    loss = sum((y.double() * torch.cos(torch.arange(y.numel(), device=y.device)).view(y.shape)).sum() for y in outputs)
    loss = loss + 0 * sum(x.double().nansum() for x in leaves)  # a graph also where nothing is computed
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    zeros = [torch.zeros_like(x) for x in leaves]
    return [y.detach() for y in outputs], [z if g is None else g for g, z in zip(gradients, zeros, strict=True)]


def assert_same(operator: Function, reference: Function, inputs: Sequence[Tensor], tolerance: float = 1e-11) -> None:
    """Equal up to float64 rounding, outputs and gradients."""
    for ours, truth in zip(run(operator, inputs), run(reference, inputs), strict=True):
        for y, expected in zip(ours, truth, strict=True):
            assert y.shape == expected.shape
            torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


def assert_measured(operator: Function, reference: Function, inputs: Sequence[Tensor], dtype: torch.dtype) -> None:
    """At most 2× (outputs) or 5× (gradients) the error of the plain reference run in the same dtype: the root mean
    square over a tensor. The largest error of a few numbers is luck, so a single number is allowed twice as much."""
    inputs = [x.to(dtype) for x in inputs]
    truth = run(reference, [x.double() for x in inputs])
    plain, ours = run(reference, inputs), run(operator, inputs)
    for factor, ys, rs, ts in zip((FORWARD, GRADIENT), ours, plain, truth, strict=True):
        for number, (y, r, t) in enumerate(zip(ys, rs, ts, strict=True)):
            for measure, share in ((root_mean_square, 1), (largest, 2)):
                error = measure(difference(y, t))
                allowed = share * factor * max(measure(difference(r, t)), rounding(measure(t), dtype))
                what = f"{'output' if factor == FORWARD else 'gradient'} {number}, {measure.__name__}"
                assert error <= allowed, f"{what}: error {error:.3g}, plain PyTorch allows {allowed:.3g}"


def difference(y: Tensor, truth: Tensor) -> Tensor:
    assert y.shape == truth.shape
    return y.double() - truth.double()


def root_mean_square(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def rounding(value: float, dtype: torch.dtype) -> float:
    """Half a unit in the last place: what storing the exact result would cost."""
    return torch.finfo(dtype).eps / 2 * value


def assert_compiles(function: Function, *calls: Sequence[Tensor], backend: str = "aot_eager") -> None:
    """One graph, dynamic shapes, and the values of eager mode for every call."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for inputs in calls:
        for ours, eager in zip(run(compiled, inputs), run(function, inputs), strict=True):
            for y, expected in zip(ours, eager, strict=True):
                torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def permuted(x: Tensor) -> Tensor:
    """The same values, dense in memory, the first dimension running fastest."""
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def strided(x: Tensor) -> Tensor:
    """The same values with every dimension strided and the last one not contiguous."""
    wide = x.new_full([2 * size for size in x.shape], float("nan") if x.is_floating_point() else 0)
    view = wide[tuple(slice(None, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view
