"""What each stage trains on: targets of finetune, pairs of align, gradients under autocast."""

import dataclasses

import numpy as np
import pytest
import small
import torch

from genrec.training.batches import Windows
from genrec.training.config import AlignConfig, FinetuneConfig, OptimizerConfig, PretrainConfig
from genrec.training.engines.torch import TorchEngine
from genrec.training.objectives import next_item_loss, preference_loss
from genrec.training.stages.align import Align
from genrec.training.stages.finetune import Finetune
from genrec.training.stages.pretrain import Pretrain

ITEMS = 30


@pytest.fixture
def log():
    """20 users, items may repeat, ratings 1 … 5 and now and then none."""
    rng = np.random.default_rng(5)
    users = [rng.integers(0, ITEMS + 1, rng.integers(1, 20)).tolist() for _ in range(20)]
    ratings = [[float(r) if r else np.nan for r in rng.integers(0, 6, len(user))] for user in users]
    return small.sequences(users, ratings)


def history(log, event):
    """(events before it, all events) of the user of an event."""
    user = int(np.searchsorted(log.cu_events, event, side="right")) - 1
    begin, end = log.cu_events[user : user + 2]
    return range(begin, event), range(begin, end)


def test_pretrain_trains_on_everything(log):
    stage = Pretrain(PretrainConfig(batch_size=4), small.config(), log, seed=0)
    items = [stage.data.batch(stage.order[step], "cpu")[1].items for step in range(stage.steps_per_epoch)]
    starts = set(log.cu_events[:-1].tolist())
    expected = [int(item) for event, item in enumerate(log.item_ids) if item and event not in starts]
    assert sorted(torch.cat(items).tolist()) == sorted(expected)


@pytest.mark.parametrize("last_targets", [1, 3, 50])
def test_finetune_trains_on_the_last_events_that_were_liked(log, last_targets):
    config = FinetuneConfig(batch_size=4, last_targets=last_targets, liked_from=4.0)
    stage = Finetune(config, small.config(max_events=12), log, seed=0)
    items = [stage.data.batch(stage.order[step], "cpu")[1].items for step in range(stage.steps_per_epoch)]
    expected = []
    for user in range(len(log)):
        begin, end = log.cu_events[user : user + 2]
        last = range(max(begin + 1, end - last_targets, end - 12), end)
        expected += [int(log.item_ids[e]) for e in last if log.item_ids[e] and not log.ratings[e] < 4.0]
    assert sorted(torch.cat(items).tolist()) == sorted(expected)


def align(log, model=None, **settings):
    model = model or small.model(ITEMS)
    return Align(AlignConfig(**{"batch_size": 6, "beams": 12, "negatives": 4, **settings}), model, log, seed=3), model


def cut(stage, step):
    return stage._one_liked_target(stage.order[step], step)


def test_align_chooses_one_liked_event_per_user(log):
    stage, _ = align(log, last_targets=5)
    drawn = set()
    for step in range(6 * stage.steps_per_epoch):
        windows = cut(stage, step)
        again = cut(stage, step)
        assert windows.first_target.tolist() == again.first_target.tolist(), "not a function of seed and step"
        for begin, event, end in zip(windows.begin, windows.first_target, windows.end, strict=True):
            assert end == event + 1
            assert begin < event
            assert log.item_ids[event] > 0
            assert not log.ratings[event] < 4.0
            assert event >= history(log, event)[1].stop - 5
            drawn.add(int(event))
    assert len(drawn) > len(stage.data), "the same event of a user every time"


def test_rejected_items_come_from_the_beams_and_are_neither_had_nor_liked(log):
    stage, model = align(log)
    for step in range(stage.steps_per_epoch):
        windows = cut(stage, step)
        tokens, _ = stage.data.batch(windows, "cpu")
        rejected = stage._rejected(model, tokens, windows)
        assert rejected.shape == (len(windows), 4)
        for event, items in zip(windows.first_target, rejected.tolist(), strict=True):
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
    for step in range(stage.steps_per_epoch):
        windows = cut(stage, step)
        tokens, _ = stage.data.batch(windows, "cpu")
        rejected = stage._rejected(model, tokens, windows)
        plain, _ = align(dataclasses.replace(log, ratings=np.where(log.ratings <= 2.0, 3.0, log.ratings)), model,
                         beams=ITEMS, negatives=ITEMS)  # fmt: skip
        by_likelihood = plain._rejected(model, tokens, windows)
        for event, items, order in zip(windows.first_target, rejected.tolist(), by_likelihood.tolist(), strict=True):
            bad = {int(log.item_ids[e]) for e in history(log, event)[1] if log.ratings[e] <= 2.0}
            ranked = [item for item in order if item in bad] + [item for item in order if item and item not in bad]
            assert items == ranked + [0] * order.count(0)


