"""What a request costs end to end: from the histories of users to ten items each. The demo's model, the same model on
the operators' plain PyTorch forms, and a T5 of the same size, which is what published recommenders generate with.

A T5 has other scores, so it is held to the form of the answer: ten different items for everyone, all in the catalogue.
"""

import numpy as np
import pytest

from bench.demo_model import ITEMS, PLAINLY, demo_model, plain_operators
from bench.peers.generation import t5_of
from bench.sizes import sizes
from genrec.generation.recommender import Recommender, RecommenderConfig
from tests import small

TOP_K = 10
CASES = sizes([(1, 10)], [(1, 50), (1, 128), (32, 10), (32, 50), (32, 128)])


@pytest.mark.parametrize(("users", "beams"), CASES)
def test_generation(race, users, beams):
    recommender = Recommender(demo_model(), RecommenderConfig(beams=beams))
    requests = small.sequences(small.random_users(users, ITEMS, 120, seed=1, least=20))
    with plain_operators():
        plain = recommender.rank_scored(requests, TOP_K)[1]
    np.testing.assert_allclose(recommender.rank_scored(requests, TOP_K)[1], plain, atol=1e-3 * np.abs(plain).max())

    def answer():
        return recommender.rank(requests, TOP_K)

    contenders = {"genrec": answer, "plain": answer}
    if peer := t5_of(demo_model()):
        contenders |= peer.answers(requests, beams, TOP_K)
    race(
        f"{users} requests, {beams} beams", contenders, tolerance=None, within=PLAINLY,
        measure=lambda items: assert_recommendable(items, users),
    )  # fmt: skip


def assert_recommendable(items, users):
    assert items.shape == (users, TOP_K)
    assert (items >= 1).all()
    assert (items <= ITEMS).all()
    assert all(len(set(row)) == TOP_K for row in items.tolist())


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_the_t5_is_of_our_size(stack):
    """Between half and all of our weights: it has no experts, of which two in four stand idle for a token."""
    if peer := t5_of(demo_model()):
        ours, theirs = getattr(demo_model(), stack).layers, getattr(peer.model, stack).block
        assert 0.5 * parameters(ours) <= parameters(theirs) <= parameters(ours)


def parameters(module):
    return sum(p.numel() for p in module.parameters())
