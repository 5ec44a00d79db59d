"""Registration of group layer norm: genrec::group_layer_norm, genrec::add_group_layer_norm and their backward pass.

With x̂ = (s − mean) / σ and g = dy · weight[group], over the D features of a token:
    ds = (g − mean(g) − x̂ · mean(g · x̂)) / σ     dweight[group] += dy · x̂     dbias[group] += dy
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genrec.kernels.group_layer_norm import reference
from genrec.kernels.library import define


def _wide(tensor: Tensor) -> Tensor:
    """Statistics are float32 at least."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _forward(x: Tensor, group_ids: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    y = reference.group_layer_norm(_wide(x), group_ids, _wide(weight), _wide(bias), eps)
    return y.to(x.dtype)  # type: ignore[union-attr]


def _forward_add(
    x: Tensor, residual: Tensor, group_ids: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    s = (_wide(x) + _wide(residual)).to(torch.promote_types(x.dtype, residual.dtype))
    return _forward(s, group_ids, weight, bias, eps), s


def _backward(
    grad: Tensor, s: Tensor, group_ids: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide, grad = _wide(s), _wide(grad)
    centred = wide - wide.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normed = centred * rstd
    group = group_ids.flatten().clamp(0, len(weight) - 1)
    g = grad * _wide(weight).index_select(0, group).view(grad.shape)
    grad_s = (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True)) * rstd
    zeros = torch.zeros(weight.shape, dtype=wide.dtype, device=wide.device)
    grad_weight = zeros.index_add(0, group, (grad * normed).reshape(-1, weight.shape[1]))
    grad_bias = zeros.index_add(0, group, grad.reshape(-1, weight.shape[1]))
    return grad_s.to(s.dtype), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _fake(x: Tensor, group_ids: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _fake_add(
    x: Tensor, residual: Tensor, group_ids: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    s = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return s, torch.empty_like(s)


def _fake_backward(
    grad: Tensor, s: Tensor, group_ids: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return s.new_empty(s.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _setup_context_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, *tensors, ctx.eps = inputs
    ctx.dtypes = x.dtype, residual.dtype
    ctx.save_for_backward(output[1], *tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_x, grad_weight, grad_bias = torch.ops.genrec.group_layer_norm_backward(grad, *ctx.saved_tensors, ctx.eps)
    return grad_x, None, grad_weight, grad_bias, None


def _differentiate_add(ctx: Any, grad: Tensor, grad_sum: Tensor) -> tuple[Any, ...]:
    grad_s, grad_weight, grad_bias = torch.ops.genrec.group_layer_norm_backward(grad, *ctx.saved_tensors, ctx.eps)
    grad_s = grad_s + grad_sum
    dtype_x, dtype_residual = ctx.dtypes
    return grad_s.to(dtype_x), grad_s.to(dtype_residual), None, grad_weight, grad_bias, None


AFFINE = "Tensor group_ids, Tensor weight, Tensor bias, float eps"
define(
    f"group_layer_norm(Tensor x, {AFFINE}) -> Tensor",
    impl=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_differentiate,
)
define(
    f"add_group_layer_norm(Tensor x, Tensor residual, {AFFINE}) -> (Tensor, Tensor)",
    impl=_forward_add,
    fake=_fake_add,
    setup_context=_setup_context_add,
    backward=_differentiate_add,
)
define(
    f"group_layer_norm_backward(Tensor grad, Tensor s, {AFFINE}) -> (Tensor, Tensor, Tensor)",
    impl=_backward,
    fake=_fake_backward,
)
