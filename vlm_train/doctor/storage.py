"""Where runs are written and data is read: room, rates, and whether it can be read at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_train.data.decode import SampleError, first_image, image_parts, open_image
from vlm_train.data.sources.shards import ShardSource
from vlm_train.doctor.findings import GREEN, RED, YELLOW, Finding

WRITTEN_MB = 256
LEAST_RATE = 50.0
"""MB a second."""
LEAST_FREE_GB = 10.0
NUM_READ = 64


def disk(folder: Path, checkpoint_gb: float | None = None, keep: int = 2) -> Iterator[Finding]:
    """How fast a file reaches the disk of the runs, and how many checkpoints have room there.

    Args:
        folder: one that is there, on that disk.
        checkpoint_gb: size of a checkpoint, where it is known.
        keep: checkpoints that stay.
    """
    free = shutil.disk_usage(folder).free / 1e9
    wanted = LEAST_FREE_GB if checkpoint_gb is None else (keep + 2) * checkpoint_gb
    seen = f"{free:.1f} GB free in {folder}"
    if free < wanted:
        light = YELLOW if checkpoint_gb is None else RED
        yield Finding("disk_space", light, f"{seen}; {wanted:.1f} wanted",
                      "make room, run.dir on another disk, or a smaller checkpoint.keep")  # fmt: skip
    else:
        yield Finding("disk_space", GREEN, seen)
    if free < 2 * WRITTEN_MB / 1e3:
        return
    rate = write_rate(folder)
    stall = (
        ""
        if checkpoint_gb is None
        else f"; a checkpoint of {checkpoint_gb:.3g} GB takes {checkpoint_gb * 1e3 / rate:.2g} s"
    )
    if rate < LEAST_RATE:
        yield Finding("disk_rate", YELLOW, f"{rate:.0f} MB/s written to {folder}{stall}",
                      "run.dir on a faster disk, or a larger checkpoint.every_steps")  # fmt: skip
    else:
        yield Finding("disk_rate", GREEN, f"{rate:.0f} MB/s written to {folder}{stall}")


def write_rate(folder: Path, megabytes: int = WRITTEN_MB) -> float:
    """MB a second of a file of random bytes that is flushed to the disk and removed again."""
    block = os.urandom(1 << 20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".vlm-train-doctor-") as file:
        start = time.perf_counter()
        for _ in range(megabytes):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return megabytes * (1 << 20) / 1e6 / (time.perf_counter() - start)


def data(split: str, shards: str | Sequence[str]) -> Iterator[Finding]:
    """Whether a split is there, its index, and a few of its samples. The index is made where there is none."""
    source = ShardSource(shards=shards)
    bad, num_bytes = 0, 0
    rows = np.unique(np.linspace(0, len(source) - 1, min(NUM_READ, len(source))).astype(np.int64))
    start = time.perf_counter()
    for sample in source.read(rows):
        try:
            num_bytes += _decoded(sample)
        except SampleError:
            bad += 1
    rate = len(rows) / (time.perf_counter() - start)
    seen = f"{len(source):,} samples; {len(rows)} read and decoded at {rate:.0f}/s in one process"
    if bad:
        yield Finding(f"data.{split}", RED if bad == len(rows) else YELLOW, f"{seen}, {bad} of them cannot be used",
                      "vlm-train data verify SHARDS --mode sample")  # fmt: skip
    else:
        yield Finding(f"data.{split}", GREEN, seen)


def _decoded(sample: Any) -> int:
    """Bytes of a sample, whose picture decodes where it has one. Raises SampleError."""
    if isinstance(sample, SampleError):
        raise sample
    if image_parts(sample.parts):
        open_image(first_image(sample.parts)).decode()
    return sum(len(part) for part in sample.parts.values())
