"""Where the time goes, in a short, warmed, marked window: of training, of generation, or of one operator.

genrec profile train    --config configs/movielens/train.yaml --stage pretrain --out profiles
genrec profile generate --model runs/demo/model --users 32 --out profiles
genrec profile op       --name moe_experts --rows 2048 --dim 256 --hidden 512 --out profiles

Prints the time of every range, writes it as a table, and beside it a report that opens in Nsight Systems or Nsight
Compute where one of them is on PATH, else a trace that opens in Perfetto.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from genrec.data.chunks import stream_sequences
from genrec.data.sequences import load_sequences, take_users
from genrec.data.split import load_split
from genrec.generation import Recommender
from genrec.generation.storage import load_model, trained_on
from genrec.profiling.operators import OperatorConfig, operator_call
from genrec.profiling.window import SUFFIX, WindowConfig, nsight_tool, relaunch, run_window
from genrec.training.config import TrainConfig
from genrec.training.engines.torch import TorchEngine
from genrec.training.run import build_model, training_device
from genrec.training.stages import build_stage
from genrec.training.step import Trainer


@dataclass(frozen=True)
class Train(TrainConfig, WindowConfig):
    """Steps of a stage, from fresh weights; nothing is validated or saved. The keys are those of genrec train."""

    stage: Literal["pretrain", "finetune", "align"] = "pretrain"
    """whose steps"""


@dataclass(frozen=True)
class Generate(WindowConfig):
    """Requests to a trained model."""

    model: Path
    """directory written by genrec train"""
    out: Path
    """directory of the report, the table and the trace"""
    users: int = 32
    """histories of the log in one request"""
    top_k: int = 10
    """items for each"""
    beams: int | None = None
    """width of the beam search; what the model was saved with unless told otherwise"""
    threads: int = 0
    """CPU threads; 0 takes all cores"""


@dataclass(frozen=True)
class Op(OperatorConfig, WindowConfig):
    """One operator on random data."""

    out: Path = Path("profiles")
    """directory of the report, the table and the trace"""
    threads: int = 0
    """CPU threads; 0 takes all cores"""


COMMANDS = {"train": Train, "generate": Generate, "op": Op}
Config = Train | Generate | Op


def run(config: Config) -> None:
    """Profile the window, in the tool's child where there is a tool."""
    config.check()
    kind = type(config).__name__.lower()
    torch.set_num_threads(config.threads or torch.get_num_threads())
    config.out.mkdir(parents=True, exist_ok=True)
    tool = nsight_tool(config, ("ncu", "nsys") if kind == "op" else ("nsys", "ncu"))
    if tool:
        report = config.out / f"{kind}{SUFFIX[tool]}"
        relaunch(tool, kind, config, report)
        print(f"report → {report}")
        return
    step, device = _STEPS[kind](config)
    run_window(kind, step, config, config.out, device)


Step = tuple[Callable[[int], object], torch.device]


def _train(config: Train) -> Step:
    model = build_model(config).to(training_device(config.device))
    split = load_split(config.features)
    sequences = stream_sequences(config.features, config.chunk_events, config.micro_batches)
    events = sequences.map(lambda chunk: split.cut(chunk, "valid")[0])
    stage = build_stage(config.stage, config, model, events)
    if config.compile:
        model.compile_layers()
    engine, total = TorchEngine(model, stage.optimizer, config), config.warmup + config.steps
    trainer = Trainer(stage, model, engine, total, config.seed)
    batches = trainer.micro_batches(0, sys.maxsize, config.micro_batches)  # as many as the window asks for
    return lambda i: trainer.step(i, next(batches)), engine.device


def _generate(config: Generate) -> Step:
    model, settings = load_model(config.model)
    settings = replace(settings, beams=config.beams or settings.beams)
    sequences = load_sequences(trained_on(config.model))
    if not 1 <= config.users <= len(sequences):
        raise ValueError(f"users is {config.users}; expected 1 to {len(sequences)}, as many as the log has")
    histories = take_users(sequences, np.linspace(0, len(sequences) - 1, num=config.users, dtype=int))
    recommender = Recommender(model, settings, batch_size=config.users)
    return lambda i: recommender.rank(histories, config.top_k), recommender.device


def _op(config: Op) -> Step:
    device = torch.device(training_device(config.device))
    call = operator_call(config, device)
    return lambda i: call(), device


_STEPS: dict[str, Callable[..., Step]] = {"train": _train, "generate": _generate, "op": _op}
