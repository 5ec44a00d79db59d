"""The exported graph: the same items and scores in ONNX Runtime, from one file that stands for itself."""

import dataclasses
import json

import numpy as np
import pytest
import small
import torch

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from genrec.data.catalogue import vocabulary_hash  # noqa: E402
from genrec.data.sequences import load_sequences  # noqa: E402
from genrec.data.vocabulary import load_vocabulary  # noqa: E402
from genrec.export.files import read_export  # noqa: E402
from genrec.export.onnx import agreement, export_onnx, input_names, to_onnx  # noqa: E402
from genrec.generation import Recommender, RecommenderConfig  # noqa: E402
from genrec.generation.storage import load_run  # noqa: E402
from genrec.kernels import onnx as nodes  # noqa: E402

ITEMS = 60
SIZES = [(1, 1), (1, 12), (3, 5), (2, 13), (40, 30)]  # batch, length; the model reads 12 events
# every mode, both ways to normalise, with and without the history, models of one and of four token types
CASES = {
    "mixed": ({"transitions": 8}, {"mode": "mixed", "beams": 10}),
    "rerank, four token types": (
        {"token_types": small.ALL_TYPES, "transitions": 8},
        {"mode": "rerank", "beams": 7, "top_k": 20},
    ),
    "beam, whole level": (
        {"decoder_layers": 2, "experts": 5, "top_k": 3},
        {"mode": "beam", "beams": 80, "top_k": 80, "normalize": "level", "exclude_seen": False},
    ),
    "items": ({}, {"mode": "items"}),
}


@pytest.fixture(scope="module", params=CASES)
def exported(request):
    """A recommender and its graph."""
    shape, settings = CASES[request.param]
    recommender = Recommender(small.model(ITEMS, (5, 5, 60), **shape), RecommenderConfig(**settings))
    return recommender, to_onnx(recommender)


def arguments(recommender, batch, length):
    """Histories with padding anywhere, unknown items, and one row of nothing."""
    generator = torch.Generator().manual_seed(batch + length)
    history = torch.randint(-1, ITEMS + 3, (batch, length), generator=generator)
    if batch > 1:
        history[1] = 0
    fields = [torch.randint(-1, 7, (batch, length), generator=generator) for _ in input_names(recommender)[1:]]
    if fields:
        fields[-1] = fields[-1].unsqueeze(-1)
    return history, *fields


def assert_same(recommender, session, tolerance=1e-4):
    for batch, length in SIZES:
        given = arguments(recommender, batch, length)
        with torch.inference_mode():
            items, scores = (t.numpy() for t in recommender(*given))
        feed = {name: t.numpy() for name, t in zip(input_names(recommender), given, strict=True)}
        found, found_scores = session.run(["item_ids", "scores"], feed)
        assert found.shape == (batch, recommender.config.top_k)
        assert found_scores.dtype == np.float32
        np.testing.assert_array_equal(found, items)
        np.testing.assert_allclose(found_scores, scores, rtol=tolerance, atol=tolerance)


def test_onnx_runtime_gives_the_same_items_and_scores(exported):
    recommender, proto = exported
    onnx.checker.check_model(proto, full_check=True)
    assert_same(recommender, onnxruntime.InferenceSession(proto.SerializeToString()))


def test_axes_are_dynamic_and_named(exported):
    recommender, proto = exported
    for value in proto.graph.input:
        assert [dim.dim_param for dim in value.type.tensor_type.shape.dim][:2] == ["batch", "length"]
    for value in proto.graph.output:
        first, second = value.type.tensor_type.shape.dim
        assert (first.dim_param, second.dim_value) == ("batch", recommender.config.top_k)
    assert [value.name for value in proto.graph.input] == input_names(recommender)


def test_operators_are_nodes_with_bodies_and_the_plugins_names(exported):
    recommender, proto = exported
    ours = [node for node in proto.graph.node if node.domain == "genrec"]
    expected = {"GroupLayerNorm", "AddGroupLayerNorm", "ReluAttention"}
    if recommender.config.mode != "items":
        expected |= {"ReluAttentionLimited", "MoeRoute", "MoeExperts"}
    assert {node.op_type for node in ours} == {body.name for body in proto.functions} == expected
    for node in ours:
        named = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert named["plugin_namespace"] == b"genrec"
        assert named["plugin_version"] == b"1"
    assert [opset.version for opset in proto.opset_import if opset.domain == ""] == [nodes.OPSET]


