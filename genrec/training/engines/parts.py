"""What both engines are made of: the module they wrap, the optimizer, the scale of the loss."""

from __future__ import annotations

import copy
import importlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from genrec.training.config import OptimizerConfig

Precision = str  # auto, float32, bfloat16, float16


class LossModule(nn.Module):
    """A model whose forward pass is the loss of a batch, computed in the precision of the run.

    Engines watch for forward passes of what they wrap; this makes all of a loss one of them.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, loss: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """loss(model, batch)."""
        with autocast(next(self.model.parameters()).device, self.dtype):
            return loss(self.model, batch)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Products in dtype; float32 is left alone."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def twin(model: nn.Module) -> nn.Module:
    """A model of the same shape without weights, which `filled` gives it when they are asked for."""
    return copy.deepcopy(model).to("meta")


def filled(empty: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """A model with these weights from a `twin`, which stays empty."""
    model = copy.deepcopy(empty).to_empty(device=next(iter(weights.values())).device)
    model.load_state_dict(weights)
    return model


class LossScale:
    """Dynamic loss scaling for float16 (Micikevicius et al. 2018): half after an overflow, double after `patience`
    steps without one. Constant 1 where it is not needed."""

    def __init__(self, dynamic: bool, patience: int = 2000) -> None:
        self.dynamic, self.patience = dynamic, patience
        self.value = 2.0**16 if dynamic else 1.0
        self.steps = 0  # since the last change

    def update(self, applied: bool) -> None:
        """Learn from a step; FloatingPointError where even a scale of 1 overflows, for then the model is at fault."""
        if not self.dynamic:
            return
        self.steps += 1
        if not applied:
            self.value, self.steps = self.value / 2, 0
            if self.value < 1:
                raise FloatingPointError("gradients overflow at a loss scale of 1")
        elif self.steps == self.patience:
            self.value, self.steps = min(self.value * 2, 2.0**24), 0

    def state(self) -> dict[str, Tensor]:
        """For the checkpoint."""
        return {"loss_scale": torch.tensor([self.value, self.steps], dtype=torch.float64)} if self.dynamic else {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state` returned."""
        if self.dynamic and "loss_scale" in tensors:
            value, steps = tensors["loss_scale"].tolist()
            self.value, self.steps = value, int(steps)


def training_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of products for what `precision` may say."""
    if precision == "auto":
        return torch.bfloat16 if _bfloat16_pays(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]


def adamw(model: nn.Module, config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW in one launch for all parameters: on a GPU apex's where a user has built it, else torch's."""
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay} for decay in (config.weight_decay, 0.0)]
    for name, parameter in model.named_parameters():
        groups[0 if _decays(name, parameter) else 1]["params"].append(parameter)
    fused = _apex_adam() if device.type == "cuda" else None
    if fused is not None:
        return fused(groups, lr=config.lr, betas=(0.9, 0.98), adam_w_mode=True)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)


def clip_factor(norm: float, longest: float) -> float:
    """What gradients of this norm are multiplied with, so that none is longer."""
    return min(1.0, longest / (norm + 1e-6)) if math.isfinite(norm) else 1.0


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the step to come."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def _decays(name: str, parameter: Tensor) -> bool:
    """Matrices and embeddings are pulled to zero; biases of any shape and the gains of norms are not."""
    return parameter.dim() > 1 and not name.endswith("bias") and "norm." not in name


def _apex_adam() -> Any | None:
    """NVIDIA apex's FusedAdam if apex is there with its kernels; the apex of the package index is another project."""
    try:
        importlib.import_module("amp_C")
        return importlib.import_module("apex.optimizers").FusedAdam
    except (ImportError, AttributeError):
        return None


def _bfloat16_pays(device: torch.device) -> bool:
    """True where the processor multiplies bfloat16 natively; elsewhere it is emulated and slower than float32."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
