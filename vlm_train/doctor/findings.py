"""What one check found: a light, what was seen, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from vlm_train.errors import VlmError

GREEN, YELLOW, RED = "green", "yellow", "red"


@dataclass(frozen=True, slots=True)
class Finding:
    """`name`: what was looked at, by an id that does not change; `light`: `GREEN`, `YELLOW` (training works, worse or
    at a risk) or `RED` (it will not); `seen`; `remedy`, empty where nothing needs one."""

    name: str
    light: str
    seen: str
    remedy: str = ""


Check = Callable[[], Iterable[Finding]]


def found(checks: Iterable[Check]) -> Iterator[Finding]:
    """What the checks find, as they find it. A check that breaks is a finding itself: it stops no other."""
    for check in checks:
        name = getattr(getattr(check, "func", check), "__name__", "check").lstrip("_")
        try:
            yield from check()
        except VlmError as error:
            seen = error.what if error.got is None else f"{error.what}: {error.got}"
            yield Finding(name, RED, seen, error.remedy or "")
        except Exception as error:
            yield Finding(name, YELLOW, f"could not be looked at: {type(error).__name__}: {error}",
                          "please report this, with `vlm-train doctor --json FILE`")  # fmt: skip
