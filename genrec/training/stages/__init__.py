"""The three stages: each decides what a batch is and what its loss is, the loop does the rest."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from genrec.interfaces import EventSequences
from genrec.models.ugt import UGT
from genrec.training.config import OptimizerConfig, TrainConfig


class Stage(Protocol):
    """What the training loop asks of a stage."""

    name: str
    epochs: float
    steps_per_epoch: int
    optimizer: OptimizerConfig
    select_by: str  # the validation metric that decides which weights are kept

    def loss(self, model: UGT, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the batch that belongs to `step`, and values to log."""
        ...


def build_stage(name: str, config: TrainConfig, model: UGT, sequences: EventSequences) -> Stage:
    """The stage of that name on the given events; `model` holds the weights that the stage starts from."""
    from genrec.training.stages.align import Align
    from genrec.training.stages.finetune import Finetune
    from genrec.training.stages.pretrain import Pretrain

    if name == "pretrain":
        return Pretrain(config.pretrain, config.model, sequences, config.seed)
    if name == "finetune":
        return Finetune(config.finetune, config.model, sequences, config.seed)
    return Align(config.align, model, sequences, config.seed)
