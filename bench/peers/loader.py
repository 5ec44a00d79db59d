"""Batches of histories as one would write them first, with PyTorch's own loader."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from genrec.training.batches import TrainingSet

Stretch = tuple[Tensor, Tensor]


class Histories(Dataset[Stretch]):
    """The items that a window reads and those that it predicts."""

    def __init__(self, data: TrainingSet) -> None:
        self.items = torch.from_numpy(data.sequences.item_ids.astype(np.int64))
        self.windows = data.windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, row: int) -> Stretch:
        begin, first, end = (int(column[row]) for column in vars(self.windows).values())
        return self.items[begin : end - 1], self.items[first:end]


def packing_loader(data: TrainingSet, steps: int) -> DataLoader[Stretch]:
    """An epoch in `steps` batches. Fair: it packs as we do, shares its process as we do, and has only items to pack."""
    return DataLoader(Histories(data), -(-len(data) // steps), shuffle=True, collate_fn=_packed)


def _packed(rows: list[Stretch]) -> tuple[Tensor, Tensor, Tensor]:
    """Histories and targets laid end to end, and the histories' offsets."""
    histories, targets = zip(*rows, strict=True)
    return torch.cat(histories), torch.cat(targets), torch.tensor([0, *map(len, histories)]).cumsum(0)
