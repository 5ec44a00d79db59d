"""Every window once an epoch, the same micro-batches for any number of ranks, within their budget of tokens."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.data.chunks import Chunks
from genrec.data.sequences import join_users, take_users
from genrec.training.batches import TrainingSet, all_positions
from genrec.training.loader import Loader, deal, read_ahead
from genrec.training.ranks import Ranks

LOG = small.sequences(small.random_users(40, 30, 25, seed=3, least=2))
CONFIG = small.config()


def prepare(sequences):
    return TrainingSet(
        sequences, all_positions(sequences.cu_events, 12), np.ones(len(sequences.item_ids), bool), CONFIG
    )


def chunked(count, lanes=1, log=LOG):
    """Every user of a lane of a chunk is `count` · `lanes` users behind the one before."""
    parts = [
        [take_users(log, np.arange(chunk + count * lane, len(log), count * lanes)) for lane in range(lanes)]
        for chunk in range(count)
    ]
    return Chunks(
        count, lambda chunk, lane=None: parts[chunk][lane] if lane is not None else join_users(parts[chunk]), lanes
    )


def loader(chunks=1, batch_tokens=40, micro_batches=1, seed=7, lanes=1):
    return Loader(chunked(chunks, lanes), prepare, batch_tokens, micro_batches, seed)


def epoch_of(batches, epoch=0):
    """(step, number) → (sequences, windows) of an epoch."""
    steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
    return {(step, number): batches[step, number] for step in steps for number in range(batches.micro_batches)}


def targets_of(data, windows):
    """(user, place in the user's history) of every target, which is what an epoch must cover."""
    cu_events, found = data.sequences.cu_events, []
    for first, end in zip(windows.first_target, windows.end, strict=True):
        user = int(np.searchsorted(cu_events, first, side="right")) - 1
        places = [event - cu_events[user] for event in range(first, end) if data.wanted[event]]
        found += [(data.sequences.user_ids[user], place) for place in places]
    return found


def every_target(chunks):
    return sorted(target for data in map(prepare, chunks) for target in targets_of(data, data.windows))


def seen_targets(batches, epoch=0):
    return sorted(target for data, part in epoch_of(batches, epoch).values() for target in targets_of(data, part))


@pytest.mark.parametrize(
    ("chunks", "micro_batches", "lanes"), [(1, 1, 1), (1, 4, 1), (3, 1, 1), (3, 2, 1), (3, 2, 2), (2, 4, 2), (2, 4, 4)]
)
def test_an_epoch_has_every_target_once(chunks, micro_batches, lanes):
    batches = loader(chunks, micro_batches=micro_batches, lanes=lanes)
    assert batches._lanes == [lanes] * chunks
    for epoch in range(2):
        assert seen_targets(batches, epoch) == every_target(chunked(chunks))


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=200),
    st.integers(1, 30),
    st.integers(0, 2**31),
)
def test_deal(lengths, hands, seed):
    lengths, hands = np.array(lengths), min(hands, len(lengths))
    dealt = deal(lengths, hands, np.random.default_rng(seed))
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(lengths)))
    assert len(dealt) == hands
    assert min(map(len, dealt)) >= 1
    sums = [lengths[hand].sum() for hand in dealt]
    least = 0 if len(lengths) % hands else lengths.min()  # a hand may lack the last, shortest one
    assert max(sums) - min(sums) <= lengths.max() - least


@settings(max_examples=30)
@given(st.integers(24, 200), st.integers(1, 5), st.integers(1, 3), st.booleans())
def test_micro_batches_keep_their_budget(batch_tokens, micro_batches, chunks, in_lanes):
    for data, part in epoch_of(
        loader(chunks, batch_tokens, micro_batches, lanes=micro_batches if in_lanes else 1)
    ).values():
        tokens, _ = data.batch(part)
        assert 0 < len(tokens.token_ids) <= batch_tokens


