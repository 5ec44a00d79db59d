"""RQ-VAE: an autoencoder whose bottleneck is a sum of codebook vectors, one code a level.

Residual quantisation after Lee et al. (2022, arXiv:2203.01941), as item tokenizer after TIGER (Rajput et al. 2023,
arXiv:2305.05065). Codebooks start from k-means, follow the encoder by exponential moving averages (van den Oord et al.
2017, arXiv:1711.00937, appendix A.1) and never keep a dead code for long. Without hidden layers encoder and decoder are
the identity, and the model is residual k-means.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from genrec.kernels import rq_nearest


@dataclass(frozen=True)
class RQVAEConfig:
    """The shape of an RQ-VAE and how its codebooks learn."""

    input_dim: int = 256
    """Width of the item features."""
    hidden_sizes: tuple[int, ...] = (512, 256)
    """Hidden layers of the encoder, mirrored in the decoder; none at all makes both the identity."""
    latent_dim: int = 64
    """Width of the latents and codebooks; `input_dim` where there are no hidden layers."""
    codebook_sizes: tuple[int, ...] = (1024, 4096, 16384)
    """Codes per level."""
    decay: float = 0.98
    """How much of a codebook's moving average a step keeps; it should reach back over thousands of rows."""
    smoothing: float = 1e-5
    """Laplace smoothing of the share of rows a code holds, relative to a uniform share."""
    commitment: float = 0.25
    """Weight of the commitment loss, which keeps the encoder close to the codes it chose."""

    def __post_init__(self) -> None:
        for name, values in (("codebook_sizes", self.codebook_sizes), ("hidden_sizes", self.hidden_sizes)):
            if any(value < 1 for value in values):
                raise ValueError(f"{name} must hold positive numbers, got {list(values)}")
        if not self.codebook_sizes:
            raise ValueError("codebook_sizes is empty; expected at least one level, such as [256, 256, 256]")
        if len(self.codebook_sizes) > 26:
            raise ValueError(f"codebook_sizes has {len(self.codebook_sizes)} levels; expected at most 26, one a letter")
        if self.input_dim < 1 or self.latent_dim < 1:
            raise ValueError(f"input_dim and latent_dim must be positive, got {self.input_dim} and {self.latent_dim}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")
        if self.smoothing < 0 or self.commitment < 0:
            raise ValueError(f"smoothing and commitment must be ≥ 0, got {self.smoothing} and {self.commitment}")

    @property
    def code_dim(self) -> int:
        return self.latent_dim if self.hidden_sizes else self.input_dim

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RQVAEConfig:
        lists_as_tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**lists_as_tuples)


class RQVAEOutput(NamedTuple):
    """What one training step needs; the losses are scalars."""

    loss: Tensor
    reconstruction_loss: Tensor
    commitment_loss: Tensor
    latents: Tensor  # (N, code_dim)
    codes: Tensor  # (N, levels) int64


