"""Ranks all images against all texts, exactly, in tiles, on all ranks; no rank holds more than its share and a block.

An image and its captions lie on one rank, so what a query's best right candidate scores is known there before anything
is exchanged; what is left is to count how many wrong candidates score higher, and how many the same. Images stay where
they are and texts travel round the ranks, each with the score of its own image, and the counts of a text travel behind
it and come home whole (`distributed/ring.py`). A tile of scores is formed once, counted in both directions, and
forgotten. A rank keeps its features in fp32, one block that travels and the next, and three integers for each query:
neither the whole gallery nor a row of the matrix of scores.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vlm_train.distributed import collectives
from vlm_train.distributed.ring import Homeward, travelling
from vlm_train.errors import VlmError
from vlm_train.evaluation.metrics import Standing, credit_at_k, exact, no_unit_rows, not_unit

TILE_SIDE = {"cpu": 512}
"""Scores that exist at once are this number squared: what a core's own cache holds. Elsewhere `LARGE_TILE_SIDE`."""

LARGE_TILE_SIDE = 4096


def paired_standings(images_ID: Tensor, texts_ND: Tensor, item_N: Tensor) -> tuple[Standing, Standing]:
    """Where the right candidates of this rank's texts stand among all images, and of its images among all texts.

    Args:
        images_ID: this rank's images, fp32 unit rows.
        texts_ND: their captions, fp32 unit rows.
        item_N: the image of each caption, int64, a row of `images_ID`; an image has a caption at least.

    Collective. Feature rows must have passed `check_unit`.
    """
    tile = TILE_SIDE.get(images_ID.device.type, LARGE_TILE_SIDE)
    right_N = torch.cat([_dots(texts, images_ID[items]) for texts, items in _zipped(tile, texts_ND, item_N)])
    best_I = right_N.new_full((len(images_ID),), -math.inf).scatter_reduce(0, item_N, right_N, "amax")
    counts = collectives.row_counts(texts_ND)
    by_image_I2, home = _no_counts(images_ID), Homeward(counts)
    for texts, right in travelling([texts_ND, right_N], counts):
        by_text = _no_counts(texts)
        for start in range(0, len(images_ID), tile):
            row = slice(start, start + tile)
            rows = exact(images_ID[row])
            for first in range(0, len(texts), tile):
                column = slice(first, first + tile)
                scores = rows @ exact(texts[column]).T
                by_image_I2[row] += _higher_and_equal(scores, best_I[row, None], dim=1)
                by_text[column] += _higher_and_equal(scores, right[None, column], dim=0)
        home.add(by_text, torch.add)
    by_text_N2 = home.arrived()
    one_N = torch.ones_like(item_N)
    own_I = torch.zeros_like(by_image_I2[:, 0]).index_add_(0, item_N, (right_N == best_I[item_N]).long())
    # what is counted as equal holds the right candidates themselves
    return (
        Standing(by_text_N2[:, 0], by_text_N2[:, 1] - one_N, one_N),
        Standing(by_image_I2[:, 0], by_image_I2[:, 1] - own_I, own_I),
    )


def _zipped(tile: int, *columns: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(column.split(tile) for column in columns), strict=True))


def _dots(first_ND: Tensor, second_ND: Tensor) -> Tensor:
    """Cosines of rows, with the bits that a matrix product of the same rows gives: neither rounds."""
    return (exact(first_ND) * exact(second_ND)).sum(1)


def _no_counts(rows: Tensor) -> Tensor:
    return torch.zeros(len(rows), 2, dtype=torch.int64, device=rows.device)


def _higher_and_equal(scores: Tensor, right: Tensor, dim: int) -> Tensor:
    return torch.stack([(scores > right).sum(dim), (scores == right).sum(dim)], dim=1)


def check_unit(features: Tensor, name: str) -> None:
    """Refuses this rank's rows [n, D] where some are no unit vectors. Collective.

    Raises:
        VlmError: on every rank, naming the first such row in the order of ranks.
    """
    norms, bad = not_unit(features)
    first = int(bad.nonzero()[0]) if bad.any() else 0
    mine = [len(features), int(bad.sum()), first, str(float(norms[first])) if len(features) else ""]
    before, found = 0, None
    shares = collectives.gather_objects(mine)
    for num_rows, num_bad, first, norm in shares:
        found = found or ((before + first, float(norm)) if num_bad else None)
        before += num_rows
    if found is not None:
        raise no_unit_rows(name, sum(share[1] for share in shares), before, *found)


def one_row_per_text(texts_ND: Tensor, captions: Sequence[str]) -> Tensor:
    """Gives equal captions the features of the first of them on any rank, so that they tie as they should. Collective.

    A matrix product rounds a row differently in another batch; equal captions in two batches would otherwise be ranked
    by that noise.
    """
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in captions]
    codes = [int.from_bytes(digest, "little", signed=True) for digest in digests]
    code_N = torch.tensor(codes, dtype=torch.int64, device=texts_ND.device)
    rank, world_size = collectives.rank(), collectives.world_size()
    holder_N, chosen_ND = torch.full_like(code_N, world_size), texts_ND.clone()
    for hop, (block, codes_there) in enumerate(travelling([texts_ND, code_N], collectives.row_counts(texts_ND))):
        source = (rank + hop) % world_size
        if not len(codes_there):
            continue
        known, place = codes_there.sort(stable=True)
        first_N = torch.searchsorted(known, code_N).clamp(max=len(known) - 1)
        taken_N = (known[first_N] == code_N) & (source < holder_N)
        chosen_ND[taken_N] = block[place[first_N[taken_N]]]
        holder_N[taken_N] = source
    return chosen_ND


def mean_credit(standing: Standing, ks: Sequence[int]) -> dict[int, float]:
    """k -> the mean over the queries of all ranks of `metrics.credit_at_k`. Collective.

    Equal standings are counted, and the counts are what is added up over ranks: sums of integers have no order, so the
    mean is the same to the last bit for any number of ranks.
    """
    rows = torch.stack(standing, dim=1)
    rows[rows[:, 0] >= max(ks)] = rows.new_tensor([max(ks), 0, 1])  # earn nothing, whatever they are
    mine, counts = torch.unique(rows, dim=0, return_counts=True)
    table = collectives.gather_rows_detached(torch.cat([mine, counts[:, None]], dim=1))
    kinds, which = torch.unique(table[:, :3], dim=0, return_inverse=True)
    counts = torch.zeros_like(kinds[:, 0]).index_add_(0, which, table[:, 3])
    if not len(kinds):
        raise VlmError("nothing was ranked", got="no queries", allowed="one query at least")
    found = Standing(*kinds.unbind(1))
    return {k: float((credit_at_k(found, k) * counts).sum() / counts.sum()) for k in ks}
