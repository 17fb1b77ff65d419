"""Connectors: the numbers of LLaVA, Idefics2, Idefics3 and BLIP-2 in transformers, and the contract that all keep."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from connector_cases import CASES, CONNECTORS, IN, OUT, distances, make, outcome, patches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, Idefics2Config
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

from vlm_train.errors import ConfigError
from vlm_train.models.connectors.grid_perceiver import places
from vlm_train.models.connectors.perceiver import PerceiverConnector
from vlm_train.models.connectors.qformer import QFormerConnector
from vlm_train.models.connectors.resampler import CrossAttention
from vlm_train.models.layers import count_flops


@pytest.mark.parametrize("case", CASES)
def test_values_and_every_gradient_are_those_of_the_library(case: str) -> None:
    ours, theirs, run, rename = CASES[case]()
    ours.load_state_dict(rename(theirs.state_dict()))
    (mine, my_gradients), (other, gradients) = outcome(ours, ours), outcome(run, theirs)
    assert distances(mine, other)["out"] < 1e-6  # fp32; measured 0
    found = distances({**my_gradients, "x": mine["x"]}, {**rename(gradients), "x": other["x"]})
    assert max(found.values()) < 3e-6, found  # measured 9e-7 (BLIP-2, whose library masks), 5e-7 (Idefics2), 0 to 4e-7


def by_columns(connector: Any) -> Any:
    """InternVL's first shuffle: what stands in a token is the same, but tokens are numbered by columns."""
    shuffle = connector.shuffle
    connector.shuffle = lambda x: shuffle(x).unflatten(1, (connector.side, -1)).transpose(1, 2).flatten(1, 2)
    return connector


def columns_inside(connector: Any) -> Any:
    """The patches inside a token are read by columns."""
    shuffle, factor = connector.shuffle, connector.factor
    connector.shuffle = lambda x: shuffle(x).unflatten(2, (factor, factor, IN)).transpose(2, 3).flatten(2)
    return connector


def blind_to_latents(connector: Any) -> Any:
    """Latents read the patches alone."""

    def forward(attention: CrossAttention, query: Tensor, context: Tensor) -> Tensor:
        return CrossAttention.forward(attention, query, context[:, : -query.shape[1]])

    for block in connector.resampler.blocks:
        block.attention.forward = partial(forward, block.attention)
    return connector


def heads_shared_in_turn(connector: Any) -> Any:
    """Query heads 0, 2 read the first head of keys, not 0, 1."""
    for block in connector.resampler.blocks:
        attend = block.attention.attend
        block.attention.attend = lambda q, k, v, attend=attend, **rest: attend(
            q, k[:, [0, 2, 1, 3]], v[:, [0, 2, 1, 3]], **rest
        )
    return connector


def looking_late(connector: Any) -> Any:
    """The layers that look at patches change places with those that do not."""
    first, second, third = connector.resampler.blocks
    connector.resampler.blocks = nn.ModuleList([second, first, third])
    return connector


def tanh(connector: Any) -> Any:
    connector.layers[1].approximate = "tanh"
    return connector


TWINS = {
    "llava": [tanh],
    "smolvlm": [by_columns, columns_inside],
    "idefics2": [blind_to_latents, heads_shared_in_turn],
    "blip2": [looking_late],
}


@pytest.mark.parametrize(("case", "twin"), [(case, twin) for case, twins in TWINS.items() for twin in twins])
def test_a_connector_that_is_almost_the_librarys_is_noticed(case: str, twin: Any) -> None:
    ours, theirs, run, rename = CASES[case]()
    ours.load_state_dict(rename(theirs.state_dict()))
    wrong = twin(copy.deepcopy(ours))
    with torch.no_grad():
        other = {"out": run(patches())}
        assert distances({"out": ours(patches())}, other)["out"] < 1e-6
        # measured 1.1e-4 for the other GELU, 0.4 to 1.5 for the rest
        assert distances({"out": wrong(patches())}, other)["out"] > 5e-5


