"""Checks of the numbers that steps are set by, which may come from a config and be of any type."""

from __future__ import annotations

import math
from typing import Any

from vlm_train.errors import ConfigError


def check_number(name: str, value: Any, *, low: float, high: float = math.inf) -> None:
    """Refuses what is no finite number of [low, high]. Raises ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or math.isinf(value):
        raise _out_of_range(name, value, "a number", low, high)


def check_whole(name: str, value: Any, *, low: int, high: float = math.inf) -> None:
    """Refuses what is no whole number of [low, high]. Raises ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _out_of_range(name, value, "a whole number", low, high)


def check_share(name: str, value: Any) -> None:
    """Refuses what is no share above 0 and below 1. Raises ConfigError."""
    if not isinstance(value, float) or not 0 < value < 1:
        raise ConfigError(f"{name} is a share of samples", got=value, allowed="above 0 and below 1",
                          remedy=f"{name}: 0.3")  # fmt: skip


def check_one_of(first: str, second: str, values: tuple[Any, Any], *, what: str, example: str) -> None:
    """Refuses two settings both or none of which have a value. Raises ConfigError."""
    if (values[0] is None) == (values[1] is None):
        got = "neither" if values[0] is None else f"{first} {values[0]} and {second} {values[1]}"
        raise ConfigError(what, got=got, allowed=f"{first} or {second}", remedy=f"set one of them: {example}")


def _out_of_range(name: str, value: Any, kind: str, low: float, high: float) -> ConfigError:
    allowed = f"{kind} from {low:g}" + ("" if math.isinf(high) else f" to {high:g}")
    return ConfigError(f"{name} is out of range", got=value, allowed=allowed, remedy=f"give {name} another value")
