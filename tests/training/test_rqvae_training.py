"""Fitting on real film texts: better than scikit-learn's residual k-means, alive codebooks, the same weights again."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from genrec.data.item_features import item_features
from genrec.models.rqvae import RQVAE, RQVAEConfig
from genrec.training.log import MetricsLog, read_metrics
from genrec.training.rqvae import FitConfig, fit, measure

MOVIES = Path(__file__).parents[2] / "data" / "ml-latest-small" / "movies.csv"
NO_PAIRS = {name: np.zeros(0, np.int64) for name in ("a", "b", "distance", "count")}


@pytest.fixture(scope="module")
def films():
    """(2000, 64) text features of real films."""
    with open(MOVIES, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:2000]
    texts = [f"{row['title']} {row['genres'].replace('|', ' ')}" for row in rows]
    return torch.from_numpy(item_features(texts, NO_PAIRS, text_dim=64, cooccurrence_dim=0)[1:])


def fitted(features, directory, config=None, hidden_sizes=(), sizes=(64, 64, 64), **settings):
    torch.manual_seed(0)
    model = RQVAE(RQVAEConfig(features.shape[1], hidden_sizes, 32, sizes, **settings))
    with MetricsLog(directory) as log:
        quality = fit(model, features, config or FitConfig(epochs=10, warmup_epochs=10), log, progress=False)
    return model, quality


def residual_kmeans_error(features, sizes):
    residual = features.numpy()
    for size in sizes:
        found = KMeans(size, n_init=1, init="random", max_iter=25, random_state=0).fit(residual)
        residual = residual - found.cluster_centers_[found.labels_]
    return (residual**2).sum() / ((features - features.mean(0)) ** 2).sum().item()


def test_residual_kmeans_is_beaten_with_every_code_alive(films, tmp_path):
    _, quality = fitted(films, tmp_path)
    assert quality.reconstruction < residual_kmeans_error(films, (64, 64, 64))
    assert min(quality.usage) > 0.95
    assert quality.residual[0] > quality.residual[1] > quality.residual[2]
    assert quality.residual[2] == pytest.approx(quality.reconstruction, rel=1e-4)  # nothing is lost outside the codes


def test_moving_averages_improve_on_the_greedy_start(films, tmp_path):
    fitted(films, tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[-1]["reconstruction"] < rows[0]["reconstruction"]


def test_an_encoder_learns_without_collapsing(films, tmp_path):
    _, quality = fitted(films, tmp_path, hidden_sizes=(64,))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[-1]["reconstruction"] < rows[0]["reconstruction"] < 0.9
    assert min(quality.usage) > 0.9
    assert min(quality.perplexity) > 16


def test_the_same_seed_gives_the_same_weights(films, tmp_path):
    config = FitConfig(epochs=2, warmup_epochs=1, seed=3)
    states = [fitted(films[:300], tmp_path / str(i), config, (16,), (8, 8))[0].state_dict() for i in range(2)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    other, _ = fitted(films[:300], tmp_path / "other", FitConfig(epochs=2, warmup_epochs=1, seed=4), (16,), (8, 8))
    assert not torch.equal(other.codebooks[0], states[0]["codebook_0"])


def test_every_epoch_is_logged_level_by_level(films, tmp_path):
    _, quality = fitted(films[:300], tmp_path, FitConfig(epochs=3), sizes=(8, 16))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["stage"], row["step"]) for row in rows] == [("tokenize", epoch) for epoch in range(4)]
    for row in rows:
        assert [len(row[name]) for name in ("usage", "perplexity", "residual")] == [2, 2, 2]
        assert {"reconstruction", "revived"} <= row.keys()
    assert rows[-1]["usage"] == quality.usage
    assert list((tmp_path / "tensorboard").rglob("events*"))


def test_measure_against_numpy(films):
    features = films[:200]
    torch.manual_seed(0)
    model = RQVAE(RQVAEConfig(64, (16,), 8, (8, 4)))
    model.set_normalisation(features)
    with torch.no_grad():
        latents = model.encode(features)
        model.init_codebooks(latents, torch.Generator().manual_seed(0))
        codes = model.nearest_codes(latents)
        codes[codes == 3] = 2  # a dead code on each level
        quality = measure(model, features, latents, codes)
        decoded = model.decode(model.codebooks[0][codes[:, 0]] + model.codebooks[1][codes[:, 1]]).numpy()
    residual = latents.double().numpy()
    variance = ((residual - residual.mean(0)) ** 2).sum()
    for level, size in enumerate((8, 4)):
        share = np.bincount(codes[:, level].numpy(), minlength=size) / 200
        assert quality.usage[level] == pytest.approx((share > 0).mean())
        entropy = -sum(p * math.log(p) for p in share if p)
        assert quality.perplexity[level] == pytest.approx(math.exp(entropy))
        residual = residual - model.codebooks[level].double().numpy()[codes[:, level]]
        assert quality.residual[level] == pytest.approx((residual**2).sum() / variance, rel=1e-5)
    rows = features.numpy()
    expected = ((rows - decoded) ** 2).sum() / ((rows - rows.mean(0)) ** 2).sum()
    assert quality.reconstruction == pytest.approx(expected, rel=1e-4)


def test_dead_codes_come_back(films, tmp_path):
    """Codebooks that start with most codes out of reach: k-means is bypassed by hand."""
    model = RQVAE(RQVAEConfig(64, (), codebook_sizes=(64,)))
    start = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 50

    def far_away(latents, generator):
        model.codebooks[0].copy_(start)
        model.codebooks[0][0] = 0
        model.share_0[0] = 1.0

    model.init_codebooks = far_away
    with MetricsLog(tmp_path) as log:
        fit(model, films, FitConfig(epochs=6), log, progress=False)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[0]["usage"][0] < 0.1
    assert rows[1]["revived"] > 50
    assert rows[-1]["usage"][0] > 0.95


def test_more_codes_than_items(films, tmp_path):
    model, quality = fitted(films[:50], tmp_path, sizes=(16, 64, 128))
    assert quality.reconstruction < 0.1
    assert quality.usage[1] <= 50 / 64
    assert all(codebook.isfinite().all() for codebook in model.codebooks)
    assert [row["revived"] for row in read_metrics(tmp_path / "metrics.jsonl")][-1] <= 16


def test_one_item(tmp_path):
    model, quality = fitted(torch.ones(1, 8), tmp_path, hidden_sizes=(4,), sizes=(2, 2))
    assert math.isfinite(quality.reconstruction)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(3, 5), r"shape \(3, 5\); expected \(items, 8\)"),
        (torch.zeros(0, 8), "no item"),
        (torch.tensor([[0.0] * 8, [math.nan] * 8]), "1 items are NaN or infinite, the first in row 1"),
        (torch.full((2, 8), math.inf), "2 items are NaN or infinite"),
    ],
)
def test_features_that_cannot_be_learned(features, message, tmp_path):
    with MetricsLog(tmp_path) as log, pytest.raises(ValueError, match=message):
        fit(RQVAE(RQVAEConfig(8, (), codebook_sizes=(2,))), features, FitConfig(), log, progress=False)


@pytest.mark.parametrize("settings", [{"epochs": -1}, {"batch_size": 0}, {"learning_rate": 0.0}])
def test_fit_config_errors(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        FitConfig(**settings)
