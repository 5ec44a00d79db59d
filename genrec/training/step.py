"""One optimizer step of a stage: this rank's micro-batches, their gradients, what became of them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from genrec.kernels.ranges import span
from genrec.models.ugt import UGT, map_tensors
from genrec.training.config import OptimizerConfig
from genrec.training.diagnosis import first_bad_tensor
from genrec.training.engines import Engine
from genrec.training.engines.parts import autocast
from genrec.training.loader import read_ahead
from genrec.training.ranks import Ranks
from genrec.training.stages import Stage


@dataclass(frozen=True)
class Done:
    """What one step did."""

    values: dict[str, Tensor]  # of this rank's micro-batches; sums over ranks are means over the step
    lr: float
    gradient_norm: float
    applied: bool
    expert_load: Tensor  # (E,) share of the rows

    def summed(self, ranks: Ranks) -> dict[str, Any]:
        """What is logged, read from the device only now; all ranks call it together."""
        names = sorted(self.values)
        sums = ranks.sum(torch.stack([self.values[name].float() for name in names])).tolist()
        means = dict(zip(names, sums, strict=True))
        return means | {"lr": self.lr, "gradient_norm": self.gradient_norm, "expert_load": self.expert_load.tolist()}


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
            loss = partial(self.stage.loss, share=1 / self._targets(batches))
            for place, (number, batch) in enumerate(batches, start=1):
                prepared = self._prepared(step, number, batch)
                for name, value in self.engine.backward(loss, prepared, place == len(batches)).items():
                    sums[name] = sums[name] + value if name in sums else value
            scale = self.engine.scale
            norm, applied = self._applied(step, lr)
            if not applied:
                self._explain(step, batches, loss, scale)
            load = self.model.balance_router(self.engine.ranks.sum)
        return Done(sums, lr, norm, applied, load)

    def _targets(self, batches: list[tuple[int, Any]]) -> int:
        """Of all micro-batches of the step; this rank knows its own."""
        own = sum(len(batch.targets.items) for _, batch in batches)
        return int(self.engine.ranks.sum(torch.tensor(own, device=self.engine.device)))

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

    def _explain(self, step: int, batches: list[tuple[int, Any]], loss: Callable[..., Any], scale: float) -> None:
        """Say where the first value that is not finite came from; outside float16 this is the end."""
        found, model = None, self.engine.whole()
        for number, batch in batches:
            prepared = self._prepared(step, number, batch)
            model.train(not self.stage.on_policy)
            with autocast(self.engine.device, self.engine.dtype):
                found = found or first_bad_tensor(model, partial(loss, model, prepared), scale)
        found = next((name for name in self.engine.ranks.gather(found) if name), "a sum of gradients")
        if scale == 1:
            name = self.stage.name
            raise ValueError(
                f"{name}: {found} is not finite at step {step}; try a lower {name}.optimizer.lr, now "
                f"{self.stage.optimizer.lr}"
            )
        message = f"step {step}: {found} is not finite at loss scale {scale:.0f}; step left out, scale halved"
        say(self.engine.ranks, message)


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


def say(ranks: Ranks, message: str) -> None:
    """One line on stderr, above the progress bar."""
    if ranks.first:
        tqdm.write(message, file=sys.stderr)
