"""What the compiled operators gain in training: a step of the demo's model, against the same model on the operators'
plain PyTorch forms; and how fast its batches are made.

Cases of a series differ in their number of tokens: divide it by the seconds for tokens per second, and the memory by it
for memory per token.
"""

from itertools import count

import pyarrow.parquet as pq
import pytest
import torch

from bench.demo_model import DEMO, ITEMS, PLAINLY, demo_model, histories, pretraining
from bench.peers.loader import packing_loader, streaming_loader
from bench.sizes import sizes
from genrec.data.chunks import stream_sequences
from genrec.data.sequences import PARQUET, SCHEMA, to_table
from genrec.kernels.library import native_operators
from genrec.training.loader import read_ahead
from genrec.training.objectives import next_item_loss
from tests import small


@pytest.mark.parametrize("batch_tokens", sizes([400], [800, 3200, 12800], [51200]))
def test_training_step(race, batch_tokens):
    model = demo_model()  # in evaluation mode, without dropout: the same gradients in every contender
    batch = pretraining(histories(max(8, batch_tokens // 20)), batch_tokens).load(0, 0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    tokens = len(batch.tokens.token_ids)

    def step():
        loss, _ = next_item_loss(model, batch.tokens, batch.targets, 1.0)
        torch.autograd.grad(loss, parameters, allow_unused=True)
        return loss.detach()

    along = ("training step", "tokens", tokens)
    race(f"training step, {tokens} tokens", {"genrec": step, "plain": step}, within=PLAINLY, along=along)


@pytest.mark.parametrize("batch_tokens", sizes([400], [800, 3200, 12800], [51200]))
def test_loader(race, batch_tokens):
    """The batches of an epoch, against PyTorch's loader over the same windows with a function that packs them."""
    stage = pretraining(histories(max(64, batch_tokens)), batch_tokens)
    data, _ = stage.loader[0, 0]
    steps, tokens = stage.steps_per_epoch, int(data.tokens(data.windows).sum())

    def ours():
        made = read_ahead(lambda step: stage.load(step, 0), range(steps))
        return sum(len(batch.tokens.token_ids) for _, batch in made)

    def theirs():
        return sum(len(token_ids) for token_ids, _, _ in packing_loader(data, steps))

    along = ("epoch of batches", "tokens", tokens)
    contenders = {"genrec": ours, "DataLoader": theirs}
    case = f"batches of {batch_tokens} tokens, epoch of {tokens}"
    race(case, contenders, measure=lambda count: torch.tensor(float(count)), along=along)


@pytest.mark.parametrize("row_groups", sizes([2], [16], [160]))
def test_loader_from_disk(race, tmp_path, row_groups):
    """The batches of an epoch of a log in up to four chunks, which are read anew in every epoch."""
    users = small.sequences(small.random_users(5_000, ITEMS, DEMO["max_events"], least=20))
    path = tmp_path / "sequences" / "part-00000-of-00001.parquet"
    path.parent.mkdir()
    with pq.ParquetWriter(path, SCHEMA, **PARQUET) as writer:
        for _ in range(row_groups):
            writer.write_table(to_table(users))
    events = row_groups * len(users.item_ids)
    stage = pretraining(stream_sequences(tmp_path, -(-events // 4)), 12_800)
    epochs = count()

    def ours():
        first = next(epochs) * stage.steps_per_epoch
        made = read_ahead(lambda step: stage.load(step, 0), range(first, first + stage.steps_per_epoch))
        return sum(len(batch.tokens.token_ids) for _, batch in made)

    def theirs():
        histories = row_groups * len(users) // stage.steps_per_epoch
        return sum(len(token_ids) for token_ids, _, _ in streaming_loader([path], histories))

    tokens = events - row_groups * len(users)
    along = ("epoch of batches from disk", "tokens", tokens)
    contenders = {"genrec": ours, "DataLoader": theirs}
    case = f"batches of 12800 tokens from disk, epoch of {tokens}"
    race(case, contenders, measure=lambda found: torch.tensor(float(found)), along=along)


def test_the_operators_are_compiled():
    assert native_operators("cpu")