class RQVAE(nn.Module):
    """Item features (N, input_dim) → latents (N, code_dim) → codes (N, levels) → features again.

    Features are centred and scaled to unit variance over all dimensions together, so that neither learning rates nor
    errors depend on their unit: an error of 1.0 is that of answering with the mean item.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, config: RQVAEConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.input_dim, *config.hidden_sizes, config.code_dim] if config.hidden_sizes else []
        self.encoder = _mlp(widths)
        self.decoder = _mlp(widths[::-1])
        self.register_buffer("mean", torch.zeros(config.input_dim))
        self.register_buffer("scale", torch.ones(()))
        for level, size in enumerate(config.codebook_sizes):
            self.register_buffer(f"codebook_{level}", torch.zeros(size, config.code_dim))
            self.register_buffer(f"share_{level}", torch.zeros(size))  # moving average of the share of rows per code
            self.register_buffer(
                f"sum_{level}", torch.zeros(size, config.code_dim)
            )  # of their sum, per row of the batch

    @property
    def codebooks(self) -> list[Tensor]:
        """One (size, code_dim) tensor a level."""
        return [self.get_buffer(f"codebook_{level}") for level in range(len(self.config.codebook_sizes))]

    def encode(self, features: Tensor) -> Tensor:
        return self.encoder((features - self.mean) / self.scale)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents) * self.scale + self.mean

    @torch.no_grad()
    def nearest_codes(self, latents: Tensor) -> Tensor:
        """(N, code_dim) → (N, levels) int64; latents that are alike share codes until `resolve_collisions`."""
        return rq_nearest(latents, self.codebooks)[0]

    def forward(self, features: Tensor) -> RQVAEOutput:
        """The losses of a batch, per element of the normalised features and of the latents."""
        target = (features - self.mean) / self.scale
        latents = self.encoder(target)
        codes, quantized = rq_nearest(latents, self.codebooks)
        reconstruction = self.decoder(latents + (quantized - latents).detach())  # straight-through estimator
        reconstruction_loss = F.mse_loss(reconstruction, target)
        commitment_loss = F.mse_loss(latents, quantized.detach())
        loss = reconstruction_loss + self.config.commitment * commitment_loss
        return RQVAEOutput(loss, reconstruction_loss, commitment_loss, latents.detach(), codes)

    def reconstruct(self, features: Tensor) -> Tensor:
        """The autoencoder without its bottleneck, for warming up before there are codebooks: normalised features."""
        return self.decoder(self.encoder((features - self.mean) / self.scale))

    @torch.no_grad()
    def set_normalisation(self, features: Tensor) -> None:
        """Take mean and scale from the features to be learned, (N, input_dim)."""
        self.mean.copy_(features.mean(0))
        variance = (features - self.mean).square().mean()
        self.scale.copy_(variance.sqrt() if variance > 0 else torch.ones(()))

    @torch.no_grad()
    def init_codebooks(self, latents: Tensor, generator: torch.Generator) -> None:
        """k-means, level by level, each on what the levels before left over of the latents (N, code_dim)."""
        residual = latents
        for level, size in enumerate(self.config.codebook_sizes):
            codebook = kmeans(residual, size, generator)
            codes, quantized = rq_nearest(residual, [codebook])
            share, total = _statistics(residual, codes[:, 0], size)
            self._buffer("codebook", level).copy_(codebook)
            self._buffer("share", level).copy_(share)
            self._buffer("sum", level).copy_(total)
            residual = residual - quantized

    @torch.no_grad()
    def update_codebooks(self, latents: Tensor, codes: Tensor) -> None:
        """One EMA step towards the mean residual of the rows that chose each code.

        Only codes the batch used move: for the others the average keeps its direction, and smoothing would pull
        codes that wait for their first item to zero.
        """
        residual = latents
        for level, size in enumerate(self.config.codebook_sizes):
            level_codes, codebook = codes[:, level], self._buffer("codebook", level)
            used = level_codes.unique()
            chosen = codebook[level_codes]
            share, total = self._buffer("share", level), self._buffer("sum", level)
            batch_share, batch_total = _statistics(residual, level_codes, size)
            share.lerp_(batch_share, 1 - self.config.decay)
            total.lerp_(batch_total, 1 - self.config.decay)
            smoothed = (share[used] + self.config.smoothing / size) / (1 + self.config.smoothing)
            codebook[used] = total[used] / smoothed[:, None]
            residual = residual - chosen

    @torch.no_grad()
    def revive(self, latents: Tensor, codes: Tensor) -> int:
        """Move codes that none of the N rows uses onto the residuals of the worst quantised rows; returns how many.

        Each dead code takes a row of its own. A level with at least as many codes as rows is left alone: most of its
        codes must stay unused, and moving them would only cost new items their room.
        """
        residual, revived = latents, 0
        for level, size in enumerate(self.config.codebook_sizes):
            codebook = self._buffer("codebook", level)
            left_over = residual - codebook[codes[:, level]]
            if size < len(latents):
                error = left_over.square().sum(1)
                dead = (torch.bincount(codes[:, level], minlength=size) == 0).nonzero()[:, 0]
                worst = error.argsort(descending=True, stable=True)[: len(dead)]
                worst = worst[error[worst] > 0]  # a row that is met exactly needs no code
                dead = dead[: len(worst)]
                codebook[dead] = residual[worst]
                self._buffer("share", level)[dead] = 1 / len(latents)
                self._buffer("sum", level)[dead] = residual[worst] / len(latents)
                revived += len(dead)
            residual = left_over
        return revived

    def _buffer(self, name: str, level: int) -> Tensor:
        return self.get_buffer(f"{name}_{level}")


def save_rqvae(path: Path, model: RQVAE) -> None:
    """Weights, codebooks and their moving averages as safetensors; the same model gives the same bytes."""
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)


def load_rqvae(path: Path, config: RQVAEConfig) -> RQVAE:
    """Raises FileNotFoundError if there is no such file, ValueError if it does not hold a model of this `config`."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected the output of genrec tokenize")
    model = RQVAE(config)
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError):
        raise ValueError(f"{path} does not hold the weights that tokenizer.json beside it describes") from None
    return model


