"""The training loop: the steps of one stage, on any number of ranks."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from genrec.data.files import atomic_file
from genrec.kernels.ranges import span
from genrec.models.ugt import UGT, map_tensors
from genrec.training.checkpoint import Checkpoint, load_newest_checkpoint, save_checkpoint
from genrec.training.config import OptimizerConfig, TrainConfig
from genrec.training.diagnosis import first_bad_tensor
from genrec.training.engines import Engine, build_engine
from genrec.training.loader import read_ahead
from genrec.training.log import MetricsLog
from genrec.training.ranks import Ranks
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

    step: int = 0  # batches trained on
    applied: int = 0  # of these, whose gradients were applied: all of them unless float16 overflowed
    best_step: int = 0
    best: float = -1.0  # of stage.select_by, on the validation events
    recall_before: float = 0.0  # recall@10 of the first validation


@dataclass(frozen=True)
class Done:
    """What one step did."""

    values: dict[str, Tensor]  # of this rank's micro-batches; sums over ranks are means over the step
    lr: float
    gradient_norm: float
    applied: bool
    expert_load: Tensor  # (E,) share of the rows


class Trainer:
    """A stage, its model and its engine."""

    def __init__(self, stage: Stage, model: UGT, engine: Engine, total: int, seed: int) -> None:
        self.stage, self.model, self.engine, self.total, self.seed = stage, model, engine, total, seed

    def micro_batches(self, first: int, stop: int, per_step: int) -> Iterator[list[tuple[int, Any]]]:
        """Of every step first … stop - 1 this rank's (number, batch), made ahead of time."""
        ranks, device = self.engine.ranks, self.engine.device
        mine = range(ranks.rank, per_step, ranks.world)

        def load(key: tuple[int, int]) -> Any:
            batch = self.stage.load(*key)
            return map_tensors(Tensor.pin_memory, batch) if device.type == "cuda" else batch

        batches = read_ahead(load, ((step, number) for step in range(first, stop) for number in mine))
        for _ in range(first, stop):
            yield [(key[1], batch) for key, batch in (next(batches) for _ in mine)]

    def step(self, step: int, batches: list[tuple[int, Any]]) -> Done:
        """Step `step` of the schedule: the gradients of this rank's micro-batches, the optimizer."""
        lr = learning_rate(self.stage.optimizer, step, self.total)
        sums: dict[str, Tensor] = {}
        with span("step", step=step):
            for place, (number, batch) in enumerate(batches, start=1):
                prepared = self._prepared(step, number, batch)
                for name, value in self.engine.backward(self.stage.loss, prepared, place == len(batches)).items():
                    sums[name] = sums[name] + value if name in sums else value
            scale = self.engine.scale
            norm, applied = self._applied(step, lr)
            if not applied:
                self._explain(step, batches, scale, norm)
            load = self.model.balance_router(self.engine.ranks.sum)
        return Done(sums, lr, norm, applied, load)

    def _prepared(self, step: int, number: int, batch: Any) -> Any:
        torch.manual_seed(step_seed(self.seed, self.stage.name, step, number))
        self.model.train(not self.stage.on_policy)  # what is compared with a reference has no dropout
        batch = map_tensors(lambda tensor: tensor.to(self.engine.device, non_blocking=True), batch)
        return self.stage.prepare(self.engine.whole(), batch) if self.stage.on_policy else batch

    def _applied(self, step: int, lr: float) -> tuple[float, bool]:
        try:
            return self.engine.step(lr)
        except FloatingPointError as error:
            raise ValueError(f"{self.stage.name}, step {step}: {error}; train in bfloat16 or float32") from None

    def _explain(self, step: int, batches: list[tuple[int, Any]], scale: float, norm: float) -> None:
        """Say where the first value that is not finite came from; outside float16 this is the end."""
        found, model = None, self.engine.whole()
        for number, batch in batches:
            loss = partial(self.stage.loss, model, self._prepared(step, number, batch))
            found = found or first_bad_tensor(model.train(not self.stage.on_policy), loss, scale)
        found = next((name for name in self.engine.ranks.gather(found) if name), "a sum of gradients")
        if scale == 1:
            name = self.stage.name
            raise ValueError(
                f"{name}: {found} is not finite at step {step}; try a lower {name}.optimizer.lr, now "
                f"{self.stage.optimizer.lr}"
            )
        message = f"step {step}: {found} is not finite at loss scale {scale:.0f}; step left out, scale halved"
        _say(self.engine.ranks, message)


