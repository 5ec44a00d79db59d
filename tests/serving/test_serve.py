"""genrec serve as a process of its own: what it prints, how it ends, what it leaves behind."""

import json
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from genrec.export.triton_server import write_repository
from genrec.serving.server import SHARED_MEMORY, Ports, last_words


@pytest.fixture
def own(exports, tmp_path):
    """A repository of its own, so that its processes can be told from those of other tests."""
    write_repository(exports[1], tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture(autouse=True)
def nothing_shared_is_left():
    """Neither a server that ends nor one that is killed leaves shared memory behind."""
    before = orphans()
    yield
    assert not orphans() - before


def orphans():
    """The shared memory of servers that have ended: the directory that it is named after is gone."""
    regions = {path: "-".join(path.name.split("-")[:3]) for path in SHARED_MEMORY.glob("genrec-serve-*")}
    return {region for region, directory in regions.items() if not Path(tempfile.gettempdir(), directory).exists()}


def listen():
    """To SIGINT, which a background job ignores."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def serve(own, serving_python, free_ports):
    """serve() → a genrec serve process on it, and its ports."""
    started = []

    def start():
        ports = free_ports()
        argv = ["serve", "--repository", str(own), *(["--python", str(serving_python)] if serving_python else [])]
        for name in ("http", "grpc", "metrics"):
            argv += [f"--{name}_port", str(getattr(ports, name))]
        command = [sys.executable, "-m", "genrec", *argv]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, **pipes, text=True, preexec_fn=listen))
        return started[-1], ports

    yield start
    for process in started:
        process.kill()
        process.communicate()


def processes_of(directory):
    """Command lines that name the directory: the server's and its stubs'."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # no process, or one that has ended meanwhile
            continue
        if str(directory) in line and "-m genrec serve" not in line:
            found.append(line)
    return found


def test_serve_says_where_and_sigterm_ends_it(own, serve):
    process, ports = serve()
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if line.startswith("curl"):
            break
    assert lines[0] == f"serving {own}, version 1; Ctrl-C stops it"
    assert f"http://127.0.0.1:{ports.metrics}/metrics" in "\n".join(lines)
    words = shlex.split(lines[-1])
    with urllib.request.urlopen(words[2], words[4].encode(), timeout=60) as answer:
        assert json.load(answer)["outputs"][0]["name"] == "item_ids"
    assert len(processes_of(own)) >= 4  # the server, two stubs of the service, one of the graph
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out.strip(), err.strip().count("\n")) == (0, "stopped", 0)
    assert not processes_of(own)
    assert "Started HTTPService" in own.with_name("own.log").read_text()


def test_ctrl_c_while_the_models_load(own, serve):
    process, _ = serve()
    deadline = time.monotonic() + 120
    while not processes_of(own) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "genrec serve: error: interrupted"
    assert not processes_of(own)


def test_a_model_that_does_not_load(own, serve):
    (own / "recommend_graph" / "1" / "model.onnx").write_bytes(b"no graph")
    process, _ = serve()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3
    assert "ended with exit code 1 at its start: failed to load 'recommend_graph' version 1" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not processes_of(own)


def test_busy_and_wrong_ports(free_ports):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(OSError, match=f"grpc_port {port} cannot be had on 127.0.0.1"):
            replace(free_ports(), grpc=port).check()
    with pytest.raises(ValueError, match="expected three different ones"):
        Ports(9000, 9000, 9001).check()
    with pytest.raises(ValueError, match="metrics_port is 99999; expected 1 to 65535"):
        Ports(metrics=99999).check()


def test_not_a_repository(main, capsys, tmp_path):
    assert main(["serve", "--repository", str(tmp_path)]) == 2
    assert "expected a model repository, the output of genrec export --to triton" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('E1123 09:00:00.1 7 a.cc:1] "one"\nE1123 09:00:00.2 7 a.cc:1] "two: x\\nAt: y"\nerror: three', "two: x"),
        ('E1123 09:00:00.1 7 a.cc:1] "CudaDriverHelper has not been initialized."\nerror: three\nlast', "error: three"),
        ("one\nlast\n\n", "last"),
        ("", "is empty"),
    ],
)
def test_last_words(tmp_path, text, found):
    log = tmp_path / "log"
    log.write_text(text)
    assert last_words(log).endswith(found)
