"""What each stage trains on: targets of finetune, pairs of align, gradients under autocast."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import small
import torch

from genrec.data.chunks import Chunks
from genrec.training.batches import Windows
from genrec.training.config import AlignConfig, FinetuneConfig, OptimizerConfig, ParallelConfig, PretrainConfig
from genrec.training.engines.torch import TorchEngine
from genrec.training.loader import Loader
from genrec.training.objectives import next_item_loss
from genrec.training.stages.align import Align
from genrec.training.stages.finetune import Finetune
from genrec.training.stages.pretrain import Pretrain
from genrec.training.step import Trainer

ITEMS = 30


@pytest.fixture
def log():
    """20 users, items may repeat, ratings 1 … 5 and now and then none."""
    rng = np.random.default_rng(5)
    users = [rng.integers(0, ITEMS + 1, rng.integers(1, 20)).tolist() for _ in range(20)]
    ratings = [[float(r) if r else np.nan for r in rng.integers(0, 6, len(user))] for user in users]
    return small.sequences(users, ratings)


def dealt(log, micro_batches=1, seed=0):
    """What makes a stage's loader."""
    return partial(Loader, Chunks.of(log), micro_batches=micro_batches, seed=seed)


def history(log, event):
    """(events before it, all events) of the user of an event."""
    user = int(np.searchsorted(log.cu_events, event, side="right")) - 1
    begin, end = log.cu_events[user : user + 2]
    return range(begin, event), range(begin, end)


def items_of(stage):
    """The targets of all micro-batches of an epoch."""
    items = []
    for step in range(stage.steps_per_epoch):
        batches = [stage.load(step, micro) for micro in range(2)]
        items += [batch.targets.items for batch in batches]
    return items


def test_pretrain_trains_on_everything(log):
    stage = Pretrain(PretrainConfig(batch_tokens=40), small.config(), dealt(log, 2))
    items = items_of(stage)
    starts = set(log.cu_events[:-1].tolist())
    expected = [int(item) for event, item in enumerate(log.item_ids) if item and event not in starts]
    assert sorted(torch.cat(items).tolist()) == sorted(expected)