def test_lanes_that_are_too_uneven_are_dealt_together():
    """One lane has most of the users: the other could not fill as many micro-batches."""
    users = {0: np.arange(1), 1: np.arange(1, len(LOG)), None: np.arange(len(LOG))}
    uneven = Chunks(1, lambda chunk, lane=None: take_users(LOG, users[lane]), 2)
    batches = Loader(uneven, prepare, 40, 2)
    assert batches._lanes == [1]
    assert seen_targets(batches) == every_target([LOG])


def content(batches, step):
    found = (batches[step, number] for number in range(batches.micro_batches))
    return [data.batch(part)[0].token_ids.tolist() for data, part in found]


@pytest.mark.parametrize("lanes", [1, 2])
def test_batches_are_a_function_of_seed_and_step(lanes):
    forward, backward = (loader(3, micro_batches=2, lanes=lanes) for _ in range(2))
    steps = range(2 * forward.steps_per_epoch)
    seen = {step: content(forward, step) for step in steps}
    assert {step: content(backward, step) for step in reversed(steps)} == seen, "it matters what was read before"
    assert seen[0] != seen[forward.steps_per_epoch], "every epoch in the same order"
    assert content(loader(3, seed=8, micro_batches=2, lanes=lanes), 0) != seen[0]


def test_one_chunk_is_kept_and_the_next_read_ahead():
    batches = loader(4)
    for step in range(batches.steps_per_epoch):
        batches[step, 0]
        assert len(batches._read) <= 2


def test_a_rank_reads_only_the_lanes_of_its_micro_batches():
    whole, read = chunked(2, lanes=4), []

    def noted(chunk, lane=None):
        read.append(lane)
        return whole.read(chunk, lane)

    batches = Loader(Chunks(2, noted, 4), prepare, 100, micro_batches=4)
    assert sorted(read) == sorted(2 * [0, 1, 2, 3]), "counting reads everything once"
    read.clear()
    for step in range(batches.steps_per_epoch):
        for number in (1, 3):  # of rank 1 of 2
            batches[step, number]
    assert set(read) == {1, 3}


class InThreads(Ranks):
    """Ranks that are threads of one process."""

    values, barrier = [0, 0], threading.Barrier(2)

    def gather(self, value):
        self.values[self.rank] = value
        self.barrier.wait(timeout=60)
        return list(self.values)


def test_ranks_count_together():
    read = [], []

    def of_rank(rank):
        def noted(chunk, lane=None):
            read[rank].append((chunk, lane))
            return chunked(3, 2).read(chunk, lane)

        return Loader(Chunks(3, noted, 2), prepare, 100, 2, ranks=InThreads(rank, 2))

    with ThreadPoolExecutor(2) as ranks:
        first, second = ranks.map(of_rank, range(2))
    alone = loader(3, 100, 2, lanes=2)
    assert (first._steps, first._lanes) == (second._steps, second._lanes) == (alone._steps, alone._lanes)
    assert sorted(read[0] + read[1]) == [(chunk, lane) for chunk in range(3) for lane in range(2)]


def test_what_does_not_fit_is_one_sentence():
    with pytest.raises(ValueError, match="batch_tokens is 20; expected 24 or more, twice the longest window"):
        loader(batch_tokens=20)
    with pytest.raises(ValueError, match=r"micro_batches is 500, but there are only \d+ windows"):
        loader(micro_batches=500)


def test_nothing_to_train_on():
    empty = Loader(Chunks.of(small.sequences([[1], [2]])), prepare, 100)
    assert empty.steps_per_epoch == 0


def test_read_ahead_keeps_the_order_and_says_what_went_wrong():
    assert list(read_ahead(lambda key: key * key, range(7))) == [(key, key * key) for key in range(7)]
    batches = read_ahead(lambda key: 1 // (3 - key), range(7))
    assert [value for _, value in (next(batches) for _ in range(3))] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(batches)
