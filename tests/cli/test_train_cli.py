"""genrec train as a user types it."""

import json
import re

import pytest
import small
import yaml

from genrec.cli import main
from genrec.training.log import read_metrics


def settings(trained, out, **changes):
    return {
        "features": trained / "features",
        "semantic_ids": trained / "tokenizer",
        "out": out,
        **small.TINY_RUN,
        **changes,
    }


def words(values):
    return [str(word) for key, value in values.items() for word in (f"--{key}", value)]


def test_configuration_file_with_a_size_and_overrides(trained, tmp_path, capsys):
    """As the demo does it: a file that names a size, and keys that win over both."""
    (tmp_path / "size.yaml").write_text(
        yaml.safe_dump({"d_model": 32, "heads": 4, "d_ffn": 20, "token_types": ["item", "time"]})
    )
    (tmp_path / "train.yaml").write_text(
        yaml.safe_dump({
            "features": str(trained / "features"), "semantic_ids": str(trained / "tokenizer"), "out": "unused",
            "model": "size.yaml", "pretrain": {"epochs": 1, "batch_tokens": 200, "optimizer": {"lr": 0.001}},
            "stages": ["pretrain", "finetune"], "finetune": {"epochs": 0.5, "batch_tokens": 100},
        })
    )  # fmt: skip
    out = tmp_path / "model"
    arguments = ["--config", str(tmp_path / "train.yaml"), "--out", str(out), "--model.heads", "2"]
    assert main(["train", *arguments, "--threads", "1", "--recommender.beams", "5"]) == 0
    record = json.loads((out / "model.json").read_text())
    model = record["model"]
    assert (model["d_model"], model["heads"], model["d_ffn"]) == (32, 2, 20)
    assert model["token_types"] == ["item", "time"]
    assert model["encoder_layers"] == 2, "what nobody says keeps its default"
    assert record["recommender"]["beams"] == 5
    assert list(record["stages"]) == ["pretrain", "finetune"]
    config = json.loads((out / "config.json").read_text())
    assert config["pretrain"]["optimizer"] == {
        "lr": 0.001,
        "warmup_steps": 100,
        "final_lr": 0.05,
        "weight_decay": 0.01,
        "clip_norm": 1.0,
    }
    captured = capsys.readouterr()
    assert f"parameters → {out}" in captured.out
    assert "pretrain" in captured.err
    assert "align" not in captured.err


@pytest.mark.parametrize("name", ["tiny", "base", "paper"])
def test_shipped_sizes_are_understood(name, trained, tmp_path, refused):
    """A size file, and then something wrong on purpose, so that nothing is trained."""
    size = small.MOVIELENS.parents[1] / "configs" / "ugt" / f"{name}.yaml"
    values = {"features": "nowhere", "semantic_ids": "nowhere", "out": tmp_path, "model": size}
    refused(["train", *words(values)], 2, "nowhere")


def test_every_stage_says_what_it_changed(trained, tmp_path, capsys):
    assert main(["train", *words(settings(trained, tmp_path / "model"))]) == 0
    number = r"(-?\d\.\d{4})"
    changes = ", ".join(rf"{key} {number} → {number}" for key in ("recall@10", "ndcg@10", "liked_ndcg@10", "validity"))
    said = capsys.readouterr().err
    for stage in ("pretrain", "finetune"):
        assert re.search(rf"^{stage}, validation: {changes}$", said, re.MULTILINE)
    expected = rf"^align, validation: {changes}, reward of training 0 → {number}$"
    *_, reward = re.search(expected, said, re.MULTILINE).groups()
    rows = [row["reward"] for row in read_metrics(tmp_path / "model" / "metrics.jsonl") if "reward" in row]
    assert min(rows) <= float(reward) + 1e-4
    assert float(reward) <= max(rows) + 1e-4


def test_second_run_into_the_same_directory(trained, refused):
    before = (trained / "model" / "model.safetensors").read_bytes()
    refused(["train", *words(settings(trained, trained / "model"))], 2, "already holds a run", "--overwrite true")
    assert (trained / "model" / "model.safetensors").read_bytes() == before


def test_resume_with_a_changed_key(trained, refused):
    changed = settings(trained, trained / "model", **{"resume": "true", "align.beta": 0.5})
    refused(["train", *words(changed)], 2, "resume: align.beta is 0.5", "began with 0.1")


def test_out_is_a_file(trained, tmp_path, refused):
    (tmp_path / "file").write_text("x")
    refused(["train", *words(settings(trained, tmp_path / "file"))], 2, "file")


def test_semantic_ids_of_another_catalogue(trained, tmp_path, refused):
    index = tmp_path / "X.index.json"
    index.write_text('{"someone else": ["<a_1>", "<b_2>"]}')
    refused(
        ["train", *words(settings(trained, tmp_path / "model", semantic_ids=index))], 2, "X.index.json has no codes for"
    )
