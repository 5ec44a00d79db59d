"""Turn a trained run into what servers load.

genrec export runs/demo --to onnx --out runs/demo/onnx
genrec export runs/demo --to triton --out runs/demo/repository
genrec export runs/demo --to tensorrt --out runs/demo/engine --dtype fp16

onnx writes model.onnx, recommender.json (inputs, outputs, settings, metrics) and items.json, and compares the file with
PyTorch on users of the log. tensorrt and triton start from the same file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from genrec.data.sequences import load_sequences, take_users
from genrec.data.vocabulary import load_vocabulary
from genrec.generation import Recommender
from genrec.generation.beam_search import Normalize
from genrec.generation.recommender import Mode
from genrec.generation.storage import TrainedRun, load_run

CHECKED_USERS = 256


@dataclass(frozen=True)
class Config:
    run: Path
    """directory of a trained run; may be given by its place"""
    to: Literal["onnx", "tensorrt", "triton"]
    """what to make"""
    out: Path
    """directory for it"""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """of weights and activations; scores are fp32"""
    beams: int | None = None
    """width of the beam search; as the run says unless given, like all that follow"""
    top_k: int | None = None
    """items of an answer"""
    mode: Mode | None = None
    """mixed, rerank, beam or items: how beam and item head become one list"""
    alpha: float | None = None
    """weight of the item head"""
    normalize: Normalize | None = None
    """over what a code's probability is taken"""
    include_seen: bool = False
    """also recommend what is in the history"""
    features: Path | None = None
    """directory written by genrec features; the one the model was trained on unless told otherwise"""
    overwrite: bool = False
    """replace what is in the directory"""


def run(config: Config) -> None:
    """Write the export and say how it compares with PyTorch."""
    try:
        import onnxruntime  # noqa: F401

        from genrec.export.onnx import export_onnx
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; expected pip install 'genrec[export]'") from None
    trained = load_run(config.run, config.features)
    recommender = recommender_of(trained, config)
    columns = len(load_vocabulary(trained.features).context)
    sequences = load_sequences(trained.features)
    users = take_users(sequences, np.unique(np.linspace(0, len(sequences) - 1, num=CHECKED_USERS, dtype=int)))
    with Console(stderr=True).status("tracing the graph, then comparing it with PyTorch"):
        about = export_onnx(
            recommender, trained.catalogue, config.out, config.dtype, columns, config.overwrite, users,
            metrics=trained.metrics,
        )  # fmt: skip
    found = about["agreement"]
    print(
        f"{config.out / 'model.onnx'}: ONNX Runtime agrees with PyTorch on {found['same_items']:.2%} of "
        f"{found['users'] * about['top_k']:,} places, scores within {found['score_error']:.1e} of the largest"
    )


def recommender_of(trained: TrainedRun, config: Any) -> Recommender:
    """With the settings of the run, where `config` has no others."""
    names = ("beams", "top_k", "mode", "alpha", "normalize")
    given = {name: value for name in names if (value := getattr(config, name)) is not None}
    return Recommender(trained.model, replace(trained.settings, exclude_seen=not config.include_seen, **given))