def run_stage(
    stage: Stage,
    model: UGT,
    plan: Plan,
    config: TrainConfig,
    log: MetricsLog,
    validator: Validator | None,
    ranks: Ranks | None = None,
) -> tuple[Progress, dict[str, Tensor]]:
    """Train `model` → where it ended, and on the first rank the best weights, or the last ones without a validator."""
    ranks = ranks or Ranks()
    directory = config.out / "checkpoints" / stage.name
    best_weights = directory / "best.safetensors"
    checkpoint = load_newest_checkpoint(directory)
    if checkpoint is not None:
        model.load_state_dict(checkpoint.weights)
    if config.recompute:
        model.recompute_activations()
    if config.compile:
        model.compile_layers()
    engine = build_engine(model, stage.optimizer, config, ranks)
    progress = Progress()
    if checkpoint is not None:
        engine.load_state(checkpoint.optimizer)
        progress = Progress(**checkpoint.state)
    log.rewind(stage.name, progress.step)
    validate_every = max(1, round(config.validate_every * stage.steps_per_epoch))
    trainer = Trainer(stage, model, engine, plan.total, config.seed)

    def write_best(weights: dict[str, Tensor]) -> None:
        with atomic_file(best_weights) as temporary:
            save_file(weights, temporary)

    def validate() -> bool:
        """False where the stage has done harm and should stop."""
        if validator is None:
            return True
        with span("validation"):
            metrics = validator(engine.whole())
        log.write(stage.name, progress.step, **{f"valid_{name}": value for name, value in metrics.items()})
        metric, recall = metrics[stage.select_by], metrics["recall@10"]
        bar.set_postfix_str(f"valid {stage.select_by} {metric:.4f}")
        if progress.step == 0:
            progress.recall_before = recall
        if metric > progress.best:
            progress.best, progress.best_step = metric, progress.step
            weights = engine.weights()
            ranks.on_first(lambda: write_best(weights))
        return recall >= (1 - stage.max_recall_loss) * progress.recall_before

    name = stage.name
    with span(name), tqdm(
        total=plan.stop, initial=progress.step, desc=name, unit="step", disable=not ranks.first
    ) as bar:  # fmt: skip
        if progress.step == 0:
            validate()
        for batches in trainer.micro_batches(progress.step, plan.stop, config.micro_batches):
            done = trainer.step(progress.step, batches)
            progress.step += 1
            progress.applied += done.applied
            bar.update()
            last = progress.step == plan.stop
            if progress.step % config.log_every == 0 or last:
                log.write(name, progress.step, **_values(done, engine), applied=progress.applied)
            if (progress.step % validate_every == 0 or last) and not validate():
                _say(
                    ranks,
                    f"{name}: recall@10 fell from {progress.recall_before:.4f} by more than "
                    f"{stage.max_recall_loss:.0%}; stopped at step {progress.step}, the best weights are kept",
                )
                break
            if progress.step % config.checkpoint_every == 0 and not last:
                checkpoint = Checkpoint(engine.weights(), engine.state(), asdict(progress))
                ranks.on_first(partial(save_checkpoint, directory, checkpoint))
    return progress, engine.weights() if validator is None else load_file(best_weights)


def _say(ranks: Ranks, message: str) -> None:
    """One line on stderr, above the progress bar."""
    if ranks.first:
        tqdm.write(message, file=sys.stderr)


def _values(done: Done, engine: Engine) -> dict[str, Any]:
    """What is logged of a step, read from the device and summed over the ranks only now; to be called by all ranks."""
    names = sorted(done.values)
    sums = engine.ranks.sum(torch.stack([done.values[name].float() for name in names])).tolist()
    scale = {"loss_scale": engine.scale} if engine.scale != 1 else {}
    return dict(zip(names, sums, strict=True)) | scale | {
        "lr": done.lr, "gradient_norm": done.gradient_norm, "expert_load": done.expert_load.tolist(),
    }  # fmt: skip


def learning_rate(config: OptimizerConfig, step: int, total: int) -> float:
    """Linear warm-up, then a cosine down to final_lr · lr."""
    warmup = min(config.warmup_steps, total // 2)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def step_seed(seed: int, stage: str, step: int, micro: int = 0) -> int:
    """The seed of all randomness of one micro-batch: a resumed run needs no generator state, and no rank its own."""
    return int(np.random.SeedSequence([seed, *stage.encode(), step, micro]).generate_state(1)[0])
