"""How evaluators see a model: through interfaces named after what they ask of it.

`Embed` (images and texts to unit vectors) is the interface of retrieval and of zero-shot classification; `Embedder`
is its one implementation, for any model with `encode_image` and `encode_text`.

Sharded models communicate inside forward, so every rank must call the model equally often even when ranks hold unequal
numbers of texts. `Embedder.texts` therefore agrees on the number of forwards first; `images` is called once per batch,
and the evaluation loader gives every rank the same number of batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_train.distributed import collectives
from vlm_train.errors import ConfigError, DataError
from vlm_train.evaluation.metrics import wilson_interval
from vlm_train.types import Batch, Tokenizer

_TEXTS_PER_FORWARD = 256


class Embed(Protocol):
    """Images, texts and other modalities to unit vectors of one space. All methods are collective."""

    def images(self, batch: Batch) -> Tensor:
        """The pictures of a batch (uint8 `images` [B, 3, S, S], or the modality that the model reads in their place) ->
        fp32 [B, D], L2-normalised."""

    def others(self, name: str, batch: Batch) -> Tensor:
        """What a batch has of modality `name` -> fp32 [B, D], L2-normalised; `there` tells the rows that have it."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """N strings -> fp32 [N, D], L2-normalised. N may differ between ranks and may be 0."""


class TrainSplit(Protocol):
    """The training split as evaluation reads it: every sample once, in file order, without augmentation."""

    def batches(self) -> Iterator[Batch]:
        """This rank's share, as the evaluation loader cuts it."""

    def captions(self) -> Iterator[str]:
        """The captions of the whole split, the same on every rank; evenly spaced samples of a large one."""


@runtime_checkable
class Learner(Protocol):
    """An evaluator that learns from the training split before it measures."""

    def fit(self, embedder: Any, train: TrainSplit) -> None:
        """Called before `run`, on every rank. Collective."""


