"""Who turns losses into weights: one small protocol, two engines, the same numbers from both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from genrec.training.config import OptimizerConfig, ParallelConfig
from genrec.training.engines.torch import TorchEngine
from genrec.training.ranks import Ranks

Values = dict[str, Tensor]
LossFunction = Callable[[Any, Any], tuple[Tensor, Values]]  # (model, batch) → loss and what to log


class Engine(Protocol):
    """What the training loop asks of an engine.

    The loss of a micro-batch is its part of the step's mean: the parts of all micro-batches of all ranks add up.
    """

    device: torch.device
    dtype: torch.dtype  # of products
    ranks: Ranks

    @property
    def scale(self) -> float:
        """What losses are multiplied with before gradients are taken; 1 unless training in float16."""
        ...

    def whole(self) -> Any:
        """The model as it is, with all of its parameters on every rank: itself, or a copy where they are in shards. All
        ranks call it together."""
        ...

    def backward(self, loss: LossFunction, batch: Any, last: bool) -> Values:
        """Add the gradients of one micro-batch; `last` of the step on this rank. Returns what the loss wants logged."""
        ...

    def step(self, lr: float) -> tuple[float, bool]:
        """Clip and apply what has been added → the gradient's norm before clipping, and whether it was applied: it is
        not where the norm is not finite."""
        ...

    def weights(self) -> Values:
        """The model's state_dict, whole and on the CPU of the first rank; all ranks call it together."""
        ...

    def state(self) -> Values:
        """The optimizer's state as whole, named tensors, the same for any engine and any number of ranks; on the CPU of
        the first rank, and all ranks call it together."""
        ...

    def load_state(self, tensors: Values) -> None:
        """Put back what `state` of any engine returned."""
        ...


def build_engine(model: nn.Module, optimizer: OptimizerConfig, config: ParallelConfig, ranks: Ranks) -> Engine:
    """The engine that config.parallel names, around a model that already holds the weights to begin with."""
    if config.parallel.startswith("zero"):
        from genrec.training.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, optimizer, config, ranks)
    return TorchEngine(model, optimizer, config, ranks)
