"""One raw record to a `Sample`, and samples to the `Batch` that the model is handed.

This is the middle of the road (decode, transform, tokenize, collate) as one object, because it must behave the same in
every worker: it holds no state, and its randomness comes from the sample's own key. Text is trimmed to the longest of
the batch, rounded up to a multiple of 8 (whole tensor-core tiles), where the tower allows it; trailing padding cannot
change a result there, so ranks may differ in length.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vlm_train.data import decode
from vlm_train.data.transforms import Transform, keyed_generator, render
from vlm_train.types import Batch, RawSample, Sample, Tokenizer

_TEXT_MULTIPLE = 8


class SampleEncoder:
    """Raw record -> sample -> batch.

    Args:
        transform: how an image becomes a square of S pixels.
        tokenizer: how a caption becomes ids.
    """

    def __init__(self, *, transform: Transform, tokenizer: Tokenizer) -> None:
        self.transform, self.tokenizer = transform, tokenizer

    def encode(self, raw: RawSample, *, seed: int = 0, epoch: int | None = None) -> Sample:
        """Decodes and transforms one record. `epoch` None is evaluation: the first caption. In training one of the
        captions is drawn, keyed as the crop is by (seed, epoch, uid).

        Raises:
            SampleError: the record cannot be used.
        """
        metadata = decode.decode_metadata(raw.parts)
        captions = decode.decode_captions(raw.parts, metadata)
        chosen = 0
        if epoch is not None and len(captions) > 1:
            chosen = int(keyed_generator(seed, epoch, raw.uid, "caption").random() * len(captions))
        image = decode.open_image(decode.first_image(raw.parts))
        generator = keyed_generator(seed, epoch or 0, raw.uid, "image")
        plan = self.transform.plan(image.width, image.height, generator)
        min_width, min_height = plan.min_decoded
        pixels = render(image.decode(min_width=min_width, min_height=min_height), plan)
        return Sample(uid=raw.uid, key=raw.key, image=pixels, caption=captions[chosen], metadata=metadata)

    def blank(self) -> Sample:
        """What stands in a row of weight 0: black, no text, uid 0."""
        return Sample(
            uid=bytes(16), key="", image=np.zeros((self.transform.size, self.transform.size, 3), np.uint8), caption=""
        )

    def collate(self, samples: Sequence[Sample], *, weights: Sequence[float], evaluation: bool = False) -> Batch:
        """Stacks samples. Shapes as in `types.Batch`; `evaluation` adds `all_captions` and `metadata`."""
        captions = [sample.caption for sample in samples]
        text_ids, text_mask = self._text(captions)
        uids = np.frombuffer(b"".join(sample.uid for sample in samples), "<i8").astype(np.int64)
        batch = Batch(
            images=_images(samples, self.transform.size),
            text_ids=text_ids,
            text_mask=text_mask,
            weights=torch.tensor(weights, dtype=torch.float32),
            uids=torch.from_numpy(uids.reshape(-1, 2)),
            labels=torch.tensor([_label(sample) for sample in samples], dtype=torch.int64),
            captions=captions,
            keys=[sample.key for sample in samples],
        )
        if evaluation:
            batch["all_captions"] = [_all_captions(sample) for sample in samples]
            batch["metadata"] = [sample.metadata for sample in samples]
        return batch

    def _text(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """ids and mask [B, T], T as short as the tower allows."""
        text_ids, text_mask = self.tokenizer(captions)
        if self.tokenizer.spec.pad_to_max:
            return text_ids, text_mask
        longest = int(text_mask.any(dim=0).nonzero().max()) + 1 if text_mask.any() else 1
        length = -(-longest // _TEXT_MULTIPLE) * _TEXT_MULTIPLE  # slicing stops at the context length by itself
        return text_ids[:, :length].contiguous(), text_mask[:, :length].contiguous()


def _images(samples: Sequence[Sample], size: int) -> Tensor:
    images = np.empty((len(samples), 3, size, size), np.uint8)
    for row, sample in enumerate(samples):
        images[row] = sample.image.transpose(2, 0, 1)
    return torch.from_numpy(images)


def _label(sample: Sample) -> int:
    label = sample.metadata.get("label")
    return label if isinstance(label, int) and not isinstance(label, bool) else -1


def _all_captions(sample: Sample) -> list[str]:
    """In evaluation the sample's caption is its first, so this is the list that `encode` saw."""
    return decode.decode_captions({"txt": sample.caption.encode()}, sample.metadata) if sample.caption else []
