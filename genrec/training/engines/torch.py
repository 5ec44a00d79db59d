"""PyTorch's own engine: one process, DistributedDataParallel, or FSDP2 with parameters in shards."""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from genrec.kernels.ranges import span
from genrec.models.ugt.decoder import DecoderLayer
from genrec.models.ugt.encoder import EncoderLayer
from genrec.training.config import OptimizerConfig, ParallelConfig
from genrec.training.engines.parts import (
    LossModule,
    LossScale,
    adamw,
    clip_factor,
    filled,
    set_lr,
    training_dtype,
    twin,
)
from genrec.training.ranks import Ranks


class TorchEngine:
    """See genrec.training.engines.Engine."""

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        parallel: ParallelConfig | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        parallel, ranks = parallel or ParallelConfig(), ranks or Ranks()
        self.model, self.config, self.ranks = model, config, ranks
        self.device = next(model.parameters()).device
        self.dtype = training_dtype(parallel.precision, self.device)
        self.module: nn.Module = LossModule(model, self.dtype)
        self._scale = LossScale(self.dtype == torch.float16)
        self._twin: nn.Module | None = None
        if parallel.parallel == "fsdp" and ranks.world > 1:
            self._twin = twin(model)
            for layer in [module for module in model.modules() if isinstance(module, EncoderLayer | DecoderLayer)]:
                fully_shard(layer)
            fully_shard(self.module)
        elif ranks.world > 1:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # its successor is not in torch 2.11
                self.module = DistributedDataParallel(self.module, broadcast_buffers=False)
        self.optimizer = adamw(model, config, self.device)
        self._names = {id(p): name for name, p in model.named_parameters()}

    @property
    def scale(self) -> float:
        return self._scale.value

    def whole(self) -> nn.Module:
        if self._twin is None:
            return self.model
        return filled(self._twin, {name: _whole(value) for name, value in self.model.state_dict().items()})

    def backward(self, loss: Any, batch: Any, last: bool) -> dict[str, Tensor]:
        alone: AbstractContextManager[None] = nullcontext()
        if isinstance(self.module, DistributedDataParallel) and not last:
            alone = self.module.no_sync()
        elif isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last)
        with alone:
            with span("forward"):
                value, values = self.module(loss, batch)
            with span("backward"):
                (value * (self.scale * self.ranks.world)).backward()  # ranks are averaged, parts are to be added
        return values

    def step(self, lr: float) -> tuple[float, bool]:
        set_lr(self.optimizer, lr)
        with span("optimizer"):
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            norm = float(_whole(nn.utils.get_total_norm(gradients))) / self.scale
            applied = math.isfinite(norm)
            if applied:
                torch._foreach_mul_(gradients, clip_factor(norm, self.config.clip_norm) / self.scale)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            elif self._scale.dynamic:
                self.optimizer.zero_grad(set_to_none=True)  # otherwise they are left for whoever looks for the cause
        self._scale.update(applied)
        return norm, applied

    def weights(self) -> dict[str, Tensor]:
        return self._collected(self.model.state_dict())

    def state(self) -> dict[str, Tensor]:
        tensors = {
            f"{self._names[id(parameter)]}/{key}": value
            for parameter, values in self.optimizer.state.items()
            for key, value in values.items()
        }
        for group in self.optimizer.param_groups:  # apex counts steps by group, torch by parameter
            if "step" in group:
                step = torch.tensor(float(group["step"]))
                tensors |= {f"{self._names[id(parameter)]}/step": step for parameter in group["params"]}
        return self._scale.state() | self._collected(tensors)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self._scale.load_state(tensors)
        self.optimizer.state.clear()
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                name = self._names[id(parameter)]
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}/{key}" in tensors]
                state = {key: self._placed(tensors[f"{name}/{key}"], parameter) for key in keys}
                if "step" in group and state:
                    group["step"] = int(state.pop("step"))
                self.optimizer.state[parameter] = state

    def _collected(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the CPU of the first rank, which alone writes them; empty on the others."""
        collected = {}
        for name, value in tensors.items():
            whole = _whole(value)
            if self.ranks.first:
                collected[name] = whole.cpu()
        return collected

    def _placed(self, value: Tensor, parameter: Tensor) -> Tensor:
        """A piece of state where its parameter is: the same shard of it, on the same device."""
        if value.dim() == 0 or not isinstance(parameter, DTensor):
            return value.to(self.device)
        return distribute_tensor(value.to(self.device), parameter.device_mesh, parameter.placements, src_data_rank=None)


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
