"""A tower of regions: a set of things, of which absent ones do not count."""

from __future__ import annotations

import torch

from vlm_train.models.vision.regions import RegionTransformer


def tower() -> RegionTransformer:
    torch.manual_seed(0)
    return RegionTransformer(image={"size": 32}, num_regions=5, width=32, num_layers=2, num_heads=2).double()


def pictures() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    boxes = torch.randint(0, 1001, (3, 5, 4), generator=generator)
    names = torch.randint(1, 4000, (3, 5, 4), generator=generator)
    regions = torch.cat([boxes, names], dim=2)
    regions[1, 3:] = 0
    regions[2] = 0
    return regions


def test_the_order_of_regions_does_not_count() -> None:
    model, regions = tower(), pictures()
    shuffled = regions[:, [4, 2, 0, 3, 1]]
    assert torch.allclose(model(regions), model(shuffled), atol=1e-12)
    swapped = regions.clone()  # the twin: names with another box are other things
    swapped[:, [0, 1], :4] = regions[:, [1, 0], :4]
    assert not torch.allclose(model(regions)[:2], model(swapped)[:2], atol=1e-3)


def test_absent_regions_do_not_count() -> None:
    model, regions = tower(), pictures()
    other = regions.clone()
    other[1, 3:, :4] = 777  # a box without a class
    assert torch.equal(model(regions), model(other))
    fewer = RegionTransformer(image={"size": 32}, num_regions=3, width=32, num_layers=2, num_heads=2).double()
    fewer.load_state_dict(model.state_dict())
    assert torch.allclose(fewer(regions[1:2, :3]), model(regions)[1:2], atol=1e-12)
    assert torch.isfinite(model(regions)).all()
