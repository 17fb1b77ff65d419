"""Steps that drop duplicates: by bytes and looks (`near`), and by what a model makes of pictures (`semantic`)."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vlm_train.curation import alignment, candidates, fingerprints, kmeans, near, semantic
from vlm_train.curation.chain import STAMP, Found, Settings, Work, read_stamped, uid_column
from vlm_train.curation.columns import FINGERPRINT, add_columns
from vlm_train.curation.limits import check_number, check_whole
from vlm_train.data.home import write_whole
from vlm_train.data.manifest import Manifest, to_parquet

SEMANTIC = "semantic"
MOST_TOLERANCE = 10.0
SIMILARITIES = "similarities.parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class NearDuplicates:
    """Pictures that are copies of others: by the rules of `near.find_copies`. The value of a row is the distance in
    bits of pHash. `radius`: bits of it within which any two pictures are compared. `covered`: whether pictures are
    copies that differ in one box of one colour alone; it takes most of the time. `tolerance`: how
    much more than usual may differ; `vlm-train data calibrate` tells what that does to one's own data."""

    radius: int = near.RADIUS
    covered: bool = True
    tolerance: float = 1.0

    def settings(self, work: Work) -> Settings:
        """See `Step`."""
        check_whole("radius", self.radius, low=0, high=near.MOST_BITS)
        check_number("tolerance", self.tolerance, low=0, high=MOST_TOLERANCE)
        return {
            "fingerprints": fingerprints.VERSION,
            "rules": list(near.RULES[: 4 if self.covered else 3]),
            "radius": self.radius,
            "tolerance": self.tolerance,
            "view_radius": candidates.VIEW_RADIUS,
            "bands": [candidates.NUM_BANDS, candidates.BAND_BITS],
            "least_quality": near.LEAST_QUALITY,
            "alignment": alignment.VERSION,
        }

    def find(self, manifest: Manifest, among: NDArray[np.bool_], work: Work) -> Found:
        """See `Step`."""
        add_columns(manifest, FINGERPRINT, engine=work.engine, progress=work.ticking("samples"))
        copies = near.find_copies(
            manifest,
            among=among,
            radius=self.radius,
            covered=self.covered,
            tolerance=self.tolerance,
            workers=work.num_threads,
            ticking=work.ticking,
        )
        rows = np.flatnonzero(~copies.is_kept)
        rules = np.array(near.RULES)[copies.rule[rows]]
        unread = manifest.table(["phash"])["phash"].is_null().to_numpy() & among
        facts = {"num_unread": int(unread.sum())}  # compared by their bytes alone
        return Found(rows, rules, copies.kept[rows], copies.distance[rows].astype(np.float64), facts)


@dataclass(frozen=True, slots=True, kw_only=True)
class SemanticDuplicates:
    """Pictures whose cosine with another, which is the value of a row, is above 1 - `eps` in the eyes of `run`; `rule`:
    see `semantic`. By `paper` the row for which one goes may be dropped itself. No value of eps suits all models.

    By `paper` the folder also has `similarities.parquet`: of each row that was compared its `uid`, `match`, the uid of
    the nearest that stands before it (null of one that stands first), and their cosine `similarity`. Another eps is
    read from it.
    """

    run: str
    eps: float
    rule: Literal["paper", "leader"] = "leader"

    def settings(self, work: Work) -> Settings:
        """See `Step`."""
        semantic.check_eps(self.eps)
        return {"eps": self.eps, "rule": self.rule, "model": work.models.identity(self.run)}

    def find(self, manifest: Manifest, among: NDArray[np.bool_], work: Work) -> Found:
        """See `Step`."""
        embedded = work.models.embed(manifest, self.run, "image")
        places = np.flatnonzero(among[embedded.rows])
        rows, features = embedded.rows[places], embedded.features[places]
        if not len(rows):
            return Found(rows, np.empty(0, "U8"), rows, np.empty(0))
        if self.rule == "leader":
            uids = manifest.uids(rows)
            pairs = semantic.pairs_of(features, uids, kmeans.spherical(features, uids), self.eps)
            removed = semantic.removed_by_leaders(pairs, len(rows))
            nearest = semantic.nearest_leaders(features, pairs, removed)
        else:
            nearest = _nearest(manifest, rows, features, work, self.settings(work)["model"])
            removed = nearest.removed(self.eps)
        dropped, like = rows[removed], rows[nearest.match[removed]]
        return Found(dropped, np.full(len(dropped), SEMANTIC), like, nearest.similarity[removed].astype(np.float64))


def _nearest(
    manifest: Manifest, rows: NDArray[np.int64], features: NDArray[np.float32], work: Work, model: str
) -> semantic.Nearest:
    """Of each of `rows` the nearest before it: as it was written of these rows and this model, or found and written."""
    path = work.folder / SIMILARITIES
    stamp = hashlib.sha256(f"{manifest.fingerprint} {model} ".encode() + rows.tobytes()).hexdigest().encode()
    table = read_stamped(path, stamp)
    if table is not None:
        match = table["place"].fill_null(-1).to_numpy()
        return semantic.Nearest(similarity=table["similarity"].fill_null(-math.inf).to_numpy(), match=match)
    uids = manifest.uids(rows)
    nearest = semantic.nearest_of(features, uids, kmeans.spherical(features, uids))
    stands_first = nearest.match < 0
    columns = {
        "uid": uid_column(uids),
        "match": pa.array(uid_column(uids[np.maximum(nearest.match, 0)]).to_pylist(), pa.binary(16), mask=stands_first),
        "place": pa.array(nearest.match, mask=stands_first),  # of the match, among these rows
        "similarity": pa.array(nearest.similarity, mask=stands_first),
    }
    write_whole(path, to_parquet(pa.table(columns).replace_schema_metadata({STAMP: stamp})))
    return nearest
