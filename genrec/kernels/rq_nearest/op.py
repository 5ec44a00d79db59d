"""Registration of residual nearest-code search: genrec::rq_nearest and its backward pass.

It returns (quantized, codes): what has a gradient comes first. The codes are constants to autograd:
d codebooks[l][c] = Σ over the rows with code c of d quantized, and x has no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genrec.kernels.library import define
from genrec.kernels.rq_nearest import reference


def _forward(x: Tensor, codebooks: list[Tensor]) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, codebooks[0].dtype)
    if wide != torch.float64:
        wide = torch.float32
    codes, quantized = reference.rq_nearest(x.to(wide), [codebook.to(wide) for codebook in codebooks])
    return quantized.to(codebooks[0].dtype), codes


def _backward(grad: Tensor, codes: Tensor, sizes: list[int]) -> list[Tensor]:
    wide = grad if grad.dtype == torch.float64 else grad.float()
    return [
        wide.new_zeros(size, grad.shape[1]).index_add_(0, codes[:, level], wide).to(grad.dtype)
        for level, size in enumerate(sizes)
    ]


def _fake(x: Tensor, codebooks: list[Tensor]) -> tuple[Tensor, Tensor]:
    return codebooks[0].new_empty(x.shape), x.new_empty(x.shape[0], len(codebooks), dtype=torch.int64)


def _fake_backward(grad: Tensor, codes: Tensor, sizes: list[int]) -> list[Tensor]:
    return [grad.new_empty(size, grad.shape[1]) for size in sizes]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.sizes = [codebook.shape[0] for codebook in inputs[1]]


def _differentiate(ctx: Any, grad: Tensor, grad_codes: Any) -> tuple[Any, ...]:
    (codes,) = ctx.saved_tensors
    return None, torch.ops.genrec.rq_nearest_backward(grad, codes, ctx.sizes)


define(
    "rq_nearest(Tensor x, Tensor[] codebooks) -> (Tensor, Tensor)",
    impl=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_differentiate,
)
define(
    "rq_nearest_backward(Tensor grad, Tensor codes, SymInt[] sizes) -> Tensor[]",
    impl=_backward,
    fake=_fake_backward,
)
