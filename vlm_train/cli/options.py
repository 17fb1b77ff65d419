"""What a word of the command line may be: numbers with bounds, choices, and places to read from and write to.

A kind is a function of (what the user calls it, the text) to the value. It refuses with ConfigError whatever the work
could not use, outputs included, so that nothing is found out after the work is done.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_train.errors import ConfigError, nearest

Action = Callable[[list[str]], int | None]
"""What a word of the command line does with the words after it; returns the exit code, None for 0."""

Kind = Callable[[str, str], Any]

MANY = 2**31 - 1
"""The largest count: far beyond any use, and below every limit of the libraries."""


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a verb: what its value may be, and the value where it is not given. `repeated`: it may be given more
    than once, and its values are a list."""

    kind: Kind
    default: Any = None
    repeated: bool = False


def whole(low: int, high: int = MANY, *, what: str = "is out of range") -> Kind:
    """A whole number of [low, high]; `what`: what is said of any other."""

    def read(name: str, text: str) -> int:
        value = int(text) if re.fullmatch(r"[+-]?[0-9]{1,19}", text) else None
        if value is None or not low <= value <= high:
            raise ConfigError(f"{name} {what}", got=text or "nothing", allowed=f"a whole number from {low} to {high}",
                              remedy=_example(name, max(low, 1)))  # fmt: skip
        return value

    return read


def count(high: int = MANY) -> Kind:
    """How many there are of something: 1, 2, 3, ..."""
    return whole(1, high, what="is no count")


def span(name: str, text: str) -> tuple[int, int]:
    """A whole number, or two with a hyphen between: `2` or `1-4`."""
    found = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if first > last:
        raise ConfigError(f"{name} is no range", got=text, allowed="N or N-M, the smaller first", remedy=f"{name} 1-4")
    return first, last


def share(*, zero: bool, one: bool) -> Kind:
    """A number between 0 and 1, with the ends or without."""
    allowed = f"a number {'from' if zero else 'above'} 0 {'up to' if one else 'to below'} 1"

    def read(name: str, text: str) -> float:
        value = _number_of(text)
        if not (0 < value < 1 or (zero and value == 0) or (one and value == 1)):
            raise ConfigError(f"{name} is out of range", got=text, allowed=allowed, remedy=_example(name, 0.1))
        return value

    return read


