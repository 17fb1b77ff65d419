"""How fast pictures are hashed, how fast near copies are found among the hashes, in how much memory, is any missed.

    python scripts/bench/hashing.py               hashes 200 pictures, joins 100 thousand, 1 million, 10 million codes
    python scripts/bench/hashing.py --full        and 100 million

Hashing: shards of JPEGs of 256 to 512 pixels a side with as much detail as photographs, read, decoded and hashed in one
process of one thread, as `vlm-train data dedup` does it.

Joining: random 64-bit codes lie in a .npy file; in some of them a near copy of another is planted, 0 to 4 bits away.
All pairs at most 4 bits apart are found by two threads, each size in a fresh process that reads the mapped file; the
peak memory of that process counts its pages of the file too. The control plans the passes for 3 bits instead of 4.
"""

from __future__ import annotations

import io
import math
import multiprocessing
import resource
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "proof"))
from _table import Row, arguments, report

from vlm_train.curation import hamming, hamming_passes, hamming_scan
from vlm_train.curation.columns import FINGERPRINT, add_columns
from vlm_train.curation.engines import Local
from vlm_train.data.indexing import open_manifest
from vlm_train.data.writer import DatasetWriter

NUM_PICTURES, SIDES, ROUNDS, LEAST_RATE = 200, (256, 512), 3, 600.0

RADIUS = 4
SIZES, FULL_SIZE = (100_000, 1_000_000, 10_000_000), 100_000_000
NUM_PLANTED = 20_000
WORKERS, MEMORY = 2, 6 << 30
MAX_GB, MAX_SECONDS, MAX_EXPONENT = 8.0, 3600.0, 1.5
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Joined:
    """What one size took. `recall`: share of the planted pairs that were found, with their distance."""

    num_codes: int
    seconds: float
    gigabytes: float
    recall: float
    num_pairs: int


def main() -> int:
    options = arguments(__doc__)
    return report([*hashing(), *joining(options.full)], options.json)


def hashing() -> list[Row]:
    """Rows about hashing pictures."""
    with tempfile.TemporaryDirectory() as folder:
        in_a_fresh_process(draw, Path(folder))
        rates = [in_a_fresh_process(hash_all, Path(folder)) for _ in range(ROUNDS)]
    return [Row(claim="pictures/s hashed on one core", value=statistics.median(rates), bar=LEAST_RATE, sense=">=")]


def draw(folder: Path) -> None:
    """Pictures whose power falls with the frequency as that of photographs does (Field, JOSA A 4, 1987)."""
    generator = np.random.default_rng(0)
    with DatasetWriter(folder / "data", parameters={}, max_samples=200) as writer:
        for number in range(NUM_PICTURES):
            height, width = generator.integers(*SIDES, 2, endpoint=True)
            frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij"))
            frequency[0, 0] = 1
            waves = np.fft.fft2(generator.normal(size=(3, height, width))) / frequency**1.2
            grey, *colours = np.fft.ifft2(waves).real
            pixels = np.stack([grey + 0.3 * tint for tint in (*colours, 0 * grey)], axis=2)
            pixels = 255 * (pixels - pixels.min()) / np.ptp(pixels)
            file = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=int(generator.integers(75, 95)))
            writer.add("train", f"{number:06d}", {"jpg": file.getvalue(), "txt": b"a picture"})
        writer.finish(num_errors=0, facts={})


def hash_all(folder: Path) -> float:
    """Pictures a second of processor time, the shards being indexed."""
    cv2.setNumThreads(1)
    shutil.rmtree(folder / "data" / "train" / "_manifest", ignore_errors=True)
    manifest = open_manifest(str(folder / "data" / "train"))
    start = time.process_time()
    add_columns(manifest, FINGERPRINT, engine=Local(num_workers=1))
    return len(manifest) / (time.process_time() - start)


