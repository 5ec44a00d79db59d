from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genrec.evaluation.metrics import (
    Interval,
    coverage,
    evaluate,
    paired_bootstrap,
    per_user_metrics,
    rank_metrics,
    valid_item_rate,
)
from genrec.interfaces import EventSequences

ITEMS = 30


@st.composite
def rankings(draw):
    users, width = draw(st.integers(0, 12)), draw(st.integers(1, 12))
    item = st.integers(0, ITEMS)
    ranked = [draw(st.lists(item, min_size=width, max_size=width)) for _ in range(users)]
    targets = [draw(st.one_of(item, st.sampled_from(row))) for row in ranked]
    ks = draw(st.lists(st.integers(1, width), min_size=1, max_size=3, unique=True))
    return np.array(ranked, np.int64).reshape(users, width), np.array(targets, np.int64), ks


def naive(ranked, targets, k):
    recalls, gains = [], []
    for row, target in zip(ranked.tolist(), targets.tolist(), strict=True):
        place = next((place for place, item in enumerate(row[:k], start=1) if item == target != 0), None)
        recalls.append(0.0 if place is None else 1.0)
        gains.append(0.0 if place is None else 1 / math.log2(place + 1))
    return recalls, gains


@given(rankings())
def test_metrics_equal_a_loop_over_users(case):
    ranked, targets, ks = case
    per_user, means = per_user_metrics(ranked, targets, ks), rank_metrics(ranked, targets, ks)
    assert list(means) == [f"{name}@{k}" for k in ks for name in ("recall", "ndcg")]
    for k in ks:
        for name, expected in zip(("recall", "ndcg"), naive(ranked, targets, k), strict=True):
            np.testing.assert_allclose(per_user[f"{name}@{k}"], expected, rtol=1e-15)
            assert means[f"{name}@{k}"] == pytest.approx(sum(expected) / max(1, len(expected)))


def test_known_values():
    metrics = rank_metrics(np.array([[4, 7, 0], [7, 4, 0], [1, 2, 3], [1, 0, 0]]), np.array([7, 7, 9, 0]), ks=(1, 3))
    assert metrics == {"recall@1": 0.25, "ndcg@1": 0.25, "recall@3": 0.5, "ndcg@3": (1 + 1 / math.log2(3)) / 4}


def test_an_out_of_vocabulary_target_is_a_miss_even_where_the_ranking_is_empty():
    assert rank_metrics(np.zeros((3, 5), np.int64), np.zeros(3, np.int64), ks=(5,)) == {"recall@5": 0, "ndcg@5": 0}


@pytest.mark.parametrize(
    ("ranked", "targets", "ks", "error", "message"),
    [
        (np.zeros(5, int), np.zeros(5, int), (1,), ValueError, r"ranked has shape \(5,\); expected \(users, top_k\)"),
        (np.zeros((2, 5), int), np.zeros(3, int), (1,), ValueError, r"targets has shape \(3,\); expected \(2,\)"),
        (np.zeros((2, 5), int), np.zeros(2, int), (1, 10), ValueError, "ranked has 5 columns; expected at least 10"),
        (np.zeros((2, 5), int), np.zeros(2, int), (), ValueError, r"ks is \(\); expected one or more"),
        (np.zeros((2, 5), int), np.zeros(2, int), (0,), ValueError, r"ks is \(0,\); expected one or more"),
        (np.zeros((2, 5)), np.zeros(2, int), (1,), TypeError, "ranked has dtype float64; expected integer"),
        (np.zeros((2, 5), int), np.zeros(2), (1,), TypeError, "targets has dtype float64; expected integer"),
    ],
)
def test_wrong_arguments_are_named(ranked, targets, ks, error, message):
    with pytest.raises(error, match=message):
        rank_metrics(ranked, targets, ks)


def test_valid_item_rate_and_coverage():
    ranked = np.array([[1, 2, 0], [2, 9, 0]])
    assert valid_item_rate(ranked, 4) == 0.75
    assert coverage(ranked, 4) == 0.5
    assert valid_item_rate(np.zeros((2, 3), int), 4) == 0.0
    with pytest.raises(ValueError, match="catalogue_size is 0; expected at least 1"):
        coverage(ranked, 0)


def test_bootstrap_interval_agrees_with_drawing_users_and_is_the_same_every_time():
    rng = np.random.default_rng(7)
    a, b = rng.choice([0, 0.5, 1.0], 300), rng.choice([0, 0.5, 1.0], 300, p=[0.5, 0.3, 0.2])
    interval = paired_bootstrap(a, b, samples=20_000)
    drawn = (a - b)[rng.integers(0, 300, (20_000, 300))].mean(1)
    assert interval.difference == pytest.approx((a - b).mean())
    np.testing.assert_allclose([interval.low, interval.high], np.quantile(drawn, [0.025, 0.975]), atol=0.004)
    assert paired_bootstrap(a, b, samples=20_000) == interval
    assert interval.verdict == "ahead"
    assert paired_bootstrap(b, a).verdict == "behind"
    assert paired_bootstrap(a, a) == Interval(0.0, 0.0, 0.0)
    assert paired_bootstrap(a, a).verdict == "within noise"


def test_bootstrap_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    a, b = (rng.random((400, 200)) < 0.3).astype(float), (rng.random((400, 200)) < 0.2).astype(float)
    intervals = [paired_bootstrap(x, y, samples=300) for x, y in zip(a, b, strict=True)]
    covered = np.mean([interval.low <= 0.1 <= interval.high for interval in intervals])
    assert 0.90 < covered < 0.99


@pytest.mark.parametrize("pair", [(np.zeros(3), np.zeros(4)), (np.zeros(0), np.zeros(0)), (np.zeros((2, 2)),) * 2])
def test_bootstrap_refuses_what_is_not_paired(pair):
    with pytest.raises(ValueError, match="expected the same"):
        paired_bootstrap(*pair)
    with pytest.raises(ValueError, match="confidence is 95; expected a number between 0 and 1"):
        paired_bootstrap(np.zeros(3), np.zeros(3), confidence=95)


class LastItemPlusOne:
    """Ranks the item after the last one first; remembers how it was called."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def rank(self, histories: EventSequences, top_k: int) -> np.ndarray:
        self.batches.append(histories.user_ids.tolist())
        ranked = np.zeros((len(histories), top_k), np.int64)
        ranked[:, 0] = histories.item_ids[histories.cu_events[1:] - 1] + 1
        return ranked


def test_evaluate_goes_through_all_users_in_batches(sequences_of):
    histories = sequences_of([[1, 2], [5], [3, 3, 7], [4], [6, 1]])
    ranker = LastItemPlusOne()
    evaluation = evaluate(ranker, histories, np.array([3, 6, 8, 9, 2]), 9, ks=(1, 2), batch_size=2)
    assert ranker.batches == [["0", "1"], ["2", "3"], ["4"]]
    assert evaluation.ranked[:, 0].tolist() == [3, 6, 8, 5, 2]
    assert evaluation.per_user["ndcg@1"].tolist() == [1, 1, 1, 0, 1]
    assert evaluation.metrics == {
        "recall@1": 0.8, "ndcg@1": 0.8, "recall@2": 0.8, "ndcg@2": 0.8, "valid_item_rate": 1.0, "coverage": 5 / 9,
    }  # fmt: skip
    with pytest.raises(ValueError, match="targets has 2 entries; expected one for each of the 5 histories"):
        evaluate(ranker, histories, np.array([3, 6]), 9)
    with pytest.raises(ValueError, match="batch_size is 0"):
        evaluate(ranker, histories, np.array([3, 6, 8, 9, 2]), 9, batch_size=0)
