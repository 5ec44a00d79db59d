"""What the compiled operators gain in training: a step of the demo's model, against the same model on the operators'
plain PyTorch forms."""

import numpy as np
import torch

from bench.demo_model import ITEMS, PLAINLY, demo_model
from genrec.kernels.library import native_operators
from genrec.training.batches import TrainingSet, all_positions
from genrec.training.objectives import next_item_loss
from tests import small

USERS = 64


def test_training_step(race):
    model = demo_model()  # in evaluation mode, without dropout: the same gradients in every contender
    histories = small.sequences(small.random_users(USERS, ITEMS, 120, least=20))
    windows = all_positions(histories.cu_events, model.config.max_events)
    data = TrainingSet(histories, windows, np.ones(len(histories.item_ids), bool), model.config)
    tokens, targets = data.batch(data.windows.take(np.arange(USERS)))
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step():
        loss, _ = next_item_loss(model, tokens, targets, 1.0)
        torch.autograd.grad(loss, parameters, allow_unused=True)
        return loss.detach()

    race(f"training step, {len(tokens.token_ids)} events", {"genrec": step, "plain": step}, within=PLAINLY)


def test_the_operators_are_compiled():
    assert native_operators("cpu")
