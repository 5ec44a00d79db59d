"""ReLU attention: every visible key with a positive score takes part, and nothing is normalised by a softmax."""

from __future__ import annotations

from collections.abc import Sequence
from operator import sub

import torch
from torch import Tensor

from genrec.kernels.checks import (
    check_device,
    check_dims,
    check_floating,
    check_int,
    check_integer,
    check_same_dtype,
    check_shape,
    has_values,
)
from genrec.kernels.library import entry
from genrec.kernels.relu_attention import op as op

__all__ = ["relu_attention", "relu_attention_varlen"]

_relu_attention = entry("relu_attention")
_relu_attention_varlen = entry("relu_attention_varlen")


def relu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    key_limit: Tensor | None = None,
    rel_bias: Tensor | None = None,
    scale: float | None = None,
    normalizer: str | float | Tensor = "length",
) -> Tensor:
    """out_i = Σ_j visible_ij · relu(scale · q_i·k_j + rel_bias[h, d_ij]) · v_j / n_i

    Pointwise attention as in HSTU (Zhai et al. 2024, "Actions speak louder than words"), with ReLU for SiLU.

    Args:
        q, k, v: (B, H, Lq, D), (B, H, Lk, D) and (B, H, Lk, Dv), one floating dtype, any strides.
        causal: row i sees the keys j ≤ i + Lk − Lq (aligned at the bottom right).
        key_limit: (B, Lq) integer, instead of `causal`: row i sees the first key_limit[b, i] keys, clipped to [0, Lk].
        rel_bias: (H, R) learned bias by distance, any floating dtype; d_ij = (last key row i may see) − j under causal
            or key_limit, |i + Lk − Lq − j| otherwise, and distances from R − 1 on share the last entry.
        scale: factor of the scores, D^-1/2 if None.
        normalizer: n_i. "length": Lk. "visible": number of keys row i may see, at least 1, so that decoding step by
            step equals the full pass. A positive float, or a (B,) tensor of positive values, not differentiated.

    Returns:
        (B, H, Lq, Dv) in q's dtype; rows that see no key are 0. Half precision accumulates in float32; under autocast
        q, k and v are cast to its dtype and rel_bias is not.

    Raises:
        ValueError: a shape, device, scale or normalizer that does not fit, or both causal and key_limit.
        TypeError: a dtype that does not fit.
    """
    if not _alike(q, k, v, 4):
        for name, tensor, layout in (("q", q, "(B, H, Lq, D)"), ("k", k, "(B, H, Lk, D)"), ("v", v, "(B, H, Lk, Dv)")):
            check_dims(name, tensor, layout)
        _check_alike(q, k, v)
    (batch, heads, length_q, dim), shape_k, shape_v = q.shape, k.shape, v.shape
    if shape_k != (batch, heads, shape_k[2], dim) or shape_v != (batch, heads, shape_k[2], shape_v[3]):
        check_shape("k", k, (batch, heads, shape_k[2], dim), "(B, H, Lk, D)")
        check_shape("v", v, (batch, heads, shape_k[2], shape_v[3]), "(B, H, Lk, Dv)")
    if key_limit is not None:
        _check_limit(key_limit, (batch, length_q), "(B, Lq)", causal, q.device)
    if rel_bias is not None:
        _check_bias(rel_bias, heads, q.device)
    divisors, divisor, visible = _divisor(normalizer, batch, q.device)
    return _relu_attention(q, k, v, key_limit, rel_bias, divisors, causal, _scale(scale, dim), divisor, visible)


