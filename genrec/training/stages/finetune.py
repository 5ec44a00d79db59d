"""Stage 2: the same loss on what users valued, and on their last events only, which is what serving asks for."""

from __future__ import annotations

from genrec.interfaces import EventSequences
from genrec.models.ugt import UGTConfig
from genrec.training.batches import TrainingSet, last_positions, liked_events
from genrec.training.config import FinetuneConfig
from genrec.training.loader import LoaderOf
from genrec.training.stages.next_item import NextItem
from genrec.training.validation import SELECT_BY_LIKED


class Finetune(NextItem):
    """See genrec.training.stages.Stage."""

    name = "finetune"
    select_by = SELECT_BY_LIKED

    def __init__(self, config: FinetuneConfig, model: UGTConfig, loader: LoaderOf) -> None:
        def prepare(sequences: EventSequences) -> TrainingSet:
            windows = last_positions(sequences.cu_events, model.max_events, config.last_targets)
            return TrainingSet(sequences, windows, liked_events(sequences, config.liked_from), model)

        super().__init__(loader(prepare, config.batch_tokens), config)
