"""Ctrl-C and SIGTERM where a command serves."""

import signal

import pytest

from genrec.cli.signals import TerminatedError, held_signals


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, TerminatedError)])
def test_a_signal_waits_for_the_next_check(number, error):
    """Raised where it arrives, it could leave a server that nobody knows of, or be dropped by Python."""
    before = signal.signal(number, signal.default_int_handler)  # a background job ignores SIGINT
    with held_signals() as check:
        check()
        signal.raise_signal(number)
        with pytest.raises(error):
            check()
    assert signal.signal(number, before) is signal.default_int_handler


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with held_signals() as check:
            signal.raise_signal(signal.SIGINT)
            check()
    finally:
        signal.signal(signal.SIGINT, before)
