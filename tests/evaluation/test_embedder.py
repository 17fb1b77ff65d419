"""The Embedder: unit vectors, trimmed texts, equally many forwards on every rank, the mode restored."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from vlm_train.errors import ConfigError
from vlm_train.evaluation.base import Embedder
from vlm_train.types import Batch, TextSpec


class Words:
    """Lengths of words as token ids."""

    def __init__(self, pad_to_max: bool = False) -> None:
        self.spec = TextSpec(vocab_size=32, context_length=12, pad_id=0, bos_id=None, eos_id=31, pad_to_max=pad_to_max)

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(len(texts), self.spec.context_length, dtype=torch.int64)
        for row, text in enumerate(texts):
            tokens = [len(word) for word in text.split()] + [self.spec.eos_id]
            ids[row, : len(tokens)] = torch.tensor(tokens)
        return ids, ids != 0


class Tiny(nn.Module):
    forward_methods = ("encode_image", "encode_text")

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text, self.dropout = nn.Linear(12, 5), nn.Embedding(32, 5), nn.Dropout(0.5)
        self.text_shapes: list[tuple[int, ...]] = []

    def encode_image(self, images: Tensor) -> Tensor:
        return self.dropout(self.image(images.flatten(1).float()))

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        self.text_shapes.append(tuple(ids.shape))
        return (self.text(ids) * mask[:, :, None]).sum(1)


def embedder(model: nn.Module, *, pad_to_max: bool = False, autocast: torch.dtype | None = None) -> Embedder:
    return Embedder(model=model, tokenizer=Words(pad_to_max), device=torch.device("cpu"), autocast=autocast)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_features_are_unit_fp32_without_graph_and_the_mode_is_restored(autocast: torch.dtype | None) -> None:
    model = Tiny().train()
    images = torch.randint(0, 255, (4, 3, 2, 2), dtype=torch.uint8)
    side = embedder(model, autocast=autocast)
    batch = Batch(images=images)
    first, second = side.images(batch), side.images(batch)
    assert torch.equal(first, second)  # dropout is off
    assert model.training
    assert first.dtype == torch.float32 and not first.requires_grad
    torch.testing.assert_close(first.norm(dim=1), torch.ones(4))
    assert not torch.equal(model.encode_image(images), model.encode_image(images))  # the twin: training mode


def test_texts_are_trimmed_only_where_padding_cannot_matter() -> None:
    trimmed, padded = Tiny(), Tiny()
    texts = ["one two", "a"]
    torch.testing.assert_close(embedder(trimmed).texts(texts), embedder(padded, pad_to_max=True).texts(texts))
    assert trimmed.text_shapes == [(2, 3)] and padded.text_shapes == [(2, 12)]


def test_many_texts_go_in_chunks_and_none_gives_no_rows() -> None:
    model = Tiny()
    texts = [f"{'x' * (i % 9 + 1)} y" for i in range(600)]
    features = embedder(model).texts(texts)
    assert features.shape == (600, 5) and len(model.text_shapes) == 3
    torch.testing.assert_close(features[300:301], embedder(model).texts(texts[300:301]))
    assert embedder(model).texts([]).shape == (0, 5)


def test_a_model_that_cannot_embed_is_refused() -> None:
    with pytest.raises(ConfigError, match="no encode_image and no encode_text"):
        embedder(nn.Linear(2, 2))
