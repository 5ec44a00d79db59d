# mypy: ignore-errors
"""ReLU attention in ONNX: ReluAttention, and ReluAttentionLimited where rows have a key_limit.

`divisor` and `visible` choose the normalizer as in op.py. The attributes are numbers of the node, so the bodies choose
by Where and not by If; ONNX Runtime folds what that leaves constant.

What a row may not see has -inf in the bias, of which the ReLU makes 0; the scores, many times as many, need no mask.
"""

from __future__ import annotations

import onnxscript
import torch
from onnx.defs import OpSchema
from onnxscript import opset18 as op

from genrec.kernels.onnx import DOMAIN, PLUGIN, TRANSLATIONS, node


@onnxscript.script(DOMAIN)
def ReluAttention(q, k, v, rel_bias, causal: int, scale: float, divisor: float, visible: int):
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    rows, size = op.Squeeze(op.Shape(q, start=2, end=3)), op.Squeeze(op.Shape(k, start=2, end=3))
    buckets = op.Squeeze(op.Shape(rel_bias, start=1))
    keys = op.Range(zero, size, one)
    last_axis = op.Constant(value_ints=[-1])
    diagonal = op.Unsqueeze(op.Range(zero, rows, one) + size - rows, last_axis)  # (Lq, 1)
    last = op.Where(op.Cast(op.Constant(value_int=causal), to=9), diagonal, size - one)
    distance = op.Min(op.Abs(diagonal - keys), buckets - one)  # (Lq, Lk)
    seen = op.Gather(op.Cast(rel_bias, to=1), distance, axis=1)  # (H, Lq, Lk)
    bias = op.Where(keys <= last, seen, op.Constant(value_float=float("-inf")))  # which the ReLU makes 0

    factor = op.Constant(value_float=scale)
    scores = op.MatMul(op.Cast(q, to=1) * factor, op.Transpose(op.Cast(k, to=1), perm=[0, 1, 3, 2])) + bias
    fixed = op.Constant(value_float=divisor)
    given = op.Where(fixed > op.Constant(value_float=0.0), fixed, op.Cast(op.Max(size, one), to=1))
    visible_keys = op.Cast(op.Max(last + one, one), to=1)
    n = op.Where(op.Cast(op.Constant(value_int=visible), to=9), visible_keys, given)
    return op.CastLike(op.MatMul(op.Relu(scores), op.Cast(v, to=1)) / n, q)


@onnxscript.script(DOMAIN)
def ReluAttentionLimited(q, k, v, key_limit, rel_bias, scale: float, divisor: float, visible: int):
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    size = op.Squeeze(op.Shape(k, start=2, end=3))
    buckets = op.Squeeze(op.Shape(rel_bias, start=1))
    keys = op.Range(zero, size, one)
    end = op.Unsqueeze(op.Max(op.Min(key_limit, size), zero), op.Constant(value_ints=[-1]))  # (B, Lq, 1)
    distance = op.Where(keys < end, op.Min(op.Abs(end - one - keys), buckets - one), buckets)  # (B, Lq, Lk)
    more, unseen = op.Constant(value_ints=[0, 0, 0, 1]), op.Constant(value_float=float("-inf"))
    table = op.Pad(op.Cast(rel_bias, to=1), more, unseen)
    bias = op.Transpose(op.Gather(table, distance, axis=1), perm=[1, 0, 2, 3])  # (B, H, Lq, Lk)

    factor = op.Constant(value_float=scale)
    scores = op.MatMul(op.Cast(q, to=1) * factor, op.Transpose(op.Cast(k, to=1), perm=[0, 1, 3, 2])) + bias
    fixed = op.Constant(value_float=divisor)
    given = op.Where(fixed > op.Constant(value_float=0.0), fixed, op.Cast(op.Max(size, one), to=1))
    visible_keys = op.Cast(op.Unsqueeze(op.Max(end, one), op.Constant(value_ints=[1])), to=1)
    n = op.Where(op.Cast(op.Constant(value_int=visible), to=9), visible_keys, given)
    return op.CastLike(op.MatMul(op.Relu(scores), op.Cast(v, to=1)) / n, q)


def _relu_attention(
    q, k, v, key_limit, rel_bias, divisors, causal: bool, scale: float, divisor: float, visible: bool
):  # fmt: skip
    if divisors is not None:
        raise ValueError("normalizer is a tensor; expected a number or a name, as an exported model has no other")
    if rel_bias is None:
        heads = op.Concat(op.Shape(q, start=1, end=2), op.Constant(value_ints=[1]), axis=0)
        rel_bias = op.CastLike(op.ConstantOfShape(heads), q)
    normalizer = {"scale": scale, "divisor": divisor, "visible": int(visible)}
    if key_limit is None:
        return DOMAIN.ReluAttention(q, k, v, rel_bias, causal=int(causal), **normalizer, **PLUGIN)
    return DOMAIN.ReluAttentionLimited(q, k, v, op.Cast(key_limit, to=7), rel_bias, **normalizer, **PLUGIN)


QKV = {"q": "T", "k": "T", "v": "T"}
FLOAT, INT = OpSchema.AttrType.FLOAT, OpSchema.AttrType.INT
NORMALIZER = {"scale": FLOAT, "divisor": FLOAT, "visible": INT}
node(ReluAttention, {**QKV, "rel_bias": "T"}, {"out": "T"}, causal=INT, **NORMALIZER)
node(ReluAttentionLimited, {**QKV, "key_limit": "tensor(int64)", "rel_bias": "T"}, {"out": "T"}, **NORMALIZER)
TRANSLATIONS[torch.ops.genrec.relu_attention.default] = _relu_attention
