"""Which items came soon after which: against counting one pair after the other."""

import math
from collections import Counter

import numpy as np
import pytest
import small
from hypothesis import given
from hypothesis import strategies as st

from genrec.data.transitions import strongest_transitions

ITEMS = 6
USERS = st.lists(st.lists(st.integers(0, ITEMS), max_size=8), min_size=1, max_size=6)


def naive(users, k):
    """{a: [(weight, b), …]}, the largest first."""
    count, events = Counter(), Counter()
    for user in users:
        known = [item for item in user if item]
        events.update(known)
        for place, item in enumerate(known):
            for distance in (1, 2, 3):
                if place + distance < len(known):
                    count[item, known[place + distance]] += 1 / distance
    rows = {item: [] for item in range(ITEMS + 1)}
    for (a, b), times in count.items():
        rows[a].append((times / math.sqrt(events[b]), b))
    return {a: sorted(row, key=lambda x: (-round(x[0], 9), x[1]))[:k] for a, row in rows.items()}


@given(USERS, st.integers(1, 9))
def test_strongest_are_those_of_counting_pairs(users, k):
    # where weights of different counts tie in exact arithmetic, rounding may order them either way: compare as sets
    table, expected = strongest_transitions([small.sequences(users)], ITEMS, k), naive(users, k)
    for a, row in expected.items():
        np.testing.assert_allclose(table.weights[a], [w for w, _ in row] + [0.0] * (k - len(row)), rtol=1e-6)
        full = {b: w for w, b in naive(users, ITEMS)[a]}
        kept = table.items[a][table.weights[a] > 0]
        assert len(set(kept)) == len(row)
        np.testing.assert_allclose(table.weights[a][: len(row)], [full[b] for b in kept], rtol=1e-6)


@pytest.mark.parametrize("k", [1, 4, 10])
def test_chunks_add_up(k):
    users = small.random_users(60, 40, 12)
    whole = strongest_transitions([small.sequences(users)], 40, k)
    parts = strongest_transitions([small.sequences(users[part::3]) for part in range(3)], 40, k)
    np.testing.assert_array_equal(parts.items, whole.items)
    np.testing.assert_array_equal(parts.weights, whole.weights)


def test_nothing_follows_nothing():
    table = strongest_transitions([small.sequences([[1], [], [0, 0]])], 3, 2)
    assert table.items.shape == table.weights.shape == (4, 2)
    assert not table.items.any()
    assert not table.weights.any()
