"""Stage 1: the next item at every position of every history."""

from __future__ import annotations

import numpy as np

from genrec.interfaces import EventSequences
from genrec.models.ugt import UGTConfig
from genrec.training.batches import TrainingSet, all_positions
from genrec.training.config import PretrainConfig
from genrec.training.loader import LoaderOf
from genrec.training.stages.next_item import NextItem
from genrec.training.validation import SELECT_BY


class Pretrain(NextItem):
    """See genrec.training.stages.Stage."""

    name = "pretrain"
    select_by = SELECT_BY

    def __init__(self, config: PretrainConfig, model: UGTConfig, loader: LoaderOf) -> None:
        def prepare(sequences: EventSequences) -> TrainingSet:
            windows = all_positions(sequences.cu_events, model.max_events)
            return TrainingSet(sequences, windows, np.ones(len(sequences.item_ids), bool), model)

        super().__init__(loader(prepare, config.batch_tokens), config)
