"""The model beside its baselines: who was fitted on what, and whose targets were liked."""

import math

import numpy as np
import pytest
import small

from genrec.data.sequences import keep_events, leave_out, take_users
from genrec.data.split import ByTime
from genrec.evaluation.baselines import Popularity, Transition
from genrec.evaluation.comparison import compare, summary
from genrec.generation import Recommender, RecommenderConfig

ITEMS = 30
RANKERS = {"ugt", "ugt_beam", "ugt_item_head", "popularity", "transition"}


@pytest.fixture(scope="module")
def model():
    return small.model(ITEMS)


@pytest.fixture(scope="module")
def log():
    """40 users of 0 … 12 events; the last event of some is rated badly, of some not at all."""
    users = small.random_users(40, ITEMS, 12, seed=3, least=0)
    rng = np.random.default_rng(0)
    return small.sequences(users, [rng.choice([1.0, 3.5, 4.0, 5.0, np.nan], len(user)).tolist() for user in users])


@pytest.fixture(scope="module")
def comparison(model, log):
    return compare(model, RecommenderConfig(beams=10, alpha=1.5), log, 2, 4.0)


def users_with_two_events(log):
    return [user for user in range(len(log)) if log.cu_events[user + 1] - log.cu_events[user] >= 2]


def test_everyone_gets_the_same_users_histories_and_targets(comparison, log):
    able = users_with_two_events(log)
    assert comparison.histories.user_ids.tolist() == [f"u{user}" for user in able]
    assert comparison.targets.tolist() == [int(log.item_ids[log.cu_events[user + 1] - 1]) for user in able]
    for row, user in enumerate(able):
        begin, end = log.cu_events[user : user + 2]
        mine = slice(*comparison.histories.cu_events[row : row + 2])
        assert comparison.histories.item_ids[mine].tolist() == log.item_ids[begin : end - 1].tolist()
    assert set(comparison.evaluations) == RANKERS
    assert next(iter(comparison.evaluations)) == "ugt"
    assert all(e.ranked.shape == (len(able), 20) for e in comparison.evaluations.values())


@pytest.mark.parametrize("held_out", [2, 1])
def test_baselines_are_fitted_on_the_model_s_events(model, log, held_out):
    comparison = compare(model, RecommenderConfig(), log, held_out, 4.0)
    fitted = leave_out(log, held_out)[0]
    for name, baseline in (("popularity", Popularity), ("transition", Transition)):
        expected = baseline.fit(fitted, ITEMS).rank(comparison.histories, 20)
        assert np.array_equal(comparison.evaluations[name].ranked, expected)
        other = baseline.fit(leave_out(log, 3 - held_out)[0], ITEMS).rank(comparison.histories, 20)
        assert not np.array_equal(expected, other), "the test could not tell"


def test_split_by_time(model, log):
    """Event k of every user is at time k: training before 2, validation before 4, then the test."""
    number = np.arange(len(log.item_ids)) - np.repeat(log.cu_events[:-1], np.diff(log.cu_events))
    timed, split = small.with_times(log, number), ByTime(2, 4)
    able = np.flatnonzero(np.diff(log.cu_events) > 4)
    for held_out, until in ((2, 2), (1, 4)):
        comparison = compare(model, RecommenderConfig(beams=10), timed, held_out, 4.0, split)
        assert comparison.histories.user_ids.tolist() == [f"u{user}" for user in able]
        assert comparison.targets.tolist() == log.item_ids[log.cu_events[able] + 4].tolist()
        assert comparison.liked.tolist() == (log.ratings[log.cu_events[able] + 4] >= 4.0).tolist()
        counted = Popularity.fit(keep_events(log, number < until), ITEMS)
        expected = counted.rank(comparison.histories, 20)
        assert np.array_equal(comparison.evaluations["popularity"].ranked, expected)
    with pytest.raises(ValueError, match=r"no user has an event from test_from = .*, and one earlier"):
        compare(model, RecommenderConfig(), timed, 2, 4.0, ByTime(2, 100))


def test_the_model_is_used_in_three_ways(model, log, comparison):
    histories = take_users(leave_out(log, 1)[0], users_with_two_events(log))
    for name, mode in (("ugt", "mixed"), ("ugt_beam", "beam"), ("ugt_item_head", "items")):
        expected = Recommender(model, RecommenderConfig(beams=10, alpha=1.5, mode=mode)).rank(histories, 20)
        assert np.array_equal(comparison.evaluations[name].ranked, expected)


def test_metrics_by_hand(comparison):
    for name, values in comparison.metrics().items():
        ranked = comparison.evaluations[name].ranked
        for k in (5, 10, 20):
            ranks = [
                row[:k].tolist().index(t) if t in row[:k] else None
                for row, t in zip(ranked, comparison.targets, strict=True)
            ]
            assert values[f"recall@{k}"] == pytest.approx(np.mean([rank is not None for rank in ranks]))
            gains = [0 if rank is None else 1 / math.log2(rank + 2) for rank in ranks]
            assert values[f"ndcg@{k}"] == pytest.approx(np.mean(gains))
        assert values["valid_item_rate"] == 1.0


def test_liked_metrics_are_those_of_users_who_liked_the_target(comparison, log):
    liked = [log.ratings[log.cu_events[user + 1] - 1] >= 4.0 for user in users_with_two_events(log)]
    assert comparison.liked.tolist() == liked
    assert 0 < sum(liked) < len(liked)
    for name, values in comparison.liked_metrics().items():
        per_user = comparison.evaluations[name].per_user
        for key, value in values.items():
            assert value == pytest.approx(np.mean([v for v, keep in zip(per_user[key], liked, strict=True) if keep]))


def test_without_ratings_nothing_is_liked(model):
    unrated = compare(model, RecommenderConfig(), small.sequences(small.random_users(10, ITEMS, 8, least=2)), 2, 4.0)
    assert unrated.liked_metrics() == {}
    assert "test_liked" not in summary(unrated)


def test_intervals_are_of_the_model_minus_the_baseline(comparison):
    intervals = comparison.intervals("recall@10")
    assert set(intervals) == {"popularity", "transition"}
    for name, interval in intervals.items():
        lead = comparison.metrics()["ugt"]["recall@10"] - comparison.metrics()[name]["recall@10"]
        assert interval.difference == pytest.approx(lead)
        assert interval.low <= interval.difference <= interval.high


def test_summary(comparison):
    result = summary(comparison)
    assert result["test"] == comparison.metrics()
    assert result["test_liked"] == comparison.liked_metrics()
    assert result["users"] == {"test": len(comparison.targets), "test_liked": int(comparison.liked.sum())}
    for name, lead in result["ndcg@10_ahead_of"].items():
        interval = comparison.intervals()[name]
        assert lead == {
            "difference": interval.difference,
            "low": interval.low,
            "high": interval.high,
            "verdict": interval.verdict,
        }


def test_nobody_to_compare_on(model):
    with pytest.raises(ValueError, match="no user has two events"):
        compare(model, RecommenderConfig(), small.sequences([[1], [], [2]]), 2, 4.0)