def test_a_step_weighs_each_of_its_targets_alike(log):
    model = small.model(ITEMS, dropout=0.0)
    stage = Pretrain(PretrainConfig(batch_tokens=40), model.config, dealt(log, 3))
    engine = TorchEngine(model, OptimizerConfig(), ParallelConfig(precision="float32"))
    trainer = Trainer(stage, model, engine, total=9, seed=0)
    (batches,) = trainer.micro_batches(0, 1, 3)
    counts = [len(batch.targets.items) for _, batch in batches]
    assert len(set(counts)) > 1
    with torch.no_grad():
        sums = [
            next_item_loss(model, batch.tokens, batch.targets, stage.item_weight, share=1.0)[0] for _, batch in batches
        ]
    expected = float(sum(sums)) / sum(counts)
    assert float(trainer.step(0, batches).values["loss"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("last_targets", [1, 3, 50])
def test_finetune_trains_on_the_last_events_that_were_liked(log, last_targets):
    config = FinetuneConfig(batch_tokens=40, last_targets=last_targets, liked_from=4.0)
    stage = Finetune(config, small.config(max_events=12), dealt(log, 2))
    items = items_of(stage)
    expected = []
    for user in range(len(log)):
        begin, end = log.cu_events[user : user + 2]
        last = range(max(begin + 1, end - last_targets, end - 12), end)
        expected += [int(log.item_ids[e]) for e in last if log.item_ids[e] and not log.ratings[e] < 4.0]
    assert sorted(torch.cat(items).tolist()) == sorted(expected)


def align(log, model=None, micro_batches=1, **settings):
    model = model or small.model(ITEMS)
    config = AlignConfig(**{"batch_tokens": 60, "beams": 12, "negatives": 4, **settings})
    return Align(config, model, dealt(log, micro_batches, seed=3)), model


def test_align_chooses_one_liked_event_per_user(log):
    stage, _ = align(log, last_targets=5)
    drawn = set()
    for step in range(6 * stage.steps_per_epoch):
        data, windows = stage.loader[step, 0]
        cut, again = (data.one_liked_target(windows, np.random.default_rng(step)) for _ in range(2))
        assert cut.first_target.tolist() == again.first_target.tolist(), "not a function of the generator"
        for begin, event, end in zip(cut.begin, cut.first_target, cut.end, strict=True):
            assert end == event + 1
            assert begin < event
            assert log.item_ids[event] > 0
            assert not log.ratings[event] < 4.0
            assert event >= history(log, event)[1].stop - 5
            drawn.add(int(event))
    assert len(drawn) > len(stage.loader[0, 0][0]), "the same event of a user every time"


def events(stage, step):
    """The event that every target of the step's only micro-batch is."""
    data, windows = stage.loader[step, 0]
    return data.one_liked_target(windows, np.random.default_rng([3, step, 0])).first_target


def test_rejected_items_come_from_the_beams_and_are_neither_had_nor_liked(log):
    stage, model = align(log)
    for step in range(stage.steps_per_epoch):
        batch = stage.load(step, 0)
        rejected = stage.rejected(model, batch)
        assert rejected.shape == (len(batch.targets.items), 4)
        for event, item, items in zip(
            events(stage, step), batch.targets.items.tolist(), rejected.tolist(), strict=True
        ):
            assert log.item_ids[event] == item
            past, everything = history(log, event)
            had = {int(log.item_ids[e]) for e in past}
            liked = {int(log.item_ids[e]) for e in everything if not log.ratings[e] < 4.0}
            kept = [item for item in items if item]
            assert kept, "12 beams of 30 items and nothing to reject"
            assert len(set(kept)) == len(kept)
            assert items == kept + [0] * (len(items) - len(kept))
            assert not set(kept) & (had | liked)


def test_what_the_user_disliked_is_rejected_first(log):
    """All beams: the rejected items are those rated badly later on, then the likeliest of the rest."""
    stage, model = align(log, beams=ITEMS, negatives=ITEMS)
    mild = dataclasses.replace(log, ratings=np.where(log.ratings <= 2.0, 3.0, log.ratings))
    plain, _ = align(mild, model, beams=ITEMS, negatives=ITEMS)
    for step in range(stage.steps_per_epoch):
        rejected = stage.rejected(model, stage.load(step, 0)).tolist()
        by_likelihood = plain.rejected(model, plain.load(step, 0)).tolist()
        for event, items, order in zip(events(stage, step), rejected, by_likelihood, strict=True):
            bad = {int(log.item_ids[e]) for e in history(log, event)[1] if log.ratings[e] <= 2.0}
            ranked = [item for item in order if item in bad] + [item for item in order if item and item not in bad]
            assert items == ranked + [0] * order.count(0)


def test_align_loss_is_anchor_plus_preference(log):
    """The log-probabilities of chosen and rejected items one at a time, without what their codes have in common."""
    stage, model = align(log, weight=0.7, beta=0.4, item_weight=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # the policy has moved, the reference has not
    batch = stage.load(0, 0)
    pairs = stage.prepare(model, batch)
    loss, values = stage.loss(model, pairs, 1 / len(batch.targets.items))
    rejected = stage.rejected(model, batch)
    anchor, anchor_values = next_item_loss(model, batch.tokens, batch.targets, 0.5)

    def log_probabilities(ugt, items):
        encoded = ugt.encode(batch.tokens, ugt.item_vectors())
        targets = dataclasses.replace(batch.targets, items=items)
        return -ugt.code_losses(ugt.decode(encoded, batch.tokens, targets), items)

    chosen, total, won = batch.targets.items, 0.0, 0.0
    with torch.no_grad():
        for row in range(len(chosen)):
            pulls = []
            for column in range(rejected.shape[1]):
                if rejected[row, column]:
                    items = [chosen, rejected[:, column].clamp(min=1)]
                    policy, reference = (
                        [log_probabilities(m, i)[row] for i in items] for m in (model, stage.reference)
                    )
                    codes = [model.codes[i[row]].tolist() for i in items]
                    common = next(level for level in range(3) if codes[0][level] != codes[1][level])
                    gains = [(p - r)[common:].sum() for p, r in zip(policy, reference, strict=True)]
                    pulls.append(0.4 * (gains[1] - gains[0]))
            total += float(-torch.nn.functional.logsigmoid(-torch.stack(pulls).logsumexp(0)))
            won += float((torch.stack(pulls) < 0).float().mean())
    assert float(values["loss_preference"]) == pytest.approx(total / len(chosen), rel=1e-4)
    assert float(values["preference_accuracy"]) == pytest.approx(won / len(chosen), rel=1e-4)
    torch.testing.assert_close(values["loss_ids"], anchor_values["loss_ids"])
    torch.testing.assert_close(loss, anchor + 0.7 * values["loss_preference"])
    torch.testing.assert_close(values["loss"], loss.detach())


def part_of(stage, model, step):
    """(loss, batch) of a step of one micro-batch, as an engine takes them."""
    batch = stage.load(step, 0)
    return partial(stage.loss, share=1 / len(batch.targets.items)), stage.prepare(model, batch)


def aligned(stage, model, steps, lr=0.01):
    """The values of every step."""
    engine = TorchEngine(model, OptimizerConfig(lr=lr), ParallelConfig(precision="float32"))
    for step in steps:
        values = engine.backward(*part_of(stage, model, step), last=True)
        engine.step(lr)
        yield {name: float(value) for name, value in values.items()}


def test_reference_is_the_model_as_the_stage_began(log):
    stage, model = align(log)
    before = {name: value.clone() for name, value in stage.reference.state_dict().items()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    values = list(aligned(stage, model, range(3)))
    assert values[0]["loss_preference"] == pytest.approx(float(np.log(1 + 4)), rel=1e-4), "equal at the start"
    assert values[0]["reward"] == pytest.approx(0, abs=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in stage.reference.state_dict().items())
    assert not any(parameter.requires_grad for parameter in stage.reference.parameters())


def test_preference_training_wins_preferences(log):
    stage, model = align(log, batch_tokens=1000, weight=1.0, beta=0.5)
    values = list(aligned(stage, model, [0] * 25))
    assert values[-1]["loss_preference"] < 0.5 * values[0]["loss_preference"]
    assert values[-1]["reward"] > values[0]["reward"]


@pytest.mark.parametrize("name", ["pretrain", "align"])
def test_autocast_loses_no_gradient(log, name):
    """Weights cast inside no_grad, for the beams, must not be reused without a gradient."""
    model = small.model(ITEMS, experts=2)
    stage = (
        align(log, model)[0] if name == "align" else Pretrain(PretrainConfig(batch_tokens=40), model.config, dealt(log))
    )
    gradients = {}
    for precision in ("float32", "bfloat16"):
        engine = TorchEngine(model, OptimizerConfig(), ParallelConfig(precision=precision))
        model.eval()
        model.zero_grad()
        engine.backward(*part_of(stage, model, 0), last=True)
        gradients[precision] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert gradients["float32"].keys() == gradients["bfloat16"].keys()
    for name, exact in gradients["float32"].items():
        near = gradients["bfloat16"][name]
        assert near.dtype == torch.float32
        assert (exact.abs().sum() > 0) == (near.abs().sum() > 0), name


def test_empty_stages_have_no_steps():
    disliked = small.sequences([[1, 2, 3], [4, 5]], [[1.0, 1.0, 1.0], [2.0, 2.0]])
    assert Finetune(FinetuneConfig(), small.config(), dealt(disliked)).steps_per_epoch == 0
    assert align(disliked)[0].steps_per_epoch == 0
    assert Pretrain(PretrainConfig(), small.config(), dealt(small.sequences([[1]]))).steps_per_epoch == 0


def test_windows_take():
    windows = Windows(np.array([0, 5, 9]), np.array([1, 6, 10]), np.array([4, 8, 12]))
    taken = windows.take(np.array([2, 0]))
    assert (taken.begin.tolist(), taken.first_target.tolist(), taken.end.tolist()) == ([9, 0], [10, 1], [12, 4])
