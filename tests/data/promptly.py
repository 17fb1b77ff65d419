"""For tests of what must not wait for ever."""

import contextlib
import signal

import pytest


@contextlib.contextmanager
def promptly(seconds=60):
    """What hangs fails; not by an OSError, which the code under test might take for a broken file."""

    def give_up(number, frame):
        pytest.fail("it hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
