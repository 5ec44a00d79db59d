"""The training loop: the stages one after the other, each from the weights of the one before."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from genrec.data.files import atomic_file
from genrec.kernels.ranges import span
from genrec.models.ugt import UGT
from genrec.training.checkpoint import Checkpoint, load_newest_checkpoint, save_checkpoint
from genrec.training.config import OptimizerConfig, TrainConfig
from genrec.training.engines.torch import TorchEngine
from genrec.training.log import MetricsLog
from genrec.training.stages import Stage
from genrec.training.validation import Validator


@dataclass(frozen=True)
class Plan:
    """How long a stage runs. A refit repeats the first `stop` steps of a schedule laid out for `total`."""

    total: int
    stop: int


@dataclass
class Progress:
    """Where a stage stands; everything here goes into its checkpoints."""

    step: int = 0  # optimizer steps done
    best_step: int = 0
    best: float = -1.0  # of stage.select_by, on the validation events


def run_stage(
    stage: Stage, model: UGT, plan: Plan, config: TrainConfig, log: MetricsLog, validator: Validator | None
) -> Progress:
    """Train `model` in place and leave the best weights in it, or the last ones where there is no validator."""
    directory = config.out / "checkpoints" / stage.name
    best_weights = directory / "best.safetensors"
    engine = TorchEngine(model, stage.optimizer, config.precision)
    progress = _restore(directory, model, engine)
    log.rewind(stage.name, progress.step)
    validate_every = max(1, round(config.validate_every * stage.steps_per_epoch))

    def validate() -> None:
        if validator is None:
            return
        with span("validation"):
            metrics = validator(model)
        log.write(stage.name, progress.step, **{f"valid_{name}": value for name, value in metrics.items()})
        metric = metrics[stage.select_by]
        bar.set_postfix_str(f"valid {stage.select_by} {metric:.4f}")
        if metric > progress.best:
            progress.best, progress.best_step = metric, progress.step
            with atomic_file(best_weights) as temporary:
                save_file(model.state_dict(), temporary)

    with span(stage.name), tqdm(total=plan.stop, initial=progress.step, desc=stage.name, unit="step") as bar:
        if progress.step == 0:
            validate()
        while progress.step < plan.stop:
            values = train_step(stage, model, engine, progress.step, plan.total, config.seed)
            progress.step += 1
            bar.update()
            if progress.step % config.log_every == 0 or progress.step == plan.stop:
                read = {name: float(value) for name, value in values.items()}  # from the device only when it is logged
                log.write(stage.name, progress.step, **read, expert_load=model.router_load())
            if progress.step % validate_every == 0 or progress.step == plan.stop:
                validate()
            if progress.step % config.checkpoint_every == 0 and progress.step < plan.stop:
                save_checkpoint(directory, Checkpoint(model.state_dict(), engine.state(), asdict(progress)))
    if validator is not None:
        model.load_state_dict(load_file(best_weights))
    return progress


def train_step(
    stage: Stage, model: UGT, engine: TorchEngine, step: int, total: int, seed: int
) -> dict[str, Tensor | float]:
    """Step `step` of a schedule laid out for `total`: one batch, its gradients, the optimizer; returns what to log."""
    torch.manual_seed(step_seed(seed, stage.name, step))
    lr = learning_rate(stage.optimizer, step, total)
    model.train()
    with span("step", step=step):
        with span("forward"), engine.autocast():
            loss, values = stage.loss(model, step)
        value = loss.item()
        if not math.isfinite(value):
            raise ValueError(
                f"the loss of {stage.name} is {value} at step {step}; try a lower {stage.name}.optimizer.lr"
            )
        norm = engine.step(loss, lr)
        model.balance_router()
    return {**values, "lr": lr, "gradient_norm": norm}


def _restore(directory: Path, model: UGT, engine: TorchEngine) -> Progress:
    checkpoint = load_newest_checkpoint(directory)
    if checkpoint is None:
        return Progress()
    model.load_state_dict(checkpoint.weights)
    engine.load_state(checkpoint.optimizer)
    return Progress(**checkpoint.state)


def learning_rate(config: OptimizerConfig, step: int, total: int) -> float:
    """Linear warm-up, then a cosine down to final_lr · lr."""
    warmup = min(config.warmup_steps, total // 2)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def step_seed(seed: int, stage: str, step: int) -> int:
    """The seed of all randomness of one step, so that a resumed run needs no generator state."""
    return int(np.random.SeedSequence([seed, *stage.encode(), step]).generate_state(1)[0])
