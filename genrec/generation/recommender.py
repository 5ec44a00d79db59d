"""Histories in, items out: the trained model as one module, and its whole answer as one static graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from genrec.data.sequences import take_users
from genrec.generation.beam_search import Normalize, beam_search
from genrec.generation.requests import Request, padded_request
from genrec.generation.trie import Trie
from genrec.interfaces import EventSequences, SemanticIds, TokenType
from genrec.kernels.ranges import span
from genrec.models.ugt import UGT, PaddedTokens

Mode = Literal["mixed", "rerank", "beam", "items"]
LAST_ITEMS = 5  # whose successors are remembered
Ranking = tuple[NDArray[np.int64], NDArray[np.float32]]


@dataclass(frozen=True)
class RecommenderConfig:
    """How the model's two opinions become one list."""

    beams: int = 50
    """width of the beam search; top_k where that is more"""
    alpha: float = 2.0
    """weight of the item head's log-probability beside the beam's"""
    mode: Mode = "mixed"
    """mixed: both, over the whole catalogue; rerank: both, over the beam's items, at a cost that does not grow with the
    catalogue; beam: the beam search alone; items: the item head alone"""
    transition_weight: float = 1.0
    """weight of what the model remembers to have come after the user's last items, within the item head's opinion"""
    exclude_seen: bool = True
    """leave out the items of the user's own history"""
    normalize: Normalize = "children"
    """children: a code's probability is taken over the codes that lead on to an item; level: over all of its level"""
    top_k: int = 10
    """items of an answer, where the caller does not say"""

    def __post_init__(self) -> None:
        for name in ("beams", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")
        for name, values in (("mode", Mode), ("normalize", Normalize)):
            if (value := getattr(self, name)) not in get_args(values):
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(get_args(values))}")


class Opinions(NamedTuple):
    """What the beam search and the item head say of C candidates, -inf where an item must not come back."""

    items: Tensor | None  # (B, C) int64; None where candidate i is item i, the whole catalogue
    beam: Tensor  # (B, C) float32 log-probabilities
    item_head: Tensor | None  # (B, C) float32