def test_half_precision_stays_close():
    """Scores are float32; items change places only where scores are closer than half precision tells apart."""
    recommender = Recommender(small.model(ITEMS, (5, 5, 60)), RecommenderConfig(beams=ITEMS, top_k=ITEMS, mode="beam"))
    proto = to_onnx(recommender, torch.float16)
    assert onnx.TensorProto.FLOAT16 in {tensor.data_type for tensor in proto.graph.initializer}
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    (history,) = arguments(recommender, 8, 12)
    with torch.inference_mode():
        items, scores = (t.numpy() for t in recommender(history))
    found, found_scores = session.run(["item_ids", "scores"], {"history": history.numpy()})
    for row in range(8):
        expected, given = (dict(zip(i[row], s[row], strict=True)) for i, s in ((items, scores), (found, found_scores)))
        assert expected.keys() == given.keys()
        assert all(abs(expected[item] - given[item]) < 0.02 * (1 + abs(expected[item])) for item in expected if item)


@pytest.mark.parametrize("options", [{"causal": True}, {}, {"causal": True, "rel_bias": True}, {"key_limit": True}])
@pytest.mark.parametrize("normalizer", ["length", "visible", 3.0])
def test_attention_bodies_are_the_operator(options, normalizer):
    """Also in the forms that a recommendation does not use: no bias, other lengths, rows that see nothing."""
    from genrec.kernels import relu_attention

    class Attention(torch.nn.Module):
        def forward(self, q, k, v, rel_bias, key_limit):
            chosen = {"rel_bias": rel_bias} if "rel_bias" in options or "key_limit" in options else {}
            if "key_limit" in options:
                chosen["key_limit"] = key_limit
            return relu_attention(q, k, v, causal="causal" in options, normalizer=normalizer, scale=0.7, **chosen)

    nodes.load()
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 4)
    given = q, k, v, torch.randn(3, 4), torch.randint(-1, 8, (2, 7))
    program = torch.onnx.export(
        Attention().eval(), given, dynamo=True, verbose=False, opset_version=nodes.OPSET,
        custom_translation_table=nodes.TRANSLATIONS, input_names=["q", "k", "v", "rel_bias", "key_limit"],
    )  # fmt: skip
    proto = program.model_proto
    proto.functions.extend(body.to_function_proto() for body in nodes.BODIES.values())
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    taken = {value.name for value in session.get_inputs()}
    names = ["q", "k", "v", "rel_bias", "key_limit"]
    (found,) = session.run(None, {n: t.numpy() for n, t in zip(names, given, strict=True) if n in taken})
    np.testing.assert_allclose(found, Attention()(*given).numpy(), rtol=1e-5, atol=1e-5)


def test_a_run_is_exported_with_what_a_server_needs(trained, tmp_path):
    run = load_run(trained)
    recommender, users = Recommender(run.model, run.settings), load_sequences(run.features)
    facts = {"metrics": {"recall@10": 0.5}, "vocabulary_hash": run.vocabulary_hash}
    about = export_onnx(recommender, run.catalogue, tmp_path / "onnx", users=users, **facts)
    assert about == read_export(tmp_path / "onnx")[0]
    assert about["inputs"][0] == {"name": "history", "dtype": "int64", "shape": ["batch", "length"]}
    assert about["vocabulary_hash"] == vocabulary_hash(run.catalogue, load_vocabulary(run.features))
    assert about["metrics"] == {"recall@10": 0.5}
    assert about["agreement"]["same_items"] == 1.0
    assert about["agreement"]["score_error"] < 1e-4
    items = json.loads((tmp_path / "onnx" / "items.json").read_text())
    assert items["item_ids"] == run.catalogue.item_ids[1:].tolist()
    assert items["titles"] == run.catalogue.titles[1:].tolist()
    other = Recommender(run.model, dataclasses.replace(run.settings, mode="items"))
    assert agreement(tmp_path / "onnx" / "model.onnx", other, users)["same_items"] < 1, "a comparison that cannot fail"


def test_large_weights_get_a_file_of_their_own(monkeypatch, tmp_path, trained):
    monkeypatch.setattr("genrec.export.onnx.EXTERNAL", 1000)
    run = load_run(trained)
    recommender = Recommender(run.model, run.settings)
    users = load_sequences(run.features)
    about = export_onnx(recommender, run.catalogue, tmp_path / "onnx", users=users)
    assert (tmp_path / "onnx" / "model.onnx.data").stat().st_size > 10_000
    assert about["agreement"]["same_items"] == 1.0
    (tmp_path / "onnx").rename(tmp_path / "moved")
    assert agreement(tmp_path / "moved" / "model.onnx", recommender, users)["same_items"] == 1.0
