"""The model beside its baselines: same users, histories and targets, each baseline fitted on the model's events."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genrec.data.sequences import take_users
from genrec.data.split import LeaveOneOut, Split, targets_of
from genrec.evaluation.baselines import Popularity, Transition
from genrec.evaluation.metrics import Evaluation, Interval, evaluate, paired_bootstrap
from genrec.generation import Recommender, RecommenderConfig
from genrec.interfaces import EventSequences, Ranker
from genrec.models.ugt import UGT

MODEL = "ugt"
BASELINES = ("popularity", "transition")


@dataclass(frozen=True)
class Comparison:
    """What every ranker did for the same U users; the first is the model as it is meant to be used."""

    histories: EventSequences
    targets: NDArray[np.int32]  # (U,) item index, 0 = out of vocabulary
    liked: NDArray[np.bool_]  # (U,) whether the user rated the target liked_from or better
    evaluations: dict[str, Evaluation]

    def metrics(self) -> dict[str, dict[str, float]]:
        """Ranker → {"recall@5": …, "ndcg@5": …, "valid_item_rate": …}."""
        return {name: evaluation.metrics for name, evaluation in self.evaluations.items()}

    def liked_metrics(self) -> dict[str, dict[str, float]]:
        """The same over the users who liked what they took next; empty where the log has no ratings."""
        if not self.liked.any():
            return {}
        return {
            name: {key: float(values[self.liked].mean()) for key, values in evaluation.per_user.items()}
            for name, evaluation in self.evaluations.items()
        }

    def intervals(self, key: str = "ndcg@10") -> dict[str, Interval]:
        """How far the model is ahead of each baseline, with a 95 % bootstrap interval over users."""
        model = self.evaluations[MODEL].per_user[key]
        return {name: paired_bootstrap(model, self.evaluations[name].per_user[key]) for name in BASELINES}


def compare(
    model: UGT,
    config: RecommenderConfig,
    sequences: EventSequences,
    trained_without: int,
    liked_from: float,
    split: Split | None = None,
) -> Comparison:
    """On the test events of `split`, by default every user's last.

    trained_without: how many parts the model was not trained on: 2, validation and test, or 1, the test, after a refit.
    Raises ValueError if no user has a test event and one before.
    """
    size, split = model.vocabulary.items, split or LeaveOneOut()
    fitted_on = split.cut(sequences, "valid" if trained_without == 2 else "test")[0]
    histories, predicted = split.cut(sequences, "test")
    able = np.flatnonzero((np.diff(histories.cu_events) > 0) & (predicted >= 0))
    if len(able) == 0:
        raise ValueError(split.nobody("test"))
    histories, predicted = take_users(histories, able), predicted[able]
    targets = targets_of(sequences, predicted)
    rankers: dict[str, Ranker] = {
        MODEL: Recommender(model, config),
        "ugt_beam": Recommender(model, dataclasses.replace(config, mode="beam")),
        "ugt_item_head": Recommender(model, dataclasses.replace(config, mode="items", transition_weight=0.0)),
        "popularity": Popularity.fit(fitted_on, size),
        "transition": Transition.fit(fitted_on, size),
    }
    ratings = sequences.ratings[predicted]
    evaluations = {name: evaluate(ranker, histories, targets, size, name=name) for name, ranker in rankers.items()}
    return Comparison(histories, targets, ratings >= liked_from, evaluations)


def summary(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON: test, test_liked where there are ratings, and the model's lead over each baseline."""
    liked = comparison.liked_metrics()
    return {
        "test": comparison.metrics(),
        **({"test_liked": liked} if liked else {}),
        "users": {"test": len(comparison.targets), "test_liked": int(comparison.liked.sum())},
        "ndcg@10_ahead_of": {
            name: {**dataclasses.asdict(interval), "verdict": interval.verdict}
            for name, interval in comparison.intervals().items()
        },
    }
