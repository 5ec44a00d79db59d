"""One run of `genrec train`: read the data, build the model, go through the stages, keep what a user needs."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from genrec.data.catalogue import load_catalogue, load_semantic_ids, vocabulary_hash
from genrec.data.chunks import Chunks, stream_sequences
from genrec.data.files import atomic_directory, atomic_file, locked
from genrec.data.split import Split, load_split
from genrec.data.transitions import strongest_transitions
from genrec.data.vocabulary import load_vocabulary
from genrec.generation.storage import load_model, read_model_json, save_model
from genrec.models.ugt import UGT, ModelVocabulary
from genrec.training.config import TrainConfig
from genrec.training.log import MetricsLog, NoLog, read_metrics
from genrec.training.loop import Plan, Progress, run_stage
from genrec.training.ranks import Ranks, joined
from genrec.training.stages import Stage, build_stage
from genrec.training.step import say
from genrec.training.validation import Validator

# these may differ when a run is resumed: the engine and the number of ranks change nothing but rounding
NOT_PART_OF_THE_RUN = ("out", "resume", "overwrite", "threads", "parallel", "recompute", "compile")
Chosen = dict[str, Any] | None  # model.json of the run that is refitted


def train(config: TrainConfig) -> UGT:
    """Run all stages; the directory config.out then holds model.safetensors, model.json and metrics.jsonl."""
    torch.set_num_threads(config.threads or torch.get_num_threads())
    with joined(training_device(config.device), always=config.parallel.startswith("zero")) as ranks:
        if config.micro_batches % ranks.world:
            raise ValueError(f"micro_batches is {config.micro_batches}; expected a multiple of the {ranks.world} ranks")
        sequences = stream_sequences(config.features, config.chunk_events, config.micro_batches)
        chosen = _chosen_before(config)
        with ExitStack() as held:
            ranks.on_first(lambda: held.enter_context(locked(config.out)))
            return _train(config, sequences, chosen, ranks)


def _train(config: TrainConfig, sequences: Chunks, chosen: Chosen, ranks: Ranks) -> UGT:
    model, split = build_model(config), load_split(config.features)
    validator = None if config.refit else _validator(sequences, split, config, config.valid_users, ranks)
    ranks.on_first(lambda: _prepare_directory(config))  # last of all that can fail early: a mistyped path costs no run
    if ranks.on_first((config.out / "model.json").is_file):  # written last: this run is resumed after its end
        return load_model(config.out)[0]
    events = sequences.map(lambda chunk: split.cut(chunk, "test" if config.refit else "valid")[0])
    if config.model.transitions:  # counted by one rank, whose memory holds the counts once
        model.remember(
            ranks.on_first(lambda: strongest_transitions(events, model.vocabulary.items, config.model.transitions))
        )
    with MetricsLog(config.out) if ranks.first else NoLog() as log:
        stages = {
            name: _finish_stage(name, model, events, config, chosen, log, validator, ranks) for name in config.stages
        }
    model = model.to(ranks.device)
    recommender = dataclasses.replace(config.recommender, alpha=_alpha(model, sequences, split, config, chosen, ranks))
    data = {
        "features": str(config.features), "semantic_ids": str(config.semantic_ids), **split.to_json(),
        "held_out": 1 if config.refit else 2,  # the test part, and the validation part unless this is a refit
        "vocabulary_hash": vocabulary_hash(load_catalogue(config.features), load_vocabulary(config.features)),
    }  # fmt: skip
    ranks.on_first(lambda: save_model(config.out, model, recommender, data=data, stages=stages))
    ranks.on_first(lambda: shutil.rmtree(config.out / "checkpoints", ignore_errors=True))
    return model


def build_model(config: TrainConfig) -> UGT:
    """A fresh model on the CPU, whose weights are a function of the seed and of the item features."""
    catalogue = load_catalogue(config.features)
    semantic_ids = load_semantic_ids(config.semantic_ids, catalogue)
    vocabulary = ModelVocabulary(
        catalogue.size, semantic_ids.codebook_sizes, load_vocabulary(config.features).type_sizes
    )
    torch.manual_seed(config.seed)
    model = UGT(config.model, vocabulary, torch.from_numpy(semantic_ids.codes))
    model.place_items(torch.from_numpy(catalogue.features))
    return model


def _finish_stage(
    name: str,
    model: UGT,
    events: Chunks,
    config: TrainConfig,
    chosen: Chosen,
    log: MetricsLog,
    validator: Validator | None,
    ranks: Ranks,
) -> dict[str, Any]:
    """Train a copy of `model` in a stage, which engines may take apart, and give its weights to `model`; or those that
    an earlier part of this run already has."""
    done = config.out / "stages" / name
    if not ranks.on_first(done.is_dir):
        began = time.monotonic()
        trained = copy.deepcopy(model).to(ranks.device)
        stage = build_stage(name, config, trained, events, ranks)
        plan = _plan(stage, chosen)
        progress, weights = run_stage(stage, trained, plan, config, log, validator, ranks)
        record: dict[str, Any] = {
            "steps": plan.total, "applied": progress.applied, "best_step": plan.stop, "best": None,
            "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip
        if validator is not None:
            record |= {"best_step": progress.best_step, "best": progress.best}
            record |= {"before": progress.before, "after": progress.after}
            if ranks.first:
                say(ranks, _report(name, progress, read_metrics(config.out / "metrics.jsonl")))
        ranks.on_first(lambda: _keep_stage(done, weights, record))
    model.load_state_dict(load_file(done / "model.safetensors"))
    return json.loads((done / "stage.json").read_text())


def _report(name: str, progress: Progress, logged: list[dict[str, Any]]) -> str:
    """What the stage changed on the validation events, in one line; where it has a reward also that, which begins at 0:
    the mean of the last quarter of the lines that it logged."""
    shown = ("recall@10", "ndcg@10", "liked_ndcg@10", "validity")
    changes = [f"{key} {progress.before[key]:.4f} → {progress.after[key]:.4f}" for key in shown]
    if rewards := [row["reward"] for row in logged if row["stage"] == name and "reward" in row]:
        changes.append(f"reward of training 0 → {mean(rewards[len(rewards) * 3 // 4 :]):.4f}")
    return f"{name}, validation: {', '.join(changes)}"


def _keep_stage(directory: Path, weights: dict[str, Tensor], record: dict[str, Any]) -> None:
    with atomic_directory(directory) as temporary:
        save_file(weights, temporary / "model.safetensors")
        (temporary / "stage.json").write_text(json.dumps(record))


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


def _alpha(model: UGT, sequences: Chunks, split: Split, config: TrainConfig, chosen: Chosen, ranks: Ranks) -> float:
    if chosen is not None:
        return float(chosen["recommender"]["alpha"])
    return _validator(sequences, split, config, config.alpha_users, ranks).best_alpha(model, config.alphas)


def _validator(sequences: Chunks, split: Split, config: TrainConfig, users: int, ranks: Ranks) -> Validator:
    return Validator(sequences, config.recommender, users, config.seed, config.finetune.liked_from, ranks, split)


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
