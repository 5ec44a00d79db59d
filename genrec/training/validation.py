"""How good the model is on the events it is not trained on."""

from __future__ import annotations

import numpy as np

from genrec.data.sequences import leave_out, take_users
from genrec.evaluation.metrics import rank_metrics
from genrec.generation import Recommender, RecommenderConfig
from genrec.interfaces import EventSequences
from genrec.models.ugt import UGT
from genrec.training.batches import liked_events

SELECT_BY = "ndcg@10"
SELECT_BY_LIKED = "liked_ndcg@10"  # the same over the users who liked what they took next


class Validator:
    """Leave-one-out on every user's second to last event, for at most `users` users drawn by `seed`.

    liked_from: the rating from which on that event counts as liked; an event without a rating always does.
    """

    def __init__(
        self, sequences: EventSequences, config: RecommenderConfig, users: int, seed: int, liked_from: float
    ) -> None:
        histories, targets = leave_out(sequences, 2)
        able = np.flatnonzero((np.diff(histories.cu_events) > 0) & (targets > 0))
        if len(able) == 0:
            raise ValueError("no user has three events or more; expected some, to train, validate and test on")
        chosen = np.sort(np.random.default_rng(seed).permutation(able)[:users])
        self.histories, self.targets, self.config = take_users(histories, chosen), targets[chosen], config
        liked = liked_events(sequences, liked_from)[sequences.cu_events[1:][chosen] - 2]
        self.liked = liked if liked.any() else np.ones_like(liked)

    def __call__(self, model: UGT) -> dict[str, float]:
        """{"recall@5": …, "ndcg@10": …, "liked_ndcg@10": …} of the model, which is left in evaluation mode."""
        ranked = Recommender(model, self.config).rank(self.histories, 10)
        liked = rank_metrics(ranked[self.liked], self.targets[self.liked], ks=(5, 10))
        return rank_metrics(ranked, self.targets, ks=(5, 10)) | {f"liked_{key}": value for key, value in liked.items()}

    def best_alpha(self, model: UGT, alphas: tuple[float, ...]) -> float:
        """The weight of the item head that ranks best; the lowest where several do."""
        alphas = tuple(sorted(alphas))
        results = Recommender(model, self.config).rank_by_alpha(self.histories, 10, alphas)
        quality = [rank_metrics(ranked, self.targets, ks=(10,))[SELECT_BY] for ranked, _ in results]
        return alphas[int(np.argmax(quality))]
