"""The probability of every code adds up to what the search and the item head say."""

import numpy as np
import pytest
import small
import torch

from genrec.demo_ui.explanation import explain
from genrec.generation import Recommender, RecommenderConfig

ITEMS = 30


@pytest.fixture(scope="module")
def model():
    return small.model(ITEMS, transitions=6)


def ranked(model, users=((3, 9, 4),), **settings):
    """Recommender, request, items and scores of everything that is recommended."""
    recommender = Recommender(model, RecommenderConfig(beams=64, exclude_seen=False, **settings))
    history = small.sequences(users)
    items, scores = recommender.rank_scored(history, ITEMS)
    return recommender, recommender.request(history), torch.from_numpy(items[0]), scores[0]


@pytest.mark.parametrize("normalize", ["children", "level"])
def test_codes_add_up_to_the_beam(model, normalize):
    recommender, request, items, scores = ranked(model, mode="beam", normalize=normalize)
    codes, _ = explain(recommender, request, items)
    assert codes.shape == (ITEMS, 3)
    np.testing.assert_allclose(codes.sum(-1), scores, atol=1e-4)
    assert (codes <= 0).all()
    if normalize == "children":
        assert codes.sum(-1).exp().sum().item() == pytest.approx(1, abs=1e-4)


def test_items_of_one_prefix_share_its_probabilities(model):
    recommender, request, items, _ = ranked(model, mode="beam")
    codes, _ = explain(recommender, request, items)
    for level in range(2):
        prefixes = model.codes[items][:, : level + 1].tolist()
        values = {}
        for prefix, value in zip(prefixes, codes[:, level].tolist(), strict=True):
            assert values.setdefault(tuple(prefix), value) == pytest.approx(value, abs=1e-5)
        assert len(values) < ITEMS, "some items share a prefix"


def test_the_item_head_is_the_one_that_ranks(model):
    recommender, request, items, scores = ranked(model, mode="items")
    np.testing.assert_allclose(explain(recommender, request, items).item_head, scores, atol=1e-4)
