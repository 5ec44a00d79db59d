"""Serve a trained run, or any model repository, on a Triton Inference Server of this machine, until Ctrl-C.

genrec serve runs/demo --python .venv-serve/bin/python
genrec serve --repository DIR

A run is exported into its directory `triton` first, unless what is there is newer than the weights. Where there is no
tritonserver, the command that starts one with docker is printed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from genrec.cli.signals import TerminatedError, held_signals
from genrec.export.triton_server import Repository, read_repository
from genrec.serving.program import NoServerError, docker_line, find_program
from genrec.serving.server import Ports, Server, running


@dataclass(frozen=True)
class Config:
    run: Path | None = None
    """directory of a trained run; may be given by its place"""
    repository: Path | None = None
    """instead, a model repository that genrec export --to triton wrote"""
    python: Path | None = None
    """interpreter of the environment that has nvidia-pytriton, onnxruntime and numpy<2; unless given, a tritonserver on
    PATH is taken, else this environment"""
    host: str = "127.0.0.1"
    """address to listen on; Triton asks nobody who they are, so open it to other machines behind a gateway only"""
    http_port: int = 8000
    """port for HTTP"""
    grpc_port: int = 8001
    """port for gRPC"""
    metrics_port: int = 8002
    """port for Prometheus"""
    log: Path | None = None
    """file for the server's own words; beside the repository unless given"""
    timeout: float = 120.0
    """seconds that loading the models may take"""


def run(config: Config) -> None:
    """Start, say where it listens, wait. Ctrl-C and SIGTERM stop the server in good order."""
    repository = read_repository(_repository(config))
    try:
        program = find_program(config.python, repository)
    except NoServerError:
        print(docker_line(repository))
        raise
    directory = repository.directory.resolve()
    log = config.log or directory.with_name(f"{directory.name}.log")
    ports = Ports(config.http_port, config.grpc_port, config.metrics_port, config.host)
    loading = Console(stderr=True).status(f"loading the models of {directory} …")
    try:
        with (
            held_signals() as check,
            loading,
            running(repository, program, ports, log, config.timeout, check) as server,
        ):
            loading.stop()
            _announce(server, repository)
            server.wait(check)
    except TerminatedError:
        print("stopped")


def _repository(config: Config) -> Path:
    """The one to serve; a run's is written where it is not there or older than the weights."""
    if (config.run is None) == (config.repository is None):
        raise ValueError("expected either a run or --repository, and not both")
    if config.run is None:
        assert config.repository
        return config.repository
    out = config.run / "triton"
    weights = next(
        (p for p in (config.run / "model.safetensors", config.run / "model/model.safetensors") if p.is_file()), None
    )
    exported = out / "recommend_graph" / "config.pbtxt"
    if weights is None or not exported.is_file() or exported.stat().st_mtime < weights.stat().st_mtime:
        from genrec.cli import export  # with torch, which serving alone does without

        export.run(export.Config(config.run, "triton", out, overwrite=True))
    return out


def _announce(server: Server, repository: Repository) -> None:
    ports = server.ports
    print(f"serving {repository.directory}, version {repository.version}; Ctrl-C stops it")
    print(f"HTTP     http://{ports.host}:{ports.http}/v2/models/recommend/infer")
    print(f"gRPC     {ports.host}:{ports.grpc}")
    print(f"metrics  http://{ports.host}:{ports.metrics}/metrics")
    print(f"log      {server.log}")
    print(curl_line(repository, ports), flush=True)


def curl_line(repository: Repository, ports: Ports) -> str:
    """One request, with the first item of the catalogue as the history, as a shell command."""
    request = {"inputs": [_input(value, repository) for value in repository.about["inputs"]]}
    body = json.dumps(request, ensure_ascii=False).replace("'", "'\\''")
    return f"curl -s http://{ports.host}:{ports.http}/v2/models/recommend/infer -d '{body}'"


def _input(value: dict, repository: Repository) -> dict:
    if value["name"] == "history":
        return {"name": "history", "datatype": "BYTES", "shape": [1, 1], "data": repository.item_ids()[:1]}
    shape = [1, *(size if isinstance(size, int) else 1 for size in value["shape"][1:])]
    size = 1
    for length in shape:
        size *= length
    return {"name": value["name"], "datatype": value["dtype"].upper(), "shape": shape, "data": [0] * size}
