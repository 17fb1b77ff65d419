"""Exact retrieval over a large gallery: seconds and peak memory, on one rank or several.

    python scripts/bench/retrieval.py                            20,000 images and texts of 64 numbers, on 1 and 2 ranks
    python scripts/bench/retrieval.py --full                     a million of each; hours on a CPU
    python scripts/bench/retrieval.py --num N --width D --ranks W

What is measured is what `evaluation/retrieval.py` does once everything is embedded: equal captions made equal, all
images ranked against all texts in both directions, ties counted, recall at 1. Memory is what a rank's process grows
by, at its peak; the bar is what it must hold (its own features, a block of another rank's and the next, standings) and
64 MB for tiles. The control is the matrix of all scores in fp32, which none of this forms.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "proof"))
from _table import Row, report

from vlm_train.distributed import collectives
from vlm_train.distributed.testing import run_ranks
from vlm_train.evaluation.ranking import mean_credit, one_row_per_text, paired_standings
from vlm_train.types import rank_share

CHUNK = 1000
TILES_MB = 64


def features(start: int, stop: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and texts [start, stop), whoever asks for them; a text lies near its image."""
    parts = []
    for chunk in range(start // CHUNK, -(-stop // CHUNK)):
        image, noise = torch.randn(2, CHUNK, width, generator=torch.Generator().manual_seed(chunk))
        mine = slice(max(start - chunk * CHUNK, 0), stop - chunk * CHUNK)
        parts.append((F.normalize(image, dim=1)[mine], F.normalize(image + 0.9 * noise, dim=1)[mine]))
    images, texts = (torch.cat(side) for side in zip(*parts, strict=True))
    return images, texts


def measure(num: int, width: int) -> dict[str, float]:
    """Seconds, MB and recall at 1 of this rank's part of `num` pairs; every tenth text is that before it."""
    start, stop = rank_share(num, collectives.rank(), collectives.world_size())
    images, texts = features(start, stop, width)
    captions = [f"text {number - number % 10 // 9}" for number in range(start, stop)]
    item = torch.arange(stop - start)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    collectives.barrier()
    began = time.perf_counter()
    by_text, by_image = paired_standings(images, one_row_per_text(texts, captions), item)
    recall = [mean_credit(standing, (1,))[1] for standing in (by_text, by_image)]
    seconds = time.perf_counter() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": seconds, "megabytes": grown, "text_to_image": recall[0], "image_to_text": recall[1]}


def held_mb(num: int, width: int, ranks: int) -> float:
    """fp32 features of both sides, texts twice more while they travel, and 200 bytes of counts and codes a query."""
    share = -(-num // ranks)
    return share * (4 * width * 5 + 2 * 200) / 1e6 + TILES_MB


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    parser.add_argument("--full", action="store_true", help="a million images and texts")
    parser.add_argument("--num", type=int, metavar="N", help="images, and as many texts")
    parser.add_argument("--width", type=int, metavar="D", default=64)
    parser.add_argument("--ranks", type=int, metavar="W", nargs="+", default=[1, 2])
    options = parser.parse_args()
    num = options.num or (1_000_000 if options.full else 20_000)
    rows, recalls = [], []
    for ranks in options.ranks:
        found = run_ranks(measure, ranks, num, options.width, timeout=1e6)
        seconds, grown = (max(part[key] for part in found) for key in ("seconds", "megabytes"))
        recalls += [[part["text_to_image"], part["image_to_text"]] for part in found]
        name = f"{num:,} x {num:,} x {options.width} on {ranks} rank{'s' if ranks > 1 else ''}"
        print(f"{name}: {seconds:.1f} s, {num * num / seconds / 1e6:,.0f} million scores a second, {grown:.0f} MB")
        bar, matrix = held_mb(num, options.width, ranks), 4 * num * num / ranks / 1e6
        rows.append(Row(claim=f"{name}: MB that a rank grows by", value=grown, bar=bar, sense="<=", control=matrix))
    spread = max(max(column) - min(column) for column in zip(*recalls, strict=True))
    rows.append(
        Row(claim="largest difference of a recall between ranks and their numbers", value=spread, bar=0, sense="<=")
    )
    return report(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
