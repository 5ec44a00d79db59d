"""The model `recommend_graph` of a Triton model repository: the exported graph in ONNX Runtime, on the CPU.

It runs inside the server and needs numpy and onnxruntime alone. Requests that the server hands over together are padded
to the longest of them and answered by one run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

Feed = dict[str, Any]  # arrays (rows, length, …) by the name of the input

OUTPUTS = ("item_ids", "scores")


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        directory = Path(args["model_repository"]) / args["model_version"]
        settings = json.loads(args["model_config"])["parameters"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(settings["threads"]["string_value"])
        options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            str(directory / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.max_length = int(settings["max_length"]["string_value"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request, in their order."""
        feeds = [self._read(request) for request in requests]
        good = [feed for feed in feeds if isinstance(feed, dict)]
        try:
            answers = iter(self._run(good))
        except Exception:  # what one request breaks must not cost the others their answers
            answers = iter([self._alone(feed) for feed in good])
        return [_response(next(answers) if isinstance(feed, dict) else feed) for feed in feeds]

    def _read(self, request: Any) -> Feed | ValueError:
        """The inputs of a request by name, or the error that it earned."""
        feed = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
        rows, length = feed["history"].shape
        if not 1 <= length <= self.max_length:
            return ValueError(f"history has {length} events; expected 1 to {self.max_length}")
        for name, value in feed.items():
            if value.shape[:2] != (rows, length):
                return ValueError(f"{name} has shape {value.shape}; expected {rows} × {length}, as history has")
        return feed

    def _run(self, feeds: list[Feed]) -> list[Any]:
        """(item_ids, scores) of every feed, out of one run."""
        if not feeds:
            return []
        length = max(feed["history"].shape[1] for feed in feeds)
        batch = {name: np.concatenate([_padded(feed[name], length) for feed in feeds]) for name in self.inputs}
        item_ids, scores = self.session.run(OUTPUTS, batch)
        ends = np.cumsum([len(feed["history"]) for feed in feeds])[:-1]
        return list(zip(np.split(item_ids, ends), np.split(scores, ends), strict=True))

    def _alone(self, feed: Feed) -> Any:
        try:
            return self._run([feed])[0]
        except Exception as error:
            return RuntimeError(f"the graph refused this request: {error}")


def _padded(values: Any, length: int) -> Any:
    """Zeros behind the events of (rows, L, …), which mean no event, up to (rows, length, …)."""
    return np.pad(values, [(0, 0), (0, length - values.shape[1]), *[(0, 0)] * (values.ndim - 2)])


def _response(answer: Any) -> Any:
    if isinstance(answer, Exception):
        code = pb_utils.TritonError.INVALID_ARG if isinstance(answer, ValueError) else pb_utils.TritonError.INTERNAL
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(answer), code))
    return pb_utils.InferenceResponse(
        [pb_utils.Tensor(name, value) for name, value in zip(OUTPUTS, answer, strict=True)]
    )
