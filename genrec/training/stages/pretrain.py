"""Stage 1: the next item at every position of every history."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from genrec.interfaces import EventSequences
from genrec.models.ugt import UGT, UGTConfig
from genrec.training.batches import EpochOrder, TrainingSet, all_positions
from genrec.training.config import PretrainConfig
from genrec.training.objectives import next_item_loss
from genrec.training.validation import SELECT_BY


class Pretrain:
    """See genrec.training.stages.Stage."""

    name = "pretrain"
    select_by = SELECT_BY

    def __init__(self, config: PretrainConfig, model: UGTConfig, sequences: EventSequences, seed: int) -> None:
        windows = all_positions(sequences.cu_events, model.max_events)
        self.data = TrainingSet(sequences, windows, np.ones(len(sequences.item_ids), bool), model)
        self.order = EpochOrder(self.data.windows, config.batch_size, seed)
        self.item_weight, self.epochs, self.optimizer = config.item_weight, config.epochs, config.optimizer
        self.steps_per_epoch = self.order.steps

    def loss(self, model: UGT, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return next_item_loss(model, *self.data.batch(self.order[step], model.codes.device), self.item_weight)
