"""Names of tensors: ours <-> transformers (CLIPModel, SiglipModel, LLaVA, Idefics2) <-> open_clip, without arithmetic.

A family is a list of rules, each "our tensor <-> theirs", of six kinds:

    copy       the same tensor
    split      our packed q, k, v rows <-> two or three tensors
    halves     our packed k, v rows <-> two tensors
    transpose  a linear's [out, in] <-> a matrix multiplied from the right [in, out]
    scalar     our [1] <-> a 0-dimensional tensor
    batch      ours <-> the same behind a dimension of size 1

Every rule only cuts, joins or views, so a round trip is equal bit for bit. Temperature and bias live in the objective;
here they go by `logit_scale` and `logit_bias`, beside the model's tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from vlm_train.models.dual_encoder import DualEncoder
from vlm_train.models.lora import plain_names
from vlm_train.models.vision.vit import VisionTransformer

Family = Literal["clip", "siglip", "open_clip", "open_clip_timm", "llava", "idefics2"]
"""`clip`, `siglip`, `llava` and `idefics2` are transformers' names; `open_clip` is open_clip with its own image tower,
`open_clip_timm` with a SigLIP tower of timm."""

BLOCK_IN_TRANSFORMERS = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attention.out": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
PERCEIVER_IN_TRANSFORMERS = {
    "norm_query": "input_latents_norm",
    "norm_context": "input_context_norm",
    "norm_mlp": "post_attention_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.out": "self_attn.o_proj",
}
BLOCK_IN_OPEN_CLIP = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attention.out": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
BLOCK_IN_TIMM = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.qkv": "attn.qkv",
    "attention.out": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


@dataclass(frozen=True, slots=True)
class Rule:
    """One of our tensors and where it goes; `theirs` has two names under `halves`, two or three under `split`, one
    otherwise."""

    ours: str
    theirs: tuple[str, ...]
    kind: Literal["copy", "split", "halves", "transpose", "scalar", "batch"] = "copy"

    def forth(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Our tensor as theirs."""
        if self.kind == "split":
            third = len(tensor) // 3
            sizes = [third] * 3 if len(self.theirs) == 3 else [third, 2 * third]
            return tuple(part.contiguous() for part in tensor.split(sizes))
        if self.kind == "halves":
            return tuple(part.contiguous() for part in tensor.chunk(2))
        if self.kind == "transpose":
            return (tensor.t().contiguous(),)
        if self.kind == "batch":
            return (tensor.unsqueeze(0),)
        return (tensor.reshape(()) if self.kind == "scalar" else tensor,)

    def back(self, *tensors: Tensor) -> Tensor:
        """Their tensors as ours."""
        if self.kind in ("split", "halves"):
            return torch.cat(tensors)
        if self.kind == "transpose":
            return tensors[0].t().contiguous()
        if self.kind == "batch":
            return tensors[0].squeeze(0)
        return tensors[0].reshape(1) if self.kind == "scalar" else tensors[0]


def rules_for(model: nn.Module, family: Family, *, with_bias: bool = False) -> list[Rule]:
    """Every rule of `family` for a model of this depth. `with_bias`: open_clip's models may have a logit bias or not;
    transformers' CLIPModel has none and its SiglipModel always one. `model`: GenerativeModel for `llava` and
    `idefics2`, otherwise DualEncoder."""
    if family == "llava":
        return _llava_rules(model)
    if family == "idefics2":
        return _idefics2_rules(model)
    assert isinstance(model, DualEncoder)
    num_vision, num_text = len(model.vision.blocks), len(model.text.blocks)  # type: ignore[attr-defined]
    if family in ("clip", "siglip"):
        return _transformers_rules(num_vision, num_text, is_siglip=family == "siglip")
    rules = _open_clip_text_rules(num_text, has_bias=model.text_projection.bias is not None)
    rules += [Rule("logit_bias", ("logit_bias",), "scalar")] if with_bias else []
    vision = _timm_vision_rules if family == "open_clip_timm" else _open_clip_vision_rules
    return rules + vision(num_vision)


def _pairs(ours: str, theirs: str, names: Mapping[str, str]) -> list[Rule]:
    return [
        Rule(f"{ours}{a}.{leaf}", (f"{theirs}{b}.{leaf}",)) for a, b in names.items() for leaf in ("weight", "bias")
    ]


