"""Copies of known origin, planted beside pictures of the user's own: what rules that find duplicates are measured on.

The own pictures are those of lowest hash of (seed, uid), of equal images one; the first of them are copied, once by
each kind of `COPIES`, the others are there to be mistaken for. All are brought to at most `SIDE` pixels a side first,
which bounds time and disk; hashes look at 64 pixels a side, models at 224 or a few more. A mirrored picture is another
one, and the control. Everything follows from the seed and the uids: workers and the order of shards change nothing.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlm_train.curation.clusters import uid_words
from vlm_train.curation.engines import Engine
from vlm_train.data.decode import SampleError, decode_captions, decode_metadata, first_image, open_image
from vlm_train.data.indexing import open_manifest
from vlm_train.data.manifest import Manifest
from vlm_train.data.order import derive, mix
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.writer import ShardWriter
from vlm_train.errors import DataError
from vlm_train.types import RawSample

OWN, CONTROL = "own", "mirrored"
SIDE = 384
"""Pixels of the longer side of what is planted, at most."""

NUM_OTHERS = 4
"""Own pictures that are not copied, for each that is."""

_CHUNK = 32  # pictures that one call copies
_NO_CAPTION = b"a picture"  # a model may ask for a caption

Maker = Callable[[Image.Image, np.random.Generator], bytes]


def png(picture: Image.Image) -> bytes:
    """The picture as it is, in PNG."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def resized(picture: Image.Image, generator: np.random.Generator) -> bytes:
    """0.5 to 0.9 of the size, in PNG."""
    scale = generator.uniform(0.5, 0.9)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return png(picture.resize(size, Image.Resampling.BICUBIC))


def recompressed(picture: Image.Image, generator: np.random.Generator) -> bytes:
    """A JPEG of quality 30 to 90."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=int(generator.integers(30, 91)))
    return file.getvalue()


def cropped(picture: Image.Image, generator: np.random.Generator) -> bytes:
    """Up to a twentieth less on each side, in PNG."""
    left, top, right, bottom = generator.uniform(0, 0.05, 4)
    first = round(left * picture.width), round(top * picture.height)
    last = picture.width - round(right * picture.width), picture.height - round(bottom * picture.height)
    return png(picture.crop((*first, *last)))


def covered(picture: Image.Image, generator: np.random.Generator) -> bytes:
    """A box of one colour over a tenth, in PNG."""
    width, height = max(1, round(0.4 * picture.width)), max(1, round(0.25 * picture.height))
    left = generator.integers(0, max(1, picture.width - width))
    top = generator.integers(0, max(1, picture.height - height))
    box = Image.new("RGB", (width, height), tuple(generator.integers(0, 256, 3).tolist()))
    copy = picture.copy()
    copy.paste(box, (int(left), int(top)))
    return png(copy)


def mirrored(picture: Image.Image, generator: np.random.Generator) -> bytes:
    """Left and right exchanged, in PNG."""
    return png(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))


COPIES: dict[str, Maker] = {
    "resized": resized,
    "recompressed": recompressed,
    "cropped": cropped,
    "covered": covered,
    "mirrored": mirrored,
}
"""By kind, what makes a copy of an RGB picture: JPEG of `recompressed`, PNG of the others."""


@dataclass(frozen=True, slots=True, eq=False)
class Planted:
    """A set of own pictures and of copies, M samples.

    `origin` int64 [M]: the number of the own picture that a sample is, or was made of; `kinds` [M]: of `COPIES`, or
    `OWN`; `rows` int64 [n]: the row of own picture i in the user's manifest; `num_unreadable`: drawn ones that do not
    decode or cannot be read, and are left out.
    """

    manifest: Manifest
    origin: NDArray[np.int64]
    kinds: NDArray[np.str_]
    rows: NDArray[np.int64]
    num_unreadable: int

    def num_copied(self) -> int:
        """Own pictures that were copied."""
        return int((self.kinds == CONTROL).sum())


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Own pictures to plant: `rows` by number from `first` on, the numbers below `num_copied` with copies, into a
    folder."""

    source: ShardSource
    rows: NDArray[np.int64]
    first: int
    num_copied: int
    seed: int
    folder: Path


