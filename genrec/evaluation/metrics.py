"""Leave-one-out metrics over items: every user has one held-out item, and the whole catalogue is ranked for it.

Recall@k is 1 where the target is among the first k, else 0; NDCG@k is 1 / log2(rank + 1) there, rank counted from 1
(Järvelin and Kekäläinen 2002, with one relevant item, so that the ideal ranking scores 1). Both are means over users.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from genrec.data.sequences import take_users
from genrec.interfaces import OOV, EventSequences, Ranker

KS = (5, 10, 20)


@dataclass(frozen=True)
class Evaluation:
    """What one ranker did for U users. `metrics` are means over users, `per_user` the numbers behind them."""

    metrics: dict[str, float]  # recall@k, ndcg@k, valid_item_rate, coverage
    per_user: dict[str, NDArray[np.float64]]  # recall@k and ndcg@k, each (U,)
    ranked: NDArray[np.int64]  # (U, K) item indices, best first, 0 = none


@dataclass(frozen=True)
class Interval:
    """A difference of means and the interval that holds it with the given confidence."""

    difference: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """ "ahead" or "behind" where the interval leaves out zero, else "within noise"."""
        if self.low > 0:
            return "ahead"
        return "behind" if self.high < 0 else "within noise"


def evaluate(
    ranker: Ranker,
    histories: EventSequences,
    targets: NDArray[np.integer],
    catalogue_size: int,
    ks: Sequence[int] = KS,
    batch_size: int = 256,
    name: str = "evaluate",
) -> Evaluation:
    """Rank `batch_size` users at a time and score them all; `name` labels the progress bar.

    histories: U users; targets: (U,) the item each user took next, 0 = out of vocabulary; items are 1 … catalogue_size.
    """
    if len(histories) != len(targets):
        raise ValueError(f"targets has {len(targets)} entries; expected one for each of the {len(histories)} histories")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    _check_ks(ks)
    ranked = np.zeros((len(histories), max(ks)), dtype=np.int64)
    with tqdm(total=len(histories), desc=name, unit="user") as bar:
        for start in range(0, len(histories), batch_size):
            users = np.arange(start, min(start + batch_size, len(histories)))
            ranked[users] = ranker.rank(take_users(histories, users), max(ks))
            bar.update(len(users))
    per_user = per_user_metrics(ranked, targets, ks)
    metrics = {key: _mean(values) for key, values in per_user.items()}
    metrics["valid_item_rate"] = valid_item_rate(ranked, catalogue_size)
    metrics["coverage"] = coverage(ranked, catalogue_size)
    return Evaluation(metrics, per_user, ranked)


def rank_metrics(ranked: NDArray[np.integer], targets: NDArray[np.integer], ks: Sequence[int] = KS) -> dict[str, float]:
    """{"recall@5": …, "ndcg@5": …, …}, the means over users of `per_user_metrics`; 0.0 where there are no users."""
    return {key: _mean(values) for key, values in per_user_metrics(ranked, targets, ks).items()}


def per_user_metrics(
    ranked: NDArray[np.integer], targets: NDArray[np.integer], ks: Sequence[int] = KS
) -> dict[str, NDArray[np.float64]]:
    """Recall and NDCG of every user, each (U,).

    ranked: (U, K) item indices, best first, 0 = none, K at least the largest of `ks`; targets: (U,) item indices. A
    target of 0 (out of vocabulary) is a miss: no ranker can name it. Wrong shapes raise ValueError, wrong dtypes
    TypeError.
    """
    _check_ranked(ranked)
    _check_ks(ks)
    targets = np.asarray(targets)
    if targets.shape != ranked.shape[:1]:
        raise ValueError(
            f"targets has shape {targets.shape}; expected ({len(ranked)},), one item for each row of ranked"
        )
    if not np.issubdtype(targets.dtype, np.integer):
        raise TypeError(f"targets has dtype {targets.dtype}; expected integer item indices")
    if ranked.shape[1] < max(ks):
        raise ValueError(f"ranked has {ranked.shape[1]} columns; expected at least {max(ks)}, the largest of ks")

    hits = (ranked == targets[:, None]) & (targets[:, None] != OOV)
    ranks = np.where(hits.any(axis=1), hits.argmax(axis=1), ranked.shape[1])  # from 0; a repeated item counts once
    gains = 1.0 / np.log2(ranks + 2.0)
    metrics = {}
    for k in ks:
        metrics[f"recall@{k}"] = (ranks < k).astype(np.float64)
        metrics[f"ndcg@{k}"] = np.where((ranks < k), gains, 0.0)
    return metrics


def valid_item_rate(ranked: NDArray[np.integer], catalogue_size: int) -> float:
    """Share of the returned (non-zero) entries that are items 1 … catalogue_size; 0.0 where nothing was returned."""
    _check_ranked(ranked)
    returned = ranked[ranked != OOV]
    return _mean((returned >= 1) & (returned <= catalogue_size))


def coverage(ranked: NDArray[np.integer], catalogue_size: int) -> float:
    """Share of the catalogue's items that at least one user is shown in `ranked` (U, K)."""
    _check_ranked(ranked)
    if catalogue_size < 1:
        raise ValueError(f"catalogue_size is {catalogue_size}; expected at least 1")
    shown = np.unique(ranked)
    return float(((shown >= 1) & (shown <= catalogue_size)).sum() / catalogue_size)


def paired_bootstrap(
    a: NDArray[np.floating],
    b: NDArray[np.floating],
    confidence: float = 0.95,
    samples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of mean(a − b), users drawn with replacement (Efron and Tibshirani 1993, chapter 13).

    a, b: (U,) the same metric of two rankers for the same users. Drawing U users is drawing how often each distinct
    difference comes up, one multinomial: a few dozen counts a sample instead of U indices.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(f"a and b have shapes {a.shape} and {b.shape}; expected the same (U,) with at least one user")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; expected a number between 0 and 1")
    values, counts = np.unique(a - b, return_counts=True)
    rng = np.random.default_rng(seed)
    shares = counts / len(a)
    means = np.array([rng.multinomial(len(a), shares) @ values for _ in range(samples)]) / len(a)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(_mean(a - b), float(low), float(high))


def _mean(values: NDArray) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def _check_ranked(ranked: NDArray) -> None:
    if ranked.ndim != 2:
        raise ValueError(f"ranked has shape {ranked.shape}; expected (users, top_k)")
    if not np.issubdtype(ranked.dtype, np.integer):
        raise TypeError(f"ranked has dtype {ranked.dtype}; expected integer item indices")


def _check_ks(ks: Sequence[int]) -> None:
    if not ks or min(ks) < 1:
        raise ValueError(f"ks is {tuple(ks)}; expected one or more positive integers")
