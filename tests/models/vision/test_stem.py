"""A convolutional stem gives as many tokens as patches, of each image alone, at the cost that it says."""

import pytest
import torch

from vlm_train.errors import ConfigError
from vlm_train.models.layers import count_flops
from vlm_train.models.vision.stem import ConvStem
from vlm_train.models.vision.vit import ConvVisionTransformer


@pytest.mark.parametrize(("patch_size", "width", "size"), [(2, 8, 8), (4, 24, 12), (8, 48, 48), (16, 64, 32)])
def test_a_token_for_each_patch(patch_size, width, size):
    stem, pixels = ConvStem(patch_size=patch_size, width=width), torch.randn(3, 3, size, size)
    tokens = stem(pixels)
    assert tokens.shape == (3, (size // patch_size) ** 2, width)
    assert torch.allclose(tokens[1], stem(pixels[1:2])[0], atol=1e-5)  # norms see one image
    convolutions = count_flops(stem, pixels[:1])
    assert stem.forward_flops(size) == pytest.approx(convolutions, rel=1e-6)


@pytest.mark.parametrize(("patch_size", "width"), [(6, 48), (8, 40), (1, 8), (0, 8)])
def test_other_sizes_are_refused(patch_size, width):
    with pytest.raises(ConfigError):
        ConvStem(patch_size=patch_size, width=width)


def test_the_tower_is_a_vision_transformer_in_all_else():
    tower = ConvVisionTransformer(image={"size": 16}, patch_size=4, width=16, num_layers=2, num_heads=2)
    pixels = torch.randn(2, 3, 16, 16)
    assert tower.tokens(pixels).shape == (2, 16, 16) and tower(pixels).shape == (2, 16)
    assert tower.forward_flops() == pytest.approx(count_flops(tower, pixels[:1]), rel=1e-6)
