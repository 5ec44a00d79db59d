"""The training loop: the steps of one stage, on any number of ranks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from genrec.data.files import atomic_file
from genrec.kernels.ranges import span
from genrec.models.ugt import UGT
from genrec.training.checkpoint import Checkpoint, load_newest_checkpoint, save_checkpoint
from genrec.training.config import TrainConfig
from genrec.training.engines import Engine, build_engine
from genrec.training.log import MetricsLog
from genrec.training.ranks import Ranks
from genrec.training.stages import Stage
from genrec.training.step import Trainer, say
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
    before: dict[str, float] = field(default_factory=dict)  # metrics of the first validation
    after: dict[str, float] = field(default_factory=dict)  # and of the best


class Selection:
    """The best weights of a stage so far, on the validation events."""

    def __init__(
        self, stage: Stage, engine: Engine, validator: Validator | None, progress: Progress, path: Path, log: MetricsLog
    ) -> None:
        self.stage, self.engine, self.validator = stage, engine, validator
        self.progress, self.path, self.log = progress, path, log

    def validate(self) -> bool:
        """Measure, log, keep the weights if they are the best; False where the stage has done harm and should stop."""
        if self.validator is None:
            return True
        progress = self.progress
        with span("validation"):
            metrics = self.validator(self.engine.whole())
        self.log.write(self.stage.name, progress.step, **{f"valid_{name}": value for name, value in metrics.items()})
        metric = metrics[self.stage.select_by]
        progress.before = progress.before or metrics
        if metric > progress.best:
            progress.best, progress.best_step, progress.after = metric, progress.step, metrics
            weights = self.engine.weights()
            self.engine.ranks.on_first(lambda: self._write(weights))
        recall = progress.before["recall@10"]
        harmed = metrics["recall@10"] < (1 - self.stage.max_recall_loss) * recall
        if harmed:
            lost = f"recall@10 fell from {recall:.4f} by more than {self.stage.max_recall_loss:.0%}"
            ended = f"stopped at step {progress.step}, the best weights are kept"
            say(self.engine.ranks, f"{self.stage.name}: {lost}; {ended}")
        return not harmed

    def weights(self) -> dict[str, Tensor]:
        """The best ones, or the last ones where nothing is validated."""
        return self.engine.weights() if self.validator is None else load_file(self.path)

    def _write(self, weights: dict[str, Tensor]) -> None:
        with atomic_file(self.path) as temporary:
            save_file(weights, temporary)


def run_stage(
    stage: Stage,
    model: UGT,
    plan: Plan,
    config: TrainConfig,
    log: MetricsLog,
    validator: Validator | None,
    ranks: Ranks | None = None,
) -> tuple[Progress, dict[str, Tensor]]:
    """Train `model`, which the engine may take apart → where it ended, and the weights to go on with."""
    ranks, name = ranks or Ranks(), stage.name
    directory = config.out / "checkpoints" / name
    engine, progress = _engine(stage, model, directory, config, ranks)
    log.rewind(name, progress.step)
    validate_every = max(1, round(config.validate_every * stage.steps_per_epoch))
    trainer = Trainer(stage, model, engine, plan.total, config.seed)
    selection = Selection(stage, engine, validator, progress, directory / "best.safetensors", log)
    bar = tqdm(total=plan.stop, initial=progress.step, desc=name, unit="step", disable=not ranks.first)
    with span(name), bar:
        if progress.step == 0:
            selection.validate()
        for batches in trainer.micro_batches(progress.step, plan.stop, config.micro_batches):
            done = trainer.step(progress.step, batches)
            progress.step += 1
            progress.applied += done.applied
            bar.update()
            last = progress.step == plan.stop
            if progress.step % config.log_every == 0 or last:
                scale = {"loss_scale": engine.scale} if engine.scale != 1 else {}
                log.write(name, progress.step, **done.summed(ranks), **scale, applied=progress.applied)
            if (progress.step % validate_every == 0 or last) and not selection.validate():
                break
            bar.set_postfix_str(f"best valid {stage.select_by} {progress.best:.4f}" if validator else "")
            if progress.step % config.checkpoint_every == 0 and not last:
                checkpoint = Checkpoint(engine.weights(), engine.state(), asdict(progress))
                ranks.on_first(partial(save_checkpoint, directory, checkpoint))
    return progress, selection.weights()


def _engine(stage: Stage, model: UGT, directory: Path, config: TrainConfig, ranks: Ranks) -> tuple[Engine, Progress]:
    """An engine around `model`, both as the newest checkpoint left them."""
    checkpoint = load_newest_checkpoint(directory)
    if checkpoint is not None:
        model.load_state_dict(checkpoint.weights)
    if config.recompute:
        model.recompute_activations()
    if config.compile:
        model.compile_layers()
    engine = build_engine(model, stage.optimizer, config, ranks)
    if checkpoint is None:
        return engine, Progress()
    engine.load_state(checkpoint.optimizer)
    return engine, Progress(**checkpoint.state)
