"""A selection without duplicates, and beside it a table that says of each row that it drops what it is a duplicate of.

Rows are dropped by three rules, one after the other, each among what the ones before it keep: `exact` and `near` by
`near.find_copies`, `semantic` by `semantic.nearest_of` where embeddings are given. The folder of a selection holds

    selection.npy, provenance.json   as any (`data.selection`), with the rules, their settings and how many each dropped
    duplicates.parquet               uid of a dropped row, uid of what it is a duplicate of, rule, distance in bits of
                                     pHash (exact, near), cosine (semantic). By the rule `paper` what it is a
                                     duplicate of may be dropped itself, and so by a later rule
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vlm_train.curation import fingerprints, kmeans, near, semantic
from vlm_train.data.home import write_whole
from vlm_train.data.manifest import Manifest, to_parquet
from vlm_train.data.selection import Selection

FILE = "duplicates.parquet"
SEMANTIC = "semantic"

SCHEMA = pa.schema(
    [
        ("uid", pa.binary(16)),
        ("duplicate_of", pa.binary(16)),
        ("rule", pa.string()),
        ("distance", pa.int32()),
        ("cosine", pa.float32()),
    ]
)


@dataclass(frozen=True, slots=True, eq=False)
class Embedded:
    """What a model makes of some rows. `features` float32 [M, D], unit rows, of `rows` int64 [M], ascending; `model`
    says which model, for provenance.json."""

    features: NDArray[np.float32]
    rows: NDArray[np.int64]
    model: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What counts as a duplicate. `radius`: bits of pHash (`near`). Where there are embeddings, `eps`: 1 - cosine, and
    `rule`: see `semantic`."""

    radius: int = near.RADIUS
    eps: float = 0.03
    rule: Literal["paper", "leader"] = "leader"


@dataclass(slots=True, eq=False)
class Duplicates:
    """Of N rows. `kept` bool [N]; `of` int64 [N]: what a dropped row is a duplicate of; `rule`: [N] its rule, empty of
    the others; `distance` int64 [N] and `cosine` float32 [N] as in the table."""

    kept: NDArray[np.bool_]
    of: NDArray[np.int64]
    rule: NDArray[np.str_]
    distance: NDArray[np.int64]
    cosine: NDArray[np.float32]

    def num_dropped(self) -> dict[str, int]:
        """How many rows each rule dropped."""
        rules, counts = np.unique(self.rule[self.rule != ""], return_counts=True)
        return {str(rule): int(count) for rule, count in zip(rules, counts, strict=True)}


def find_duplicates(
    manifest: Manifest,
    rules: Rules,
    *,
    among: NDArray[np.bool_] | None = None,
    embedded: Embedded | None = None,
    workers: int = 1,
) -> Duplicates:
    """Among the rows `among` (bool [N], None is all) of a manifest with fingerprints.

    Raises:
        ConfigError: a setting out of range.
        DataError: as `Manifest.table`.
    """
    among = np.ones(len(manifest), bool) if among is None else among
    copies = near.find_copies(manifest, among=among, radius=rules.radius, workers=workers)
    rule = np.where(copies.is_kept, "", np.where(copies.is_exact, near.EXACT, near.NEAR)).astype("U8")
    cosine = np.full(len(among), np.nan, np.float32)
    found = Duplicates(copies.is_kept & among, copies.kept, rule, copies.distance, cosine)
    if embedded is not None:
        _drop_semantic(found, manifest, rules, embedded)
    return found


def _drop_semantic(found: Duplicates, manifest: Manifest, rules: Rules, embedded: Embedded) -> None:
    places = np.flatnonzero(found.kept[embedded.rows])
    rows, features = embedded.rows[places], embedded.features[places]
    if not len(rows):
        return
    uids = manifest.uids(rows)
    clusters = kmeans.spherical(features, uids)
    if rules.rule == "leader":
        pairs = semantic.pairs_of(features, uids, clusters, rules.eps)
        removed = semantic.removed_by_leaders(pairs, len(rows))
        nearest = semantic.nearest_leaders(features, pairs, removed)
    else:
        nearest = semantic.nearest_of(features, uids, clusters)
        removed = nearest.removed(rules.eps)
    dropped, matches = rows[removed], rows[nearest.match[removed]]
    found.kept[dropped], found.of[dropped], found.rule[dropped] = False, matches, SEMANTIC
    found.cosine[dropped] = nearest.similarity[removed]


def save(found: Duplicates, out: Path, manifest: Manifest, rules: Rules, model: dict[str, Any] | None) -> Selection:
    """Writes the folder; the selection last, so that one that is there is whole."""
    facts: dict[str, Any] = {
        "num_dropped": found.num_dropped(),
        "fingerprints": fingerprints.VERSION,
        near.NEAR: {
            "radius": rules.radius,
            "pdq_radius": near.PDQ_RADIUS,
            "least_quality": near.LEAST_QUALITY,
            "colour_tolerance": near.COLOUR_TOLERANCE,
        },
    }
    if model is not None:
        facts[SEMANTIC] = {"eps": rules.eps, "rule": rules.rule, **model}
    selection = Selection.from_mask(found.kept, manifest=manifest.fingerprint, provenance={"duplicates": facts})
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / FILE, to_parquet(_table(found, manifest)))
    selection.save(out)
    return selection


def _table(found: Duplicates, manifest: Manifest) -> pa.Table:
    dropped = np.flatnonzero(found.rule != "")
    is_semantic = found.rule[dropped] == SEMANTIC
    arrays = [
        _uids(manifest.uids(dropped)),
        _uids(manifest.uids(found.of[dropped])),
        pa.array(found.rule[dropped], pa.string()),
        pa.array(found.distance[dropped], pa.int32(), mask=is_semantic),
        pa.array(found.cosine[dropped], pa.float32(), mask=~is_semantic),
    ]
    return pa.table(arrays, schema=SCHEMA)


def _uids(uids: NDArray[np.uint8]) -> pa.Array:
    return pa.Array.from_buffers(pa.binary(16), len(uids), [None, pa.py_buffer(np.ascontiguousarray(uids))])
