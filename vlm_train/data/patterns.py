"""What `data.train.shards` may say, turned into files."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlm_train.errors import DataError

_SHOWN = 10


def expand_shards(patterns: str | Sequence[str]) -> list[Path]:
    """The shards that patterns name, each once, in order of first appearance (a glob and a directory sort by name).

    Understands `{00000..00012}`, `{a,b}`, globs, directories (their `*.tar`), `~`, and `::` between patterns.

    Raises:
        DataError: a pattern finds nothing, or a named shard does not exist.
    """
    listed = [patterns] if isinstance(patterns, str) else list(patterns)
    found: dict[Path, None] = {}
    missing: list[str] = []
    for pattern in itertools.chain.from_iterable(str(item).split("::") for item in listed):
        for name in _braces(os.path.expanduser(pattern.strip())):
            matches = _matches(name)
            found |= dict.fromkeys(Path(os.path.abspath(match)) for match in matches)
            missing += [] if matches else [name]
    if missing or not found:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise DataError(
            f"{len(missing)} shards are missing" if missing else "no shards are given",
            got=", ".join(missing[:_SHOWN]) + more if missing else repr(patterns),
            allowed="paths, globs, directories of *.tar, {00000..00012} ranges, joined by ::",
            remedy="correct the paths in `data.train.shards` / `data.val.shards`, or shorten the range",
        )
    return list(found)


def _braces(pattern: str) -> Iterator[str]:
    """Every name that `{00000..00012}` and `{a,b}` stand for; a range keeps its leading zeros."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        choices = [str(number).zfill(len(span[1])) for number in range(int(span[1]), int(span[2]) + 1)]
    else:
        choices = match[1].split(",")
    for choice in choices:
        yield from _braces(pattern[: match.start()] + choice + pattern[match.end() :])


def _matches(name: str) -> list[str]:
    if os.path.isdir(name):
        return sorted(glob.glob(os.path.join(glob.escape(name), "*.tar")))
    if os.path.exists(name):
        return [name]
    return sorted(match for match in glob.glob(name, recursive=True) if os.path.isfile(match))
