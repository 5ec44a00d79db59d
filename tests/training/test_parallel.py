"""Two ranks train the same model as one that accumulates: every engine, every stage, through kills and moves."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from processes import exit_codes, finish, free_port, kill_at, start
from safetensors.torch import load_file, save_file

from genrec.data.chunks import stream_sequences
from genrec.training.log import read_metrics

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
ENGINES = ["ddp", "fsdp", *(pytest.param(f"zero-{stage}", marks=needs_deepspeed) for stage in (1, 2, 3))]
PARTS = 4  # micro-batches of a step, four for one rank and two for each of two


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory):
    """The directory of a run of one rank; dropout is on, and two of four experts get nothing in many batches."""
    out = tmp_path_factory.mktemp("alone") / "model"
    finish(arguments(out, micro_batches=PARTS))
    return out


def same_training(one, other, tolerance=1e-6):
    """Losses and weights are equal up to the order of sums."""
    mine, theirs = ([row for row in read_metrics(path / "metrics.jsonl") if "loss" in row] for path in (one, other))
    assert len(mine) >= 6
    for a, b in zip(mine, theirs, strict=True):
        assert (a["stage"], a["step"], a["applied"]) == (b["stage"], b["step"], b["applied"])
        for name in ("loss", "loss_ids", "loss_items", "gradient_norm"):
            assert b[name] == pytest.approx(a[name], rel=tolerance), (a["stage"], a["step"], name)
        assert b["expert_load"] == pytest.approx(a["expert_load"], abs=1e-6)
    weights, others = (load_file(path / "model.safetensors") for path in (one, other))
    for name, value in weights.items():
        torch.testing.assert_close(
            others[name], value, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_train_what_one_does(arguments, alone, tmp_path, engine):
    finish(arguments(tmp_path / "model", micro_batches=PARTS, parallel=engine), ranks=2)
    same_training(alone, tmp_path / "model")


def test_two_ranks_that_each_read_lanes_of_their_own(arguments, inputs, tmp_path):
    """A log that no rank has in memory, every rank reading only what it trains on, killed once: the same training."""
    shutil.copytree(inputs[0], tmp_path / "features")
    (part,) = (tmp_path / "features" / "sequences").iterdir()
    pq.write_table(pq.read_table(part), part, row_group_size=2)
    assert stream_sequences(tmp_path / "features", 150, PARTS).lanes == 2
    settings = {"features": tmp_path / "features", "chunk_events": 150, "micro_batches": PARTS}
    finish(arguments(tmp_path / "one", **settings))
    kill_at(arguments(tmp_path / "two", **settings), "pretrain", 3, ranks=2)
    finish(arguments(tmp_path / "two", resume=True, **settings), ranks=2)
    same_training(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("zero-2", marks=needs_deepspeed)])
def test_recomputed_activations_on_two_ranks(arguments, alone, tmp_path, engine):
    finish(arguments(tmp_path / "model", micro_batches=PARTS, parallel=engine, recompute=True), ranks=2)
    same_training(alone, tmp_path / "model")


@needs_deepspeed
def test_deepspeed_alone(arguments, alone, tmp_path):
    finish(arguments(tmp_path / "model", micro_batches=PARTS, parallel="zero-2"))
    same_training(alone, tmp_path / "model")


@pytest.mark.parametrize(
    ("engine", "ranks"), [("ddp", 1), ("fsdp", 2), pytest.param("zero-2", 2, marks=needs_deepspeed)]
)
def test_float16_trains_with_a_scale(arguments, alone, tmp_path, engine, ranks):
    out = tmp_path / "model"
    finish(arguments(out, micro_batches=PARTS, parallel=engine, precision="float16"), ranks)
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
    assert all(row["loss_scale"] >= 1 for row in rows)
    exact = [row["loss"] for row in read_metrics(alone / "metrics.jsonl") if "loss" in row]
    assert [row["loss"] for row in rows] == pytest.approx(exact, rel=2e-2)


@pytest.mark.parametrize(
    ("before", "ranks", "after", "ranks_after"),
    [
        ("ddp", 2, "ddp", 1),
        ("fsdp", 2, "ddp", 1),
        ("ddp", 1, "fsdp", 2),
        pytest.param("zero-2", 2, "fsdp", 2, marks=needs_deepspeed),
        pytest.param("ddp", 1, "zero-2", 2, marks=needs_deepspeed),
        pytest.param("zero-3", 2, "zero-2", 1, marks=needs_deepspeed),
    ],
)
def test_killed_and_resumed_on_another_number_of_ranks(arguments, alone, tmp_path, before, ranks, after, ranks_after):
    out = tmp_path / "model"
    kill_at(arguments(out, micro_batches=PARTS, parallel=before), "pretrain", 3, ranks)
    assert list((out / "checkpoints" / "pretrain").glob("step-*")), "nothing to resume from"
    finish(arguments(out, micro_batches=PARTS, parallel=after, resume=True), ranks_after)
    same_training(alone, out)


@pytest.mark.parametrize("engine", ["ddp", "fsdp", pytest.param("zero-2", marks=needs_deepspeed)])
def test_one_rank_killed_and_resumed_is_bitwise_the_same(arguments, tmp_path, engine):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    settings = {"micro_batches": 2, "parallel": engine, "stages": "[pretrain,align]"}
    finish(arguments(straight, **settings), ranks=2)
    kill_at(arguments(killed, **settings), "pretrain", 3, ranks=2, victims=[1])
    kill_at(arguments(killed, resume=True, **settings), "align", 2, ranks=2, victims=[0])
    finish(arguments(killed, resume=True, **settings), ranks=2)
    assert (straight / "metrics.jsonl").read_text() == (killed / "metrics.jsonl").read_text()
    assert (straight / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()


def test_experts_that_idle_on_one_rank(arguments, tmp_path):
    """One row of tokens a micro-batch, eight experts of which one is active: most idle on most ranks in most steps."""
    few = {"model.experts": 8, "model.top_k": 1, "stages": "[finetune]", "finetune.last_targets": 1, "micro_batches": 6}
    finish(arguments(tmp_path / "one", **few))
    loads = [row["expert_load"] for row in read_metrics(tmp_path / "one" / "metrics.jsonl") if "loss" in row]
    assert all(sum(load) == pytest.approx(1) for load in loads)
    for engine in ["ddp", "fsdp"] + ["zero-2"] * (importlib.util.find_spec("deepspeed") is not None):
        finish(arguments(tmp_path / engine, parallel=engine, **few), ranks=2)
        same_weights = load_file(tmp_path / engine / "model.safetensors")
        for name, value in load_file(tmp_path / "one" / "model.safetensors").items():
            torch.testing.assert_close(same_weights[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_divergence_is_named_by_every_engine(arguments, tmp_path, engine):
    settings = {
        "micro_batches": 2,
        "parallel": engine,
        "pretrain.optimizer.lr": 1e30,
        "pretrain.optimizer.warmup_steps": 0,
    }
    assert exit_codes(start(arguments(tmp_path / "model", **settings), 2, tmp_path / "errors")) == [2, 2]
    assert "is not finite at step 1; try a lower pretrain.optimizer.lr, now 1e+30" in (tmp_path / "errors").read_text()


def test_what_the_first_rank_refuses_all_refuse(arguments, alone, tmp_path):
    assert exit_codes(start(arguments(alone, micro_batches=PARTS), 2, tmp_path / "errors")) == [2, 2]
    assert (tmp_path / "errors").read_text().count("already holds a run") == 1


def test_ranks_that_do_not_divide_a_step(arguments, tmp_path):
    assert exit_codes(start(arguments(tmp_path / "model", micro_batches=3), 2, tmp_path / "errors")) == [2, 2]
    assert "micro_batches is 3; expected a multiple of the 2 ranks" in (tmp_path / "errors").read_text()


def test_two_runs_into_one_directory(arguments, tmp_path):
    endless = arguments(tmp_path / "model", micro_batches=2, pretrain__epochs=100_000)
    first = start(endless, ranks=2)
    while not (tmp_path / "model" / "metrics.jsonl").exists():
        assert first[0].is_alive()
    assert exit_codes(start(endless, 2, tmp_path / "errors")) == [3, 2]
    assert "is in use by another run" in (tmp_path / "errors").read_text()
    assert [process.is_alive() for process in first] == [True, True], "the first run was disturbed"
    exit_codes(first, seconds=0)


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "genrec")
DEEPSPEED = (
    "deepspeed.launcher.runner",
    "--no_local_rank",
    "--num_nodes",
    "1",
    "--num_gpus",
    "2",
    "--master_port",
    "{port}",
    "--module",
    "genrec",
)


@pytest.mark.parametrize(
    ("launcher", "engine"), [(TORCHRUN, "ddp"), pytest.param(DEEPSPEED, "zero-2", marks=needs_deepspeed)]
)
def test_launchers(arguments, alone, tmp_path, launcher, engine):
    argv = arguments(tmp_path / "model", micro_batches=PARTS, parallel=engine)
    command = [sys.executable, "-m", *(word.format(port=free_port()) for word in launcher), *argv]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained") == 1
    same_training(alone, tmp_path / "model")


def test_weights_of_another_model_are_not_resumed(arguments, tmp_path):
    """A checkpoint that is whole and wrong is one sentence, not a trace."""
    out = tmp_path / "model"
    kill_at(arguments(out), "pretrain", 5)
    for checkpoint in (out / "checkpoints" / "pretrain").glob("step-*"):
        save_file({"codes": torch.zeros(1)}, checkpoint / "weights.safetensors")
    finish(arguments(out, resume=True))  # checksums do not match: the stage starts over
