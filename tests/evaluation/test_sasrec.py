from __future__ import annotations

import numpy as np
import pytest
import torch

from genrec.evaluation.baselines import Transition
from genrec.evaluation.sasrec import SASRec, SASRecConfig

ITEMS = 12
TINY = SASRecConfig(d_model=16, heads=2, layers=1, dropout=0.0, max_events=6, epochs=40, batch_size=16, lr=1e-2)


@pytest.fixture(scope="module")
def cycle(sequences_of):
    """Every user walks 1 → 2 → … → 12 → 1, from a start of their own."""
    return sequences_of([[(start + step) % ITEMS + 1 for step in range(8)] for start in range(ITEMS)] * 4)


@pytest.fixture(scope="module")
def model(cycle):
    return SASRec.fit(cycle, ITEMS, TINY)


def test_learns_a_cycle(model, sequences_of):
    ranked = model.rank(sequences_of([[3, 4, 5], [11, 12], [12, 1, 2, 3]]), 3)
    assert ranked[:, 0].tolist() == [6, 1, 4]


def test_reads_the_last_events_of_a_long_history(model, sequences_of):
    long = [1, 3, 5, 7, 2, 4, 6, 8, 9, 10]
    assert model.rank(sequences_of([long]), 1).tolist() == model.rank(sequences_of([long[-6:]]), 1).tolist()


def test_leaves_out_what_was_seen(model, sequences_of):
    histories = [[1, 2, 3], list(range(1, ITEMS + 1)), [5] * 9, [4, 0, 6]]
    ranked = model.rank(sequences_of(histories), ITEMS + 2)
    for row, history in zip(ranked.tolist(), histories, strict=True):
        expected = set(range(1, ITEMS + 1)) - set(history)
        assert set(row) - {0} == expected
        assert len(row) == ITEMS + 2
        assert sum(item > 0 for item in row) == len(expected)


def test_a_user_is_ranked_alike_alone_and_among_others(model, sequences_of):
    histories = [[1], [2, 3, 4, 5, 6, 7, 8], [], [9, 10], [0]]
    together = model.rank(sequences_of(histories), 5)
    alone = [model.rank(sequences_of([history]), 5)[0] for history in histories]
    np.testing.assert_array_equal(together, alone)
    assert not together[[2, 4]].any()


def test_a_memory_is_added_to_the_logits(model, cycle, sequences_of):
    """Against the formula, item by item; the log that is remembered goes the other way round."""
    backwards = sequences_of([list(range(start, 0, -1)) for start in (5, 8, 12)])
    histories = [[3, 4, 5], [9, 8], [2], [1, 7, 4, 6, 12, 3]]
    without = model.rank(sequences_of(histories), ITEMS)
    model.memory = Transition.fit(backwards, ITEMS)
    ranked = model.rank(sequences_of(histories), ITEMS)
    scores = model.memory.scores(sequences_of(histories)).toarray()
    model.memory = None
    assert ranked.tolist() != without.tolist()
    for history, row, score in zip(histories, ranked, scores, strict=True):
        state = model(torch.tensor([history]))[0, -1]
        logits = (model.items.weight @ state).detach().numpy() + np.log1p(10 * score)
        best = [item for item in np.argsort(-logits).tolist() if item not in [0, *history]]
        assert row[row > 0].tolist() == best


def test_the_seed_decides(cycle):
    few = SASRecConfig(**{**vars(TINY), "epochs": 2})
    first, again = (SASRec.fit(cycle, ITEMS, few) for _ in range(2))
    other = SASRec.fit(cycle, ITEMS, SASRecConfig(**{**vars(few), "seed": 1}))
    assert torch.equal(first.items.weight, again.items.weight)
    assert not torch.equal(first.items.weight, other.items.weight)


def test_a_state_sees_no_later_event(model):
    items = torch.tensor([[1, 2, 3, 4]])
    changed = torch.tensor([[1, 2, 3, 9]])
    with torch.no_grad():
        torch.testing.assert_close(model(items)[:, :3], model(changed)[:, :3])


def test_nobody_asked(model, sequences_of):
    assert model.rank(sequences_of([]), 3).shape == (0, 3)
