"""A page to look at: pick a user or type a history, see what is recommended and why. Served until Ctrl-C.

genrec demo-ui runs/demo
genrec demo-ui runs/demo --port 0 --open_browser true
"""

from __future__ import annotations

import webbrowser
from dataclasses import dataclass
from pathlib import Path

from genrec.cli.signals import TerminatedError, held_signals
from genrec.demo_ui.answers import Demo
from genrec.demo_ui.server import Server
from genrec.generation.storage import load_run


@dataclass(frozen=True)
class Config:
    run: Path
    """directory of a finished genrec train run"""
    host: str = "127.0.0.1"
    """address to listen on; the page asks nobody who they are, and it shows the log"""
    port: int = 7860
    """port to listen on; 0 takes a free one"""
    features: Path | None = None
    """directory written by genrec features; the one the model was trained on unless told otherwise"""
    open_browser: bool = False
    """open the page in a browser of this machine"""


def run(config: Config) -> None:
    """Load the run, say where the page is, serve it."""
    if not 0 <= config.port <= 65535:
        raise ValueError(f"port is {config.port}; expected 0 to 65535")
    demo = Demo(load_run(config.run, config.features), config.run.resolve().name)
    try:
        with held_signals() as check, _server(config, demo) as server:
            print(f"{server.url} shows {config.run}; Ctrl-C stops it", flush=True)
            if config.open_browser:
                webbrowser.open(server.url)
            server.serve(check)
    except TerminatedError:
        print("stopped")


def _server(config: Config, demo: Demo) -> Server:
    try:
        return Server(config.host, config.port, demo)
    except OSError as error:
        raise OSError(
            f"port {config.port} cannot be had on {config.host} ({error.strerror}); stop what listens there or pass "
            "another --port"
        ) from None
