"""Histories in, items out: the trained model as one object."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from genrec.kernels.ranges import span
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
        return self.rank_by_alpha(histories, top_k, (self.config.alpha,))[0]

    def rank_by_alpha(
        self, histories: EventSequences, top_k: int, alphas: Sequence[float]
    ) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """As `rank_scored`, once for every alpha; the model runs only once."""
        shape = (len(histories), top_k)
        results = [(np.zeros(shape, np.int64), np.full(shape, -np.inf, np.float32)) for _ in alphas]
        lengths = np.diff(histories.cu_events)
        users = np.argsort(lengths, kind="stable")  # sequences of like length go together
        users = users[lengths[users] > 0]
        for begin in range(0, len(users), self.batch_size):
            chosen = users[begin : begin + self.batch_size]
            with span("request", users=len(chosen), beams=self.config.beams, top_k=top_k):
                beam, item_head = self._opinions(take_users(histories, chosen), top_k)
            for alpha, (items, scores) in zip(alphas, results, strict=True):
                score, best = (beam + self._item_weight(alpha) * item_head).topk(min(top_k, beam.shape[1]))
                items[chosen, : best.shape[1]] = best.masked_fill(score.isneginf(), 0).cpu().numpy()
                scores[chosen, : best.shape[1]] = score.cpu().numpy()
        return results

    def _item_weight(self, alpha: float) -> float:
        return {"mixed": alpha, "beam": 0.0, "items": 1.0}[self.config.mode]

    @torch.inference_mode()
    def _opinions(self, histories: EventSequences, top_k: int) -> tuple[Tensor, Tensor]:
        """What the beam search and what the item head say of every item, each (B, N + 1) log-probabilities; the beam's
        are -inf for what must not be recommended."""
        model = self.model
        tokens = token_batch(last_events(histories, model.config.max_events), model.config, self.device)
        vectors = model.item_vectors()
        encoded = model.encode(tokens, vectors)
        last_tokens = tokens.cu_seqlens[1:].long() - 1
        users = encoded[last_tokens]
        forbidden = self._forbidden(histories)
        item_head = model.item_logits(users, vectors).float().log_softmax(-1)
        if self.config.mode == "items":
            beam = torch.zeros_like(item_head)
        else:
            start = model.decoder_start(users, tokens.positions[last_tokens] + 1)
            width = max(self.config.beams, top_k)
            items, log_probs = beam_search(model, model.memory(encoded, tokens), start, self.trie, width, forbidden)
            beam = _spread(items, log_probs, item_head.shape[1], self.config.mode)
        return beam.masked_fill(forbidden, -math.inf), item_head

    def _forbidden(self, histories: EventSequences) -> Tensor:
        """(B, N + 1) bool: the out-of-vocabulary item, and what the user has had in the whole history given."""
        forbidden = torch.zeros(len(histories), len(self.model.codes), dtype=torch.bool, device=self.device)
        forbidden[:, 0] = True
        if self.config.exclude_seen:
            rows = np.repeat(np.arange(len(histories)), np.diff(histories.cu_events))
            forbidden[torch.from_numpy(rows), torch.from_numpy(histories.item_ids.astype(np.int64))] = True
        return forbidden


def _spread(items: Tensor, log_probs: Tensor, size: int, mode: Mode) -> Tensor:
    """Beam results (B, W) over the whole catalogue → (B, size).

    An item outside the beam is at most as likely as the last one inside. The mixed score grants it exactly that, so the
    item head can still bring it in; beam alone leaves it out.
    """
    if mode == "beam":
        return log_probs.new_full((len(items), size), -math.inf).scatter(1, items, log_probs)
    worst = log_probs.masked_fill(log_probs.isneginf(), math.inf).amin(1, keepdim=True)
    worst = worst.masked_fill(worst.isposinf(), 0.0)  # an empty beam: the item head alone decides
    return worst.expand(-1, size).scatter(1, items, torch.maximum(log_probs, worst))
