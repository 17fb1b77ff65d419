"""Many tiny samples: how fast they are indexed, how fast one is found, and whether memory stays flat.

    python scripts/bench/soak.py            100,000 samples in 10 tars, about a minute
    python scripts/bench/soak.py --full     1,000,000 samples in 100 tars, about ten minutes

The samples are JPEGs of 32 x 32 pixels with a caption, 2.5 kB of tar each: nearly all of the cost is per sample.
Reading the same files once without looking at them is printed beside the indexing. Memory is the resident size of the
trainer's process and of its two workers, without pages of mapped files, after each of three epochs.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tarfile
import tempfile
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "proof"))
from _table import Row, report

from vlm_train.data.collate import SampleEncoder
from vlm_train.data.indexing import open_manifest
from vlm_train.data.pipeline import TrainLoader
from vlm_train.data.selection import Selection
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.steps import Ingredient, StreamSpec, TrainSteps
from vlm_train.data.transforms import TrainTransform
from vlm_train.types import ImageSpec, TextSpec

PER_TAR, BATCH, NUM_WORKERS, NUM_EPOCHS = 10_000, 512, 2, 3
MAX_GROWTH = 1.10  # of resident memory between the first epoch and the last; caches of the allocator settle within it


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    parser.add_argument("--full", action="store_true", help="the long form")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak") as scratch:
        folder = Path(scratch)
        with get_context("fork").Pool(NUM_WORKERS) as pool:
            pool.map(partial(write_tar, folder), range(100 if options.full else 10))
        rows = [*index_rows(folder), *memory_rows(folder)]
    return report(rows, options.json)


def write_tar(folder: Path, number: int) -> None:
    pictures = [_jpeg(seed) for seed in range(64)]
    with tarfile.open(folder / f"{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in range(PER_TAR):
            key = f"{number:05d}{sample:05d}"
            for suffix, content in (("jpg", pictures[sample % 64]), ("txt", f"picture {key}".encode())):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def _jpeg(seed: int) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def index_rows(folder: Path) -> list[Row]:
    """Indexing, beside reading the same bytes; and looking one sample up and reading it."""
    shards = sorted(folder.glob("*.tar"))
    megabytes = sum(shard.stat().st_size for shard in shards) / 1e6
    begin = time.perf_counter()
    for shard in shards:
        with open(shard, "rb", buffering=0) as file:
            while file.read(8 << 20):
                pass
    read = time.perf_counter() - begin
    begin = time.perf_counter()
    manifest = open_manifest(str(folder), progress=lambda done, total: print(f"indexed {done}/{total} MB", flush=True))
    indexed = time.perf_counter() - begin
    print(f"{len(manifest):,} samples, {megabytes:.0f} MB: read in {read:.1f} s ({megabytes / read:.0f} MB/s),")
    print(f"indexed in {indexed:.1f} s ({megabytes / indexed:.0f} MB/s, {len(manifest) / indexed:,.0f} samples/s)")
    source = ShardSource(shards=str(folder))
    rows = np.random.default_rng(0).integers(0, len(source), 2000)
    found = _microseconds(lambda row: source.manifest.entries(row), rows)
    whole = _microseconds(source.read, rows)
    print(f"one random sample: entry found in {found:.0f} us, read and checked in {whole:.0f} us (medians of 2,000)")
    return [
        Row(claim="samples indexed a second", value=len(manifest) / indexed, bar=5000, sense=">="),
        Row(claim="microseconds to find a sample's entry", value=found, bar=1000, sense="<="),
        Row(claim="microseconds to read a random sample", value=whole, bar=1000, sense="<="),
    ]


def _microseconds(look, rows: np.ndarray) -> float:
    times = []
    for row in rows:
        begin = time.perf_counter()
        look(np.array([row]))
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


class NoText:
    """Every text is two ids."""

    spec = TextSpec(vocab_size=2, context_length=2, pad_id=2, bos_id=0, eos_id=1)

    def __call__(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.tensor([0, 1]).repeat(len(texts), 1)
        return ids, ids < 2


def memory_rows(folder: Path) -> list[Row]:
    """Resident memory after each epoch, trainer and workers together."""
    source = ShardSource(shards=str(folder))
    steps_per_epoch = len(source) // BATCH
    encoder = SampleEncoder(transform=TrainTransform(spec=ImageSpec(size=32), flip=0.5), tokenizer=NoText())
    spec = StreamSpec(seed=0, global_batch=BATCH, num_steps=NUM_EPOCHS * steps_per_epoch)
    steps = TrainSteps([Ingredient(source=source, selection=Selection.all(len(source)))], spec, encoder, 0, 1)
    sizes, begin = [], time.perf_counter()
    for batch in TrainLoader(steps=steps, num_workers=NUM_WORKERS):
        if (batch["step"] + 1) % steps_per_epoch == 0:
            processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
            sizes.append(sum(info.rss - info.shared for info in (process.memory_info() for process in processes)) / 1e6)
            rate = len(source) / (time.perf_counter() - begin)
            print(f"epoch {len(sizes)}: {sizes[-1]:.0f} MB resident, {rate:,.0f} samples/s", flush=True)
            begin = time.perf_counter()
    return [Row(claim="resident memory, last epoch / first", value=sizes[-1] / sizes[0], bar=MAX_GROWTH, sense="<=")]


if __name__ == "__main__":
    sys.exit(main())
