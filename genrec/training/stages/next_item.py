"""What pretrain and finetune share: the next item's loss on packed micro-batches."""

from __future__ import annotations

import math

from torch import Tensor

from genrec.models.ugt import UGT
from genrec.training.batches import TrainingSet
from genrec.training.config import FinetuneConfig, PretrainConfig
from genrec.training.loader import Loader
from genrec.training.objectives import next_item_loss
from genrec.training.stages import Batch


class NextItem:
    """See genrec.training.stages.Stage; pretrain and finetune only differ in their windows."""

    max_recall_loss = math.inf
    on_policy = False

    def __init__(self, loader: Loader[TrainingSet], config: PretrainConfig | FinetuneConfig) -> None:
        self.loader, self.steps_per_epoch = loader, loader.steps_per_epoch
        self.item_weight, self.epochs, self.optimizer = config.item_weight, config.epochs, config.optimizer

    def load(self, step: int, micro: int) -> Batch:
        data, windows = self.loader[step, micro]
        return Batch(*data.batch(windows))

    def prepare(self, model: UGT, batch: Batch) -> Batch:
        return batch

    def loss(self, model: UGT, batch: Batch, share: float) -> tuple[Tensor, dict[str, Tensor]]:
        return next_item_loss(model, batch.tokens, batch.targets, self.item_weight, share)
