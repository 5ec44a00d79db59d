# mypy: ignore-errors
"""The mixture of experts in ONNX: MoeRoute and MoeExperts.

The body of MoeExperts gives every token to every expert and weighs those that it did not choose with 0: E / k times the
products, in two large ones. Standard ONNX has no grouped product, and a loop over the experts would have shapes that
depend on data, which TensorRT refuses.
"""

from __future__ import annotations

import onnxscript
import torch
from onnx.defs import OpSchema
from onnxscript import opset18 as op

from genrec.kernels.onnx import DOMAIN, PLUGIN, TRANSLATIONS, node


@onnxscript.script(DOMAIN)
def MoeRoute(logits, bias, top_k: int, renormalize: int):
    scores = op.Cast(logits, to=1)
    probability = op.Softmax(scores, axis=-1)
    k = op.Reshape(op.Constant(value_int=top_k), op.Constant(value_ints=[1]))
    _best, chosen = op.TopK(probability + op.Cast(bias, to=1), k)
    over_kept = op.Softmax(op.GatherElements(scores, chosen, axis=1), axis=-1)
    over_all = op.GatherElements(probability, chosen, axis=1)
    weights = op.Where(op.Cast(op.Constant(value_int=renormalize), to=9), over_kept, over_all)
    return weights, op.Cast(chosen, to=6)


@onnxscript.script(DOMAIN)
def MoeExperts(x, weights, indices, w_gate_up, w_down):
    experts = op.Shape(w_gate_up, start=0, end=1)
    dim = op.Shape(w_gate_up, start=2, end=3)
    rest = op.Constant(value_ints=[-1])
    to_hidden = op.Transpose(op.Reshape(op.Cast(w_gate_up, to=1), op.Concat(rest, dim, axis=0)), perm=[1, 0])
    to_rows = op.Reshape(op.Transpose(op.Cast(w_down, to=1), perm=[0, 2, 1]), op.Concat(rest, dim, axis=0))

    hidden = op.MatMul(op.Cast(x, to=1), to_hidden)  # (T, E · 2F)
    tokens = op.Shape(x, start=0, end=1)
    gate, up = op.Split(op.Reshape(hidden, op.Concat(tokens, experts, rest, axis=0)), axis=-1, num_outputs=2)
    chosen = op.OneHot(op.Cast(indices, to=7), experts, op.Constant(value_floats=[0.0, 1.0]), axis=-1)  # (T, k, E)
    last = op.Constant(value_ints=[-1])
    share = op.ReduceSum(chosen * op.Unsqueeze(weights, last), op.Constant(value_ints=[1]), keepdims=0)  # (T, E)
    act = gate * op.Sigmoid(gate) * up * op.Unsqueeze(share, last)
    rows = op.MatMul(op.Reshape(act, op.Concat(tokens, rest, axis=0)), to_rows)
    return op.CastLike(rows, x)


def _moe_route(logits, top_k: int, bias=None, renormalize: bool = True):
    if bias is None:
        bias = op.CastLike(op.ConstantOfShape(op.Shape(logits, start=1)), logits)
    return DOMAIN.MoeRoute(logits, bias, top_k=top_k, renormalize=int(renormalize), _outputs=2, **PLUGIN)


def _moe_experts(x, weights, indices, w_gate_up, w_down):
    return DOMAIN.MoeExperts(x, weights, indices, w_gate_up, w_down, **PLUGIN)


CHOICE = {"weights": "tensor(float)", "indices": "tensor(int32)"}
INT = OpSchema.AttrType.INT
node(MoeRoute, {"logits": "T", "bias": "T"}, CHOICE, top_k=INT, renormalize=INT)
node(MoeExperts, {"x": "T", **CHOICE, "w_gate_up": "T", "w_down": "T"}, {"y": "T"})
TRANSLATIONS[torch.ops.genrec.moe_route.default] = _moe_route
TRANSLATIONS[torch.ops.genrec.moe_experts.default] = _moe_experts
