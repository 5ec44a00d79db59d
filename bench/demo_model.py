"""The model of the demo, with random weights, for the benchmarks that run it end to end on the CPU."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from genrec.kernels.library import PLAIN
from genrec.models.ugt import UGT
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


@contextmanager
def plain_operators() -> Iterator[None]:
    """Every operator in its plain PyTorch form."""
    with warnings.catch_warnings(), torch.library._scoped_library("genrec", "IMPL") as library:
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name, function in PLAIN.items():
            library.impl(name, function, "CPU", allow_override=True)
        yield


PLAINLY = {"plain": plain_operators}
