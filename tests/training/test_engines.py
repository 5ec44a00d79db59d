"""One process: steps, clipping, loss scaling, where values stop being finite, apex where there is one."""

import sys
import types

import pytest
import torch
from torch import nn

from genrec.models.ugt import UGT, ModelVocabulary, UGTConfig
from genrec.training.config import OptimizerConfig, ParallelConfig
from genrec.training.diagnosis import first_bad_tensor
from genrec.training.engines.parts import LossScale, adamw, training_dtype
from genrec.training.engines.torch import TorchEngine


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def product(model, factor):
    return (model.weight * factor).sum(), {"loss": torch.tensor(1.0)}


def test_matrices_and_embeddings_decay_but_no_gain_and_no_bias():
    model = UGT(UGTConfig(), ModelVocabulary(10, (4, 4, 4), (10,)), torch.zeros(11, 3, dtype=torch.int32))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    engine = TorchEngine(model, OptimizerConfig(weight_decay=0.5))
    engine.backward(lambda model, _: (sum((p * 0.0).sum() for p in model.parameters()), {}), None, last=True)
    engine.step(lr=0.1)
    for name, parameter in model.named_parameters():
        rests = name.split(".")[-1].endswith("bias") or "norm" in name or name.startswith("code_bias")
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, 1.0 if rests else 1 - 0.1 * 0.5))


def test_gradients_are_clipped_and_their_norm_returned(monkeypatch):
    model = nn.Linear(3, 1, bias=False)
    engine, seen = TorchEngine(model, OptimizerConfig(clip_norm=1.0)), []
    monkeypatch.setattr(engine.optimizer, "step", lambda: seen.append(model.weight.grad.clone()))
    assert engine.backward(product, torch.tensor([3.0, 0.0, 4.0]), last=True) == {"loss": torch.tensor(1.0)}
    norm, applied = engine.step(lr=0.0)
    assert applied
    assert norm == pytest.approx(5.0)
    torch.testing.assert_close(seen[0], torch.tensor([[0.6, 0.0, 0.8]]))


def test_micro_batches_add_up():
    one, two = nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False)
    two.load_state_dict(one.state_dict())
    parts = [torch.tensor([0.1, 0.0, 0.2]), torch.tensor([0.0, -0.3, 0.1])]
    whole, halves = TorchEngine(one, OptimizerConfig()), TorchEngine(two, OptimizerConfig())
    whole.backward(product, sum(parts), last=True)
    for number, part in enumerate(parts):
        halves.backward(product, part, last=number == 1)
    assert halves.step(0.1) == pytest.approx(whole.step(0.1))
    torch.testing.assert_close(one.weight, two.weight)


def test_loss_scale_halves_on_overflow_and_doubles_after_patience():
    scale = LossScale(dynamic=True, patience=3)
    scale.update(applied=False)
    assert scale.value == 2**15
    for _ in range(3):
        scale.update(applied=True)
    assert scale.value == 2**16
    other = LossScale(dynamic=True)
    other.load_state(scale.state())
    assert (other.value, other.steps) == (scale.value, scale.steps)
    for _ in range(16):
        scale.update(applied=False)
    assert scale.value == 1
    with pytest.raises(FloatingPointError, match="at a loss scale of 1"):
        scale.update(applied=False)


def test_float32_needs_no_scale():
    scale = LossScale(dynamic=False)
    scale.update(applied=False)
    assert scale.value == 1
    assert scale.state() == {}


def test_float16_overflow_leaves_the_step_out_and_halves_the_scale():
    model = nn.Linear(3, 1, bias=False)
    engine = TorchEngine(model, OptimizerConfig(), ParallelConfig(precision="float16"))
    before, scale = model.weight.detach().clone(), engine.scale

    def step(large):
        engine.backward(lambda model, x: (model(x).float().sum() * large, {}), torch.ones(2, 3), last=True)
        return engine.step(lr=0.1)

    assert not step(1e4)[1]  # 65536 · 10⁴ is beyond float16
    assert torch.equal(model.weight, before)
    assert engine.scale == scale / 2
    norm, applied = step(0.5)
    assert applied
    assert norm == pytest.approx(3**0.5, rel=1e-3)
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda model: model[2].bias.data.fill_(float("inf")), "parameter 2.bias"),
        (lambda model: model[0].weight.data.fill_(3e38), "output of 0"),
        (lambda model: model[2].weight.data.fill_(1e30), "the loss"),
        (lambda model: None, None),
    ],
)
def test_the_first_bad_tensor_has_a_name(spoil, expected):
    model = network()
    spoil(model)
    x = torch.ones(5, 4) * (2 if expected else 1)
    assert first_bad_tensor(model, lambda: (model(x).square().sum(), {}), 1.0) == expected


def test_a_bad_gradient_has_a_name():
    model = network()
    found = first_bad_tensor(
        model, lambda: ((model[0].weight * 0).sqrt().sum() + model(torch.ones(1, 4)).sum(), {}), 1.0
    )
    assert found == "gradient of 0.weight"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_apex_is_used_on_a_gpu_where_it_is_built(monkeypatch):
    class FusedAdam(torch.optim.AdamW):
        """Counts steps by group, as apex does."""

        def __init__(self, groups, lr, betas, adam_w_mode):
            assert adam_w_mode
            super().__init__(groups, lr=lr, betas=betas)

    model, config = network(), OptimizerConfig()
    assert isinstance(adamw(model, config, torch.device("cuda")), torch.optim.AdamW), "apex is not here"
    apex = types.ModuleType("apex.optimizers")
    apex.FusedAdam = FusedAdam
    monkeypatch.setitem(sys.modules, "amp_C", types.ModuleType("amp_C"))
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", apex)
    assert isinstance(adamw(model, config, torch.device("cuda")), FusedAdam)
    assert isinstance(adamw(model, config, torch.device("cpu")), torch.optim.AdamW)


def test_precisions():
    cpu = torch.device("cpu")
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    assert {name: training_dtype(name, cpu) for name in names} == names
    assert training_dtype("auto", cpu) in (torch.float32, torch.bfloat16)
