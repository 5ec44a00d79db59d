# mypy: allow-untyped-defs
"""Group layer norm on the GPU: genrec::group_layer_norm, genrec::add_group_layer_norm and their backward pass.

Memory bounds all of it. For N tokens of D elements, e bytes each, the least that must move is
    forward 2·N·D·e, with residual 4·N·D·e (x, residual, s, y), backward 3·N·D·e (grad, s, grad_s).

A program of the forward pass owns ROWS tokens, as many as make a few 16-byte loads for every thread. Mean, variance and
result are three passes over the chunks of a row. Where a row is one chunk, which is so up to the last BLOCK_D of
launch.csv, the compiler merges the equal loads of the passes and every element is read once; beyond that the second and
third pass find the row in the cache. s is rounded to its dtype before it is normed: forward and backward see one s.

A program of the backward pass walks its own fixed part of the tokens and handles those of GROUPS groups (a second set
of programs takes the next GROUPS, and so on): it writes grad_s and adds dy · x̂ and dy to float32 sums in registers, one
pair for each group. At the end it writes the sums as one row of partials, which are added in a fixed order: no atomics,
the same bits every time. The work is split by shape alone. The partials cost 16·G·D bytes a program, an eighth of the
traffic or less for four groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genrec.kernels.launch import Table, launch
from genrec.kernels.library import implement

TABLE = Table(Path(__file__).with_name("launch.csv"))
PROGRAMS = 1024  # that share the tokens in the backward pass, at most
TOKENS = 64  # that each of them has, at least


@triton.jit
def _load(x, residual, x_at, residual_at, column, mask, DTYPE: tl.constexpr):
    """A chunk of s in float32, rounded as it is stored; 0 outside the mask."""
    s = tl.load(x + x_at[:, None] + column[None, :], mask=mask, other=0).to(tl.float32)
    if residual is not None:
        s += tl.load(residual + residual_at[:, None] + column[None, :], mask=mask, other=0).to(tl.float32)
    return s.to(DTYPE).to(tl.float32)


@triton.jit
def _moments(
    x, residual, x_at, residual_at, token, dim, eps,
    DTYPE: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / sqrt(variance + eps) of every row, (ROWS, 1): exact two-pass statistics in float32."""
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for chunk in range(CHUNKS):
        column = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        total += _load(x, residual, x_at, residual_at, column, token[:, None] & (column < dim)[None, :], DTYPE)
    mean = (tl.sum(total, 1) / dim)[:, None]
    squares = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for chunk in range(CHUNKS):
        column = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = token[:, None] & (column < dim)[None, :]
        centred = tl.where(inside, _load(x, residual, x_at, residual_at, column, inside, DTYPE) - mean, 0)
        squares += centred * centred
    return mean, tl.rsqrt(tl.sum(squares, 1) / dim + eps)[:, None]


@triton.jit
def _affine(table, group, known, column, dim):
    """Rows of weight or bias; NaN for a token whose group does not exist."""
    at = group.to(tl.int64)[:, None] * dim + column[None, :]
    values = tl.load(table + at, mask=known[:, None] & (column < dim)[None, :], other=0).to(tl.float32)
    return tl.where(known[:, None], values, float("nan"))


