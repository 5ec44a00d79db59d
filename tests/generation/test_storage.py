"""Models on disk."""

import json

import numpy as np
import pytest
import small
import torch

from genrec.generation import Recommender, RecommenderConfig
from genrec.generation.storage import load_model, read_model_json, save_model

USERS = [[1, 2, 3], [4], [5, 6, 7, 8]]
TYPES = ("item", "time")


@pytest.fixture
def saved(tmp_path):
    model = small.model(token_types=TYPES, decoder_layers=2)
    model.decoder.layers[0].moe.router_bias.copy_(torch.randn(4))  # not a parameter, and decides who answers
    save_model(tmp_path, model, RecommenderConfig(beams=7, alpha=0.5), data={"features": "here"})
    return tmp_path, model


def ranking(model, settings):
    return Recommender(model, settings).rank_scored(small.sequences(USERS, types=TYPES), 10)


def test_round_trip_ranks_identically(saved):
    directory, model = saved
    loaded, settings = load_model(directory)
    assert settings == RecommenderConfig(beams=7, alpha=0.5)
    assert loaded.config == model.config
    assert loaded.vocabulary == model.vocabulary
    assert not loaded.training
    for ours, theirs in zip(ranking(model, settings), ranking(loaded, settings), strict=True):
        assert np.array_equal(ours, theirs)


def test_same_model_same_bytes(saved, tmp_path):
    directory, model = saved
    save_model(tmp_path / "again", model, RecommenderConfig(beams=7, alpha=0.5), data={"features": "here"})
    for name in ("model.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (directory / name).read_bytes()


def test_facts_are_kept(saved):
    assert read_model_json(saved[0])["data"] == {"features": "here"}


def refused(directory, error, name):
    with pytest.raises(error) as caught:
        load_model(directory)
    assert name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_missing_file(saved, name):
    (saved[0] / name).unlink()
    refused(saved[0], FileNotFoundError, name)


@pytest.mark.parametrize("kept", [0, 7, 200, -4])
@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_truncated_file(saved, name, kept):
    path = saved[0] / name
    content = path.read_bytes()
    path.write_bytes(content[:kept])
    refused(saved[0], ValueError, name)


@pytest.mark.parametrize(
    "content", [b"[]", b"3", b"null", b"{}", b'{"model": {}}', b"\xff\xfe", b'{"model": 3, "vocabulary": 3}']
)
def test_model_json_of_something_else(saved, content):
    (saved[0] / "model.json").write_bytes(content)
    refused(saved[0], ValueError, "model.json")


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("model", "d_model", 32),
        ("model", "d_model", 0),
        ("model", "d_model", "wide"),
        ("model", "d_modl", 16),
        ("model", "token_types", ["item", "mood"]),
        ("vocabulary", "items", 31),
        ("vocabulary", "items", -2),
        ("vocabulary", "items", "many"),
        ("vocabulary", "codebook_sizes", [4, 4]),
        ("vocabulary", "codebook_sizes", [4, 4, 5]),
        ("vocabulary", "type_sizes", [31]),
        ("recommender", "beam", 3),
    ],
)
def test_description_that_does_not_fit(saved, part, key, value):
    path = saved[0] / "model.json"
    record = json.loads(path.read_text())
    record[part][key] = value
    path.write_text(json.dumps(record))
    refused(saved[0], ValueError, str(saved[0]))
