"""The two models that run inside the server, here on a stand-in for what the server gives them."""

import importlib
import json
import sys
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import small
import stand_in
import torch

from genrec.export.triton_server import MODELS, write_repository
from genrec.generation import Recommender, RecommenderConfig
from genrec.interfaces import Catalogue

INPUTS = {"history": ["batch", "length"], "actions": ["batch", "length"], "contexts": ["batch", "length", 2]}


class Tensor(SimpleNamespace):
    def __init__(self, name, values):
        super().__init__(name=name, values=values)

    def as_numpy(self):
        return self.values


class Response:
    def __init__(self, output_tensors=(), error=None):
        self.tensors, self.failure = list(output_tensors), error

    def has_error(self):
        return self.failure is not None

    def error(self):
        return self.failure


class Error:
    INVALID_ARG, INTERNAL = "invalid", "internal"

    def __init__(self, message, code):
        self.words, self.code = message, code

    def message(self):
        return self.words


class Family:
    COUNTER = 0

    def __init__(self, name, description, kind):
        self.total = 0

    def Metric(self, labels):
        return self

    def increment(self, value):
        self.total += value


def by_name(owner, name):
    return next(tensor for tensor in owner.tensors if tensor.name == name)


def asked(**values):
    """A request with these tensors."""
    return SimpleNamespace(tensors=[Tensor(name, np.asarray(value)) for name, value in values.items()])


def words(*rows):
    return np.array([[word.encode() for word in row] for row in rows], np.object_).reshape(len(rows), -1)


@pytest.fixture
def load(monkeypatch, tmp_path):
    """load(file, **parameters) → the model, initialised on a repository of the stand-in."""
    server = SimpleNamespace(
        Tensor=Tensor, InferenceResponse=Response, TritonError=Error, MetricFamily=Family,
        get_input_tensor_by_name=by_name, get_output_tensor_by_name=by_name,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", server)
    export = stand_in.write_export(tmp_path / "export")
    about = json.loads((export / "recommender.json").read_text())
    about["inputs"] = [{"name": name, "dtype": "int64", "shape": shape} for name, shape in INPUTS.items()]
    (export / "recommender.json").write_text(json.dumps(about))
    write_repository(export, tmp_path / "repository")

    def make(file, directory, graph=None, repository=tmp_path / "repository", **parameters):
        monkeypatch.syspath_prepend(MODELS)
        monkeypatch.delitem(sys.modules, file, raising=False)
        model = importlib.import_module(file).TritonPythonModel()
        server.InferenceRequest = graph
        said = {name: {"string_value": str(value)} for name, value in parameters.items()}
        place = str(repository / directory)
        config = json.dumps({"parameters": said})
        model.initialize({"model_repository": place, "model_version": "1", "model_config": config})
        return model

    yield make
    for file in ("recommend", "onnx_graph"):
        sys.modules.pop(file, None)


class Graph:
    """Stands for recommend_graph: answers each history with its items, last first; refuses actions of 13."""

    calls: ClassVar[list] = []

    def __init__(self, model_name, model_version, inputs, requested_output_names):
        assert (model_name, model_version) == ("recommend_graph", 1)
        assert requested_output_names == ["item_ids", "scores"]
        self.inputs = {tensor.name: tensor.values for tensor in inputs}

    def exec(self):
        Graph.calls.append(self.inputs)
        if (self.inputs.get("actions", np.zeros(1)) == 13).any():
            return Response(error=Error("thirteen", Error.INTERNAL))
        found = np.maximum(self.inputs["history"][:, ::-1], 0)
        scores = np.where(found > 0, found, -np.inf).astype(np.float32)
        return Response([Tensor("item_ids", found), Tensor("scores", scores)])


@pytest.fixture
def service(load):
    Graph.calls = []
    return lambda **parameters: load("recommend", "recommend", Graph, **{"max_length": 4, "pad_to": "", **parameters})


def fields(rows, length, action=0):
    return {"actions": np.full((rows, length), action), "contexts": np.zeros((rows, length, 2), np.int64)}


def test_requests_are_asked_together(service):
    model = service()
    one = asked(history=words(["ü3", "never seen"], ["ü4", ""]), **fields(2, 2, action=7))
    two = asked(history=words(["ü1", "ü2", "ü5"]), **fields(1, 3))
    first, second = model.execute([one, two])
    (call,) = Graph.calls
    assert call["history"].tolist() == [[3, -1, 0], [4, 0, 0], [1, 2, 5]]
    assert call["actions"].tolist() == [[7, 7, 0], [7, 7, 0], [0, 0, 0]]
    assert call["contexts"].shape == (3, 3, 2)
    assert by_name(first, "item_ids").values.tolist() == [[b"", b"", "ü3".encode()], [b"", b"", "ü4".encode()]]
    assert by_name(second, "titles").values.tolist() == [[b"one 5", b"one 2", b"one 1"]]
    assert by_name(second, "scores").values.tolist() == [[5, 2, 1]]
    assert np.isfinite(by_name(first, "scores").values).all()
    assert by_name(first, "scores").values.dtype == np.float32
    assert (model.events.family.total, model.unknown.family.total) == (6, 1)


@pytest.mark.parametrize(("events", "padded"), [(1, 2), (2, 2), (3, 4), (4, 4)])
def test_an_engine_gets_few_lengths(service, events, padded):
    service(pad_to="2 4").execute([asked(history=words(["ü1"] * events), **fields(1, events))])
    assert Graph.calls[0]["history"].shape == Graph.calls[0]["actions"].shape == (1, padded)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (asked(history=words(["", ""]), **fields(1, 2)), "history 0 is empty; expected at least one item id in each"),
        (asked(history=words(["ü1"] * 5), **fields(1, 5)), "history has 5 events; expected 1 to 4, the newest last"),
        (asked(history=np.zeros((1, 0), np.object_), **fields(1, 0)), "history has 0 events; expected 1 to 4"),
        (asked(history=words(["ü1"]), **fields(1, 2)), "actions has shape (1, 2); expected 1 × 1, as history has"),
    ],
)
def test_a_refused_request_stands_alone(service, request_, message):
    good = asked(history=words(["ü1"]), **fields(1, 1))
    first, bad, last = service().execute([good, request_, good])
    assert message in bad.error().message()
    assert bad.error().code == Error.INVALID_ARG
    assert not first.has_error()
    assert not last.has_error()
    assert len(Graph.calls) == 1


