"""The whole exported recommender in TensorRT-RTX, on a machine that need not have a GPU."""

import dataclasses

import pytest
import small
import torch
from plugin_harness import TINY

onnx = pytest.importorskip("onnx")

from genrec.export.kernel_images import Shapes  # noqa: E402
from genrec.export.onnx import to_onnx  # noqa: E402
from genrec.export.tensorrt import Builder, Profile, command  # noqa: E402
from genrec.generation import Recommender, RecommenderConfig  # noqa: E402

PROFILE = Profile(batch=9, length=40, usual=12)
INPUTS = [{"name": "history", "shape": ["batch", "length"]}]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    model = small.model(transitions=6)
    assert Shapes.of(model.config) == TINY
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    onnx.save(to_onnx(Recommender(model, RecommenderConfig(beams=10))), path)
    return path


@pytest.fixture
def builder(tensorrt, library):
    made = Builder(tensorrt, library)
    yield made
    made.close()


def plugins(network, module):
    kinds = [network.get_layer(number).type for number in range(network.num_layers)]
    return kinds.count(module.LayerType.PLUGIN_V3)


@pytest.mark.parametrize("capability", ["SM80", "SM120"])
def test_the_recommender_builds_with_its_operators_as_plugins(builder, tensorrt, model_file, capability):
    ours = [node for node in onnx.load(model_file).graph.node if node.domain == "genrec"]
    network = builder.network(model_file)
    assert plugins(network, tensorrt) == len(ours) > 20
    assert {network.get_output(number).name for number in range(2)} == {"item_ids", "scores"}
    engine = builder.engine(network, PROFILE.shapes(INPUTS), capability)
    assert all(node.op_type.encode() in engine for node in ours)


def test_without_the_plugins_the_bodies_are_built(tensorrt, model_file):
    builder = Builder(tensorrt)
    network = builder.network(model_file)
    assert plugins(network, tensorrt) == 0
    assert builder.engine(network, PROFILE.shapes(INPUTS), "SM80")


def test_what_does_not_build_is_a_sentence(builder, tensorrt, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(RuntimeError, match=r"model\.onnx was not parsed \(.+\)"):
        builder.network(tmp_path / "model.onnx")
    (tmp_path / "libgenrec_trt.so").write_bytes(b"not a library")
    with pytest.raises(RuntimeError, match=r"libgenrec_trt\.so was not loaded"):
        Builder(tensorrt, tmp_path / "libgenrec_trt.so")


def test_the_command_names_every_input_and_range(tmp_path):
    about = {"inputs": [*INPUTS, {"name": "contexts", "shape": ["batch", "length", 2]}]}
    line = command(tmp_path, about, dataclasses.replace(PROFILE, batch=64))
    assert f"--dynamicPlugins={tmp_path / 'libgenrec_trt.so'}" in line
    assert "--minShapes=history:1x1,contexts:1x1x2" in line
    assert "--optShapes=history:8x12,contexts:8x12x2" in line
    assert "--maxShapes=history:64x40,contexts:64x40x2" in line


def test_half_precision_parses(builder, tensorrt, tmp_path):
    onnx.save(to_onnx(Recommender(small.model(), RecommenderConfig(beams=10)), torch.float16), tmp_path / "model.onnx")
    assert plugins(builder.network(tmp_path / "model.onnx"), tensorrt) > 20
