"""Retrieval between images and texts, or another modality and texts, exact, with the work shared among ranks.

1. Each rank embeds its share of the images and all their captions, and keeps them.
2. What cannot be ranked is an error on every rank.
3. Texts travel round the ranks and are ranked in tiles (see `ranking`); what is added up over ranks are integers.

Scores are exact (see `metrics`), so the result is identical for any world size, given equal features. An image may have
several captions: a text query has one right image, an image query is answered by any of its captions. Recall is in
percent, 0..100, as the field prints it.

What is said of images holds of any other modality that texts are to find: of the samples that have it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm_train.distributed import collectives
from vlm_train.errors import ConfigError, DataError
from vlm_train.evaluation.base import Embed, check_counts, counted, interval_95, percent
from vlm_train.evaluation.metrics import Standing, exact, knowing_nothing
from vlm_train.evaluation.ranking import check_unit, mean_credit, one_row_per_text, paired_standings
from vlm_train.types import MODALITIES, Batch, has_modality

_NUM_MATRIX_ITEMS = 32
_NUM_SEARCHES = 8
_NUM_HITS = 5
_ROWS_PER_TILE = 1 << 16


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
    """What this rank embedded. `item_N`: the local image of each caption; `before`: images of the ranks before."""

    keys: list[str]
    captions: list[str]
    images_ID: Tensor
    texts_ND: Tensor
    item_N: Tensor
    before: int


class Retrieval:
    """Recall at k, text to image and image to text.

    Args:
        ks: how many candidates a query may look at.
        item: what texts find and are found by: image, or another modality that the model has a tower for.

    After `run`, `examples` holds what a report shows; it is not part of the scores.
    """

    name = "retrieval"

    def __init__(self, *, ks: Sequence[int] = (1, 5, 10), item: str = "image") -> None:
        self.ks, self.item = check_counts("ks", ks), item
        if item not in ("image", *MODALITIES):
            raise ConfigError("texts cannot find this", got=item, allowed=", ".join(("image", *MODALITIES)),
                              remedy="item: image")  # fmt: skip
        self.examples: RetrievalExamples | None = None

    def run(self, embedder: Embed, batches: Iterator[Batch]) -> dict[str, Any]:
        """Scores in percent. Collective: every rank brings its share, in equally many batches.

        Returns:
            `text_to_image`, `image_to_text` (of another item: its name): {"R@k": percent}; `num_pairs` captions and
            `num_images` (`num_items`); `chance` and `chance_image_to_text`: what a scorer that knows nothing gets (they
            differ where images have several captions); `interval_95`: Wilson intervals with images as the trials.

        Raises:
            DataError: no image at all, or an image without a caption.
            VlmError: features that are not finite.
        """
        share = _embed(embedder, batches, self.item)
        _check(share, self.item)
        share.texts_ND = one_row_per_text(share.texts_ND, share.captions)
        by_text, by_image = paired_standings(share.images_ID, share.texts_ND, share.item_N)
        self.examples = _examples(share)

        num_images, num_pairs = _over_ranks(len(share.keys)), _over_ranks(len(share.captions))
        there, back = f"text_to_{self.item}", f"{self.item}_to_text"
        scores = {there: self._recall(by_text), back: self._recall(by_image)}
        captions_I = torch.bincount(share.item_N, minlength=len(share.keys))
        return {
            **scores,
            "num_pairs": num_pairs,
            "num_images" if self.item == "image" else "num_items": num_images,
            "chance": self._recall(knowing_nothing(torch.ones_like(share.item_N), num_images)),
            f"chance_{back}": self._recall(knowing_nothing(captions_I, num_pairs)),
            # captions of one image are not independent trials: images are, and counting them is the cautious choice
            "interval_95": {
                direction: {key: interval_95(value, num_images) for key, value in recall.items()}
                for direction, recall in scores.items()
            },
        }

    def _recall(self, standing: Standing) -> dict[str, float]:
        return {f"R@{k}": percent(credit) for k, credit in mean_credit(standing, self.ks).items()}


def _over_ranks(count: int) -> int:
    return sum(collectives.gather_objects(count))


def _embed(embedder: Embed, batches: Iterator[Batch], item: str) -> _Share:
    keys: list[str] = []
    texts: list[str] = []
    images_ID, texts_ND, item_N = [], [], []
    for batch in batches:
        # padding rows are embedded too: every rank runs the same forwards
        keep = counted(batch) if item == "image" else counted(batch) & has_modality(batch, item).cpu()
        rows = keep.nonzero().flatten().tolist()
        captions = batch["all_captions"] if "all_captions" in batch else [[text] for text in batch["captions"]]
        first = len(keys)
        images_BD = embedder.images(batch) if item == "image" else embedder.others(item, batch)
        images_ID.append(images_BD[keep.to(images_BD.device)])
        keys += [batch["keys"][row] if "keys" in batch else f"image {first + i}" for i, row in enumerate(rows)]
        item_N += [first + i for i, row in enumerate(rows) for _ in captions[row]]
        new = [text for row in rows for text in captions[row]]
        texts_ND.append(embedder.texts(new))
        texts += new
    if not images_ID:
        raise DataError("There is nothing to evaluate", got="no batches", remedy="check data.val.shards")
    images = torch.cat(images_ID)
    counts = collectives.row_counts(images)
    return _Share(
        keys=keys,
        captions=texts,
        images_ID=images,
        texts_ND=torch.cat(texts_ND),
        item_N=torch.tensor(item_N, dtype=torch.int64, device=images.device),
        before=sum(counts[: collectives.rank()]),
    )


def _check(share: _Share, item: str) -> None:
    num_images = _over_ranks(len(share.keys))
    if num_images == 0:
        raise DataError("There is nothing to evaluate", got=f"no sample with {item}", remedy="check data.val.shards")
    check_unit(share.images_ID, f"{item.capitalize()} features")
    check_unit(share.texts_ND, "Text features")
    bare = (torch.bincount(share.item_N, minlength=len(share.keys)) == 0).nonzero().flatten().tolist()
    num_bare = _over_ranks(len(bare))
    if num_bare:
        names = [key for part in collectives.gather_objects([share.keys[item] for item in bare[:5]]) for key in part]
        raise DataError(
            "Retrieval needs a caption for every image",
            got=f"{num_bare} of {num_images} images have none, first {', '.join(names[:5])}",
            remedy="leave them out with data.selection, or caption them",
        )


def _examples(share: _Share) -> RetrievalExamples:
    """Of the first images on any rank, and what the first captions find on all of them."""
    num_mine = min(max(_NUM_MATRIX_ITEMS - share.before, 0), len(share.keys))
    first_text_P = torch.searchsorted(share.item_N, torch.arange(num_mine, device=share.item_N.device))
    texts_PD = collectives.gather_rows_detached(exact(share.texts_ND[first_text_P]))
    images_PD = collectives.gather_rows_detached(exact(share.images_ID[:num_mine]))
    mine = [(share.keys[item], share.captions[text]) for item, text in enumerate(first_text_P.tolist())]
    shown = [pair for part in collectives.gather_objects(mine) for pair in part]

    hits = _best_of_all(texts_PD[:_NUM_SEARCHES], share)
    return RetrievalExamples(
        keys=[key for key, _ in shown],
        captions=[text for _, text in shown],
        similarity=(images_PD @ texts_PD.T).to(torch.float32).cpu(),
        searches=[(text, found) for (_, text), found in zip(shown, hits, strict=False)],
    )


def _best_of_all(texts_SD: Tensor, share: _Share) -> list[list[tuple[str, float]]]:
    """For each text the keys of the images that score highest on any rank, of equal ones the first."""
    scores_SI = torch.cat([texts_SD @ exact(rows).T for rows in share.images_ID.split(_ROWS_PER_TILE)], dim=1)
    order_SH = scores_SI.argsort(dim=1, descending=True, stable=True)[:, :_NUM_HITS]
    mine = [
        [(share.keys[item], float(scores[item])) for item in order.tolist()]
        for scores, order in zip(scores_SI, order_SH, strict=True)
    ]
    shares = collectives.gather_objects(mine)
    merged = [[(key, score) for part in shares for key, score in part[search]] for search in range(len(texts_SD))]
    return [sorted(hits, key=lambda hit: -hit[1])[:_NUM_HITS] for hits in merged]
