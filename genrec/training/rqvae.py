"""Fitting an RQ-VAE: warm-up of the autoencoder, k-means codebooks, then both together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from genrec.models.rqvae import RQVAE
from genrec.training.log import MetricsLog


@dataclass(frozen=True)
class FitConfig:
    """How long and how fast an RQ-VAE learns."""

    epochs: int = 20
    warmup_epochs: int = 20
    batch_size: int = 256
    learning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.warmup_epochs < 0:
            raise ValueError(f"epochs and warmup_epochs must be ≥ 0, got {self.epochs} and {self.warmup_epochs}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {self.batch_size}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")


class Quality(NamedTuple):
    """How well codebooks serve a set of rows; one number per level, then one for the decoded features."""

    usage: list[float]  # share of a level's codes that some row uses
    perplexity: list[float]  # exp(entropy) of the codes: how many equally used codes this would be
    residual: list[float]  # squared norm left after the level, as a share of the latents' variance
    reconstruction: float  # squared error of the decoded features, as a share of the features' variance


def fit(model: RQVAE, features: Tensor, config: FitConfig, log: MetricsLog, progress: bool = True) -> Quality:
    """Fit `model` in place to features (N, input_dim) float32; logs one line an epoch under stage "tokenize".

    The same model, features, config and thread count give the same weights. Raises ValueError on features that are
    empty, not finite or of another width.
    """
    check_features(features, model.config.input_dim)
    generator = torch.Generator().manual_seed(config.seed)
    model.set_normalisation(features)
    _warm_up(model, features, config, generator, progress)
    with torch.no_grad():
        model.init_codebooks(model.encode(features), generator)
    latents, codes = _assign(model, features)
    quality = measure(model, features, latents, codes)
    log.write("tokenize", 0, **quality._asdict(), revived=0)

    optimizer = _optimizer(model, config)
    with tqdm(range(1, config.epochs + 1), desc="tokenize", unit="epoch", disable=not progress) as epochs:
        for epoch in epochs:
            revived = model.revive(latents, codes)  # the codes that no item used at the end of the epoch before
            _cool(optimizer, config.learning_rate, (epoch - 1) / config.epochs)
            for rows in torch.randperm(len(features), generator=generator).split(config.batch_size):
                _step(model, optimizer, features[rows])
            latents, codes = _assign(model, features)
            quality = measure(model, features, latents, codes)
            log.write("tokenize", epoch, **quality._asdict(), revived=revived)
            epochs.set_postfix(error=f"{quality.reconstruction:.4f}", usage=f"{min(quality.usage):.0%}")
    return quality


@torch.no_grad()
def measure(model: RQVAE, features: Tensor, latents: Tensor, codes: Tensor) -> Quality:
    """How well codes (N, levels) stand for latents (N, code_dim) and their features (N, input_dim)."""
    variance = (latents - latents.mean(0)).square().sum().clamp_min(1e-30)
    usage, perplexity, residuals = [], [], []
    residual = latents
    for level, codebook in enumerate(model.codebooks):
        share = torch.bincount(codes[:, level], minlength=len(codebook)).double() / len(codes)
        usage.append((share > 0).double().mean().item())
        perplexity.append(math.exp(-torch.special.xlogy(share, share).sum().item()))
        residual = residual - codebook[codes[:, level]]
        residuals.append((residual.square().sum() / variance).item())
    error = (model.decode(latents - residual) - features).square().mean() / model.scale.square()
    return Quality(usage, perplexity, residuals, error.item())


def check_features(features: Tensor, width: int) -> None:
    """Refuse what no tokenizer can learn from, in one sentence."""
    if features.ndim != 2 or features.shape[1] != width:
        raise ValueError(f"features have shape {tuple(features.shape)}; expected (items, {width})")
    if len(features) == 0:
        raise ValueError("features hold no item; expected at least one")
    bad = (~features.isfinite()).any(1).nonzero()[:, 0]
    if len(bad):
        raise ValueError(f"features of {len(bad)} items are NaN or infinite, the first in row {int(bad[0])}")


def _step(model: RQVAE, optimizer: torch.optim.Optimizer | None, features: Tensor) -> None:
    """One batch: encoder and decoder by gradient, then the codebooks by moving average."""
    output = model(features)
    if optimizer is not None:
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    model.update_codebooks(output.latents, output.codes)


def _cool(optimizer: torch.optim.Optimizer | None, learning_rate: float, progress: float) -> None:
    """Cosine from the learning rate to 0: codebooks can only settle when the encoder does."""
    for group in optimizer.param_groups if optimizer else []:
        group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def _warm_up(model: RQVAE, features: Tensor, config: FitConfig, generator: torch.Generator, progress: bool) -> None:
    """Train the plain autoencoder first: k-means on the latents of a random encoder starts in the wrong place."""
    optimizer = _optimizer(model, config)
    if optimizer is None:
        return
    for _ in tqdm(range(config.warmup_epochs), desc="warm-up", unit="epoch", disable=not progress):
        for rows in torch.randperm(len(features), generator=generator).split(config.batch_size):
            target = (features[rows] - model.mean) / model.scale
            loss = F.mse_loss(model.reconstruct(features[rows]), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def _optimizer(model: RQVAE, config: FitConfig) -> torch.optim.Optimizer | None:
    """AdamW over encoder and decoder; None for the identity, which has nothing to learn by gradients."""
    parameters = list(model.parameters())
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=1e-4) if parameters else None


@torch.no_grad()
def _assign(model: RQVAE, features: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and nearest codes of all features under the model as it is now."""
    latents = model.encode(features)
    return latents, model.nearest_codes(latents)
