"""From a catalogue to a tokenizer directory: weights, one semantic id per item, and how good they are."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genrec.data.catalogue import load_semantic_ids, read_parquet, save_semantic_ids
from genrec.data.files import atomic_file
from genrec.interfaces import Catalogue, SemanticIds
from genrec.models.rqvae import RQVAE, RQVAEConfig, load_rqvae, save_rqvae
from genrec.models.semantic_ids import (
    assign_new,
    check_capacity,
    code_tokens,
    resolve_collisions,
    sum_of_codes,
)
from genrec.training.log import MetricsLog
from genrec.training.rqvae import FitConfig, check_features, fit

_SAME_SPACE = (
    1.5  # known items this much worse than when fitted: their features come from another run of genrec features
)
_ROUNDING = 1e-3
_LOST = 0.9  # an error near 1 is that of the mean item: the features say nothing about the ids


def learn_tokenizer(
    catalogue: Catalogue, model_config: RQVAEConfig, fit_config: FitConfig, directory: Path, progress: bool = True
) -> dict[str, Any]:
    """Fit an RQ-VAE to the catalogue's features and give every item an id; returns what tokenizer.json holds.

    Raises ValueError on features that are not finite, and on more items than ids.
    """
    features = _features(catalogue, model_config.input_dim)
    check_capacity(len(features), model_config.codebook_sizes)
    torch.manual_seed(fit_config.seed)  # the initial weights
    model = RQVAE(model_config)
    with MetricsLog(directory) as log:
        quality = fit(model, features, fit_config, log, progress)
    with torch.no_grad():
        resolution = resolve_collisions(model.encode(features), model.codebooks)
    summary = {
        "codebook_sizes": list(model_config.codebook_sizes),
        "items": len(features),
        "model": model_config.to_json(),
        "fit": dataclasses.asdict(fit_config),
        "quality": {**quality._asdict(), "reconstruction_of_ids": _error(model, features, resolution.codes)},
        "collisions": resolution.report(),
    }
    _write(directory, catalogue, model, resolution.codes, summary)
    return summary


def extend_tokenizer(catalogue: Catalogue, previous: Path, directory: Path) -> dict[str, Any]:
    """Keep the weights and ids of the tokenizer directory `previous` and give ids to the items it lacks.

    Items that the catalogue no longer has keep their ids too, so that no id ever means two items. Features that `genrec
    features` made anew lie in another rotation of the same space; the items known from before tell which.
    """
    summary = _read_summary(previous)
    model = load_rqvae(previous / "rqvae.safetensors", RQVAEConfig.from_json(summary["model"]))
    old_items = _item_ids(previous)
    old_codes = load_semantic_ids(previous, _names_only(old_items)).codes[1:]
    row_of = {item: row for row, item in enumerate(old_items)}

    features = _features(catalogue, model.config.input_dim)
    items = catalogue.item_ids[1:].tolist()
    known = [row for row, item in enumerate(items) if item in row_of]
    new = [row for row, item in enumerate(items) if item not in row_of]
    known_codes = old_codes[[row_of[items[row]] for row in known]]
    with torch.no_grad():
        targets = model.decode(sum_of_codes(known_codes, model.codebooks))
        fitted_error = summary["quality"]["reconstruction_of_ids"]
        features, error = _into_fitted_space(model, features, known, targets, fitted_error)
        resolution = assign_new(model.encode(features[new]), model.codebooks, old_codes)

    all_items = [*old_items, *(items[row] for row in new)]
    summary |= {
        "items": len(all_items),
        "added": {"items": len(new), "known_error": error, **resolution.report()},
    }
    codes = np.concatenate([old_codes, resolution.codes])
    _write(directory, _names_only(all_items), model, codes, summary)
    return summary


def _into_fitted_space(
    model: RQVAE, features: Tensor, known: list[int], targets: Tensor, fitted_error: float
) -> tuple[Tensor, float]:
    """Features as the model knows them, and the error of the known rows against what their ids decode to.

    Singular vectors are unique up to rotation only, so a refitted SVD turns all features. The orthogonal matrix that
    turns the known rows back is U·Vᵀ of the SVD of featuresᵀ · targets (Schönemann 1966).
    """

    def error_of(rows: Tensor) -> float:
        return ((rows - targets).square().mean() / model.scale.square()).item()

    if not known:
        raise ValueError(
            "the catalogue has none of the items that have ids; their features show where new items belong"
        )
    error = error_of(features[known])
    if error <= _SAME_SPACE * fitted_error + _ROUNDING:
        return features, error
    if len(known) >= features.shape[1]:  # fewer rows do not say how to turn every dimension
        u, _, vt = torch.linalg.svd(features[known].T.double() @ targets.double())
        features = (features.double() @ u @ vt).float()
        error = error_of(features[known])
    if not error < _LOST:
        raise ValueError(
            f"the features of {len(known)} items do not fit the ids these items have (error {error:.2f}, it was "
            f"{fitted_error:.2f}); expected features made with the same settings from much the same items"
        )
    return features, error


def _error(model: RQVAE, features: Tensor, codes: NDArray[np.int64]) -> float:
    """Squared error of what the codes decode to, as a share of the features' variance."""
    decoded = model.decode(sum_of_codes(codes, model.codebooks))
    return ((features - decoded).square().mean() / model.scale.square()).item()


def _features(catalogue: Catalogue, width: int) -> Tensor:
    features = torch.from_numpy(catalogue.features[1:])
    bad = (~features.isfinite()).any(1).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(
            f"features of {len(bad)} of {len(features)} items are NaN or infinite, the first is item "
            f"{catalogue.item_ids[1 + bad[0]]!r}; expected finite numbers"
        )
    check_features(features, width)
    return features


def _write(
    directory: Path, catalogue: Catalogue, model: RQVAE, codes: NDArray[np.int64], summary: dict[str, Any]
) -> None:
    sizes = model.config.codebook_sizes
    with_row_0 = np.concatenate([np.zeros((1, len(sizes)), np.int64), codes])
    save_semantic_ids(directory, catalogue, SemanticIds(with_row_0, sizes))
    index = {item: code_tokens(row) for item, row in zip(catalogue.item_ids[1:], codes.tolist(), strict=True)}
    _write_json(directory / "index.json", index)
    _write_json(directory / "tokenizer.json", summary)
    with atomic_file(directory / "rqvae.safetensors") as path:
        save_rqvae(path, model)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_summary(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected the output of genrec tokenize")
    try:
        summary = json.loads(path.read_bytes())
        RQVAEConfig.from_json(summary["model"])
        float(summary["quality"]["reconstruction_of_ids"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not describe a model ({error!r}); expected the output of genrec tokenize"
        ) from None
    return summary


def _item_ids(directory: Path) -> list[str]:
    return read_parquet(directory / "semantic_ids.parquet", "genrec tokenize")["item_id"].to_pylist()


def _names_only(item_ids: list[str]) -> Catalogue:
    """A catalogue that only says which items there are, in which order."""
    names = np.array(["", *item_ids], dtype=np.object_)
    rows = len(names)
    return Catalogue(names, names, np.zeros(rows, np.int64), np.zeros((rows, 0), np.float32))
