"""What the compiled operators gain end to end: a training step and a batch of requests of the demo's model, against the
same model on the operators' plain PyTorch forms."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from bench.sizes import sizes
from genrec.generation.recommender import Recommender, RecommenderConfig
from genrec.kernels.library import PLAIN, native_operators
from genrec.training.batches import TrainingSet, all_positions
from genrec.training.objectives import next_item_loss
from tests import small

ITEMS, USERS = 3650, 64
DEMO = {
    "d_model": 64, "heads": 2, "d_ffn": 128, "experts": 4, "top_k": 2, "d_expert": 64, "max_events": 50,
    "rel_bias_size": 128,
}  # fmt: skip


@contextmanager
def plain_operators() -> Iterator[None]:
    """Every operator in its plain PyTorch form."""
    with warnings.catch_warnings(), torch.library._scoped_library("genrec", "IMPL") as library:
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name, function in PLAIN.items():
            library.impl(name, function, "CPU", allow_override=True)
        yield


PLAINLY = {"plain": plain_operators}


@pytest.fixture(scope="module")
def model():
    return small.model(ITEMS, (64, 64, 64), **DEMO)


@pytest.fixture(scope="module")
def histories():
    return small.sequences(small.random_users(USERS, ITEMS, 120, least=20))


def test_training_step(race, model, histories):
    windows = all_positions(histories.cu_events, model.config.max_events)
    data = TrainingSet(histories, windows, np.ones(len(histories.item_ids), bool), model.config)
    tokens, targets = data.batch(data.windows.take(np.arange(USERS)), torch.device("cpu"))
    model.eval()  # no dropout: the same gradients in every contender
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step():
        loss, _ = next_item_loss(model, tokens, targets, 1.0)
        torch.autograd.grad(loss, parameters, allow_unused=True)
        return loss.detach()

    race(f"training step, {len(tokens.token_ids)} events", {"genrec": step, "plain": step}, within=PLAINLY)


@pytest.mark.parametrize("users", sizes([1], [32]))
@pytest.mark.parametrize("beams", sizes([10], [50, 128]))
def test_generation(race, model, histories, users, beams):
    recommender = Recommender(model, RecommenderConfig(beams=beams))
    requests = small.sequences(small.random_users(users, ITEMS, 120, seed=1, least=20))

    def answer():
        return torch.from_numpy(recommender.rank_scored(requests, 10)[1])

    race(f"{users} requests, {beams} beams", {"genrec": answer, "plain": answer}, within=PLAINLY)


def test_the_operators_are_compiled():
    assert native_operators("cpu")
