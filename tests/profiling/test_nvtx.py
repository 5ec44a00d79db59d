"""What a profiler hears: a listener of our own stands where Nsight's would."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genrec.kernels import group_layer_norm, ranges
from genrec.kernels.ranges import NOTHING, SINKS, span

HERE = Path(__file__).parent
OPERATORS = {
    "relu_attention", "relu_attention_varlen", "group_layer_norm", "add_group_layer_norm", "moe_route", "moe_experts",
}  # fmt: skip


@pytest.fixture(scope="module")
def heard(tmp_path_factory):
    """Every range of nvtx_program.py: (name, payload, names of the ranges around it), in order."""
    directory = tmp_path_factory.mktemp("nvtx")
    recorder, record = directory / "recorder.so", directory / "record.jsonl"
    header = next(f for f in importlib.metadata.files("nvidia-nvtx") if f.name == "nvToolsExtPayload.h")
    include = Path(header.locate()).parents[1]
    source = HERE / "nvtx_recorder.cpp"
    subprocess.run(["c++", "-shared", "-fPIC", "-Wall", "-Werror", f"-I{include}", "-o", recorder, source], check=True)
    environment = {**os.environ, "NVTX_INJECTION64_PATH": str(recorder), "NVTX_RECORD": str(record)}
    environment["PYTHONPATH"] = str(HERE.parent)
    subprocess.run([sys.executable, HERE / "nvtx_program.py"], env=environment, check=True)
    events = [json.loads(line) for line in record.read_text().splitlines()]
    assert {event["domain"] for event in events} == {"genrec"}
    found, around = [], []
    for event in events:
        if "push" in event:
            found.append((event["push"], event["payload"], tuple(around)))
            around.append(event["push"])
        else:
            around.pop()
    assert not around, "what was pushed was popped"
    return found


def named(heard, name):
    return [(payload, around) for found, payload, around in heard if found == name]


def test_a_training_step_is_nested_as_it_runs(heard):
    step = ("pretrain", "step")
    assert named(heard, "pretrain") == [({}, ())]
    assert named(heard, "step") == [({"step": [7]}, ("pretrain",))]
    for part in ("forward", "backward", "optimizer"):
        assert named(heard, part) == [({}, step)]
    forward = [(name, around) for name, _, around in heard if around[:3] == (*step, "forward")]
    assert [name for name, around in forward if len(around) == 3] == ["encoder", "decoder", "code losses", "item loss"]
    layers = [name for name, around in forward if around[3:] == ("encoder",)]
    norm, attention, add = "group_layer_norm", "relu_attention_varlen", "add_group_layer_norm"
    assert layers == [norm, attention, add, add, attention, add, add]
    backward = {name for name, _, around in heard if around == (*step, "backward")}
    assert backward == {f"{name} backward" for name in OPERATORS}


def test_a_request_is_nested_as_it_runs(heard):
    assert named(heard, "request") == [({"users": [3], "beams": [5], "top_k": [4]}, ())]
    assert named(heard, "beam search") == [({"requests": [3], "beams": [5]}, ("request",))]
    steps = [payload for payload, around in named(heard, "decoder") if around == ("request", "beam search")]
    assert [payload["level"] for payload in steps] == [[0], [1], [2]]
    assert steps[0]["x"] == [3, 1, 16]
    inside = {name for name, _, around in heard if around == ("request", "beam search", "decoder")}
    assert inside == OPERATORS - {"relu_attention_varlen"}, "a request is padded"


def test_payloads_are_the_shapes(heard):
    (encoder, _), *_ = named(heard, "encoder")
    tokens, d_model = encoder["x"]
    assert (d_model, encoder["sequences"]) == (16, [6])
    for payload, around in named(heard, "relu_attention_varlen"):
        if "encoder" in around and "step" in around:
            assert payload["q"] == payload["k"] == payload["v"] == [tokens, 2, 8]
            assert payload["cu_seqlens_q"] == [7]
    rows = named(heard, "moe_experts")[0][0]
    assert rows["w_gate_up"][1:] == [24, 16]
    assert rows["x"][0] == rows["indices"][0]


def test_an_exception_closes_its_range(heard):
    assert named(heard, "afterwards") == [({}, ())]


def test_while_nobody_listens_nothing_is_built(monkeypatch):
    assert SINKS == []
    monkeypatch.setattr(ranges, "_Span", None)
    assert span("x", x=torch.ones(2)) is NOTHING
    group_layer_norm(torch.ones(1, 2), torch.zeros(1, dtype=torch.int64), torch.ones(1, 2), torch.ones(1, 2))


def test_ranges_do_not_break_a_compiled_graph(monkeypatch):
    class Listener:
        def push(self, name, values):
            raise AssertionError("a compiled graph has no ranges")

        pop = None

    monkeypatch.setattr(ranges, "SINKS", [Listener()])

    def model(x):
        with ranges.span("model", x=x):
            return group_layer_norm(x, torch.zeros(3, dtype=torch.int64), torch.ones(1, 4), torch.zeros(1, 4))

    x = torch.randn(3, 4)
    expected = torch.nn.functional.layer_norm(x, (4,))
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
