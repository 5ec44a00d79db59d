"""Ctrl-C and SIGTERM for the commands that serve until somebody stops them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class TerminatedError(Exception):
    """SIGTERM, which is how a server is meant to be ended."""


@contextmanager
def held_signals() -> Iterator[Callable[[], None]]:
    """check() raises what a SIGINT or SIGTERM of this block asks for: KeyboardInterrupt or TerminatedError.

    A handler that raises by itself does so anywhere: inside Popen, whose server nobody would know of; between a
    thread's making and its start; in a callback, where Python drops the exception and we would serve on; while the
    server is being stopped. What was ignored before, as a shell lets its background jobs ignore SIGINT, still is.
    """
    came: list[int] = []
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    before = [signal.signal(number, lambda number, _: came.append(number)) for number in numbers]

    def check() -> None:
        if came:
            raise KeyboardInterrupt if came[0] == signal.SIGINT else TerminatedError

    try:
        yield check
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
