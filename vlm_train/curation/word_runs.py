"""Runs of words that texts of one dataset share with texts of another: how leaked questions and captions are found.

All that a sample says is read: its captions, and each turn of its dialogue. Texts are compared in their normalised form
(`texts.normalised`); a text of fewer words than a run has none, so that "a dog" leaks nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlm_train.curation.engines import Engine
from vlm_train.curation.reading import samples_of
from vlm_train.curation.texts import normalised, words_in
from vlm_train.data.chat import turns_of
from vlm_train.data.decode import SampleError, decode_captions, decode_metadata
from vlm_train.data.home import write_whole
from vlm_train.data.manifest import Manifest

Runs = tuple[NDArray[np.uint64], NDArray[np.int64]]
"""(hashes [n], the rows that hold them [n])."""


@dataclass(frozen=True, slots=True)
class _Shard:
    """A shard with samples of hash `content`, whose runs of `length` words are wanted; `known`: a file of hashes, those
    alone, None for all."""

    shard: str
    content: str
    length: int
    known: Path | None


def runs_of(manifest: Manifest, length: int, *, engine: Engine) -> Runs:
    """Every run of `length` words of a dataset that is small, such as a benchmark: each hash once, by its first row."""
    items = _shards(manifest, length, None)
    found = list(zip(manifest.starts.tolist(), engine.map(_runs, items), strict=False))
    hashes = np.concatenate([part for _, (part, _) in found])
    rows = np.concatenate([start + rows for start, (_, rows) in found])
    hashes, first = np.unique(hashes, return_index=True)
    return hashes, rows[first]


def shared_with(manifest: Manifest, runs: Runs, length: int, *, engine: Engine, file: Path) -> NDArray[np.int64]:
    """int64 [n, 2]: (row, row of `runs`) of rows of a manifest that share a run; each row with the first such only.

    Args:
        manifest: its shards are read.
        runs: of the other dataset.
        length: words of a run.
        engine: where shards are read.
        file: where the hashes are put for the processes of the engine.
    """
    hashes, rows_of = runs
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, hashes.tobytes())
    items = _shards(manifest, length, file)
    pairs = [np.empty((0, 2), np.int64)]
    for start, (found, rows) in zip(manifest.starts.tolist(), engine.map(_runs, items), strict=False):
        others = rows_of[np.searchsorted(hashes, found)]
        order = np.lexsort((others, rows))
        rows, first = np.unique(rows[order], return_index=True)
        pairs.append(np.stack([start + rows, others[order][first]], axis=1))
    file.unlink(missing_ok=True)
    return np.concatenate(pairs)


def _shards(manifest: Manifest, length: int, known: Path | None) -> list[_Shard]:
    entries = zip(manifest.shards, manifest.entries_of, strict=True)
    return [_Shard(shard, entry["content"], length, known) for shard, entry in entries]


def _runs(item: _Shard) -> Runs:
    known = None if item.known is None else np.fromfile(item.known, np.uint64)
    hashes, rows = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for row, sample in enumerate(samples_of(item.shard, item.content)):
        if isinstance(sample, SampleError):
            continue
        runs = [_hash(run) for text in _texts(sample.parts) for run in _split(text, item.length)]
        found = np.unique(np.array(runs, np.uint64))
        found = found if known is None else found[np.isin(found, known)]
        hashes.append(found)
        rows.append(np.full(len(found), row))
    return np.concatenate(hashes), np.concatenate(rows)


def _texts(parts: Mapping[str, bytes]) -> list[str]:
    """Whatever can be read of what a sample says."""
    said: list[str] = []
    try:
        metadata = decode_metadata(parts)
        said += decode_captions(parts, metadata)
        said += [turn.content for turn in turns_of(metadata, said[0])] if "conversations" in metadata else []
    except SampleError:
        pass
    return said


def _split(text: str, length: int) -> Iterator[str]:
    words = words_in(normalised(text))
    return (" ".join(words[start : start + length]) for start in range(len(words) - length + 1))


def _hash(run: str) -> int:
    return int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "little")
