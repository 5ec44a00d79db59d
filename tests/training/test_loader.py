"""Every window once an epoch, the same micro-batches for any number of ranks, within their budget of tokens."""

import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.data.chunks import Chunks
from genrec.data.sequences import take_users
from genrec.training.batches import TrainingSet, all_positions
from genrec.training.loader import Loader, deal, read_ahead

LOG = small.sequences(small.random_users(40, 30, 25, seed=3, least=2))
CONFIG = small.config()


def prepare(sequences):
    return TrainingSet(
        sequences, all_positions(sequences.cu_events, 12), np.ones(len(sequences.item_ids), bool), CONFIG
    )


def chunked(count):
    parts = [take_users(LOG, np.arange(chunk, len(LOG), count)) for chunk in range(count)]
    return Chunks(count, lambda chunk: parts[chunk])


def loader(chunks=1, batch_tokens=40, micro_batches=1, seed=7):
    return Loader(chunked(chunks), prepare, batch_tokens, micro_batches, seed)


def targets_of(data, windows):
    """(user, place in the user's history) of every target, which is what an epoch must cover."""
    cu_events, found = data.sequences.cu_events, []
    for first, end in zip(windows.first_target, windows.end, strict=True):
        user = int(np.searchsorted(cu_events, first, side="right")) - 1
        places = [event - cu_events[user] for event in range(first, end) if data.wanted[event]]
        found += [(data.sequences.user_ids[user], place) for place in places]
    return found


@pytest.mark.parametrize(("chunks", "micro_batches"), [(1, 1), (1, 4), (3, 1), (3, 2)])
def test_an_epoch_has_every_target_once(chunks, micro_batches):
    batches = loader(chunks, micro_batches=micro_batches)
    all_data = map(prepare, chunked(chunks))
    expected = sorted(target for data in all_data for target in targets_of(data, data.windows))
    for epoch in range(2):
        seen = []
        for step in range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch):
            data, windows = batches[step]
            assert len(windows) == micro_batches
            seen += [target for part in windows for target in targets_of(data, part)]
        assert sorted(seen) == expected


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
@given(st.integers(24, 200), st.integers(1, 5), st.integers(1, 3))
def test_micro_batches_keep_their_budget(batch_tokens, micro_batches, chunks):
    batches = loader(chunks, batch_tokens, micro_batches)
    for step in range(batches.steps_per_epoch):
        data, windows = batches[step]
        for part in windows:
            tokens, _ = data.batch(part)
            assert 0 < len(tokens.token_ids) <= batch_tokens


def test_batches_are_a_function_of_seed_and_step():
    forward, backward = loader(3), loader(3)
    steps = range(2 * forward.steps_per_epoch)

    def content(batches, step):
        data, windows = batches[step]
        return [data.batch(part)[0].token_ids.tolist() for part in windows]

    seen = {step: content(forward, step) for step in steps}
    assert {step: content(backward, step) for step in reversed(steps)} == seen, "it matters what was read before"
    assert seen[0] != seen[forward.steps_per_epoch], "every epoch in the same order"
    assert content(loader(3, seed=8), 0) != seen[0]


def test_one_chunk_is_kept_and_the_next_read_ahead():
    batches = loader(4)
    for step in range(batches.steps_per_epoch):
        batches[step]
        assert len(batches._read) <= 2


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
