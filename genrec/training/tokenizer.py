"""From a catalogue to a tokenizer directory: weights, one semantic id per item, and how good they are."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from genrec.data.catalogue import load_semantic_ids, save_semantic_ids
from genrec.data.files import atomic_file
from genrec.interfaces import Catalogue, SemanticIds
from genrec.models.rqvae import RQVAE, RQVAEConfig, load_rqvae, save_rqvae
from genrec.models.semantic_ids import (
    Resolution,
    assign_new,
    check_capacity,
    code_tokens,
    resolve_collisions,
    sum_of_codes,
)
from genrec.training.log import MetricsLog
from genrec.training.rqvae import FitConfig, check_features, fit

_SAME_SPACE = 1.5  # known items this much worse than when fitted: their features come from another run of genrec features
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

    error = error_of(features[known])
    if error <= _SAME_SPACE * fitted_error:
        return features, error
    u, _, vt = torch.linalg.svd(features[known].T.double() @ targets.double())
    features = (features.double() @ u @ vt).float()
    error = error_of(features[known])
    if not error < _LOST:
        raise ValueError(
            f"the features of {len(known)} items that have ids do not fit these ids (error {error:.2f}, it was "
            f"{fitted_error:.2f}); expected features made with the same settings from much the same items"
        )
    return features, error