def test_what_the_graph_refuses_costs_the_others_nothing(service):
    good, bad = (asked(history=words(["ü1"]), **fields(1, 1, action=action)) for action in (0, 13))
    first, second, third = service().execute([good, bad, good])
    assert second.error().message() == "thirteen"
    assert second.error().code == Error.INTERNAL
    assert not first.has_error()
    assert not third.has_error()


def test_the_graph_pads_and_splits(load, tmp_path):
    model = load("onnx_graph", "recommend_graph", max_length=8, threads=1)
    histories = [[1, 2, 3], [4], [-1, 5]]
    requests = [asked(history=np.array([history])) for history in histories]
    too_long = asked(history=np.ones((1, 9), np.int64))
    *answers, refused = model.execute([*requests, too_long])
    found = [(by_name(a, "item_ids").values[0].tolist(), by_name(a, "scores").values[0].tolist()) for a in answers]
    assert found == stand_in.answer(tmp_path / "export", histories)
    assert refused.error().message() == "history has 9 events; expected 1 to 8"


def test_a_run_that_breaks_is_repeated_one_by_one(load, monkeypatch):
    model = load("onnx_graph", "recommend_graph", max_length=8, threads=1)
    run = model._run

    def breaks(feeds):
        if any((feed["history"] == 13).any() for feed in feeds):
            raise RuntimeError("thirteen")
        return run(feeds)

    monkeypatch.setattr(model, "_run", breaks)
    first, bad = model.execute([asked(history=np.array([[item]])) for item in (1, 13)])
    assert not first.has_error()
    assert bad.error().message() == "the graph refused this request: thirteen"


def test_a_model_that_reads_every_type_of_token(load, tmp_path):
    """From genrec.export.onnx through the repository: ragged requests get what the recommender itself says."""
    from genrec.export.onnx import export_onnx

    titles = np.array(["", *(f"title {i}" for i in range(1, 31))], np.object_)
    catalogue = Catalogue(titles, titles, np.ones(31, np.int64), np.zeros((31, 4), np.float32))
    recommender = Recommender(small.model(token_types=small.ALL_TYPES), RecommenderConfig(beams=8, top_k=6))
    export_onnx(recommender, catalogue, tmp_path / "real", context_columns=2)
    write_repository(tmp_path / "real", tmp_path / "served")
    model = load("onnx_graph", "recommend_graph", repository=tmp_path / "served", max_length=40, threads=1)
    rng = np.random.default_rng(0)
    requests, expected = [], []
    for rows, length in ((1, 1), (2, 7), (1, 20)):
        history, actions, times, contexts = (
            rng.integers(low, 5, (rows, length, *more)) for low, *more in ((1,), (0,), (0,), (0, 2))
        )
        requests.append(asked(history=history, actions=actions, times=times, contexts=contexts))
        with torch.inference_mode():
            expected.append(recommender(*map(torch.from_numpy, (history, actions, times, contexts))))
    for response, (items, scores) in zip(model.execute(requests), expected, strict=True):
        assert by_name(response, "item_ids").values.tolist() == items.tolist()
        np.testing.assert_allclose(by_name(response, "scores").values, scores, rtol=1e-4, atol=1e-4)
