"""Histories in, items out: the trained model as one object."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genrec.data.sequences import last_events, take_users
from genrec.generation.beam_search import beam_search
from genrec.generation.requests import token_batch
from genrec.generation.trie import Trie
from genrec.interfaces import EventSequences, SemanticIds
from genrec.models.ugt import UGT

Mode = Literal["mixed", "beam", "items"]


@dataclass(frozen=True)
class RecommenderConfig:
    """How the model's two opinions become one list."""

    beams: int = 50
    """width of the beam search"""
    alpha: float = 2.0
    """weight of the item head's log-probability beside the beam's"""
    mode: Mode = "mixed"
    """mixed: both; beam: the beam search alone; items: the item head alone"""
    exclude_seen: bool = True
    """leave out the items of the user's own history"""


class Recommender:
    """Implements genrec.interfaces.Ranker on a UGT."""

    def __init__(self, model: UGT, config: RecommenderConfig, batch_size: int = 128) -> None:
        self.model, self.config, self.batch_size = model.eval(), config, batch_size
        self.device = model.codes.device
        semantic_ids = SemanticIds(model.codes.cpu().numpy(), model.vocabulary.codebook_sizes)
        self.trie = Trie(semantic_ids, self.device)

    def rank(self, histories: EventSequences, top_k: int) -> NDArray[np.int64]:
        """(U, top_k) item indices, best first; 0 where there are fewer. Histories without events get no items."""
        return self.rank_scored(histories, top_k)[0]

    def rank_scored(self, histories: EventSequences, top_k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """As `rank`, with the scores (U, top_k) float32, falling, -inf where there is no item."""
        items = np.zeros((len(histories), top_k), np.int64)
        scores = np.full((len(histories), top_k), -np.inf, np.float32)
        lengths = np.diff(histories.cu_events)
        users = np.argsort(lengths, kind="stable")  # sequences of like length go together
        users = users[lengths[users] > 0]
        for begin in range(0, len(users), self.batch_size):
            chosen = users[begin : begin + self.batch_size]
            best, score = self._rank_batch(take_users(histories, chosen), top_k)
            items[chosen, : best.shape[1]] = best.cpu().numpy()
            scores[chosen, : best.shape[1]] = score.cpu().numpy()
        return items, scores

    @torch.inference_mode()
    def _rank_batch(self, histories: EventSequences, top_k: int) -> tuple[Tensor, Tensor]:
        model, config = self.model, self.config
        tokens = token_batch(last_events(histories, model.config.max_events), model.config, self.device)
        vectors = model.item_vectors()
        encoded = model.encode(tokens, vectors)
        last_tokens = tokens.cu_seqlens[1:].long() - 1
        users = encoded[last_tokens]
        forbidden = self._forbidden(histories)
        item_log_probs = model.item_logits(users, vectors).float().log_softmax(-1)
        if config.mode == "items":
            total = item_log_probs
        else:
            start = model.decoder_start(users, tokens.positions[last_tokens] + 1)
            items, log_probs = beam_search(
                model, model.memory(encoded, tokens), start, self.trie, max(config.beams, top_k), forbidden
            )
            total = _spread(items, log_probs, item_log_probs, config)
        total = total.masked_fill(forbidden, -math.inf)
        scores, best = total.topk(min(top_k, total.shape[1]))
        return best.masked_fill(scores.isneginf(), 0), scores

    def _forbidden(self, histories: EventSequences) -> Tensor:
        """(B, N + 1) bool: the out-of-vocabulary item, and what the user has had in the whole history given."""
        forbidden = torch.zeros(len(histories), len(self.model.codes), dtype=torch.bool, device=self.device)
        forbidden[:, 0] = True
        if self.config.exclude_seen:
            rows = np.repeat(np.arange(len(histories)), np.diff(histories.cu_events))
            forbidden[torch.from_numpy(rows), torch.from_numpy(histories.item_ids.astype(np.int64))] = True
        return forbidden


def _spread(items: Tensor, log_probs: Tensor, item_log_probs: Tensor, config: RecommenderConfig) -> Tensor:
    """Beam results (B, W) over the whole catalogue → scores (B, N + 1).

    An item outside the beam is at most as likely as the last one inside. The mixed score grants it exactly that, so the
    item head can still bring it in; beam alone leaves it out.
    """
    if config.mode == "beam":
        return torch.full_like(item_log_probs, -math.inf).scatter(1, items, log_probs)
    worst = log_probs.masked_fill(log_probs.isneginf(), math.inf).amin(1, keepdim=True)
    worst = worst.masked_fill(worst.isposinf(), 0.0)  # an empty beam: the item head alone decides
    spread = worst.expand_as(item_log_probs).scatter(1, items, torch.maximum(log_probs, worst))
    return spread + config.alpha * item_log_probs
