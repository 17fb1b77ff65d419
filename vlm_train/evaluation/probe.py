"""What frozen image features know of the classes: a linear probe, nearest neighbours, and a few images a class.

The features are the model's image embeddings. All three learn from the labelled images of the training split, read
without augmentation, and are judged on those of the validation split. The training features are gathered; each rank
judges its own validation images, and the ranks share the fits of the linear probe's sweep (see `logistic`). Ties score
1/k; every result is the same for any number of ranks, given equal features. Accuracies are in percent.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm_train.distributed import collectives
from vlm_train.errors import ConfigError, DataError
from vlm_train.evaluation.base import Embed, TrainSplit, check_counts, embed_labelled, interval_95, percent
from vlm_train.evaluation.logistic import Linear, best_l2, fit
from vlm_train.evaluation.metrics import (
    credit_at_k,
    exact,
    macro_mean,
    on_grid,
    standing_of,
    standings,
)
from vlm_train.evaluation.neighbours import class_means, place_in_class, votes
from vlm_train.evaluation.ranking import check_unit
from vlm_train.types import Batch

_HELD_OUT_EVERY = 5
Credits = dict[str, dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class _Known:
    """What is learned from, on every rank. `classes_C`: the labels that occur; `labels_N`: their number among these."""

    features_ND: Tensor
    labels_N: Tensor
    classes_C: Tensor

    def shuffled(self, seed: int) -> _Known:
        """The same images with each other's labels."""
        order = torch.randperm(len(self.labels_N), generator=torch.Generator().manual_seed(seed))
        return _Known(self.features_ND, self.labels_N[order.to(self.labels_N.device)], self.classes_C)


