"""Batches of histories as one would write them first, with PyTorch's own loader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

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


class Streamed(IterableDataset[Stretch]):
    """The same of histories in part files, of which a row group at a time is read and shuffled."""

    def __init__(self, paths: list[Path]) -> None:
        self.files = [pq.ParquetFile(path) for path in paths]

    def __iter__(self) -> Iterator[Stretch]:
        rng = np.random.default_rng()
        groups = [(file, group) for file in self.files for group in range(file.num_row_groups)]
        for number in rng.permutation(len(groups)):
            file, group = groups[number]
            column = file.read_row_group(group, ["item_ids"])["item_ids"].combine_chunks()
            items = torch.from_numpy(column.values.to_numpy().astype(np.int64))
            histories = items.split(np.diff(column.offsets).tolist())
            for row in rng.permutation(len(histories)).tolist():
                yield histories[row][:-1], histories[row][1:]


def streaming_loader(paths: list[Path], histories: int) -> DataLoader[Stretch]:
    """An epoch in batches of so many histories. Fair: as above, and it reads one of seven columns. A worker
    process of its own takes it twice as long."""
    return DataLoader(Streamed(paths), histories, collate_fn=_packed)


def _packed(rows: list[Stretch]) -> tuple[Tensor, Tensor, Tensor]:
    """Histories and targets laid end to end, and the histories' offsets."""
    histories, targets = zip(*rows, strict=True)
    return torch.cat(histories), torch.cat(targets), torch.tensor([0, *map(len, histories)]).cumsum(0)
