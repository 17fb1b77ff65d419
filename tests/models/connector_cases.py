"""Small connectors, and what in transformers and torch they have the numbers of, with our names for its weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, Idefics2Config, Idefics3Config, LlavaConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector

from vlm_train.models.connectors.attention import SelfAttentionConnector
from vlm_train.models.connectors.base import Connector
from vlm_train.models.connectors.grid_perceiver import GridPerceiverConnector
from vlm_train.models.connectors.linear import LinearConnector, MLPConnector
from vlm_train.models.connectors.perceiver import PerceiverConnector
from vlm_train.models.connectors.pixel_shuffle import PixelShuffleConnector
from vlm_train.models.connectors.qformer import QFormerConnector

IN, OUT, PATCHES, IMAGES = 24, 40, 16, 3
TEXT = {"hidden_size": OUT, "intermediate_size": 56, "num_attention_heads": 4, "num_key_value_heads": 2}
Weights = dict[str, Tensor]

CONNECTORS: dict[str, Callable[..., Connector]] = {
    "linear": LinearConnector,
    "mlp": MLPConnector,
    "attention": partial(SelfAttentionConnector, num_heads=4),
    "pixel_shuffle": PixelShuffleConnector,
    "perceiver": partial(PerceiverConnector, num_latents=5, num_heads=4, head_dim=12, num_kv_heads=2),
    "grid_perceiver": partial(GridPerceiverConnector, num_latents=4, num_heads=4, head_dim=12, num_kv_heads=2),
    "qformer": partial(QFormerConnector, num_queries=5, num_layers=3, num_heads=4, width=32),
}


def make(name: str, **changes: Any) -> Connector:
    torch.manual_seed(0)
    return CONNECTORS[name](**{"in_dim": IN, "out_dim": OUT, "num_patches": PATCHES, **changes})


def patches(num_images: int = IMAGES, width: int = IN) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_images, PATCHES, width, generator=generator, requires_grad=True)


def drawn(theirs: nn.Module) -> nn.Module:
    """Every weight of theirs drawn anew, since some start as ones or zeros."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in theirs.parameters():
            is_vector = parameter.ndim < 2
            scale = 0.3 if is_vector else parameter.shape[-1] ** -0.5
            parameter.copy_(is_vector + scale * torch.empty_like(parameter).normal_(generator=generator))
    return theirs.eval()


def outcome(run: Callable[[Tensor], Tensor], module: nn.Module) -> tuple[Weights, Weights]:
    """{the output, the gradient to the input}, and the gradients to the weights."""
    x, names = patches(), [name for name, _ in module.named_parameters()]
    out = run(x)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    gradients = torch.autograd.grad((out * pull).sum(), (x, *module.parameters()))
    return {"out": out.detach(), "x": gradients[0]}, dict(zip(names, gradients[1:], strict=True))


def distances(ours: Weights, theirs: Weights) -> dict[str, float]:
    """Largest difference by name, as a part of the largest number."""
    assert ours.keys() == theirs.keys()
    return {name: float((ours[name] - other).abs().max() / other.abs().max()) for name, other in theirs.items()}


def renamed(names: dict[str, str], theirs: Weights) -> Weights:
    """Theirs with each piece of a name replaced by ours."""
    ours = {}
    for name, value in theirs.items():
        for piece, own in names.items():
            name = name.replace(piece, own)
        ours[name] = value
    return ours


Case = tuple[Connector, nn.Module, Callable[[Tensor], Tensor], Callable[[Weights], Weights]]


def llava() -> Case:
    config = LlavaConfig(vision_config={"hidden_size": IN}, text_config=TEXT)
    theirs = drawn(LlavaMultiModalProjector(config))
    ours = {"linear_1": "layers.0", "linear_2": "layers.2"}
    return make("mlp"), theirs, theirs, partial(renamed, ours)


def shuffled(config: type, connector: type) -> Case:
    vision = {"hidden_size": IN, "num_attention_heads": 2}
    theirs = drawn(connector(config(vision_config=vision, text_config=TEXT, scale_factor=2)))
    ours = make("pixel_shuffle")
    return ours, theirs, theirs, lambda state: {"project.weight": state["modality_projection.proj.weight"]}


