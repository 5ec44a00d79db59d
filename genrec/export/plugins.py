"""TensorRT plugins of the fused operators: their machine code inside libgenrec_trt.so. Neither a GPU nor TensorRT is
needed to build it, only g++ and TensorRT's headers.

    python -m genrec.export.plugins --model RUN/model --dtype fp16 --arch 90 --out DIR

The headers of TensorRT are looked for in TENSORRT_INCLUDE_DIR and where g++ looks anyway, CUDA's in CUDA_INCLUDE_DIR or
in Triton.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from genrec.data.files import atomic_file
from genrec.export.kernel_images import ALL, Compiled, Shapes, compile_kernels
from genrec.generation.storage import read_model_json
from genrec.kernels.launch import DTYPES
from genrec.models.ugt.config import UGTConfig

LIBRARY = "libgenrec_trt.so"


def build_plugins(
    shapes: Sequence[Shapes], dtypes: Sequence[torch.dtype], out: Path, archs: Sequence[int] = ALL
) -> Path:
    """Compile the kernels of models and build the TensorRT plugin library that launches them.

    Args:
        shapes: the models, one or more.
        dtypes: of activations and weights: torch.float16, torch.bfloat16, torch.float32.
        out: directory of the library.
        archs: 80 for sm_80, and so on: GPUs that get machine code of their own. All others from sm_80 on get PTX.

    Returns:
        The path of libgenrec_trt.so in `out`, which appears whole or not at all.

    Raises:
        ValueError: a dtype or an architecture that the kernels are not made for.
        RuntimeError: Triton, g++ or the headers are missing, a kernel does not fit, or g++ fails.
    """
    compiler = Compiler()  # first: what is missing is said before minutes of work
    images = compile_kernels(shapes, dtypes, archs)
    return compiler.link(images, out / LIBRARY)


class Compiler:
    """g++ with the headers and the sources of the library; RuntimeError says what is missing."""

    def __init__(self) -> None:
        if shutil.which("g++") is None:
            raise RuntimeError("g++ is not on PATH; expected it there, to build the TensorRT plugins")
        self.sources = next((path for path in _source_folders() if path.is_dir()), None)
        if self.sources is None:
            raise RuntimeError(
                "csrc/tensorrt is not here; expected a checkout of genrec, or a wheel that brings it along"
            )
        tensorrt, cuda = os.environ.get("TENSORRT_INCLUDE_DIR"), os.environ.get("CUDA_INCLUDE_DIR")
        self.includes = [path for path in (tensorrt, cuda or _triton_include()) if path]
        for header, variable in ("cuda.h", "CUDA_INCLUDE_DIR"), ("NvInferRuntime.h", "TENSORRT_INCLUDE_DIR"):
            if self._run("-E", "-x", "c++", "-include", header, os.devnull, "-o", os.devnull).returncode:
                raise RuntimeError(f"g++ does not find {header}; expected the directory that has it in {variable}")

    def _run(self, *options: str) -> subprocess.CompletedProcess[str]:
        includes = [option for path in self.includes for option in ("-isystem", path)]
        return subprocess.run(["g++", "-std=c++17", *includes, *options], capture_output=True, text=True)

    def link(self, images: Sequence[Compiled], library: Path) -> Path:
        """Write the library that launches `images`."""
        assert self.sources is not None
        sources, objects = sorted(map(str, self.sources.glob("*.cpp"))), ["-s", "-ldl"]
        flags = ["-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wno-deprecated-declarations"]
        static = ["-static-libstdc++", "-static-libgcc", "-Wl,--no-undefined"]
        exports = f"-Wl,--version-script={self.sources / 'exports.map'}"
        with tempfile.TemporaryDirectory() as folder, atomic_file(library) as temporary:
            write_table(images, Path(folder))
            blob = f'-DGENREC_IMAGES="{folder}/images.bin"'
            done = self._run(*flags, *static, exports, "-I", folder, blob, *sources, *objects, "-o", str(temporary))
            if done.returncode:
                raise RuntimeError(f"g++ does not build {library}:\n{done.stderr[-3000:]}")
        return library


def _source_folders() -> list[Path]:
    """Where the C++ sources may be: in the wheel, or in a checkout."""
    here = Path(__file__).parent
    return [here / "csrc", here.parents[1] / "csrc" / "tensorrt"]


def _triton_include() -> str | None:
    spec = find_spec("triton")
    return None if spec is None or spec.origin is None else str(Path(spec.origin).parent / "backends/nvidia/include")


def write_table(images: Sequence[Compiled], folder: Path) -> None:
    """images.bin, the images one after the other, and images.inc, one C++ initializer for each."""
    places: dict[bytes, int] = {}
    content, rows = bytearray(), []
    for image in images:
        if image.content not in places:
            content += bytes(-len(content) % 64)
            places[image.content] = len(content)
            content += image.content
        parameters = ", ".join(f"{{'{code}', \"{name}\"}}" for code, name in image.parameters)
        constants = ", ".join(f'{{"{name}", {value}}}' for name, value in image.constants)
        rows.append(
            f'{{"{image.name}", "{image.kernel}", {image.most}, {image.arch}, {int(image.is_ptx)}, {image.shared}, '
            f'{image.threads}, {places[image.content]}u, "{image.entry}", {{{parameters}}}, {{{constants}}}}},\n'
        )
    (folder / "images.bin").write_bytes(content)
    (folder / "images.inc").write_text("".join(rows))


def main(arguments: Sequence[str] | None = None) -> int:
    names = {name: dtype for dtype, name in DTYPES.items()}
    parser = argparse.ArgumentParser(
        prog="python -m genrec.export.plugins", description="Build the TensorRT plugins of trained models."
    )
    parser.add_argument("--model", nargs="+", type=Path, required=True, help="directories with a model.json")
    parser.add_argument("--dtype", nargs="+", default=["fp16"], choices=names, help="default: fp16")
    parser.add_argument("--arch", nargs="*", type=int, default=list(ALL), choices=ALL, help="default: all")
    parser.add_argument("--out", type=Path, required=True, help="directory of the library")
    options = parser.parse_args(arguments)
    try:
        shapes = [Shapes.of(UGTConfig(**read_model_json(path)["model"])) for path in options.model]
        library = build_plugins(shapes, [names[name] for name in options.dtype], options.out, options.arch)
    except (OSError, RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{library}: {math.ceil(library.stat().st_size / 1e6)} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
