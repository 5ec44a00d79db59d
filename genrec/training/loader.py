"""Micro-batches as a pure function of (seed, epoch, step, number): there is no loader state to save or to lose.

A step is the same micro-batches on any number of ranks; rank r of n takes numbers r, r + n, r + 2n …, so what one rank
accumulates and reads, several share. Histories are packed without padding, by a budget of tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from typing import Any, Generic, TypeVar

import numpy as np
from tqdm import tqdm

from genrec.data.chunks import Chunks
from genrec.interfaces import EventSequences
from genrec.training.batches import IntArray, TrainingSet, Windows
from genrec.training.ranks import Ranks

D = TypeVar("D", bound=TrainingSet)
K = TypeVar("K")
V = TypeVar("V")
Share = tuple[int, int, int]  # (chunk, lane, lanes): a lane of a chunk, or with one lane all of it


class Loader(Generic[D]):
    """The windows of every micro-batch. Chunks go in random order, the next one is read while the last is trained on.

    A chunk in lanes is dealt lane by lane: micro-batch m is dealt from lane m mod lanes, and a rank reads the lanes of
    its own micro-batches. Where lanes are too uneven for that, the chunk is dealt as a whole.
    """

    def __init__(
        self,
        chunks: Chunks,
        prepare: Callable[[EventSequences], D],
        batch_tokens: int,
        micro_batches: int = 1,
        seed: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        """prepare: from sequences to their windows. batch_tokens: most tokens of a micro-batch. micro_batches: of a
        step, a multiple of the chunks' lanes. ranks: which read everything once, together, to count; it concerns
        nothing else.

        Raises ValueError if the longest window fills more than half of a micro-batch, or a chunk has fewer windows than
        a step has micro-batches.
        """
        self.chunks, self.prepare, self.seed, self.micro_batches = chunks, prepare, seed, micro_batches
        self._reader = ThreadPoolExecutor(1, "genrec-chunks")
        self._read: dict[Share, Future[D]] = {}
        self._dealt: dict[tuple[int, Share], list[IntArray]] = {}  # of an epoch
        plans = [_plan(lanes, batch_tokens, micro_batches) for lanes in self._sizes(ranks or Ranks())]
        self._steps, self._lanes = [steps for steps, _ in plans], [lanes for _, lanes in plans]
        self.steps_per_epoch = sum(self._steps)

    def __getitem__(self, key: tuple[int, int]) -> tuple[D, Windows]:
        """Of (step, number), steps counted from 0 over all epochs: sequences, and the windows of the micro-batch."""
        step, number = key
        epoch, rest = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.chunks.count).tolist()
        ends = list(accumulate(self._steps[chunk] for chunk in order))
        place = next(place for place, end in enumerate(ends) if rest < end)
        share, *following = (self._share(chunk, number) for chunk in order[place : place + 2])
        data = self._data(share, *following)
        chunk, _, lanes = share
        before = (rest - ends[place] + self._steps[chunk]) * (self.micro_batches // lanes)
        return data, data.windows.take(self._hands(epoch, share, data)[before + number // lanes])

    def _share(self, chunk: int, number: int) -> Share:
        """What micro-batch `number` of a step is dealt from."""
        return chunk, number % self._lanes[chunk], self._lanes[chunk]

    def _data(self, share: Share, *following: Share) -> D:
        """The windows of a share. Kept are those of its chunk and of the following one, which is read meanwhile."""
        kept = {chunk for chunk, *_ in (share, *following)}
        self._read = {each: read for each, read in self._read.items() if each[0] in kept}
        for each in (share, *following):
            if each not in self._read:
                self._read[each] = self._reader.submit(self._prepared, *each)
        return self._read[share].result()

    def _prepared(self, chunk: int, lane: int, lanes: int) -> D:
        return self.prepare(self.chunks.read(chunk, lane if lanes > 1 else None))

    def _hands(self, epoch: int, share: Share, data: D) -> list[IntArray]:
        """The windows of every micro-batch of a share in this epoch, as positions."""
        chunk, lane, lanes = share
        self._dealt = {key: hands for key, hands in self._dealt.items() if (key[0], key[1][0]) == (epoch, chunk)}
        if (epoch, share) not in self._dealt:
            rng = np.random.default_rng([self.seed, epoch, chunk, lane])
            hands = self._steps[chunk] * self.micro_batches // lanes
            self._dealt[epoch, share] = deal(data.tokens(data.windows), hands, rng)
        return self._dealt[epoch, share]

    def _sizes(self, ranks: Ranks) -> IntArray:
        """(chunks, lanes, 3) int64: windows, tokens, and tokens of the longest window; every rank counts a part."""
        count, lanes = self.chunks.count, self.chunks.lanes
        mine = range(ranks.rank, count * lanes, ranks.world)
        shown = tqdm(mine, desc="counting", unit="part", disable=count == 1 or not ranks.first)
        counted = [_size(self._data((*divmod(part, lanes), lanes))) for part in shown]
        sizes = np.zeros((count * lanes, 3), np.int64)
        for rank, part in enumerate(ranks.gather(counted)):
            sizes[rank :: ranks.world] = np.array(part, np.int64).reshape(-1, 3)
        return sizes.reshape(count, lanes, 3)


LoaderOf = Callable[[Callable[[EventSequences], Any], int], Loader[Any]]  # prepare, batch_tokens: all else is settled


def deal(lengths: IntArray, hands: int, rng: np.random.Generator) -> list[IntArray]:
    """Deal windows (W,) into at least one and at most W hands, random but alike: each gets one of the longest `hands`
    windows, one of the next longest, …, so that sums differ by no more than the longest from the shortest window."""
    by_length = np.lexsort((rng.random(len(lengths)), -lengths))
    rows = -(-len(lengths) // hands)
    table = np.concatenate([by_length, np.full(rows * hands - len(lengths), -1)]).reshape(rows, hands)
    return [column[column >= 0] for column in rng.permuted(table, axis=1).T]


def _size(data: TrainingSet) -> tuple[int, int, int]:
    """Windows, tokens, and tokens of the longest window."""
    lengths = data.tokens(data.windows)
    return len(lengths), int(lengths.sum()), int(lengths.max(initial=0))


def _plan(sizes: IntArray, batch_tokens: int, micro_batches: int) -> tuple[int, int]:
    """(steps, lanes) of a chunk whose lanes have these sizes (lanes, 3): no micro-batch above its budget or empty."""
    windows, _, longest = total = np.array([*sizes[:, :2].sum(0), sizes[:, 2].max()])
    if batch_tokens < 2 * longest:
        raise ValueError(f"batch_tokens is {batch_tokens}; expected {2 * longest} or more, twice the longest window")
    if 0 < windows < micro_batches:
        raise ValueError(f"micro_batches is {micro_batches}, but there are only {windows} windows to deal into them")
    for lanes in (sizes, total[None]):
        windows, tokens, _ = lanes.T
        per_step = micro_batches // len(lanes)
        needed = -(-tokens // (batch_tokens - longest))  # micro-batches
        steps, possible = int((-(-needed // per_step)).max()), int((windows // per_step).min())
        if steps <= possible:
            return steps, len(lanes)
    return possible, 1  # too few windows to round up to a whole step


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
