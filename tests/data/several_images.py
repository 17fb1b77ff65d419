"""Samples of none, one and several images with their dialogues, and an encoder for them."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from data_fixtures import SPEC, encoded, pixels, write_tar
from dialogue_toys import ours

from vlm_train.data.collate import SampleEncoder
from vlm_train.data.decode import sample_uid
from vlm_train.data.dialogue import DialogueEncoder
from vlm_train.data.transforms import EvalTransform, TrainTransform
from vlm_train.types import Batch, DialogueSpec, RawSample

NUM_IMAGE_TOKENS = 2
tokenizer = lru_cache(ours)  # trained once


def dialogues(max_images: int = 3, context_length: int = 160, template: str = "chatml") -> DialogueEncoder:
    spec = DialogueSpec(context_length=context_length, num_image_tokens=NUM_IMAGE_TOKENS, max_images=max_images)
    return DialogueEncoder(template, tokenizer(), spec, system="")


def encoder(reader: DialogueEncoder | None, *, train: bool = True, **options: Any) -> SampleEncoder:
    """In training everything is drawn, so that equal pixels mean equal draws."""
    drawn = TrainTransform(spec=SPEC, scale=(0.3, 1.0), flip=0.5, color_jitter=0.4, grayscale=0.2)
    transform = drawn if train else EvalTransform(spec=SPEC)
    return SampleEncoder(transform=transform, tokenizer=tokenizer(), dialogues=reader, **options)


def said(num_images: int, answer: str = "A red star.") -> list[dict[str, str]]:
    """A dialogue that speaks of so many images."""
    content = "<image>\n" * num_images + "What is it?"
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def parts_of(seed: int, num_images: int, conversations: Any = None, **metadata: Any) -> dict[str, bytes]:
    """The parts of a sample with images KEY.jpg or KEY.0.jpg, ...; all different."""
    conversations = said(num_images, f"Yes {seed}.") if conversations is None else conversations
    names = ["jpg"] if num_images == 1 else [f"{place}.jpg" for place in range(num_images)]
    images = {name: encoded(pixels(100 * seed + place)) for place, name in enumerate(names)}
    facts = {"captions": [f"picture {seed}"], "conversations": conversations, **metadata}
    return {**images, "json": json.dumps(facts).encode()}


def raw_of(parts: dict[str, bytes], key: str = "k") -> RawSample:
    return RawSample(uid=sample_uid(parts), key=key, shard="a.tar", parts=parts)


def batch_of(made: SampleEncoder, raws: list[RawSample], **key: Any) -> Batch:
    draft = made.draft(len(raws))
    for row, raw in enumerate(raws):
        draft.put(row, raw, **key)
    return draft.batch(weights=[1.0] * len(raws))


def members_of(key: str, parts: dict[str, bytes]) -> list[tuple[str, bytes]]:
    return [(f"{key}.{name}", content) for name, content in parts.items()]


def write_mixed(folder: Path, counts: tuple[int, ...] = (11, 7, 13), *, bad: tuple[int, ...] = ()) -> Path:
    """Shards whose sample n has n % 4 images. The last image of those in `bad` stops half-way."""
    number = 0
    for shard, count in enumerate(counts):
        members = []
        for _ in range(count):
            parts = parts_of(number, number % 4)
            if number in bad:
                name = [name for name in parts if name.endswith("jpg")][-1]
                parts[name] = parts[name][:-30]
            members += members_of(f"{shard:02d}{number:04d}", parts)
            number += 1
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


def merged(batches: list[Batch]) -> dict[str, Any]:
    """The global batch of a step from its rank batches: all that a generative model could see."""
    longest = max(batch["dialogue_ids"].shape[1] for batch in batches)

    def padded(name: str, value: int) -> bytes:
        rows = [torch.nn.functional.pad(b[name], (0, longest - b[name].shape[1]), value=value) for b in batches]  # type: ignore[literal-required]
        return torch.cat(rows).numpy().tobytes()

    names = ("images", "num_images", "dialogue_lengths", "uids", "weights")
    whole = {name: torch.cat([batch[name] for batch in batches]).numpy().tobytes() for name in names}  # type: ignore[literal-required]
    lists = {name: [item for batch in batches for item in batch[name]] for name in ("keys", "errors")}  # type: ignore[literal-required]
    return {**whole, **lists, "ids": padded("dialogue_ids", 0), "labels": padded("dialogue_labels", -100)}
