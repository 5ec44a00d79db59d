"""Checkpoints are whole, or not there."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from genrec.training.checkpoint import KEEP, Checkpoint, load_newest_checkpoint, save_checkpoint
from genrec.training.config import OptimizerConfig
from genrec.training.engines.torch import TorchEngine

FILES = ["weights.safetensors", "optimizer.safetensors", "state.json"]


def checkpoint(step):
    weights = {"a": torch.full((3,), float(step)), "b": torch.arange(4).view(2, 2) + step}
    return Checkpoint(
        weights,
        {"a/exp_avg": torch.tensor([0.1 * step, -0.0]), "a/step": torch.tensor(step)},
        {"step": step, "best": 0.1},
    )


def same(one, other):
    assert one.state == other.state
    for mine, theirs in ((one.weights, other.weights), (one.optimizer, other.optimizer)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) and mine[key].dtype == theirs[key].dtype for key in mine)
    return True


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_round_trip(tmp_path):
    save_checkpoint(tmp_path, checkpoint(7))
    assert same(load_newest_checkpoint(tmp_path), checkpoint(7))


def test_nothing_there(tmp_path):
    assert load_newest_checkpoint(tmp_path) is None
    assert load_newest_checkpoint(tmp_path / "missing") is None


def test_the_newest_few_are_kept(tmp_path):
    for step in (5, 10, 100, 1000):
        save_checkpoint(tmp_path, checkpoint(step))
    assert names(tmp_path) == ["step-00000100", "step-00001000"]
    assert KEEP == 2
    assert load_newest_checkpoint(tmp_path).state["step"] == 1000


@pytest.mark.parametrize("damage", ["truncated", "empty", "gone", "flipped", "zeros"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_newest_falls_back_with_a_message(tmp_path, capsys, name, damage):
    save_checkpoint(tmp_path, checkpoint(5))
    save_checkpoint(tmp_path, checkpoint(10))
    path = tmp_path / "step-00000010" / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        half = len(content) // 2
        flipped = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
        path.write_bytes(
            {"truncated": content[:half], "empty": b"", "flipped": flipped, "zeros": bytes(len(content))}[damage]
        )
    assert same(load_newest_checkpoint(tmp_path), checkpoint(5))
    message = capsys.readouterr().err
    assert "step-00000010 is damaged" in message
    assert message.count("\n") == 1


def test_a_wrong_checksum_is_damage(tmp_path, capsys):
    save_checkpoint(tmp_path, checkpoint(5))
    path = tmp_path / "step-00000005" / "state.json"
    record = json.loads(path.read_text())
    record["sha256"]["weights.safetensors"] = "0" * 64
    path.write_text(json.dumps(record))
    assert load_newest_checkpoint(tmp_path) is None
    assert "weights.safetensors does not match its checksum" in capsys.readouterr().err


def test_a_damaged_one_is_written_again(tmp_path):
    for step in (5, 10):
        save_checkpoint(tmp_path, checkpoint(step))
    (tmp_path / "step-00000010" / "weights.safetensors").write_bytes(b"")
    save_checkpoint(tmp_path, checkpoint(10))
    assert same(load_newest_checkpoint(tmp_path), checkpoint(10))


def test_what_a_killed_save_leaves_behind_is_ignored(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, checkpoint(5))
    half = tmp_path / ".tmp-step-00000010-x"
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half of it")
    assert same(load_newest_checkpoint(tmp_path), checkpoint(5))
    save_checkpoint(tmp_path, checkpoint(15))
    save_checkpoint(tmp_path, checkpoint(20))
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["step-00000015", "step-00000020"]


def test_a_failing_save_leaves_the_old_ones(tmp_path):
    save_checkpoint(tmp_path, checkpoint(5))
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, Checkpoint({}, {}, {"step": 10, "what": object()}))
    assert names(tmp_path) == ["step-00000005"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def mean_error(model, x):
    return F.mse_loss(model(x), torch.ones(5, 3)), {}


def train(engine, steps):
    for step in steps:
        engine.backward(mean_error, torch.randn(5, 4, generator=torch.Generator().manual_seed(step)), last=True)
        engine.step(lr=1e-2 / (1 + step))


def test_optimizer_state_is_restored_bitwise(tmp_path):
    config = OptimizerConfig(weight_decay=0.1)
    straight, first, second = network(), network(), network()
    engine = TorchEngine(straight, config)
    train(engine, range(10))
    part = TorchEngine(first, config)
    train(part, range(4))
    save_checkpoint(tmp_path, Checkpoint(part.weights(), part.state(), {"step": 4}))
    train(part, range(4, 7))  # what came after the checkpoint is lost with the process

    saved = load_newest_checkpoint(tmp_path)
    second.load_state_dict(saved.weights)
    resumed = TorchEngine(second, config)
    resumed.load_state(saved.optimizer)
    train(resumed, range(4, 10))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), second.parameters(), strict=True))
    theirs = resumed.state()
    assert {name.rsplit("/", 1)[1] for name in theirs} == {"step", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(value, theirs[name]) for name, value in engine.state().items())
