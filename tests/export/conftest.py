"""A plugin library for small models, built once for all tests; what it needs is g++, Triton and TensorRT's headers."""

import ctypes
import importlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plugin_harness import EVEN, TINY, Stub

from genrec.export.kernel_images import Compiled, compile_kernels
from genrec.export.plugins import Compiler

HERE = Path(__file__).parent
OPTIONS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-deprecated-declarations")


@pytest.fixture(scope="session")
def compiler() -> Iterator[Compiler]:
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    with pytest.MonkeyPatch.context() as patch:
        if "TENSORRT_INCLUDE_DIR" not in os.environ:
            found = importlib.util.find_spec("kernel_lens")  # which brings the headers of TensorRT 10.14 along
            if found is None or found.origin is None:
                pytest.skip("TensorRT's headers are not here; expected TENSORRT_INCLUDE_DIR or kernel-lens==2.0.1")
            patch.setenv("TENSORRT_INCLUDE_DIR", str(Path(found.origin).parent / "include" / "tensorrt"))
        yield Compiler()


@pytest.fixture(scope="session")
def images(compiler: Compiler) -> list[Compiled]:
    """TINY in float32 as PTX, EVEN in half precision for sm_80, sm_90 and as PTX."""
    return [*compile_kernels([TINY], [torch.float32], []), *compile_kernels([EVEN], [torch.float16], [80, 90])]


@pytest.fixture(scope="session")
def library(compiler: Compiler, images: list[Compiled], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiler.link(images, tmp_path_factory.mktemp("plugins") / "libgenrec_trt.so")


@pytest.fixture(scope="session")
def harness(compiler: Compiler, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("harness") / "harness.so"
    includes = [option for folder in compiler.includes for option in ("-isystem", folder)]
    subprocess.run(["g++", *OPTIONS, *includes, HERE / "harness.cpp", "-ldl", "-o", path], check=True)
    return path


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stub]:
    """A driver that records, behind every library that is loaded from now on."""
    path = tmp_path_factory.mktemp("stub") / "libcuda_stub.so"
    subprocess.run(["gcc", "-O1", "-fPIC", "-shared", HERE / "libcuda_stub.c", "-o", path], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENREC_LIBCUDA", str(path))
        yield Stub(path)


@pytest.fixture(scope="session")
def tensorrt(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TensorRT-RTX. Its parser asks for a libtensorrt_rtx.so that the wheel calls by another name: an empty library of
    that name, which needs the real one, is loaded before."""
    module = pytest.importorskip("tensorrt_rtx")
    folder = Path(importlib.import_module("tensorrt_rtx_libs").__path__[0])
    path = tmp_path_factory.mktemp("rtx") / "libtensorrt_rtx.so"
    real = next(folder.glob("libtensorrt_rtx.so*"))
    name = ["-Wl,--no-as-needed", f"-Wl,-soname,{path.name}"]
    subprocess.run(["gcc", "-shared", "-x", "c", os.devnull, "-x", "none", *name, real, "-o", path], check=True)
    ctypes.CDLL(str(path))
    return module
