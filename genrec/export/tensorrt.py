"""An exported recommender as a TensorRT engine, its operators as plugins."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from genrec.data.files import atomic_file
from genrec.export.plugins import LIBRARY

ENGINE = "model.plan"


@dataclass(frozen=True)
class Profile:
    """The sizes that an engine is built for."""

    batch: int
    """requests of a run at most"""
    length: int
    """events of a history at most"""
    usual: int
    """events of the histories that the engine is tuned for"""

    def shapes(self, inputs: Sequence[dict[str, Any]]) -> dict[str, list[list[int]]]:
        """Input → its least, usual and largest shape; `inputs` as in recommender.json."""
        sizes = {"batch": (1, min(8, self.batch), self.batch), "length": (1, self.usual, self.length)}
        return {
            value["name"]: [
                [sizes[axis][end] if axis in sizes else axis for axis in value["shape"]] for end in range(3)
            ]
            for value in inputs
        }


def installed() -> ModuleType | None:
    """TensorRT's Python package, None where there is none."""
    try:
        return importlib.import_module("tensorrt")
    except ImportError:
        return None


def command(directory: Path, about: dict[str, Any], profile: Profile) -> str:
    """The trtexec line that builds the same engine."""
    shapes = profile.shapes(about["inputs"])
    ranges = [
        f"--{end}Shapes=" + ",".join(f"{name}:{'x'.join(map(str, ends[place]))}" for name, ends in shapes.items())
        for place, end in enumerate(("min", "opt", "max"))
    ]
    return " \\\n  ".join(
        [
            f"trtexec --onnx={directory / 'model.onnx'}",
            f"--dynamicPlugins={directory / LIBRARY}",
            "--stronglyTyped",
            *ranges,
            f"--saveEngine={directory / ENGINE}",
        ]
    )


class Builder:
    """A strongly typed engine, from `tensorrt` 10 or 11, or from `tensorrt_rtx` for a GPU that need not be there.

    library: plugins to load first; without them the operators' function bodies are built.
    """

    def __init__(self, module: ModuleType, library: Path | None = None) -> None:
        lines: list[str] = []

        class Log(module.ILogger):  # type: ignore[name-defined]
            def __init__(self) -> None:
                module.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity <= module.ILogger.Severity.WARNING:
                    lines.append(message)

        self.module, self.lines, self.log = module, lines, Log()
        self.builder = module.Builder(self.log)  # gives the registry its log
        if library is not None:
            self.registry = module.get_plugin_registry()
            self.handle = self.registry.load_library(str(library))
            if self.handle is None:
                raise RuntimeError(f"{library} was not loaded ({self.reason()})")

    def close(self) -> None:
        """Take the plugins out of the registry again."""
        if getattr(self, "handle", None) is not None:
            self.registry.deregister_library(self.handle)
            self.handle = None

    def network(self, model: Path) -> Any:
        """The parsed model; RuntimeError says what the parser did not like."""
        flags = self.module.NetworkDefinitionCreationFlag
        typed = getattr(flags, "STRONGLY_TYPED", None)  # later versions know no other networks
        network = self.builder.create_network(0 if typed is None else 1 << int(typed))
        self.parser = self.module.OnnxParser(network, self.log)
        if not self.parser.parse_from_file(str(model)):
            errors = [self.parser.get_error(number).desc() for number in range(self.parser.num_errors)]
            raise RuntimeError(f"{model} was not parsed ({'; '.join([*errors, self.reason()])})")
        return network

    def engine(self, network: Any, shapes: dict[str, list[list[int]]], capability: str | None = None) -> bytes:
        """The serialized engine for this machine's GPU; capability, such as "SM80": of TensorRT-RTX, for that one."""
        config, profile = self.builder.create_builder_config(), self.builder.create_optimization_profile()
        if capability is not None:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(self.module.ComputeCapability, capability), 0)
        for name, ends in shapes.items():
            profile.set_shape(name, *ends)
        config.add_optimization_profile(profile)
        engine = self.builder.build_serialized_network(network, config)
        if engine is None:
            raise RuntimeError(f"no engine was built ({self.reason()})")
        return bytes(engine)

    def reason(self) -> str:
        """What TensorRT said last."""
        return self.lines[-1].strip() if self.lines else "no reason was given"


def build_engine(directory: Path, about: dict[str, Any], profile: Profile, module: ModuleType) -> Path:
    """OUT/model.plan from OUT/model.onnx and OUT/libgenrec_trt.so, for this machine's GPU."""
    builder = Builder(module, directory / LIBRARY)
    try:
        engine = builder.engine(builder.network(directory / "model.onnx"), profile.shapes(about["inputs"]))
    finally:
        builder.close()
    with atomic_file(directory / ENGINE) as path:
        path.write_bytes(engine)
    return directory / ENGINE
