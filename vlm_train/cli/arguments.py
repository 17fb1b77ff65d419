"""`key=value` words of the verbs that take a few named values instead of a whole config."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm_train.cli.options import Kind, plain
from vlm_train.errors import ConfigError, nearest


@dataclass(slots=True)
class Arguments:
    """What `parse` found: the values of each key in the order given, and the words that are config overrides."""

    verb: str
    values: dict[str, list[str]] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)

    def optional(self, key: str, kind: Kind = plain, default: Any = None) -> Any:
        """The value of a key, the default where it was not given. Raises ConfigError."""
        return kind(f"{key}=", self.values[key][0]) if key in self.values else default

    def required(self, key: str, kind: Kind = plain, *, example: str) -> Any:
        """The value of a key that must be there. Raises ConfigError."""
        return kind(f"{key}=", self.all(key, example=example)[0])

    def all(self, key: str, *, example: str) -> list[str]:
        """The values of a repeatable key that must be there at least once. Raises ConfigError."""
        if key not in self.values:
            raise ConfigError(f"vlm-train {self.verb} needs {key}=...", got=f"no {key}=", allowed=example,
                              remedy=f"vlm-train {self.verb} --help")  # fmt: skip
        return self.values[key]


def parse(
    words: Sequence[str],
    known: Mapping[str, str],
    *,
    verb: str,
    repeatable: Collection[str] = (),
    rest: bool = False,
) -> Arguments:
    """Splits words into the known keys and, where `rest` allows it, config overrides. Raises ConfigError.

    Args:
        words: `key=value` each; a value may hold further `=`.
        known: key -> what it means, for the message.
        verb: for the message.
        repeatable: keys that may be given several times.
        rest: whether other `key=value` words are config overrides.
    """
    found = Arguments(verb)
    for word in words:
        key, separator, value = word.partition("=")
        if separator and key in known:
            _add(found, key, value, key in repeatable)
        elif separator and rest:
            found.overrides.append(word)
        else:
            close = nearest(key, known)
            raise ConfigError(
                f"vlm-train {verb} does not know this argument",
                got=word,
                allowed=", ".join(f"{name}={meaning}" for name, meaning in known.items()),
                remedy=f"{close[0]}=..." if close else f"vlm-train {verb} --help",
            )
    return found


def _add(found: Arguments, key: str, value: str, is_repeatable: bool) -> None:
    if not value:
        raise ConfigError(f"{key}= has no value", got=f"{key}=", allowed=f"{key}=VALUE",
                          remedy=f"give {key}= a value, or leave it out")  # fmt: skip
    if key in found.values and not is_repeatable:
        raise ConfigError(f"{key}= is given twice", got=f"{found.values[key][0]} and {value}", allowed="one value",
                          remedy=f"leave out one {key}=")  # fmt: skip
    found.values.setdefault(key, []).append(value)
