"""What a request costs end to end: from the histories of users to ten items each, on the demo's model. In PyTorch,
beside the same model on the operators' plain forms; exported, in ONNX Runtime; against a T5 of the same size, which is
what published recommenders generate with.

A T5 has other scores, so it is held to the form of the answer: ten different items for everyone, all in the catalogue.
"""

import functools

import numpy as np
import pytest
import torch

from bench.demo_model import DEMO, ITEMS, PLAINLY, demo_model, plain_operators
from bench.peers import installed
from bench.peers.generation import t5_of
from bench.sizes import sizes
from genrec.generation.recommender import Recommender, RecommenderConfig
from tests import small

TOP_K = 10
CASES = sizes([(1, 10)], [(1, 50), (1, 128), (1, 512), (32, 10), (32, 50), (32, 128)])
LENGTHS = sizes([25], [100, 400])
LONGEST = 400


@pytest.mark.parametrize(("users", "beams"), CASES)
def test_generation(race, users, beams):
    recommender = Recommender(demo_model(), RecommenderConfig(beams=beams))
    requests = requests_of(users, 20, 120)
    with plain_operators():
        plain = recommender.rank_scored(requests, TOP_K)[1]
    np.testing.assert_allclose(recommender.rank_scored(requests, TOP_K)[1], plain, atol=1e-3 * np.abs(plain).max())

    def answer():
        return recommender.rank(requests, TOP_K)

    contenders = {"genrec": answer, "plain": answer, **t5_answers(demo_model(), requests, beams)}
    compete(race, f"{users} requests, {beams} beams", contenders, requests, along(users, beams, "PyTorch"))


@pytest.mark.parametrize(("users", "beams"), CASES)
def test_exported(race, users, beams):
    """The graph that servers run. Arguments are made ready outside, as they arrive over the network."""
    requests = requests_of(users, 20, 120)
    contenders = {
        "genrec": exported(demo_model(), requests, beams),
        **t5_answers(demo_model(), requests, beams),
    }
    name = f"{users} requests, {beams} beams, ONNX Runtime"
    compete(race, name, contenders, requests, along(users, beams, "ONNX Runtime"))


@pytest.mark.parametrize("length", LENGTHS)
def test_histories(race, length):
    """Eight requests of histories that are read whole, for their length."""
    model, requests = long_model(), requests_of(8, length, length)
    contenders = {"genrec": exported(model, requests, 50), **t5_answers(model, requests, 50)}
    series = ("8 requests, 50 beams, ONNX Runtime", "events of a history", length)
    compete(race, f"8 requests of {length} events, ONNX Runtime", contenders, requests, series)


def compete(race, case, contenders, requests, series):
    race(
        case, contenders, tolerance=None, within={k: PLAINLY[k] for k in contenders if k in PLAINLY}, along=series,
        measure=lambda items: assert_recommendable(items, len(requests)),
    )  # fmt: skip


def along(users, beams, engine):
    return f"{users} requests, {engine}", "beams", beams


def requests_of(users, least, longest):
    return small.sequences(small.random_users(users, ITEMS, longest, seed=1, least=least))


def t5_answers(model, requests, beams):
    peer = t5_of(model)
    return peer.answers(requests, beams, TOP_K) if peer else {}


def exported(model, requests, beams):
    """A call that answers `requests` with the exported graph, on as many threads as PyTorch has."""
    session = exported_session(model, beams, torch.get_num_threads())
    history = Recommender(model, RecommenderConfig()).request(requests).history.numpy()
    return lambda: session.run(["item_ids"], {"history": history})[0]


@functools.cache
def exported_session(model, beams, threads):
    if installed("onnxruntime", "onnxruntime") is None or installed("onnxscript", "onnxscript") is None:
        pytest.skip("onnx, onnxruntime or onnxscript is not installed")
    import onnxruntime

    from genrec.export.onnx import to_onnx

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    graph = to_onnx(Recommender(model, RecommenderConfig(beams=beams, top_k=TOP_K)))
    return onnxruntime.InferenceSession(graph.SerializeToString(), options)


@functools.cache
def long_model():
    return small.model(ITEMS, (64, 64, 64), **(DEMO | {"max_events": LONGEST}))


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
