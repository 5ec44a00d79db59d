"""A trained recommender as one ONNX file: histories in, items and scores out, the same numbers as in PyTorch."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto
from onnxscript import opset18

from genrec.data.files import atomic_directory
from genrec.data.sequences import take_users
from genrec.export.files import FORMAT
from genrec.generation import Recommender
from genrec.interfaces import Catalogue, EventSequences, TokenType
from genrec.kernels import onnx as nodes

FIELDS = {TokenType.ACTION: "actions", TokenType.TIME: "times", TokenType.CONTEXT: "contexts"}
OUTPUTS = ("item_ids", "scores")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
EXTERNAL = 1 << 30  # bytes of weights from which on they get a file of their own; protobuf ends at 2 GB


def input_names(recommender: Recommender) -> list[str]:
    """The arguments of Recommender.forward by name."""
    return ["history", *(FIELDS[kind] for kind in recommender.model.config.types[1:])]


def to_onnx(recommender: Recommender, dtype: torch.dtype = torch.float32, context_columns: int = 1) -> ModelProto:
    """The graph of Recommender.forward with dynamic axes `batch` and `length`, its operators as nodes of domain genrec.

    dtype: of the weights and of what is computed from them; log-probabilities and scores are float32 in any case.
    context_columns: how many contexts an event has, for models that read them.
    """
    nodes.load()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision
    recommender = copy.deepcopy(recommender).cpu().to(dtype).eval()
    # sizes 0 and 1 would be taken for constants, one tensor given twice for one argument
    history, *fields = (
        torch.ones(2, 3, context_columns, dtype=torch.int64)
        if kind == TokenType.CONTEXT
        else torch.ones(2, 3, dtype=torch.int64)
        for kind in recommender.model.config.types
    )
    axes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=1)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's own internals
        program = torch.onnx.export(
            recommender,
            (history, *fields),
            dynamo=True,
            verbose=False,
            opset_version=nodes.OPSET,
            input_names=input_names(recommender),
            output_names=list(OUTPUTS),
            dynamic_shapes=(axes, (axes,) * len(fields)) if fields else (axes,),
            custom_translation_table={**nodes.TRANSLATIONS, torch.ops.aten.searchsorted.Tensor: _searchsorted},
        )
    assert program is not None
    proto = program.model_proto
    used = {node.op_type for node in proto.graph.node if node.domain == "genrec"}
    proto.functions.extend(body.to_function_proto() for name, body in nodes.BODIES.items() if name in used)
    return proto


def export_onnx(
    recommender: Recommender,
    catalogue: Catalogue,
    out: Path,
    dtype: str = "fp32",
    context_columns: int = 1,
    overwrite: bool = False,
    users: EventSequences | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """Write OUT/model.onnx (with model.onnx.data beside it past 1 GB), recommender.json and items.json.

    recommender.json, which is returned, tells a program what it needs to call the graph: inputs, outputs, settings, how
    the file agrees with PyTorch on `users`, and `facts`. items.json tells what the item indices
    mean: entry i − 1 of item_ids and titles is index i.
    """
    proto = to_onnx(recommender, DTYPES[dtype], context_columns)
    about = {
        "format": FORMAT,
        "dtype": dtype,
        "inputs": [_tensor(value) for value in proto.graph.input],
        "outputs": [_tensor(value) for value in proto.graph.output],
        **asdict(recommender.config),
        "max_events": recommender.model.config.max_events,
        "items": catalogue.size,
        **facts,
    }
    with atomic_directory(out, overwrite) as directory:
        path = directory / "model.onnx"
        large = proto.ByteSize() > EXTERNAL
        onnx.save(proto, path, save_as_external_data=large, location="model.onnx.data" if large else None)
        onnx.checker.check_model(path, full_check=True)
        if users is not None:
            about["agreement"] = agreement(path, recommender, users)
        _write_json(directory / "recommender.json", about)
        titles = [str(title) for title in catalogue.titles[1:]]
        _write_json(directory / "items.json", {"item_ids": [str(i) for i in catalogue.item_ids[1:]], "titles": titles})
    return about


def agreement(path: Path, recommender: Recommender, users: EventSequences, batch_size: int = 32) -> dict[str, float]:
    """How model.onnx in ONNX Runtime compares with PyTorch on these users.

    same_items: share of the places of all lists that hold the same item; score_error: largest difference of the scores
    of these places, relative to the largest score.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    top_k, names = recommender.config.top_k, input_names(recommender)
    expected, scores = recommender.rank_scored(users, top_k)
    same, error = 0, 0.0
    for begin in range(0, len(users), batch_size):
        rows = np.arange(begin, min(begin + batch_size, len(users)))
        request = recommender.request(take_users(users, rows))
        feed = {name: t.numpy() for name, t in zip(names, (request.history, *request.fields), strict=True)}
        items, found = session.run(OUTPUTS, feed)
        equal = items == expected[rows]
        same += int(equal.sum())
        finite = equal & np.isfinite(scores[rows])
        error = max(error, float(np.abs(found - scores[rows], where=finite, out=np.zeros_like(found)).max()))
    return {
        "users": len(users),
        "same_items": same / max(1, expected.size),
        "score_error": error / max(1e-6, float(np.abs(scores[np.isfinite(scores)]).max(initial=0))),
    }


def _searchsorted(keys: Any, values: Any, **options: Any) -> Any:
    """torch.searchsorted of keys (B, W) and values (B, X), which ONNX does not have: how many keys are less."""
    op: Any = opset18
    less = op.Less(op.Unsqueeze(keys, op.Constant(value_ints=[1])), op.Unsqueeze(values, op.Constant(value_ints=[2])))
    return op.ReduceSum(op.Cast(less, to=onnx.TensorProto.INT64), op.Constant(value_ints=[2]), keepdims=0)


def _tensor(value: onnx.ValueInfoProto) -> dict[str, Any]:
    kind = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
    return {
        "name": value.name,
        "dtype": onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name,
        "shape": shape,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
