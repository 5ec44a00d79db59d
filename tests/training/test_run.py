"""genrec train as a whole: what it writes, what it refuses, and what a refit repeats."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small
import torch
from safetensors.torch import load_file

from genrec.cli import main
from genrec.data.catalogue import load_catalogue, vocabulary_hash
from genrec.data.chunks import Chunks
from genrec.data.files import locked
from genrec.data.sequences import leave_out, load_sequences
from genrec.data.split import ByTime, save_split, split_from_json
from genrec.data.transitions import strongest_transitions
from genrec.data.vocabulary import load_vocabulary
from genrec.evaluation.metrics import rank_metrics
from genrec.generation import Recommender
from genrec.generation.storage import load_model
from genrec.models.ugt.layers import MixtureOfExperts
from genrec.training import run as run_module
from genrec.training.config import AlignConfig, FinetuneConfig, OptimizerConfig, PretrainConfig, TrainConfig
from genrec.training.engines.parts import LossScale
from genrec.training.log import read_metrics
from genrec.training.run import train
from genrec.training.validation import Validator

STAGES = {"pretrain": "valid_ndcg@10", "finetune": "valid_liked_ndcg@10", "align": "valid_liked_ndcg@10"}


@pytest.fixture(scope="module")
def config(inputs, tmp_path_factory):
    """Of a small run; tests replace `out` and more."""
    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=2)
    return TrainConfig(
        features=inputs[0], semantic_ids=inputs[1], out=tmp_path_factory.mktemp("run") / "model", model=small.config(),
        pretrain=PretrainConfig(epochs=4, batch_tokens=60, optimizer=optimizer),
        finetune=FinetuneConfig(epochs=2, batch_tokens=60, optimizer=optimizer),
        align=AlignConfig(epochs=1, batch_tokens=60, beams=8, optimizer=optimizer),
        recommender=dataclasses.replace(TrainConfig.__dataclass_fields__["recommender"].default_factory(), beams=8),
        threads=1, precision="float32", device="cpu", log_every=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(config):
    """The directory of the finished run."""
    train(config)
    return config.out


def facts(directory):
    return json.loads((directory / "model.json").read_text())


def test_what_a_run_leaves_behind(finished, config):
    names = {path.name for path in finished.iterdir()} - {".lock"}
    assert names == {"config.json", "metrics.jsonl", "model.json", "model.safetensors", "stages", "tensorboard"}
    record = facts(finished)
    known_by = vocabulary_hash(load_catalogue(config.features), load_vocabulary(config.features))
    assert record["data"] == {
        "features": str(config.features), "semantic_ids": str(config.semantic_ids), "split": "leave_one_out",
        "held_out": 2, "vocabulary_hash": known_by,
    }  # fmt: skip
    rows = read_metrics(finished / "metrics.jsonl")
    for name, key in STAGES.items():
        stage = record["stages"][name]
        logged = [row["step"] for row in rows if row["stage"] == name and "loss" in row]
        assert logged == sorted({*range(3, stage["steps"] + 1, 3), stage["steps"]})
        validations = {row["step"]: row[key] for row in rows if row["stage"] == name and key in row}
        assert stage["best"] == max(validations.values())
        assert validations[stage["best_step"]] == stage["best"]
        assert stage["best_step"] == min(step for step, value in validations.items() if value == stage["best"])
    model, _ = load_model(finished)
    last = load_file(finished / "stages" / "align" / "model.safetensors")
    assert all(torch.equal(value, last[name]) for name, value in model.state_dict().items())


def test_training_learns(finished):
    rows = read_metrics(finished / "metrics.jsonl")
    losses = [row["loss"] for row in rows if row["stage"] == "pretrain" and "loss" in row]
    assert losses[-1] < losses[0] - 0.5


def test_validation_is_leave_one_out_without_the_test_event(finished, config):
    """The second to last event of every user, from what lies before it; align keeps what is best on liked ones."""
    sequences = load_sequences(config.features)
    histories, targets, liked = [], [], []
    for user in range(len(sequences)):
        items = sequences.item_ids[sequences.cu_events[user] : sequences.cu_events[user + 1]]
        if len(items) >= 3 and items[-2]:
            histories.append(items[:-2].tolist())
            targets.append(items[-2])
            liked.append(not sequences.ratings[sequences.cu_events[user + 1] - 2] < config.finetune.liked_from)
    model, settings = load_model(finished)
    settings = dataclasses.replace(settings, alpha=config.recommender.alpha)
    ranked = Recommender(model, settings).rank(small.sequences(histories), 10)
    assert 0 < sum(liked) < len(liked)
    metrics = rank_metrics(ranked[liked], np.array(targets)[liked], ks=(5, 10))
    assert metrics["ndcg@10"] == pytest.approx(facts(finished)["stages"]["align"]["best"])
    everyone = rank_metrics(ranked, np.array(targets), ks=(5, 10))
    validator = Validator(
        Chunks.of(sequences), config.recommender, config.valid_users, config.seed, config.finetune.liked_from
    )
    measured = validator(model)
    assert 0 <= measured.pop("validity") <= 1
    assert measured == pytest.approx(everyone | {f"liked_{key}": value for key, value in metrics.items()})


def test_alpha_is_the_best_of_the_candidates(finished, config):
    """One pass for all alphas chooses what a validation of each alone chooses."""
    model, settings = load_model(finished)
    sequences, scores = load_sequences(config.features), {}
    for alpha in config.alphas:
        mixed = dataclasses.replace(config.recommender, alpha=alpha)
        scores[alpha] = Validator(Chunks.of(sequences), mixed, config.alpha_users, config.seed, 4.0)(model)["ndcg@10"]
    assert settings.alpha == min(alpha for alpha in scores if scores[alpha] == max(scores.values()))


def test_validator_draws_users_by_seed(config):
    sequences = load_sequences(config.features)
    few = [Validator(Chunks.of(sequences), config.recommender, 5, seed, 4.0) for seed in (0, 0, 1)]
    assert [len(v.histories) for v in few] == [5, 5, 5]
    assert few[0].histories.user_ids.tolist() == few[1].histories.user_ids.tolist()
    assert few[0].histories.user_ids.tolist() != few[2].histories.user_ids.tolist()
    with pytest.raises(ValueError, match="no user has three events or more"):
        Validator(Chunks.of(small.sequences([[1, 2], [3]])), config.recommender, 5, 0, 4.0)


def test_model_trains_without_the_two_last_events(finished, config, tmp_path, monkeypatch):
    """Validation and test events reach no stage and no memory; after a refit only the test event is unseen."""
    given, models = [], []
    monkeypatch.setattr(
        run_module,
        "build_stage",
        lambda _, __, model, events, ranks: models.append(model) or given.append(events) or 1 / 0,
    )
    sequences = load_sequences(config.features)
    config = dataclasses.replace(config, model=small.config(transitions=3))
    for number, refit in ((2, None), (1, finished)):
        with pytest.raises(ZeroDivisionError):
            train(dataclasses.replace(config, out=tmp_path / str(number), refit=refit))
        expected = leave_out(sequences, number)[0]
        assert given[-1].read(0).item_ids.tolist() == expected.item_ids.tolist()
        assert np.array_equal(given[-1].read(0).cu_events, expected.cu_events)
        remembered = strongest_transitions([expected], models[-1].vocabulary.items, 3)
        assert models[-1].transition_items.tolist() == remembered.items.tolist()
        assert models[-1].transition_weights.tolist() == remembered.weights.tolist()
        assert given[-1].read(0).item_ids.size == sequences.item_ids.size - number * len(sequences)


def test_split_by_time_reaches_training_and_validation(finished, config, tmp_path, monkeypatch):
    """Training ends where validation begins, after a refit where the test does; model.json says so."""
    features = tmp_path / "features"
    shutil.copytree(config.features, features)
    times = np.sort(load_sequences(features).timestamps)
    split = ByTime(*(int(times[len(times) * share // 10]) for share in (6, 8)))
    save_split(features, split)
    given = []
    build = run_module.build_stage
    monkeypatch.setattr(run_module, "build_stage", lambda *arguments: given.append(arguments[3]) or build(*arguments))
    config = dataclasses.replace(config, features=features, stages=("pretrain",))
    train(dataclasses.replace(config, out=tmp_path / "run"))
    train(dataclasses.replace(config, out=tmp_path / "refit", refit=tmp_path / "run"))
    for events, until in zip(given, (split.valid_from, split.test_from), strict=True):
        seen = events.read(0).timestamps
        assert seen.size > 0
        assert (seen < until).all()
        assert len(seen) == (times < until).sum()
    for name, held_out in (("run", 2), ("refit", 1)):
        data = facts(tmp_path / name)["data"]
        assert (data["held_out"], split_from_json(data)) == (held_out, split)
    validator = Validator(Chunks.of(load_sequences(features)), config.recommender, 99, 0, 4.0, split=split)
    assert (validator.histories.timestamps < split.valid_from).all()
    assert validator.targets.all()


def test_refit_repeats_the_chosen_steps_and_alpha(finished, config, tmp_path):
    record = facts(finished)
    for number, name in enumerate(STAGES):  # pretend that the run chose these
        record["stages"][name] |= {"steps": 20 + number, "best_step": number}
    record["recommender"]["alpha"] = 0.125
    chosen = tmp_path / "chosen"
    chosen.mkdir()
    (chosen / "model.json").write_text(json.dumps(record))
    out = tmp_path / "refit"
    train(dataclasses.replace(config, out=out, refit=chosen, log_every=1))
    rows = read_metrics(out / "metrics.jsonl")
    for number, name in enumerate(STAGES):
        steps = [row["step"] for row in rows if row["stage"] == name]
        assert steps == list(range(1, number + 1))
    assert not any(key.startswith("valid") for row in rows for key in row), "a refit has nothing to validate on"
    after = facts(out)
    assert after["recommender"]["alpha"] == 0.125
    assert after["data"]["held_out"] == 1
    assert {name: (s["steps"], s["best_step"]) for name, s in after["stages"].items()} == {
        name: (20 + number, number) for number, name in enumerate(STAGES)
    }
    rates = [row["lr"] for row in rows if row["stage"] == "align"]
    assert rates == pytest.approx([1e-2 / 2, 1e-2]), "the schedule is laid out for all steps, not for the chosen ones"


def refused(argv, capsys, code, *words):
    assert main(argv) == code
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"genrec {argv[0]}: error: ")
    assert "Traceback" not in "\n".join(lines)
    for word in words:
        assert word in lines[-1]


def test_resume_with_another_configuration_is_refused_by_name(arguments, tmp_path, capsys, monkeypatch):
    out = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_finish_stage", lambda *_: 1 / 0)
        assert main(arguments(out)) == 1  # a run that stops right after it began
    capsys.readouterr()
    for change, words in {
        "pretrain.epochs": ("pretrain.epochs is 5.0", "began with 2.0"),
        "model.d_model": ("model.d_model is 32", "began with 16"),
        "align.optimizer.lr": ("align.optimizer.lr is 5.0", "began with 0.0002"),
        "seed": ("seed is 5", "began with 0"),
    }.items():
        value = 32 if change == "model.d_model" else 5
        refused(arguments(out, resume="true", **{change: value}), capsys, 2, "resume: ", *words)
    refused(arguments(out, resume="true", stages="[pretrain]"), capsys, 2, "stages is ['pretrain']")
    refused(arguments(out), capsys, 2, f"{out} already holds a run", "--resume true", "--overwrite true")


def test_resume_of_a_finished_run_works_nothing_out(finished, config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_finish_stage", lambda *_: 1 / 0)
        patch.setattr(run_module, "_alpha", lambda *_: 1 / 0)
        model = train(dataclasses.replace(config, resume=True))
    assert model.state_dict().keys() == load_file(finished / "model.safetensors").keys()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in load_file(finished / "model.safetensors").items())


def test_resume_does_not_turn_a_refit_into_a_run(finished, config, tmp_path, monkeypatch):
    refit = dataclasses.replace(config, out=tmp_path / "refit", refit=finished)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_finish_stage", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(refit)
    with pytest.raises(ValueError, match="resume: refit is None, but the run"):
        train(dataclasses.replace(refit, refit=None, resume=True))


def test_a_directory_in_use_is_refused(arguments, tmp_path, capsys):
    with locked(tmp_path / "model"):
        refused(arguments(tmp_path / "model"), capsys, 3, "is in use by another run")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"semantic_ids": "nowhere"}, "nowhere"),
        ({"features": "nowhere"}, "nowhere"),
        ({"refit": "nowhere"}, "nowhere/model.json does not exist; expected the output of genrec train"),
        ({"device": "abacus"}, "device is 'abacus'; expected cpu"),
        ({"model.token_types": "[item,context]", "model.d_model": 15}, "model.d_model is 15; expected a multiple"),
        ({"pretrain.batch_tokens": 0}, "pretrain.batch_tokens is 0; expected 1 or more"),
        ({"precision": "float8"}, "precision"),
        ({"stages": "[pretrain,dream]"}, "stages has 'dream'"),
        ({"resume": "true", "overwrite": "true"}, "resume and overwrite are both true"),
    ],
)
def test_bad_input_costs_nothing(finished, arguments, tmp_path, capsys, monkeypatch, change, words):
    """One line, exit code 2, and neither a new directory is claimed nor an old run deleted."""
    monkeypatch.chdir(tmp_path)
    refused(arguments(tmp_path / "model", **change), capsys, 2, words)
    assert not (tmp_path / "model" / "config.json").exists()
    before = (finished / "model.safetensors").read_bytes()
    refused(arguments(finished, **({"overwrite": "true"} | change)), capsys, 2, words)
    assert (finished / "model.safetensors").read_bytes() == before


def test_another_vocabulary_of_the_same_size_is_refused(finished, config, tmp_path, capsys):
    """Two items that changed places would silently be each other."""
    shutil.copytree(config.features, tmp_path / "features")
    items = pq.read_table(tmp_path / "features" / "items.parquet")
    names = items["item_id"].to_pylist()
    names[:2] = names[1], names[0]
    swapped = items.set_column(items.schema.get_field_index("item_id"), "item_id", pa.array(names))
    pq.write_table(swapped, tmp_path / "features" / "items.parquet")
    argv = ["evaluate", "--model", str(finished), "--features", str(tmp_path / "features"), "--out", str(tmp_path)]
    refused(argv, capsys, 2, "has another vocabulary than the model")


def test_overwrite_starts_anew(config, tmp_path):
    out = tmp_path / "model"
    short = dataclasses.replace(config, out=out, stages=("pretrain",), log_every=1)
    train(short)
    train(dataclasses.replace(short, overwrite=True, seed=1, pretrain=dataclasses.replace(config.pretrain, epochs=1)))
    losses = [row["step"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
    assert losses == list(range(1, facts(out)["stages"]["pretrain"]["steps"] + 1))
    assert json.loads((out / "config.json").read_text())["seed"] == 1


def test_refit_of_a_run_with_other_stages(finished, arguments, tmp_path, capsys):
    record = facts(finished)
    del record["stages"]["align"]
    (tmp_path / "model.json").write_text(json.dumps(record))
    refused(arguments(tmp_path / "model", refit=tmp_path), capsys, 2, "has no stage align")
    assert not (tmp_path / "model" / "config.json").exists()


def test_not_a_number_is_one_sentence_with_a_name(arguments, tmp_path, capsys, monkeypatch):
    original = MixtureOfExperts.forward
    calls = []

    def broken(self, x):
        calls.append(torch.is_grad_enabled())
        return original(self, x) * (float("nan") if sum(calls) >= 4 else 1)

    monkeypatch.setattr(MixtureOfExperts, "forward", broken)
    words = ["pretrain: output of decoder.layers.0.moe is not finite at step 3", "pretrain.optimizer.lr"]
    refused(arguments(tmp_path / "model"), capsys, 2, *words)


def test_overflow_in_float16_is_named_and_left_out(arguments, tmp_path, capsys, monkeypatch):
    original = LossScale.__init__

    def high(self, dynamic):
        original(self, dynamic)
        self.value = 2.0**30 if dynamic else 1.0

    monkeypatch.setattr(LossScale, "__init__", high)
    assert main(arguments(tmp_path / "model", precision="float16", stages="[pretrain]", pretrain__epochs=8)) == 0
    errors = capsys.readouterr().err
    assert re.search(
        r"step 0: gradient of \S+ is not finite at loss scale 1073741824; step left out, scale halved", errors
    )
    rows = [row for row in read_metrics(tmp_path / "model" / "metrics.jsonl") if "loss" in row]
    skipped = errors.count("is not finite at loss scale")
    assert 0 < skipped == rows[-1]["step"] - rows[-1]["applied"] < rows[-1]["step"]
    assert rows[-1]["loss_scale"] == 2.0**30 / 2**skipped
    assert facts(tmp_path / "model")["stages"]["pretrain"]["applied"] == rows[-1]["applied"]


def test_align_stops_where_it_harms(config, tmp_path, capsys, monkeypatch):
    original, calls = Validator.__call__, []

    def measured(self, model):
        calls.append(1)
        return original(self, model) | {"recall@10": 1.0 / len(calls)}

    monkeypatch.setattr(Validator, "__call__", measured)
    few = dataclasses.replace(config, out=tmp_path / "model", stages=("align",), log_every=1)
    train(dataclasses.replace(few, align=dataclasses.replace(config.align, epochs=3, max_recall_loss=0.4)))
    rows = read_metrics(tmp_path / "model" / "metrics.jsonl")
    assert max(row["step"] for row in rows) == facts(tmp_path / "model")["stages"]["align"]["steps"] // 3
    assert "align: recall@10 fell from 1.0000 by more than 40%; stopped at step" in capsys.readouterr().err


def test_seed_decides_the_weights(config, tmp_path):
    weights = []
    for number, seed in enumerate((0, 0, 1)):
        model = run_module.build_model(dataclasses.replace(config, seed=seed, out=tmp_path / str(number)))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
