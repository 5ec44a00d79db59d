"""Ask a running server as many clients would, and say how many answers a second it gives and how long each took.

genrec loadtest --repository runs/demo/triton --clients 32 --seconds 10
genrec loadtest --url 127.0.0.1:8001 --protocol grpc --users histories.jsonl
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from genrec.export.triton_server import read_repository
from genrec.serving.loadtest import PERCENTILES, Protocol, random_histories, read_histories, run_load


@dataclass(frozen=True)
class Config:
    url: str | None = None
    """host:port of the server; 127.0.0.1:8000, or :8001 for grpc, unless given"""
    repository: Path | None = None
    """model repository: requests are random histories of its items, up to as many as the model reads"""
    users: Path | None = None
    """instead, a file of histories: one JSON array of item ids a line"""
    clients: int = 32
    """requests under way at any time"""
    seconds: float = 10.0
    """how long to ask"""
    protocol: Protocol = "http"
    """http or grpc"""
    model: str = "recommend"
    """which model of the server"""
    seed: int = 0
    """of the random histories"""
    json: bool = False
    """print one JSON object instead of a table"""


def run(config: Config) -> None:
    """Run the load and print what came of it."""
    if (config.repository is None) == (config.users is None):
        raise ValueError("expected either --repository or --users, to know what to ask, and not both")
    if config.clients < 1 or not config.seconds > 0:
        raise ValueError(f"clients is {config.clients} and seconds {config.seconds:g}; expected 1 or more and above 0")
    if config.users:
        histories = read_histories(config.users)
    else:
        assert config.repository
        repository = read_repository(config.repository)
        histories = random_histories(repository.item_ids(), repository.about["max_events"], seed=config.seed)
    url = (config.url or f"127.0.0.1:{8000 if config.protocol == 'http' else 8001}").removeprefix("http://")
    result = run_load(url.rstrip("/"), config.protocol, config.model, histories, config.clients, config.seconds)
    summary = {"url": url, "protocol": config.protocol, "clients": config.clients, **result.summary()}
    if config.json:
        print(json.dumps(summary, ensure_ascii=False))
        return
    table = Table("answers a second", *(f"p{q} ms" for q in PERCENTILES), "requests", "errors")
    table.title = f"{config.clients} clients, {config.protocol}, {result.seconds:.1f} s"
    table.add_row(
        f"{summary['throughput']:.0f}", *(f"{summary[f'p{q}_ms']:.2f}" for q in PERCENTILES),
        str(summary["requests"]), str(summary["errors"]),
    )  # fmt: skip
    console = Console(markup=False)
    console.print(table)
    if result.errors:
        console.print(f"the first error: {summary['first_error']}")
