"""Checkpoints that are whole or not there: written aside, checksummed, renamed; resumed from the newest whole one."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from genrec.data.files import atomic_directory

KEEP = 2  # so that there is one to fall back on


@dataclass(frozen=True)
class Checkpoint:
    """Everything a stage needs to go on at `state["step"]` as if it had never stopped."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(directory: Path, checkpoint: Checkpoint) -> None:
    """Write `directory`/step-NNNNNNNN and drop all but the newest KEEP."""
    target = directory / f"step-{checkpoint.state['step']:08d}"
    with atomic_directory(target, overwrite=True) as temporary:
        save_file(checkpoint.weights, temporary / "weights.safetensors")
        save_file(checkpoint.optimizer, temporary / "optimizer.safetensors")
        checksums = {file.name: _checksum(file) for file in sorted(temporary.iterdir())}
        (temporary / "state.json").write_text(json.dumps({"state": checkpoint.state, "sha256": checksums}))
    for old in _by_step(directory)[:-KEEP]:
        shutil.rmtree(old)


def load_newest_checkpoint(directory: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; a damaged one is named on stderr and the one before it is taken."""
    for path in reversed(_by_step(directory)):
        try:
            return _load(path)
        except (OSError, ValueError, KeyError) as error:
            print(f"genrec: {path} is damaged ({error}); taking the checkpoint before it", file=sys.stderr)
    return None


def _load(path: Path) -> Checkpoint:
    record = json.loads((path / "state.json").read_text())
    for name, expected in record["sha256"].items():
        if _checksum(path / name) != expected:
            raise ValueError(f"{name} does not match its checksum")
    return Checkpoint(
        load_file(path / "weights.safetensors"), load_file(path / "optimizer.safetensors"), record["state"]
    )


def _by_step(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-????????"))


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