def _transformers_rules(num_vision: int, num_text: int, *, is_siglip: bool) -> list[Rule]:
    vision, text = "vision_model.", "text_model."
    rules = [
        Rule("logit_scale", ("logit_scale",), "copy" if is_siglip else "scalar"),
        Rule("vision.patch_embed.weight", (f"{vision}embeddings.patch_embedding.weight",)),
        Rule("vision.position", (f"{vision}embeddings.position_embedding.weight",)),
        Rule("text.token_embedding.weight", (f"{text}embeddings.token_embedding.weight",)),
        Rule("text.position", (f"{text}embeddings.position_embedding.weight",)),
        *_pairs("vision.", vision, {"post_norm": "post_layernorm"}),
        *_pairs("text.", text, {"post_norm": "final_layer_norm"}),
        *_transformers_blocks("vision", vision, num_vision),
        *_transformers_blocks("text", text, num_text),
    ]
    return rules + (_siglip_only() if is_siglip else _clip_only())


def _transformers_blocks(tower: str, prefix: str, depth: int) -> list[Rule]:
    rules = []
    for index in range(depth):
        ours, theirs = f"{tower}.blocks.{index}.", f"{prefix}encoder.layers.{index}."
        rules += _pairs(ours, theirs, BLOCK_IN_TRANSFORMERS)
        for leaf in ("weight", "bias"):
            parts = tuple(f"{theirs}self_attn.{part}_proj.{leaf}" for part in "qkv")
            rules.append(Rule(f"{ours}attention.qkv.{leaf}", parts, "split"))
    return rules


def _clip_front(vision: str) -> list[Rule]:
    return [
        Rule("vision.class_token", (f"{vision}embeddings.class_embedding",)),
        *_pairs("vision.", vision, {"pre_norm": "pre_layrnorm"}),  # the misspelling is transformers' own
    ]


def _prefixed(model: nn.Module, prefixes: Mapping[str, str]) -> list[Rule]:
    """The rules of tensors that have their names already, behind another prefix, adapters merged; `prefixes`: ours ->
    theirs."""
    return [
        Rule(name, (theirs + name.removeprefix(ours),))
        for name in plain_names(model.state_dict())
        for ours, theirs in prefixes.items()
        if name.startswith(ours)
    ]


def _generative_tower(tower: nn.Module, vision: str) -> list[Rule]:
    """Of a tower of ours whose tokens are read; one that was made by transformers has its names already."""
    if not isinstance(tower, VisionTransformer):
        return []
    patches = f"{vision}embeddings.patch_embedding."
    rules = [Rule("vision.patch_embed.bias", (f"{patches}bias",))] if tower.pre_norm is None else _clip_front(vision)
    has_norm = isinstance(tower.post_norm, nn.LayerNorm)  # not where a layer before it is read
    return [
        *rules,
        *(_pairs("vision.", vision, {"post_norm": "post_layernorm"}) if has_norm else []),
        Rule("vision.patch_embed.weight", (f"{patches}weight",)),
        Rule("vision.position", (f"{vision}embeddings.position_embedding.weight",)),
        *_transformers_blocks("vision", vision, len(tower.blocks)),
    ]


def _llava_rules(model: nn.Module) -> list[Rule]:
    vision, connector = "model.vision_tower.", "model.multi_modal_projector."
    prefixes = {"vision.network.": vision, "connector.layers.0.": f"{connector}linear_1.",
                "connector.layers.2.": f"{connector}linear_2.", "text.network.model.": "model.language_model.",
                "text.network.lm_head.": "lm_head."}  # fmt: skip
    return [*_prefixed(model, prefixes), *_generative_tower(cast(nn.Module, model.vision), vision)]


def _idefics2_rules(model: nn.Module) -> list[Rule]:
    vision = "model.vision_model."
    prefixes = {"vision.network.": vision, "text.network.model.": "model.text_model.",
                "text.network.lm_head.": "lm_head."}  # fmt: skip
    ours, theirs = "connector.resampler.", "model.connector.perceiver_resampler."
    rules = [
        *_prefixed(model, prefixes),
        *_generative_tower(cast(nn.Module, model.vision), vision),
        *_gated("connector.project.", "model.connector.modality_projection."),
        Rule(f"{ours}query", (f"{theirs}latents",)),
        Rule(f"{ours}norm_last.weight", (f"{theirs}norm.weight",)),
    ]
    for index in range(len(cast(Any, model).connector.resampler.blocks)):
        block, layer = f"{ours}blocks.{index}.", f"{theirs}layers.{index}."
        rules += [Rule(f"{block}{a}.weight", (f"{layer}{b}.weight",)) for a, b in PERCEIVER_IN_TRANSFORMERS.items()]
        packed = (f"{layer}self_attn.k_proj.weight", f"{layer}self_attn.v_proj.weight")
        rules += [Rule(f"{block}attention.key_value.weight", packed, "halves"), *_gated(f"{block}mlp.", f"{layer}mlp.")]
    return rules