def kmeans(rows: Tensor, size: int, generator: torch.Generator, iterations: int = 25) -> Tensor:
    """Centres (size, D) of rows (N, D): Lloyd's algorithm from distance-weighted seeds, empty clusters re-seeded.

    With at least as many centres as rows, every row is a centre and the others lie scattered around the rows, where new
    rows may be expected.
    """
    if size >= len(rows):
        return _scatter(rows, size, generator)
    centres = _seed(rows, size, generator)
    for _ in range(iterations):
        codes, nearest = rq_nearest(rows, [centres])
        share, total = _statistics(rows, codes[:, 0], size)
        used = share > 0
        centres[used] = total[used] / share[used, None]
        worst = (rows - nearest).square().sum(1).argsort(descending=True, stable=True)
        centres[~used] = rows[worst[: int((~used).sum())]]
    return centres


def _seed(rows: Tensor, size: int, generator: torch.Generator, rounds: int = 128) -> Tensor:
    """k-means++ (Arthur & Vassilvitskii 2007), size / rounds rows at a time so that large codebooks stay cheap."""
    first = int(torch.randint(len(rows), (1,), generator=generator))
    chosen = [torch.tensor([first])]
    distance = (rows - rows[first]).square().sum(1)
    left = size - 1
    while left:
        draw = min(left, max(1, size // rounds), int((distance > 0).sum()))
        if draw == 0:  # fewer distinct rows than centres: any rows will do for the rest
            chosen.append(torch.randint(len(rows), (left,), generator=generator))
            break
        picked = torch.multinomial(distance, draw, generator=generator)
        distance[picked] = 0
        _, nearest = rq_nearest(rows, [rows[picked]])
        distance = torch.minimum(distance, (rows - nearest).square().sum(1))
        chosen.append(picked)
        left -= draw
    return rows[torch.cat(chosen)]


def _scatter(rows: Tensor, size: int, generator: torch.Generator) -> Tensor:
    extra = torch.randint(len(rows), (size - len(rows),), generator=generator)
    noise = torch.randn(len(extra), rows.shape[1], generator=generator, dtype=rows.dtype)
    return torch.cat([rows, rows[extra] + noise * 0.1 * rows.std(0, correction=0)])


def _statistics(rows: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Per code the share (size,) of the rows that chose it, and their sum (size, D) divided by the number of rows."""
    share = torch.bincount(codes, minlength=size).to(rows) / len(rows)
    total = torch.zeros(size, rows.shape[1], dtype=rows.dtype, device=rows.device).index_add_(0, codes, rows)
    return share, total / len(rows)


def _mlp(widths: list[int]) -> nn.Module:
    """Linear layers with ReLU between them; no widths, no change."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
