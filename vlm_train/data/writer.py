"""Writes datasets: splits of plain WebDataset tars, then `dataset.json`, so that a dataset is finished or it is not.

A shard is a tar (ustar, PAX where a name needs it) whose headers carry no time, owner or machine, so equal samples give
equal bytes. Each shard is written beside its place and renamed into it. While a dataset is being built its directory
holds a locked marker; the marker goes when `dataset.json`, which names the generating parameters and the sha256 of
every shard, is in place. Hence a killed build is rebuilt by the same command, a finished one is left alone, and nothing
else is ever overwritten.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from vlm_train.data import tar
from vlm_train.data.local import regular
from vlm_train.errors import DataError
from vlm_train.log import get_logger

FORMAT_VERSION = 1
MARKER = ".unfinished"
SHARD_NAME = re.compile(r"\d{5,}\.tar(\.tmp)?")
_MAX_NAME = 240  # bytes: some file systems take no more than 255 in a name

Progress = Callable[[int, int], None]
"""Called with (samples done, samples in all) after each sample."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a dataset holds. `already_there`: it had been finished before, so nothing was written."""

    directory: str
    num_samples: dict[str, int]
    num_bytes: int
    num_errors: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    already_there: bool = False


class ShardWriter:
    """Writes `00000.tar`, `00001.tar`, ... of at most `max_samples` samples each into one directory.

    Args:
        directory: created where missing; must not hold shards yet.
        max_samples: samples to a shard.

    Raises:
        DataError: the directory holds shards, a key is not fit for a file name or comes twice in a row, a part is
            empty or of an unknown kind.
    """

    def __init__(self, directory: Path, *, max_samples: int = 1000) -> None:
        if max_samples < 1:
            raise DataError("a shard holds at least one sample", got=max_samples, allowed="1 and more")
        self.directory, self.max_samples = Path(directory), max_samples
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            present = sorted(name for name in os.listdir(self.directory) if SHARD_NAME.fullmatch(name))
        except OSError as error:
            raise DataError(f"{self.directory} cannot be written", got=error, remedy="choose another name") from error
        if present:
            raise DataError(
                f"{self.directory} already holds shards, and shards are never overwritten",
                got=", ".join(present[:3]),
                remedy="choose another directory, or remove this one",
            )
        self.shards: list[dict[str, Any]] = []
        self._tar: tarfile.TarFile | None = None
        self._num_in_shard = 0
        self._last_key = ""

    def write(self, key: str, parts: Mapping[str, bytes]) -> None:
        """Appends one sample; `parts` maps suffix (`jpg`, `txt`, `json`, `0.jpg`, ...) to bytes, kept in order."""
        self._check(key, parts)
        if self._tar is not None and self._num_in_shard == self.max_samples:
            self._finish_shard()
        if self._tar is None:
            self._tar = tarfile.open(self._path(".tmp"), "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        for suffix, content in parts.items():
            member = tarfile.TarInfo(f"{key}.{suffix}")  # its defaults: mode 0644, owner 0, time 0, no names
            member.size = len(content)
            self._tar.addfile(member, io.BytesIO(content))
        self._num_in_shard += 1
        self._last_key = key

    def close(self) -> list[dict[str, Any]]:
        """Finishes the last shard; returns {file, num_samples, num_bytes, sha256} of each."""
        if self._tar is not None:
            self._finish_shard()
        return self.shards

    def _check(self, key: str, parts: Mapping[str, bytes]) -> None:
        if not is_fit(key, "txt") or key == self._last_key:
            raise DataError("unfit sample key", got=repr(key), allowed="distinct keys: relative paths without a dot")
        bad = [suffix for suffix, content in parts.items() if not is_fit(key, suffix) or not content]
        if bad or not parts:
            raise DataError(f"sample {key}: empty or unfit part", got=bad, allowed="endings like jpg, 0.jpg, txt, json")

    def _path(self, ending: str = "") -> Path:
        return self.directory / f"{len(self.shards):05d}.tar{ending}"

    def _finish_shard(self) -> None:
        assert self._tar is not None
        self._tar.close()
        with open(self._path(".tmp"), "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            num_bytes = os.fstat(stream.fileno()).st_size
            os.fsync(stream.fileno())
        os.replace(self._path(".tmp"), self._path())
        row = {"file": self._path().name, "num_samples": self._num_in_shard, "num_bytes": num_bytes, "sha256": digest}
        self.shards.append(row)
        self._tar, self._num_in_shard = None, 0


class DatasetWriter:
    """Builds one dataset directory: `SPLIT/*.tar` for each split, side files, and `dataset.json` at the end.

    Use it in a `with` block, which lets go of the directory. When `finished` is not None there is nothing to build.

    Args:
        directory: missing, empty, holding this very dataset, or left by a build that was killed.
        parameters: all that determines the content (JSON types); the same parameters are the same dataset.
        max_samples: samples to a shard.

    Raises:
        DataError: the directory holds something else, or another process is building there.
    """

    def __init__(self, directory: Path, *, parameters: Mapping[str, Any], max_samples: int = 1000) -> None:
        self.directory, self.max_samples = Path(directory), max_samples
        self.parameters = {**parameters, "max_samples_per_shard": max_samples}
        self.finished = self._finished()
        self._splits: dict[str, ShardWriter] = {}
        self._lock = None if self.finished is not None else self._claim()

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def add(self, split: str, key: str, parts: Mapping[str, bytes]) -> None:
        """Appends a sample to a split."""
        if split not in self._splits:
            self._splits[split] = ShardWriter(self.directory / split, max_samples=self.max_samples)
        self._splits[split].write(key, parts)

    def add_file(self, name: str, content: str) -> None:
        """Writes a side file (attribution, class names, errors) into the root of the dataset."""
        write_atomically(self.directory / name, content)

    def finish(self, *, num_errors: int = 0, facts: Mapping[str, Any] | None = None) -> Summary:
        """Closes every shard and writes `dataset.json`: from now on the dataset is there."""
        splits = {name: writer.close() for name, writer in sorted(self._splits.items())}
        document = {
            "version": FORMAT_VERSION,
            "parameters": self.parameters,
            "num_samples": {name: sum(row["num_samples"] for row in rows) for name, rows in splits.items()},
            "num_errors": num_errors,
            "facts": dict(facts or {}),
            "splits": splits,
        }
        write_atomically(self.directory / "dataset.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        (self.directory / MARKER).unlink()
        return _summary(self.directory, document, already_there=False)

    def _finished(self) -> Summary | None:
        path = self.directory / "dataset.json"
        if not os.path.lexists(path):
            return None
        try:
            with open(path, encoding="utf-8", opener=regular) as file:
                document = json.load(file)
            found = {**document["parameters"]}
            shards = [
                (f"{self.directory / name / row['file']}", row)
                for name, rows in document["splits"].items()
                for row in rows
            ]
            summary = _summary(self.directory, document, already_there=True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{path} is not ours or is damaged ({error!r})", remedy="choose another directory"
            ) from error
        if found != json.loads(json.dumps(self.parameters)):
            differing = sorted(key for key in {*found, *self.parameters} if found.get(key) != self.parameters.get(key))
            raise DataError(
                f"{self.directory} holds a dataset made with other parameters",
                got={key: self.parameters.get(key) for key in differing},
                allowed={key: found.get(key) for key in differing},
                remedy="choose another directory, or remove this one",
            )
        broken = [path for path, row in shards if not os.path.isfile(path) or os.stat(path).st_size != row["num_bytes"]]
        if broken:
            raise DataError(
                "shards of a finished dataset are missing or cut", got=broken[:5], remedy=f"remove {self.directory}"
            )
        log.info("%s is already there, made with the same parameters: nothing to do", self.directory)
        return summary

    def _claim(self) -> IO[str]:
        marker = self.directory / MARKER
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            present = sorted(os.listdir(self.directory))
            if present and MARKER not in present:
                raise DataError(
                    f"{self.directory} is not empty and holds no dataset of ours",
                    got=", ".join(present[:5]),
                    remedy="choose another directory",
                )
            lock = open(marker, "w")  # locked for as long as it is open  # noqa: SIM115
        except OSError as error:
            raise DataError(
                f"{self.directory} cannot be written", got=error, remedy="choose another directory"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise DataError(f"another process is writing {self.directory}", remedy="wait for it to end") from error
        for shard in self.directory.glob("*/*.tar*"):  # left by a killed build: the marker says they are ours
            if SHARD_NAME.fullmatch(shard.name):
                shard.unlink()
        return lock


def is_fit(key: str, suffix: str) -> bool:
    """Whether `key.suffix` is a member that is read back as that part of that sample, and safe for who extracts it."""
    name = f"{key}.{suffix}"
    try:
        num_bytes = len(name.encode())
    except UnicodeError:
        return False
    safe = not key.startswith("/") and ".." not in key.split("/") and "\0" not in name and name == name.strip()
    member = tar.Member(name, 0, 0, 1, "file")
    return safe and num_bytes <= _MAX_NAME and tar.part_of(member) == (key, suffix)


def _summary(directory: Path, document: Mapping[str, Any], *, already_there: bool) -> Summary:
    rows = itertools.chain.from_iterable(document["splits"].values())
    return Summary(
        directory=str(directory),
        num_samples={**document["num_samples"]},
        num_bytes=sum(row["num_bytes"] for row in rows),
        num_errors=document["num_errors"],
        facts=document["facts"],
        already_there=already_there,
    )


def write_atomically(path: Path, content: str) -> None:
    """Writes text so that the file is either the old one or the whole new one, also after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8", newline="\n") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def to_json(metadata: Mapping[str, Any]) -> bytes:
    """KEY.json of a sample: one line of UTF-8, keys in the order given."""
    text = json.dumps(metadata, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")  # for half a surrogate pair that is what JSON has, too


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: what splits are drawn by."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
