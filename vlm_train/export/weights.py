"""Names and tensors: ours <-> transformers (CLIPModel, SiglipModel) <-> open_clip, both ways, without arithmetic.

A family is a list of rules, each "our tensor <-> theirs", of four kinds:

    copy       the same tensor
    split      our packed q, k, v rows <-> three tensors
    transpose  a linear's [out, in] <-> a matrix multiplied from the right [in, out]
    scalar     our [1] <-> a 0-dimensional tensor

Every rule only cuts, joins or views, so a round trip is equal bit for bit. Nothing may be left over on either side.
Temperature and bias live in the objective; here they go by `logit_scale` and `logit_bias`, beside the model's tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlm_train.errors import CheckpointError, ConfigError
from vlm_train.models.dual_encoder import DualEncoder
from vlm_train.models.text.transformer import TextTransformer
from vlm_train.models.vision.vit import VisionTransformer

Family = Literal["clip", "siglip", "open_clip"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One of our tensors and where it goes; `theirs` has three names under `split`, one otherwise."""

    ours: str
    theirs: tuple[str, ...]
    kind: Literal["copy", "split", "transpose", "scalar"] = "copy"

    def forth(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Our tensor as theirs."""
        if self.kind == "split":
            return tuple(part.contiguous() for part in tensor.chunk(3))
        if self.kind == "transpose":
            return (tensor.t().contiguous(),)
        return (tensor.reshape(()) if self.kind == "scalar" else tensor,)

    def back(self, *tensors: Tensor) -> Tensor:
        """Their tensors as ours."""
        if self.kind == "split":
            return torch.cat(tensors)
        if self.kind == "transpose":
            return tensors[0].t().contiguous()
        return tensors[0].reshape(1) if self.kind == "scalar" else tensors[0]


def family_of(model: DualEncoder) -> Literal["clip", "siglip"]:
    """The transformers family that holds `model` exactly.

    Raises:
        ConfigError: no family does; names every part that stands in the way.
    """
    vision, text = model.vision, model.text
    if not isinstance(vision, VisionTransformer) or not isinstance(text, TextTransformer):
        names = f"vision {type(vision).__name__}, text {type(text).__name__}"
        raise _not_exportable({names: "VisionTransformer and TextTransformer"})
    has_projection = model.image_projection is not None
    if vision.pool == "map":
        wanted = {
            f"vision.pre_norm={vision.pre_norm is not None}": (vision.pre_norm is None, "False"),
            f"text.pool={text.pool}": (text.pool == "last", "last"),
            f"text.causal={text.causal}": (not text.causal, "False"),
            f"image_projection={'linear' if has_projection else 'none'}": (not has_projection, "none"),
            f"text_bias={model.text_projection.bias is not None}": (model.text_projection.bias is not None, "True"),
        }
    else:
        # transformers reads the largest id instead of the end id when that is 2 (a rule for its oldest checkpoints)
        wanted = {
            f"vision.pool={vision.pool}": (vision.pool == "cls", "cls (CLIP) or map (SigLIP)"),
            f"vision.pre_norm={vision.pre_norm is not None}": (vision.pre_norm is not None, "True"),
            f"text.pool={text.pool}": (text.pool == "eos", "eos"),
            f"text.causal={text.causal}": (text.causal, "True"),
            f"image_projection={'linear' if has_projection else 'none'}": (has_projection, "linear"),
            f"text_bias={model.text_projection.bias is not None}": (model.text_projection.bias is None, "False"),
            f"eos_id={text.text_spec.eos_id}": (text.text_spec.eos_id != 2, "any id but 2"),
        }
    wrong = {got: allowed for got, (fits, allowed) in wanted.items() if not fits}
    if wrong:
        raise _not_exportable(wrong)
    return "siglip" if vision.pool == "map" else "clip"


def _not_exportable(wrong: Mapping[str, str]) -> ConfigError:
    return ConfigError(
        "transformers has no model that holds these towers exactly",
        got="; ".join(wrong),
        allowed="; ".join(f"{allowed} instead of {got}" for got, allowed in wrong.items()),
        remedy="train with model=clip_* or model=siglip_* to export; other models are used through `vlm-train predict`",
    )


def export_state(
    model: DualEncoder, *, family: Family, logit_scale: Tensor, logit_bias: Tensor | None = None
) -> dict[str, Tensor]:
    """The model's tensors under the names of `family`, detached copies on the CPU.

    Args:
        model: towers that `family` can hold.
        family: `clip` and `siglip` are transformers' names, `open_clip` is open_clip's CLIP.
        logit_scale: [1], the logarithm of the temperature's inverse.
        logit_bias: [1]; only SigLIP has it.

    Raises:
        CheckpointError: tensors without a rule, or rules without a tensor.
    """
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    state["logit_scale"] = logit_scale.detach().cpu()
    if logit_bias is not None:
        state["logit_bias"] = logit_bias.detach().cpu()
    rules = rules_for(model, family)
    _check_names(state, {rule.ours for rule in rules}, side="our model")
    return {
        name: tensor.clone()
        for rule in rules
        for name, tensor in zip(rule.theirs, rule.forth(state[rule.ours]), strict=True)
    }


def import_state(model: DualEncoder, state: Mapping[str, Tensor], *, family: Family) -> dict[str, Tensor]:
    """Loads a state dict of `family` into `model`; returns `logit_scale` [1] and, for SigLIP, `logit_bias` [1].

    Raises:
        CheckpointError: names or shapes that do not fit.
    """
    rules = rules_for(model, family)
    _check_names(state, {name for rule in rules for name in rule.theirs}, side=f"the {family} checkpoint")
    ours = {rule.ours: rule.back(*(state[name] for name in rule.theirs)) for rule in rules}
    extra: dict[str, Tensor] = {name: ours.pop(name) for name in ("logit_scale", "logit_bias") if name in ours}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = {name: tuple(tensor.shape) for name, tensor in ours.items() if tuple(tensor.shape) != shapes[name]}
    if wrong:
        raise CheckpointError(
            f"a {family} checkpoint has tensors of another shape",
            got=wrong,
            allowed={name: shapes[name] for name in wrong},
            remedy="build the model with the sizes of the checkpoint",
        )
    model.load_state_dict(ours)
    return extra


def _check_names(state: Mapping[str, Tensor], expected: set[str], *, side: str) -> None:
    if state.keys() != expected:
        raise CheckpointError(
            f"the tensors of {side} are not those of this model",
            got=f"unexpected {sorted(state.keys() - expected)[:5]}, missing {sorted(expected - state.keys())[:5]}",
            remedy="check the number of layers, the pooling and the family",
        )


def rules_for(model: DualEncoder, family: Family) -> list[Rule]:
    """Every rule of `family` for a model of this depth."""
    num_vision, num_text = len(model.vision.blocks), len(model.text.blocks)  # type: ignore[attr-defined]
    if family == "open_clip":
        return _open_clip_rules(num_vision, num_text)
    return _transformers_rules(num_vision, num_text, is_siglip=family == "siglip")


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
    ]
    block = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attention.out": "self_attn.out_proj"}
    block |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for tower, prefix, depth in (("vision", vision, num_vision), ("text", text, num_text)):
        for index in range(depth):
            ours, theirs = f"{tower}.blocks.{index}.", f"{prefix}encoder.layers.{index}."
            rules += _pairs(ours, theirs, block)
            for leaf in ("weight", "bias"):
                parts = tuple(f"{theirs}self_attn.{part}_proj.{leaf}" for part in "qkv")
                rules.append(Rule(f"{ours}attention.qkv.{leaf}", parts, "split"))
    return rules + (_siglip_only() if is_siglip else _clip_only())


def _clip_only() -> list[Rule]:
    return [
        Rule("vision.class_token", ("vision_model.embeddings.class_embedding",)),
        *_pairs("vision.", "vision_model.", {"pre_norm": "pre_layrnorm"}),  # the misspelling is transformers' own
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


def _open_clip_rules(num_vision: int, num_text: int) -> list[Rule]:
    rules = [
        Rule("logit_scale", ("logit_scale",), "scalar"),
        Rule("vision.patch_embed.weight", ("visual.conv1.weight",)),
        Rule("vision.class_token", ("visual.class_embedding",)),
        Rule("vision.position", ("visual.positional_embedding",)),
        *_pairs("vision.", "visual.", {"pre_norm": "ln_pre", "post_norm": "ln_post"}),
        Rule("image_projection.weight", ("visual.proj",), "transpose"),
        Rule("text.token_embedding.weight", ("token_embedding.weight",)),
        Rule("text.position", ("positional_embedding",)),
        *_pairs("text.", "", {"post_norm": "ln_final"}),
        Rule("text_projection.weight", ("text_projection",), "transpose"),
    ]
    block = {"norm1": "ln_1", "norm2": "ln_2", "attention.out": "attn.out_proj"}
    block |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for tower, prefix, depth in (("vision", "visual.", num_vision), ("text", "", num_text)):
        for index in range(depth):
            ours, theirs = f"{tower}.blocks.{index}.", f"{prefix}transformer.resblocks.{index}."
            rules += _pairs(ours, theirs, block)
            for leaf in ("weight", "bias"):
                rules.append(Rule(f"{ours}attention.qkv.{leaf}", (f"{theirs}attn.in_proj_{leaf}",)))
    return rules