def plant(
    source: ShardSource,
    folder: Path,
    *,
    engine: Engine,
    num_samples: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Planted:
    """Draws pictures, copies them and writes all into shards.

    Args:
        source: the user's shards.
        folder: a new one, for the set; 0.2 MB for each picture and copy at most as a rule.
        engine: where pictures are copied.
        num_samples: pictures that are copied; `NUM_OTHERS` times as many are put beside them where there are.
        seed: of the draw, and of the copies.
        progress: called with (pictures done, in all).

    Raises:
        DataError: no picture can be read.
    """
    rows = drawn(source.manifest, num_samples * (1 + NUM_OTHERS), seed)
    chunks = [
        _Chunk(source, rows[start : start + _CHUNK], start, num_samples, seed, folder / f"{start // _CHUNK:05d}")
        for start in range(0, len(rows), _CHUNK)
    ]
    written, done = [], 0
    for chunk, num in zip(chunks, engine.map(_plant, chunks), strict=True):
        written += [str(chunk.folder)] if num else []
        done += len(chunk.rows)
        if progress is not None:
            progress(done, len(rows))
    if not written:
        raise DataError("there is no picture to copy", got=f"{len(rows)} pictures, none of which can be read",
                        remedy="vlm-train data verify SHARDS --mode sample")  # fmt: skip
    manifest = open_manifest(written)
    keys = [key.split("-") for key in manifest.table(["key"])["key"].to_pylist()]
    origin, kinds = np.array([int(number) for number, _ in keys]), np.array([kind for _, kind in keys])
    return Planted(manifest, origin, kinds, rows, len(rows) - int((kinds == OWN).sum()))


def drawn(manifest: Manifest, num: int, seed: int) -> NDArray[np.int64]:
    """The `num` rows with a picture that have the lowest hash of (seed, uid), lowest first; of equal images one.

    Memory: 50 bytes a row.
    """
    table = manifest.table(("width", "image_hash"))
    low, high = uid_words(manifest.uids())
    order = np.lexsort((low, high, mix(high + derive(seed, low))))
    order = order[table["width"].fill_null(0).to_numpy()[order] > 0]
    _, first = np.unique(table["image_hash"].to_numpy()[order], return_index=True)
    return order[np.sort(first)][:num]


def _plant(chunk: _Chunk) -> int:
    """Writes the pictures of a chunk and their copies; returns how many samples."""
    writer, num = ShardWriter(chunk.folder, max_samples=len(chunk.rows) * (1 + len(COPIES))), 0
    for number, sample in enumerate(chunk.source.read(chunk.rows), chunk.first):
        try:
            picture, caption, uid = _opened(sample)
        except SampleError:
            continue
        writer.write(f"{number:07d}-{OWN}", {"png": png(picture), "txt": caption})
        num += 1
        for place, (kind, make) in enumerate(COPIES.items() if number < chunk.num_copied else ()):
            generator = np.random.default_rng([chunk.seed % 2**64, place, *uid])
            content = make(picture, generator)
            writer.write(f"{number:07d}-{kind}", {"jpg" if kind == "recompressed" else "png": content, "txt": caption})
            num += 1
    writer.close()
    return num


def _opened(sample: RawSample | SampleError) -> tuple[Image.Image, bytes, bytes]:
    """(the picture of a sample, RGB, at most `SIDE` pixels a side; its first caption; its uid). Raises SampleError."""
    if isinstance(sample, SampleError):
        raise sample
    pixels = open_image(first_image(sample.parts)).decode(min_width=SIDE, min_height=SIDE)
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    try:
        caption = decode_captions(sample.parts, decode_metadata(sample.parts))[0].encode()
    except SampleError:
        caption = _NO_CAPTION
    return picture, caption, sample.uid
