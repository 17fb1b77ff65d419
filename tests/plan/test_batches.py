"""What a sample holds at most, and batches of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vlm_train.plan.batches import Sample, Zeros, largest_sample, make_batch
from vlm_train.types import IMAGE_ID, DialogueSpec, ImageSpec


def answerer(context_length: int) -> Any:
    """At most two pictures, each of up to four tiles with an overview, of nine tokens each."""
    spec = DialogueSpec(context_length=context_length, num_image_tokens=9, max_images=2, max_tiles=4, tile_size=8)
    return SimpleNamespace(dialogue=spec, tokens_per_image=9, image_spec=ImageSpec(size=8), modalities=())


@pytest.mark.parametrize(("context_length", "images"), [(200, 10), (50, 5), (12, 1)])
def test_a_dialogue_has_as_many_images_as_it_has_room_for(context_length: int, images: int) -> None:
    model = answerer(context_length)
    sample = largest_sample(model, 0)
    assert sample == Sample(tokens=context_length, images=images)
    batch = make_batch(Zeros(), SimpleNamespace(model=model), sample, 3)
    assert batch["images"].shape == (3, images, 3, 8, 8)
    assert (batch["dialogue_ids"] == IMAGE_ID).sum(dim=1).tolist() == 3 * [9 * images]
    assert batch["num_images"].tolist() == 3 * [images]


def test_a_pair_has_the_longest_text_and_all_hard_captions() -> None:
    model = SimpleNamespace(text_spec=SimpleNamespace(context_length=32), image_spec=ImageSpec(size=8), modalities=())
    batch = make_batch(Zeros(), SimpleNamespace(model=model), largest_sample(model, 2), 3)
    assert batch["text_ids"].shape == (3, 32) and batch["hard_text_ids"].shape == (3, 2, 32)
    assert batch["images"].shape == (3, 3, 8, 8) and not batch["images"].any()
