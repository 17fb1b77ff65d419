"""Zero-shot classification looked at class by class: what is a class taken for, and is it one that is hard to tell?

Classes as in `zero_shot`. The siblings of a class are those that a given hierarchy puts into its group, or else those
whose names the model itself embeds nearest. Where most mistakes fall on siblings, the model knows the kind and misses
what tells it from its like (Wei et al., arXiv 1907.03069); where they do not, it knows less than its accuracy suggests.
Ties share a prediction in equal parts; accuracies are in percent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlm_train.distributed import collectives
from vlm_train.errors import ConfigError, nearest
from vlm_train.evaluation.base import Embed, check_counts, embed_labelled, interval_95, percent
from vlm_train.evaluation.metrics import credit_at_k, exact, in_steps, macro_mean, on_grid, standing_of
from vlm_train.evaluation.ranking import check_unit
from vlm_train.evaluation.zero_shot import ZeroShot
from vlm_train.types import Batch

_TILE_SCORES = 1 << 22
_SHARE_BITS = 36  # of a prediction: counts of a cell are exact up to 2^17


class FineGrained:
    """Accuracy by class, and the confusion with siblings.

    Args:
        classes: as in `ZeroShot`.
        templates: as in `ZeroShot`.
        siblings: how many of the nearest names are a class's siblings, where no groups are given.
        groups: name of a group -> its classes; every class in one group.

    Raises:
        ConfigError: as `ZeroShot`, or groups that do not hold every class once.
    """

    name = "fine_grained"

    def __init__(
        self,
        *,
        classes: str | Sequence[str],
        templates: str | Sequence[str] | None = None,
        siblings: int = 3,
        groups: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.zero_shot = ZeroShot(classes=classes, templates=templates)
        (self.siblings,) = check_counts("siblings", [siblings])
        self.group_of = None if groups is None else _group_of(groups, self.zero_shot.classes)

    def run(self, embedder: Embed, batches: Iterator[Batch]) -> dict[str, Any]:
        """Scores in percent. Collective: every rank brings its share, in equally many batches.

        Returns:
            `top1` and `macro_top1`; `among_siblings`, the mean over the classes where only a class and its siblings
            are asked; `mistakes_on_siblings`, their share of all mistakes (None without mistakes); with groups
            `coarse_top1`, where any class of the right group counts; `interval_95` of top1; `chance` of each;
            `classes`: for each class with images its accuracy, what it is most often mistaken for, how often, and
            whether that is a sibling; counts.

        Raises:
            DataError: no labelled image, or a label that has no name.
            VlmError: features that are not finite.
        """
        class_CD = on_grid(self.zero_shot.class_features(embedder), "Class features")
        share = embed_labelled(embedder, batches, split="val")
        check_unit(share.features, "Image features")
        label_I = collectives.gather_rows_detached(share.labels)
        self.zero_shot.check_labels(label_I)
        siblings_CC = self._siblings(class_CD)
        confusion_CC, among_I = _confusion(exact(share.features), share.labels, class_CD, siblings_CC)
        confusion_CC = collectives.all_reduce_sum(confusion_CC)
        counts_C = torch.bincount(label_I, minlength=len(class_CD))
        scores = self._scores(confusion_CC, counts_C, siblings_CC)
        scores["among_siblings"] = percent(macro_mean(collectives.gather_rows_detached(among_I), label_I))
        return {
            **scores,
            "interval_95": interval_95(scores["top1"], len(label_I)),
            "chance": self._chance(counts_C, siblings_CC),
            "classes": self._by_class(confusion_CC, counts_C, siblings_CC),
            "num_images": len(label_I),
            "num_classes": len(class_CD),
        }

    def _siblings(self, class_CD: Tensor) -> Tensor:
        """Which classes (columns) are siblings of which: bool [C, C]."""
        own_CC = torch.eye(len(class_CD), dtype=torch.bool, device=class_CD.device)
        if self.group_of is not None:
            group_C = torch.tensor(self.group_of, device=class_CD.device)
            return (group_C[:, None] == group_C) & ~own_CC
        num = min(self.siblings, len(class_CD) - 1)
        nearness_CC = (class_CD @ class_CD.T).masked_fill(own_CC, -2.0)
        order_CC = nearness_CC.argsort(dim=1, descending=True, stable=True)
        return torch.zeros_like(own_CC).scatter_(1, order_CC[:, :num], True)

    def _scores(self, confusion_CC: Tensor, counts_C: Tensor, siblings_CC: Tensor) -> dict[str, Any]:
        right_C, seen_C = confusion_CC.diagonal(), counts_C > 0
        mistakes = float(confusion_CC.sum() - right_C.sum())
        scores: dict[str, Any] = {
            "top1": percent(float(right_C.sum() / counts_C.sum())),
            "macro_top1": percent(right_C[seen_C] / counts_C[seen_C]),
            "among_siblings": None,
            "mistakes_on_siblings": percent(float(confusion_CC[siblings_CC].sum()) / mistakes) if mistakes else None,
        }
        if self.group_of is not None:
            in_group = right_C.sum() + confusion_CC[siblings_CC].sum()
            scores["coarse_top1"] = percent(float(in_group / counts_C.sum()))
        return scores

    def _chance(self, counts_C: Tensor, siblings_CC: Tensor) -> dict[str, float]:
        num_classes, num_siblings_C = len(counts_C), siblings_CC.sum(1).to(torch.float64)
        share_C = counts_C.to(torch.float64) / counts_C.sum()
        chance = {
            "top1": percent(1 / num_classes),
            "among_siblings": percent((1 / (1 + num_siblings_C))[counts_C > 0]),
            "mistakes_on_siblings": percent(float((share_C * num_siblings_C).sum()) / (num_classes - 1)),
        }
        if self.group_of is not None:
            chance["coarse_top1"] = percent(float((share_C * (1 + num_siblings_C)).sum()) / num_classes)
        return chance

    def _by_class(self, confusion_CC: Tensor, counts_C: Tensor, siblings_CC: Tensor) -> list[dict[str, Any]]:
        names, rows = self.zero_shot.classes, []
        wrong_CC = confusion_CC.clone().fill_diagonal_(0)
        for number in (counts_C > 0).nonzero().flatten().tolist():
            num, other = int(counts_C[number]), int(wrong_CC[number].argmax())
            rate = float(wrong_CC[number, other]) / num
            rows.append(
                {
                    "class": names[number],
                    "num_images": num,
                    "accuracy": percent(float(confusion_CC[number, number]) / num),
                    "mistaken_for": names[other] if rate else None,
                    "rate": percent(rate),
                    "is_sibling": bool(siblings_CC[number, other]) if rate else None,
                }
            )
        return rows


def _confusion(features_ID: Tensor, label_I: Tensor, class_CD: Tensor, siblings_CC: Tensor) -> tuple[Tensor, Tensor]:
    """Images of each class (rows) by what they are taken for, fp64 [C, C], and how right each image is where only its
    class and the siblings of that are asked, fp64 [I]."""
    num_classes = len(class_CD)
    classes_C = torch.arange(num_classes, device=label_I.device)
    confusion_CC = class_CD.new_zeros(num_classes, num_classes)
    among = [class_CD.new_zeros(0)]
    tile = max(1, _TILE_SCORES // num_classes)
    for rows, labels in zip(features_ID.split(tile), label_I.split(tile), strict=True):
        scores = rows @ class_CD.T
        best = (scores == scores.amax(1, keepdim=True)).to(scores.dtype) if len(rows) else scores
        confusion_CC.index_add_(0, labels, in_steps(best / best.sum(1, keepdim=True), _SHARE_BITS))
        right = labels[:, None] == classes_C
        asked = scores.masked_fill(~(right | siblings_CC[labels]), -2.0)
        among.append(credit_at_k(standing_of(asked, right), 1))
    return confusion_CC, torch.cat(among)


def _group_of(groups: Mapping[str, Sequence[str]], classes: Sequence[str]) -> list[int]:
    """The number of each class's group."""
    listed = [name for members in groups.values() for name in members]
    wrong = sorted({*(set(classes) ^ set(listed)), *(name for name in listed if listed.count(name) > 1)})
    if wrong:
        close = nearest(wrong[0], classes)
        raise ConfigError(
            "The groups do not hold every class once",
            got=", ".join(wrong[:5]),
            allowed="groups: {GROUP: [CLASS, ...]}, each class in one group",
            remedy=f"is it {close[0]}?" if close else "add the class, or take it out",
        )
    number = {name: place for place, members in enumerate(groups.values()) for name in members}
    return [number[name] for name in classes]
