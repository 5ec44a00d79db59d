"""A model repository for Triton Inference Server, out of an exported graph.

    OUT/recommend        the log's own item ids in, items and titles out: a python model (triton_models/recommend.py)
    OUT/recommend_graph  item indices in and out: model.onnx in ONNX Runtime (cpu) or a TensorRT plan (gpu)

`recommend` calls `recommend_graph` itself rather than through an ensemble: an ensemble is bound to one version of its
parts, whereas here version N asks version N, so that a new catalogue and its graph take over together.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from genrec.data.files import atomic_directory, read_json
from genrec.export.files import read_export

Flavour = Literal["cpu", "gpu"]
MODELS = Path(__file__).parent / "triton_models"
WRITER = "genrec export --to triton"
TYPES = {"int64": "TYPE_INT64", "int32": "TYPE_INT32", "float32": "TYPE_FP32"}


@dataclass(frozen=True)
class Batching:
    """How the server gathers requests."""

    max_batch_size: int = 64
    """histories of one run at most"""
    preferred: Sequence[int] = (8, 16, 32)
    """sizes that are sent on without waiting further"""
    max_delay_us: int = 500
    """microseconds that the first of a batch waits for more"""
    max_length: int = 1024
    """events of a history at most"""

    def __post_init__(self) -> None:
        for name, least in (("max_batch_size", 1), ("max_delay_us", 0), ("max_length", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {least} or more")
        outside = [size for size in self.preferred if not 1 <= size <= self.max_batch_size]
        if outside:
            raise ValueError(f"preferred batch size is {outside[0]}; expected 1 to {self.max_batch_size}")


@dataclass(frozen=True)
class Repository:
    """What a model repository says of itself."""

    directory: Path
    version: int
    """the newest one"""
    flavour: Flavour
    about: dict[str, Any]
    """its recommender.json"""

    def item_ids(self) -> list[str]:
        """The catalogue's item ids, in the order of the indices 1, 2, …"""
        return read_json(self.directory / "recommend" / str(self.version) / "items.json", WRITER)["item_ids"]


