"""Image-text retrieval, exact, with the work shared among ranks.

1. Each rank embeds its share of the images and all their captions.
2. Features are gathered; ranks hold equal galleries from here on, so an error is raised on all of them.
3. Each rank ranks its share of the queries, in tiles; the standings (three integers per query) are gathered and every
   rank averages the same list in the same order.

Scores are exact (see `metrics`), so the result is identical for any world size, given equal features. An image may have
several captions: a text query has one right image, an image query is answered by any of its captions. Recall is in
percent, 0..100, as the field prints it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlm_train.distributed import collectives
from vlm_train.errors import DataError
from vlm_train.evaluation.base import Embed, counted, percent
from vlm_train.evaluation.metrics import Standing, chance_at_k, credit_at_k, on_grid, standings, wilson_interval
from vlm_train.types import Batch, rank_share

_NUM_MATRIX_ITEMS = 32
_NUM_SEARCHES = 8
_NUM_HITS = 5


@dataclass(slots=True)
class RetrievalExamples:
    """What a report shows beside the scores.

    `keys`, `captions`: of the first items. `similarity` [P, P]: cosine of image i (row) and the first caption of item j
    (column). `searches`: for some of these captions, the keys of the images that score highest, best first, with their
    cosine.
    """

    keys: list[str]
    captions: list[str]
    similarity: Tensor
    searches: list[tuple[str, list[tuple[str, float]]]]


@dataclass(slots=True)
class _Share:
    """What this rank embedded. `item_N`: the local image of each caption."""

    keys: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    images_ID: list[Tensor] = field(default_factory=list)
    texts_ND: list[Tensor] = field(default_factory=list)
    item_N: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Gallery:
    """All images and captions, on every rank. `item_N`: the image of each caption, ascending."""

    images_ID: Tensor
    texts_ND: Tensor
    item_N: Tensor


class Retrieval:
    """Recall at k, text to image and image to text.

    Args:
        ks: how many candidates a query may look at.

    After `run`, `examples` holds what a report shows; it is not part of the scores.
    """

    name = "retrieval"

    def __init__(self, *, ks: Sequence[int] = (1, 5, 10)) -> None:
        self.ks = tuple(ks)
        self.examples: RetrievalExamples | None = None

    def run(self, embedder: Embed, batches: Iterator[Batch]) -> dict[str, Any]:
        """Scores in percent. Collective: every rank brings its share, in equally many batches.

        Returns:
            `text_to_image`, `image_to_text`: {"R@k": percent}; `num_pairs` captions and `num_images`; `chance` and
            `chance_image_to_text`: what a scorer that knows nothing gets (they differ where images have several
            captions); `interval_95`: Wilson intervals with images as the trials.

        Raises:
            DataError: no image at all, or an image without a caption.
            VlmError: features that are not finite.
        """
        share = _embed(embedder, batches)
        gallery = _gather(share)
        items_I = torch.arange(len(gallery.images_ID), device=gallery.item_N.device)
        by_text = _shared_standings(gallery.texts_ND, gallery.images_ID, gallery.item_N, items_I)
        by_image = _shared_standings(gallery.images_ID, gallery.texts_ND, items_I, gallery.item_N)
        self.examples = _examples(share, gallery)

        num_images, num_pairs = len(gallery.images_ID), len(gallery.texts_ND)
        captions_I = torch.bincount(gallery.item_N, minlength=num_images)
        scores = {"text_to_image": self._recall(by_text), "image_to_text": self._recall(by_image)}
        ones_N = torch.ones_like(gallery.item_N)
        return {
            **scores,
            "num_pairs": num_pairs,
            "num_images": num_images,
            "chance": {f"R@{k}": percent(chance_at_k(ones_N, num_images, k)) for k in self.ks},
            "chance_image_to_text": {f"R@{k}": percent(chance_at_k(captions_I, num_pairs, k)) for k in self.ks},
            "interval_95": {
                direction: {key: _interval(value, num_images) for key, value in recall.items()}
                for direction, recall in scores.items()
            },
        }

    def _recall(self, standing: Standing) -> dict[str, float]:
        return {f"R@{k}": percent(credit_at_k(standing, k)) for k in self.ks}


def _interval(score: float, num_images: int) -> list[float]:
    # captions of one image are not independent trials: images are, and counting them is the cautious choice
    return [percent(bound) for bound in wilson_interval(score / 100.0 * num_images, num_images)]


def _embed(embedder: Embed, batches: Iterator[Batch]) -> _Share:
    share = _Share()
    for batch in batches:
        # padding rows are embedded too: every rank runs the same forwards
        keep = counted(batch)
        rows = keep.nonzero().flatten().tolist()
        captions = batch["all_captions"] if "all_captions" in batch else [[text] for text in batch["captions"]]
        first = len(share.keys)
        images_BD = embedder.images(batch["images"])
        share.images_ID.append(images_BD[keep.to(images_BD.device)])
        share.keys += [batch["keys"][row] if "keys" in batch else f"image {first + i}" for i, row in enumerate(rows)]
        share.captions += [text for row in rows for text in captions[row]]
        share.item_N += [first + i for i, row in enumerate(rows) for _ in captions[row]]
        share.texts_ND.append(embedder.texts([text for row in rows for text in captions[row]]))
    return share


def _gather(share: _Share) -> _Gallery:
    if not share.images_ID:
        raise DataError("There is nothing to evaluate", got="no batches", remedy="check data.val.shards")
    images_ID = torch.cat(share.images_ID)
    device = images_ID.device
    counts = collectives.row_counts(images_ID)
    item_N = torch.tensor(share.item_N, dtype=torch.int64, device=device) + sum(counts[: collectives.rank()])
    gallery = _Gallery(
        images_ID=on_grid(collectives.gather_rows_detached(images_ID), "Image features"),
        texts_ND=on_grid(collectives.gather_rows_detached(torch.cat(share.texts_ND)), "Text features"),
        item_N=collectives.gather_rows_detached(item_N),
    )
    gallery.texts_ND = _one_row_per_text(gallery.texts_ND, share.captions)
    _check_captioned(gallery, share.keys, sum(counts[: collectives.rank()]))
    return gallery


def _check_captioned(gallery: _Gallery, keys: list[str], offset: int) -> None:
    num_images = len(gallery.images_ID)
    if num_images == 0:
        raise DataError("There is nothing to evaluate", got="no images", remedy="check data.val.shards")
    bare = (torch.bincount(gallery.item_N, minlength=num_images) == 0).nonzero().flatten().tolist()
    if bare:
        mine = [keys[index - offset] for index in bare[:5] if 0 <= index - offset < len(keys)]
        names = [key for part in collectives.gather_objects(mine) for key in part]
        raise DataError(
            "Retrieval needs a caption for every image",
            got=f"{len(bare)} of {num_images} images have none, first {', '.join(names)}",
            remedy="leave them out with data.selection, or caption them",
        )


def _one_row_per_text(texts_ND: Tensor, captions: list[str]) -> Tensor:
    """Gives equal captions equal features, so that they tie as they should.

    A matrix product rounds a row differently in another batch; equal captions in two batches would otherwise be ranked
    by that noise.
    """
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in captions]
    codes = [int.from_bytes(digest, "little", signed=True) for digest in digests]
    code_N = collectives.gather_rows_detached(torch.tensor(codes, dtype=torch.int64, device=texts_ND.device))
    unique_U, group_N = torch.unique(code_N, return_inverse=True)
    position_N = torch.arange(len(code_N), device=code_N.device)
    first_U = torch.full_like(unique_U, len(code_N)).scatter_reduce(0, group_N, position_N, "amin")
    return texts_ND[first_U[group_N]]


def _shared_standings(queries: Tensor, candidates: Tensor, query_item: Tensor, candidate_item: Tensor) -> Standing:
    """`metrics.standings` of all queries; each rank computes its share."""
    start, stop = rank_share(len(queries), collectives.rank(), collectives.world_size())
    mine = standings(queries[start:stop], candidates, query_item[start:stop], candidate_item)
    return Standing(*collectives.gather_rows_detached(torch.stack(mine, dim=1)).unbind(1))


def _examples(share: _Share, gallery: _Gallery) -> RetrievalExamples:
    num_shown = min(_NUM_MATRIX_ITEMS, len(gallery.images_ID))
    shown_P = torch.arange(num_shown, device=gallery.item_N.device)
    first_text_P = torch.searchsorted(gallery.item_N, shown_P)
    similarity = gallery.images_ID[:num_shown] @ gallery.texts_ND[first_text_P].T
    searches_SD = gallery.texts_ND[first_text_P[:_NUM_SEARCHES]]
    best = (searches_SD @ gallery.images_ID.T).topk(min(_NUM_HITS, len(gallery.images_ID)), dim=1)

    # each rank names the items it holds; together they name all that are shown
    wanted = {*range(num_shown), *best.indices.flatten().tolist()}
    counts = collectives.row_counts(gallery.item_N.new_empty(len(share.keys)))
    offset = sum(counts[: collectives.rank()])
    captions: dict[int, str] = {}
    for item, caption in zip(share.item_N, share.captions, strict=True):
        captions.setdefault(item, caption)
    mine = {str(i + offset): (key, captions[i]) for i, key in enumerate(share.keys) if i + offset in wanted}
    named = {int(item): pair for part in collectives.gather_objects(mine) for item, pair in part.items()}

    hits = [
        [(named[item][0], score) for item, score in zip(items, scores, strict=True)]
        for items, scores in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    texts = [named[item][1] for item in range(num_shown)]
    return RetrievalExamples(
        keys=[named[item][0] for item in range(num_shown)],
        captions=texts,
        similarity=similarity.to(torch.float32).cpu(),
        searches=list(zip(texts, hits, strict=False)),
    )
