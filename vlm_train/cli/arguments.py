"""`key=value` words of the verbs that take a few named values instead of a whole config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlm_train.errors import ConfigError, nearest


def parse(
    words: Sequence[str], known: Mapping[str, str], *, verb: str, rest: bool = False
) -> tuple[dict[str, str], list[str]]:
    """Splits words into the known keys and, where `rest` allows it, config overrides. Raises ConfigError.

    Args:
        words: `key=value` each.
        known: key -> what it means, for the message.
        verb: for the message.
        rest: whether other `key=value` words are config overrides.
    """
    values: dict[str, str] = {}
    overrides: list[str] = []
    for word in words:
        key, separator, value = word.partition("=")
        if separator and key in known:
            values[key] = value
        elif separator and rest:
            overrides.append(word)
        else:
            close = nearest(key, known)
            raise ConfigError(
                f"vlm-train {verb} does not know this argument",
                got=word,
                allowed=", ".join(f"{name}={meaning}" for name, meaning in known.items()),
                remedy=f"{close[0]}=..." if close else f"vlm-train {verb} --help",
            )
    return values, overrides


def required(values: Mapping[str, str], key: str, *, verb: str, example: str) -> str:
    """The value of a key that must be there. Raises ConfigError."""
    if not values.get(key):
        raise ConfigError(f"vlm-train {verb} needs {key}=...", allowed=example)
    return values[key]