def relu_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    key_limit: Tensor | None = None,
    rel_bias: Tensor | None = None,
    scale: float | None = None,
    normalizer: str | float | Tensor = "length",
) -> Tensor:
    """`relu_attention` on sequences packed one after the other, the layout of flash-attention's varlen functions.

    Args:
        q, k, v: (Tq, H, D), (Tk, H, D) and (Tk, H, Dv), one floating dtype, any strides.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32 or int64 offsets from 0: sequence b owns the tokens
            cu_seqlens[b] … cu_seqlens[b + 1] − 1. Sequences may be empty, and tokens past the last offset are slack:
            their output and their gradients are 0.
        max_seqlen_q, max_seqlen_k: upper bounds of the sequence lengths.
        causal, rel_bias, scale: as in `relu_attention`, within each sequence.
        key_limit: (Tq,) integer, instead of `causal`: the row sees the first key_limit[t] keys of its sequence.
        normalizer: "length" is the number of keys of the row's own sequence, so results do not depend on the batch;
            "visible", a positive float, or a (B,) tensor as in `relu_attention`.

    Returns:
        (Tq, H, Dv) in q's dtype.

    Raises:
        ValueError: a shape, device, offset, bound, scale or normalizer that does not fit, or both causal and key_limit.
            Offsets are looked at in eager mode on the CPU only.
        TypeError: a dtype that does not fit.
    """
    if not _alike(q, k, v, 3):
        for name, tensor, layout in (("q", q, "(Tq, H, D)"), ("k", k, "(Tk, H, D)"), ("v", v, "(Tk, H, Dv)")):
            check_dims(name, tensor, layout)
        _check_alike(q, k, v)
    (tokens, heads, dim), shape_k, shape_v = q.shape, k.shape, v.shape
    if shape_k != (shape_k[0], heads, dim) or shape_v != (shape_k[0], heads, shape_v[2]):
        check_shape("k", k, (shape_k[0], heads, dim), "(Tk, H, D)")
        check_shape("v", v, (shape_k[0], heads, shape_v[2]), "(Tk, H, Dv)")
    if key_limit is not None:
        _check_limit(key_limit, (tokens,), "(Tq,)", causal, q.device)
    if rel_bias is not None:
        _check_bias(rel_bias, heads, q.device)
    _check_offsets("cu_seqlens_q", cu_seqlens_q, tokens, "max_seqlen_q", max_seqlen_q)
    if not (cu_seqlens_k is cu_seqlens_q and max_seqlen_k == max_seqlen_q and shape_k[0] == tokens):  # self-attention
        _check_offsets("cu_seqlens_k", cu_seqlens_k, shape_k[0], "max_seqlen_k", max_seqlen_k)
        check_shape("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape, "the shape of cu_seqlens_q")
    check_device(q.device, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    divisors, divisor, visible = _divisor(normalizer, cu_seqlens_q.shape[0] - 1, q.device)
    return _relu_attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        key_limit, rel_bias, divisors, causal, _scale(scale, dim), divisor, visible,
    )  # fmt: skip


def _alike(q: Tensor, k: Tensor, v: Tensor, dims: int) -> bool:
    """Whether q, k and v agree in dimensions, dtype and device: the usual case in one look, as calls are short."""
    return (
        type(q) is type(k) is type(v) is Tensor
        and q.dim() == k.dim() == v.dim() == dims
        and q.dtype is k.dtype is v.dtype
        and q.dtype.is_floating_point
        and q.device == k.device == v.device
    )


def _check_alike(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_same_dtype(q=q, k=k, v=v)
    check_device(q.device, k=k, v=v)


def _check_limit(key_limit: Tensor, shape: Sequence[int], layout: str, causal: bool, device: torch.device) -> None:
    check_shape("key_limit", key_limit, shape, layout)
    check_device(device, key_limit=key_limit)
    check_integer("key_limit", key_limit)
    if causal:
        raise ValueError("causal is True and key_limit is given; expected one of them")


def _check_bias(rel_bias: Tensor, heads: int, device: torch.device) -> None:
    check_device(device, rel_bias=rel_bias)
    check_floating(rel_bias=rel_bias)
    check_dims("rel_bias", rel_bias, "(H, R)")
    check_shape("rel_bias", rel_bias, (heads, rel_bias.shape[1]), "(H, R)")
    if rel_bias.shape[1] == 0:
        raise ValueError("rel_bias has 0 distances; expected (H, R) with R at least 1")


def _check_offsets(name: str, offsets: Tensor, tokens: int, bound_name: str, bound: int) -> None:
    check_integer(name, offsets)
    check_int(bound_name, bound)
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"{name} has shape {tuple(offsets.shape)}; expected (B + 1,) offsets")
    if not has_values(offsets):
        return
    values = offsets.tolist()
    if values[0] != 0 or values[-1] > tokens or values != sorted(values):
        raise ValueError(f"{name} goes from {values[0]} to {values[-1]}; expected offsets that start at 0, "
                         f"never fall and end at most at the number of tokens, {tokens}")  # fmt: skip
    longest = max(map(sub, values[1:], values), default=0)
    if longest > bound:
        raise ValueError(f"{bound_name} is {bound}; expected at least {longest}, the longest sequence of {name}")


def _scale(scale: float | None, dim: int) -> float:
    return float(dim) ** -0.5 if scale is None and dim else float(scale or 0.0)


def _divisor(normalizer: str | float | Tensor, batch: int, device: torch.device) -> tuple[Tensor | None, float, bool]:
    """The arguments divisors, divisor and visible of the operator."""
    if isinstance(normalizer, Tensor):
        check_floating(normalizer=normalizer)
        check_shape("normalizer", normalizer, (batch,), "(B,)")
        check_device(device, normalizer=normalizer)
        return normalizer, 0.0, False
    if isinstance(normalizer, str) and normalizer in ("length", "visible"):
        return None, 0.0, normalizer == "visible"
    if not isinstance(normalizer, int | float):
        kind = ValueError if isinstance(normalizer, str) else TypeError
        raise kind(f'normalizer is {normalizer!r}; expected "length", "visible", a float or a (B,) tensor')
    if not normalizer > 0:
        raise ValueError(f"normalizer is {normalizer}; expected a positive number")
    return None, float(normalizer), False
