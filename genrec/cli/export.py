"""Turn a trained run into what servers load.

genrec export runs/demo --to onnx --out runs/demo/onnx
genrec export runs/demo --to triton --out runs/demo/repository
genrec export runs/demo --to tensorrt --out runs/demo/engine --dtype fp16 --archs '[90]'

onnx writes model.onnx, recommender.json (inputs, outputs, settings, metrics) and items.json, and compares the file with
PyTorch on users of the log. tensorrt adds libgenrec_trt.so, the plugins with this model's kernels, and model.plan where
TensorRT is installed, else prints the trtexec line that builds it. triton writes a model repository: with ONNX Runtime
on the CPU, or around the engine of a directory that --engine names.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

import genrec
from genrec.data.sequences import load_sequences, take_users
from genrec.data.vocabulary import load_vocabulary
from genrec.generation import Recommender
from genrec.generation.beam_search import Normalize
from genrec.generation.recommender import Mode
from genrec.generation.storage import TrainedRun, load_run

CHECKED_USERS = 256
SETTINGS = ("beams", "top_k", "mode", "alpha", "normalize")


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
    """width of the beam search; as the run says unless given, like all down to include_seen"""
    top_k: int | None = None
    """items of an answer"""
    mode: Mode | None = None
    """mixed, rerank, beam or items: how beam and item head become one list"""
    alpha: float | None = None
    """weight of the item head"""
    normalize: Normalize | None = None
    """over what a code's probability is taken: children or level"""
    include_seen: bool | None = None
    """whether to recommend what is in the history, too"""
    max_batch_size: int = 64
    """requests of one run of the graph at most, for tensorrt and triton"""
    max_length: int = 1024
    """events of a history at most, for tensorrt and triton"""
    archs: list[int] | None = None
    """tensorrt: GPUs whose machine code the plugins carry, 90 for sm_90; all from 80 to 120 unless given"""
    engine: Path | None = None
    """triton: a directory that --to tensorrt wrote, with its model.plan, to serve on a GPU"""
    features: Path | None = None
    """directory written by genrec features; the one the model was trained on unless told otherwise"""
    overwrite: bool = False
    """replace what is in the directory"""


def run(config: Config) -> None:
    """Write the export and say how it compares with PyTorch."""
    if config.to == "onnx":
        write_onnx(config, load_run(config.run, config.features), config.out)
    elif config.to == "tensorrt":
        write_engine(config)
    else:
        write_repository(config)


def write_onnx(config: Config, trained: TrainedRun, out: Path) -> dict[str, Any]:
    """model.onnx, compared with PyTorch on users spread evenly over the log → its recommender.json."""
    try:
        import onnxruntime  # noqa: F401

        from genrec.export.onnx import export_onnx
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; expected pip install 'genrec[export]'") from None
    given = {name: value for name in SETTINGS if (value := getattr(config, name)) is not None}
    if config.include_seen is not None:
        given["exclude_seen"] = not config.include_seen
    recommender = Recommender(trained.model, replace(trained.settings, **given))
    columns = len(load_vocabulary(trained.features).context_tokens)
    sequences = load_sequences(trained.features)
    users = take_users(sequences, np.unique(np.linspace(0, len(sequences) - 1, num=CHECKED_USERS, dtype=int)))
    with Console(stderr=True).status("tracing the graph, then comparing it with PyTorch"):
        about = export_onnx(
            recommender, trained.catalogue, out, config.dtype, columns, config.overwrite, users,
            genrec=genrec.__version__, metrics=trained.metrics, vocabulary_hash=trained.vocabulary_hash,
        )  # fmt: skip
    found = about["agreement"]
    print(
        f"model.onnx: ONNX Runtime agrees with PyTorch on {found['same_items']:.2%} of "
        f"{found['users'] * about['top_k']:,} places, scores within {found['score_error']:.1e} of the largest"
    )
    return about


def write_engine(config: Config) -> None:
    """model.onnx, the plugins, and model.plan or the line that builds it."""
    from genrec.export.kernel_images import ALL, Shapes
    from genrec.export.onnx import DTYPES
    from genrec.export.plugins import Compiler, build_plugins
    from genrec.export.tensorrt import Profile, build_engine, command, installed

    try:
        Compiler()  # what is missing is said before minutes of work
        trained = load_run(config.run, config.features)
        about = write_onnx(config, trained, config.out)
        shapes = Shapes.of(trained.model.config)
        library = build_plugins([shapes], [DTYPES[config.dtype]], config.out, config.archs or ALL)
        print(f"plugins → {library}")
        profile = Profile(config.max_batch_size, config.max_length, min(about["max_events"], config.max_length))
        if module := installed():
            print(f"engine → {build_engine(config.out, about, profile, module)}")
        else:
            print("TensorRT is not installed here; where it is, this builds the engine:")
        print(command(config.out, about, profile))
    except RuntimeError as error:  # a tool that is missing or refuses, in its own words
        raise ValueError(str(error)) from None


def write_repository(config: Config) -> None:
    """A model repository of the graph, or of an engine made before."""
    from genrec.export.plugins import LIBRARY
    from genrec.export.tensorrt import ENGINE
    from genrec.export.triton_server import Batching, write_repository

    batching = Batching(
        max_batch_size=config.max_batch_size, max_length=config.max_length,
        preferred=[size for size in Batching.preferred if size <= config.max_batch_size],
    )  # fmt: skip
    if config.engine is not None:
        write_repository(
            config.engine, config.out, flavour="gpu", engine=config.engine / ENGINE, plugins=config.engine / LIBRARY,
            batching=batching, overwrite=config.overwrite,
        )  # fmt: skip
    else:
        with tempfile.TemporaryDirectory() as directory:
            write_onnx(config, load_run(config.run, config.features), Path(directory) / "onnx")
            write_repository(Path(directory) / "onnx", config.out, batching=batching, overwrite=config.overwrite)
    print(f"repository → {config.out}   (genrec serve --repository {config.out})")
