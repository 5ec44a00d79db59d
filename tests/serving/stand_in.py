"""A small graph with the inputs and outputs of an exported recommender, for the tests of everything around it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

ITEMS, TOP_K, MAX_EVENTS, DIM = 30, 5, 12, 4


def write_export(directory: Path, name: str = "one", seed: int = 0) -> Path:
    """model.onnx, recommender.json and items.json; every title says which catalogue it is of."""
    directory.mkdir(parents=True)
    onnx.save(_graph(seed), directory / "model.onnx")
    about = {
        "format": "genrec-onnx",
        "inputs": [{"name": "history", "dtype": "int64", "shape": ["batch", "length"]}],
        "outputs": [
            {"name": "item_ids", "dtype": "int64", "shape": ["batch", TOP_K]},
            {"name": "scores", "dtype": "float32", "shape": ["batch", TOP_K]},
        ],
        "top_k": TOP_K,
        "beams": 8,
        "max_events": MAX_EVENTS,
        "items": ITEMS,
        "vocabulary_hash": name,
    }
    (directory / "recommender.json").write_text(json.dumps(about))
    items = {
        "item_ids": [f"ü{i}" for i in range(1, ITEMS + 1)],
        "titles": [f"{name} {i}" for i in range(1, ITEMS + 1)],
    }
    (directory / "items.json").write_text(json.dumps(items))
    return directory


def answer(directory: Path, histories: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """(item_ids, scores) of every history, from ONNX Runtime itself, one at a time."""
    session = onnxruntime.InferenceSession(str(directory / "model.onnx"))
    found = (session.run(None, {"history": np.array([history], np.int64)}) for history in histories)
    return [(items[0].tolist(), scores[0].tolist()) for items, scores in found]


def _graph(seed: int) -> onnx.ModelProto:
    """Items that resemble the sum of the history; those with a score of at most 8 are left out, as if not found.

    Everything is a small integer, so that sums are exact in any order and any batch.
    """
    rng = np.random.default_rng(seed)
    table = rng.integers(-3, 4, (ITEMS + 2, DIM)).astype(np.float32)
    table[0] = 0  # padding; the last row is an unknown item
    ranks = np.arange(ITEMS, dtype=np.float32) / 64  # no two scores of a request are equal
    constants = {
        "table": table, "items": table[1:-1].T.copy(), "ranks": ranks, "zero": np.int64(0), "one": np.int64(1),
        "last": np.int64(ITEMS), "unknown": np.int64(ITEMS + 1), "axis": np.array([1]), "k": np.array([TOP_K]),
        "least": np.float32(8), "none": np.float32(-np.inf),
    }  # fmt: skip
    steps = [
        ("Equal", ["history", "zero"], ["padding"]),
        ("Greater", ["history", "zero"], ["above"]),
        ("LessOrEqual", ["history", "last"], ["below"]),
        ("And", ["above", "below"], ["known"]),
        ("Or", ["known", "padding"], ["named"]),
        ("Where", ["named", "history", "unknown"], ["rows"]),
        ("Gather", ["table", "rows"], ["events"]),
        ("ReduceSum", ["events", "axis"], ["user"]),
        ("MatMul", ["user", "items"], ["products"]),
        ("Add", ["products", "ranks"], ["totals"]),
        ("TopK", ["totals", "k"], ["best", "places"]),
        ("Greater", ["best", "least"], ["real"]),
        ("Where", ["real", "best", "none"], ["scores"]),
        ("Add", ["places", "one"], ["found"]),
        ("Where", ["real", "found", "zero"], ["item_ids"]),
    ]
    graph = helper.make_graph(
        [
            helper.make_node(kind, inputs, outputs, **({"keepdims": 0} if kind == "ReduceSum" else {}))
            for kind, inputs, outputs in steps
        ],
        "stand_in",
        [helper.make_tensor_value_info("history", TensorProto.INT64, ["batch", "length"])],
        [
            helper.make_tensor_value_info("item_ids", TensorProto.INT64, ["batch", TOP_K]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", TOP_K]),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
