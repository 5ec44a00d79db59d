"""Which server is found, and what is said where there is none."""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from genrec.serving.program import NoServerError, docker_line, find_program, model_arguments

ENVIRONMENT = {
    "pytriton": "/env/pytriton", "python": "3.11", "library": "libpython3.11.so.1.0", "library_path": "/env/lib",
    "numpy": "1.26.4", "onnxruntime": "1.22.0",
}  # fmt: skip


@pytest.fixture
def python(tmp_path):
    """python(key=value …) → an interpreter whose environment answers so."""

    def make(**changes):
        environment = {**ENVIRONMENT, "pytriton": str(tmp_path / "pytriton"), **changes}
        path = tmp_path / "bin" / "python"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\necho {shlex.quote(json.dumps(environment))}\n")
        path.chmod(0o755)
        stub = tmp_path / "pytriton" / "tritonserver" / "python_backend_stubs" / "3.11" / "triton_python_backend_stub"
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.touch()
        return path

    return make


def test_the_wheel(python, tmp_path, repository, monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", "/before")
    program = find_program(python(), repository)
    assert program.executable == tmp_path / "pytriton" / "tritonserver" / "bin" / "tritonserver"
    assert program.environment["LD_LIBRARY_PATH"] == f"/env/lib:{tmp_path}/nvidia_pytriton.libs:/before"
    assert program.environment["PATH"].startswith(f"{tmp_path}/bin:")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"numpy": "2.4.6"}, "has numpy 2.4.6, with which this server answers nothing but empty tensors"),
        ({"numpy": None}, "has no numpy"),
        ({"onnxruntime": None}, "has no onnxruntime"),
        ({"library_path": None}, "has no libpython3.11.so.1.0"),
        ({"python": "3.14"}, "has no stub for Python 3.14"),
    ],
)
def test_an_environment_that_cannot_run_the_models(python, repository, changes, words):
    with pytest.raises(ValueError, match=words):
        find_program(python(**changes), repository)


def test_a_wheel_has_no_tensorrt(python, repository):
    with pytest.raises(NoServerError, match="has no TensorRT backend"):
        find_program(python(), replace(repository, flavour="gpu"))


def test_an_interpreter_that_is_none(repository, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the interpreter of an environment"):
        find_program(tmp_path / "python", repository)
    with pytest.raises(ValueError, match="which does not run"):
        find_program(Path("/bin/false"), repository)


def test_path_comes_first_unless_an_interpreter_is_named(python, repository, tmp_path, monkeypatch):
    server = tmp_path / "server" / "tritonserver"
    server.parent.mkdir()
    server.write_text("#!/bin/sh\n")
    server.chmod(0o755)
    monkeypatch.setenv("PATH", str(server.parent))
    assert find_program(None, repository).executable == server
    assert find_program(None, replace(repository, flavour="gpu")).executable == server
    assert find_program(python(), repository).executable != server


def test_without_any_the_docker_line_is_printed(repository, main, capsys, monkeypatch, python):
    monkeypatch.setenv("PATH", "/nothing")
    monkeypatch.setattr(sys, "executable", str(python(pytriton=None)))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert main(["serve", "--repository", str(repository.directory)]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("docker run --rm ")
    assert "no tritonserver on PATH and no nvidia-pytriton" in err
    assert err.count("\n") == 1


def test_docker_line(repository, tmp_path):
    line = docker_line(repository)
    words = shlex.split(line)
    assert f"{repository.directory}:/models:ro" in words
    assert "onnxruntime 'numpy<2' && tritonserver --model-repository=/models" in words[-1]
    assert "--gpus" not in words
    (tmp_path / "recommend_graph").mkdir()
    (tmp_path / "recommend_graph" / "libgenrec_trt.so").touch()
    gpu = replace(repository, flavour="gpu", directory=tmp_path)
    words = shlex.split(docker_line(gpu))
    assert words[words.index("--gpus") + 1] == "all"
    assert "--backend-config=tensorrt,plugins=/models/recommend_graph/libgenrec_trt.so" in words[-1]
    assert "--load-model=recommend" in model_arguments(gpu, tmp_path)
