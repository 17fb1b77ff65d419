"""Functions for tests of engines, in a module that processes of any engine can import."""

from __future__ import annotations

import functools
import os
import signal
import time
from pathlib import Path

from vlm_train.errors import ConfigError, DataError


def slow_first(item: int) -> int:
    time.sleep(0.5 if item == 0 else 0)
    return item * item


def refused(item: int) -> int:
    if item == 3:
        raise DataError("three is bad", got=item, allowed="others", remedy="leave out three")
    if item == 4:
        raise ConfigError("four is worse", got=item, remedy="leave out four")
    return item


def unforeseen(item: int) -> int:
    return {0: 0}[item]


def dies_once(marker: Path) -> str:
    """Is killed where it did not begin before."""
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return marker.name


def dies(item: int) -> int:
    if item:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def marked(marker: Path) -> None:
    marker.touch()


def long(marker: Path) -> None:
    marker.touch()
    time.sleep(600)


@functools.lru_cache(maxsize=1)
def _model() -> list[int]:
    return []


def with_model(item: int) -> tuple[int, int]:
    """(process, calls of it so far)."""
    _model().append(item)
    time.sleep(0.05)
    return os.getpid(), len(_model())
