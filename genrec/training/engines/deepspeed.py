"""DeepSpeed's engine: ZeRO-1, 2 and 3, which spread optimizer state, gradients and parameters over the ranks.

Weights stay float32 and products run in the autocast dtype, as in the torch engine. DeepSpeed's own checkpoints are
pickles bound to a number of ranks; here state goes in and out tensor by tensor, so that checkpoints are the same
safetensors whichever engine wrote them.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from genrec.kernels.ranges import span
from genrec.training.config import OptimizerConfig, ParallelConfig
from genrec.training.engines.parts import LossModule, LossScale, adamw, filled, set_lr, training_dtype, twin
from genrec.training.ranks import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedEngine:
    """See genrec.training.engines.Engine."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, parallel: ParallelConfig, ranks: Ranks) -> None:
        deepspeed = _import_deepspeed()
        self.model, self.ranks = model, ranks
        self.device = next(model.parameters()).device
        self.stage = int(parallel.parallel.removeprefix("zero-"))
        self.dtype = training_dtype(parallel.precision, self.device)
        self._scale = LossScale(self.dtype == torch.float16)
        self._parts = parallel.micro_batches // ranks.world  # that a rank accumulates
        self._twin = twin(model) if self.stage == 3 else None
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self._parts,
            "gradient_clipping": config.clip_norm,
            "steps_per_print": 10**9,
            "zero_optimization": {"stage": self.stage, "overlap_comm": self.device.type == "cuda"},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=LossModule(model, self.dtype), optimizer=adamw(model, config, self.device), config=settings
        )

    @property
    def scale(self) -> float:
        return self._scale.value

    def whole(self) -> nn.Module:
        return self.model if self._twin is None else filled(self._twin, self._gathered())

    def backward(self, loss: Any, batch: Any, last: bool) -> dict[str, Tensor]:
        self.optimizer.loss_scale = self.scale
        self.engine.set_gradient_accumulation_boundary(last)
        with span("forward"):
            value, values = self.engine(loss, batch)
        with span("backward"):  # DeepSpeed averages over ranks and micro-batches; these are parts to be added
            self.engine.backward(value * (self.ranks.world * self._parts))
        if not last:
            self.engine.step()
        return values

    def step(self, lr: float) -> tuple[float, bool]:
        set_lr(self.optimizer, lr)
        with span("optimizer"):
            self.engine.step()
        norm, applied = float(self.engine.get_global_grad_norm()), self.engine.was_step_applied()
        self._scale.update(applied)
        return norm if applied else math.inf, applied

    def weights(self) -> dict[str, Tensor]:
        return {name: value.cpu() for name, value in self._gathered().items()}

    def _gathered(self) -> dict[str, Tensor]:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.model.parameters()), enabled=self.stage == 3):
            return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def state(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        tensors = self._scale.state()
        step = next((state["step"] for state in self._base.state.values() if "step" in state), None)
        if step is None:  # nothing has been applied yet
            return tensors
        self._link_moments()
        for name, parameter in self.model.named_parameters():
            tensors[f"{name}/step"] = step.detach().cpu().clone()
            for key in MOMENTS:
                tensors[f"{name}/{key}"] = safe_get_full_optimizer_state(parameter, key).cpu()
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        self._scale.load_state(tensors)
        names = dict(self.model.named_parameters())
        step = tensors.get(f"{next(iter(names))}/step")
        if step is None:
            return
        for flat in self._flat_partitions():
            moments = {key: torch.zeros_like(flat) for key in MOMENTS}
            self._base.state[flat] = {"step": step.to(flat.device).clone(), **moments}
        self._link_moments()
        for name, parameter in names.items():
            for key in MOMENTS:
                safe_set_full_optimizer_state(parameter, tensors[f"{name}/{key}"].to(self.device), key)

    def _link_moments(self) -> None:
        """Tell every parameter where its moments are. DeepSpeed does so once, after the first of several groups has
        stepped, when the others have none."""
        if self.stage < 3:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def _base(self) -> torch.optim.Optimizer:
        """The AdamW that DeepSpeed drives, over flat partitions of the parameters."""
        return self.optimizer.optimizer

    def _flat_partitions(self) -> list[Tensor]:
        if self.stage == 3:
            return self.optimizer.fp32_partitioned_groups_flat
        return self.optimizer.single_partition_of_fp32_groups


def _import_deepspeed() -> Any:
    try:
        import deepspeed
        import deepspeed.ops
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise ValueError("parallel zero-1, zero-2 and zero-3 need DeepSpeed; pip install 'genrec[deepspeed]'") from None
    # Without a GPU, DeepSpeed would compile a shared-memory extension for a minute before it begins.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
