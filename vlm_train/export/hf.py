"""Our dual encoders as folders that transformers loads, and back.

`export_transformers` writes CLIPModel or SiglipModel, whichever holds the towers exactly, then loads the folder with
transformers and measures how far its features and logits are from ours. An export that is not the same model raises.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    SiglipConfig,
    SiglipImageProcessor,
)

from vlm_train.assets import hub_access, resolve_asset
from vlm_train.errors import CheckpointError, ConfigError
from vlm_train.export.card import CERTIFIED_TEXTS, model_card
from vlm_train.export.weights import export_state, family_of, import_state
from vlm_train.models.dual_encoder import DualEncoder
from vlm_train.models.layers import Attention, Block, QuickGELU
from vlm_train.models.text.transformer import TextTransformer
from vlm_train.models.vision.pretrained import spec_of_processor
from vlm_train.models.vision.vit import VisionTransformer
from vlm_train.types import ImageSpec, TextSpec, Tokenizer

TO_TRANSFORMERS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}
FROM_TRANSFORMERS = {theirs: ours for ours, theirs in TO_TRANSFORMERS.items()}
BICUBIC = 3
TOLERANCE = 1e-5  # of unit features in fp32; ViT-B/32 with random weights measures 3e-7, a wrong activation 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """The certificate of an export: `transformers` on the written folder against our model, on a fixed batch.

    `feature_difference`: largest absolute difference of unit-length features; `logit_difference`: of the logits.
    `left_out_bias`: the bias that a CLIPModel has no place for; without it every logit is shifted by one constant,
    which changes no ranking and no softmax.
    """

    directory: str
    family: str
    num_parameters: int
    feature_difference: float
    logit_difference: float
    left_out_bias: float | None = None


def export_transformers(
    model: DualEncoder, *, tokenizer: Tokenizer, logit_scale: Tensor, logit_bias: Tensor | None = None, out: str | Path
) -> ExportReport:
    """Writes config, weights (fp32 safetensors), tokenizer, image processor and card to `out`, and certifies them.

    Args:
        model: two of our transformers; it is not changed.
        tokenizer: the one the model was built with.
        logit_scale: [1], as the objective holds it (a logarithm).
        logit_bias: [1] of the sigmoid objective; None for InfoNCE. SigLIP towers trained without one get 0.
        out: folder to write, made if missing.

    Raises:
        ConfigError: transformers has no model for these towers.
        CheckpointError: the written folder does not reproduce the model.
    """
    family, directory = family_of(model), Path(out)
    reference = copy.deepcopy(model).to("cpu", torch.float32).eval()
    scale = logit_scale.detach().to("cpu", torch.float32)
    bias = None if family == "clip" else torch.zeros(1) if logit_bias is None else logit_bias.detach().cpu().float()
    directory.mkdir(parents=True, exist_ok=True)
    state = export_state(reference, family=family, logit_scale=scale, logit_bias=bias)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    config_of(reference).save_pretrained(directory)
    processor_of(reference.image_spec).save_pretrained(directory)
    tokenizer.save(str(directory))
    if family == "siglip":
        _hide_padding_mask(directory)
    report = _certify(reference, tokenizer, scale, bias, directory)
    if bias is None and logit_bias is not None:
        report = replace(report, left_out_bias=float(logit_bias))
    card = model_card(reference, family, report.feature_difference, left_out_bias=report.left_out_bias)
    (directory / "README.md").write_text(card, encoding="utf-8")
    return report


def import_transformers(path: str) -> tuple[DualEncoder, dict[str, Tensor]]:
    """Our model with the weights of a CLIP or SigLIP of transformers, and its `logit_scale` and `logit_bias`, each [1].

    Args:
        path: local folder or hub name.

    Raises:
        ConfigError: the folder cannot be found, or holds another kind of model.
    """
    location = resolve_asset(path)
    with hub_access(path):
        theirs = AutoModel.from_pretrained(location, dtype=torch.float32, use_safetensors=True)
        processor = AutoImageProcessor.from_pretrained(location)
    family = theirs.config.model_type
    if family not in ("clip", "siglip"):
        raise ConfigError(
            "this model of transformers has no counterpart here",
            got=family,
            allowed=["clip", "siglip"],
            remedy="use its towers through HuggingFaceVision and HuggingFaceText",
        )
    model = model_of(theirs.config, spec_of_processor(processor))
    return model, import_state(model, theirs.state_dict(), family=family)


def config_of(model: DualEncoder) -> CLIPConfig | SiglipConfig:
    """The transformers config that describes `model`."""
    vision, text, is_siglip = model.vision, model.text, family_of(model) == "siglip"
    assert isinstance(vision, VisionTransformer) and isinstance(text, TextTransformer)
    spec = text.text_spec
    vision_config = _tower_config(vision.blocks) | {
        "image_size": vision.image_spec.size,
        "patch_size": vision.patch_size,
    }
    text_config = _tower_config(text.blocks) | {
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.context_length,
        "pad_token_id": spec.pad_id,
        "bos_token_id": spec.bos_id,
        "eos_token_id": spec.eos_id,
    }
    common: dict[str, Any] = {"dtype": "float32"}
    if is_siglip:
        text_config["projection_size"] = model.embed_dim
        common["architectures"] = ["SiglipModel"]
        return SiglipConfig(vision_config=vision_config, text_config=text_config, **common)
    for tower in (vision_config, text_config):
        tower["projection_dim"] = model.embed_dim
    common |= {"architectures": ["CLIPModel"], "projection_dim": model.embed_dim}
    return CLIPConfig(vision_config=vision_config, text_config=text_config, **common)


def _tower_config(blocks: torch.nn.ModuleList) -> dict[str, Any]:
    block = blocks[0]
    assert isinstance(block, Block) and isinstance(block.attention, Attention)
    activation: Any = block.mlp.activation
    is_quick = isinstance(activation, QuickGELU)
    name = "quick_gelu" if is_quick else {"none": "gelu", "tanh": "gelu_tanh"}[activation.approximate]
    return {
        "hidden_size": block.mlp.fc1.in_features,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": block.attention.num_heads,
        "hidden_act": TO_TRANSFORMERS[name],
        "layer_norm_eps": block.norm1.eps,
    }


def model_of(config: Any, image: ImageSpec) -> DualEncoder:
    """Our model, with initial weights, of the shape that a CLIPConfig or SiglipConfig of transformers describes."""
    is_siglip, vision, text = config.model_type == "siglip", config.vision_config, config.text_config
    # Configs written before 2023 declare the end token 2; transformers then reads the highest id, and so do we.
    eos_id = text.vocab_size - 1 if text.eos_token_id == 2 and not is_siglip else text.eos_token_id
    spec = TextSpec(
        vocab_size=text.vocab_size,
        context_length=text.max_position_embeddings,
        pad_id=text.pad_token_id,
        bos_id=text.bos_token_id,
        eos_id=eos_id,
        pad_to_max=is_siglip,
    )
    return DualEncoder(
        vision=VisionTransformer(
            image=image,
            patch_size=vision.patch_size,
            **_tower_arguments(vision),
            pool="map" if is_siglip else "cls",
            pre_norm=not is_siglip,
        ),
        text=TextTransformer(
            spec=spec, **_tower_arguments(text), pool="last" if is_siglip else "eos", causal=not is_siglip
        ),
        embed_dim=text.projection_size if is_siglip else config.projection_dim,
        image_projection="none" if is_siglip else "linear",
        text_bias=is_siglip,
    )


def _tower_arguments(config: Any) -> dict[str, Any]:
    if config.hidden_act not in FROM_TRANSFORMERS:
        raise ConfigError(
            "a tower has an activation that ours do not know",
            got=config.hidden_act,
            allowed=sorted(FROM_TRANSFORMERS),
            remedy="use the tower through HuggingFaceVision or HuggingFaceText",
        )
    return {
        "width": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_dim": config.intermediate_size,
        "activation": FROM_TRANSFORMERS[config.hidden_act],
        "norm_eps": config.layer_norm_eps,
    }


def processor_of(image: ImageSpec) -> CLIPImageProcessor | SiglipImageProcessor:
    """The image processor of transformers that prepares images as our evaluation does."""
    values: dict[str, Any] = {"image_mean": list(image.mean), "image_std": list(image.std), "resample": BICUBIC}
    square = {"height": image.size, "width": image.size}
    if image.resize == "squash":
        return SiglipImageProcessor(size=square, **values)
    return CLIPImageProcessor(size={"shortest_edge": image.size}, crop_size=square, **values)


def _hide_padding_mask(directory: Path) -> None:
    """SigLIP reads its padding: the exported tokenizer must pad to the full length and hand out no mask."""
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"model_input_names": ["input_ids"]}, indent=2), encoding="utf-8")


@torch.no_grad()
def _certify(
    model: DualEncoder, tokenizer: Tokenizer, scale: Tensor, bias: Tensor | None, directory: Path
) -> ExportReport:
    theirs, info = AutoModel.from_pretrained(directory, output_loading_info=True)
    ids, mask = tokenizer(CERTIFIED_TEXTS)
    their_tokens = AutoTokenizer.from_pretrained(directory)(
        CERTIFIED_TEXTS,
        padding="max_length",
        truncation=True,
        max_length=tokenizer.spec.context_length,
        return_tensors="pt",
    )
    size = model.image_spec.size
    images = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image_features, text_features = model.encode_image(images), model.encode_text(ids, mask)
    logits = scale.exp() * image_features @ text_features.T + (0 if bias is None else bias)
    output = theirs.eval()(pixel_values=model.normalize(images), **their_tokens)
    feature_difference = max(
        (output.image_embeds - image_features).abs().max().item(),
        (output.text_embeds - text_features).abs().max().item(),
    )
    are_same_tokens = torch.equal(their_tokens["input_ids"], ids)
    if any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")) or not (
        feature_difference <= TOLERANCE and are_same_tokens
    ):
        raise CheckpointError(
            f"the export in {directory} is not the model that was trained",
            got=f"feature difference {feature_difference:.1e}, same tokens {are_same_tokens}, {info}",
            allowed=f"at most {TOLERANCE:.0e}, the same tokens, no missing or unexpected tensors",
            remedy="report this with the versions of transformers and vlm-train",
        )
    return ExportReport(
        directory=str(directory),
        family=theirs.config.model_type,
        num_parameters=sum(parameter.numel() for parameter in theirs.parameters()),
        feature_difference=feature_difference,
        logit_difference=(output.logits_per_image - logits).abs().max().item(),
    )
