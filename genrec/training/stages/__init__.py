"""The three stages: each decides what a batch is and what its loss is, the loop does the rest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from genrec.data.chunks import Chunks
from genrec.models.ugt import UGT, TargetBatch, TokenBatch
from genrec.training.config import OptimizerConfig, TrainConfig
from genrec.training.loader import Loader
from genrec.training.ranks import Ranks


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    tokens: TokenBatch
    targets: TargetBatch


class Stage(Protocol):
    """What the training loop asks of a stage."""

    name: str
    epochs: float
    steps_per_epoch: int
    optimizer: OptimizerConfig
    select_by: str  # the validation metric that decides which weights are kept
    max_recall_loss: float  # share of the first validation's recall@10 that may be lost before the stage is stopped

    on_policy: bool  # whether batches are made with the model as it is, and compared with another: without dropout

    def load(self, step: int, micro: int) -> Any:
        """Micro-batch number `micro` of `step`, on the CPU: a pure function, also of other threads."""
        ...

    def prepare(self, model: UGT, batch: Any) -> Any:
        """On policy: what the loss needs and takes no gradient of; here the model may be asked anything."""
        ...

    def loss(self, model: UGT, batch: Any, share: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch's part of the mean loss over the step, and of the means to log; share: of one target in that mean,
        1 / targets of all micro-batches of the step."""
        ...


def build_stage(name: str, config: TrainConfig, model: UGT, events: Chunks, ranks: Ranks | None = None) -> Stage:
    """The stage of that name on the given events; `model` holds the weights that the stage starts from. All ranks call
    it together."""
    from genrec.training.stages.align import Align
    from genrec.training.stages.finetune import Finetune
    from genrec.training.stages.pretrain import Pretrain

    loader = partial(Loader, events, micro_batches=config.micro_batches, seed=config.seed, ranks=ranks)
    if name == "pretrain":
        return Pretrain(config.pretrain, config.model, loader)
    if name == "finetune":
        return Finetune(config.finetune, config.model, loader)
    return Align(config.align, model, loader)
