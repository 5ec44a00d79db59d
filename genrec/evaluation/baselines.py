"""What a recommender must beat before anyone needs it: the most popular items, and a counter of item transitions.

Both implement `genrec.interfaces.Ranker` and know exactly the events they were fitted on, so that they can be compared
with a model trained on the same ones. Ties go to the lowest item index; out-of-vocabulary events are not there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from genrec.data.transitions import DISTANCE_WEIGHTS, count_transitions, known_events, number_within
from genrec.interfaces import OOV, EventSequences

# 1/r for the r-th last of five items, as whole numbers (times 60), for sums that are exact
RECENCY_WEIGHTS = np.array([60, 30, 20, 15, 12])


@dataclass(frozen=True)
class Popularity:
    """The items with the most events, whoever asks."""

    counts: NDArray[np.int64]  # (N + 1,) events of every item; row 0, out of vocabulary, is 0
    order: NDArray[np.int64]  # (N,) items by falling count

    @classmethod
    def fit(cls, sequences: EventSequences, catalogue_size: int) -> Popularity:
        """Count the events of `sequences`; items that have none are ranked last."""
        _check_items(sequences, catalogue_size)
        counts = np.bincount(sequences.item_ids, minlength=catalogue_size + 1)
        counts[OOV] = 0
        return cls(counts, np.argsort(-counts[1:], kind="stable") + 1)

    def rank(self, histories: EventSequences, top_k: int) -> NDArray[np.int64]:
        """(U, top_k) item indices, best first, without the items of the user's own history; 0 where there are fewer."""
        _check_top_k(top_k)
        return self.fill(np.zeros((len(histories), top_k), dtype=np.int64), histories)

    def fill(self, ranked: NDArray[np.int64], histories: EventSequences) -> NDArray[np.int64]:
        """`ranked` (U, top_k) with the zeros that end its rows replaced by the most popular items not yet there."""
        ranked = ranked.copy()
        _check_items(histories, len(self.order))
        missing = (ranked == 0).sum(axis=1)
        taken = np.zeros(len(self.counts), dtype=bool)
        for user in np.flatnonzero(missing):
            seen = histories.item_ids[histories.cu_events[user] : histories.cu_events[user + 1]]
            excluded = np.concatenate([seen, ranked[user]])
            taken[excluded] = True
            first = self.order[: len(excluded) + missing[user]]
            fresh = first[~taken[first]][: missing[user]]
            taken[excluded] = False
            kept = ranked.shape[1] - missing[user]
            ranked[user, kept : kept + len(fresh)] = fresh
        return ranked


@dataclass(frozen=True)
class Transition:
    """What came soon after the items a user had last.

    score(b) = 1 / sqrt(n_b) · Σ_r 1/r · Σ_d 1/d · count_d(a_r → b), where a_r is the r-th last of the user's last five
    items, count_d(a → b) how often b came d events after a (d = 1, 2, 3) and n_b how often b came at all. Items without
    any score follow in order of popularity.
    """

    popularity: Popularity
    counts: sparse.csr_matrix  # (N + 1, N + 1) int64, from a to b, weighted by distance

    @classmethod
    def fit(cls, sequences: EventSequences, catalogue_size: int) -> Transition:
        """Count the transitions of `sequences` between items 1 … catalogue_size."""
        popularity = Popularity.fit(sequences, catalogue_size)
        return cls(popularity, count_transitions(sequences, catalogue_size))

    def rank(self, histories: EventSequences, top_k: int) -> NDArray[np.int64]:
        """(U, top_k) item indices, best first, without the items of the user's own history; 0 where there are fewer."""
        _check_top_k(top_k)
        _check_items(histories, len(self.popularity.order))
        users, items = known_events(histories)
        sums = self._sums(users, items, len(histories)).tocoo()
        unseen = ~np.isin(self._keys(sums.row, sums.col), self._keys(users, items))
        rows, candidates = sums.row[unseen], sums.col[unseen]
        scores = sums.data[unseen] / np.sqrt(self.popularity.counts[candidates])
        best = np.lexsort((candidates, -scores, rows))
        rows, candidates = rows[best], candidates[best]
        rank = number_within(rows)
        ranked = np.zeros((len(histories), top_k), dtype=np.int64)
        ranked[rows[rank < top_k], rank[rank < top_k]] = candidates[rank < top_k]
        return self.popularity.fill(ranked, histories)

    def scores(self, histories: EventSequences) -> sparse.csr_matrix:
        """(U, N + 1) float64, the score of every item, also of those that the user has seen."""
        sums = self._sums(*known_events(histories), len(histories))
        units = RECENCY_WEIGHTS[0] * DISTANCE_WEIGHTS[0]
        return sums @ sparse.diags(1 / (units * np.sqrt(np.maximum(self.popularity.counts, 1))), format="csr")

    def _sums(self, users: NDArray, items: NDArray, count: int) -> sparse.csr_matrix:
        """(count, N + 1) int64: the scores without 1 / sqrt(n_b), times 360."""
        return self._recent(users, items, count) @ self.counts

    def _recent(self, users: NDArray, items: NDArray, count: int) -> sparse.csr_matrix:
        """(count, N + 1) the recency weight of every user's last items."""
        recency = number_within(users[::-1])[::-1]
        recent = recency < len(RECENCY_WEIGHTS)
        entries = (RECENCY_WEIGHTS[recency[recent]], (users[recent], items[recent]))
        return sparse.csr_matrix(entries, shape=(count, self.counts.shape[0]))

    def _keys(self, rows: NDArray, items: NDArray) -> NDArray[np.int64]:
        """One number for every (user, item) pair."""
        return rows.astype(np.int64) * self.counts.shape[1] + items


def _check_items(sequences: EventSequences, catalogue_size: int) -> None:
    if len(sequences.item_ids) and not 0 <= sequences.item_ids.min() <= sequences.item_ids.max() <= catalogue_size:
        span = f"{sequences.item_ids.min()} … {sequences.item_ids.max()}"
        raise IndexError(f"sequences.item_ids spans {span}; expected 0 … {catalogue_size}, the catalogue")


def _check_top_k(top_k: int) -> None:
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; expected at least 1")