class Embedder:
    """Embeds with a model, in evaluation mode and without graph; the model's mode is restored after each call.

    Args:
        model: has `encode_image(images)` and `encode_text(ids, mask)`, as `DualEncoder`; the module itself, not a
            data-parallel wrapper of it.
        tokenizer: the one the model was trained with.
        device: where the model lies.
        autocast: dtype of the forward (`torch.bfloat16`), or None for the model's own.

    Raises:
        ConfigError: when the model cannot embed.
    """

    def __init__(
        self, *, model: Any, tokenizer: Tokenizer, device: torch.device, autocast: torch.dtype | None = None
    ) -> None:
        missing = [name for name in ("encode_image", "encode_text") if not hasattr(model, name)]
        if missing:
            raise ConfigError(
                f"{type(model).__name__} cannot embed: it has no {' and no '.join(missing)}",
                got=", ".join(getattr(model, "forward_methods", ())) or "no forward methods",
                allowed="a model with encode_image and encode_text, such as dual_encoder",
                remedy="an evaluation that fits it (evaluation=vqa of a model that answers), or another model",
            )
        self.model, self.tokenizer, self.device, self.autocast = model, tokenizer, device, autocast

    def images(self, batch: Batch) -> Tensor:
        """See `Embed.images`.

        Raises:
            ConfigError: pictures alone, of a model that reads something else of them.
        """
        field = getattr(self.model, "image_field", "images")
        if field not in batch:
            raise ConfigError(
                f"{type(self.model).__name__} reads {field} in place of pictures, and these have none",
                got=", ".join(batch),
                allowed=f"shards whose samples have {field}",
                remedy="take a model that reads pictures",
            )
        with inference(self.model, self.device, self.autocast):
            images: Tensor = batch[field]  # type: ignore[literal-required]
            return _unit(self.model.encode_image(images.to(self.device, non_blocking=True)))

    def others(self, name: str, batch: Batch) -> Tensor:
        """See `Embed.others`.

        Raises:
            ConfigError: of a model without a tower for it.
        """
        known = list(getattr(self.model, "others", ()))
        if name not in known:
            raise ConfigError(
                f"{type(self.model).__name__} has no tower that reads {name}",
                got=f"others: {', '.join(known) or 'none'}",
                allowed="a model with that tower, such as model=bound_tiny",
                remedy=f"leave out the evaluators of {name}, or change the model",
            )  # fmt: skip
        with inference(self.model, self.device, self.autocast):
            values: Tensor = batch[name]  # type: ignore[literal-required]
            return _unit(self.model.encode_other(name, values.to(self.device, non_blocking=True)))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """See `Embed.texts`."""
        mine = torch.tensor(-(-len(texts) // _TEXTS_PER_FORWARD), device=self.device)
        num_forwards = max(1, int(collectives.all_reduce_max(mine)))
        chunks = [texts[index * _TEXTS_PER_FORWARD :][:_TEXTS_PER_FORWARD] for index in range(num_forwards)]
        with inference(self.model, self.device, self.autocast):
            return torch.cat([self._encode_texts(chunk) for chunk in chunks])

    def _encode_texts(self, texts: Sequence[str]) -> Tensor:
        ids, mask = self.tokenizer(list(texts) or [""])  # a rank without texts still takes part in the forward
        if not self.tokenizer.spec.pad_to_max:
            longest = max(1, int(mask.sum(1).max()))
            ids, mask = ids[:, :longest], mask[:, :longest]
        return _unit(self.model.encode_text(ids.to(self.device), mask.to(self.device)))[: len(texts)]


@contextmanager
def inference(model: nn.Module, device: torch.device, autocast: torch.dtype | None) -> Iterator[None]:
    """Evaluation mode, no graph, matrix products in `autocast`; the model's mode is restored at the end."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
            yield
    finally:
        model.train(was_training)


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.to(torch.float32), dim=1)


def counted(batch: Batch) -> Tensor:
    """Which rows are samples rather than padding: bool [B] on the host."""
    weights = batch.get("weights")
    return torch.ones(len(batch["images"]), dtype=torch.bool) if weights is None else weights.cpu() != 0


class Labelled(NamedTuple):
    """This rank's labelled images: `features` fp32 [I, D], `labels` int64 [I]; `num_unlabelled` images had none."""

    features: Tensor
    labels: Tensor
    num_unlabelled: int


def embed_labelled(embedder: Embed, batches: Iterator[Batch], *, split: str) -> Labelled:
    """Embeds the images of a split, and keeps those that have a label. Collective.

    Raises:
        DataError: no batch at all, or on every rank, when no rank found a label.
    """
    images, labels, num_images = [], [], 0
    for batch in batches:
        keep = counted(batch)
        label_B = batch["labels"].cpu() if "labels" in batch else torch.full((len(keep),), -1)
        features = embedder.images(batch)
        labelled = keep & (label_B >= 0)
        images.append(features[labelled.to(features.device)])
        labels.append(label_B[labelled].to(features.device))
        num_images += int(keep.sum())
    if not images:
        raise DataError("There is nothing to evaluate", got="no batches", remedy=f"check data.{split}.shards")
    found = Labelled(torch.cat(images), torch.cat(labels), num_images - sum(map(len, labels)))
    if not sum(collectives.gather_objects(len(found.labels))):
        raise DataError(
            f"Classification needs labels, and data.{split}.shards has none",
            got="no image with a label",
            allowed="`label` in KEY.json, a whole number from 0",
            remedy="leave out the evaluators that classify (zero_shot, fine_grained, probe), or import labels too",
        )
    return found


def check_counts(key: str, values: Sequence[int]) -> tuple[int, ...]:
    """The values, as a tuple. Raises ConfigError unless there is one at least, and each is 1 or more."""
    if not values or any(not isinstance(value, int) or value < 1 for value in values):
        raise ConfigError(f"{key} of an evaluator cannot be this", got=list(values) or "no number",
                          allowed="whole numbers from 1", remedy=f"{key}: [1, 5, 10]")  # fmt: skip
    return tuple(values)


def percent(share: float | Tensor) -> float:
    """A share, or the mean of a tensor of credits, in percent; ten decimals, so that a quarter prints as 25.0."""
    return round(100.0 * float(share.mean() if isinstance(share, Tensor) else share), 10)


def interval_95(score: float, num_trials: int) -> list[float]:
    """The Wilson interval of a score in percent, in percent."""
    return [percent(bound) for bound in wilson_interval(score / 100.0 * num_trials, num_trials)]
