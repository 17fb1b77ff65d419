"""`regions` of KEY.json as numbers: where a thing stands in the square that the tower would see, and what it is called.

A row is a box (left, top, right, bottom, in thousandths of the square), then names: the class, and attributes in their
order, each as a bucket of its hash, so that no list of names has to be agreed on. 0 is no name; a row without a class
is no region. A region of which less than half lies in the crop is left out, as are those behind the last that is asked
for (X-VLM, arXiv 2111.08276, takes both choices).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_train.data.decode import SampleError
from vlm_train.data.transforms import Plan
from vlm_train.types import NUM_REGION_BUCKETS, NUM_REGION_NAMES

_LEAST_SHARE = 0.5
_PER_SIDE = 1000


def read_regions(
    parts: Mapping[str, bytes], metadata: Mapping[str, Any], plan: Plan, shape: tuple[int, ...]
) -> NDArray[np.int64] | None:
    """int64 [N, 4 + NUM_REGION_NAMES] of one sample, rows without a region 0; None where it names none.

    Raises:
        SampleError: metadata_regions, where `regions` is no list of {box, class} and if wanted attributes.
    """
    found = metadata.get("regions")
    if found is None:
        return None
    rows = np.zeros(shape, np.int64)
    if not isinstance(found, list):
        raise _wrong(found)
    place = 0
    for region in found:
        box = _placed(_box_of(region), plan)
        if box is not None and place < len(rows):
            rows[place, :4] = np.rint(box * _PER_SIDE)
            names = [region["class"], *(region.get("attributes") or [])][:NUM_REGION_NAMES]
            rows[place, 4 : 4 + len(names)] = [_bucket(name) for name in names]
            place += 1
    return rows


def _box_of(region: Any) -> NDArray[np.float64]:
    """(left, top, right, bottom) in pixels of the picture."""
    try:
        box = np.array(region["box"], np.float64)
        attributes = region.get("attributes") or []
        whole = isinstance(region["class"], str) and all(isinstance(name, str) for name in attributes)
    except (TypeError, ValueError, KeyError, AttributeError):
        raise _wrong(region) from None
    if not whole or box.shape != (4,) or not np.isfinite(box).all() or (box[2:] <= box[:2]).any():
        raise _wrong(region)
    return box


def _placed(box: NDArray[np.float64], plan: Plan) -> NDArray[np.float64] | None:
    """The box in parts of the square, cut off at its sides; None where less than half of it is left."""
    left, top, width, height = plan.box
    scale = np.array([plan.resized[0] / width, plan.resized[1] / height])
    offset = np.array([plan.resized[0] - plan.size, plan.resized[1] - plan.size]) / 2
    corners = (box.reshape(2, 2) - [left, top]) * scale - offset
    inside = np.clip(corners / plan.size, 0.0, 1.0)
    if plan.flip:
        inside = np.array([[1 - inside[1, 0], inside[0, 1]], [1 - inside[0, 0], inside[1, 1]]])
    share = np.prod(inside[1] - inside[0]) * plan.size**2 / np.prod(corners[1] - corners[0])
    return inside.ravel() if share >= _LEAST_SHARE else None


def _bucket(name: str) -> int:
    """1 .. NUM_REGION_BUCKETS - 1."""
    digest = hashlib.blake2b(name.strip().lower().encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return 1 + int.from_bytes(digest, "little") % (NUM_REGION_BUCKETS - 1)


def _wrong(got: Any) -> SampleError:
    return SampleError("metadata_regions", got=str(got)[:80], allowed="`regions`: a list of {box, class, attributes}")
