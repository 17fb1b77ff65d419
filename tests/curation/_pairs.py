"""Small real datasets of one picture and any captions, and a model that is a table: what tests of steps are made of."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from vlm_train.curation.chain import Found, Step, Work
from vlm_train.curation.embeddings import Embedded
from vlm_train.curation.engines import Local
from vlm_train.data.indexing import open_manifest
from vlm_train.data.manifest import Manifest
from vlm_train.data.writer import DatasetWriter


def png(width: int = 4, height: int = 4) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def write(
    folder: Path, captions: Sequence[str], order: Sequence[int] | None = None, max_samples: int = 1000
) -> Manifest:
    """Samples of these captions, stored in this order; sample i has key i, and i and its caption decide its uid."""
    with DatasetWriter(folder / "data", parameters={}, max_samples=max_samples) as writer:
        for number in range(len(captions)) if order is None else order:
            told = json.dumps({"source": str(number)}).encode()
            writer.add("train", f"{number:05d}", {"png": PICTURE, "txt": captions[number].encode(), "json": told})
        writer.finish(num_errors=0, facts={})
    return open_manifest(str(folder / "data" / "train"))


PICTURE = png()


def numbers_of(manifest: Manifest) -> list[int]:
    """Of each row which sample it is."""
    return [int(key) for key in manifest.table(["key"])["key"].to_pylist()]


class Table:
    """A model that knows features [N, D] of each side by the number of a sample; `unread`: what it cannot read."""

    def __init__(self, image: np.ndarray, text: np.ndarray | None = None, unread: Sequence[int] = ()) -> None:
        self.sides: Mapping[str, np.ndarray] = {"image": image, "text": image if text is None else text}
        self.unread = set(unread)

    def identity(self, run: str) -> str:
        return f"weights of {run}"

    def embed(self, manifest: Manifest, run: str, side: str) -> Embedded:
        numbers = numbers_of(manifest)
        rows = [row for row, number in enumerate(numbers) if number not in self.unread]
        return Embedded(self.sides[side][[numbers[row] for row in rows]].astype(np.float32), np.array(rows, np.int64))


def work(folder: Path, models: object = None, num_workers: int = 1) -> Work:
    def ticking(what: str) -> Callable[[int, int], None]:
        return lambda done, total: None

    return Work(
        engine=Local(num_workers=num_workers),
        num_threads=1,
        models=models,
        ticking=ticking,
        folder=folder / "out",  # type: ignore[arg-type]
    )


def told(manifest: Manifest, found: Found) -> dict[int, tuple[str, int, float]]:
    """(rule, sample for which it goes, value) by sample."""
    numbers = numbers_of(manifest)
    assert len(set(found.rows.tolist())) == len(found.rows)
    return {
        numbers[row]: (str(rule), numbers[like] if like >= 0 else -1, float(value))
        for row, rule, like, value in zip(found.rows, found.rules, found.like, found.values, strict=True)
    }


@contextmanager
def fresh() -> Iterator[Path]:
    """A folder for one example of a property."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def run(
    step: Step,
    captions: Sequence[str],
    *,
    order: Sequence[int] | None = None,
    max_samples: int = 1000,
    models: object = None,
    among: Sequence[int] | None = None,
) -> dict[int, tuple[str, int, float]]:
    """What a step drops, by sample, of samples stored in this order in shards of so many. `among`: which it sees."""
    with fresh() as folder:
        manifest = write(folder, captions, order, max_samples)
        mask = np.ones(len(manifest), bool) if among is None else np.isin(numbers_of(manifest), list(among))
        tools = work(folder, models)
        step.settings(tools)
        return told(manifest, step.find(manifest, mask, tools))