@pytest.mark.parametrize("name", CONNECTORS)
def test_half_precision_says_the_same(name: str) -> None:
    connector, x = make(name), patches()
    with torch.no_grad():
        exact = connector(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = connector(x).float()
        low = connector.bfloat16()(x.bfloat16()).float()
    # measured 0.4 to 0.8 % mixed, up to 1 % where the weights are bf16 too
    assert distances({"out": mixed}, {"out": exact})["out"] < 0.03
    assert distances({"out": low}, {"out": exact})["out"] < 0.03


counts = st.integers(1, 4)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(sorted(CONNECTORS)), counts, counts, st.integers(1, 3), counts, st.integers(0, 2), st.booleans())
def test_an_image_becomes_as_many_tokens_as_promised(
    name: str, side: int, factor: int, num_layers: int, num_tokens: int, num_images: int, same: bool
) -> None:
    options: dict[str, dict[str, Any]] = {
        "linear": {},
        "mlp": {"num_layers": num_layers},
        "attention": {"num_layers": num_layers},
        "pixel_shuffle": {"factor": factor},
        "perceiver": {"num_layers": num_layers, "num_latents": num_tokens},
        "grid_perceiver": {"num_layers": num_layers, "num_latents": num_tokens**2},
        "qformer": {"num_layers": num_layers, "num_queries": num_tokens},
    }
    side = side * factor if name == "pixel_shuffle" else side
    connector = make(name, num_patches=side**2, out_dim=IN if same else OUT, **options[name])
    out = connector(torch.randn(num_images, side**2, IN))
    assert out.shape == (num_images, connector.num_tokens, IN if same else OUT)
    expected = {"pixel_shuffle": (side // factor) ** 2, "perceiver": num_tokens, "qformer": num_tokens}
    expected["grid_perceiver"] = num_tokens**2
    assert connector.num_tokens == expected.get(name, side**2)


@pytest.mark.parametrize("name", CONNECTORS)
@pytest.mark.parametrize("width", [IN, OUT])
@pytest.mark.parametrize("side", [4, 6])
def test_flops_are_those_that_torch_counts(name: str, width: int, side: int) -> None:
    connector = make(name, out_dim=width, num_patches=side**2)
    assert connector.forward_flops() == count_flops(connector, torch.zeros(1, side**2, IN))


@pytest.mark.parametrize("name", CONNECTORS)
def test_images_do_not_see_each_other_and_none_at_all_still_reaches_every_weight(name: str) -> None:
    """A rank without an image may take part in a step by an empty slice: gradients, all of them zero."""
    connector, x = make(name).double(), patches(4).double()
    assert torch.allclose(connector(x)[1:3], connector(x[1:3]), atol=1e-12)
    connector(x[:0]).sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in connector.parameters())


@pytest.mark.parametrize("name", CONNECTORS)
def test_every_weight_learns_and_every_patch_is_read(name: str) -> None:
    connector = make(name)
    x = patches()
    out = connector(x)
    gradients = torch.autograd.grad((out * torch.randn_like(out)).sum(), (x, *connector.parameters()))
    assert (gradients[0].abs().amax(2) > 0).all()
    assert all(gradient.any() for gradient in gradients)
    assert 0.1 < out.std() < 10  # of patches of unit variance


@pytest.mark.parametrize("name", CONNECTORS)
@pytest.mark.parametrize("order", [list, reversed])
def test_a_meta_build_is_filled_in_any_order(name: str, order: Any) -> None:
    with torch.device("meta"):
        connector = make(name)
    connector.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.fill_(float("nan"))
    for module in order(list(connector.modules())):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    filled = connector.state_dict()
    for key, value in make(name).state_dict().items():
        assert torch.allclose(filled[key].mean(), value.mean(), atol=0.2), key
        assert torch.allclose(filled[key].std(), value.std(), rtol=0.3), key


def test_latents_that_start_equal_are_told_apart_by_a_reader_that_knows_positions() -> None:
    """Idefics2's start in transformers: one token many times, until a gradient differs by position."""
    connector = make("perceiver", latent_std=0.0)
    assert (connector.resampler.query == 1).all()  # type: ignore[union-attr]
    out = connector(patches())
    assert (out - out[:, :1]).abs().max() < 1e-5 * out.abs().max()
    (out * torch.randn_like(out)).sum().backward()
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.sub_(parameter.grad, alpha=0.01)  # type: ignore[arg-type]
    out = connector(patches())
    assert (out - out[:, :1]).abs().max() > 1e-2 * out.abs().max()
    apart = make("perceiver")(patches())  # the twin, drawn apart
    assert (apart - apart[:, :1]).abs().max() > 1e-2 * apart.abs().max()


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("pixel_shuffle", {"num_patches": 17}, "without a class token"),
        ("pixel_shuffle", {"num_patches": 8}, "8 patches"),
        ("pixel_shuffle", {"factor": 3}, "factor=3"),
        ("pixel_shuffle", {"factor": 0}, "factor=0"),
        ("mlp", {"num_layers": 0}, "num_layers=0"),
        ("attention", {"num_heads": 3}, "multiple of its number of heads"),
        ("perceiver", {"num_kv_heads": 3}, "num_heads=4, num_kv_heads=3"),
        ("perceiver", {"num_latents": 0}, "num_latents=0"),
        ("qformer", {"num_queries": 0}, "num_queries=0"),
        ("qformer", {"num_heads": 5}, "multiple of its number of heads"),
    ],
)
def test_options_that_cannot_be_built_are_refused(name: str, changes: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make(name, **changes)


def test_defaults_are_the_sizes_that_were_published() -> None:
    """As many weights as the connector of Idefics2-8b has, and the Q-Former of BLIP-2, by transformers' defaults."""
    with torch.device("meta"):
        config = Idefics2Config(vision_config={"hidden_size": 1152})
        idefics2, qformer = Idefics2Connector(config), Blip2QFormerModel(Blip2QFormerConfig())
        perceiver = PerceiverConnector(in_dim=1152, out_dim=4096, num_patches=4900, mlp_dim=14336)
        queries = QFormerConnector(in_dim=1408, out_dim=2560, num_patches=257)
    assert (perceiver.num_tokens, queries.num_tokens) == (64, 32)
    assert num_weights(perceiver) == num_weights(idefics2) == 743_219_200
    assert num_weights(queries.resampler) - 32 * 768 == num_weights(qformer) == 105_137_664


def num_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_a_grid_perceiver_knows_places_where_features_say_nothing_of_them() -> None:
    """Patches that are all the same but for one: where that lies shows in the tokens, and begins near it."""
    grid = make("grid_perceiver", num_patches=36, num_latents=9, out_dim=64)
    plain = make("perceiver", num_patches=36, num_latents=9, out_dim=64)
    scenes = torch.randn(1, 1, IN).repeat(36, 36, 1)
    scenes[torch.arange(36), torch.arange(36)] = torch.randn(IN)  # row k: the other one is patch k
    with torch.no_grad():
        spread = {name: each(scenes).std(dim=0).mean().item() for name, each in (("grid", grid), ("plain", plain))}
    assert spread["grid"] > 1e-3 and spread["plain"] < 1e-5, spread  # measured 0.005 and 1e-7
    told = places(3, 6, 64, torch.device("cpu")), places(6, 6, 64, torch.device("cpu"))
    assert torch.allclose(told[1].square().mean(), torch.tensor(1.0))
    nearest = (told[0] @ told[1].T).argmax(dim=1)
    rows, columns = nearest // 6, nearest % 6
    cells = torch.arange(9)
    assert torch.equal(rows // 2, cells // 3) and torch.equal(columns // 2, cells % 3)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"num_latents": 5}, "num_latents=5"), ({"num_patches": 17}, "num_patches=17"), ({"out_dim": 42}, "width 42")],
)
def test_what_makes_no_grid_is_refused(options: dict[str, int], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make("grid_perceiver", **options)
    assert named in str(caught.value.got)
