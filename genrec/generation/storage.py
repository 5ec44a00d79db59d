"""A trained model on disk: model.safetensors beside model.json, which says how to build and how to use it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from genrec.data.catalogue import load_catalogue, vocabulary_hash
from genrec.data.files import atomic_file, read_json
from genrec.data.split import Split, split_from_json
from genrec.data.vocabulary import load_vocabulary
from genrec.generation.recommender import RecommenderConfig
from genrec.interfaces import Catalogue
from genrec.models.ugt import UGT, ModelVocabulary, UGTConfig


def save_model(directory: Path, model: UGT, recommender: RecommenderConfig, **facts: Any) -> None:
    """Write the weights, then model.json with the configuration and `facts` about the training."""
    with atomic_file(directory / "model.safetensors") as temporary:
        save_file(model.state_dict(), temporary)
    record = {"model": asdict(model.config), "vocabulary": asdict(model.vocabulary), "recommender": asdict(recommender)}
    with atomic_file(directory / "model.json") as temporary:
        temporary.write_text(json.dumps({**record, **facts}, indent=1) + "\n")


def load_model(directory: Path, device: str = "cpu") -> tuple[UGT, RecommenderConfig]:
    """The model and how it recommends; ValueError or FileNotFoundError name the file that is missing or not right."""
    record = read_model_json(directory)
    try:
        model = UGT(*_configs(record), torch.zeros(_codes_shape(record), dtype=torch.int64))
        recommender = RecommenderConfig(**record["recommender"])
    except (ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
        raise ValueError(f"{directory / 'model.json'} is not a genrec model description ({error})") from None
    try:
        model.load_state_dict(load_file(directory / "model.safetensors"))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{directory / 'model.safetensors'} does not hold the weights of model.json ({error})"
        ) from None
    return model.to(device).eval(), recommender


def load_catalogue_of(directory: Path, features: Path) -> Catalogue:
    """The catalogue in `features`, whose vocabulary must be the one the model in `directory` was trained with."""
    catalogue, record = load_catalogue(features), read_model_json(directory)
    items, expected = record["vocabulary"]["items"], record.get("data", {}).get("vocabulary_hash")
    if catalogue.size != items:
        raise ValueError(
            f"{features} has {catalogue.size} items, the model was trained on {items}; "
            "expected the features directory of its training"
        )
    if expected and vocabulary_hash(catalogue, load_vocabulary(features)) != expected:
        raise ValueError(
            f"{features} has another vocabulary than the model in {directory} was trained with; "
            "expected the features directory of its training, or a model trained anew"
        )
    return catalogue


def read_model_json(directory: Path) -> dict[str, Any]:
    """model.json of a trained model; FileNotFoundError or ValueError where there is none that can be read."""
    return read_json(directory / "model.json", "genrec train")


@dataclass(frozen=True)
class TrainedRun:
    """What a finished genrec train run left."""

    model: UGT
    settings: RecommenderConfig
    features: Path
    """of its training"""
    catalogue: Catalogue
    vocabulary_hash: str
    """of what its ids mean"""
    split: Split
    """what it was not trained on"""
    metrics: dict[str, float] | None
    """of the test users, where the run was evaluated"""


def load_run(run: Path, features: Path | None = None) -> TrainedRun:
    """A run's directory, or the model's inside it; `features` overrules where model.json says it was trained."""
    directory = run if (run / "model.json").is_file() else run / "model"
    if not directory.is_dir():
        raise FileNotFoundError(f"{run} holds no model; expected the directory of a finished genrec train run")
    model, settings = load_model(directory)
    features = features or trained_on(directory)
    catalogue = load_catalogue_of(directory, features)
    known_by = vocabulary_hash(catalogue, load_vocabulary(features))
    split = split_from_json(read_model_json(directory).get("data", {}))
    return TrainedRun(model, settings, features, catalogue, known_by, split, _test_metrics(directory.parent))


def trained_on(directory: Path) -> Path:
    """The features of the training of the model in `directory`."""
    data = read_model_json(directory).get("data")
    if data is None:
        raise ValueError(f"{directory / 'model.json'} does not say what it was trained on; pass --features")
    return Path(data["features"])


def _test_metrics(directory: Path) -> dict[str, float] | None:
    try:
        return json.loads((directory / "metrics.json").read_text())["test"]["ugt"]
    except (FileNotFoundError, KeyError, ValueError):
        return None


def _configs(record: dict[str, Any]) -> tuple[UGTConfig, ModelVocabulary]:
    config = {**record["model"], "token_types": tuple(record["model"]["token_types"])}
    sizes = record["vocabulary"]
    vocabulary = ModelVocabulary(sizes["items"], tuple(sizes["codebook_sizes"]), tuple(sizes["type_sizes"]))
    return UGTConfig(**config), vocabulary


def _codes_shape(record: dict[str, Any]) -> tuple[int, int]:
    return record["vocabulary"]["items"] + 1, len(record["vocabulary"]["codebook_sizes"])
