"""How good the model is on the events it is not trained on."""

from __future__ import annotations

import dataclasses

import numpy as np

from genrec.data.sequences import leave_out, take_users
from genrec.evaluation.metrics import rank_metrics
from genrec.generation import Recommender, RecommenderConfig
from genrec.interfaces import EventSequences
from genrec.models.ugt import UGT

SELECT_BY = "ndcg@10"


class Validator:
    """Leave-one-out on every user's second to last event, for at most `users` users drawn by `seed`."""

    def __init__(self, sequences: EventSequences, config: RecommenderConfig, users: int, seed: int) -> None:
        histories, targets = leave_out(sequences, 2)
        able = np.flatnonzero((np.diff(histories.cu_events) > 0) & (targets > 0))
        if len(able) == 0:
            raise ValueError("no user has three events or more; expected some, to train, validate and test on")
        chosen = np.sort(np.random.default_rng(seed).permutation(able)[:users])
        self.histories, self.targets, self.config = take_users(histories, chosen), targets[chosen], config

    def __call__(self, model: UGT, alpha: float | None = None) -> dict[str, float]:
        """{"recall@5": …, "ndcg@10": …} of the model, which is left in evaluation mode."""
        config = self.config if alpha is None else dataclasses.replace(self.config, alpha=alpha)
        ranked = Recommender(model, config).rank(self.histories, 10)
        return rank_metrics(ranked, self.targets, ks=(5, 10))

    def best_alpha(self, model: UGT, alphas: tuple[float, ...]) -> float:
        """The weight of the item head that ranks best; the lowest where several do."""
        return max(sorted(alphas), key=lambda alpha: self(model, alpha)[SELECT_BY])
