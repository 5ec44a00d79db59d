"""The page and its answers over HTTP, from the standard library.

It is made for one person at their own machine. Bound to a loopback address it answers only requests that name this
machine in their Host header, so a site elsewhere cannot read the log by pointing its own name here (DNS rebinding);
what is asked by POST must be JSON, which a form on another site cannot send.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import ipaddress
import json
import re
import socket
import sys
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, urlsplit

from genrec.demo_ui.answers import Demo
from genrec.demo_ui.question import read_question
from genrec.pages.style import CSS

LARGEST = 1 << 20  # bytes of a request's body
PER_PAGE = 100


class Server(ThreadingHTTPServer):
    """Serves one run; `server_address` says where."""

    daemon_threads = False  # one that outlives the interpreter aborts the process where it lets go of a tensor
    request_queue_size = 128  # that wait to be accepted; the default of 5 resets connections on a busy machine

    def __init__(self, host: str, port: int, demo: Demo) -> None:
        self.demo, self.page = demo, read_page()
        self._connections: set[socket.socket] = set()
        self._check: Callable[[], None] = lambda: None
        self.policy = _policy(self.page)
        self.host = host
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)

    def serve(self, check: Callable[[], None]) -> None:
        """Answer until `check` raises, which is called after every request and ten times a second."""
        self._check = check
        self.serve_forever(poll_interval=0.1)

    def service_actions(self) -> None:
        """Called by serve_forever between requests."""
        self._check()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Remember the connection, for server_close."""
        connection, address = super().get_request()
        self._connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        """The request is answered: forget the connection."""
        self._connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Hang up on everybody, also on who never said a word, and wait until their threads have ended."""
        for connection in list(self._connections):
            with contextlib.suppress(OSError):  # it ended just now
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is not worth a traceback."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """What to type into a browser."""
        host = {"0.0.0.0": "localhost", "::": "localhost"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}/"


def read_page() -> str:
    """The page as it is sent: one document with the style of genrec's other pages in it."""
    return files("genrec.demo_ui").joinpath("page.html").read_text(encoding="utf-8").replace("/* CSS */", CSS)


class Handler(BaseHTTPRequestHandler):
    """One request: a page, or JSON. What is wrong with a request is status 400 and {"error": a sentence}."""

    server: Server
    timeout = 30  # seconds without a word
    server_version = "genrec"
    sys_version = ""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, what: Any) -> None:
        try:
            status, kind, content = what()
        except ValueError as error:
            status, kind, content = 400, "application/json", {"error": str(error)}
        except LookupError:
            status, kind, content = 404, "application/json", {"error": f"{self.path[:80]!r} is not here"}
        except OSError:
            raise  # the client is gone
        except Exception as error:
            traceback.print_exc()
            status, kind, content = 500, "application/json", {"error": f"unexpected {type(error).__name__}: {error}"}
        self._send(status, kind, content if isinstance(content, str) else json.dumps(content, allow_nan=False))

    def _get(self) -> tuple[int, str, Any]:
        self._check_host()
        path, query = _split(self.path)
        demo = self.server.demo
        if path == "/":
            return 200, "text/html", self.server.page
        if path == "/api/run":
            return 200, "application/json", demo.about()
        search = {"/api/users": demo.users, "/api/items": demo.items}[path]
        offset, limit = _number(query, "offset", 0, 0, 10**9), _number(query, "limit", 20, 1, PER_PAGE)
        return 200, "application/json", search(query.get("q", "")[:200], offset, limit)

    def _post(self) -> tuple[int, str, Any]:
        body = self._body()  # before anything else: a connection closed on unread words loses the answer
        self._check_host()
        if _split(self.path)[0] != "/api/recommend":
            raise LookupError
        if self.headers.get_content_type() != "application/json":
            raise ValueError(f"the body is {self.headers.get_content_type()}; expected application/json")
        try:
            value = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the body is not JSON ({error})") from None
        demo = self.server.demo
        return 200, "application/json", demo.recommend(read_question(value, demo.run.settings))

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,9}", length) or int(length) > LARGEST:
            raise ValueError(f"Content-Length is {length!r:.20}; expected 0 to {LARGEST}")
        return self.rfile.read(int(length))

    def _check_host(self) -> None:
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        if _is_loopback(self.server.host) and not _is_loopback(host):
            raise ValueError(f"Host is {host!r:.80}; expected localhost or 127.0.0.1, where this page is served")

    def _send(self, status: int, kind: str, content: str) -> None:
        data = content.encode()
        self.send_response(status)
        for name, value in (
            ("Content-Type", f"{kind}; charset=utf-8"),
            ("Content-Length", str(len(data))),
            ("Content-Security-Policy", self.server.policy),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """A line for every keystroke would hide what matters."""


def _policy(page: str) -> str:
    """Only the page's own script and style run, known by their hashes: a title cannot bring in another."""

    def hashes(tag: str) -> str:
        blocks = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        sums = (base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks)
        return " ".join(f"'sha256-{value}'" for value in sums)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _split(target: str) -> tuple[str, dict[str, str]]:
    parts = urlsplit(target)
    return parts.path, {name: values[-1] for name, values in parse_qs(parts.query).items()}


def _number(query: dict[str, str], name: str, default: int, low: int, high: int) -> int:
    text = query.get(name, str(default))
    if not re.fullmatch("[0-9]{1,12}", text) or not low <= int(text) <= high:
        raise ValueError(f"{name} is {text!r:.80}; expected a number from {low} to {high}")
    return int(text)
