"""The step that holds down captions that many samples share: so many rows stay of each.

That captions repeat ("image", the name of a brand) says nothing of the pictures, so no picture goes for its caption's
sake alone: a group of rows with one caption, or nearly one, keeps `max_per_caption` rows, drawn by a hash of the seed
and the uid.

Captions are equal where they are so in the form of `texts.normalised`, and near where the Jaccard similarity of their
5-grams of characters is at least `similarity`; who is compared, bands of MinHash say (`minhash`). Groups have leaders
(`leaders`): a caption belongs to a group if it is near to the caption of least uid there, not if a chain leads to it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vlm_train.curation import leaders, minhash, texts
from vlm_train.curation.caption_parts import CaptionPart, add_captions, caption_parts
from vlm_train.curation.chain import Found, Settings, Work
from vlm_train.curation.clusters import uid_words
from vlm_train.curation.limits import check_number, check_whole
from vlm_train.curation.ranks import drawn
from vlm_train.data.manifest import Manifest

EXACT, NEAR = "caption_exact", "caption_near"
SIMILARITY = 0.8
_PAIRS = 1 << 14  # compared at a time
_NO_BANDS = np.empty((0, minhash.NUM_BANDS), np.uint32)
_NO_TEXTS = pa.array([], pa.large_string())


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionCopies:
    """Rows beyond `max_per_caption` of a group of captions (see above), by the rules `caption_exact` and
    `caption_near`: as their caption is to that of the row for which they go, which stays. The value of a row is how
    many rows its group has. Captions that cannot be read are in no group.

    Memory: 100 bytes for each different caption, and the text of those that have candidates.
    """

    max_per_caption: int
    similarity: float = SIMILARITY
    seed: int = 0

    def settings(self, work: Work) -> Settings:
        """See `Step`."""
        check_whole("max_per_caption", self.max_per_caption, low=1)
        check_number("similarity", self.similarity, low=0.5, high=1)  # below, bands find hardly any of the pairs
        return {
            "max_per_caption": self.max_per_caption,
            "similarity": self.similarity,
            "seed": self.seed,
            "caption_columns": texts.CAPTION.version,
            "minhash": minhash.VERSION,
        }

    def find(self, manifest: Manifest, among: NDArray[np.bool_], work: Work) -> Found:
        """See `Step`."""
        add_captions(manifest, work)
        rows = np.flatnonzero(among)
        read = list(work.engine.map(_keys, caption_parts(manifest, rows)))
        keys = np.concatenate([np.empty(0, np.uint64), *(each for each, _ in read)])
        is_read = np.concatenate([np.empty(0, bool), *(each for _, each in read)])
        rows, keys = rows[is_read], keys[is_read]
        uids = manifest.uids(rows)
        caption, first_rows = _different(keys, uids)
        leader, num_crowded = self._leaders(manifest, rows[first_rows], work)
        found = _beyond(leader[caption], uids, self.max_per_caption, self.seed)
        rules = np.where(keys[found.places] == keys[found.like], EXACT, NEAR)
        facts = {
            "num_without_caption": int((~is_read).sum()),
            "num_captions": len(first_rows),
            "num_groups": len(np.unique(leader)),
            "num_crowded_buckets": num_crowded,
        }
        return Found(rows[found.places], rules, rows[found.like], found.sizes.astype(np.float64), facts)

    def _leaders(self, manifest: Manifest, rows: NDArray[np.int64], work: Work) -> tuple[NDArray[np.int64], int]:
        """As `leaders.led`, of U different captions, which stand at `rows` [U]."""
        back = np.argsort(np.argsort(rows))
        read = work.engine.map(_bands, caption_parts(manifest, np.sort(rows)))
        buckets, members = leaders.candidates(np.concatenate([_NO_BANDS, *read])[back])
        compared = np.sort(rows[np.unique(members)])
        written = pa.concat_arrays([_NO_TEXTS, *work.engine.map(_texts, caption_parts(manifest, compared))])

        def alike(first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.bool_]:
            places = (np.searchsorted(compared, rows[each]) for each in (first, second))
            return similarities(written, *places) >= self.similarity

        return leaders.led(len(rows), buckets, members, alike)


def similarities(written: pa.Array, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64 [n]: of texts at the places `first` [n] and `second` [n] of an array of strings."""
    found = np.empty(len(first))
    for start in range(0, len(first), _PAIRS):
        block = slice(start, start + _PAIRS)
        places, number = np.unique(np.concatenate([first[block], second[block]]), return_inverse=True)
        sets = minhash.gram_sets(written.take(pa.array(places)).to_pylist())
        sides = np.split(number, 2)
        found[block] = minhash.similarity(*(minhash.chosen(sets, side) for side in sides))
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Beyond:
    """Of rows beyond a cap, M of them: their places, the place of the first that stays of their group, its size."""

    places: NDArray[np.int64]
    like: NDArray[np.int64]
    sizes: NDArray[np.int64]


def _beyond(groups: NDArray[np.int64], uids: NDArray[np.uint8], most: int, seed: int) -> _Beyond:
    """What lies beyond the first `most` rows of each group [n], in the order of their draws."""
    order = np.lexsort((*uid_words(uids), drawn(uids, seed), groups))
    ordered = groups[order]
    heads = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(order) else order
    sizes = np.diff(np.append(heads, len(order)))
    number = np.arange(len(order)) - np.repeat(heads, sizes)
    goes = number >= most
    return _Beyond(order[goes], np.repeat(order[heads], sizes)[goes], np.repeat(sizes, sizes)[goes])


def _different(keys: NDArray[np.uint64], uids: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(number of the caption [n] of each row, first row [U] of each caption by uid). Captions are numbered in the order
    of the uids of their first rows."""
    low, high = uid_words(uids)
    order = np.lexsort((low, high, keys))
    ordered = keys[order]
    is_head = np.concatenate([[True], ordered[1:] != ordered[:-1]]) if len(order) else np.empty(0, bool)
    first_rows = order[is_head]
    by_uid = np.lexsort((low[first_rows], high[first_rows]))
    number = np.empty(len(first_rows), np.int64)
    number[by_uid] = np.arange(len(first_rows))
    caption = np.empty(len(order), np.int64)
    caption[order] = number[np.cumsum(is_head) - 1]
    return caption, first_rows[by_uid]


def _keys(part: CaptionPart) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """(64-bit hashes of the normalised captions, whether there is one; punctuation alone is none)."""
    written = [texts.normalised(text or "") for text in part.captions()]
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in written]
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64), np.array([text != "" for text in written])


def _bands(part: CaptionPart) -> NDArray[np.uint32]:
    return minhash.bands(minhash.gram_sets(_normalised(part)))


def _texts(part: CaptionPart) -> pa.Array:
    return pa.array(_normalised(part), pa.large_string())


def _normalised(part: CaptionPart) -> list[str]:
    return [texts.normalised(text or "") for text in part.captions()]
