"""Registration of ReLU attention: genrec::relu_attention, genrec::relu_attention_varlen and their backward passes.

The divisor n of a row arrives as three arguments: `divisors` (B,) if given, else `visible` counts the keys the row
sees, else `divisor` if positive, else the number of keys of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from genrec.kernels.library import define, lower
from genrec.kernels.relu_attention import padded
from genrec.kernels.relu_attention.padded import Options

OPTIONS = "Tensor? key_limit, Tensor? rel_bias, Tensor? divisors, bool causal, float scale, float divisor, bool visible"
PACKED = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"


def _wide(like: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Half precision accumulates in float32."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return [tensor.to(dtype) for tensor in tensors]


def _wide_bias(q: Tensor, options: Options) -> Tensor | None:
    return None if options.rel_bias is None else _wide(q, options.rel_bias)[0]


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    options = Options(*rest)
    batch = padded.dense_batch(q, k, options)
    qf, kf, vf = _wide(q, q, k, v)
    return padded.forward(qf, kf, vf, _wide_bias(q, options), options.scale, batch).to(q.dtype)


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    options = Options(*rest)
    batch = padded.dense_batch(q, k, options)
    gf, qf, kf, vf = _wide(q, grad, q, k, v)
    gradients = padded.backward(gf, qf, kf, vf, _wide_bias(q, options), options.scale, batch)
    return _narrow(gradients, q, options.rel_bias)


def _forward_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *rest: Any
) -> Tensor:
    options = Options(*rest)
    rows, keys = padded.Packing(cu_q, q.shape[0], max_q), padded.Packing(cu_k, k.shape[0], max_k)
    batch = padded.packed_batch(rows, keys, options)
    qf, kf, vf = _wide(q, q, k, v)
    out = padded.forward(rows.pad(qf), keys.pad(kf), keys.pad(vf), _wide_bias(q, options), options.scale, batch)
    return rows.unpad(out).to(q.dtype)


def _backward_varlen(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *rest: Any
) -> tuple[Tensor, ...]:
    options = Options(*rest)
    rows, keys = padded.Packing(cu_q, q.shape[0], max_q), padded.Packing(cu_k, k.shape[0], max_k)
    batch = padded.packed_batch(rows, keys, options)
    gf, qf, kf, vf = _wide(q, grad, q, k, v)
    grad_q, grad_k, grad_v, grad_bias = padded.backward(
        rows.pad(gf), rows.pad(qf), keys.pad(kf), keys.pad(vf), _wide_bias(q, options), options.scale, batch
    )
    return _narrow((rows.unpad(grad_q), keys.unpad(grad_k), keys.unpad(grad_v), grad_bias), q, options.rel_bias)


def _narrow(gradients: tuple[Tensor, Tensor, Tensor, Tensor], q: Tensor, rel_bias: Tensor | None) -> tuple[Tensor, ...]:
    *inputs, grad_bias = gradients
    return (*(gradient.to(q.dtype) for gradient in inputs), grad_bias.to((q if rel_bias is None else rel_bias).dtype))


def _fake(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


def _fake_backward(bias_position: int) -> Callable[..., tuple[Tensor, ...]]:
    def fake(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, ...]:
        rel_bias = options[bias_position]
        bias = q.new_empty(0) if rel_bias is None else rel_bias.new_empty(rel_bias.shape)
        return (*(x.new_empty(x.shape) for x in (q, k, v)), bias)

    return fake


def _autograd(operator: str, lengths: slice) -> dict[str, Callable[..., Any]]:
    """The gradient through `operator`. inputs[lengths] are integers, then come three optional tensors and numbers."""
    first, last = lengths.start, lengths.stop
    bias, numbers = last + 1, last + 3

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:first], *inputs[last:numbers])
        ctx.lengths, ctx.numbers = inputs[first:last], inputs[numbers:]

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        inputs = *tensors[:first], *ctx.lengths, *tensors[first:], *ctx.numbers
        *gradients, grad_bias = getattr(torch.ops.genrec, operator)(grad, *inputs)
        result = [*gradients, *[None] * (len(inputs) - 3)]
        if ctx.needs_input_grad[bias]:
            result[bias] = grad_bias
        return tuple(result)

    return {"setup_context": setup_context, "backward": backward}


def _cast(dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Any, ...]:
    """Autocast: q, k and v in its dtype; rel_bias and divisors as they are, for they meet float32 scores."""
    return (*lower(dtype, q, k, v), *options)


GRADIENTS = "(Tensor, Tensor, Tensor, Tensor)"
define(
    f"relu_attention(Tensor q, Tensor k, Tensor v, {OPTIONS}) -> Tensor",
    impl=_forward,
    fake=_fake,
    **_autograd("relu_attention_backward", slice(3, 3)),
    autocast=_cast,
)
define(
    f"relu_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, {OPTIONS}) -> {GRADIENTS}",
    impl=_backward,
    fake=_fake_backward(1),
)
define(
    f"relu_attention_varlen(Tensor q, Tensor k, Tensor v, {PACKED}, {OPTIONS}) -> Tensor",
    impl=_forward_varlen,
    fake=_fake,
    **_autograd("relu_attention_varlen_backward", slice(5, 7)),
    autocast=_cast,
)
define(
    f"relu_attention_varlen_backward(Tensor grad, Tensor q, Tensor k, Tensor v, {PACKED}, {OPTIONS}) -> {GRADIENTS}",
    impl=_backward_varlen,
    fake=_fake_backward(5),
)
