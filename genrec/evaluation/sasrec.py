"""SASRec, the neural baseline: softmax attention over item embeddings, trained with full cross-entropy.

Kang and McAuley 2018, "Self-Attentive Sequential Recommendation", with the loss over the whole catalogue in place of
one sampled negative: trained so, it is as good as what came after it (Klenitskiy and Vasilev 2023, "Turning Dross Into
Gold Loss"). Plain PyTorch and no part of the product's model; it knows items only, no ids and no features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from genrec.data.sequences import ragged_ranges
from genrec.evaluation.baselines import Transition
from genrec.interfaces import OOV, EventSequences
from genrec.models.ugt.losses import linear_cross_entropy
from genrec.models.ugt.model import TRANSITION_SCALE

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class SASRecConfig:
    """Size, regularisation and length of training."""

    d_model: int = 128
    """width of item vectors and states"""
    heads: int = 2
    """attention heads"""
    layers: int = 2
    """causal layers"""
    dropout: float = 0.5
    """share of activations dropped in training"""
    max_events: int = 50
    """last events that are read"""
    epochs: int = 30
    """passes over the users"""
    batch_size: int = 128
    """users per step"""
    lr: float = 1e-3
    """learning rate at the start; it falls to zero along a cosine"""
    weight_decay: float = 0.0
    """decoupled weight decay"""
    seed: int = 0
    """seed of weights, batches and dropout"""


class SASRec(nn.Module):
    """Implements genrec.interfaces.Ranker. Input and output share one table of item embeddings."""

    no_bias: Tensor
    memory: Transition | None = None
    """adds log(1 + 10 · score) to the logits it ranks by, as a UGT does with what it remembers of the log"""

    def __init__(self, catalogue_size: int, config: SASRecConfig) -> None:
        super().__init__()
        self.config = config
        width = config.d_model
        self.items = nn.Embedding(catalogue_size + 1, width, padding_idx=OOV)
        self.positions = nn.Embedding(config.max_events, width)
        for table in (self.items, self.positions):
            nn.init.normal_(table.weight, std=width**-0.5)
        layer = nn.TransformerEncoderLayer(
            width, config.heads, 4 * width, config.dropout, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, config.layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("no_bias", torch.zeros(catalogue_size + 1), persistent=False)

    @classmethod
    def fit(cls, sequences: EventSequences, catalogue_size: int, config: SASRecConfig | None = None) -> SASRec:
        """Train on every next item of `sequences`, from each user's last events."""
        config = config or SASRecConfig()
        torch.manual_seed(config.seed)
        model = cls(catalogue_size, config)
        rows = _last_items(sequences, config.max_events + 1)
        rows = rows[(rows != OOV).sum(1) > 1]
        optimizer = torch.optim.AdamW(model.parameters(), config.lr, (0.9, 0.98), weight_decay=config.weight_decay)
        steps = config.epochs * -(-len(rows) // config.batch_size)
        with tqdm(total=steps, desc="sasrec", unit="step") as bar:
            for step, batch in enumerate(_batches(rows, config)):
                optimizer.param_groups[0]["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
                loss = model.train().loss(batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                bar.update()
        return model.eval()

    def forward(self, items: Tensor) -> Tensor:
        """Items (B, L), padded at the end with 0 → states (B, L, D); a state has seen its own past and nothing else."""
        length = items.shape[1]
        x = self.items(items) * self.config.d_model**0.5 + self.positions.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.layers(self.dropout(x), mask, is_causal=True)

    def loss(self, items: Tensor) -> Tensor:
        """Cross-entropy over all items of every event of (B, L) but the first, each from those before it."""
        target = items[:, 1:]
        known = target != OOV
        return linear_cross_entropy(self(items[:, :-1])[known], self.items.weight, self.no_bias, target[known])

    @torch.no_grad()
    def rank(self, histories: EventSequences, top_k: int) -> IntArray:
        """(U, top_k) item indices, best first, without the items of the user's own history; 0 where there are fewer."""
        ranked = np.zeros((len(histories), top_k), np.int64)
        seen = _last_items(histories, len(histories.item_ids))
        read = _last_items(histories, self.config.max_events)
        last = torch.from_numpy((read != OOV).sum(1) - 1)
        remembered = None if self.memory is None else self.memory.scores(histories)
        for users in torch.from_numpy(np.flatnonzero(read[:, 0])).split(256):
            states = self.eval()(torch.from_numpy(read)[users])[torch.arange(len(users)), last[users]]
            scores = F.linear(states, self.items.weight)
            if remembered is not None:
                scores += torch.from_numpy(np.log1p(TRANSITION_SCALE * remembered[users.numpy()].toarray())).float()
            scores.scatter_(1, F.pad(torch.from_numpy(seen)[users], (1, 0)), -torch.inf)  # and item 0
            best, items = scores.topk(min(top_k, scores.shape[1]))
            ranked[users, : items.shape[1]] = items.masked_fill(best.isneginf(), OOV).numpy()
        return ranked


def _last_items(sequences: EventSequences, count: int) -> IntArray:
    """(U, ≤ count) the last known items of every user, oldest first, padded at the end with 0."""
    users = np.repeat(np.arange(len(sequences)), np.diff(sequences.cu_events))
    known = sequences.item_ids != OOV
    cu_known = np.concatenate([[0], np.cumsum(np.bincount(users[known], minlength=len(sequences)))])
    lengths = np.minimum(np.diff(cu_known), count)
    events, _ = ragged_ranges(cu_known[1:] - lengths, lengths)
    rows = np.zeros((len(sequences), lengths.max(initial=1)), np.int64)
    rows[np.arange(rows.shape[1]) < lengths[:, None]] = sequences.item_ids[known][events]
    return rows


def _batches(rows: IntArray, config: SASRecConfig) -> Iterator[Tensor]:
    """All epochs: users of like length together, batches in random order, cut to their longest row."""
    rng = np.random.default_rng(config.seed)
    lengths = (rows != OOV).sum(1)
    for _ in range(config.epochs):
        by_length = np.argsort(lengths + 2 * rng.random(len(rows)), kind="stable")
        batches = np.split(by_length, range(config.batch_size, len(rows), config.batch_size))
        for batch in rng.permutation(len(batches)):
            chosen = batches[batch]
            yield torch.from_numpy(rows[chosen, : lengths[chosen].max()])
