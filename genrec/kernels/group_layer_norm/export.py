# mypy: ignore-errors
"""Group layer norm in ONNX: GroupLayerNorm, and AddGroupLayerNorm with the residual sum before it."""

from __future__ import annotations

import onnxscript
import torch
from onnx.defs import OpSchema
from onnxscript import opset18 as op

from genrec.kernels.onnx import DOMAIN, PLUGIN, TRANSLATIONS, node


@onnxscript.script(DOMAIN)
def GroupLayerNorm(x, group_ids, weight, bias, eps: float):
    s = op.Cast(x, to=1)
    ones = op.Expand(op.Constant(value_float=1.0), op.Shape(weight, start=1))
    normed = op.LayerNormalization(s, ones, axis=-1, epsilon=eps)
    scale = op.Cast(op.Gather(weight, group_ids, axis=0), to=1)
    shift = op.Cast(op.Gather(bias, group_ids, axis=0), to=1)
    return op.CastLike(normed * scale + shift, x)


@onnxscript.script(DOMAIN)
def AddGroupLayerNorm(x, residual, group_ids, weight, bias, eps: float):
    total = x + residual
    s = op.Cast(total, to=1)
    ones = op.Expand(op.Constant(value_float=1.0), op.Shape(weight, start=1))
    normed = op.LayerNormalization(s, ones, axis=-1, epsilon=eps)
    scale = op.Cast(op.Gather(weight, group_ids, axis=0), to=1)
    shift = op.Cast(op.Gather(bias, group_ids, axis=0), to=1)
    return op.CastLike(normed * scale + shift, x), total


def _group_layer_norm(x, group_ids, weight, bias, eps: float):
    return DOMAIN.GroupLayerNorm(x, group_ids, weight, bias, eps=eps, **PLUGIN)


def _add_group_layer_norm(x, residual, group_ids, weight, bias, eps: float):
    return DOMAIN.AddGroupLayerNorm(x, residual, group_ids, weight, bias, eps=eps, _outputs=2, **PLUGIN)


AFFINE = {"group_ids": "tensor(int64)", "weight": "T", "bias": "T"}
node(GroupLayerNorm, {"x": "T", **AFFINE}, {"y": "T"}, eps=OpSchema.AttrType.FLOAT)
node(AddGroupLayerNorm, {"x": "T", "residual": "T", **AFFINE}, {"y": "T", "s": "T"}, eps=OpSchema.AttrType.FLOAT)
TRANSLATIONS[torch.ops.genrec.group_layer_norm.default] = _group_layer_norm
TRANSLATIONS[torch.ops.genrec.add_group_layer_norm.default] = _add_group_layer_norm
