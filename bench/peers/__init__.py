"""What the operators are raced against: the strongest forms that can be installed, each with a line why it is fair."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

ABSENT: set[str] = set()  # packages that would have run here


def on_gpu() -> bool:
    """Whether tensors are made on a GPU: some peers are for it alone."""
    return torch.get_default_device().type == "cuda"


def installed(module: str, package: str) -> ModuleType | None:
    """The module; None, and a line in the report, where its package is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        ABSENT.add(package)
        return None