class Recommender(nn.Module):
    """Implements genrec.interfaces.Ranker on a UGT. It is a snapshot: what follows from the weights alone is computed
    here, so make a new one after training them further."""

    item_vectors: Tensor

    def __init__(self, model: UGT, config: RecommenderConfig, batch_size: int = 128) -> None:
        super().__init__()
        self.model, self.config, self.batch_size = model.eval(), config, batch_size
        semantic_ids = SemanticIds(model.codes.cpu().numpy(), model.vocabulary.codebook_sizes)
        self.trie = Trie(semantic_ids).to(model.codes.device)
        with torch.no_grad():
            self.register_buffer("item_vectors", model.item_vectors(), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.item_vectors.device

    def forward(self, history: Tensor, *fields: Tensor) -> tuple[Tensor, Tensor]:
        """The whole answer: no host loop over data, no synchronisation, any batch and length.

        Args:
            history: (B, L) int64, item indices of the events, oldest first. 0 is padding, wherever it stands; what is
                no item of the catalogue, such as -1, is an event with an item that the model does not know.
            fields: for a model that reads more than items, what it reads of the same events, in the order of TokenType:
                actions and times (B, L), contexts (B, L, columns); int64, 0 where not known.

        Returns:
            item_ids (B, top_k) int64 and scores (B, top_k) float32, falling. Where there are fewer items, and for a
            request without events, item 0 and score -inf.
        """
        top_k = self.config.top_k
        return self.best(self.opinions(history, fields, top_k), self.config.alpha, top_k)

    def rank(self, histories: EventSequences, top_k: int) -> NDArray[np.int64]:
        """(U, top_k) item indices, best first; 0 where there are fewer. Histories without events get no items."""
        return self.rank_scored(histories, top_k)[0]

    def rank_scored(self, histories: EventSequences, top_k: int) -> Ranking:
        """As `rank`, with the scores (U, top_k) float32, falling, -inf where there is no item."""
        return self.rank_by_alpha(histories, top_k, (self.config.alpha,))[0]

    @torch.inference_mode()
    def rank_by_alpha(self, histories: EventSequences, top_k: int, alphas: Sequence[float]) -> list[Ranking]:
        """As `rank_scored`, once for every alpha; the model runs only once."""
        shape = (len(histories), top_k)
        results = [(np.zeros(shape, np.int64), np.full(shape, -np.inf, np.float32)) for _ in alphas]
        lengths = np.diff(histories.cu_events)
        users = np.argsort(lengths, kind="stable")  # sequences of like length go together
        users = users[lengths[users] > 0]
        for begin in range(0, len(users), self.batch_size):
            chosen = users[begin : begin + self.batch_size]
            with span("request", users=len(chosen), beams=self.config.beams, top_k=top_k):
                request = self.request(take_users(histories, chosen))
                opinions = self.opinions(request.history, request.fields, top_k)
                for alpha, (items, scores) in zip(alphas, results, strict=True):
                    best, score = self.best(opinions, alpha, top_k)
                    items[chosen], scores[chosen] = best.cpu().numpy(), score.cpu().numpy()
        return results

    def request(self, histories: EventSequences) -> Request:
        """The arguments of `forward` for these users."""
        return padded_request(histories, self.model.config.types, self.device)

    def opinions(self, history: Tensor, fields: Sequence[Tensor], top_k: int) -> Opinions:
        """What the model says of the candidates for a list of top_k; history and fields as in `forward`."""
        model, mode = self.model, self.config.mode
        tokens = self.tokens(history, fields)
        encoded = model.encode(tokens, self.item_vectors)
        users = model.users(encoded, tokens)
        seen = self._known(history) if self.config.exclude_seen else torch.zeros_like(history[:, :1])
        nothing = (tokens.lengths == 0)[:, None]
        if mode == "items":
            item_head = self.item_head(users, tokens)
            return Opinions(None, _hide(torch.zeros_like(item_head), seen, nothing), item_head)
        start, memory = model.first_row(users, tokens), model.memory(encoded, tokens)
        width = max(self.config.beams, top_k)
        items, beam = beam_search(model, memory, start, self.trie, width, seen, self.config.normalize)
        if mode == "mixed":
            item_head = self.item_head(users, tokens)
            return Opinions(None, _hide(_spread(items, beam, item_head.shape[1]), seen, nothing), item_head)
        beam = beam.masked_fill(nothing, -math.inf)
        if mode == "rerank":
            return Opinions(items, beam, self.item_head(users, tokens, items))
        return Opinions(items, beam, None)

    def item_head(self, users: Tensor, tokens: PaddedTokens, items: Tensor | None = None) -> Tensor:
        """Log-probabilities of these items (B, C), or of the whole catalogue (B, N + 1), float32, for user vectors
        (B, D) and their tokens: what was learned, and what is remembered of what came after the user's last items."""
        model, weight = self.model, self.config.transition_weight
        if items is None:
            logits = model.item_logits(users, self.item_vectors).float()
        else:
            logits = model.some_item_logits(users, self.item_vectors, items).float()
        if model.config.transitions and weight:
            logits = logits + weight * model.transition_logits(_last_items(tokens), items)
        return logits.log_softmax(-1)

    def best(self, opinions: Opinions, alpha: float, top_k: int) -> tuple[Tensor, Tensor]:
        """The list that opinions make → items (B, top_k) and scores (B, top_k)."""
        weight = 1.0 if self.config.mode == "items" else alpha
        total = opinions.beam if opinions.item_head is None else opinions.beam + weight * opinions.item_head
        width = min(top_k, total.shape[1])
        scores, best = total.topk(width)
        items = best if opinions.items is None else opinions.items.gather(1, best)
        items = items.masked_fill(scores.isneginf(), 0)
        if width < top_k:
            missing = (0, top_k - width)
            items, scores = nn.functional.pad(items, missing), nn.functional.pad(scores, missing, value=-math.inf)
        return items, scores

    def _known(self, history: Tensor) -> Tensor:
        """Item indices, 0 for what is no item of the catalogue."""
        return torch.where((history > 0) & (history <= self.model.vocabulary.items), history, 0)

    def tokens(self, history: Tensor, fields: Sequence[Tensor]) -> PaddedTokens:
        """The last events that the model reads, without the padding between them, as tokens."""
        config = self.model.config
        kinds, columns = [TokenType.ITEM], [self._known(history).unsqueeze(-1)]
        for kind, field in zip(config.types[1:], fields, strict=True):
            field = field.unsqueeze(-1) if field.dim() == 2 else field
            size = self.model.vocabulary.type_sizes[kind]
            columns.append(torch.where((field > 0) & (field < size), field, 0))
            kinds += [kind] * field.shape[-1]
        events = torch.cat(columns, -1)  # (B, L, tokens of an event)
        real = history != 0
        count = real.sum(1)
        place = real.cumsum(1) - 1 - (count - config.max_events).clamp(min=0)[:, None]
        width = torch.sym_min(history.shape[1], config.max_events)
        place = torch.where(real & (place >= 0), place, width)  # the last place takes what is not read
        room = events.new_zeros(events.shape[0], width + 1, events.shape[2])
        events = room.scatter(1, place[..., None].expand_as(events), events)[:, :-1]
        positions = torch.arange(events.shape[1], device=events.device)[:, None].expand(events.shape)
        types = torch.tensor(kinds, device=events.device).expand(events.shape)
        lengths = count.clamp(max=config.max_events) * len(kinds)
        return PaddedTokens(events.flatten(1), types.flatten(1), positions.flatten(1), lengths)


def _last_items(tokens: PaddedTokens) -> Tensor:
    """The items of the last events (B, LAST_ITEMS), the latest first; 0 where there are fewer."""
    events = tokens.positions.gather(1, tokens.last) + 1  # an event's first token is its item
    lengths, back = tokens.lengths[:, None], torch.arange(1, LAST_ITEMS + 1, device=events.device)
    place = lengths - lengths // events * back
    return torch.where(place >= 0, tokens.token_ids.gather(1, place.clamp(min=0)), 0)


def _hide(scores: Tensor, seen: Tensor, nothing: Tensor) -> Tensor:
    """Scores (B, N + 1) without item 0 and the items in seen (B, X); without any where nothing (B, 1)."""
    return scores.scatter(1, nn.functional.pad(seen, (1, 0)), -math.inf).masked_fill(nothing, -math.inf)


def _spread(items: Tensor, log_probs: Tensor, size: int) -> Tensor:
    """Beam results (B, W) over the whole catalogue → (B, size).

    An item outside the beam is at most as likely as the last one inside. The mixed score grants it exactly that, so the
    item head can still bring it in.
    """
    worst = log_probs.masked_fill(log_probs.isneginf(), math.inf).amin(1, keepdim=True)
    worst = worst.masked_fill(worst.isposinf(), 0.0)  # an empty beam: the item head alone decides
    return worst.expand(-1, size).scatter(1, items, torch.maximum(log_probs, worst))