def _gated(ours: str, theirs: str) -> list[Rule]:
    return [Rule(f"{ours}{part}.weight", (f"{theirs}{part}_proj.weight",)) for part in ("gate", "up", "down")]


def _clip_only() -> list[Rule]:
    return [
        *_clip_front("vision_model."),
        Rule("image_projection.weight", ("visual_projection.weight",)),
        Rule("text_projection.weight", ("text_projection.weight",)),
    ]


def _siglip_only() -> list[Rule]:
    ours, theirs = "vision.attention_pool.", "vision_model.head."
    return [
        Rule("logit_bias", ("logit_bias",)),
        Rule("vision.patch_embed.bias", ("vision_model.embeddings.patch_embedding.bias",)),
        Rule(f"{ours}latent", (f"{theirs}probe",)),
        Rule(f"{ours}attention.qkv.weight", (f"{theirs}attention.in_proj_weight",)),
        Rule(f"{ours}attention.qkv.bias", (f"{theirs}attention.in_proj_bias",)),
        *_pairs(ours, theirs, {"attention.out": "attention.out_proj", "norm": "layernorm"}),
        *_pairs(ours, theirs, {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}),
        *_pairs("", "text_model.", {"text_projection": "head"}),
    ]


def _open_clip_blocks(tower: str, prefix: str, depth: int) -> list[Rule]:
    rules = []
    for index in range(depth):
        ours, theirs = f"{tower}.blocks.{index}.", f"{prefix}transformer.resblocks.{index}."
        rules += _pairs(ours, theirs, BLOCK_IN_OPEN_CLIP)
        rules += [Rule(f"{ours}attention.qkv.{leaf}", (f"{theirs}attn.in_proj_{leaf}",)) for leaf in ("weight", "bias")]
    return rules


def _open_clip_text_rules(depth: int, *, has_bias: bool) -> list[Rule]:
    projection = _pairs("", "", {"text_projection": "text_projection"}) if has_bias else []
    return [
        Rule("logit_scale", ("logit_scale",), "scalar"),
        Rule("text.token_embedding.weight", ("token_embedding.weight",)),
        Rule("text.position", ("positional_embedding",)),
        *_pairs("text.", "", {"post_norm": "ln_final"}),
        *(projection or [Rule("text_projection.weight", ("text_projection",), "transpose")]),
        *_open_clip_blocks("text", "", depth),
    ]


def _open_clip_vision_rules(depth: int) -> list[Rule]:
    return [
        Rule("vision.patch_embed.weight", ("visual.conv1.weight",)),
        Rule("vision.class_token", ("visual.class_embedding",)),
        Rule("vision.position", ("visual.positional_embedding",)),
        *_pairs("vision.", "visual.", {"pre_norm": "ln_pre", "post_norm": "ln_post"}),
        Rule("image_projection.weight", ("visual.proj",), "transpose"),
        *_open_clip_blocks("vision", "visual.", depth),
    ]


def _timm_vision_rules(depth: int) -> list[Rule]:
    trunk = "visual.trunk."
    ours, theirs = "vision.attention_pool.", f"{trunk}attn_pool."
    rules = [
        *_pairs("vision.", trunk, {"patch_embed": "patch_embed.proj", "post_norm": "norm"}),
        Rule("vision.position", (f"{trunk}pos_embed",), "batch"),
        Rule(f"{ours}latent", (f"{theirs}latent",)),
        *_pairs(ours, theirs, {"attention.out": "proj", "norm": "norm", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}),
    ]
    for leaf in ("weight", "bias"):
        rules.append(Rule(f"{ours}attention.qkv.{leaf}", (f"{theirs}q.{leaf}", f"{theirs}kv.{leaf}"), "split"))
    for index in range(depth):
        rules += _pairs(f"vision.blocks.{index}.", f"{trunk}blocks.{index}.", BLOCK_IN_TIMM)
    return rules
