"""The page of a small run over real HTTP, with one title that is not only text."""

import contextlib
import json
import shutil
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genrec.demo_ui.answers import Demo
from genrec.demo_ui.server import Server
from genrec.generation.storage import load_run

HTML = "<img src=x onerror=\"document.body.dataset.broken='yes'\"><script>document.body.dataset.broken='yes'</script>"


@pytest.fixture(scope="session")
def html_title():
    return HTML


@pytest.fixture(scope="session")
def run_directory(trained, tmp_path_factory):
    """A copy of the run in which the most popular item is called HTML."""
    directory = tmp_path_factory.mktemp("shown")
    for name in ("features", "model"):
        shutil.copytree(trained / name, directory / name)
    path = directory / "features" / "items.parquet"
    table = pq.read_table(path)
    titles = pa.array([HTML, *table["title"].to_pylist()[1:]])
    pq.write_table(table.set_column(table.schema.get_field_index("title"), "title", titles), path)
    return directory


@pytest.fixture(scope="session")
def demo(run_directory: Path) -> Demo:
    return Demo(load_run(run_directory, run_directory / "features"), "a run")


@contextlib.contextmanager
def served(demo):
    """A server in a thread of its own."""
    with Server("127.0.0.1", 0, demo) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="session")
def server(demo):
    with served(demo) as server:
        yield server


@pytest.fixture
def serve():
    return served


@pytest.fixture(scope="session")
def call(server):
    """call(path, body, **headers) → (status, JSON value)."""

    def run(path, body=None, **headers):
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"} if data is not None else {}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(server.url + path, data, {**kind, **named})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    return run


@pytest.fixture(scope="session")
def recommend(call):
    """recommend(**body) → the answer, which must be a good one."""

    def run(**body):
        status, answer = call("api/recommend", body)
        assert status == 200, answer
        return answer

    return run
