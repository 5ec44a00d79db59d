"""Give every item a semantic id of its own: fit an RQ-VAE to the item features, then resolve collisions.

genrec tokenize --features runs/demo/features --out runs/demo/tokenizer --codebook_sizes '[256,256,256]'
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from genrec.data.catalogue import load_catalogue
from genrec.data.files import atomic_directory
from genrec.interfaces import Catalogue
from genrec.models.rqvae import RQVAEConfig
from genrec.training.rqvae import FitConfig
from genrec.training.tokenizer import extend_tokenizer, learn_tokenizer


@dataclass(frozen=True)
class Config:
    features: Path
    """Directory that `genrec features` wrote."""
    out: Path
    """Directory to write: rqvae.safetensors, tokenizer.json, semantic_ids.parquet, index.json, and metrics.jsonl where
    codebooks are learned."""
    add_to: Path | None = None
    """A tokenizer directory: reuse its weights and ids and only give ids to the items it lacks. The keys below, up to
    `overwrite`, then have no effect."""
    codebook_sizes: list[int] = field(default_factory=lambda: [1024, 4096, 16384])
    """Codes per level; [256, 256, 256] suits catalogues of 5,000 to 100,000 items."""
    hidden_sizes: list[int] = field(default_factory=lambda: [512, 256])
    """Hidden layers of the encoder; [] makes the model residual k-means, better on small catalogues."""
    latent_dim: int = 64
    """Width of the codebooks, where there are hidden layers."""
    decay: float = 0.98
    """How much of a codebook's moving average a step keeps; it should reach back over thousands of items."""
    commitment: float = 0.25
    """Weight of the commitment loss."""
    epochs: int = 20
    """Passes over the items with codebooks, after k-means."""
    warmup_epochs: int = 20
    """Passes of the plain autoencoder before k-means."""
    batch_size: int = 256
    """Items a step."""
    learning_rate: float = 1e-3
    """Of encoder and decoder."""
    seed: int = 0
    """The same seed and input give the same ids."""
    overwrite: bool = False
    """Replace `out` if it holds something."""


def run(config: Config) -> None:
    """Write `config.out` and print what is in it."""
    catalogue = load_catalogue(config.features)
    # A tokenizer may be extended in place: it is read before it is replaced.
    in_place = config.add_to is not None and config.add_to.resolve() == config.out.resolve()
    inputs = [config.features] if config.add_to is None or in_place else [config.features, config.add_to]
    with atomic_directory(config.out, config.overwrite, inputs) as directory:
        if config.add_to is not None:
            summary = extend_tokenizer(catalogue, config.add_to, directory)
        else:
            _warn_of_large_codebooks(config.codebook_sizes, catalogue.size)
            model_config, fit_config = _configs(config, catalogue)
            summary = learn_tokenizer(catalogue, model_config, fit_config, directory)
    Console().print(_table(config.out, summary))


def _configs(config: Config, catalogue: Catalogue) -> tuple[RQVAEConfig, FitConfig]:
    model = RQVAEConfig(
        input_dim=catalogue.features.shape[1],
        hidden_sizes=tuple(config.hidden_sizes),
        latent_dim=config.latent_dim,
        codebook_sizes=tuple(config.codebook_sizes),
        decay=config.decay,
        commitment=config.commitment,
    )
    fit = FitConfig(config.epochs, config.warmup_epochs, config.batch_size, config.learning_rate, config.seed)
    return model, fit


def _warn_of_large_codebooks(sizes: list[int], items: int) -> None:
    if max(sizes, default=0) > items // 2:
        print(
            f"tokenize: codebooks of {sizes} codes are larger than {items:,} items can fill, so usage will be low and "
            "codes will rarely be shared; [256, 256, 256] suits such a catalogue",
            file=sys.stderr,
        )


def _table(out: Path, summary: dict[str, Any]) -> Table:
    table = Table(title=str(out), caption=_caption(summary), caption_justify="left")
    for column in ("level", "codes", "used", "perplexity", "error left"):
        table.add_column(column, justify="right")
    quality = summary["quality"]
    columns = (summary["codebook_sizes"], quality["usage"], quality["perplexity"], quality["residual"])
    for level, (size, usage, perplexity, residual) in enumerate(zip(*columns, strict=True), start=1):
        table.add_row(str(level), f"{size:,}", f"{usage:.1%}", f"{perplexity:,.0f}", f"{residual:.4f}")
    return table


def _caption(summary: dict[str, Any]) -> str:
    added = summary.get("added")
    report = added or summary["collisions"]
    lines = [f"{added['items']:,} items added, {summary['items']:,} now have ids"] if added else []
    lines.append(f"items sharing an id: {report['colliding']:,} before, 0 after")
    lines.append(f"moved: {report['moved']:,}, of these to another prefix: {report['spilled']:,}")
    lines.append(
        f"mean squared error of the latents: {report['error_before']:.4f} before, {report['error_after']:.4f} after"
    )
    return "\n".join(lines)
