"""The ONNX domain "genrec": a node for every operator, and a body of standard ONNX that runs where no plugin does.

`export.py` of an operator says of each of its nodes the schema, the body, and how a call in PyTorch becomes the node.
Every node carries plugin_namespace and plugin_version, by which TensorRT finds the plugin; ONNX Runtime, and TensorRT
without the plugins, run the body. Bodies compute in float32 whatever the type of their inputs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import onnx
import onnxscript
from onnx.defs import OpSchema

OPSET = 18  # of the standard operators, in bodies as in models
DOMAIN = onnxscript.values.Opset("genrec", 1)
PLUGIN = {"plugin_namespace": "genrec", "plugin_version": "1"}
TYPES = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]

TRANSLATIONS: dict[Any, Callable[..., Any]] = {}  # operator of torch → what makes its node
BODIES: dict[str, onnxscript.OnnxFunction] = {}  # node → body


def node(
    body: onnxscript.OnnxFunction,
    inputs: Mapping[str, str],
    outputs: Mapping[str, str],
    **attributes: OpSchema.AttrType,
) -> None:
    """Declare the node that `body` is named after; inputs and outputs are name → type, "T" any floating one.

    Without the schema an export fails, and without the plugin's attributes in it the checker refuses the nodes.
    """
    plugin = [OpSchema.Attribute(name, onnx.helper.make_attribute(name, value)) for name, value in PLUGIN.items()]
    onnx.defs.register_schema(
        OpSchema(
            body.name,
            "genrec",
            1,
            inputs=[OpSchema.FormalParameter(name, kind) for name, kind in inputs.items()],
            outputs=[OpSchema.FormalParameter(name, kind) for name, kind in outputs.items()],
            type_constraints=[("T", TYPES, "")],
            attributes=[
                *(OpSchema.Attribute(name, kind, "", required=True) for name, kind in attributes.items()),
                *plugin,
            ],
        )
    )
    BODIES[body.name] = body


def load() -> None:
    """Declare the nodes of every operator that a recommendation is made of."""
    for operator in ("group_layer_norm", "moe", "relu_attention"):
        importlib.import_module(f"genrec.kernels.{operator}.export")
