"""Zero-shot classification: embed sentences that name the classes, take the nearest (CLIP, arXiv 2103.00020, 3.1.4).

1. Each rank embeds its share of the classes: every template filled with the name, each sentence to unit length, their
   mean, again to unit length. The class vectors are gathered.
2. Each rank embeds its share of the images.
3. The standing of the right class among all classes is computed where the image lies, and gathered.

Ties score 1/k, scores are exact (see `metrics`), accuracies are in percent, 0..100.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_train.distributed import collectives
from vlm_train.errors import ConfigError, DataError
from vlm_train.evaluation.base import Embed, counted, percent
from vlm_train.evaluation.metrics import Standing, credit_at_k, macro_mean, on_grid, standings, wilson_interval
from vlm_train.evaluation.prompts import fill, resolve_templates
from vlm_train.types import Batch, rank_share


class ZeroShot:
    """Accuracy on `labels` by the names of the classes.

    Args:
        classes: the names, in the order of the labels, or the path of a `classes.json`
            ({"classes": [...], "templates": [...]}; `vlm-train data import` writes one beside the data).
        templates: a set of `prompts`, a list of sentences with `{}`, or None for those of the classes file.

    Raises:
        ConfigError: a classes file that cannot be used, names that repeat, or templates without a placeholder.
    """

    name = "zero_shot"

    def __init__(self, *, classes: str | Sequence[str], templates: str | Sequence[str] | None = None) -> None:
        document = _read_classes(classes) if isinstance(classes, str) else {"classes": list(classes)}
        self.classes: list[str] = document["classes"]
        self.templates = resolve_templates(document.get("templates", "generic") if templates is None else templates)
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
        images_ID, label_I = self._embed(embedder, batches)
        total = collectives.all_reduce_sum(torch.tensor(len(label_I), device=label_I.device))
        labelled = label_I >= 0
        features_ID, label_I = images_ID[labelled], label_I[labelled]
        all_label_I = collectives.gather_rows_detached(label_I)
        self._check_labels(all_label_I)

        gathered_ID = on_grid(collectives.gather_rows_detached(features_ID), "Image features")
        start, stop = rank_share(len(gathered_ID), collectives.rank(), collectives.world_size())
        classes_C = torch.arange(len(self.classes), device=label_I.device)
        mine = standings(gathered_ID[start:stop], class_CD, all_label_I[start:stop], classes_C)
        standing = Standing(*collectives.gather_rows_detached(torch.stack(mine, dim=1)).unbind(1))
        return self._scores(standing, all_label_I, num_unlabelled=int(total) - len(all_label_I))

    def class_features(self, embedder: Embed) -> Tensor:
        """One unit vector per class, fp32 [C, D], on every rank. Collective."""
        start, stop = rank_share(len(self.classes), collectives.rank(), collectives.world_size())
        sentences = [fill(template, name) for name in self.classes[start:stop] for template in self.templates]
        features = embedder.texts(sentences).unflatten(0, (stop - start, len(self.templates)))
        return collectives.gather_rows_detached(F.normalize(features.mean(1), dim=1))

    def _embed(self, embedder: Embed, batches: Iterator[Batch]) -> tuple[Tensor, Tensor]:
        images, labels = [], []
        for batch in batches:
            keep = counted(batch)
            features = embedder.images(batch["images"])
            images.append(features[keep.to(features.device)])
            label_B = batch["labels"].cpu() if "labels" in batch else torch.full((len(keep),), -1)
            labels.append(label_B[keep].to(features.device))
        if not images:
            raise DataError("There is nothing to evaluate", got="no batches", remedy="check data.val.shards")
        return torch.cat(images), torch.cat(labels)

    def _check_labels(self, label_I: Tensor) -> None:
        if len(label_I) == 0:
            raise DataError(
                "Zero-shot classification needs labels",
                got="no image with a label",
                allowed=f"`label` in KEY.json, 0..{len(self.classes) - 1}",
                remedy="leave out the zero_shot evaluator, or import the data with labels",
            )
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
        interval = wilson_interval(float(top1_I.sum()), num_images)
        return {
            "top1": percent(top1_I),
            "top5": percent(top5_I),
            "macro_top1": percent(macro_mean(top1_I, label_I)),
            "interval_95": [percent(bound) for bound in interval],
            "chance": {"top1": percent(1 / num_classes), "top5": percent(min(5, num_classes) / num_classes)},
            "majority_class": percent(int(torch.bincount(label_I).max()) / num_images),
            "num_images": num_images,
            "num_classes": num_classes,
            "num_unlabelled": num_unlabelled,
        }


def _read_classes(path: str) -> dict[str, Any]:
    """The content of a classes.json, checked."""
    try:
        document = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            "The classes file cannot be read", got=f"{path}: {error}", remedy="give an existing classes.json, or a list"
        ) from error
    names = document.get("classes") if isinstance(document, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            "The classes file does not hold class names",
            got=path,
            allowed='{"classes": ["cat", "dog"], "templates": ["a photo of a {}."]}',
        )
    return document
