"""Stage 2: the same loss on what users valued, and on their last events only, which is what serving asks for."""

from __future__ import annotations

from torch import Tensor

from genrec.interfaces import EventSequences
from genrec.models.ugt import UGT, UGTConfig
from genrec.training.batches import EpochOrder, TrainingSet, last_positions, liked_events
from genrec.training.config import FinetuneConfig
from genrec.training.objectives import next_item_loss
from genrec.training.validation import SELECT_BY_LIKED


class Finetune:
    """See genrec.training.stages.Stage."""

    name = "finetune"
    select_by = SELECT_BY_LIKED

    def __init__(self, config: FinetuneConfig, model: UGTConfig, sequences: EventSequences, seed: int) -> None:
        windows = last_positions(sequences.cu_events, model.max_events, config.last_targets)
        self.data = TrainingSet(sequences, windows, liked_events(sequences, config.liked_from), model)
        self.order = EpochOrder(self.data.windows, config.batch_size, seed)
        self.item_weight, self.epochs, self.optimizer = config.item_weight, config.epochs, config.optimizer
        self.steps_per_epoch = self.order.steps

    def loss(self, model: UGT, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return next_item_loss(model, *self.data.batch(self.order[step], model.codes.device), self.item_weight)
