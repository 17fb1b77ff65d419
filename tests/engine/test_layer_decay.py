"""How deep a parameter lies, told from its name alone, and what that leaves of its learning rate."""

from __future__ import annotations

import logging

import pytest
import timm
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vlm_train.engine.layer_decay import layer_factors, layers_of
from vlm_train.engine.optim import AdamW
from vlm_train.errors import ConfigError
from vlm_train.models.dual_encoder import DualEncoder
from vlm_train.models.text.transformer import TextTransformer
from vlm_train.models.vision.resnet import ResNet
from vlm_train.models.vision.vit import VisionTransformer
from vlm_train.objectives.infonce import InfoNCE
from vlm_train.types import ImageSpec, TextSpec

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
SPEC = TextSpec(vocab_size=60, context_length=8, pad_id=0, bos_id=1, eos_id=59)


def vit(num_layers: int = 3, pool: str = "cls") -> VisionTransformer:
    return VisionTransformer(
        image=ImageSpec(size=16), patch_size=8, width=16, num_layers=num_layers, num_heads=2, pool=pool
    )


def text(num_layers: int = 2) -> TextTransformer:
    return TextTransformer(spec=SPEC, width=16, num_layers=num_layers, num_heads=2)


TOWERS = {  # name: (tower, layer of some of its parameters, the layer behind the blocks)
    "vit": (vit, {"class_token": 0, "position": 0, "patch_embed.weight": 0, "pre_norm.bias": 0,
                  "blocks.0.norm1.weight": 1, "blocks.2.mlp.fc2.bias": 3, "post_norm.weight": 4}, 4),
    "vit of one block that pools by attention": (
        lambda: vit(1, "map"), {"position": 0, "blocks.0.mlp.fc1.bias": 1, "post_norm.weight": 2,
                                "attention_pool.mlp.fc2.weight": 2}, 2),
    "text": (text, {"position": 0, "token_embedding.weight": 0, "blocks.1.attention.qkv.weight": 2,
                    "post_norm.bias": 3}, 3),
    "resnet": (lambda: ResNet(image=ImageSpec(size=32), layers=[1, 2, 1, 1], width=16, pool="attention"),
               {"stem.2.0.weight": 0, "blocks.0.body.0.0.weight": 1, "blocks.4.body.0.0.weight": 5,
                "attention_pool.position": 6}, 6),
    "timm vit": (lambda: timm.create_model("vit_tiny_patch16_224", num_classes=0),
                 {"cls_token": 0, "patch_embed.proj.weight": 0, "blocks.0.attn.qkv.weight": 1,
                  "blocks.11.norm1.weight": 12, "norm.weight": 13}, 13),
    "timm efficientnet": (lambda: timm.create_model("tf_efficientnet_lite0", num_classes=0),
                          {"conv_stem.weight": 0, "bn1.weight": 0, "blocks.6.0.conv_pw.weight": 7,
                           "conv_head.weight": 8, "bn2.bias": 8}, 8),
    "timm resnet": (lambda: timm.create_model("resnet18", num_classes=0),
                    {"conv1.weight": 0, "layer1.0.conv1.weight": 1, "layer4.1.bn2.bias": 4}, 5),
    "bert": (lambda: transformers.BertModel(transformers.BertConfig(vocab_size=60, **SMALL)),
             {"embeddings.word_embeddings.weight": 0, "encoder.layer.2.output.dense.weight": 3,
              "pooler.dense.weight": 4}, 4),
    "siglip": (lambda: transformers.SiglipVisionModel(
                   transformers.SiglipVisionConfig(image_size=16, patch_size=8, **SMALL)),
               {"embeddings.patch_embedding.weight": 0, "encoder.layers.1.mlp.fc2.bias": 2,
                "head.mlp.fc1.weight": 4, "post_layernorm.weight": 4}, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", TOWERS)
def test_the_depth_of_our_towers_and_of_foreign_ones(name: str) -> None:
    build, known, top = TOWERS[name]
    with torch.device("meta"):
        names = [name.removeprefix("vision_model.") for name, _ in build().named_parameters()]
    layers, behind = layers_of(names)
    assert {name: layers[name] for name in known} == known and behind == top
    assert set(range(top)) <= set(layers.values()) and list(layers) == names


@given(num_layers=st.integers(1, 30), stem=st.sampled_from(["", "blocks.", "encoder.layer.", "stage"]), data=st.data())
def test_layers_are_counted_from_the_bottom_whatever_their_numbers(num_layers: int, stem: str, data) -> None:
    first = data.draw(st.integers(0, 5))
    inside = [
        f"{stem}{first + n}.{part}" for n in range(num_layers) for part in ("fc1.weight", "fc1.bias", "fc2.weight")
    ]
    layers, top = layers_of(["conv1.weight", *inside, "head.fc1.weight", "head.fc2.weight"])
    assert top == num_layers + 1
    assert [layers[name] for name in inside] == [1 + n for n in range(num_layers) for _ in range(3)]
    assert layers["conv1.weight"] == 0 and layers["head.fc2.weight"] == top


class Learning(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.objective = model, InfoNCE()


def rates_of(optim: AdamW, module: nn.Module) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = optim.build(module).param_groups
    return {names[id(p)]: group["base_lr"] for group in groups for p in group["params"]}


def test_the_group_gives_the_peak_and_the_depth_multiplies_it(caplog: pytest.LogCaptureFixture) -> None:
    module = Learning(DualEncoder(vision=vit(3), text=text(2), embed_dim=8))
    groups = [
        {"pattern": r"model\.vision\..*", "lr": 1e-4, "weight_decay": 0.1},
        {"pattern": ".*", "lr": 1e-3, "weight_decay": 0.1},
    ]
    optim = AdamW(lr=1e-3, layer_decay=0.5, groups=groups)
    logging.getLogger("vlm_train").addHandler(caplog.handler)
    rates = rates_of(optim, module)
    logging.getLogger("vlm_train").removeHandler(caplog.handler)
    assert len(rates) == len(list(module.parameters()))
    for name, lr in {
        "model.vision.position": 1e-4 / 16, "model.vision.patch_embed.weight": 1e-4 / 16,
        "model.vision.blocks.0.norm1.bias": 1e-4 / 8, "model.vision.blocks.2.norm1.bias": 1e-4 / 2,
        "model.vision.post_norm.weight": 1e-4, "model.image_projection.weight": 1e-3,
        "model.text.token_embedding.weight": 1e-3 / 8, "model.text.blocks.1.mlp.fc1.weight": 1e-3 / 2,
        "model.text.post_norm.weight": 1e-3, "model.text_projection.weight": 1e-3, "objective.logit_scale": 1e-3,
    }.items():  # fmt: skip
        assert rates[name] == pytest.approx(lr, rel=1e-12), name
    # nine of the image tower, seven of the text tower and of what is in none
    assert "16 groups of parameters, peak rates 6.25e-06 to 0.001" in caplog.text
    plain = rates_of(AdamW(lr=1e-3, groups=groups), module)
    assert set(plain.values()) == {1e-4, 1e-3}  # the twin: without it the depth does not count


class Flat(nn.Module):
    out_dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)


class Model(nn.Module):
    def __init__(self, vision: nn.Module) -> None:
        super().__init__()
        self.vision, self.head = vision, nn.Linear(3, 3)


def test_a_tower_without_depth_is_named_unless_it_is_frozen() -> None:
    module = Learning(Model(Flat()))
    everything = {"pattern": ".*", "lr": 1e-3, "weight_decay": 0.1}
    with pytest.raises(ConfigError, match="no depth can be seen in the tower vision"):
        rates_of(AdamW(lr=1e-3, layer_decay=0.5, groups=[everything]), module)
    frozen = [{"pattern": r"model\.vision\..*", "frozen": True}, everything]
    assert set(rates_of(AdamW(lr=1e-3, layer_decay=0.5, groups=frozen), module).values()) == {1e-3}


def test_a_model_without_towers_is_refused() -> None:
    with pytest.raises(ConfigError, match="no towers"):
        layer_factors(Model(nn.Linear(3, 3)), 0.5, ["vision.weight"])
