"""Registration of group layer norm: genrec::group_layer_norm, genrec::add_group_layer_norm and their backward pass.

torch's native layer norm does the part without an affine. With x̂ = (s − mean) / σ and g = dy · weight[group]:
    ds = (g − mean(g) − x̂ · mean(g · x̂)) / σ     dweight[group] += dy · x̂     dbias[group] += dy
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genrec.kernels.checks import check_range
from genrec.kernels.library import define


def _wide(tensor: Tensor) -> Tensor:
    """Statistics are float32 at least."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _rows(group_ids: Tensor, groups: int) -> Tensor:
    """One row of `_affine` per token: its group, or the row of NaN behind the groups if there is no such group, which
    is an IndexError where the ids can be looked at."""
    check_range("group_ids", group_ids, groups, "groups")
    known = (group_ids >= 0) & (group_ids < groups)
    return torch.where(known, group_ids, groups).flatten()


def _affine(table: Tensor) -> Tensor:
    return torch.cat([table, table.new_full((1, table.shape[1]), torch.nan)])


def _forward(x: Tensor, group_ids: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    wide, group = _wide(x), _rows(group_ids, len(weight))
    normed, _, _ = torch.native_layer_norm(wide, wide.shape[-1:], None, None, eps)
    scale, shift = (_affine(t.to(wide.dtype)).index_select(0, group).view(x.shape) for t in (weight, bias))
    return torch.addcmul(shift, normed, scale).to(x.dtype)


def _forward_add(
    x: Tensor, residual: Tensor, group_ids: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    s = _sum(x, residual).contiguous()
    return _forward(s, group_ids, weight, bias, eps), s


def _sum(x: Tensor, residual: Tensor) -> Tensor:
    return (_wide(x) + _wide(residual)).to(torch.promote_types(x.dtype, residual.dtype))


def _backward(
    grad: Tensor,
    s: Tensor,
    group_ids: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    grad_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    wide, group = _wide(s), _rows(group_ids, len(weight))
    grad = grad.to(wide.dtype)
    shape = wide.shape[-1:]
    normed, mean, rstd = torch.native_layer_norm(wide, shape, None, None, eps)
    g = grad * _affine(weight.to(wide.dtype)).index_select(0, group).view(s.shape)
    grad_s = torch.ops.aten.native_layer_norm_backward(g, wide, shape, mean, rstd, None, None, [True, False, False])[0]
    if grad_sum is not None:
        grad_s = grad_s + grad_sum
    zeros = torch.zeros(len(weight) + 1, *shape, dtype=wide.dtype, device=wide.device)
    grad_weight = zeros.index_add(0, group, (grad * normed).reshape(-1, *shape))[:-1]
    grad_bias = zeros.index_add(0, group, grad.reshape(-1, *shape))[:-1]
    return grad_s.to(s.dtype), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _fake(x: Tensor, group_ids: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _fake_add(
    x: Tensor, residual: Tensor, group_ids: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    s = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return torch.empty_like(s), s


def _fake_backward(
    grad: Tensor,
    s: Tensor,
    group_ids: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    grad_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return s.new_empty(s.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _setup_context_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, *tensors, ctx.eps = inputs
    ctx.dtypes = x.dtype, residual.dtype
    ctx.save_for_backward(output[1], *tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_x, grad_weight, grad_bias = torch.ops.genrec.group_layer_norm_backward(grad, *ctx.saved_tensors, ctx.eps)
    return grad_x, None, grad_weight, grad_bias, None


def _differentiate_add(ctx: Any, grad: Tensor | None, grad_sum: Tensor | None) -> tuple[Any, ...]:
    s, *tensors = ctx.saved_tensors
    grad = torch.zeros_like(s) if grad is None else grad
    grad_s, *grad_affine = torch.ops.genrec.group_layer_norm_backward(grad, s, *tensors, ctx.eps, grad_sum)
    dtype_x, dtype_residual = ctx.dtypes
    return grad_s.to(dtype_x), grad_s.to(dtype_residual), None, *grad_affine, None


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
    f"group_layer_norm_backward(Tensor grad, Tensor s, {AFFINE}, Tensor? grad_sum=None) -> (Tensor, Tensor, Tensor)",
    impl=_backward,
    fake=_fake_backward,
)
