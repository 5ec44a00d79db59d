"""One run of `genrec train`: read the data, build the model, go through the stages, keep what a user needs."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from genrec.data.catalogue import load_catalogue, load_semantic_ids
from genrec.data.files import atomic_directory, atomic_file, locked
from genrec.data.sequences import leave_out, load_sequences
from genrec.data.vocabulary import load_vocabulary
from genrec.generation.storage import read_model_json, save_model
from genrec.interfaces import EventSequences
from genrec.models.ugt import UGT, ModelVocabulary
from genrec.training.config import TrainConfig
from genrec.training.log import MetricsLog
from genrec.training.loop import Plan, run_stage
from genrec.training.stages import Stage, build_stage
from genrec.training.validation import Validator

NOT_PART_OF_THE_RUN = ("out", "resume", "overwrite", "threads")  # these may differ when a run is resumed
Chosen = dict[str, Any] | None  # model.json of the run that is refitted


def train(config: TrainConfig) -> UGT:
    """Run all stages; the directory config.out then holds model.safetensors, model.json and metrics.jsonl."""
    torch.set_num_threads(config.threads or torch.get_num_threads())
    sequences = load_sequences(config.features)
    chosen = _chosen_before(config)
    with locked(config.out):
        model = build_model(config)
        validator = None if config.refit else _validator(sequences, config, config.valid_users)
        _prepare_directory(config)  # last of all that can fail early, so that a mistyped path costs nobody a run
        held_out = 2 if config.refit is None else 1  # the test event, and the validation event unless this is a refit
        events, _ = leave_out(sequences, held_out)
        with MetricsLog(config.out) as log:
            stages = {
                name: _finish_stage(name, model, events, config, chosen, log, validator) for name in config.stages
            }
        recommender = dataclasses.replace(config.recommender, alpha=_alpha(model, sequences, config, chosen))
        data = {"features": str(config.features), "semantic_ids": str(config.semantic_ids), "held_out": held_out}
        save_model(config.out, model, recommender, data=data, stages=stages)
        shutil.rmtree(config.out / "checkpoints", ignore_errors=True)
    return model


def build_model(config: TrainConfig) -> UGT:
    """A fresh model, whose weights are a function of the seed and of the item features."""
    catalogue = load_catalogue(config.features)
    semantic_ids = load_semantic_ids(config.semantic_ids, catalogue)
    vocabulary = ModelVocabulary(
        catalogue.size, semantic_ids.codebook_sizes, load_vocabulary(config.features).type_sizes
    )
    torch.manual_seed(config.seed)
    model = UGT(config.model, vocabulary, torch.from_numpy(semantic_ids.codes))
    model.place_items(torch.from_numpy(catalogue.features))
    return model.to(training_device(config.device))


def _finish_stage(
    name: str,
    model: UGT,
    events: EventSequences,
    config: TrainConfig,
    chosen: Chosen,
    log: MetricsLog,
    validator: Validator | None,
) -> dict[str, Any]:
    """Run a stage, or take its weights where an earlier part of this run already finished it."""
    done = config.out / "stages" / name
    if not done.is_dir():
        began = time.monotonic()
        stage = build_stage(name, config, model, events)
        plan = _plan(stage, chosen)
        progress = run_stage(stage, model, plan, config, log, validator)
        best_step = plan.stop if validator is None else progress.best_step
        best = None if validator is None else progress.best
        record = {"steps": plan.total, "best_step": best_step, "best": best,
                  "seconds": round(time.monotonic() - began, 1)}  # fmt: skip
        with atomic_directory(done) as temporary:
            save_file(model.state_dict(), temporary / "model.safetensors")
            (temporary / "stage.json").write_text(json.dumps(record))
    model.load_state_dict(load_file(done / "model.safetensors"))
    return json.loads((done / "stage.json").read_text())


def _chosen_before(config: TrainConfig) -> Chosen:
    """The model.json of the run that a refit repeats: how many steps it chose, and which alpha."""
    if config.refit is None:
        return None
    chosen = read_model_json(config.refit)
    for name in config.stages:
        if name not in chosen["stages"]:
            raise ValueError(f"refit: {config.refit} has no stage {name}; expected a run with the same stages")
    return chosen


def _plan(stage: Stage, chosen: Chosen) -> Plan:
    if chosen is None:
        total = round(stage.epochs * stage.steps_per_epoch)
        return Plan(total, total)
    return Plan(chosen["stages"][stage.name]["steps"], chosen["stages"][stage.name]["best_step"])


def _alpha(model: UGT, sequences: EventSequences, config: TrainConfig, chosen: Chosen) -> float:
    if chosen is not None:
        return float(chosen["recommender"]["alpha"])
    return _validator(sequences, config, config.alpha_users).best_alpha(model, config.alphas)


def _validator(sequences: EventSequences, config: TrainConfig, users: int) -> Validator:
    return Validator(sequences, config.recommender, users, config.seed, config.finetune.liked_from)


def _prepare_directory(config: TrainConfig) -> None:
    """Refuse to mix two runs: a directory that holds one is resumed with the same configuration, or replaced."""
    path, record = config.out / "config.json", _record(config)
    if config.overwrite:
        for name in ("checkpoints", "stages", "tensorboard"):
            shutil.rmtree(config.out / name, ignore_errors=True)
        for name in ("config.json", "model.json", "model.safetensors", "metrics.jsonl"):
            (config.out / name).unlink(missing_ok=True)
    if not path.exists():
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n")
        return
    if not config.resume:
        raise FileExistsError(
            f"{config.out} already holds a run; pass --resume true to go on or --overwrite true to start anew"
        )
    before, now = _flat(json.loads(path.read_text())), _flat(record)
    for key, value in now.items():
        if before.get(key) != value:
            raise ValueError(f"resume: {key} is {value}, but the run in {config.out} began with {before.get(key)}")


def _record(config: TrainConfig) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    return json.loads(json.dumps({k: v for k, v in values.items() if k not in NOT_PART_OF_THE_RUN}, default=str))


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"pretrain": {"epochs": 3}} → {"pretrain.epochs": 3}, the keys as a user types them."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def training_device(name: str) -> str:
    """cpu or cuda for what `device` may say; ValueError where there is no such device."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device is {name!r}; expected cpu{', cuda' if torch.cuda.is_available() else ''} or auto")
    return name
