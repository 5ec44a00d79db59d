"""The preference loss and the schedule against their formulas, worked by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genrec.training.config import OptimizerConfig, TrainConfig
from genrec.training.objectives import preference_loss
from genrec.training.step import learning_rate, step_seed

LOGS = st.floats(-12, -0.01)


def rows(values):
    return torch.tensor(values, dtype=torch.float64)


def preference(gain, exists, beta, alike=None):
    """Of gains (B, 1 + R) at a single level, or (B, 1 + R, levels); the mean over the rows."""
    gain = gain[..., None] if gain.dim() == 2 else gain
    alike = torch.zeros(*exists.shape, gain.shape[2], dtype=torch.bool) if alike is None else alike
    return preference_loss(gain, alike, exists, beta, 1 / len(gain))


@given(st.tuples(LOGS, LOGS, LOGS, LOGS), st.floats(0.01, 2))
def test_one_rejected_item_is_dpo(logs, beta):
    """-log σ(β · (log π(c)/ref(c) − log π(r)/ref(r))), Rafailov et al. 2023, equation 7."""
    chosen, rejected, chosen_before, rejected_before = logs
    advantage = beta * ((chosen - chosen_before) - (rejected - rejected_before))
    gain = rows([[chosen - chosen_before, rejected - rejected_before]])
    loss, values = preference(gain, torch.tensor([[True]]), beta)
    assert float(loss) == pytest.approx(math.log1p(math.exp(-advantage)), rel=1e-6, abs=1e-9)
    assert float(values["preference_accuracy"]) == float(chosen - chosen_before > rejected - rejected_before)
    assert float(values["reward"]) == pytest.approx(advantage, abs=1e-9)


def test_several_rejected_items_are_softmax_dpo():
    gain = rows([[-1.0, -2.0, -0.5], [-3.0, -1.0, -9.0]]) - rows([[-1.5, -1.0, -0.7], [-2.0, -2.0, -9.0]])
    exists = torch.tensor([[True, True], [True, False]])
    beta, expected = 0.3, []
    for row in range(2):
        terms = [math.exp(beta * float(gain[row, 1 + i] - gain[row, 0])) for i in range(2) if exists[row, i]]
        expected.append(-math.log(1 / (1 + sum(terms))))
    loss, values = preference(gain, exists, beta)
    assert float(loss) == pytest.approx(sum(expected) / 2, rel=1e-9)
    assert float(values["preference_accuracy"]) == pytest.approx((1 + 0) / 2)  # gains .5 > -1, .5 > .2, but -1 < 1


def test_rows_without_rejected_items_count_as_nothing():
    gain = rows([[0.5, -1.0], [-3.0, -1.0]])
    first, _ = preference(gain[:1], torch.tensor([[True]]), 0.2)
    both, _ = preference(gain, torch.tensor([[True], [False]]), 0.2)
    assert float(both) == pytest.approx(float(first) / 2)
    gain.requires_grad_()
    none, values = preference(gain, torch.tensor([[False], [False]]), 0.2)
    assert float(none.detach()) == 0.0
    assert {float(value) for value in values.values()} == {0.0}
    none.backward()
    assert not gain.grad.any()


def test_missing_items_have_no_gradient():
    gain = rows([[0.5, -1.0, 0.0]]).requires_grad_()
    loss, _ = preference(gain, torch.tensor([[True, False]]), 0.2)
    loss.backward()
    assert gain.grad[0, 0] < 0 < gain.grad[0, 1]
    assert gain.grad[0, 2] == 0
    assert gain.grad.isfinite().all()


def test_codes_in_common_have_no_gradient():
    gain = torch.randn(1, 3, 3, dtype=torch.float64).requires_grad_()
    alike = torch.tensor([[[True, True, False], [False, False, False]]])
    loss, _ = preference(gain, torch.tensor([[True, True]]), 0.7, alike)
    expected = gain.detach().clone()
    expected[0, 1, :2] = expected[0, 0, :2]  # what is in common cancels
    margins = (expected[:, :1] - expected[:, 1:]).sum(2)
    assert float(loss.detach()) == pytest.approx(float(torch.log1p((-0.7 * margins).exp().sum())))
    loss.backward()
    assert not gain.grad[0, 1, :2].any()
    assert gain.grad[0, 1, 2] > 0
    assert gain.grad[0, 0, 2] < gain.grad[0, 0, 0] < 0, "the second rejected item shares nothing"


def test_learning_rate_rises_then_falls_along_a_cosine():
    config = OptimizerConfig(lr=2.0, warmup_steps=4, final_lr=0.1)
    rates = [learning_rate(config, step, 24) for step in range(24)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    for step in range(4, 24):
        share = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 4) / 20)) / 2
        assert rates[step] == pytest.approx(2.0 * share)
    assert learning_rate(config, 24, 24) == pytest.approx(0.2)


@given(st.integers(1, 300), st.integers(0, 400))
def test_learning_rate_is_always_positive_and_never_above_lr(total, warmup):
    config = OptimizerConfig(lr=1.0, warmup_steps=warmup)
    rates = [learning_rate(config, step, total) for step in range(total)]
    assert all(0 < rate <= 1 for rate in rates)
    top = rates.index(max(rates))
    assert rates == sorted(rates[:top]) + sorted(rates[top:], reverse=True)


def test_every_step_of_every_stage_has_its_own_seed():
    seeds = {step_seed(seed, stage, step) for seed in range(3) for stage in ("pretrain", "align") for step in range(50)}
    assert len(seeds) == 300
    assert len({step_seed(1, "align", 2, micro) for micro in range(9)}) == 9
    assert step_seed(1, "align", 2, 3) == step_seed(1, "align", 2, 3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stages": ("pretrain", "sleep")}, "stages has 'sleep'; expected names among pretrain, finetune, align"),
        ({"resume": True, "overwrite": True}, "resume and overwrite are both true"),
        ({"alphas": ()}, "alphas is empty; expected at least one candidate"),
        ({"log_every": 0}, "log_every is 0; expected 1 or more"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0; expected 1 or more"),
        ({"valid_users": 0}, "valid_users is 0; expected 1 or more"),
        ({"threads": -1}, "threads is -1; expected 0 or more"),
    ],
)
def test_config_errors_are_one_sentence(settings, words, tmp_path):
    with pytest.raises(ValueError) as error:
        TrainConfig(features=tmp_path, semantic_ids=tmp_path, out=tmp_path, **settings)
    assert words in str(error.value)
