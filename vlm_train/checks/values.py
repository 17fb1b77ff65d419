"""What single values must be, and how one that is not is refused."""

from __future__ import annotations

import re

from vlm_train.errors import ConfigError

MANY = 2**31 - 1
"""Far beyond any use, and a product of two still fits a position in the stream."""

LARGEST = 1e300
"""So that sums and products of a few numbers are finite too; NaN is not below it."""


def require(holds: bool, what: str, *, got: object, allowed: object, remedy: str) -> None:
    """Raises ConfigError, with `got` as a config spells it, unless it `holds`."""
    if not holds:
        raise ConfigError(what, got=said(got), allowed=allowed, remedy=remedy)


def said(value: object) -> str:
    """A value as a config spells it, of a length that can be read."""
    try:
        text = "null" if value is None else str(value) or "''"
    except ValueError:  # Python prints no number of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


def is_number(value: object) -> bool:
    """Whether a value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_text(value: object) -> bool:
    """Whether a value is a text that is not blank."""
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value


def is_name(value: object) -> bool:
    """Whether a text can name a file or a folder of its own: no way to another one, and no pointer of ours."""
    return isinstance(value, str) and bool(re.fullmatch(r"[^/\s.-][^/\s]{0,199}", value)) and value.isprintable()


def is_place(value: object) -> bool:
    """Whether a value can be a path on a local disk."""
    return is_text(value) and "://" not in str(value)