def write_repository(
    onnx_directory: Path,
    out: Path,
    *,
    flavour: Flavour = "cpu",
    engine: Path | None = None,
    plugins: Path | None = None,
    instances: int = 1,
    threads: int = 1,
    batching: Batching | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model repository into `out`, which appears whole or not at all.

    Args:
        onnx_directory: written by genrec.export.onnx: model.onnx, recommender.json and items.json.
        flavour: "cpu" runs model.onnx in ONNX Runtime, "gpu" the TensorRT plan `engine`.
        plugins: the library of the plan's operators, for "gpu"; copied beside the plan.
        instances: copies of the graph that run side by side.
        threads: CPU threads of each.
        batching: how requests are gathered; Batching() where None.

    Raises FileNotFoundError for a file that is missing, ValueError for one that is not what it should be or for
    arguments that do not go together, FileExistsError if `out` holds something and `overwrite` is False.
    """
    about, items = read_export(onnx_directory)
    batching = batching or Batching()
    for name, value in (("instances", instances), ("threads", threads)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected 1 or more")
    if (flavour == "gpu") != (engine is not None):
        raise ValueError(f"flavour is {flavour} and engine {engine}; expected an engine for gpu and none for cpu")
    for path in (engine, plugins):
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; expected the output of genrec export --to tensorrt")
    inputs = [onnx_directory, *(path for path in (engine, plugins) if path)]
    with atomic_directory(out, overwrite, inputs) as directory:
        graph, service = directory / "recommend_graph", directory / "recommend"
        _write_version(directory, 1, about, items, onnx_directory, engine)
        (graph / "config.pbtxt").write_text(graph_config(about, flavour, instances, threads, batching))
        (service / "config.pbtxt").write_text(service_config(about, flavour, instances, batching))
        if plugins:
            shutil.copyfile(plugins, graph / plugins.name)


def add_version(onnx_directory: Path, repository: Path, *, engine: Path | None = None) -> int:
    """Write an export into an existing repository as its next version → its number.

    A running server takes it over, without losing a request, when it is told to load `recommend_graph` and then
    `recommend`. Raises ValueError if the graph's inputs are not those of the repository, and as `write_repository`.
    """
    found = read_repository(repository)
    about, items = read_export(onnx_directory)
    if (found.flavour == "gpu") != (engine is not None):
        raise ValueError(f"{repository} is of flavour {found.flavour} and engine {engine}; expected an engine for gpu")
    for name in ("inputs", "outputs"):
        if about[name] != found.about[name]:
            raise ValueError(
                f"{onnx_directory} has other {name} than {repository}; expected the same, or a repository of its own"
            )
    version = 1 + max(_versions(repository / "recommend") + _versions(repository / "recommend_graph"))
    with atomic_directory(repository / f".version-{version}", overwrite=True) as directory:
        _write_version(directory, version, about, items, onnx_directory, engine)
    parts = repository / f".version-{version}"
    for model in ("recommend_graph", "recommend"):  # the graph first: the service's version must find it
        (parts / model / str(version)).rename(repository / model / str(version))
    shutil.rmtree(parts)
    return version


def read_repository(directory: Path) -> Repository:
    """What `write_repository` wrote into `directory`; FileNotFoundError or ValueError if it is no such repository."""
    expected = f"expected a model repository, the output of {WRITER}"
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory; {expected}")
    for model in ("recommend", "recommend_graph"):
        if not (directory / model / "config.pbtxt").is_file():
            raise ValueError(f"{directory} has no {model}/config.pbtxt; {expected}")
    versions = _versions(directory / "recommend")
    if not versions:
        raise ValueError(f"{directory / 'recommend'} has no version; {expected}")
    config = (directory / "recommend_graph" / "config.pbtxt").read_text()
    about = read_json(directory / "recommend" / str(max(versions)) / "recommender.json", WRITER)
    return Repository(directory, max(versions), "gpu" if "tensorrt_plan" in config else "cpu", about)


def graph_config(about: dict[str, Any], flavour: Flavour, instances: int, threads: int, batching: Batching) -> str:
    """config.pbtxt of recommend_graph."""
    backend = 'backend: "python"' if flavour == "cpu" else 'platform: "tensorrt_plan"'
    kind = "KIND_CPU" if flavour == "cpu" else "KIND_GPU"
    parts = [
        "# Item indices in and out. 0 in a history is padding, a number that is no item's an unknown item.",
        f'name: "recommend_graph"\n{backend}\nmax_batch_size: {batching.max_batch_size}',
        *(_tensor("input", value, ragged=flavour == "cpu") for value in about["inputs"]),
        *(_tensor("output", value) for value in about["outputs"]),
        "# No delay: what arrives has been gathered by recommend already.",
        f"dynamic_batching {{ preferred_batch_size: [ {_list(batching.preferred)} ] }}",
        f"instance_group [ {{ count: {instances} kind: {kind} }} ]",
        "# The version before stays, for requests that are still with it while a new one takes over.",
        "version_policy { latest { num_versions: 2 } }",
        _warmup(about, 1, 1),
        _warmup(about, max([1, *batching.preferred]), min(about["max_events"], batching.max_length)),
    ]
    if flavour == "cpu":
        parts += [_parameter("threads", threads), _parameter("max_length", batching.max_length)]
    return "\n".join(parts) + "\n"


def service_config(about: dict[str, Any], flavour: Flavour, instances: int, batching: Batching) -> str:
    """config.pbtxt of recommend."""
    # a TensorRT engine wants few shapes, all inside its profile; ONNX Runtime takes what comes
    pad_to = sorted({min(about["max_events"], batching.max_length), batching.max_length}) if flavour == "gpu" else []
    fields = [value for value in about["inputs"] if value["name"] != "history"]
    top_k = about["top_k"]
    parts = [
        "# Item ids of the log, oldest first, in; items, best first, out. Empty strings are padding.",
        f'name: "recommend"\nbackend: "python"\nmax_batch_size: {batching.max_batch_size}',
        'input { name: "history" data_type: TYPE_STRING dims: [ -1 ] allow_ragged_batch: true }',
        *(_tensor("input", value, ragged=True) for value in fields),
        f'output {{ name: "item_ids" data_type: TYPE_STRING dims: [ {top_k} ] }}',
        f'output {{ name: "titles" data_type: TYPE_STRING dims: [ {top_k} ] }}',
        f'output {{ name: "scores" data_type: TYPE_FP32 dims: [ {top_k} ] }}',
        f"dynamic_batching {{ preferred_batch_size: [ {_list(batching.preferred)} ]"
        f" max_queue_delay_microseconds: {batching.max_delay_us} }}",
        "# One more than the graph: the next batch is gathered while the graph answers this one.",
        f"instance_group [ {{ count: {instances + 1} kind: KIND_CPU }} ]",
        "version_policy { latest { num_versions: 1 } }",
        _parameter("max_length", batching.max_length),
        _parameter("pad_to", _list(pad_to, " ")),
    ]
    return "\n".join(parts) + "\n"


def _write_version(
    directory: Path,
    version: int,
    about: dict[str, Any],
    items: dict[str, Any],
    onnx_directory: Path,
    engine: Path | None,
) -> None:
    graph, service = directory / "recommend_graph" / str(version), directory / "recommend" / str(version)
    graph.mkdir(parents=True)
    service.mkdir(parents=True)
    if engine:
        shutil.copyfile(engine, graph / "model.plan")
    else:
        for file in onnx_directory.glob("model.onnx*"):  # large weights stand in a file of their own
            shutil.copyfile(file, graph / file.name)
        shutil.copyfile(MODELS / "onnx_graph.py", graph / "model.py")
    shutil.copyfile(MODELS / "recommend.py", service / "model.py")
    (service / "recommender.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    (service / "items.json").write_text(json.dumps(items, ensure_ascii=False) + "\n")


def _versions(model: Path) -> list[int]:
    return [int(path.name) for path in model.iterdir() if re.fullmatch(r"[1-9]\d*", path.name)]


def _tensor(kind: str, value: dict[str, Any], ragged: bool = False) -> str:
    """One input or output, without the batch; a dimension that is not a number may have any size."""
    dims = _list([size if isinstance(size, int) else -1 for size in value["shape"][1:]])
    more = " allow_ragged_batch: true" if ragged else ""
    return f'{kind} {{ name: "{value["name"]}" data_type: {TYPES[value["dtype"]]} dims: [ {dims} ]{more} }}'


def _warmup(about: dict[str, Any], rows: int, length: int) -> str:
    """A request with histories of zeros, so that the first real one finds everything loaded."""
    inputs = []
    for value in about["inputs"]:
        dims = _list([size if isinstance(size, int) else length for size in value["shape"][1:]])
        kind = TYPES[value["dtype"]]
        inputs.append(
            f'inputs {{ key: "{value["name"]}" value {{ data_type: {kind} dims: [ {dims} ] zero_data: true }} }}'
        )
    return f'model_warmup {{ name: "{rows} × {length}" batch_size: {rows} {" ".join(inputs)} }}'


def _parameter(key: str, value: object) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'


def _list(values: Sequence[object], comma: str = ", ") -> str:
    return comma.join(map(str, values))
