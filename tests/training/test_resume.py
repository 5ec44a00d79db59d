"""kill -9 at any moment, --resume true: the same losses and the same weights as a run that was never stopped."""

import json
import re
import resource
import subprocess
import sys

import pytest
from processes import exit_codes, finish, kill_at, start
from safetensors.torch import load_file

from genrec.training.log import read_metrics


@pytest.fixture(scope="module")
def straight(arguments, tmp_path_factory):
    """The directory of a run that was never stopped."""
    out = tmp_path_factory.mktemp("straight") / "model"
    finish(arguments(out))
    return out


def same_run(one, other):
    assert (one / "metrics.jsonl").read_text().splitlines() == (other / "metrics.jsonl").read_text().splitlines()
    for file in (
        "model.safetensors",
        *(f"stages/{name}/model.safetensors" for name in ("pretrain", "finetune", "align")),
    ):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
    mine, theirs = (json.loads((path / "model.json").read_text()) for path in (one, other))
    for record in (mine, theirs):
        for stage in record["stages"].values():
            stage.pop("seconds")
    assert mine == theirs


def test_the_straight_run_is_what_it_should_be(straight):
    rows = read_metrics(straight / "metrics.jsonl")
    for stage in ("pretrain", "finetune", "align"):
        losses = [row["step"] for row in rows if row["stage"] == stage and "loss" in row]
        assert losses == list(range(1, len(losses) + 1))
        assert len(losses) >= 6
        validations = [row["step"] for row in rows if row["stage"] == stage and "valid_ndcg@10" in row]
        assert validations == [0, len(losses) // 2, len(losses)]
        assert all(abs(sum(row["expert_load"]) - 1) < 1e-5 for row in rows if row["stage"] == stage and "loss" in row)
    assert not (straight / "checkpoints").exists()
    weights = load_file(straight / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_the_same_command_gives_the_same_run(arguments, straight, tmp_path):
    finish(arguments(tmp_path / "model"))
    same_run(straight, tmp_path / "model")


def test_killed_in_every_stage_with_damaged_files(arguments, straight, tmp_path):
    out = tmp_path / "model"
    kill_at(arguments(out), "pretrain", 0)  # before any checkpoint
    kill_at(arguments(out, resume=True), "pretrain", 5)
    newest = sorted((out / "checkpoints" / "pretrain").glob("step-*"))[-1] / "weights.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    kill_at(arguments(out, resume=True), "finetune", 3)
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"stage": "finetune", "st')
    kill_at(arguments(out, resume=True), "align", 3)
    for file in (out / "checkpoints" / "align").glob("step-*/state.json"):
        file.write_text("")  # none is whole: the stage starts over
    finish(arguments(out, resume=True))
    same_run(straight, out)


def test_a_disk_that_fills_up(arguments, straight, tmp_path):
    """No file may be larger than the weights, as an optimizer's state is: one sentence, nothing half written, and the
    run goes on where there is room."""
    out, most = tmp_path / "model", int(1.1 * (straight / "model.safetensors").stat().st_size)

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    command = [sys.executable, "-m", "genrec", *arguments(out)]
    done = subprocess.run(command, preexec_fn=limited, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    message = done.stderr.splitlines()[-1]
    assert re.search(
        r"^genrec train: error: .*/checkpoints/pretrain/step-00000002 could not be written \(.+\)$", message
    )
    assert [path.name for path in (out / "checkpoints" / "pretrain").iterdir()] == ["best.safetensors"]
    finish(arguments(out, resume=True))
    same_run(straight, out)


@pytest.mark.parametrize("delay", [0.3, 0.6, 0.9])
def test_killed_at_any_time(arguments, straight, tmp_path, delay):
    out = tmp_path / "model"
    exit_codes(start(arguments(out)), delay)
    finish(arguments(out, resume=True))
    same_run(straight, out)


def test_resuming_a_finished_run_changes_nothing(arguments, straight):
    before = {
        path: path.read_bytes() for path in straight.rglob("*") if path.suffix in (".json", ".jsonl", ".safetensors")
    }
    finish(arguments(straight, resume=True))
    assert {path: path.read_bytes() for path in before} == before
