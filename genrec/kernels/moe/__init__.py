"""Mixture of experts: routing, the experts themselves, and the feed-forward layer made of both."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from genrec.kernels.checks import (
    INTEGERS,
    check_device,
    check_dims,
    check_floating,
    check_int,
    check_integer,
    check_range,
    check_same_dtype,
    check_shape,
)
from genrec.kernels.library import entry
from genrec.kernels.moe import op as op

__all__ = ["moe_experts", "moe_ffn", "moe_route"]

_moe_route = entry("moe_route")
_moe_experts = entry("moe_experts", lambda x, weights, ids, w, _: check_range("indices", ids, w.shape[0], "experts"))


def moe_route(
    logits: Tensor, top_k: int = 4, *, bias: Tensor | None = None, renormalize: bool = True
) -> tuple[Tensor, Tensor]:
    """The top_k experts of every token and their weights: softmax in float32, top-k, renormalise.

    Args:
        logits: (T, E) floating.
        top_k: experts per token, 1 … E.
        bias: (E,) floating, added to the probabilities for the selection only, as in auxiliary-loss-free balancing
            (Wang et al. 2024). It has no gradient.
        renormalize: whether the weights of a token sum to 1; otherwise they are the probabilities themselves.

    Returns:
        weights: (T, k) float32 (float64 for float64 logits), differentiable with respect to the logits.
        indices: (T, k) int32, by falling probability + bias, the lower index first among equals.
        Autocast changes nothing here.

    Raises:
        ValueError: a shape, device or top_k that does not fit. TypeError: a dtype that does not fit.
    """
    check_dims("logits", logits, "(T, E)")
    check_floating(logits=logits)
    check_int("top_k", top_k)
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k is {top_k}; expected 1 … {logits.shape[1]}, the number of experts")
    if bias is not None:
        check_floating(bias=bias)
        check_shape("bias", bias, (logits.shape[1],), "(E,)")
        check_device(logits.device, bias=bias)
    weights, indices = _moe_route(logits, top_k, bias, renormalize)
    return weights, indices


def moe_experts(x: Tensor, weights: Tensor, indices: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """y_t = Σ_j weights[t, j] · (silu(x_t Wgᵀ) ⊙ (x_t Wuᵀ)) Wdᵀ with e = indices[t, j]; no token is dropped.

    SwiGLU experts (Shazeer 2020) in the layout of Hugging Face MoE checkpoints.

    Args:
        x: (T, D) floating.
        weights: (T, k) floating, float32 beside an x in half precision.
        indices: (T, k) int32 or int64 in [0, E).
        w_gate_up: (E, 2F, D), [Wg; Wu] of every expert, in x's dtype.
        w_down: (E, D, F), in x's dtype.

    Returns:
        (T, D) in x's dtype, differentiable with respect to everything but the indices. The sum over a token's experts
        accumulates in the dtype of `weights`. Under autocast x, w_gate_up and w_down are cast to its dtype.

    Raises:
        ValueError: a shape or device that does not fit. TypeError: a dtype that does not fit.
        IndexError: an index outside [0, E) (eager mode on the CPU).
    """
    if not _usual(x, weights, indices, w_gate_up, w_down):
        _check(x, weights, indices, w_gate_up, w_down)
    return _moe_experts(x, weights, indices, w_gate_up, w_down)


def _usual(x: Tensor, weights: Tensor, indices: Tensor, w_gate_up: Tensor, w_down: Tensor) -> bool:
    """Whether everything fits, in one look: asking one by one takes longer than small experts."""
    tokens, pairs, gate_up = x.shape, indices.shape, w_gate_up.shape
    return (
        len(tokens) == 2
        and len(gate_up) == 3
        and len(pairs) == 2
        and pairs == weights.shape
        and pairs[0] == tokens[0]
        and gate_up[2] == tokens[1]
        and gate_up[1] % 2 == 0
        and w_down.shape == (gate_up[0], gate_up[2], gate_up[1] // 2)
        and x.dtype is w_gate_up.dtype is w_down.dtype
        and x.is_floating_point()
        and weights.is_floating_point()
        and indices.dtype in INTEGERS
        and x.device == weights.device == indices.device == w_gate_up.device == w_down.device
    )


def _check(x: Tensor, weights: Tensor, indices: Tensor, w_gate_up: Tensor, w_down: Tensor) -> None:
    """Says what does not fit."""
    check_dims("x", x, "(T, D)")
    check_dims("indices", indices, "(T, k)")
    check_dims("w_gate_up", w_gate_up, "(E, 2F, D)")
    experts, rows, dim = w_gate_up.shape
    if rows % 2:
        raise ValueError(f"w_gate_up has {rows} rows per expert; expected an even number, 2F")
    check_shape("w_gate_up", w_gate_up, (experts, rows, x.shape[1]), "(E, 2F, D)")
    check_shape("w_down", w_down, (experts, dim, rows // 2), "(E, D, F)")
    check_shape("indices", indices, (x.shape[0], indices.shape[1]), "(T, k)")
    check_shape("weights", weights, indices.shape, "(T, k)")
    check_same_dtype(x=x, w_gate_up=w_gate_up, w_down=w_down)
    check_floating(weights=weights)
    check_integer("indices", indices)
    check_device(x.device, weights=weights, indices=indices, w_gate_up=w_gate_up, w_down=w_down)


def moe_ffn(
    x: Tensor,
    router_weight: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    top_k: int = 4,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """The whole layer: logits = x router_weightᵀ, then `moe_route`, then `moe_experts`.

    Args:
        x: (T, D); router_weight: (E, D) of x's dtype; the others as in `moe_route` and `moe_experts`.

    Returns:
        (T, D). Under autocast the logits are computed in its dtype and the softmax in float32.

    Raises:
        ValueError, TypeError: as the two functions do.
    """
    check_dims("x", x, "(T, D)")
    check_dims("w_gate_up", w_gate_up, "(E, 2F, D)")
    check_shape("router_weight", router_weight, (w_gate_up.shape[0], x.shape[1]), "(E, D)")
    check_same_dtype(x=x, router_weight=router_weight)
    check_device(x.device, router_weight=router_weight)
    weights, indices = moe_route(F.linear(x, router_weight), top_k, bias=bias)
    return moe_experts(x, weights, indices, w_gate_up, w_down)
