"""The model `recommend` of a Triton model repository: the log's own item ids in, items and their titles out.

It runs inside the server and needs numpy alone. Version N asks version N of `recommend_graph`, so that a catalogue and
the graph that was trained on it always change hands together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

Feed = dict[str, Any]  # arrays (rows, length, …) by the name of the input

UNKNOWN = -1  # an item that the model does not know: an event all the same
LOWEST = np.finfo(np.float32).min  # the score where there is no item: JSON has no -inf


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        directory = Path(args["model_repository"]) / args["model_version"]
        settings = json.loads(args["model_config"])["parameters"]
        about = json.loads((directory / "recommender.json").read_bytes())
        items = json.loads((directory / "items.json").read_bytes())
        self.version = int(args["model_version"])
        self.fields = [value["name"] for value in about["inputs"] if value["name"] != "history"]
        self.max_length = int(settings["max_length"]["string_value"])
        self.pad_to = [int(length) for length in settings["pad_to"]["string_value"].split()]
        self.item_ids = _column(items["item_ids"])
        self.titles = _column(items["titles"])
        self.index_of = {item_id: index for index, item_id in enumerate(self.item_ids)}  # b"" is 0, padding
        self.events = _counter("genrec_history_events", "Events in the histories of requests")
        self.unknown = _counter("genrec_unknown_events", "Events with an item that the model does not know")

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request, in their order; the graph is asked once for all of them."""
        feeds = [self._read(request) for request in requests]
        good = [feed for feed in feeds if isinstance(feed, dict)]
        answers = iter(self._ask(good))
        self._count(good)
        return [_response(next(answers) if isinstance(feed, dict) else feed) for feed in feeds]

    def _read(self, request: Any) -> Feed | ValueError:
        """What the graph reads of a request, by name, or the error that the request earned."""
        words = pb_utils.get_input_tensor_by_name(request, "history").as_numpy()
        rows, length = words.shape
        if not 1 <= length <= self.max_length:
            return ValueError(f"history has {length} events; expected 1 to {self.max_length}, the newest last")
        flat = [self.index_of.get(word, UNKNOWN) for word in words.ravel()]
        history = np.array(flat, np.int64).reshape(rows, length)
        empty = np.flatnonzero((history == 0).all(axis=1))
        if len(empty):
            return ValueError(f"history {empty[0]} is empty; expected at least one item id in each")
        feed = {"history": history}
        for name in self.fields:
            feed[name] = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
            if feed[name].shape[:2] != (rows, length):
                return ValueError(f"{name} has shape {feed[name].shape}; expected {rows} × {length}, as history has")
        return feed

    def _count(self, feeds: list[Feed]) -> None:
        """Once for all, as every call is a message to the server's process."""
        for counter, count in (
            (self.events, sum(int(np.count_nonzero(feed["history"])) for feed in feeds)),
            (self.unknown, sum(int(np.count_nonzero(feed["history"] == UNKNOWN)) for feed in feeds)),
        ):
            if count:
                counter.increment(count)

    def _ask(self, feeds: list[Feed]) -> list[Any]:
        """(item_ids, titles, scores) of every feed, or an error in the place of each."""
        if not feeds:
            return []
        length = max(feed["history"].shape[1] for feed in feeds)
        length = min((fixed for fixed in self.pad_to if fixed >= length), default=length)
        inputs = [
            pb_utils.Tensor(name, np.concatenate([_padded(feed[name], length) for feed in feeds])) for name in feeds[0]
        ]
        answer = pb_utils.InferenceRequest(
            model_name="recommend_graph",
            model_version=self.version,
            inputs=inputs,
            requested_output_names=["item_ids", "scores"],
        ).exec()
        if answer.has_error():
            if len(feeds) > 1:  # what one request breaks must not cost the others their answers
                return [self._ask([feed])[0] for feed in feeds]
            return [RuntimeError(answer.error().message())]
        items = pb_utils.get_output_tensor_by_name(answer, "item_ids").as_numpy()
        scores = pb_utils.get_output_tensor_by_name(answer, "scores").as_numpy()
        ends = np.cumsum([len(feed["history"]) for feed in feeds])[:-1]
        scores = np.maximum(scores, LOWEST)
        parts = zip(np.split(items, ends), np.split(scores, ends), strict=True)
        return [(self.item_ids[index], self.titles[index], score) for index, score in parts]


def _column(values: list[str]) -> Any:
    """Strings as bytes, by item index: row 0, which is no item, is empty."""
    return np.array([b"", *(value.encode() for value in values)], np.object_)


def _padded(values: Any, length: int) -> Any:
    """Zeros behind the events of (rows, L, …), which mean no event, up to (rows, length, …)."""
    return np.pad(values, [(0, 0), (0, length - values.shape[1]), *[(0, 0)] * (values.ndim - 2)])


def _counter(name: str, description: str) -> _Counter:
    family = pb_utils.MetricFamily(name=name, description=description, kind=pb_utils.MetricFamily.COUNTER)
    return _Counter(family, family.Metric(labels={}))


class _Counter:
    """Keeps the family alive as long as its metric."""

    def __init__(self, family: Any, metric: Any) -> None:
        self.family, self.increment = family, metric.increment


def _response(answer: Any) -> Any:
    if isinstance(answer, Exception):
        code = pb_utils.TritonError.INVALID_ARG if isinstance(answer, ValueError) else pb_utils.TritonError.INTERNAL
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(answer), code))
    outputs = zip(("item_ids", "titles", "scores"), answer, strict=True)
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in outputs])
