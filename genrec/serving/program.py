"""Which tritonserver can be started here: one on PATH, or the one that the wheel of nvidia-pytriton brings along.

The wheel holds a whole server with the python backend. A python model runs in a stub process that embeds the Python of
an environment; the server finds that environment by PATH and its library by LD_LIBRARY_PATH.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genrec.export.triton_server import Repository

IMAGE = "nvcr.io/nvidia/tritonserver:24.10-py3"
SERVER = Path("tritonserver", "bin", "tritonserver")  # inside of the package pytriton
# Asked of the environment's own interpreter; imports nothing of it but the standard library.
PROBE = """
import ctypes, importlib.metadata, importlib.util, json, pathlib, sys, sysconfig
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
spec = importlib.util.find_spec("pytriton")
python = "%d.%d" % sys.version_info[:2]
library, where = "libpython%s.so.1.0" % python, sysconfig.get_config_var("LIBDIR") or ""
if not pathlib.Path(where, library).exists():
    where = ""
    try:
        ctypes.CDLL(library)
    except OSError:
        where = None
print(json.dumps({
    "pytriton": spec and spec.submodule_search_locations[0], "python": python, "library": library,
    "library_path": where, "numpy": version("numpy"), "onnxruntime": version("onnxruntime"),
}))
"""


@dataclass(frozen=True)
class Program:
    """A tritonserver, and what it needs around it."""

    executable: Path
    environment: dict[str, str] = field(default_factory=dict)
    """variables that differ from ours"""
    backend: Path | None = None
    """directory of the python backend where it is not installed beside the server"""
    stub: Path | None = None
    """the backend's stub for the environment's version of Python"""


class NoServerError(FileNotFoundError):
    """There is no tritonserver that can serve this repository."""


def find_program(python: Path | None, repository: Repository) -> Program:
    """The server in the environment of `python` if it is given, else on PATH, else in the environment we run in.

    Raises NoServerError where there is none that can serve the repository, ValueError for an environment that has one
    but cannot run the models, FileNotFoundError if `python` is not there.
    """
    if python is None and (found := shutil.which("tritonserver")):
        return Program(Path(found))
    environment = _ask(python or Path(sys.executable))
    where = python or sys.executable
    if environment["pytriton"] is None:
        raise NoServerError(
            f"no tritonserver on PATH and no nvidia-pytriton in {where}; pip install 'genrec[serve]' in an environment "
            "of its own and name its interpreter with --python, or run the docker line above"
        )
    if repository.flavour == "gpu":
        raise NoServerError(
            f"{repository.directory} holds a TensorRT plan and the server of nvidia-pytriton has no TensorRT backend; "
            "expected a tritonserver on PATH, or run the docker line above"
        )
    return _of_wheel(environment, Path(where))


def docker_line(repository: Repository) -> str:
    """The command that serves the repository from NVIDIA's image."""
    serve = ["tritonserver", "--model-repository=/models", *model_arguments(repository, Path("/models"))]
    gpu = repository.flavour == "gpu"
    command = shlex.join(serve) if gpu else f"pip install onnxruntime 'numpy<2' && {shlex.join(serve)}"
    ports = [word for port in (8000, 8001, 8002) for word in ("-p", f"127.0.0.1:{port}:{port}")]
    volume = f"{repository.directory.resolve()}:/models:ro"
    start = ["docker", "run", "--rm", *(["--gpus", "all"] if gpu else []), "--shm-size=1g", *ports, "-v", volume, IMAGE]
    return shlex.join([*start, "sh", "-c", command])


def model_arguments(repository: Repository, directory: Path) -> list[str]:
    """What the server is told of the models; `directory` is where it sees the repository."""
    plugins = sorted((repository.directory / "recommend_graph").glob("*.so"))
    names = ";".join(str(directory / "recommend_graph" / plugin.name) for plugin in plugins)
    return [
        "--model-control-mode=explicit",  # models are loaded anew when they are told to, not when a file moves
        "--load-model=recommend_graph",
        "--load-model=recommend",
        *([f"--backend-config=tensorrt,plugins={names}"] if plugins else []),
    ]


def _ask(python: Path) -> dict[str, Any]:
    if shutil.which(str(python)) is None:
        raise FileNotFoundError(f"python is {python}; expected the interpreter of an environment")
    done = subprocess.run([str(python), "-c", PROBE], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ValueError(f"python is {python}, which does not run: {last}")
    return json.loads(done.stdout)


def _of_wheel(environment: dict[str, Any], python: Path) -> Program:
    """The server of the environment's nvidia-pytriton."""
    numpy = environment["numpy"]
    if numpy is None or environment["onnxruntime"] is None:
        raise ValueError(f"{python} has no {'numpy' if numpy is None else 'onnxruntime'}; pip install 'genrec[serve]'")
    if int(numpy.partition(".")[0]) >= 2:
        raise ValueError(
            f"{python} has numpy {numpy}, with which this server answers nothing but empty tensors; expected numpy<2 "
            "in an environment of its own, as pip install 'genrec[serve]' makes it"
        )
    if environment["library_path"] is None:
        raise ValueError(
            f"{python} has no {environment['library']}, which the server's python backend loads; expected a Python "
            "that was built with a shared library"
        )
    package = Path(environment["pytriton"])
    stub = package / "tritonserver" / "python_backend_stubs" / environment["python"] / "triton_python_backend_stub"
    if not stub.exists():
        raise ValueError(f"nvidia-pytriton has no stub for Python {environment['python']}; expected 3.8 to 3.13")
    libraries = [environment["library_path"], str(package.parent / "nvidia_pytriton.libs")]
    ours = {"LD_LIBRARY_PATH": libraries, "PATH": [str(python.absolute().parent)]}
    return Program(
        executable=package / SERVER,
        environment={
            name: os.pathsep.join([part for part in parts if part] + [*filter(None, [os.environ.get(name)])])
            for name, parts in ours.items()
        },
        backend=package / "tritonserver" / "backends" / "python",
        stub=stub,
    )
