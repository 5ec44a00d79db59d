"""The Triton kernels of the mixture of experts, behind the operators of op.py.

    triton_route.py     logits → weights and indices, and back
    triton_order.py     (token, slot) pairs → the order of their experts
    triton_experts.py   the experts, forward
    triton_backward.py  the experts, backward

An index outside [0, E) is never followed: its token's output, its token's gradient and its own weight's gradient are NaN, and the experts'
gradients leave it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from genrec.kernels.library import implement
from genrec.kernels.moe.triton_backward import experts_backward
from genrec.kernels.moe.triton_experts import experts
from genrec.kernels.moe.triton_route import route, route_backward


def examples(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls on meta tensors that reach every kernel and every branch, for compilation without a GPU."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for e, k in (16, 4), (256, 8):
        logits, weights, indices = empty(64, e), empty(64, k, dtype=torch.float32), empty(64, k, dtype=torch.int32)
        for renormalize in (True, False):
            for bias in (None, empty(e, dtype=torch.float32)):
                name = f"route E{e} k{k} renormalize={renormalize} bias={bias is not None}"
                yield name, lambda a=(logits, k, bias, renormalize): route(*a)
            yield f"{name} backward", lambda a=(weights, logits, indices, renormalize): route_backward(*a)

    for t, e, d, f in (16, 16, 1024, 1024), (512, 16, 1024, 1024), (8192, 16, 1024, 1024), (8192, 256, 1024, 1024), (40, 5, 100, 60):
        x, weights, indices = empty(t, d), empty(t, 4, dtype=torch.float32), empty(t, 4, dtype=torch.int32)
        arguments = (x, weights, indices, empty(e, 2 * f, d), empty(e, d, f))
        yield f"experts T{t} E{e} D{d} F{f}", lambda a=arguments: experts(*a)
        yield f"experts T{t} E{e} D{d} F{f} backward", lambda a=arguments: experts_backward(a[0], *a)


implement("moe_route", route)
implement("moe_route_backward", route_backward)
implement("moe_experts", experts)
implement("moe_experts_backward", experts_backward)
