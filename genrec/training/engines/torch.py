"""The plain PyTorch engine: one process, one device, AdamW, optional bfloat16 autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor, nn

from genrec.kernels.ranges import span
from genrec.training.config import OptimizerConfig

Precision = Literal["auto", "float32", "bfloat16"]


class TorchEngine:
    """Owns the optimizer of a model; a stage computes its loss under `autocast()` and hands it to `step`."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, precision: Precision = "auto") -> None:
        self.model, self.config = model, config
        self.device = next(model.parameters()).device
        self.bfloat16 = precision == "bfloat16" or (precision == "auto" and _bfloat16_pays(self.device))
        decayed = [p for p in model.parameters() if p.dim() > 1]
        plain = [p for p in model.parameters() if p.dim() <= 1]  # biases are not pulled to zero
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)
        self._names = {id(p): name for name, p in model.named_parameters()}

    def autocast(self) -> AbstractContextManager:
        """The context for a stage's loss: bfloat16 where the engine was told or found that it pays."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def step(self, loss: Tensor, lr: float) -> Tensor:
        """One optimizer step; returns the norm of the gradient before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        with span("backward"):
            loss.backward()
        with span("optimizer"):
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
            self.optimizer.step()
        return norm

    def state(self) -> dict[str, Tensor]:
        """The optimizer's state as flat named tensors, fit for safetensors."""
        return {
            f"{self._names[id(parameter)]}/{key}": value
            for parameter, values in self.optimizer.state.items()
            for key, value in values.items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state` returned."""
        by_name = dict(self.model.named_parameters())
        self.optimizer.state.clear()
        for full_name, value in tensors.items():
            name, key = full_name.rsplit("/", 1)
            device = "cpu" if key == "step" and self.device.type == "cpu" else self.device
            self.optimizer.state[by_name[name]][key] = value.to(device)


def _bfloat16_pays(device: torch.device) -> bool:
    """True where the processor multiplies bfloat16 natively; elsewhere it is emulated and slower than float32."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
