from __future__ import annotations

from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genrec.data.transitions import strongest_transitions
from genrec.evaluation.baselines import Popularity, Transition

USERS = st.lists(st.lists(st.integers(0, 12), max_size=9), max_size=8)


def naive_popularity(events, histories, items, top_k):
    counts = Counter(item for user in events for item in user)
    order = sorted(range(1, items + 1), key=lambda item: (-counts[item], item))
    return [[item for item in order if item not in history][:top_k] for history in histories]


def naive_transition(events, histories, items, top_k):
    """Dictionaries and fractions; scores are compared squared, so that nothing is rounded."""
    counts, after = Counter(item for user in events for item in user), defaultdict(Counter)
    for user in events:
        known = [item for item in user if item]
        for place, item in enumerate(known):
            for distance, successor in enumerate(known[place + 1 : place + 4], start=1):
                after[item][successor] += Fraction(1, distance)
    popular = naive_popularity(events, histories, items, items)
    ranked = []
    for history, rest in zip(histories, popular, strict=True):
        scores = Counter()
        for recency, item in enumerate([item for item in reversed(history) if item][:5], start=1):
            for successor, weight in after[item].items():
                scores[successor] += weight / recency
        best = sorted(set(scores) - set(history), key=lambda item: (-(scores[item] ** 2) / counts[item], item))
        ranked.append((best + [item for item in rest if item not in best])[:top_k])
    return ranked


def padded(rows, top_k):
    return [row + [0] * (top_k - len(row)) for row in rows]


@pytest.mark.parametrize(("baseline", "naive"), [(Popularity, naive_popularity), (Transition, naive_transition)])
@pytest.mark.parametrize("top_k", [1, 20])
def test_equals_dictionaries_on_real_histories(baseline, naive, top_k, movielens, sequences_of):
    items = max(map(max, movielens))
    events, histories = [user[:-2] for user in movielens], [user[:-1] for user in movielens]
    ranked = baseline.fit(sequences_of(events), items).rank(sequences_of(histories), top_k)
    assert ranked.dtype == np.int64
    assert ranked.tolist() == naive(events, histories, items, top_k)


@pytest.mark.parametrize(("baseline", "naive"), [(Popularity, naive_popularity), (Transition, naive_transition)])
@given(events=USERS, histories=USERS, top_k=st.integers(1, 16))
def test_equals_dictionaries_on_anything(baseline, naive, sequences_of, events, histories, top_k):
    """Empty histories, out-of-vocabulary events, repeated items, ties, more wanted than there are."""
    ranked = baseline.fit(sequences_of(events), 14).rank(sequences_of(histories), top_k)
    assert ranked.tolist() == padded(naive(events, histories, 14, top_k), top_k)


@pytest.mark.parametrize("baseline", [Popularity, Transition])
def test_a_user_is_ranked_alike_in_any_batch(baseline, movielens, sequences_of):
    ranker = baseline.fit(sequences_of(movielens), max(map(max, movielens)))
    together = ranker.rank(sequences_of(movielens), 10)
    alone = np.concatenate([ranker.rank(sequences_of([user]), 10) for user in movielens])
    assert (together == alone).all()


def test_transitions_say_what_came_next(sequences_of):
    transition = Transition.fit(sequences_of([[1, 2, 3], [4, 2, 3], [1, 2, 5]]), 6)
    assert transition.rank(sequences_of([[2]]), 6).tolist() == [[3, 5, 1, 4, 6, 0]]
    assert transition.counts[1, 2] == 2 * 6
    assert transition.counts[1, 3] == 3


@given(events=USERS, histories=USERS)
def test_scores_are_those_that_the_item_head_remembers(sequences_of, events, histories):
    """Σ_r weight(a_r → b) / r over the last five items, with every successor in the table."""
    table = strongest_transitions([sequences_of(events)], 12, 12)
    expected = np.zeros((len(histories), 13))
    for user, history in enumerate(histories):
        for recency, item in enumerate([item for item in reversed(history) if item][:5], start=1):
            np.add.at(expected[user], table.items[item], table.weights[item] / recency)
    scores = Transition.fit(sequences_of(events), 12).scores(sequences_of(histories)).toarray()
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


@pytest.mark.parametrize("baseline", [Popularity, Transition])
def test_wrong_arguments_are_named(baseline, sequences_of):
    with pytest.raises(IndexError, match=r"sequences.item_ids spans 1 … 9; expected 0 … 5, the catalogue"):
        baseline.fit(sequences_of([[1, 9]]), 5)
    ranker = baseline.fit(sequences_of([[1, 2]]), 5)
    with pytest.raises(IndexError, match="spans 6 … 6; expected 0 … 5"):
        ranker.rank(sequences_of([[6]]), 3)
    with pytest.raises(ValueError, match="top_k is 0; expected at least 1"):
        ranker.rank(sequences_of([[1]]), 0)
