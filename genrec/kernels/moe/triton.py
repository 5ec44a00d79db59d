"""The Triton kernels of the mixture of experts, behind the operators of op.py.

    triton_route.py     logits → weights and indices, and back
    triton_order.py     (token, slot) pairs → the order of their experts
    triton_experts.py   the experts, forward
    triton_backward.py  the experts, backward

An index outside [0, E) is never followed. NaN shows it: the output and gradient of its token, and the gradient of its
weight. The gradients of the experts leave it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from genrec.kernels.library import implement
from genrec.kernels.moe.triton_backward import experts_backward
from genrec.kernels.moe.triton_experts import experts
from genrec.kernels.moe.triton_order import TABLE as TABLE
from genrec.kernels.moe.triton_route import route, route_backward


def examples(dtype: torch.dtype, device: torch.device | str = "meta") -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls that reach every kernel and every branch, for compilation without a GPU and for tuning on one."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def chosen(tokens: int, k: int, experts: int) -> torch.Tensor:
        return torch.randint(0, experts, (tokens, k), dtype=torch.int32, device=device)

    for e, k, plain in (16, 4, True), (16, 4, False), (64, 4, True), (256, 8, True), (1024, 8, True):
        logits, weights, indices = empty(64, e), empty(64, k, dtype=torch.float32), chosen(64, k, e)
        bias = None if plain else empty(e, dtype=torch.float32)
        name = f"E {e} k {k}{'' if plain else ' with bias, not renormalized'}"
        yield f"route {name}", partial(route, logits, k, bias, plain)
        yield f"route backward {name}", partial(route_backward, weights, logits, indices, plain)

    decoding, few, many = 16, 256, 8192
    weights, indices = empty(64, 4, dtype=torch.float32), chosen(64, 4, 8)
    transposed = (empty(64, 128), weights, indices, empty(8, 128, 128).mT, empty(8, 64, 128).mT)
    yield "experts with transposed weights", partial(experts, *transposed)
    yield "experts backward with transposed weights", partial(experts_backward, transposed[0], *transposed)
    for t, e, d, f in (
        *((decoding, 16, 1024, 1024), (few, 16, 1024, 1024), (many, 16, 1024, 1024)),  # the shape classes
        *((many, 5, 112, 80), (many, 256, 100, 60)),  # tiles that are cut, and loads that go element by element
        *((few, 64, 64, 64), (few, 1024, 64, 64)),  # the widths of the counting sort
    ):
        x, weights, indices = empty(t, d), empty(t, 4, dtype=torch.float32), chosen(t, 4, e)
        arguments = (x, weights, indices, empty(e, 2 * f, d), empty(e, d, f))
        yield f"experts T {t} E {e} D {d} F {f}", partial(experts, *arguments)
        yield f"experts backward T {t} E {e} D {d} F {f}", partial(experts_backward, x, *arguments)


implement("moe_route", route)
implement("moe_route_backward", route_backward)
implement("moe_experts", experts)
implement("moe_experts_backward", experts_backward)
