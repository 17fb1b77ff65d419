"""What `data.train.shards` may say, turned into the locations of shards."""

from __future__ import annotations

import glob
import itertools
import os
import posixpath
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from vlm_train.data import braces
from vlm_train.data.files import StorageOptions
from vlm_train.data.records import image_files
from vlm_train.data.tables import TABLES
from vlm_train.errors import DataError
from vlm_train.locations import SCHEMES, is_remote, name_of, server_of, shown

SUFFIXES = (".tar", ".beton")
"""What a folder is searched for; where it has files of the first kind, those of the second are left alone."""

_SHOWN = 10
_ENOUGH = 10_000  # so many are missing that nobody wants to know the rest
_MAX_NAMES = 1_000_000
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
    missing: list[str] = []  # the first of them
    num_missing = 0
    for name in _names([pattern for item in listed for pattern in _patterns(str(item))]):
        matches = _remote_matches(name, options or StorageOptions()) if _scheme(name) else _matches(name)
        found |= dict.fromkeys(matches)
        num_missing += not matches
        if not matches and num_missing <= _SHOWN:
            missing.append(shown(name) or "an empty pattern")
        if num_missing == _ENOUGH:
            break
    if missing or not found:
        raise _nothing_there(patterns, missing, num_missing)
    return list(found)


def _nothing_there(patterns: str | Sequence[str], missing: Sequence[str], num_missing: int) -> DataError:
    more = f" and {num_missing - len(missing)} more" if num_missing > len(missing) else ""
    at_least = " or more" if num_missing == _ENOUGH else ""
    return DataError(
        f"{num_missing}{at_least} shards are missing" if missing else "no shards are given",
        got=", ".join(missing) + more if missing else repr(patterns),
        allowed="paths, https://, s3:// and gs:// URLs, globs, folders of *.tar or *.beton, folders of images with "
        "captions, {00000..00012} ranges, joined by ::",
        remedy="correct the paths in `data.train.shards` / `data.val.shards`, or shorten the range",
    )


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


def _names(patterns: Sequence[str]) -> Iterator[str]:
    """What the braces of the patterns stand for. How many names there are is known before the first one is made."""
    expressions = [braces.parse(pattern, _end_of_path(pattern)) for pattern in patterns]
    num_names = sum(map(braces.num_names, expressions))
    if num_names > _MAX_NAMES:
        raise DataError(
            "a range of shards is too long",
            got=f"{', '.join(map(shown, patterns[:_SHOWN]))}: {num_names:,} names",
            allowed=f"at most {_MAX_NAMES:,} names in all",
            remedy="shorten the range, or name a folder or a glob",
        )
    return itertools.chain.from_iterable(map(braces.names, expressions))


def _end_of_path(pattern: str) -> int:
    """Where the query of an HTTP URL begins, in which a comma is no choice; else the end."""
    end = pattern.find("?") if _is_web(pattern) else -1
    return end if end >= 0 else len(pattern)


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
    kind = _kind_of(name)
    if kind is None and not glob.has_magic(name):
        return []
    if kind is None:
        return [os.path.abspath(match) for match in sorted(glob.glob(name, recursive=True)) if os.path.isfile(match)]
    if stat.S_ISREG(kind):
        return [os.path.abspath(name)]
    if not stat.S_ISDIR(kind):
        raise DataError(
            "a shard is neither a file nor a folder",
            got=name,
            allowed="files that can be read again and again: no pipes and devices",
            remedy="write it into a file first",
        )
    folder = os.path.abspath(name)
    for suffix in SUFFIXES:
        if shards := sorted(glob.glob(os.path.join(glob.escape(folder), f"*{suffix}"))):
            return shards
    return [folder] if _is_table(Path(folder)) else []


def _kind_of(path: str) -> int | None:
    """The mode of a file, None where there is none: one look, since a range may name a million."""
    try:
        return os.stat(path).st_mode
    except (OSError, ValueError):  # ValueError: no path, such as one with a NUL
        return None


def _is_table(folder: Path) -> bool:
    """Whether a folder holds captions for its images: in a table, or in texts beside them."""
    if any((folder / table).is_file() for table in TABLES):
        return True
    return any(image.with_suffix(".txt").is_file() for image in image_files(folder))


def _check_url(name: str) -> None:
    """Refuses what no server could be asked for."""
    why = "" if server_of(name).partition("://")[2] else "it names no host and no bucket"
    try:
        port = urlsplit(name).port if _is_web(name) else None
    except ValueError:  # brackets that hold no address, or a port that is no number; it may quote a password
        port = 0
    if why or port == 0:
        raise DataError(
            f"a URL leads nowhere: {why or 'its host or port cannot be'}",
            got=shown(name),
            allowed="https://host/path.tar, http://host:8000/path.tar, s3://bucket/path.tar, gs://bucket/path.tar",
            remedy="correct the URL; signs like @ : / in a password are written as %40 %3A %2F",
        )


def _remote_matches(name: str, options: StorageOptions) -> list[str]:
    _check_url(name)
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
