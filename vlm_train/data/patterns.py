"""What `data.train.shards` may say, turned into the locations of shards."""

from __future__ import annotations

import glob
import itertools
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlm_train.data.files import StorageOptions
from vlm_train.data.records import image_files
from vlm_train.data.tables import TABLES
from vlm_train.errors import DataError
from vlm_train.locations import SCHEMES, is_remote, name_of, shown

SUFFIXES = (".tar", ".beton")
"""What a folder is searched for; where it has files of the first kind, those of the second are left alone."""

_SHOWN = 10
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def expand_shards(patterns: str | Sequence[str], options: StorageOptions | None = None) -> list[str]:
    """The shards that patterns name, each once, in order of first appearance (a glob and a folder sort by name).

    Understands `{00000..00012}`, `{a,b}`, globs, folders, `~`, and `::` between patterns, for local paths and for
    `s3://` and `gs://`; for `https://` and `http://` the same without globs and folders, since HTTP has no listing.
    A folder stands for its `*.tar`, else its `*.beton`; a local one without either that holds a table of captions, or
    images with texts beside them, is a shard itself.

    A `?` begins the query of an HTTP URL. In a query only `{00000..00012}` is expanded, and `::` ends a pattern only
    before the next URL: signatures may hold anything.

    Args:
        patterns: one or several.
        options: for servers that are asked for a listing.

    Returns:
        Absolute paths and URLs. Whether a single named file on a server exists is not asked here.

    Raises:
        DataError: a pattern finds nothing, a local shard does not exist, or a URL cannot be a list of shards.
        OSError: a server does not answer.
    """
    listed = [patterns] if isinstance(patterns, str) else list(patterns)
    found: dict[str, None] = {}
    missing: list[str] = []
    for pattern in itertools.chain.from_iterable(_patterns(str(item)) for item in listed):
        for name in _braces(pattern):
            matches = _remote_matches(name, options or StorageOptions()) if _scheme(name) else _matches(name)
            found |= dict.fromkeys(matches)
            missing += [] if matches else [shown(name)]
    if missing or not found:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise DataError(
            f"{len(missing)} shards are missing" if missing else "no shards are given",
            got=", ".join(missing[:_SHOWN]) + more if missing else repr(patterns),
            allowed="paths, https://, s3:// and gs:// URLs, globs, folders of *.tar or *.beton, folders of images with "
            "captions, {00000..00012} ranges, joined by ::",
            remedy="correct the paths in `data.train.shards` / `data.val.shards`, or shorten the range",
        )
    return list(found)


def _patterns(text: str) -> Iterator[str]:
    """The patterns between `::`, but for those in a query and in the address of a host (`http://[::1]/`)."""
    pieces = text.split("::")
    pattern = pieces[0]
    for piece in pieces[1:]:
        address = pattern.partition("://")[2].partition("/")[0]
        in_query = _is_web(pattern) and "?" in pattern and not _SCHEME.match(piece.strip())
        if in_query or ("[" in address and "]" not in address):
            pattern = f"{pattern}::{piece}"
            continue
        yield pattern.strip()
        pattern = piece
    yield pattern.strip()


def _braces(pattern: str) -> Iterator[str]:
    """Every name that `{00000..00012}` and `{a,b}` stand for; a range keeps its leading zeros."""
    end = pattern.find("?") if _is_web(pattern) else -1
    end = end if end >= 0 else len(pattern)
    match = re.search(r"\{([^{}]*)\}", pattern[:end]) or re.search(r"\{(\d+\.\.\d+)\}", pattern)
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


def _scheme(name: str) -> str | None:
    """The scheme of a URL that shards are read from; None for a path."""
    match = _SCHEME.match(name)
    if is_remote(name):
        return name.partition("://")[0].lower()
    if match or name.startswith("pipe:"):
        raise DataError(
            f"shards cannot be read from {name.partition(':')[0]}:",
            got=shown(name).partition(" ")[0],
            allowed=["a path", *(f"{scheme}://" for scheme in SCHEMES)],
            remedy="no command is run to get data: download the files, and give their paths"
            if name.startswith("pipe:")
            else "give a path, or a URL of those",
        )
    return None


def _is_web(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


def _matches(name: str) -> list[str]:
    name = os.path.expanduser(name)
    if not os.path.isdir(name):
        matches = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        return [os.path.abspath(match) for match in matches if match == name or os.path.isfile(match)]
    folder = os.path.abspath(name)
    for suffix in SUFFIXES:
        if shards := sorted(glob.glob(os.path.join(glob.escape(folder), f"*{suffix}"))):
            return shards
    return [folder] if _is_table(Path(folder)) else []


def _is_table(folder: Path) -> bool:
    """Whether a folder holds captions for its images: in a table, or in texts beside them."""
    if any((folder / table).is_file() for table in TABLES):
        return True
    return any(image.with_suffix(".txt").is_file() for image in image_files(folder))


def _remote_matches(name: str, options: StorageOptions) -> list[str]:
    last = name_of(name)
    path, query = (name.partition("?")[0], "?" in name) if _is_web(name) else (name, False)
    wild = any(sign in path.partition("://")[2].partition("/")[2] for sign in ("*[" if _is_web(name) else "*?["))
    is_folder = path.endswith("/") or not (query or posixpath.splitext(last)[1] or wild)
    if not (wild or is_folder):
        return [name]
    if _is_web(name):
        raise DataError(
            f"{'a glob' if wild else 'a folder'} cannot be looked up on a web server: HTTP has no listing",
            got=shown(name),
            allowed="the URLs of single shards",
            remedy="name the shards by a range, as in https://host/shards/{00000..00012}.tar",
        )
    from vlm_train.data.remote import find

    if wild:
        return find(name, options)
    for suffix in SUFFIXES:
        if shards := find(f"{name.rstrip('/')}/*{suffix}", options):
            return shards
    return []
