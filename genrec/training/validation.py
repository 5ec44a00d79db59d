"""How good the model is on the events it is not trained on."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from genrec.data.chunks import Chunks
from genrec.data.sequences import join_users, last_events, take_users
from genrec.data.split import LeaveOneOut, Split, targets_of
from genrec.evaluation.metrics import rank_metrics
from genrec.generation import Recommender, RecommenderConfig
from genrec.generation.requests import token_batch
from genrec.interfaces import EventSequences
from genrec.models.ugt import UGT
from genrec.training.batches import liked_events
from genrec.training.ranks import Ranks

SELECT_BY = "ndcg@10"
SELECT_BY_LIKED = "liked_ndcg@10"  # the same over the users who liked what they took next


class Validator:
    """The validation events of `split`, by default every user's second to last, for at most `users` users drawn by
    `seed`.

    liked_from: the rating from which on that event counts as liked; an event without a rating always does. Ranks share
    the users and know all of the result; they make one together.
    """

    def __init__(
        self,
        events: Chunks,
        config: RecommenderConfig,
        users: int,
        seed: int,
        liked_from: float,
        ranks: Ranks | None = None,
        split: Split | None = None,
    ) -> None:
        self.config, self.ranks, split = config, ranks or Ranks(), split or LeaveOneOut()
        sequences = self.ranks.on_first(lambda: _draw(events, split, users, seed))  # one rank reads them
        self.histories, predicted = split.cut(sequences, "valid")
        self.targets = targets_of(sequences, predicted)
        liked = liked_events(sequences, liked_from)[predicted]
        self.liked = liked if liked.any() else np.ones_like(liked)

    def __call__(self, model: UGT) -> dict[str, float]:
        """{"recall@5": …, "ndcg@10": …, "liked_ndcg@10": …, "validity": …} of the model, which is left in evaluation
        mode. validity: the share of users for whom the likeliest codes, freely chosen level by level, are an item."""
        recommender = Recommender(model, self.config)
        mine = take_users(self.histories, self._mine())
        ranked = self._together(recommender.rank(mine, 10))
        valid = self._together(free_choices_exist(model, mine))
        metrics = rank_metrics(ranked, self.targets, ks=(5, 10))
        liked = rank_metrics(ranked[self.liked], self.targets[self.liked], ks=(5, 10))
        return metrics | {f"liked_{key}": value for key, value in liked.items()} | {"validity": float(valid.mean())}

    def best_alpha(self, model: UGT, alphas: tuple[float, ...]) -> float:
        """The weight of the item head that ranks best; the lowest where several do."""
        alphas = tuple(sorted(alphas))
        results = Recommender(model, self.config).rank_by_alpha(take_users(self.histories, self._mine()), 10, alphas)
        ranked = [self._together(ranked) for ranked, _ in results]
        quality = [rank_metrics(one, self.targets, ks=(10,))[SELECT_BY] for one in ranked]
        return alphas[int(np.argmax(quality))]

    def _mine(self) -> NDArray[np.int64]:
        """Every world-th user is this rank's."""
        return np.arange(self.ranks.rank, len(self.histories), self.ranks.world)

    def _together(self, mine: NDArray) -> NDArray:
        """Rows of all users from the rows of every rank's."""
        rows = np.empty((len(self.histories), *mine.shape[1:]), mine.dtype)
        for rank, part in enumerate(self.ranks.gather(mine)):
            rows[rank :: self.ranks.world] = part
        return rows


@torch.no_grad()
def free_choices_exist(model: UGT, histories: EventSequences, batch_size: int = 256) -> NDArray[np.bool_]:
    """(U,) whether greedy decoding without the trie ends at an item: what a model knows of the catalogue by itself."""
    model.eval()
    device = model.codes.device
    known = {tuple(codes) for codes in model.codes[1:].tolist()}
    found: list[bool] = []
    for begin in range(0, len(histories), batch_size):
        users = take_users(histories, np.arange(begin, min(begin + batch_size, len(histories))))
        tokens = token_batch(last_events(users, model.config.max_events), model.config, device).padded()
        vectors = model.item_vectors()
        encoded = model.encode(tokens, vectors)
        memory = model.memory(encoded, tokens)
        x, chosen = model.first_row(model.users(encoded, tokens), tokens)[:, None], []
        past: list[list] = [[] for _ in memory.layers]
        for level in range(model.levels):
            hidden, new = model.step(x, level, memory, past)
            for layer, key_value in zip(past, new, strict=True):
                layer.append(key_value)
            chosen.append(model.code_logits(level, hidden).argmax(-1))
            if level + 1 < model.levels:
                x = model.decoder_input(level + 1, chosen[-1])
        found += [tuple(codes) in known for codes in torch.cat(chosen, 1).tolist()]
    return np.array(found, bool)


def _draw(events: Chunks, split: Split, users: int, seed: int) -> EventSequences:
    """At most `users` of the users who have a validation event, in the order of the log."""
    counts = [len(_able(sequences, split)) for sequences in events]
    if sum(counts) == 0:
        raise ValueError(split.nobody("valid"))
    drawn = np.sort(np.random.default_rng(seed).permutation(sum(counts))[:users])
    ends = np.cumsum(counts)
    chosen = [
        take_users(sequences, _able(sequences, split)[drawn[(first <= drawn) & (drawn < end)] - first])
        for sequences, first, end in zip(events, ends - counts, ends, strict=True)
    ]
    return join_users(chosen)


def _able(sequences: EventSequences, split: Split) -> NDArray[np.int64]:
    """The users whose validation event is a known item with something before it."""
    histories, predicted = split.cut(sequences, "valid")
    return np.flatnonzero((np.diff(histories.cu_events) > 0) & (targets_of(sequences, predicted) > 0))
