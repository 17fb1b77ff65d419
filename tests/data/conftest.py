"""What tests of servers and of messages share."""

import logging

import pytest


@pytest.fixture(autouse=True)
def straight_to_the_servers(monkeypatch):
    """A proxy of this machine is not asked for the servers of the tests."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def lines_of():
    """log -> the lines that a user reads of it from now on."""
    watched = []

    def watch(log):
        lines = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())
        log.addHandler(handler)
        watched.append((log, handler))
        return lines

    yield watch
    for log, handler in watched:
        log.removeHandler(handler)
