"""Micro-batches as a pure function of (seed, epoch, step, number): there is no loader state to save or to lose.

A step is the same micro-batches on any number of ranks; rank r of n takes numbers r, r + n, r + 2n …, so what one rank
accumulates several share. Histories are packed without padding, by a budget of tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from typing import Generic, TypeVar

import numpy as np
from tqdm import tqdm

from genrec.data.chunks import Chunks
from genrec.interfaces import EventSequences
from genrec.training.batches import IntArray, TrainingSet, Windows

D = TypeVar("D", bound=TrainingSet)
K = TypeVar("K")
V = TypeVar("V")


class Loader(Generic[D]):
    """The windows of every step. Chunks go in random order, the next one is read while the last is trained on."""

    def __init__(
        self,
        chunks: Chunks,
        prepare: Callable[[EventSequences], D],
        batch_tokens: int,
        micro_batches: int = 1,
        seed: int = 0,
    ) -> None:
        """prepare: from a chunk to its windows. batch_tokens: most tokens of a micro-batch. micro_batches: of a step.

        Reads everything once, to count. Raises ValueError if the longest window fills more than half of a micro-batch,
        or a chunk has fewer windows than a step has micro-batches.
        """
        self.chunks, self.prepare, self.seed, self.micro_batches = chunks, prepare, seed, micro_batches
        self._reader = ThreadPoolExecutor(1, "genrec-chunks")
        self._read: dict[int, Future[D]] = {}
        self._steps = [
            _micro_batches(self._data(chunk), batch_tokens, micro_batches) // micro_batches
            for chunk in tqdm(range(chunks.count), desc="counting", unit="chunk", disable=chunks.count == 1)
        ]
        self.steps_per_epoch = sum(self._steps)
        self._dealt: tuple[int, int, list[IntArray]] = (-1, -1, [])  # of one chunk in one epoch

    def __getitem__(self, step: int) -> tuple[D, list[Windows]]:
        """Of `step`, counted from 0 over all epochs: a chunk, and the windows of every micro-batch."""
        epoch, rest = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.chunks.count).tolist()
        ends = list(accumulate(self._steps[chunk] for chunk in order))
        place = next(place for place, end in enumerate(ends) if rest < end)
        chunk, first = order[place], (rest - ends[place] + self._steps[order[place]]) * self.micro_batches
        data = self._data(chunk, *order[place + 1 : place + 2])
        if self._dealt[:2] != (epoch, chunk):
            rng = np.random.default_rng([self.seed, epoch, chunk])
            self._dealt = epoch, chunk, deal(data.tokens(data.windows), self._steps[chunk] * self.micro_batches, rng)
        numbers = range(first, first + self.micro_batches)
        return data, [data.windows.take(self._dealt[2][number]) for number in numbers]

    def _data(self, chunk: int, *following: int) -> D:
        """A chunk, from now on the only one kept beside the following one, which is read meanwhile."""
        self._read = {number: read for number, read in self._read.items() if number in (chunk, *following)}
        for number in (chunk, *following):
            if number not in self._read:
                self._read[number] = self._reader.submit(lambda number: self.prepare(self.chunks.read(number)), number)
        return self._read[chunk].result()


def deal(lengths: IntArray, hands: int, rng: np.random.Generator) -> list[IntArray]:
    """Deal windows (W,) into at least one and at most W hands, random but alike: each gets one of the longest `hands`
    windows, one of the next longest, …, so that sums differ by no more than the longest from the shortest window."""
    by_length = np.lexsort((rng.random(len(lengths)), -lengths))
    rows = -(-len(lengths) // hands)
    table = np.concatenate([by_length, np.full(rows * hands - len(lengths), -1)]).reshape(rows, hands)
    return [column[column >= 0] for column in rng.permuted(table, axis=1).T]


def _micro_batches(data: TrainingSet, batch_tokens: int, per_step: int) -> int:
    """How many a chunk is dealt into: a multiple of per_step; none if it has no windows."""
    if len(data) == 0:
        return 0
    lengths = data.tokens(data.windows)
    longest = int(lengths.max())
    if batch_tokens < 2 * longest:
        raise ValueError(f"batch_tokens is {batch_tokens}; expected {2 * longest} or more, twice the longest window")
    if len(lengths) < per_step:
        raise ValueError(f"micro_batches is {per_step}, but there are only {len(lengths)} windows to deal into them")
    needed = -(-int(lengths.sum()) // (batch_tokens - longest))
    return min(-(-needed // per_step), len(lengths) // per_step) * per_step


def read_ahead(load: Callable[[K], V], keys: Iterable[K], depth: int = 2) -> Iterator[tuple[K, V]]:
    """(key, load(key)) in order, the next `depth` of them made in another thread meanwhile."""
    with ThreadPoolExecutor(1, "genrec-batches") as maker:
        made: deque[tuple[K, Future[V]]] = deque()
        try:
            for key in keys:
                made.append((key, maker.submit(load, key)))
                if len(made) > depth:
                    first, future = made.popleft()
                    yield first, future.result()
            while made:
                first, future = made.popleft()
                yield first, future.result()
        finally:
            maker.shutdown(cancel_futures=True)
