"""Many clients at once against a running server: how many answers a second, and how long each one took.

The clients are coroutines of one event loop, each with one request under way at a time and a new one as soon as that is
answered: a closed loop, so latency and throughput belong together. What the loop itself costs is in both.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

Protocol = Literal["http", "grpc"]
PERCENTILES = (50, 95, 99)
TIMEOUT = 30.0  # seconds after which a request counts as an error


@dataclass
class Result:
    """What the clients saw; latencies in seconds, of answered requests only."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    def summary(self) -> dict[str, Any]:
        """Plain numbers: requests and errors, answers a second, milliseconds."""
        milliseconds = np.array(self.latencies) * 1e3
        return {
            "requests": len(self.latencies) + self.errors.total(),
            "errors": self.errors.total(),
            "seconds": round(self.seconds, 3),
            "throughput": round(len(self.latencies) / self.seconds, 1),
            **{f"p{q}_ms": round(float(np.percentile(milliseconds, q)), 3) for q in PERCENTILES},
            "mean_ms": round(float(milliseconds.mean()), 3),
            "first_error": next(iter(self.errors), None),
        }


def random_histories(item_ids: Sequence[str], longest: int, count: int = 1000, seed: int = 0) -> list[list[str]]:
    """Histories of 1 … `longest` items, drawn from the catalogue."""
    rng = np.random.default_rng(seed)
    return [[item_ids[i] for i in rng.integers(len(item_ids), size=rng.integers(1, longest + 1))] for _ in range(count)]


def read_histories(path: Path) -> list[list[str]]:
    """One JSON array of item ids a line. Raises ValueError for a line that is none, FileNotFoundError if missing."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a file with one JSON array of item ids a line")
    histories = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        with contextlib.suppress(ValueError):
            history = json.loads(line)
            if isinstance(history, list) and history and all(isinstance(item, str) for item in history):
                histories.append(history)
                continue
        raise ValueError(f'{path} line {number} is {line[:60]!r}; expected a JSON array of item ids such as ["1", "7"]')
    if not histories:
        raise ValueError(f"{path} is empty; expected one JSON array of item ids a line")
    return histories


def run_load(
    url: str, protocol: Protocol, model: str, histories: Sequence[Sequence[str]], clients: int, seconds: float
) -> Result:
    """Ask `model` at `url` (host:port) for `seconds`, with `clients` requests under way at any time.

    Raises ConnectionError if nothing answers there or no request at all was answered, ValueError if the server does not
    have the model ready.
    """
    return asyncio.run(_run(url, protocol, model, histories, clients, seconds))


async def _run(
    url: str, protocol: Protocol, model: str, histories: Sequence[Sequence[str]], clients: int, seconds: float
) -> Result:
    library = _library(protocol)
    http = protocol == "http"
    client = library.InferenceServerClient(url, **({"conn_limit": clients, "conn_timeout": TIMEOUT} if http else {}))
    ask = functools.partial(client.infer, model, **({} if http else {"client_timeout": TIMEOUT}))
    try:
        inputs = await _model_inputs(client, url, http, model)
        requests = [_request(library, inputs, history) for history in histories]
        await asyncio.gather(*(ask(requests[i % len(requests)]) for i in range(clients)), return_exceptions=True)
        result, start = Result(), time.perf_counter()
        await asyncio.gather(
            _show(result, start, seconds),
            *(_client(ask, requests, first, result, start + seconds) for first in range(clients)),
        )
        result.seconds = time.perf_counter() - start
    finally:
        await client.close()
    if not result.latencies:
        raise ConnectionError(f"none of {result.errors.total()} requests was answered: {next(iter(result.errors))}")
    return result


async def _client(ask: Any, requests: Sequence[Any], first: int, result: Result, end: float) -> None:
    """One request after the other until `end`; where each client begins differs."""
    for request in itertools.islice(itertools.cycle(requests), first * 7919 % len(requests), None):
        begin = time.perf_counter()
        if begin >= end:
            return
        try:
            await ask(request)
            result.latencies.append(time.perf_counter() - begin)
        except Exception as error:  # whatever it is, the client got no answer
            result.errors[str(error) or type(error).__name__] += 1
            await asyncio.sleep(0.01)  # a server that refuses everything is not to be asked in a tight loop


async def _show(result: Result, start: float, seconds: float) -> None:
    with tqdm(total=seconds, desc="load", bar_format="{desc}: {percentage:3.0f}%|{bar}| {postfix}") as bar:
        while (elapsed := time.perf_counter() - start) < seconds:
            bar.n = elapsed
            done = len(result.latencies)
            bar.set_postfix_str(f"{done} answers, {done / elapsed:.0f} a second, {result.errors.total()} errors")
            await asyncio.sleep(min(0.2, seconds - elapsed))
        bar.n = seconds
        bar.refresh()


def _library(protocol: Protocol) -> Any:
    try:
        return importlib.import_module(f"tritonclient.{protocol}.aio")
    except ImportError as error:
        raise ValueError(f"the load test needs {error.name}; pip install 'tritonclient[http,grpc]'") from None


async def _model_inputs(client: Any, url: str, http: bool, model: str) -> list[dict[str, Any]]:
    """Name, datatype and shape of what the model reads, as the server says."""
    try:
        if not await client.is_model_ready(model):
            raise ValueError(f"the server at {url} has no model {model!r} that is ready; expected one that serves it")
        metadata = await client.get_model_metadata(model, **({} if http else {"as_json": True}))
    except ValueError:
        raise
    except Exception as error:
        raise ConnectionError(f"nothing answers at {url} ({str(error) or type(error).__name__})") from None
    inputs = metadata["inputs"]
    found = {value["name"]: value["datatype"] for value in inputs}.get("history", "no")
    if found != "BYTES":
        raise ValueError(
            f"model {model!r} reads {found} histories; expected one that reads item ids, such as 'recommend'"
        )
    return inputs


def _request(library: Any, inputs: Sequence[dict[str, Any]], history: Sequence[str]) -> list[Any]:
    """The history as it is; zeros, which mean not known, for whatever else the model reads of its events."""
    request = []
    for value in inputs:
        shape = [1, len(history), *(int(size) for size in value["shape"][2:])]
        data = np.array([history], np.object_) if value["name"] == "history" else np.zeros(shape, np.int64)
        request.append(library.InferInput(value["name"], shape, value["datatype"]))
        request[-1].set_data_from_numpy(data)
    return request