class Probe:
    """Accuracy on `labels` by what was learned from the labels of the training split.

    Args:
        ks: numbers of neighbours that vote.
        temperature: of the weighted vote.
        shots: images a class for the class means.
        draws: how often these are drawn.
        seed: of the draws and of the shuffled labels.

    Raises:
        ConfigError: a number out of its range.
    """

    name = "probe"

    def __init__(
        self,
        *,
        ks: Sequence[int] = (1, 10, 20),
        temperature: float = 0.07,
        shots: Sequence[int] = (1, 4, 16),
        draws: int = 5,
        seed: int = 0,
    ) -> None:
        self.ks, self.shots = check_counts("ks", ks), check_counts("shots", shots)
        (self.draws,) = check_counts("draws", [draws])
        if not temperature > 0:
            raise ConfigError("the temperature of a vote is above 0", got=temperature, remedy="temperature: 0.07")
        self.temperature, self.seed = temperature, seed
        self._known: _Known | None = None

    def fit(self, embedder: Embed, train: TrainSplit) -> None:
        """Embeds the training split; see `base.Learner`.

        Raises:
            DataError: no labels, labels of one class alone, or no class with two images.
        """
        share = embed_labelled(embedder, train.batches(), split="train")
        check_unit(share.features, "Image features")
        classes_C, labels_N = torch.unique(collectives.gather_rows_detached(share.labels), return_inverse=True)
        features_ND = collectives.gather_rows_detached(share.features)
        if len(classes_C) < 2 or int(torch.bincount(labels_N).max()) < 2:
            raise DataError(
                "A probe needs two classes at least, and several training images of one",
                got=f"{len(labels_N)} labelled images of {len(classes_C)} classes",
                remedy="leave out the probe evaluator, or import more labels",
            )
        self._known = _Known(features_ND, labels_N, classes_C)

    def run(self, embedder: Embed, batches: Iterator[Batch]) -> dict[str, Any]:
        """Scores in percent. Collective: every rank brings its share, in equally many batches.

        Returns:
            `linear` {"top1", "macro_top1"}; `neighbours` {"k=K weighted", "k=K plain"}; `few_shot` {"N-shot"}, the
            mean over the draws, with `spread`, their standard deviation; `interval_95`; the controls `chance`,
            `majority_class` (always answering the most frequent class of the training split) and
            `shuffled_labels_...`, what is learned from wrong labels; `settings`: what the sweep chose; counts.

        Raises:
            DataError: no labelled image.
            VlmError: features that are not finite.
        """
        known, self._known = self._known, None
        assert known is not None, "fit comes before run"
        share = embed_labelled(embedder, batches, split="val")
        check_unit(share.features, "Image features")
        place = torch.searchsorted(known.classes_C, share.labels).clamp(max=len(known.classes_C) - 1)
        label_I = torch.where(known.classes_C[place] == share.labels, place, -1)  # -1: a class that nobody has shown
        l2 = self._l2(known)
        mine = self._credits(known, share.features, label_I, l2)
        wrong = self._credits(known.shuffled(self.seed), share.features, label_I, l2)
        all_label_I = collectives.gather_rows_detached(label_I)
        counts = {
            "num_images": len(all_label_I),
            "num_train_images": len(known.labels_N),
            "num_classes": len(known.classes_C),
            "num_unseen": int((all_label_I < 0).sum()),
            "num_unlabelled": sum(collectives.gather_objects(share.num_unlabelled)),
        }
        majority = torch.bincount(known.labels_N).argmax()
        return {
            **self._scores(_gathered(mine), collectives.gather_rows_detached(share.labels)),
            "chance": percent(1 / len(known.classes_C)),
            "majority_class": percent((all_label_I == majority).double()),
            **{f"shuffled_labels_{key}": value for key, value in self._controls(_gathered(wrong)).items()},
            "settings": {"l2": l2, "temperature": self.temperature, "draws": self.draws},
            **counts,
        }

    def _l2(self, known: _Known) -> float:
        held_out_N = place_in_class(known.labels_N) % _HELD_OUT_EVERY == 1
        return best_l2(known.features_ND, known.labels_N, held_out_N, len(known.classes_C))

    def _credits(self, known: _Known, features_ID: Tensor, label_I: Tensor, l2: float) -> Credits:
        """Group -> name -> how right each of this rank's images is, fp64 [I]; of few shots [I, draws]."""
        num_classes, device = len(known.classes_C), label_I.device
        classes_C, gallery, queries = (
            torch.arange(num_classes, device=device),
            exact(known.features_ND),
            exact(features_ID),
        )
        right_IC = label_I[:, None] == classes_C
        linear = _from_first_rank(fit(known.features_ND, known.labels_N, num_classes, l2))
        found = votes(queries, gallery, known.labels_N, num_classes, ks=self.ks, temperature=self.temperature)

        def by_means(shots: int, draw: int) -> Tensor:
            seed = self.seed + draw
            means = class_means(gallery, known.labels_N, num_classes, shots=shots, seed=seed)
            return credit_at_k(standings(queries, on_grid(means, "Class means"), label_I, classes_C), 1)

        few = {
            f"{shots}-shot": torch.stack([by_means(shots, draw) for draw in range(self.draws)], dim=1)
            for shots in self.shots
        }
        return {
            "linear": {"top1": credit_at_k(standing_of(linear.scores(features_ID), right_IC), 1)},
            "neighbours": {name: credit_at_k(standing_of(vote, right_IC), 1) for name, vote in found.items()},
            "few_shot": few,
        }

    def _scores(self, credits: Credits, labels_I: Tensor) -> dict[str, Any]:
        linear, num = credits["linear"]["top1"], len(labels_I)
        scores = {
            "linear": {"top1": percent(linear), "macro_top1": percent(macro_mean(linear, labels_I))},
            "neighbours": {name: percent(credit) for name, credit in credits["neighbours"].items()},
        }
        intervals: dict[str, dict[str, list[float]]] = {
            group: {
                name: interval_95(value, num) for name, value in scores[group].items() if not name.startswith("macro")
            }
            for group in scores
        }
        draws = {name: [percent(draw) for draw in credit.unbind(1)] for name, credit in credits["few_shot"].items()}
        spread = {name: statistics.pstdev(values) for name, values in draws.items()}
        means = {name: statistics.fmean(values) for name, values in draws.items()}
        intervals["few_shot"] = {name: interval_95(value, num) for name, value in means.items()}
        return {**scores, "few_shot": means, "spread": spread, "interval_95": intervals}

    def _controls(self, credits: Credits) -> dict[str, float]:
        """The last of each group: with the most neighbours, and with the most shots."""
        return {group: percent(list(found.values())[-1]) for group, found in credits.items()}


def _gathered(credits: Credits) -> Credits:
    return {
        group: {name: collectives.gather_rows_detached(credit) for name, credit in found.items()}
        for group, found in credits.items()
    }


def _from_first_rank(linear: Linear) -> Linear:
    num = None if collectives.rank() == 0 else 0
    return Linear(*(collectives.gather_rows_detached(part[:num]) for part in linear))
