"""Registration of the mixture of experts: genrec::moe_route, genrec::moe_experts and their backward passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genrec.kernels.library import define, lower
from genrec.kernels.moe import reference
from genrec.kernels.moe import sorted as sorted_rows


def _route(logits: Tensor, top_k: int, bias: Tensor | None, renormalize: bool) -> tuple[Tensor, Tensor]:
    return reference.moe_route(logits, top_k, bias=bias, renormalize=renormalize)


def _route_backward(grad: Tensor, logits: Tensor, indices: Tensor, renormalize: bool) -> Tensor:
    """A softmax backward: over the kept logits, or over all of them with no gradient where nothing was kept."""
    wide, kept = logits.to(grad.dtype), indices.long()
    if renormalize:
        weights = wide.gather(1, kept).softmax(1)
        grad_kept = weights * (grad - (grad * weights).sum(1, keepdim=True))
        return wide.new_zeros(wide.shape).scatter_(1, kept, grad_kept).to(logits.dtype)
    probabilities = wide.softmax(1)
    grad_all = wide.new_zeros(wide.shape).scatter_(1, kept, grad)
    return (probabilities * (grad_all - (grad_all * probabilities).sum(1, keepdim=True))).to(logits.dtype)


def _fake_route(logits: Tensor, top_k: int, bias: Tensor | None, renormalize: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=dtype), logits.new_empty(shape, dtype=torch.int32)


def _fake_route_backward(grad: Tensor, logits: Tensor, indices: Tensor, renormalize: bool) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_route(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0], output[1])
    ctx.renormalize = inputs[3]


def _differentiate_route(ctx: Any, grad: Tensor, grad_indices: Any) -> tuple[Any, ...]:
    return torch.ops.genrec.moe_route_backward(grad, *ctx.saved_tensors, ctx.renormalize), None, None, None


def _fake_experts(x: Tensor, weights: Tensor, indices: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fake_experts_backward(
    grad: Tensor, x: Tensor, weights: Tensor, indices: Tensor, *experts: Tensor
) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, weights, *experts))


def _setup_experts(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_experts(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_x, grad_weights, *grad_experts = torch.ops.genrec.moe_experts_backward(grad, *ctx.saved_tensors)
    return grad_x, grad_weights, None, *grad_experts


def _cast_experts(dtype: torch.dtype, x: Tensor, weights: Tensor, indices: Tensor, *experts: Tensor) -> tuple[Any, ...]:
    """Autocast: tokens and experts in its dtype; the routing weights stay float32."""
    x, *lowered = lower(dtype, x, *experts)
    return x, weights, indices, *lowered


EXPERTS = "Tensor x, Tensor weights, Tensor indices, Tensor w_gate_up, Tensor w_down"
define(
    "moe_route(Tensor logits, int top_k, Tensor? bias, bool renormalize) -> (Tensor, Tensor)",
    impl=_route,
    fake=_fake_route,
    setup_context=_setup_route,
    backward=_differentiate_route,
)
define(
    "moe_route_backward(Tensor grad, Tensor logits, Tensor indices, bool renormalize) -> Tensor",
    impl=_route_backward,
    fake=_fake_route_backward,
)
define(
    f"moe_experts({EXPERTS}) -> Tensor",
    impl=sorted_rows.forward,
    fake=_fake_experts,
    setup_context=_setup_experts,
    backward=_differentiate_experts,
    autocast=_cast_experts,
)
define(
    f"moe_experts_backward(Tensor grad, {EXPERTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    impl=sorted_rows.backward,
    fake=_fake_experts_backward,
)
