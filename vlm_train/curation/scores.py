"""The step that drops pairs whose image and caption do not fit in the eyes of a model: by CLIP score.

The score is the cosine of the two embeddings, without the scale of logits and without the factor of CLIPScore. It is
formed of rows on a grid on which dot products are exact (`kmeans.unit_rows`), so neither batches, threads nor the order
of rows change a bit of it; it differs from the cosine in float64 by less than sqrt(D) * 2^-25.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_train.curation import kmeans
from vlm_train.curation.chain import Found, Settings, Work
from vlm_train.curation.limits import check_number, check_one_of, check_share
from vlm_train.curation.ranks import highest, num_of_share
from vlm_train.data.manifest import Manifest

SCORE, KEEP = "min_score", "keep"
NUM_BINS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Pairs whose cosine, which is the value of a row, is below `min_score`, or all but the share `keep` of highest
    cosine: exactly that share of the rows that `run` can read, of equal ones those of lower uid. One of the two is set.
    No value of `min_score` suits all models. What the run cannot read stays and is counted.

    The facts hold a histogram of the cosines: `counts` of 256 equal bins from -1 to 1.
    """

    run: str
    min_score: float | None = None
    keep: float | None = None

    def settings(self, work: Work) -> Settings:
        """See `Step`."""
        check_one_of(
            "min_score", "keep", (self.min_score, self.keep), what="a score has one limit", example="keep: 0.3"
        )
        if self.min_score is not None:
            check_number("min_score", self.min_score, low=-1, high=1)
        if self.keep is not None:
            check_share("keep", self.keep)
        limit = {SCORE: self.min_score} if self.keep is None else {KEEP: self.keep}
        return {**limit, "model": work.models.identity(self.run)}

    def find(self, manifest: Manifest, among: NDArray[np.bool_], work: Work) -> Found:
        """See `Step`."""
        images, texts = (work.models.embed(manifest, self.run, side) for side in ("image", "text"))
        places = np.flatnonzero(among[images.rows])
        rows, scores = images.rows[places], cosines(images.features, texts.features, places)
        if self.min_score is not None:
            rule, goes = SCORE, scores < self.min_score
        else:
            num = num_of_share(self.keep or 0, len(rows))
            rule, goes = KEEP, ~highest(scores, manifest.uids(rows), num)
        dropped = rows[goes]
        facts = {"num_unread": int(among.sum()) - len(rows), "scores": histogram(scores)}
        return Found(dropped, np.full(len(dropped), rule), np.full(len(dropped), -1), scores[goes], facts)


def cosines(
    images: NDArray[np.float32], captions: NDArray[np.float32], places: NDArray[np.int64]
) -> NDArray[np.float64]:
    """float64 [n]: of the rows `places` [n] of two matrices [N, D] of unit rows. Raises DataError as `unit_rows`."""
    found = np.empty(len(places))
    for start in range(0, len(places), kmeans.BLOCK):
        block = places[start : start + kmeans.BLOCK]
        images_ND, captions_ND = (kmeans.unit_rows(side, block, "cpu") for side in (images, captions))
        found[start : start + kmeans.BLOCK] = (images_ND * captions_ND).sum(dim=1).numpy()
    return found


def histogram(scores: NDArray[np.float64]) -> dict[str, Any]:
    """`low`, `high`, and `counts` of 256 equal bins between; a score on a border counts above it."""
    bins = np.clip(np.floor((scores + 1) * (NUM_BINS / 2)), 0, NUM_BINS - 1).astype(np.int64)
    return {"low": -1, "high": 1, "counts": np.bincount(bins, minlength=NUM_BINS).tolist()}
