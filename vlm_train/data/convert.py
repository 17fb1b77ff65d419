"""Shards of any kind to one `.beton`, or to tars, through the manifest: how many samples there are is known beforehand.

The bytes of images and texts are kept where the target can hold them. A sample that cannot be read, decoded or held is
written with its reason to `OUT.errors.jsonl` and left out; nothing waits for it. The order of the samples is that of
the manifest, so a selection's rows keep their order, and a sample whose parts are all kept keeps its uid.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlm_train.data import decode
from vlm_train.data.beton import BetonWriter
from vlm_train.data.decode import SampleError
from vlm_train.data.local import printable
from vlm_train.data.records import IMAGE_ENDINGS
from vlm_train.data.selection import Selection
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.writer import Progress, ShardWriter, is_fit, write_atomically
from vlm_train.errors import DataError
from vlm_train.types import RawSample

_CHUNK = 256
_MAX_KEY = 160  # bytes of a key that is made up; it leaves room for a number and the name of a part

Errors = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Converted:
    """What became of the samples. `num_pixels` images are stored as pixels; `errors`: the file that lists what could
    not be converted."""

    num_written: int
    num_bytes: int
    num_pixels: int
    num_errors: int
    errors: Path


def convert(
    shards: str | Sequence[str],
    out: Path,
    *,
    selection: Path | None = None,
    max_samples: int = 10_000,
    progress: Progress | None = None,
) -> Converted:
    """Writes the samples of `shards` anew.

    Args:
        shards: as `data.train.shards`.
        out: a name ending in `.beton`, or a folder for tars; must not exist, or be an empty folder.
        selection: only the samples that it keeps, each once.
        max_samples: samples to a tar.
        progress: called now and then.

    Raises:
        DataError: shards that cannot be read, a target that is there already, a selection of other shards, or not one
            sample that can be converted.
    """
    source = ShardSource(shards=shards)
    chosen = Selection.all(len(source)) if selection is None else Selection.load(selection, source.fingerprint)
    rows = np.flatnonzero(chosen.mask())
    try:
        if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
            raise DataError(f"{out} is there already", allowed="a name that is not taken", remedy="choose another one")
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out} cannot be written", got=error, remedy="choose another name") from error
    target = _to_beton if out.suffix == ".beton" else _to_tars
    errors: list[dict[str, str]] = []
    listed = out.with_name(f"{out.name}.errors.jsonl")
    try:
        num_pixels = target(out, _good_samples(source, rows, errors, progress), len(rows), max_samples, errors)
    finally:
        if errors:
            write_atomically(listed, "".join(json.dumps(error) + "\n" for error in errors))
    files = [out] if out.is_file() else sorted(out.glob("*.tar"))
    num_bytes = sum(file.stat().st_size for file in files)
    return Converted(len(rows) - len(errors), num_bytes, num_pixels, len(errors), listed)


def _good_samples(
    source: ShardSource, rows: NDArray[np.int64], errors: Errors, progress: Progress | None
) -> Iterator[RawSample]:
    """The samples that can be read and decoded; the others go to `errors`."""
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        for row, sample in zip(chunk.tolist(), source.read(chunk), strict=True):
            error = sample if isinstance(sample, SampleError) else _undecodable(sample)
            if error is None and not isinstance(sample, SampleError):
                yield sample
            elif error is not None:
                errors.append(_report(*source.locate(row), error))
        if progress is not None:
            progress(start + len(chunk), len(rows))


def _undecodable(sample: RawSample) -> SampleError | None:
    """A JPEG is decoded at an eighth of its size, which reads it to its end all the same."""
    try:
        for name in decode.image_parts(sample.parts):
            decode.open_image(sample.parts[name]).decode(min_width=1, min_height=1)
    except SampleError as error:
        return error
    return None


def _to_beton(out: Path, samples: Iterator[RawSample], num_samples: int, max_samples: int, errors: Errors) -> int:
    """Returns how many images are stored as pixels."""
    with BetonWriter(out, num_samples) as writer:
        for sample in samples:
            try:
                writer.write(sample.key, sample.parts)
            except SampleError as error:
                errors.append(_report(sample.shard, sample.key, error))
        return writer.num_pixels


def _to_tars(out: Path, samples: Iterator[RawSample], num_samples: int, max_samples: int, errors: Errors) -> int:
    """Returns 0: pixels become PNG, which loses nothing. Keys are distinct within a tar; more is asked of none."""
    writer = ShardWriter(out, max_samples=max_samples)
    used: dict[str, int] = {}
    num_written, last = 0, ""
    for sample in samples:
        parts = _without_ppm(sample.parts)
        if num_written % max_samples == 0:
            used = {last: 1}  # the last of a tar is no key of the next one either: `ShardWriter` would refuse it
        key = _tar_key(sample.key, parts, used)
        try:
            writer.write(key, parts)
            num_written, last = num_written + 1, key
        except DataError as error:
            errors.append(_report(sample.shard, sample.key, SampleError("part_not_writable", got=error)))
    if not writer.close():
        raise DataError(f"not one sample could be converted to {out}", got=errors[:3])
    return 0


def _tar_key(key: str, parts: Iterable[str], used: dict[str, int]) -> str:
    """A key that a tar can hold and that no sample before it has: the sample's own, or what is left of a file's name
    without its ending, or one with `_` for each dot and a number where it came before.

    `used`: the keys so far, each with the last number that was tried behind it.
    """
    for name in (key, key.rpartition(".")[0]) if key.lower().endswith(IMAGE_ENDINGS) else (key,):
        if name not in used and all(is_fit(name, part) for part in parts):
            used[name] = 1
            return name
    short = printable(key).encode()[:_MAX_KEY].decode(errors="ignore")
    pieces = (piece.strip() for piece in short.replace("\0", "_").replace(".", "_").split("/"))
    base = name = "/".join(filter(None, pieces)) or "sample"
    number = used.get(base, 1)
    while name in used:
        number += 1
        name = f"{base}-{number}"
    used[base], used[name] = number, 1
    return name


def _without_ppm(parts: dict[str, bytes]) -> dict[str, bytes]:
    """PNG where PPM was; but where there is PNG, too, both are kept as they are."""
    if "png" in parts:
        return parts
    return {("png" if name == "ppm" else name): (_png(raw) if name == "ppm" else raw) for name, raw in parts.items()}


def _png(ppm: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(decode.open_image(ppm).decode()).save(buffer, "PNG")
    return buffer.getvalue()


def _report(shard: str, key: str, error: SampleError) -> dict[str, str]:
    return {"shard": shard, "key": key, "reason": error.reason, "detail": error.detail[:200]}
