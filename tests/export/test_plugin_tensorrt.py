"""TensorRT-RTX with the plugins, on a machine that need not have a GPU: it loads the library, makes plugins of nodes
of an ONNX model and builds engines; what it may not build is said in its log."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plugin_harness import TINY

onnx = pytest.importorskip("onnx")
NAMES = ["AddGroupLayerNorm", "GroupLayerNorm", "MoeExperts", "MoeRoute", "ReluAttention", "ReluAttentionLimited"]
# Every node of the domain on inputs of its own, in the sizes of TINY: width 16, two heads of 8, two of four experts.
MODEL = """
<ir_version: 10, opset_import: ["": 18, "genrec": 1]>
tiny (
    float[N, L, 16] x, int64[N, L] ids, float[3, 16] weight, float[3, 16] bias,
    float[N, 2, L, 8] q, float[N, 2, K, 8] k, int64[N, L] limit, float[2, 6] rel_bias,
    float[T, 16] tokens, float[T, 4] logits, float[4] router, float[4, 24, 16] w_gate_up, float[4, 16, 12] w_down
) => (float[N, L, 16] y, float[N, 2, L, 8] out, float[T, 16] mixed) {
    normed = genrec.GroupLayerNorm <eps: float = 0.00001, PLUGIN> (x, ids, weight, bias)
    y, s = genrec.AddGroupLayerNorm <eps: float = 0.00001, PLUGIN> (normed, x, ids, weight, bias)
    seen = genrec.ReluAttention
        <causal: int = 1, scale: float = 0.5, divisor: float = 0.0, visible: int = 1, PLUGIN> (q, k, k, rel_bias)
    out = genrec.ReluAttentionLimited
        <scale: float = 0.5, divisor: float = 0.0, visible: int = 1, PLUGIN> (seen, k, k, limit, rel_bias)
    weights, indices = genrec.MoeRoute <top_k: int = 2, renormalize: int = 1, PLUGIN> (logits, router)
    mixed = genrec.MoeExperts <PLUGIN> (tokens, weights, indices, w_gate_up, w_down)
}""".replace("PLUGIN", 'plugin_namespace: string = "genrec", plugin_version: string = "1"')
SIZES = {"N": (1, 2, 5), "L": (1, 3, 70), "K": (1, 9, 300), "T": (1, 8, 4000)}  # of the profile


class TensorRT:
    """A registry that knows the plugins, and everything that was logged."""

    def __init__(self, module: Any, library: Path) -> None:
        lines: list[str] = []

        class Log(module.ILogger):
            def __init__(self) -> None:
                module.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                lines.append(message)

        self.module, self.lines, self.log = module, lines, Log()
        self.builder = module.Builder(self.log)  # gives the registry its log
        self.registry = module.get_plugin_registry()
        self.handle = self.registry.load_library(str(library))

    def network(self, text: str = MODEL) -> Any:
        """The parsed model, or None."""
        network = self.builder.create_network(0)
        parser = self.module.OnnxParser(network, self.log)
        return network if parser.parse(onnx.parser.parse_model(text).SerializeToString()) else None

    def engine(self, network: Any, capability: str) -> Any:
        """The engine's bytes, or None."""
        config, profile = self.builder.create_builder_config(), self.builder.create_optimization_profile()
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(self.module.ComputeCapability, capability), 0)
        shapes = {value.name: value.type.tensor_type.shape for value in onnx.parser.parse_model(MODEL).graph.input}
        for index in range(network.num_inputs):
            given = network.get_input(index)
            named = [dim.dim_param for dim in shapes[given.name].dim]
            ends = [
                [SIZES[name][end] if name else size for name, size in zip(named, given.shape, strict=True)]
                for end in range(3)
            ]
            profile.set_shape(given.name, *ends)
        config.add_optimization_profile(profile)
        return self.builder.build_serialized_network(network, config)


@pytest.fixture(scope="module")
def trt(tensorrt: Any, library: Path) -> Iterator[TensorRT]:
    assert (TINY.d_model, TINY.heads, TINY.experts, TINY.top_k, TINY.d_expert) == (16, 2, 4, 2, 12)
    loaded = TensorRT(tensorrt, library)
    yield loaded
    loaded.registry.deregister_library(loaded.handle)


def test_every_creator_is_registered(trt):
    ours = [creator for creator in trt.registry.all_creators if creator.plugin_namespace == "genrec"]
    assert sorted(creator.name for creator in ours) == NAMES
    assert {creator.plugin_version for creator in ours} == {"1"}


def test_nodes_become_plugins(trt):
    network = trt.network()
    assert network is not None, trt.lines[-5:]
    kinds = [network.get_layer(index).type for index in range(network.num_layers)]
    assert kinds.count(trt.module.LayerType.PLUGIN_V3) == len(NAMES)
    outputs = {network.get_output(index).name: network.get_output(index) for index in range(network.num_outputs)}
    assert {name: tuple(output.shape) for name, output in outputs.items()} == {
        "y": (-1, -1, 16), "out": (-1, 2, -1, 8), "mixed": (-1, 16),
    }  # fmt: skip


@pytest.mark.parametrize("capability", ["SM80", "SM120"])
def test_engines_are_built(trt, capability):
    engine = trt.engine(trt.network(), capability)
    assert engine is not None, trt.lines[-5:]
    content = bytes(engine)
    assert all(name.encode() in content for name in [*NAMES, "renormalize", "divisor"])


def test_a_wrong_attribute_is_a_sentence(trt):
    assert trt.network(MODEL.replace("top_k: int = 2", "top_k: int = 0")) is None
    assert any("genrec::MoeRoute" in line and "top_k is 0; expected 1 or more" in line for line in trt.lines)


def test_a_model_of_other_sizes_is_not_built(trt):
    network = trt.network(MODEL.replace("top_k: int = 2", "top_k: int = 3"))
    assert trt.engine(network, "SM80") is None
    assert any("the library was built without the kernels moe_route fp32 E=4 k=3" in line for line in trt.lines)
