"""Near copies that were planted are found, semantic deduplication decides as its rule says, and borders hide nothing.

    python scripts/proof/dedup.py          40 seconds on two cores: 200 pictures, 5,000 and 20,000 embeddings
    python scripts/proof/dedup.py --full   two minutes: 1,000 pictures, 20,000 and 100,000 embeddings

Planted: scenes and openmoji drawings (no two of which are equal in all but few pixels) at 192 pixels, each with copies
at 0.5 to 0.9 of the size, as JPEGs of quality 30 to 90, cropped by up to a twentieth on each side, with a box over a
tenth, and mirrored. Recall is the share of copies that count as copies of theirs; precision is the share of what is
dropped whose kept picture is the right one. A mirrored picture is another one, and the control of recall; further
controls search without the middle or the parts of pictures, or let any difference of thumbnails pass.

Embeddings of topics, a tenth of them between two topics and copied there twice, the copy from the copy, each time
towards the second topic: near pairs lie across borders, and chains of them have ends that are not near. Brute force
forms all cosines in float64 and applies the rule in the words of the paper (SemDeDup: arXiv 2303.09540). Controls: rows
compared with those that stand behind them too, removed rows that remove others, clusters that nobody looks out of.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from _table import Row, arguments, report
from numpy.typing import NDArray
from PIL import Image

from vlm_train.curation import alignment, candidates, views
from vlm_train.curation.calibration import COPIES, png
from vlm_train.curation.columns import FINGERPRINT, add_columns
from vlm_train.curation.engines import Local
from vlm_train.curation.kmeans import Clusters, spherical
from vlm_train.curation.near import Copies, find_copies
from vlm_train.curation.semantic import nearest_of, pairs_of, removed_by_leaders
from vlm_train.data.gallery import ShardGallery
from vlm_train.data.indexing import open_manifest
from vlm_train.data.openmoji import import_openmoji
from vlm_train.data.scenes.make import make_scenes
from vlm_train.data.writer import DatasetWriter

DIM = 256
EPS = (0.001, 0.01, 0.03, 0.1)
NEAR = (0.03, 0.05)
BLOCK = 1024

Pairs = NDArray[np.int64]
Cosines = NDArray[np.float64]


def main(argv: list[str] | None = None) -> int:
    options = arguments(__doc__.splitlines()[0], argv)
    decided, paired = (20_000, 100_000) if options.full else (5_000, 20_000)
    planted = [row for source in ("scenes", "openmoji") for row in planted_rows(source, 1000 if options.full else 200)]
    return report([*planted, *decision_rows(decided), *recall_rows(paired)], options.json)


def planted_rows(source: str, num: int) -> list[Row]:
    """Recall of each kind of copy, and precision, of `num` pictures."""
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures = distinct_pictures(source, folder, num)
        with DatasetWriter(folder / "planted", parameters={}, max_samples=1000) as writer:
            for number, picture in enumerate(pictures):
                for kind, make in {"own": lambda picture, _: png(picture), **COPIES}.items():
                    parts = {"jpg" if kind == "recompressed" else "png": make(picture, generator), "txt": b"a copy"}
                    writer.add("train", f"{number:05d}-{kind}", parts)
            writer.finish(num_errors=0, facts={})
        manifest = open_manifest(str(folder / "planted" / "train"))
        add_columns(manifest, FINGERPRINT, engine=Local(num_workers=1))
        keys = manifest.table(["key"])["key"].to_pylist()
        recall, precision = judged(keys, find_copies(manifest))
        with mock.patch.object(candidates, "MIDDLE", views.WHOLE):
            no_middle, _ = judged(keys, find_copies(manifest, covered=False))
        with mock.patch.object(candidates, "PARTS", range(0)):
            no_parts, _ = judged(keys, find_copies(manifest))
        with mock.patch.multiple(alignment, SAME=255, CROPPED=255, CROPPED_COLOUR=255, _HOPELESS=(255,) * 4):
            _, any_difference = judged(keys, find_copies(manifest))
    shares = ", ".join(f"{kind} {100 * share:.1f} %" for kind, share in recall.items())
    print(f"{source}: found of {shares}; right {100 * precision:.1f} %", flush=True)
    of, mirrored = f"{len(pictures)} {source}", recall.pop("mirrored")
    controls = {"cropped": no_middle["cropped"], "covered": no_parts["covered"]}
    rows = [
        Row(claim=f"share found of copies {kind}, {of}", value=share, bar=0.99, sense=">=",
            control=controls.get(kind, mirrored))
        for kind, share in recall.items()
    ]  # fmt: skip
    return [*rows, Row(claim=f"precision, {of}", value=precision, bar=0.99, sense=">=", control=any_difference)]


def judged(keys: list[str], found: Copies) -> tuple[dict[str, float], float]:
    """(share found of each kind of copy, precision)."""
    kept = {key: keys[row] for key, row in zip(keys, found.kept.tolist(), strict=True)}
    numbers = sorted({key[:5] for key in keys})
    recall = {
        kind: float(np.mean([kept[f"{number}-{kind}"] == kept[f"{number}-own"] for number in numbers]))
        for kind in COPIES
    }
    return recall, float(np.mean([key[:5] == other[:5] for key, other in kept.items() if key != other]))


def distinct_pictures(source: str, folder: Path, num: int) -> list[Image.Image]:
    """Pictures of 192 pixels, any two of which differ by more than 32 levels in more than 1 of 200 pixels."""
    if source == "scenes":
        make_scenes(folder / source, num_samples=num, size=192, val_fraction=0.0, seed=1)
    else:
        import_openmoji(folder / source, size=192)
    gallery = ShardGallery(shards=str(folder / source / "train"))
    chosen: list[NDArray[np.uint8]] = []
    for row in np.random.default_rng(0).permutation(len(gallery)).tolist():
        pixels = gallery.open(row).decode()
        if all((np.abs(pixels.astype(np.int16) - other) > 32).any(axis=2).mean() > 0.005 for other in chosen):
            chosen.append(pixels)
        if len(chosen) == num:
            break
    return [Image.fromarray(pixels) for pixels in chosen]


def decision_rows(num_rows: int) -> list[Row]:
    embeddings, uids = embeddings_of(num_rows, seed=1)
    clusters, rows = spherical(embeddings, uids), []
    near = near_pairs(embeddings.astype(np.float64), max(EPS))
    for name, looked in (("published", within(clusters)), ("over borders", clusters)):
        differing, nearest = np.zeros(4), nearest_of(embeddings, uids, looked)
        for eps in EPS:
            paper, leader, wrong = brute_force(embeddings, near, looked, eps)
            leaders = removed_by_leaders(pairs_of(embeddings, uids, looked, eps), num_rows)
            pairs = (nearest.removed(eps), paper), (wrong, paper), (leaders, leader), (paper, leader)
            differing += [(first != second).sum() for first, second in pairs]
            print(f"{name}, eps {eps}: {paper.sum()} rows removed by paper, {leader.sum()} by leader", flush=True)
        of = f"of {num_rows} rows at {len(EPS)} eps, {name}: unlike brute force"
        for rule, value, control in (("paper", *differing[:2]), ("leader", *differing[2:])):
            rows.append(Row(claim=f"{rule}, {of}", value=float(value), bar=0, sense="==", control=float(control)))
    return rows


def recall_rows(num_rows: int) -> list[Row]:
    embeddings, uids = embeddings_of(num_rows, seed=2)
    clusters, rows = spherical(embeddings, uids), []
    pairs, cosines = near_pairs(embeddings, max(NEAR))
    for eps in NEAR:
        near = codes_of(pairs[cosines > 1 - eps], num_rows)
        share, control = (
            np.isin(near, codes_of(pairs_of(embeddings, uids, looked, eps), num_rows)).mean()
            for looked in (clusters, within(clusters))
        )
        claim = f"share found of the {len(near)} pairs of {num_rows} rows with cosine above {1 - eps:g}"
        rows.append(Row(claim=claim, value=float(share), bar=0.99, sense=">=", control=float(control)))
    return rows


def within(clusters: Clusters) -> Clusters:
    """The published way: rows are compared in their own cluster only."""
    return replace(clusters, nearest=clusters.nearest[:, :1])


def brute_force(
    embeddings: NDArray[np.float32], near: tuple[Pairs, Cosines], clusters: Clusters, eps: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """(removed by paper, by leader, by the twin that looks at rows behind too), of all near pairs, row by row."""
    own, wide = clusters.nearest[:, 0], embeddings.astype(np.float64)
    order = np.argsort((wide * clusters.centroids_KD[own]).sum(axis=1))  # the farthest stands first
    place = order.argsort()
    before: dict[int, list[int]] = {row: [] for row in range(len(wide))}
    behind: dict[int, list[int]] = {row: [] for row in range(len(wide))}
    for pair, cosine in zip(near[0].tolist(), near[1], strict=True):
        first, second = sorted(pair, key=lambda row: place[row])
        if cosine > 1 - eps and (own[first] in clusters.nearest[second] or own[second] in clusters.nearest[first]):
            before[second].append(first)
            behind[first].append(second)
    leader = np.zeros(len(wide), bool)
    for row in order.tolist():
        leader[row] = any(not leader[other] for other in before[row])
    paper = np.array([bool(before[row]) for row in range(len(wide))])
    return paper, leader, np.array([bool(before[row] or behind[row]) for row in range(len(wide))])


def near_pairs(rows: NDArray[np.floating], eps: float) -> tuple[Pairs, Cosines]:
    """(int64 [M, 2], cosines [M]) of all pairs of rows whose cosine is above 1 - eps, in the precision of the rows."""
    unit_ND = torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    pairs, cosines = [], []
    for start in range(0, len(rows), BLOCK):
        block = unit_ND[start : start + BLOCK] @ unit_ND[start:].T
        first, second = (block > 1 - eps).nonzero(as_tuple=True)
        first, second = first[first < second], second[first < second]
        pairs.append(torch.stack([first, second], dim=1) + start)
        cosines.append(block[first, second].double())
    return torch.cat(pairs).numpy(), torch.cat(cosines).numpy()


def codes_of(pairs: Pairs, num_rows: int) -> NDArray[np.int64]:
    """Each pair, whichever comes first, as one number."""
    return pairs.min(axis=1) * num_rows + pairs.max(axis=1)


def embeddings_of(num_rows: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """(unit rows [N, 256], uids). A fifth are copies, at distances 1 - cosine of 0.0001 to 0.05 from what they copy."""
    rng = np.random.default_rng(seed)
    num_topics, num_copied = round(num_rows**0.5), num_rows // 10
    groups = unit(rng.standard_normal((num_topics // 10, DIM)))
    topics = unit(groups[rng.integers(len(groups), size=num_topics)] + unit(rng.standard_normal((num_topics, DIM))))
    size = 1 / np.arange(1, num_topics + 1) ** 0.5  # a few topics are large
    num_own = num_rows - 2 * num_copied
    first, second = topics[rng.choice(num_topics, size=(2, num_own), p=size / size.sum())]
    share = np.where(np.arange(num_own) < num_copied, rng.uniform(0.4, 0.5, num_own), rng.uniform(0, 0.1, num_own))
    spread = unit(rng.standard_normal((num_own, DIM)) * np.exp(-np.arange(DIM) / 50))  # few directions tell most
    rows = [unit(unit(first + share[:, None] * (second - first)) + 0.8 * spread)]
    copied = rows[0][:num_copied]
    for _ in range(2):
        cosine = 1 - 10 ** rng.uniform(-4, -1.3, size=(num_copied, 1))
        over = (second - first)[:num_copied] + unit(rng.standard_normal((num_copied, DIM)))
        over = unit(over - (over * copied).sum(axis=1, keepdims=True) * copied)
        copied = cosine * copied + np.sqrt(1 - cosine**2) * over
        rows.append(copied)
    shuffled = np.concatenate(rows)[rng.permutation(num_rows)].astype(np.float32)
    return shuffled, rng.integers(256, size=(num_rows, 16), dtype=np.uint8)


def unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


if __name__ == "__main__":
    sys.exit(main())