def perceiver_names(state: Weights) -> Weights:
    """Of Idefics2's connector, of any depth."""
    ours = {"resampler.query": state["perceiver_resampler.latents"]}
    ours["resampler.norm_last.weight"] = state["perceiver_resampler.norm.weight"]
    places = {"project.": "modality_projection."}
    for layer in range(sum(name.endswith("k_proj.weight") for name in state)):
        block, other = f"resampler.blocks.{layer}.", f"perceiver_resampler.layers.{layer}."
        places[f"{block}mlp."] = f"{other}mlp."
        ours[f"{block}norm_query.weight"] = state[f"{other}input_latents_norm.weight"]
        ours[f"{block}norm_context.weight"] = state[f"{other}input_context_norm.weight"]
        ours[f"{block}norm_mlp.weight"] = state[f"{other}post_attention_layernorm.weight"]
        q, k, v, out = (state[f"{other}self_attn.{part}_proj.weight"] for part in "qkvo")
        ours |= {f"{block}attention.query.weight": q, f"{block}attention.out.weight": out}
        ours[f"{block}attention.key_value.weight"] = torch.cat([k, v])
    for place, other in places.items():
        ours |= {f"{place}{part}.weight": state[f"{other}{part}_proj.weight"] for part in ("gate", "up", "down")}
    return ours


def idefics2() -> Case:
    perceiver = {
        "hidden_size": OUT,
        "resampler_n_latents": 5,
        "resampler_depth": 3,
        "resampler_n_heads": 4,
        "resampler_head_dim": 12,
        "num_key_value_heads": 2,
    }
    config = Idefics2Config(vision_config={"hidden_size": IN}, text_config=TEXT, perceiver_config=perceiver)
    theirs = drawn(Idefics2Connector(config))
    return make("perceiver", mlp_dim=56), theirs, lambda x: theirs(x, torch.ones(x.shape[:2])), perceiver_names


class Blip2Queries(nn.Module):
    """What transformers keeps in three places: the queries, the Q-Former and the projection to the language model."""

    def __init__(self) -> None:
        super().__init__()
        config = Blip2QFormerConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=128,
            encoder_hidden_size=IN,
        )
        self.query_tokens = nn.Parameter(torch.zeros(1, 5, 32))
        self.qformer = Blip2QFormerModel(config)
        self.language_projection = nn.Linear(32, OUT)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.query_tokens.expand(len(x), -1, -1)
        read = self.qformer(queries, encoder_hidden_states=x, encoder_attention_mask=torch.ones(x.shape[:2]))
        return self.language_projection(read.last_hidden_state)


def blip2() -> Case:
    theirs = drawn(Blip2Queries())

    def rename(state: Weights) -> Weights:
        ours = {"resampler.query": state["query_tokens"][0]}
        for kind in ("weight", "bias"):
            ours[f"project.{kind}"] = state[f"language_projection.{kind}"]
            ours[f"resampler.norm_first.{kind}"] = state[f"qformer.layernorm.{kind}"]
            for layer in range(3):
                block, other = f"resampler.blocks.{layer}.", f"qformer.encoder.layer.{layer}."
                q, k, v = (state[f"{other}attention.attention.{part}.{kind}"] for part in ("query", "key", "value"))
                ours[f"{block}attention.qkv.{kind}"] = torch.cat([q, k, v])
                ours[f"{block}attention.out.{kind}"] = state[f"{other}attention.output.dense.{kind}"]
                ours[f"{block}norm1.{kind}"] = state[f"{other}attention.output.LayerNorm.{kind}"]
                ours[f"{block}mlp.fc1.{kind}"] = state[f"{other}intermediate_query.dense.{kind}"]
                ours[f"{block}mlp.fc2.{kind}"] = state[f"{other}output_query.dense.{kind}"]
                ours[f"{block}norm2.{kind}"] = state[f"{other}output_query.LayerNorm.{kind}"]
                if layer % 2:
                    continue
                other += "crossattention."
                q, k, v = (state[f"{other}attention.{part}.{kind}"] for part in ("query", "key", "value"))
                ours[f"{block}cross_attention.query.{kind}"] = q
                ours[f"{block}cross_attention.key_value.{kind}"] = torch.cat([k, v])
                ours[f"{block}cross_attention.out.{kind}"] = state[f"{other}output.dense.{kind}"]
                ours[f"{block}norm_cross.{kind}"] = state[f"{other}output.LayerNorm.{kind}"]
        return ours

    return make("qformer"), theirs, theirs, rename


def torch_encoder() -> Case:
    layer = nn.TransformerEncoderLayer(OUT, 4, 4 * OUT, 0.0, "gelu", batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    project = nn.Linear(IN, OUT)
    theirs = drawn(nn.ModuleDict({"project": project, "blocks": encoder}))
    names = {
        "blocks.layers": "blocks",
        "self_attn.in_proj_": "attention.qkv.",
        "self_attn.out_proj": "attention.out",
        "linear": "mlp.fc",
    }
    return make("attention"), theirs, lambda x: encoder(project(x)), partial(renamed, names)


CASES: dict[str, Callable[[], Case]] = {
    "llava": llava,
    "idefics3": partial(shuffled, Idefics3Config, Idefics3Connector),
    "smolvlm": partial(shuffled, SmolVLMConfig, SmolVLMConnector),
    "idefics2": idefics2,
    "blip2": blip2,
    "torch": torch_encoder,
}
