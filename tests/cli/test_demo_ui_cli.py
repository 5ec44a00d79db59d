"""genrec demo-ui as a user types it."""

import contextlib
import http.client
import queue
import signal
import socket
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest


def read_until_gone(url, pages):
    with contextlib.suppress(OSError, http.client.HTTPException):
        while True:
            with urllib.request.urlopen(url, timeout=60) as answer:
                pages.put(answer.read())


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [(signal.SIGINT, 130, ("", "genrec demo-ui: error: interrupted\n")), (signal.SIGTERM, 0, ("stopped\n", ""))],
)
def test_serves_until_it_is_told_to_stop(trained, number, code, words):
    command = [sys.executable, "-c", "import sys; from genrec.cli import main; sys.exit(main(sys.argv[1:]))"]
    arguments = ["demo-ui", str(trained), "--port", "0"]
    restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731  a background job ignores it
    with subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=restore
    ) as process:
        line = process.stdout.readline()
        url, rest = line.split(" ", 1)
        assert rest == f"shows {trained}; Ctrl-C stops it\n"
        pages: queue.Queue[bytes] = queue.Queue()
        with ThreadPoolExecutor(8) as readers:  # who keep it busy meanwhile
            for _ in range(8):
                readers.submit(read_until_gone, url, pages)
            try:
                assert all(b"<!doctype html>" in pages.get(timeout=60) for _ in range(40))
                process.send_signal(number)
                said = process.communicate(timeout=60)
            finally:
                process.kill()
    assert (process.returncode, said) == (code, words)


def test_a_port_that_is_taken(trained, refused):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        words = f"port {port} cannot be had on 127.0.0.1 (Address already in use)", "pass another --port"
        refused(["demo-ui", str(trained), "--port", str(port)], 3, *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ("nowhere holds no model", "finished genrec train run")),
        (["{trained}", "--port", "70000"], ("port is 70000; expected 0 to 65535",)),
        (["{trained}", "--features", "nowhere"], ("nowhere",)),
        (["{trained}", "--prt", "1"], ("--prt",)),
        (["{trained}/features"], ("holds no model",)),
    ],
)
def test_refusals_are_one_line_and_exit_code_2(trained, refused, arguments, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused(["demo-ui", *(word.format(trained=trained) for word in arguments)], 2, *words)
