"""The model of the demo, with random weights and histories, for the benchmarks that run it end to end on the CPU."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from genrec.data.chunks import Chunks
from genrec.kernels.library import PLAIN
from genrec.models.ugt import UGT, UGTConfig
from genrec.training.config import PretrainConfig
from genrec.training.loader import Loader
from genrec.training.stages.pretrain import Pretrain
from tests import small

ITEMS = 3650
DEMO = {
    "d_model": 64, "heads": 2, "d_ffn": 128, "experts": 4, "top_k": 2, "d_expert": 64, "max_events": 50,
    "rel_bias_size": 128,
}  # fmt: skip


@functools.cache
def demo_model() -> UGT:
    with torch.device("cpu"):
        return small.model(ITEMS, (64, 64, 64), **DEMO)


def histories(users: int) -> Chunks:
    """Of 20 to 120 events."""
    return Chunks.of(small.sequences(small.random_users(users, ITEMS, 120, least=20)))


def pretraining(events: Chunks, batch_tokens: int) -> Pretrain:
    """The first stage, a micro-batch a step."""
    config = UGTConfig(max_events=DEMO["max_events"])
    return Pretrain(PretrainConfig(batch_tokens=batch_tokens), config, partial(Loader, events))


@contextmanager
def plain_operators() -> Iterator[None]:
    """Every operator in its plain PyTorch form."""
    with warnings.catch_warnings(), torch.library._scoped_library("genrec", "IMPL") as library:
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name, function in PLAIN.items():
            library.impl(name, function, "CPU", allow_override=True)
        yield


PLAINLY = {"plain": plain_operators}
