"""Trained runs as curation has them: what they make of samples, a shard at a time, kept beside what is made of it."""

from __future__ import annotations

import functools
import io
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlm_train.cli.trained import choose_checkpoint, choose_device, open_run
from vlm_train.curation.embeddings import Embedded, Side
from vlm_train.data.home import write_whole
from vlm_train.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vlm_train.build import Parts
    from vlm_train.curation.engines import Engine
    from vlm_train.data.manifest import Manifest

_ENOUGH = 2048  # samples of a shard that are worth a process to decode them beside a GPU


@dataclass(frozen=True, slots=True)
class _Shard:
    """What to embed: a shard with samples of hash `content`, by a checkpoint, on one side, into a file. Paths are
    absolute: an engine may work elsewhere."""

    shard: str
    content: str
    checkpoint: Path
    device: str | None
    side: Side
    file: Path


class Runs:
    """See `curation.embeddings.Models`.

    Args:
        engine: where they run.
        store: the folder that keeps embeddings, by the weights and the samples that they are of.
        device: as the verbs take it, of the machine that embeds.
        ticking: how progress is told.
    """

    def __init__(
        self, engine: Engine, *, store: Path, device: str | None, ticking: Callable[[str], Callable[[int, int], None]]
    ) -> None:
        self.engine, self.store, self.device, self.ticking = engine, store.absolute(), device, ticking

    def identity(self, run: str) -> str:
        """See `Models`."""
        from vlm_train.engine import checkpoints

        return checkpoints.identity(_checkpoint(run))

    def embed(self, manifest: Manifest, run: str, side: Side) -> Embedded:
        """See `Models`."""
        checkpoint = _checkpoint(run).absolute()
        folder = self.store / f"{self.identity(run)}-{side}"
        folder.mkdir(parents=True, exist_ok=True)
        items = [
            _Shard(shard, entry["content"], checkpoint, self.device, side, folder / f"{entry['content'][:32]}.npz")
            for shard, entry in zip(manifest.shards, manifest.entries_of, strict=True)
        ]
        left = [item for item in items if _read(item) is None]
        tick, done = self.ticking("shards embedded"), len(items) - len(left)
        for number, _ in enumerate(self.engine.map(_embed, left, runs_model=self.device != "cpu"), 1):
            tick(done + number, len(items))
        parts = [part for item in items if (part := _read(item)) is not None]
        rows = [start + usable for start, (_, usable) in zip(manifest.starts.tolist(), parts, strict=False)]
        features = np.concatenate([found for found, _ in parts if len(found)] or [np.empty((0, 1), np.float32)])
        if not len(features):
            raise DataError("a model can read none of the samples", got=f"{len(manifest)} samples, run {run}",
                            remedy="vlm-train data verify SHARDS --mode full")  # fmt: skip
        return Embedded(features, np.concatenate(rows))


def _checkpoint(run: str) -> Path:
    """The checkpoint that a user means by a run, or by one of its checkpoints."""
    from vlm_train.cli.runs import is_checkpoint
    from vlm_train.engine import checkpoints

    if is_checkpoint(Path(run)):
        checkpoints.verify(Path(run))
        return Path(run)
    return choose_checkpoint(open_run(run, key="--run"), None)


def _read(item: _Shard) -> tuple[NDArray[np.float32], NDArray[np.int64]] | None:
    """(features, usable rows) of a shard; None where they are not there, or not whole."""
    try:
        with np.load(item.file, allow_pickle=False) as found:
            return found["features"], found["rows"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _embed(item: _Shard) -> None:
    """Embeds a shard and writes its file."""
    from vlm_train import build
    from vlm_train.curation.reading import open_shard
    from vlm_train.evaluation.base import counted
    from vlm_train.evaluation.ranking import check_unit

    source = open_shard(item.shard, item.content)
    parts, device = _loaded(item.checkpoint), choose_device(item.device)
    embedder, usable, found = build.embedder(parts, device), [], []
    num_workers = int(device.type != "cpu" and len(source) > _ENOUGH)
    with _one_thread():
        for batch in build.eval_loader(parts, source, num_workers=num_workers):
            keep = counted(batch)
            features = embedder.images(batch) if item.side == "image" else embedder.texts(batch["captions"])
            check_unit(features[keep.to(features.device)], "Features")
            found.append(features[keep.to(features.device)].float().cpu().numpy())
            usable.append(keep.numpy())
    file, kept = io.BytesIO(), np.concatenate(usable)[: len(source)]
    np.savez(file, features=np.concatenate(found), rows=np.flatnonzero(kept))
    write_whole(item.file, file.getvalue())


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums of products on a CPU are taken apart by the number of threads, so their last bits depend on it: features of
    1, 2, 3 and 4 threads all differ. With one they are the same on any number of cores, and processes use the others.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.lru_cache(maxsize=1)
def _loaded(checkpoint: Path) -> Parts:
    """The run of a checkpoint; a process loads it once."""
    from vlm_train import build

    return build.load(checkpoint.parent.parent, checkpoint=checkpoint)
