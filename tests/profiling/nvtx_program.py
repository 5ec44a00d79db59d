"""What test_nvtx.py listens to: one training step and one batch of requests of a small model."""

import numpy as np
import small

from genrec.generation import Recommender, RecommenderConfig
from genrec.kernels.ranges import span
from genrec.training.config import OptimizerConfig, PretrainConfig
from genrec.training.engines.torch import TorchEngine
from genrec.training.loop import train_step
from genrec.training.stages.pretrain import Pretrain

model = small.model(30, encoder_layers=2, decoder_layers=1)
histories = small.sequences(small.random_users(6, 30, 12, least=4))
stage = Pretrain(PretrainConfig(batch_size=6), model.config, histories, seed=0)
with span(stage.name):
    train_step(stage, model, TorchEngine(model, OptimizerConfig()), step=7, total=20, seed=0)
Recommender(model, RecommenderConfig(beams=5)).rank(small.sequences(small.random_users(3, 30, 9, least=2)), 4)
try:
    with span("failing", shape=np.zeros((2, 3)).shape):
        raise KeyError
except KeyError:
    with span("afterwards"):
        pass
