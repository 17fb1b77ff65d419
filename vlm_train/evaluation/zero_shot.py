"""Zero-shot classification: embed sentences that name the classes, take the nearest (CLIP, arXiv 2103.00020, 3.1.4).

1. Each rank embeds its share of the classes: every template filled with the name, each sentence to unit length, their
   mean, again to unit length. The class vectors are gathered.
2. Each rank embeds its share of the images.
3. The standing of the right class among all classes is found where the image lies, and gathered.

Ties score 1/k, scores are exact (see `metrics`), accuracies are in percent, 0..100.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_train.distributed import collectives
from vlm_train.errors import ConfigError, DataError
from vlm_train.evaluation.base import Embed, embed_labelled, interval_95, percent
from vlm_train.evaluation.metrics import Standing, credit_at_k, exact, macro_mean, on_grid, standings
from vlm_train.evaluation.prompts import fill, read_classes, resolve_templates
from vlm_train.evaluation.ranking import check_unit
from vlm_train.types import Batch, rank_share


class ZeroShot:
    """Accuracy on `labels` by the names of the classes.

    Args:
        classes: the names, in the order of the labels, or the path of a file of them (`prompts.read_classes`;
            `vlm-train data import openmoji` writes one beside the data).
        templates: a set of `prompts`, a list of sentences with `{}` or `{c}`, the path of a file of them, or None for
            those of the classes file.

    Raises:
        ConfigError: a file that cannot be used, names that repeat, or templates without a placeholder.
    """

    name = "zero_shot"

    def __init__(self, *, classes: str | Sequence[str], templates: str | Sequence[str] | None = None) -> None:
        self.classes, own_templates = read_classes(classes) if isinstance(classes, str) else (list(classes), None)
        given = (templates, own_templates, "generic")
        self.templates = resolve_templates(next(each for each in given if each is not None))
        repeated = sorted({name for name in self.classes if self.classes.count(name) > 1})
        if repeated or len(self.classes) < 2:
            raise ConfigError(
                "Zero-shot classification needs at least two classes with different names",
                got=f"{len(self.classes)} names, repeated: {', '.join(repeated) or 'none'}",
                remedy="tell the classes apart by name",
            )

    def run(self, embedder: Embed, batches: Iterator[Batch]) -> dict[str, Any]:
        """Scores in percent. Collective: every rank brings its share, in equally many batches.

        Returns:
            `top1`, `top5`; `macro_top1` (mean over classes); `interval_95` of top1; the controls `chance` {"top1",
            "top5"} and `majority_class` (always answering the most frequent class); `num_images`, `num_classes`, and
            `num_unlabelled`, the images that were left out because they carry no label.

        Raises:
            DataError: no labelled image, or a label that has no name.
            VlmError: features that are not finite.
        """
        class_CD = on_grid(self.class_features(embedder), "Class features")
        share = embed_labelled(embedder, batches, split="val")
        check_unit(share.features, "Image features")
        label_I = collectives.gather_rows_detached(share.labels)
        self.check_labels(label_I)
        classes_C = torch.arange(len(self.classes), device=label_I.device)
        mine = standings(exact(share.features), class_CD, share.labels, classes_C)
        standing = Standing(*collectives.gather_rows_detached(torch.stack(mine, dim=1)).unbind(1))
        num_unlabelled = sum(collectives.gather_objects(share.num_unlabelled))
        return self._scores(standing, label_I, num_unlabelled=num_unlabelled)

    def class_features(self, embedder: Embed) -> Tensor:
        """One unit vector per class, fp32 [C, D], on every rank. Collective."""
        start, stop = rank_share(len(self.classes), collectives.rank(), collectives.world_size())
        sentences = [fill(template, name) for name in self.classes[start:stop] for template in self.templates]
        features = embedder.texts(sentences).unflatten(0, (stop - start, len(self.templates)))
        return collectives.gather_rows_detached(F.normalize(features.mean(1), dim=1))

    def check_labels(self, label_I: Tensor) -> None:
        """Raises DataError for a label that has no name."""
        if int(label_I.max()) >= len(self.classes):
            raise DataError(
                "The data has labels that the class list does not name",
                got=f"label {int(label_I.max())}, with {len(self.classes)} class names",
                allowed=f"0..{len(self.classes) - 1}",
                remedy="give the classes.json that belongs to this data",
            )

    def _scores(self, standing: Standing, label_I: Tensor, num_unlabelled: int) -> dict[str, Any]:
        top1_I, top5_I = credit_at_k(standing, 1), credit_at_k(standing, 5)
        num_images, num_classes = len(label_I), len(self.classes)
        return {
            "top1": percent(top1_I),
            "top5": percent(top5_I),
            "macro_top1": percent(macro_mean(top1_I, label_I)),
            "interval_95": interval_95(percent(top1_I), num_images),
            "chance": {"top1": percent(1 / num_classes), "top5": percent(min(5, num_classes) / num_classes)},
            "majority_class": percent(int(torch.bincount(label_I).max()) / num_images),
            "num_images": num_images,
            "num_classes": num_classes,
            "num_unlabelled": num_unlabelled,
        }
