"""What test_nvtx.py listens to: one training step and one batch of requests of a small model."""

from functools import partial

import numpy as np
import small

from genrec.data.chunks import Chunks
from genrec.generation import Recommender, RecommenderConfig
from genrec.kernels.ranges import span
from genrec.training.config import OptimizerConfig, PretrainConfig
from genrec.training.engines.torch import TorchEngine
from genrec.training.loader import Loader
from genrec.training.stages.pretrain import Pretrain
from genrec.training.step import Trainer

model = small.model(30, encoder_layers=2, decoder_layers=1)
histories = small.sequences(small.random_users(6, 30, 12, least=4))
stage = Pretrain(PretrainConfig(batch_tokens=1000), model.config, partial(Loader, Chunks.of(histories)))
trainer = Trainer(stage, model, TorchEngine(model, OptimizerConfig()), total=20, seed=0)
(batches,) = trainer.micro_batches(7, 8, 1)
with span(stage.name):
    trainer.step(7, batches)
Recommender(model, RecommenderConfig(beams=5)).rank(small.sequences(small.random_users(3, 30, 9, least=2)), 4)
try:
    with span("failing", shape=np.zeros((2, 3)).shape):
        raise KeyError
except KeyError:
    with span("afterwards"):
        pass
