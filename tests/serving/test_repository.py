"""What is written into a model repository, and what is refused; no server needed."""

import json
import re
import shutil

import pytest
import stand_in

from genrec.export.triton_server import (
    Batching,
    add_version,
    graph_config,
    read_repository,
    service_config,
    write_repository,
)

FIELDS = [
    {"name": "actions", "dtype": "int64", "shape": ["batch", "length"]},
    {"name": "contexts", "dtype": "int64", "shape": ["batch", "length", 3]},
]


@pytest.fixture
def export(tmp_path):
    return stand_in.write_export(tmp_path / "export")


def about(export, **changes):
    return {**json.loads((export / "recommender.json").read_text()), **changes}


def parsed(text):
    """config.pbtxt as the server's own schema reads it."""
    text_format = pytest.importorskip("google.protobuf.text_format")
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    return text_format.Parse(text, schema.ModelConfig())


def tree(directory):
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def test_cpu_repository(export, tmp_path):
    write_repository(export, tmp_path / "out", instances=2, threads=3)
    assert tree(tmp_path / "out") == [
        "recommend/1/items.json",
        "recommend/1/model.py",
        "recommend/1/recommender.json",
        "recommend/config.pbtxt",
        "recommend_graph/1/model.onnx",
        "recommend_graph/1/model.py",
        "recommend_graph/config.pbtxt",
    ]
    found = read_repository(tmp_path / "out")
    assert (found.version, found.flavour, found.about["top_k"]) == (1, "cpu", stand_in.TOP_K)
    assert found.item_ids()[:2] == ["ü1", "ü2"]
    graph = parsed((tmp_path / "out" / "recommend_graph" / "config.pbtxt").read_text())
    assert (graph.backend, graph.platform) == ("python", "")
    assert graph.instance_group[0].count == 2
    assert graph.parameters["threads"].string_value == "3"
    service = parsed((tmp_path / "out" / "recommend" / "config.pbtxt").read_text())
    assert service.instance_group[0].count == 3


def test_gpu_repository(export, tmp_path):
    engine, plugins = tmp_path / "x.plan", tmp_path / "libgenrec_trt.so"
    engine.write_bytes(b"plan")
    plugins.write_bytes(b"library")
    write_repository(export, tmp_path / "out", flavour="gpu", engine=engine, plugins=plugins)
    files = tree(tmp_path / "out" / "recommend_graph")
    assert files == ["1/model.plan", "config.pbtxt", "libgenrec_trt.so"]
    assert read_repository(tmp_path / "out").flavour == "gpu"
    config = parsed((tmp_path / "out" / "recommend_graph" / "config.pbtxt").read_text())
    assert config.platform == "tensorrt_plan"
    assert not config.input[0].allow_ragged_batch  # an engine takes rectangles


def test_configs_say_what_they_should(export):
    batching = Batching(max_batch_size=40, preferred=(4, 16), max_delay_us=700, max_length=50)
    said = about(export)
    said["inputs"] += FIELDS
    graph = parsed(graph_config(said, "cpu", 1, 1, batching))
    assert graph.name == "recommend_graph"
    assert graph.max_batch_size == 40
    assert [(i.name, list(i.dims), i.allow_ragged_batch) for i in graph.input] == [
        ("history", [-1], True),
        ("actions", [-1], True),
        ("contexts", [-1, 3], True),
    ]
    assert [(o.name, list(o.dims)) for o in graph.output] == [("item_ids", [5]), ("scores", [5])]
    assert list(graph.dynamic_batching.preferred_batch_size) == [4, 16]
    assert [(w.batch_size, list(w.inputs["contexts"].dims)) for w in graph.model_warmup] == [(1, [1, 3]), (16, [12, 3])]
    assert graph.version_policy.latest.num_versions == 2
    service = parsed(service_config(said, "cpu", 1, batching))
    assert [i.name for i in service.input] == ["history", "actions", "contexts"]
    assert [o.name for o in service.output] == ["item_ids", "titles", "scores"]
    assert service.dynamic_batching.max_queue_delay_microseconds == 700
    assert service.parameters["max_length"].string_value == "50"
    assert service.parameters["pad_to"].string_value == ""
    # an engine sees two lengths only: what the model reads, and the longest
    assert parsed(service_config(said, "gpu", 1, batching)).parameters["pad_to"].string_value == "12 50"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_batch_size": 0}, "max_batch_size is 0; expected 1 or more"),
        ({"max_delay_us": -1}, "max_delay_us is -1; expected 0 or more"),
        ({"max_length": 0}, "max_length is 0; expected 1 or more"),
        ({"preferred": (8, 128)}, "preferred batch size is 128; expected 1 to 64"),
    ],
)
def test_batching_refuses(arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Batching(**arguments)


def test_write_refuses(export, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="instances is 0"):
        write_repository(export, out, instances=0)
    with pytest.raises(ValueError, match="flavour is gpu and engine None; expected an engine for gpu"):
        write_repository(export, out, flavour="gpu")
    with pytest.raises(FileNotFoundError, match=r"x\.plan does not exist"):
        write_repository(export, out, flavour="gpu", engine=tmp_path / "x.plan")
    with pytest.raises(FileNotFoundError, match=r"has no model\.onnx"):
        write_repository(tmp_path, out)
    for key, value, words in (
        ("format", "other", "has format 'other'; expected 'genrec-onnx'"),
        ("items", 31, "has 30 item_ids; expected 31"),
    ):
        changed = stand_in.write_export(tmp_path / key)
        (changed / "recommender.json").write_text(json.dumps(about(changed, **{key: value})))
        with pytest.raises(ValueError, match=words):
            write_repository(changed, out)
    (changed / "recommender.json").write_text("{}")
    with pytest.raises(ValueError, match="has format None"):
        write_repository(changed, out)
    (changed / "recommender.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        write_repository(changed, out)
    assert not out.exists()
    write_repository(export, out)
    with pytest.raises(FileExistsError, match="already exists"):
        write_repository(export, out)
    write_repository(export, out, overwrite=True)


def test_add_version(export, tmp_path):
    out = tmp_path / "out"
    write_repository(export, out)
    other = stand_in.write_export(tmp_path / "other", "other", seed=1)
    assert add_version(other, out) == 2
    assert add_version(export, out) == 3
    assert read_repository(out).version == 3
    assert sorted(path.name for path in out.iterdir()) == ["recommend", "recommend_graph"]
    assert (out / "recommend_graph" / "2" / "model.onnx").read_bytes() == (other / "model.onnx").read_bytes()
    (other / "recommender.json").write_text(json.dumps(about(other, outputs=[])))
    with pytest.raises(ValueError, match="has other outputs than"):
        add_version(other, out)
    with pytest.raises(ValueError, match="is of flavour cpu"):
        add_version(export, out, engine=tmp_path / "x.plan")
    shutil.rmtree(out / "recommend" / "3")  # as one goes back to the version before
    assert read_repository(out).version == 2
    assert add_version(export, out) == 4


def test_read_refuses(export, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a directory; expected a model repository"):
        read_repository(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"has no recommend/config\.pbtxt"):
        read_repository(tmp_path)
    write_repository(export, tmp_path / "out")
    (tmp_path / "out" / "recommend" / "1").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match="has no version"):
        read_repository(tmp_path / "out")
