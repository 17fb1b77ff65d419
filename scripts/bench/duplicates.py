"""Finding copies beside the libraries for it: pictures beside imagededup, captions beside datasketch, at one recall.

    python scripts/bench/duplicates.py           300 scenes and as many drawings, 3 rounds
    python scripts/bench/duplicates.py --full    1,000 of each, 5 rounds

Scenes and openmoji drawings at 192 pixels, no two of which are equal in all but a few pixels, each with a smaller copy
and a JPEG of lower quality (30 to 90), as files in a folder for imagededup and in tars for us. imagededup: `PHash`, its
own hashing and its own search, at the smallest distance at which it finds as large a share of the copies as we do, 16
at most. Both decode, hash and search in one process; rounds take turns. Precision is the share of found pairs that are
copies of one picture; of us the pairs are a dropped sample and the kept one, of imagededup all that it reports. We
compare thumbnails too, which takes time: a row fails where we take more than 4 times as long. Captions: see
`captions.py`, whose rows these are.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "proof"))
import captions
import dedup
from _table import Row, arguments, report

from vlm_train.curation.calibration import png, recompressed, resized
from vlm_train.curation.columns import FINGERPRINT, add_columns
from vlm_train.curation.engines import Local
from vlm_train.curation.near import find_copies
from vlm_train.data.indexing import open_manifest
from vlm_train.data.writer import DatasetWriter

MOST_TIMES = 4.0
DISTANCES = (0, 2, 4, 6, 8, 10, 12, 14, 16)
KINDS = {
    "own": ("png", lambda picture, generator: png(picture)),
    "smaller": ("png", resized),
    "jpeg": ("jpg", recompressed),
}

Pairs = set[tuple[str, str]]
"""Of keys of samples, the smaller first."""


def main(argv: list[str] | None = None) -> int:
    options = arguments(__doc__.splitlines()[0], argv)
    num, num_rounds = (1000, 5) if options.full else (300, 3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for source in ("scenes", "openmoji"):
            plant(folder, source, num)
        rows = [row for source in ("scenes", "openmoji") for row in rows_of(folder / source, source, num_rounds)]
    return report([*rows, *captions.beside_datasketch(*captions.write(captions.NUM_COMPARED, seed=0))], options.json)


def plant(folder: Path, source: str, num: int) -> None:
    """SOURCE/files and SOURCE/tars with the same contents; keys are NUMBER-KIND."""
    generator = np.random.default_rng(0)
    (folder / "made").mkdir(exist_ok=True)
    (folder / source / "files").mkdir(parents=True)
    with DatasetWriter(folder / source / "tars", parameters={}, max_samples=1000) as writer:
        for number, picture in enumerate(dedup.distinct_pictures(source, folder / "made", num)):
            for kind, (ending, make) in KINDS.items():
                content = make(picture, generator)
                (folder / source / "files" / f"{number:05d}-{kind}.{ending}").write_bytes(content)
                writer.add("train", f"{number:05d}-{kind}", {ending: content, "txt": b"a picture"})
        writer.finish()


def rows_of(folder: Path, source: str, num_rounds: int) -> list[Row]:
    found, _ = ours(folder)
    recall, precision = judged(found, folder)
    as_good = (number for number in DISTANCES if judged(peers(folder, number)[0], folder)[0] >= recall)
    distance = next(as_good, DISTANCES[-1])
    theirs = judged(peers(folder, distance)[0], folder)
    times = [(ours(folder)[1], peers(folder, distance)[1]) for _ in range(num_rounds)]
    print(f"{source}: ours finds {recall:.1%} with a precision of {precision:.1%}; "
          f"imagededup at distance {distance} {theirs[0]:.1%} with {theirs[1]:.1%}", flush=True)  # fmt: skip
    ratio = statistics.median(we / they for we, they in times)
    return [
        Row(claim=f"{source}: time of ours / imagededup", value=ratio, bar=MOST_TIMES, sense="<="),
        Row(claim=f"{source}: precision of what is found; control: imagededup", value=precision, bar=0.99, sense=">=",
            control=theirs[1]),
    ]  # fmt: skip


def judged(found: Pairs, folder: Path) -> tuple[float, float]:
    """(share of the copies that are tied to another of their picture, precision)."""
    right = {pair for pair in found if pair[0][:5] == pair[1][:5]}
    tied = {key for pair in right for key in pair}
    copies = [path.stem for path in (folder / "files").iterdir() if not path.stem.endswith("-own")]
    return sum(key in tied for key in copies) / len(copies), len(right) / max(1, len(found))


def ours(folder: Path) -> tuple[Pairs, float]:
    manifest = open_manifest(str(folder / "tars" / "train"))
    columns = FINGERPRINT.__class__(FINGERPRINT.fields, f"{time.monotonic()}", FINGERPRINT.of)  # found anew each time

    def work() -> Pairs:
        add_columns(manifest, columns, engine=Local(num_workers=1))
        kept = find_copies(manifest, covered=False).kept
        keys = manifest.table(["key"])["key"].to_pylist()
        return {tuple(sorted((keys[row], keys[kept[row]]))) for row in np.flatnonzero(kept != np.arange(len(kept)))}

    return timed(work)


def peers(folder: Path, distance: int) -> tuple[Pairs, float]:
    from imagededup.methods import PHash

    def work() -> Pairs:
        method = PHash(verbose=False)
        codes = method.encode_images(str(folder / "files"), num_enc_workers=0)
        found = method.find_duplicates(encoding_map=codes, max_distance_threshold=distance, num_dist_workers=0)
        return {tuple(sorted((Path(key).stem, Path(other).stem))) for key, others in found.items() for other in others}

    return timed(work)


def timed(work: Callable[[], Pairs]) -> tuple[Pairs, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
