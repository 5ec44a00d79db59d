"""Runs of genrec in processes of their own: one, or several ranks as torchrun would start them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import time

from genrec.cli import main

# One process imports torch once and forks every run from there, which takes milliseconds.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["genrec.cli.train", "genrec.training.stages.align", "jsonargparse", "torch._dynamo"])


def start(argv, ranks=1, errors=None):
    """The processes of a run; errors: a file for what they say on stderr."""
    port = free_port()
    started = [processes.Process(target=_main, args=(argv, rank, ranks, port, errors)) for rank in range(ranks)]
    for process in started:
        process.start()
    return started


def finish(argv, ranks=1):
    """Run to the end, which must be a good one."""
    assert exit_codes(start(argv, ranks)) == [0] * ranks


def exit_codes(started, seconds=180):
    """Wait for all of them; those that hang are killed and have code -9."""
    deadline = time.monotonic() + seconds
    for process in started:
        process.join(max(0.1, deadline - time.monotonic()))
        process.kill()
        process.join()
    return [process.exitcode for process in started]


def kill_at(argv, stage, step, ranks=1, victims=None):
    """Start a run and kill it, or the ranks `victims` alone, as soon as it has logged this step."""
    started = start(argv, ranks)
    path = argv[argv.index("--out") + 1] + "/metrics.jsonl"
    mark, deadline = f'"stage": "{stage}", "step": {step},', time.monotonic() + 120
    while started[0].is_alive() and time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
            if mark in file.read():
                break
        time.sleep(0.001)
    for rank, process in enumerate(started):
        if victims is None or rank in victims:
            process.kill()
    codes = exit_codes(started)
    assert 0 not in codes, f"the run ended before step {step} of {stage}"
    assert all(codes[rank] == -9 for rank in victims or range(ranks))


def _main(argv, rank, ranks, port, errors):
    if errors is not None:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    if ranks > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}
    raise SystemExit(main(argv))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