@triton.jit(do_not_specialize=["tokens", "eps"])
def _forward(
    x, residual, ids, weight, bias, y, s, tokens, dim, groups, x_stride, residual_stride, eps,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = row < tokens
    group = tl.load(ids + row, mask=token, other=0)
    known = (group >= 0) & (group < groups)
    x_at, residual_at = row * x_stride, row * residual_stride
    dtype: tl.constexpr = y.dtype.element_ty
    mean, rstd = _moments(x, residual, x_at, residual_at, token, dim, eps, dtype, CHUNKS, ROWS, BLOCK_D)
    for chunk in range(CHUNKS):
        column = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = token[:, None] & (column < dim)[None, :]
        values = _load(x, residual, x_at, residual_at, column, inside, dtype)
        normed = (values - mean) * rstd
        result = normed * _affine(weight, group, known, column, dim) + _affine(bias, group, known, column, dim)
        at = row[:, None] * dim + column[None, :]
        tl.store(y + at, result.to(dtype), mask=inside)
        if residual is not None:
            tl.store(s + at, values.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["tokens", "share", "eps"])
def _backward(
    grad, s, ids, weight, grad_sum, grad_s, partials, tokens, share, dim, groups, grad_stride, s_stride, sum_stride,
    eps, CHUNKS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, GROUPS: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Tokens part · share … + share of groups first … + GROUPS; of grad_s and the sums one chunk.

    With x̂ = (s − mean) · rstd and g = grad · weight[group]:  grad_s = (g − mean(g) − x̂ · mean(g · x̂)) · rstd
    """
    part, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * GROUPS
    own = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    dtype: tl.constexpr = s.dtype.element_ty
    sum_w = (tl.zeros((ROWS, BLOCK_D), tl.float32),) * GROUPS
    sum_b = (tl.zeros((ROWS, BLOCK_D), tl.float32),) * GROUPS

    for start in tl.range(part * share, tl.minimum((part + 1) * share, tokens), ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        token = row < tl.minimum((part + 1) * share, tokens)
        group = tl.load(ids + row, mask=token, other=0)
        known = (group >= 0) & (group < groups)
        number = tl.where(known, group, 0) - first  # tokens without a group are the first programs' to make NaN
        if SPLIT:  # otherwise no load of a token waits for its group
            token &= (number >= 0) & (number < GROUPS)
        s_at, grad_at = row * s_stride, row * grad_stride
        mean, rstd = _moments(s, None, s_at, s_at, token, dim, eps, dtype, CHUNKS, ROWS, BLOCK_D)

        total, projection = tl.zeros((ROWS, BLOCK_D), tl.float32), tl.zeros((ROWS, BLOCK_D), tl.float32)
        for chunk in range(CHUNKS):
            column = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
            inside = token[:, None] & (column < dim)[None, :]
            normed = (_load(s, None, s_at, s_at, column, inside, dtype) - mean) * rstd
            g = tl.load(grad + grad_at[:, None] + column[None, :], mask=inside, other=0).to(tl.float32)
            g = tl.where(inside, g * _affine(weight, group, known, column, dim), 0)
            total += g
            projection += g * normed
        mean_g, mean_gx = (tl.sum(total, 1) / dim)[:, None], (tl.sum(projection, 1) / dim)[:, None]

        inside = token[:, None] & (own < dim)[None, :]
        normed = (_load(s, None, s_at, s_at, own, inside, dtype) - mean) * rstd
        dy = tl.load(grad + grad_at[:, None] + own[None, :], mask=inside, other=0).to(tl.float32)
        g = dy * _affine(weight, group, known, own, dim)
        result = (g - mean_g - normed * mean_gx) * rstd
        if grad_sum is not None:  # the gradient that reached s past the norm
            at = (row * sum_stride)[:, None] + own[None, :]
            result += tl.load(grad_sum + at, mask=inside, other=0).to(tl.float32)
        tl.store(grad_s + row[:, None] * dim + own[None, :], result.to(dtype), mask=inside)
        for i in tl.static_range(GROUPS):
            mine = (known & token & (number == i))[:, None]
            sum_w = sum_w[:i] + (sum_w[i] + tl.where(mine, dy * normed, 0),) + sum_w[i + 1 :]
            sum_b = sum_b[:i] + (sum_b[i] + tl.where(mine, dy, 0),) + sum_b[i + 1 :]

    for i in tl.static_range(GROUPS):
        at = (part * groups + first + i) * dim + own
        mask = (own < dim) & (first + i < groups)
        tl.store(partials + at, tl.sum(sum_w[i], 0), mask=mask)
        tl.store(partials + tl.num_programs(0).to(tl.int64) * groups * dim + at, tl.sum(sum_b[i], 0), mask=mask)


def _rows(x: Tensor) -> Tensor:
    """(…, D) → (N, D) with neighbouring elements; a copy only where the strides leave no other way."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _norm(
    x: Tensor, residual: Tensor | None, group_ids: Tensor, weight: Tensor, bias: Tensor, eps: float, s: Tensor
) -> Tensor:
    """norm(s), where s is x or else gets x + residual."""
    y, dim = s.new_empty(s.shape), s.shape[-1]
    rows, added = _rows(x), None if residual is None else _rows(residual)
    config = TABLE.config("forward", s, dim=dim)
    launch(
        _forward, (triton.cdiv(len(rows), config["ROWS"]),),
        rows, added, group_ids.flatten().contiguous(), weight.contiguous(), bias.contiguous(), y, s,
        len(rows), dim, len(weight), rows.stride(0), 0 if added is None else added.stride(0), eps,
        CHUNKS=triton.cdiv(dim, config["BLOCK_D"]), **config,
    )  # fmt: skip
    return y


def _group_layer_norm(x: Tensor, group_ids: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _norm(x, None, group_ids, weight, bias, eps, x)


def _add_group_layer_norm(
    x: Tensor, residual: Tensor, group_ids: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    s = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return _norm(x, residual, group_ids, weight, bias, eps, s), s


def _group_layer_norm_backward(
    grad: Tensor,
    s: Tensor,
    group_ids: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    grad_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_s, dim = s.new_empty(s.shape), s.shape[-1]
    rows, grad_rows, sum_rows = _rows(s), _rows(grad), None if grad_sum is None else _rows(grad_sum)
    config = dict(TABLE.config("backward", s, dim=dim))
    config["GROUPS"] = min(config["GROUPS"], len(weight))
    parts = min(PROGRAMS, triton.cdiv(len(rows), TOKENS))
    share = triton.cdiv(len(rows), max(parts, 1) * config["ROWS"]) * config["ROWS"]
    chunks = triton.cdiv(dim, config["BLOCK_D"])
    partials = weight.new_empty(2, parts, *weight.shape, dtype=torch.float32)
    launch(
        _backward, (parts, triton.cdiv(len(weight), config["GROUPS"]), chunks),
        grad_rows, rows, group_ids.flatten().contiguous(), weight.contiguous(), sum_rows, grad_s, partials,
        len(rows), share, dim, len(weight), grad_rows.stride(0), rows.stride(0),
        0 if sum_rows is None else sum_rows.stride(0), eps,
        CHUNKS=chunks, SPLIT=len(weight) > config["GROUPS"], **config,
    )  # fmt: skip
    return grad_s, partials[0].sum(0).to(weight.dtype), partials[1].sum(0).to(bias.dtype)


def examples(dtype: torch.dtype, device: torch.device | str = "meta") -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches for compilation without a GPU: rows shorter than a chunk, of one chunk and of several."""
    for dim in (16, 20, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 12288):
        x = torch.empty(1000, dim, dtype=dtype, device=device)
        ids = torch.zeros(1000, dtype=torch.int64, device=device)
        weight = torch.empty(6, dim, device=device)
        few, many = ((ids, affine, affine, 1e-5) for affine in (weight[:4], weight))
        yield f"D={dim}, residual", partial(_add_group_layer_norm, x, x, *few)
        yield f"D={dim}, backward", partial(_group_layer_norm_backward, x, x, *few, x)
        if dim in (20, 1024, 12288):
            yield f"D={dim}", partial(_group_layer_norm, x, *few)
            yield f"D={dim}, backward, many groups", partial(_group_layer_norm_backward, x, x, *many)


implement("group_layer_norm", _group_layer_norm)
implement("add_group_layer_norm", _add_group_layer_norm)
implement("group_layer_norm_backward", _group_layer_norm_backward)
