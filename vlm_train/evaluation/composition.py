"""Does the model know which of two captions is true, when they differ in exactly one way?

The test of ARO (Yuksekgonul et al., ICLR 2023, arXiv 2210.01936) for attributes, relations and word order, with what
its numbers need to mean something: ties count a half, and beside each score stand two that cannot know. `blind` answers
the same pairs by language alone (`language.WordPairs` on the captions of the training split); `shuffled_images` shows
the model the next picture of the split instead of the right one. Scores are exact (see `metrics`) and in percent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlm_train.distributed import collectives
from vlm_train.errors import DataError
from vlm_train.evaluation.base import Embed, TrainSplit, counted, interval_95, percent
from vlm_train.evaluation.language import WordPairs
from vlm_train.evaluation.metrics import exact
from vlm_train.evaluation.ranking import check_unit
from vlm_train.types import Batch

UNNAMED = "negatives"
"""The type of a pair whose dataset names none."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A true and a false caption of one image; `kind`: in which way they differ; `held_out`: the sample has
    `negatives`, which training may show, and the false one is not among them."""

    true: str
    false: str
    kind: str
    held_out: bool


@dataclass(slots=True)
class _Share:
    """What this rank embedded: images with pairs, the pairs, and the image of each."""

    images: list[Tensor] = field(default_factory=list)
    true: list[Tensor] = field(default_factory=list)
    false: list[Tensor] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    item: list[int] = field(default_factory=list)
    problem: str = ""


class Composition:
    """Share of the pairs whose true caption lies nearer to the image.

    Pairs are the `contrasts` of KEY.json, [{true, false, type}]; where there are none, its `negatives` beside the first
    caption.
    """

    name = "composition"

    def __init__(self) -> None:
        self._blind: WordPairs | None = None

    def fit(self, embedder: Embed, train: TrainSplit) -> None:
        """Counts the words of the training captions; see `base.Learner`."""
        self._blind = WordPairs(train.captions())

    def run(self, embedder: Embed, batches: Iterator[Batch]) -> dict[str, Any]:
        """Scores in percent. Collective: every rank brings its share, in equally many batches.

        Returns:
            `accuracy` {"all" pairs, "macro": the mean over the types, and each type}; `interval_95` (images as
            trials); the controls `chance`, `blind` and `shuffled_images`, each by type too; `held_out_types`, which no
            training caption was of; `num_pairs`, `num_images`.

        Raises:
            DataError: no pair at all, or a sample whose pairs are none.
            VlmError: features that are not finite.
        """
        blind, self._blind = self._blind, None
        assert blind is not None, "fit comes before run"
        share = _embed(embedder, batches)
        images_ID, true_ND, false_ND = torch.cat(share.images), torch.cat(share.true), torch.cat(share.false)
        num_images, num_pairs = (sum(collectives.gather_objects(len(each))) for each in (images_ID, share.pairs))
        if not num_pairs:
            raise DataError(
                "Composition needs captions that are nearly right",
                got="no image with a pair",
                allowed="`contrasts` [{true, false, type}] or `negatives` in KEY.json",
                remedy="evaluate on scenes (vlm-train data make scenes), or leave out the composition evaluator",
            )
        check_unit(images_ID, "Image features")
        check_unit(torch.cat([true_ND, false_ND]), "Text features")
        item_N = torch.tensor(share.item, dtype=torch.int64, device=images_ID.device)
        answers = {
            "accuracy": _compare(images_ID[item_N], true_ND, false_ND),
            "blind": [_credit(blind.score(pair.true) - blind.score(pair.false)) for pair in share.pairs],
            "shuffled_images": _compare(_next_images(images_ID)[item_N], true_ND, false_ND),
        }
        kinds = [pair.kind for pair in share.pairs]
        found = {name: _by_kind(kinds, credits) for name, credits in answers.items()}
        held_out = _by_kind(kinds, [float(pair.held_out) for pair in share.pairs])
        trials = {"all": num_images, **_num_images_of(share)}
        return {
            **found,
            "chance": 50.0,
            "interval_95": {
                "accuracy": {kind: interval_95(found["accuracy"][kind], num) for kind, num in trials.items()}
            },
            "held_out_types": [kind for kind in trials if kind != "all" and held_out[kind] == 100.0],
            "num_pairs": num_pairs,
            "num_images": num_images,
        }


def pairs_of(metadata: dict[str, Any], captions: list[str]) -> list[Pair]:
    """The pairs of one sample. Raises KeyError, TypeError, AttributeError or ValueError for what is none."""
    contrasts, negatives = metadata.get("contrasts"), metadata.get("negatives")
    if contrasts:
        rows = [(row["true"], row["false"], row.get("type") or UNNAMED) for row in contrasts]
    else:
        rows = [(captions[0], text, UNNAMED) for text in negatives or [] if captions]
    for text in (text for row in rows for text in row):
        if not isinstance(text, str):
            raise ValueError(f"{text!r} is no text")
    return [Pair(*row, held_out=negatives is not None and row[1] not in negatives) for row in rows]


def _embed(embedder: Embed, batches: Iterator[Batch]) -> _Share:
    share, num_images = _Share(), 0
    for batch in batches:
        features = embedder.images(batch)
        chosen: list[int] = []
        pairs: list[Pair] = []
        for row in counted(batch).nonzero().flatten().tolist():
            found = _pairs_or_none(share, batch, row)
            share.item += [num_images + len(chosen)] * len(found)
            chosen += [row] if found else []
            pairs += found
        num_images += len(chosen)
        share.images.append(features[chosen])
        share.true.append(embedder.texts([pair.true for pair in pairs]))
        share.false.append(embedder.texts([pair.false for pair in pairs]))
        share.pairs += pairs
    problems = [problem for problem in collectives.gather_objects(share.problem) if problem]
    if problems or not share.images:
        raise DataError(
            "The false captions of a sample cannot be read" if problems else "There is nothing to evaluate",
            got=problems[0] if problems else "no batches",
            allowed='`contrasts`: [{"true": TEXT, "false": TEXT, "type": TEXT}], or `negatives`: [TEXT]',
            remedy="mend KEY.json" if problems else "check data.val.shards",
        )
    return share


def _pairs_or_none(share: _Share, batch: Batch, row: int) -> list[Pair]:
    """The first problem is kept, to be raised where every rank is told."""
    try:
        return pairs_of(batch["metadata"][row], batch["all_captions"][row])
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        share.problem = share.problem or f"{batch['keys'][row]}: {type(error).__name__}: {error}"
        return []


def _compare(images_ND: Tensor, true_ND: Tensor, false_ND: Tensor) -> list[float]:
    right, wrong = ((exact(images_ND) * exact(texts_ND)).sum(1) for texts_ND in (true_ND, false_ND))
    return [_credit(difference) for difference in (right - wrong).tolist()]


def _credit(difference: float) -> float:
    return 0.5 if difference == 0 else float(difference > 0)


def _next_images(images_ID: Tensor) -> Tensor:
    """The image after each, on whatever rank it lies; after the last comes the first."""
    counts = collectives.row_counts(images_ID)
    firsts = collectives.gather_rows_detached(images_ID[:1])
    ahead = sum(count > 0 for count in counts[: collectives.rank() + 1])
    return torch.cat([images_ID[1:], firsts[ahead % len(firsts)][None]]) if len(images_ID) else images_ID


def _by_kind(kinds: list[str], credits: list[float]) -> dict[str, float]:
    """The mean credit in percent of all pairs of all ranks, of the types on average, and of each type."""
    mine: dict[str, tuple[float, int]] = {}
    for kind, credit in zip(kinds, credits, strict=True):
        total, num = mine.get(kind, (0.0, 0))
        mine[kind] = total + credit, num + 1
    sums: dict[str, list[float]] = {}
    for part in collectives.gather_objects(mine):
        for kind, (total, num) in part.items():  # halves: their sums are exact
            before = sums.get(kind, [0.0, 0])
            sums[kind] = [before[0] + total, before[1] + num]
    means = {kind: total / num for kind, (total, num) in sorted(sums.items())}
    everything = sum(total for total, _ in sums.values()) / sum(num for _, num in sums.values())
    macro = sum(means.values()) / len(means)
    return {
        "all": percent(everything),
        "macro": percent(macro),
        **{kind: percent(mean) for kind, mean in means.items()},
    }


def _num_images_of(share: _Share) -> dict[str, int]:
    """Type -> images that have such a pair, on all ranks."""
    mine = Counter(kind for kind, _ in {(pair.kind, item) for pair, item in zip(share.pairs, share.item, strict=True)})
    total: Counter[str] = Counter()
    for part in collectives.gather_objects(mine):
        total.update(part)
    return dict(sorted(total.items()))
