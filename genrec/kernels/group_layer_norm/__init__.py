"""Group layer norm: statistics per token, scale and shift per group of tokens."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from genrec.kernels.checks import (
    INTEGERS,
    check_device,
    check_dims,
    check_floating,
    check_integer,
    check_range,
    check_shape,
)
from genrec.kernels.group_layer_norm import op as op
from genrec.kernels.library import entry

__all__ = ["group_layer_norm"]


def _check_ids(group_ids: Tensor, weight: Tensor) -> None:
    check_range("group_ids", group_ids, weight.shape[0], "groups")


_group_layer_norm = entry("group_layer_norm", lambda x, ids, weight, *_: _check_ids(ids, weight))
_add_group_layer_norm = entry("add_group_layer_norm", lambda x, s, ids, weight, *_: _check_ids(ids, weight))


@overload
def group_layer_norm(
    x: Tensor, group_ids: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, residual: None = None
) -> Tensor: ...
@overload
def group_layer_norm(
    x: Tensor, group_ids: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, residual: Tensor
) -> tuple[Tensor, Tensor]: ...
def group_layer_norm(
    x: Tensor, group_ids: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """y = (s − mean(s)) / sqrt(var(s) + eps) · weight[group] + bias[group], with s = x or x + residual

    The token-group layer norm of MTGR (Han et al. 2025): tokens of different meaning share a layer but not an affine.

    Args:
        x: (…, D) floating, any strides. Mean and variance are taken over D, in float32 (float64 for float64).
        group_ids: (…) int32 or int64 in [0, G), the group of every token.
        weight, bias: (G, D) floating; they may be float32 beside an x in half precision.
        eps: added to the variance.
        residual: (…, D) floating. s has the wider dtype of the two, is rounded to it and then normed.

    Returns:
        norm(s), (…, D) in the dtype of s; with residual the pair (norm(s), s). Autocast changes nothing here.

    Raises:
        ValueError: a shape or device that does not fit. TypeError: a dtype that does not fit.
        IndexError: a group id outside [0, G) on the CPU, RuntimeError under torch.compile (a GPU makes the token NaN).
    """
    if not _usual(x, group_ids, weight, bias, residual):
        _check(x, group_ids, weight, bias, residual)
    if residual is None:
        return _group_layer_norm(x, group_ids, weight, bias, eps)
    return _add_group_layer_norm(x, residual, group_ids, weight, bias, eps)


def _usual(x: Tensor, group_ids: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> bool:
    """Whether everything fits, in one look: asking one by one takes longer than a small norm."""
    shape, affine, device = x.shape, weight.shape, x.device
    return (
        len(shape) > 0
        and len(affine) == 2
        and affine == bias.shape
        and affine[0] > 0
        and affine[1] == shape[-1] > 0
        and group_ids.shape == shape[:-1]
        and group_ids.dtype in INTEGERS
        and x.is_floating_point()
        and weight.is_floating_point()
        and bias.is_floating_point()
        and device == group_ids.device == weight.device == bias.device
        and (
            residual is None or (residual.shape == shape and residual.is_floating_point() and residual.device == device)
        )
    )


def _check(x: Tensor, group_ids: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> None:
    """Says what does not fit."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (…, D) with D at least 1")
    check_floating(x=x, weight=weight, bias=bias)
    check_integer("group_ids", group_ids)
    check_shape("group_ids", group_ids, x.shape[:-1], "the shape of x without D")
    check_dims("weight", weight, "(G, D)")
    if weight.shape[0] == 0:
        raise ValueError("weight has 0 groups; expected (G, D) with G at least 1")
    check_shape("weight", weight, (weight.shape[0], x.shape[-1]), "(G, D)")
    check_shape("bias", bias, weight.shape, "the shape of weight")
    check_device(x.device, group_ids=group_ids, weight=weight, bias=bias, residual=residual)
    if residual is not None:
        check_floating(residual=residual)
        check_shape("residual", residual, x.shape, "the shape of x")