def _number_of(text: str) -> float:
    """NaN, which lies in no range, of what is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def number(low: float, high: float, *, example: float = 0.2) -> Kind:
    """A number of [low, high]; `example`: what the refusal of another proposes."""

    def read(name: str, text: str) -> float:
        value = _number_of(text)
        if not low <= value <= high:
            raise ConfigError(f"{name} is out of range", got=text or "nothing",
                              allowed=f"a number from {low:,.9g} to {high:,.9g}",
                              remedy=_example(name, min(max(low, example), high)))  # fmt: skip
        return value

    return read


def choice(*known: str) -> Kind:
    """One of these words."""

    def read(name: str, text: str) -> str:
        if text not in known:
            close = nearest(text, known)
            raise ConfigError(f"{name} has no such choice", got=text, allowed=", ".join(known),
                              remedy=_example(name, (close or known)[0]))  # fmt: skip
        return text

    return read


def several(*known: str) -> Kind:
    """Some of these words, between commas."""
    one = choice(*known)

    def read(name: str, text: str) -> list[str]:
        return [one(name, word) for word in text.split(",")]

    return read


def plain(name: str, text: str) -> str:
    """Any text but none."""
    if not text.strip():
        raise ConfigError(f"{name} is empty", got=repr(text), allowed="a text", remedy=f"give {name} a value")
    return text


def sentence(name: str, text: str) -> str:
    """A text for a model. Names of files may be any bytes, which the command line keeps as halves of surrogate pairs;
    no tokenizer takes these."""
    try:
        return plain(name, text.encode("utf-8").decode())
    except UnicodeError:
        raise ConfigError(f"{name} is no UTF-8", got=repr(text), allowed="a text in UTF-8",
                          remedy=f"give {name} again in this encoding") from None  # fmt: skip


def local(name: str, text: str) -> Path:
    """A path on a local disk; whether anything is there is not asked."""
    plain(name, text)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", text) or "\0" in text:
        raise ConfigError(f"{name} must lie on a local disk", got=text, allowed="a path",
                          remedy="download it first" if name.isupper() else f"give {name} a path")  # fmt: skip
    return Path(os.path.expanduser(text))


def out_file(name: str, text: str) -> Path:
    """A file to write, in a folder that is there."""
    path = local(name, text)
    if _is_there(name, path) and not path.is_file():
        raise _unwritable(name, text, "it is no file")
    if not path.parent.is_dir():
        raise _unwritable(name, text, f"there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise _unwritable(name, text, "no permission to write there")
    return path


def out_folder(name: str, text: str) -> Path:
    """A folder to write into, there or not."""
    path = local(name, text)
    _check_ancestor(name, path.absolute())
    return path


def new_place(name: str, text: str) -> Path:
    """A file or a folder to make: a name that is not taken, or an empty folder."""
    path = local(name, text)
    if _is_there(name, path) and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{name} is in use", got=text, allowed="a name that is not taken, or an empty folder",
                          remedy=_example(name, f"{text.rstrip('/')}-2"))  # fmt: skip
    _check_ancestor(name, path.absolute())
    return path


def apart(name: str, path: Path, others: Sequence[str]) -> Path:
    """`path`, if writing it overwrites none of the shards `others`, nor anything in those that are folders."""
    places = [place for place in (path, path.parent) if place.exists()]
    taken = [other for other in others if os.path.exists(other)]
    if path.exists() and any(os.path.samefile(place, other) for place in places for other in taken):
        raise ConfigError(f"{name} would overwrite a shard", got=path, allowed="a file of its own",
                          remedy=f"choose another name for {name}")  # fmt: skip
    return path


def arguments(
    words: Sequence[str], names: Mapping[str, Kind], options: Mapping[str, Option], *, many: bool = False
) -> tuple[list[Any], dict[str, Any]]:
    """The values of positional words, and of `--option value` or `--option=value` by name.

    `many`: the last of `names` may be given more than once.

    Raises:
        ConfigError: an option that is not there, comes twice or has no such value; too few words or too many.
    """
    given: list[str] = []
    texts: dict[str, list[str]] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            given.append(word)
            continue
        name, separator, text = word.partition("=")
        _check_option(name, options, texts)
        if not separator:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else ""
        if not text:
            raise ConfigError(f"{name} has no value", got=word, allowed=f"{name} VALUE, or {name}=VALUE",
                              remedy=f"give {name} a value, or leave it out")  # fmt: skip
        texts.setdefault(name, []).append(text)
    if len(given) < len(names) or (len(given) > len(names) and not many):
        raise ConfigError("wrong number of words", got=" ".join(given) or "none", allowed=" ".join(names),
                          remedy="vlm-train data --help")  # fmt: skip
    called = [*names, *[list(names)[-1]] * (len(given) - len(names))]
    values = [names[name](name, text) for name, text in zip(called, given, strict=True)]
    return values, {name: _value(name, option, texts.get(name, [])) for name, option in options.items()}


def _value(name: str, option: Option, texts: Sequence[str]) -> Any:
    values = [option.kind(name, text) for text in texts]
    if option.repeated:
        return values
    return values[0] if values else option.default


def taken(words: Sequence[str], name: str) -> tuple[list[str], list[str]]:
    """(the other words, the values of `name VALUE` and `name=VALUE` among them): an option amid words of another kind.
    A value that is missing is empty."""
    rest: list[str] = []
    values: list[str] = []
    pending = iter(words)
    for word in pending:
        if word == name:
            values.append(next(pending, ""))
        elif word.startswith(f"{name}="):
            values.append(word.partition("=")[2])
        else:
            rest.append(word)
    return rest, values


def needed(options: Mapping[str, Any], name: str, value: str) -> Any:
    """The value of an option that must be given. Raises ConfigError."""
    if options[name] is None:
        raise ConfigError(f"{name} is missing", got=f"no {name}", allowed=f"{name} {value}",
                          remedy=f"add {name} {value}")  # fmt: skip
    return options[name]


def _check_option(name: str, options: Mapping[str, Option], texts: Mapping[str, Sequence[str]]) -> None:
    if name not in options:
        close = nearest(name, options)
        raise ConfigError("no such option", got=name, allowed=", ".join(options) or "no option",
                          remedy=close[0] if close else "vlm-train data --help")  # fmt: skip
    if name in texts and not options[name].repeated:
        raise ConfigError(
            f"{name} is given twice", got=texts[name][0], allowed="one value", remedy=f"leave out one {name}"
        )


def _example(name: str, value: object) -> str:
    """As the user writes it: `--share 0.1`, `top=8`."""
    return f"{name}{value}" if name.endswith("=") else f"{name} {value}"


def _is_there(name: str, path: Path) -> bool:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise _unwritable(name, path, error.strerror) from error
    return True


def _check_ancestor(name: str, path: Path) -> None:
    """Of the folders on the way to a path, the last that is there must be one that takes more."""
    found = next(place for place in (path, *path.parents) if _is_there(name, place))
    if not found.is_dir():
        raise _unwritable(name, path, f"{found} is no folder")
    if not os.access(found, os.W_OK):
        raise _unwritable(name, path, f"no permission to write into {found}")


def _unwritable(name: str, got: object, why: str | None) -> ConfigError:
    return ConfigError(f"{name} cannot be written: {why}", got=got, allowed="a place in an existing folder",
                       remedy=f"choose another place for {name}")  # fmt: skip
