"""FFCV's own loader, driven by our order: the batches of `steps.TrainSteps`, with FFCV's pixels.

What is the same as in our loader, at any world size and after any restart: which samples stand in the batch of a rank
at a step, in which order, with which uids, keys, labels and captions. FFCV decodes, crops and mirrors; the texts are
read by our own code, which takes exactly their bytes (FFCV's buffers are as long as the longest text, and what an
earlier sample left in them shows).

What is weaker than in our loader:

- Crops and mirrors are drawn from Numba's generators, one a thread, which nobody seeds: pixels differ from run to run.
  A pipeline without randomness gives equal pixels every time.
- JPEGs are decoded by libjpeg-turbo's quick transform: up to 14 grey levels from the exact one that evaluation takes.
- A damaged JPEG is not noticed, for FFCV ignores what libjpeg-turbo answers: whatever lay in the buffer is trained on,
  nothing is replaced and nothing stands in data_errors.jsonl. `vlm-train data verify` finds such samples beforehand.
- Nothing is compared with the uid, and colours are left alone.
- One .beton on a local disk, one source; the last batch of an epoch cannot be padded.
- FFCV holds two dicts and a set per allocation in each rank: about 0.8 GB for a million samples of three fields.

Only this module needs ffcv, and only who wants it imports it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm_train.data import beton, decode
from vlm_train.data.formats.beton import BetonFormat, roles_of
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.steps import TrainSteps
from vlm_train.data.storage import open_file
from vlm_train.data.transforms import TrainTransform, keyed_draw, keyed_generator
from vlm_train.errors import DataError
from vlm_train.locations import is_remote, shown
from vlm_train.types import Batch

try:
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader
    from ffcv.transforms import RandomHorizontalFlip, ToTensor
    from ffcv.traversal_order.base import TraversalOrder
except ImportError as error:
    raise DataError(
        "the ffcv package is not installed",
        got=error,
        allowed="ffcv 1.0.2; .beton files themselves are read without it by our own loader",
        remedy="`source scripts/environment.sh && make_environment && install_ffcv` (it needs apt and a compiler)",
    ) from error

_SEGMENT = 1 << 20
_POLL = 0.001


class StreamOrder(TraversalOrder):
    """The samples of one rank, from a step on: of each step s exactly the positions [s G + start, s G + stop).

    FFCV asks for an order once an epoch and holds all of it. One of its epochs is here a segment of about a million
    samples, however long the run is.

    Args:
        steps: the stream and the share of the rank.
        source: its only source.
        first_step: where to go on.
        segment_steps: steps of a segment.
    """

    def __init__(self, steps: TrainSteps, source: ShardSource, *, first_step: int, segment_steps: int) -> None:
        self.steps, self.source = steps, source
        self.first_step, self.segment_steps = first_step, segment_steps

    def __call__(self, loader: Loader) -> StreamOrder:
        """What FFCV 1.0.2 does with an order that is an instance: it calls it with the loader."""
        super().__init__(loader)
        return self

    @property
    def num_segments(self) -> int:
        """How many of FFCV's epochs the rest of the run is."""
        return max(0, -(-(self.steps.spec.num_steps - self.first_step) // self.segment_steps))

    def sample_order(self, epoch: int) -> NDArray[np.uint64]:
        """Numbers of the samples of a segment in the .beton."""
        _, rows = self.places(self.segment(epoch))
        return self.source.manifest.entries(rows)["number"].astype(np.uint64)

    def segment(self, epoch: int) -> range:
        """The steps of a segment."""
        first = self.first_step + epoch * self.segment_steps
        return range(first, min(first + self.segment_steps, self.steps.spec.num_steps))

    def places(self, steps: range) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(position [n], manifest row [n]) of the rank's samples of some steps in a row."""
        starts = np.arange(steps.start, steps.stop, dtype=np.int64)[:, None] * self.steps.spec.global_batch
        positions = (starts + np.arange(*self.steps.share, dtype=np.int64)).ravel()
        return positions, self.steps.mixture.locate(positions).rows


class FfcvLoader:
    """Iterates the batches of `steps` from `first_step` on, decoded by FFCV.

    Each batch owns its memory: FFCV writes into the same few buffers again and again, so pixels are copied out.

    Args:
        steps: the stream, the rank's share, the transform and the tokenizer. Of a `TrainTransform` the size, the crop
            and the mirror are taken over.
        first_step: where to go on after a restart.
        num_workers: threads that decode.
        os_cache: read through the page cache of the system; otherwise FFCV keeps pages itself.
        operations: FFCV operations on the image, decoder first, in place of crop and mirror.
        segment_steps: see `StreamOrder`; None is about a million samples.

    Raises:
        DataError: the stream has several sources, shards, a shard that is no local .beton, or padded epochs.
    """

    def __init__(
        self,
        steps: TrainSteps,
        *,
        first_step: int = 0,
        num_workers: int = 1,
        os_cache: bool = True,
        operations: Sequence[Any] | None = None,
        segment_steps: int | None = None,
    ) -> None:
        self.steps, self.source = steps, _only_source(steps)
        batch_size = steps.share[1] - steps.share[0]
        segment_steps = segment_steps or max(1, _SEGMENT // batch_size)
        self.order = StreamOrder(steps, self.source, first_step=first_step, segment_steps=segment_steps)
        self.file = open_file(self.source.manifest.shards[0])
        if not len(self):  # FFCV cannot be made of nothing
            return
        fields = beton.read_layout(self.file).fields
        chosen = _operations(steps) if operations is None else operations
        pipelines: dict[str, Any] = {field.name: None for field in fields}
        pipelines[roles_of(fields, self.file).image.name] = [*chosen, ToTensor()]
        self._loader = Loader(
            self.file.location,
            batch_size=batch_size,
            num_workers=num_workers,
            os_cache=os_cache,
            order=self.order,
            pipelines=pipelines,
        )

    def __len__(self) -> int:
        return max(0, self.steps.spec.num_steps - self.order.first_step)

    def __iter__(self) -> Iterator[Batch]:
        for epoch in range(self.order.num_segments):
            self._loader.next_epoch = epoch
            batches = iter(self._loader)
            try:
                for step in self.order.segment(epoch):
                    yield self._batch(step, _next(batches))
            finally:
                batches.close()
                batches.join()

    def _batch(self, step: int, pixels: Tensor) -> Batch:
        """A batch as `TrainSteps.batch` makes it, of these pixels [B, S, S, 3]."""
        visits, rows = self.order.places(range(step, step + 1))
        entries = self.source.manifest.entries(rows)
        keys, captions, labels, draws = [], [], [], []
        samples = BetonFormat().read_texts(self.file, entries)
        for (key, parts), visit, uid in zip(samples, visits.tolist(), entries["uid"].tolist(), strict=True):
            metadata = decode.decode_metadata(parts)
            label = decode.decode_label(metadata)
            keys.append(key)
            labels.append(-1 if label is None else label)
            draws.append(keyed_draw(self.steps.spec.seed, visit, uid))
            captions.append(_draw(decode.decode_captions(parts, metadata), self.steps.spec.seed, visit, uid))
        text_ids, text_mask = self.steps.encoder.text(captions)
        return Batch(
            images=pixels.clone().permute(0, 3, 1, 2),
            text_ids=text_ids,
            text_mask=text_mask,
            weights=torch.ones(len(rows)),
            uids=torch.from_numpy(np.ascontiguousarray(entries["uid"]).view(np.int64).reshape(-1, 2)),
            labels=torch.tensor(labels, dtype=torch.int64),
            draws=torch.tensor(draws, dtype=torch.int64),
            captions=captions,
            keys=keys,
            step=step,
            errors=[],
        )


def _draw(captions: list[str], seed: int, visit: int, uid: bytes) -> str:
    """The caption that `collate.Draft.put` draws."""
    drawn = keyed_generator(seed, visit, uid, "caption").random() if len(captions) > 1 else 0.0
    return captions[int(drawn * len(captions))]


def _next(batches: Any) -> Tensor:
    """The next batch of FFCV's iterator. It would wait for ever for its thread when that has died of an error."""
    while batches.output_queue.empty():
        if not batches.is_alive() and batches.output_queue.empty():
            raise DataError("ffcv's thread ended with an error", got="the traceback above", remedy="read it")
        batches.join(_POLL)
    (pixels,) = next(batches)
    return pixels


def _operations(steps: TrainSteps) -> list[Any]:
    transform = steps.encoder.transform
    if not isinstance(transform, TrainTransform) or transform.scale is None:
        raise DataError("only a random crop has a counterpart in ffcv", got=type(transform).__name__)
    crop = RandomResizedCropRGBImageDecoder((transform.size,) * 2, scale=transform.scale, ratio=transform.ratio)
    return [crop, RandomHorizontalFlip(transform.flip)] if transform.flip else [crop]


def _only_source(steps: TrainSteps) -> ShardSource:
    """The source of the stream, if FFCV can read all of it."""
    source, *others = steps.sources
    shards = source.manifest.shards if isinstance(source, ShardSource) else []
    local = [shard for shard in shards if shard.lower().endswith(".beton") and not is_remote(shard)]
    padded = steps.spec.epoch_end == "pad_zero_weight"
    if isinstance(source, ShardSource) and len(local) == len(shards) == 1 and not others and not padded:
        return source
    raise DataError(
        "ffcv cannot read this stream",
        got=f"{1 + len(others)} sources, the first of {len(shards)} shards {list(map(shown, shards[:2]))}, "
        f"epoch_end {steps.spec.epoch_end}",
        allowed="one source of one local .beton, and whole batches (epoch_end drop or wrap)",
        remedy="`vlm-train data convert SHARDS --out FILE.beton`, or our own loader, which reads everything",
    )