def joining(full: bool) -> list[Row]:
    """Rows about joining codes."""
    print(f"{'codes':>12}{'seconds':>10}{'peak GB':>10}{'pairs':>10}{'recall':>10}")
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for num_codes in (*SIZES, FULL_SIZE) if full else SIZES:
            path = Path(folder) / "codes.npy"
            in_a_fresh_process(plant, path, num_codes)
            joined = in_a_fresh_process(join, path)
            print(
                f"{num_codes:12,}{joined.seconds:10.1f}{joined.gigabytes:10.2f}{joined.num_pairs:10,}"
                f"{joined.recall:10.4f}",
                flush=True,
            )
            found.append(joined)
            if num_codes == SIZES[0]:
                control = in_a_fresh_process(recall_of_fewer_flips, path)
    last = found[-1]
    rows = [Row(claim="least recall of any size", value=min(each.recall for each in found), bar=1.0, sense="==",
                control=control)]  # fmt: skip
    rows += [
        Row(
            claim=f"seconds grow as codes to the power of, {one.num_codes:,} to {two.num_codes:,}",
            value=math.log(two.seconds / one.seconds) / math.log(two.num_codes / one.num_codes),
            bar=MAX_EXPONENT,
            sense="<=",
        )
        for one, two in pairwise(found)
    ]
    rows.append(Row(claim=f"GB, {last.num_codes:,} codes", value=last.gigabytes, bar=MAX_GB, sense="<="))
    rows.append(Row(claim=f"seconds, {last.num_codes:,} codes", value=last.seconds, bar=MAX_SECONDS, sense="<="))
    return rows


def in_a_fresh_process(function, *arguments):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def plant(path: Path, num_codes: int) -> None:
    """Writes random codes with planted near copies, and the pairs beside them: (row, row of the copy, distance)."""
    generator = np.random.default_rng(num_codes)
    codes = np.lib.format.open_memmap(path, "w+", np.uint64, (num_codes,))
    for start in range(0, num_codes, CHUNK):
        stop = min(start + CHUNK, num_codes)
        codes[start:stop] = generator.integers(0, 1 << 64, stop - start, dtype=np.uint64)
    rows = generator.choice(num_codes, (NUM_PLANTED, 2), replace=False)
    distances = generator.integers(0, RADIUS + 1, NUM_PLANTED)
    bits = generator.permuted(np.broadcast_to(np.arange(64, dtype=np.uint64), (NUM_PLANTED, 64)), axis=1)[:, :RADIUS]
    flips = np.where(np.arange(RADIUS) < distances[:, None], np.uint64(1) << bits, np.uint64(0))
    codes[rows[:, 1]] = codes[rows[:, 0]] ^ np.bitwise_or.reduce(flips, axis=1)
    np.save(planted_beside(path), np.column_stack([np.sort(rows, axis=1), distances]))


def planted_beside(path: Path) -> Path:
    return path.with_name("planted.npy")


def join(path: Path) -> Joined:
    """All near pairs of the codes in the file."""
    codes = np.load(path, mmap_mode="r")
    start = time.perf_counter()
    pairs = hamming.pairs_within(codes, RADIUS, memory=MEMORY, workers=WORKERS)
    seconds = time.perf_counter() - start
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    recall = share_found(path, pairs.rows, pairs.distance)
    return Joined(len(codes), seconds, gigabytes, recall, len(pairs))


def recall_of_fewer_flips(path: Path) -> float:
    """The wrong twin: passes that only bear one flip less than the radius."""
    columns = np.load(path)[None]
    passes = hamming_passes.plan(columns, RADIUS - 1)
    halves = [hamming_scan.join(columns, each, passes[:k], RADIUS, len(columns[0])) for k, each in enumerate(passes)]
    rows = np.sort(np.concatenate([np.column_stack(each) for each in halves]), axis=1)
    return share_found(path, rows, hamming_scan.distances(columns, rows[:, 0], rows[:, 1]))


def share_found(path: Path, rows: NDArray[np.uint32], distance: NDArray[np.uint8]) -> float:
    """The share of the planted pairs among those found."""
    found = set(zip(rows[:, 0].tolist(), rows[:, 1].tolist(), distance.tolist(), strict=True))
    planted = [tuple(each) for each in np.load(planted_beside(path)).tolist()]
    return sum(each in found for each in planted) / len(planted)


if __name__ == "__main__":
    sys.exit(main())
