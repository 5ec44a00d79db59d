# mypy: ignore-errors
"""The mixture of experts in ONNX: MoeRoute and MoeExperts.

The body of MoeExperts gives every token to every expert and weighs those that it did not choose with 0: E / k times the
products, in three large ones. Standard ONNX has no grouped product, and a loop over the experts would have shapes that
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
    rows = op.Concat(op.Constant(value_ints=[-1]), op.Shape(w_down, start=1, end=2), axis=0)
    gates, ups = op.Split(op.Cast(w_gate_up, to=1), axis=1, num_outputs=2)
    to_gate = op.Transpose(op.Reshape(gates, rows), perm=[1, 0])  # (D, E · F)
    to_up = op.Transpose(op.Reshape(ups, rows), perm=[1, 0])
    to_rows = op.Reshape(op.Transpose(op.Cast(w_down, to=1), perm=[0, 2, 1]), rows)  # (E · F, D)

    tokens = op.Cast(x, to=1)
    gate = op.MatMul(tokens, to_gate)
    act = gate * op.Sigmoid(gate) * op.MatMul(tokens, to_up)
    each = op.Concat(op.Shape(x, start=0, end=1), op.Shape(w_down, start=0, end=1), axis=0)
    nothing = op.Expand(op.Constant(value_float=0.0), each)
    share = op.ScatterElements(nothing, op.Cast(indices, to=7), weights, axis=1)  # (T, E)
    last = op.Constant(value_ints=[-1])
    shared = op.Reshape(act, op.Concat(each, last, axis=0)) * op.Unsqueeze(share, last)
    return op.CastLike(op.MatMul(op.Reshape(shared, op.Shape(act)), to_rows), x)


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
