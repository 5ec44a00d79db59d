"""One real Triton server for all tests of this folder, and a small export for it to serve."""

import os
import shutil
import socket
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import stand_in

from genrec import cli
from genrec.export.triton_server import Batching, read_repository, write_repository
from genrec.serving.program import find_program
from genrec.serving.server import Ports, running

ROOT = Path(__file__).parents[2]


class Answer(NamedTuple):
    version: int
    item_ids: list[list[str]]
    titles: list[list[str]]
    scores: list[list[float]]


class Client:
    """tritonclient over one of its protocols, one connection for each thread that asks."""

    def __init__(self, protocol, url):
        self.library = pytest.importorskip(f"tritonclient.{protocol}")
        self.http = protocol == "http"
        self.connection = self.library.InferenceServerClient(url)

    def tensor(self, name, values, dtype):
        array = np.array(values, np.object_ if dtype == "BYTES" else np.int64)
        tensor = self.library.InferInput(name, array.shape, dtype)
        tensor.set_data_from_numpy(array)
        return tensor

    def recommend(self, histories):
        """Histories of item ids, padded with empty strings."""
        length = max(map(len, histories))
        padded = [[*history, *[""] * (length - len(history))] for history in histories]
        result = self.connection.infer("recommend", [self.tensor("history", padded, "BYTES")])
        response = result.get_response()
        version = response["model_version"] if self.http else response.model_version
        words = {name: [[w.decode() for w in row] for row in result.as_numpy(name)] for name in ("item_ids", "titles")}
        return Answer(int(version), words["item_ids"], words["titles"], result.as_numpy("scores").tolist())


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    """version → the export that the repository has under it, sooner or later."""
    directory = tmp_path_factory.mktemp("exports")
    return {
        1: stand_in.write_export(directory / "one", "one", seed=0),
        2: stand_in.write_export(directory / "two", "two", seed=1),
    }


@pytest.fixture(scope="session")
def serving_python():
    """The interpreter of the serving environment; None where a tritonserver is on PATH."""
    python = Path(os.environ.get("GENREC_SERVE_PYTHON", ROOT / ".venv-serve" / "bin" / "python"))
    if python.exists():
        return python
    if shutil.which("tritonserver"):
        return None
    pytest.skip("no tritonserver: make .venv-serve, or name an environment with nvidia-pytriton in GENREC_SERVE_PYTHON")


@pytest.fixture(scope="session")
def free_ports():
    """free_ports() → Ports on which nothing listens."""

    def find():
        sockets = [socket.socket() for _ in range(3)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        numbers = [one.getsockname()[1] for one in sockets]
        for one in sockets:
            one.close()
        return Ports(*numbers)

    return find


@pytest.fixture(scope="session")
def repository(exports, tmp_path_factory):
    """With version 1; the test of reloading adds version 2."""
    directory = tmp_path_factory.mktemp("served") / "repository"
    write_repository(exports[1], directory, batching=Batching(max_length=100))
    return read_repository(directory)


@pytest.fixture(scope="session")
def server(repository, serving_python, free_ports):
    """A server on it, ready."""
    program = find_program(serving_python, repository)
    log = repository.directory.with_name("server.log")
    with running(repository, program, free_ports(), log, timeout=300) as ready:
        yield ready


@pytest.fixture(scope="session")
def connect(server):
    """connect("http" or "grpc") → a Client."""

    def make(protocol):
        return Client(protocol, f"127.0.0.1:{getattr(server.ports, protocol)}")

    return make


@pytest.fixture
def main():
    """The command line."""
    return cli.main
