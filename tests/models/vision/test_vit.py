"""The vision tower: pooling, patches, and what a config may say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlm_train.errors import ConfigError
from vlm_train.models.vision.image import Normalize, as_image_spec
from vlm_train.models.vision.vit import VisionTransformer
from vlm_train.types import CLIP_MEAN, ImageSpec


def make_vit(**changes: Any) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        **{"image": {"size": 32}, "patch_size": 8, "width": 32, "num_layers": 2, "num_heads": 2, **changes}
    )


@pytest.mark.parametrize("pool", ["cls", "mean", "map"])
@pytest.mark.parametrize("pre_norm", [True, False])
def test_every_pooling_gives_one_vector_that_depends_on_every_patch(pool: str, pre_norm: bool) -> None:
    tower = make_vit(pool=pool, pre_norm=pre_norm).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    out = tower(images)
    assert out.shape == (2, tower.out_dim)
    weight = torch.randn(2, 32, dtype=torch.float64)
    gradient = torch.autograd.grad((out * weight).sum(), (images, *tower.parameters()))
    assert (gradient[0].unfold(2, 8, 8).unfold(3, 8, 8).abs().amax(dim=(1, 4, 5)) > 0).all()
    assert all(part.abs().max() > 0 for part in gradient)  # no parameter is left out: DDP would hang on it


def test_patches_are_numbered_row_by_row() -> None:
    tower = make_vit()
    image = torch.zeros(1, 3, 32, 32)
    image[:, :, 8:16, 0:8] = 1  # second row, first column
    is_seen = tower.patch_embed(image)[0].abs().sum(dim=1) > 0
    assert is_seen.nonzero().tolist() == [[4]]


def test_rows_do_not_depend_on_their_neighbours() -> None:
    tower = make_vit(pool="map").double()
    images = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    assert torch.allclose(tower(images)[2:4], tower(images[2:4]), atol=1e-12)


def test_normalize_is_the_formula_and_is_in_no_checkpoint() -> None:
    spec = ImageSpec(size=8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    with torch.device("meta"):
        normalize = Normalize(spec)
    normalize.to_empty(device="cpu").reset_parameters()
    assert (normalize(images) - (images / 255 - mean) / std).abs().max() < 2e-6  # values up to 2; measured 2.4e-7
    assert normalize.state_dict() == {}


def test_image_keys_are_checked() -> None:
    assert as_image_spec({"size": 64}) == ImageSpec(size=64, mean=CLIP_MEAN)
    assert as_image_spec({"size": 64, "mean": [0.5, 0.5, 0.5]}).mean == (0.5, 0.5, 0.5)
    for wrong in ({"sise": 64}, {}, {"size": 64, "means": 1}):
        with pytest.raises(ConfigError, match="wrong or missing key"):
            as_image_spec(wrong)
    assert as_image_spec({"size": 64, "resize": "pad"}).resize == "pad"
    with pytest.raises(ConfigError, match="unknown `resize`"):
        as_image_spec({"size": 64, "resize": "padded"})


def test_sizes_and_pools_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of the patch side") as caught:
        make_vit(image={"size": 30})
    assert "image.size=24" in str(caught.value)
    with pytest.raises(ConfigError, match="unknown pooling"):
        make_vit(pool="max")