def test_align_loss_is_anchor_plus_preference(log):
    stage, model = align(log, weight=0.7, beta=0.4, item_weight=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # the policy has moved, the reference has not
    loss, values = stage.loss(model, 0)
    windows = cut(stage, 0)
    tokens, chosen = stage.data.batch(windows, "cpu")
    rejected = stage._rejected(model, tokens, windows)
    anchor, anchor_values = next_item_loss(model, tokens, chosen, 0.5)

    def log_probability(ugt, items):
        encoded = ugt.encode(tokens, ugt.item_vectors())
        return -ugt.code_losses(ugt.decode(encoded, tokens, dataclasses.replace(chosen, items=items)), items).sum(1)

    candidates = [chosen.items, *rejected.T.clamp(min=1)]
    with torch.no_grad():
        policy, reference = (
            torch.stack([log_probability(m, items) for items in candidates], 1) for m in (model, stage.reference)
        )
    preference, _ = preference_loss(policy, reference, rejected > 0, 0.4)
    torch.testing.assert_close(values["loss_preference"], preference)
    torch.testing.assert_close(values["loss_ids"], anchor_values["loss_ids"])
    torch.testing.assert_close(loss, anchor + 0.7 * preference)
    torch.testing.assert_close(values["loss"], loss.detach())


def test_reference_is_the_model_as_the_stage_began(log):
    stage, model = align(log)
    before = {name: value.clone() for name, value in stage.reference.state_dict().items()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    engine = TorchEngine(model, OptimizerConfig(lr=0.1), "float32")
    _, first = stage.loss(model, 0)
    assert float(first["loss_preference"]) == pytest.approx(float(np.log(1 + 4)), rel=1e-4), "equal at the start"
    for step in range(3):
        engine.step(stage.loss(model, step)[0], lr=0.01)
    assert all(torch.equal(value, before[name]) for name, value in stage.reference.state_dict().items())
    assert not any(parameter.requires_grad for parameter in stage.reference.parameters())


def test_preference_training_wins_preferences(log):
    stage, model = align(log, batch_size=32, weight=1.0, beta=0.5)
    engine = TorchEngine(model, OptimizerConfig(lr=0.01), "float32")
    losses = []
    for _ in range(25):
        loss, values = stage.loss(model, 0)
        engine.step(loss, lr=0.01)
        losses.append(float(values["loss_preference"]))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", ["pretrain", "align"])
def test_autocast_loses_no_gradient(log, name):
    """Weights cast inside no_grad, for the beams, must not be reused without a gradient."""
    model = small.model(ITEMS, experts=2)
    stage = align(log, model)[0] if name == "align" else Pretrain(PretrainConfig(batch_size=4), model.config, log, 0)
    gradients = {}
    for precision in ("float32", "bfloat16"):
        engine = TorchEngine(model, OptimizerConfig(), precision)
        model.eval()
        model.zero_grad()
        with engine.autocast():
            stage.loss(model, 0)[0].backward()
        gradients[precision] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert gradients["float32"].keys() == gradients["bfloat16"].keys()
    for name, exact in gradients["float32"].items():
        near = gradients["bfloat16"][name]
        assert near.dtype == torch.float32
        assert (exact.abs().sum() > 0) == (near.abs().sum() > 0), name


def test_empty_stages_have_no_steps():
    disliked = small.sequences([[1, 2, 3], [4, 5]], [[1.0, 1.0, 1.0], [2.0, 2.0]])
    assert Finetune(FinetuneConfig(), small.config(), disliked, 0).steps_per_epoch == 0
    assert align(disliked)[0].steps_per_epoch == 0
    assert len(Pretrain(PretrainConfig(), small.config(), small.sequences([[1]]), 0).order.windows) == 0


def test_windows_take():
    windows = Windows(np.array([0, 5, 9]), np.array([1, 6, 10]), np.array([4, 8, 12]))
    taken = windows.take(np.array([2, 0]))
    assert (taken.begin.tolist(), taken.first_target.tolist(), taken.end.tolist()) == ([9, 0], [10, 1], [12, 4])
