"""transformers' CLIPModel and SiglipModel: our models as folders that it loads, and its folders as models of ours."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
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

from vlm_train.assets import hub_access
from vlm_train.errors import CheckpointError
from vlm_train.export.certificate import Encoded, Trained
from vlm_train.export.foreign import Foreign
from vlm_train.export.rules import Family
from vlm_train.export.towers import (
    Node,
    clip_node,
    image_node,
    not_expressible,
    not_readable,
    parts_of,
    require,
    shape_of,
    siglip_node,
    towers_of,
)
from vlm_train.export.weights import export_state
from vlm_train.models.dual_encoder import DualEncoder
from vlm_train.models.vision.pretrained import spec_of_processor
from vlm_train.types import ImageSpec, TextSpec

NAME = "transformers"
TO_TRANSFORMERS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}
FROM_TRANSFORMERS = {theirs: ours for ours, theirs in TO_TRANSFORMERS.items()}
BICUBIC = 3
CLIP_PARTS = {
    "vision.pool": "cls",
    "vision.pre_norm": True,
    "text.pool": "eos",
    "text.causal": True,
    "image_projection": "linear",
    "text_bias": False,
}
SIGLIP_PARTS = {
    "vision.pool": "map",
    "vision.pre_norm": False,
    "text.pool": "last",
    "text.causal": False,
    "image_projection": "none",
    "text_bias": True,
}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "vocab.txt", "tokenizer.model")


class TransformersModel:
    """A folder, or a name on the hub, in the hands of transformers."""

    name = NAME
    auto: Any = AutoModel

    def __init__(self, location: str | Path) -> None:
        self.location = location
        try:
            with hub_access(str(location)):
                self.model, info = self.auto.from_pretrained(
                    location, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
                )
        except (RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
            what = f"transformers cannot load the weights in {location}"
            raise CheckpointError(what, got=str(error).strip().splitlines()[0]) from error
        self.model.eval()
        faults = {kind: sorted(map(str, names)) for kind, names in info.items() if names and kind.endswith("_keys")}
        if faults:
            raise CheckpointError(
                f"transformers finds other tensors in {location} than its config describes", got=faults
            )

    def encode(self, pixels_B3SS: Tensor, ids_BT: Tensor) -> Encoded:
        """See `Library.encode`."""
        output = self.model(pixel_values=pixels_B3SS, input_ids=ids_BT)
        return Encoded(images=output.image_embeds, texts=output.text_embeds, logits=output.logits_per_image)

    def tokenize(self, texts: list[str]) -> Tensor | None:
        """See `Library.tokenize`."""
        length = self.model.config.text_config.max_position_embeddings
        if not has_tokenizer(self.location):
            return None
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.location, trust_remote_code=False)
        except ImportError:  # a class for sentencepiece, which is not installed
            return None
        found = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        ids: Tensor = found["input_ids"]
        return ids

    def prepare(self, picture: Image.Image) -> Tensor:
        """See `Library.prepare`."""
        processor = AutoImageProcessor.from_pretrained(self.location, backend="pil")
        pixels: Tensor = processor(picture, return_tensors="pt")["pixel_values"][0]
        return pixels


def has_tokenizer(location: str | Path) -> bool:
    """Whether a folder holds a tokenizer; of a name on the hub it is taken for granted."""
    return not Path(location).is_dir() or any((Path(location) / name).is_file() for name in TOKENIZER_FILES)


def family_of(model: DualEncoder) -> Family:
    """The transformers family that holds `model` exactly.

    Raises:
        ConfigError: no family does; names every part that stands in the way.
    """
    towers_of(model, NAME)
    parts = parts_of(model)
    if parts["vision.pool"] == "map":
        require(NAME, parts, SIGLIP_PARTS)
        return "siglip"
    require(NAME, parts, CLIP_PARTS)
    if model.text_spec.eos_id == 2:  # transformers then reads the largest id (a rule for its oldest checkpoints)
        raise not_expressible(NAME, [("eos_id=2", False, "any other id")])
    return "clip"


def write(trained: Trained, directory: Path) -> str:
    """Writes config, weights, tokenizer and image processor; returns the family. Raises ConfigError."""
    family = family_of(trained.model)
    bias = trained.logit_bias
    if family == "clip":
        bias = None
    elif bias is None:
        bias = torch.zeros(1)
    directory.mkdir(parents=True, exist_ok=True)
    state = export_state(trained.model, family=family, logit_scale=trained.logit_scale, logit_bias=bias)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    config_of(trained.model).save_pretrained(directory)
    processor_of(trained.model.image_spec).save_pretrained(directory)
    assert trained.tokenizer is not None
    trained.tokenizer.save(str(directory))
    if family == "siglip":
        _hide_padding_mask(directory)
    return family


def config_of(model: DualEncoder) -> CLIPConfig | SiglipConfig:
    """The transformers config that describes `model`."""
    is_siglip = family_of(model) == "siglip"
    vision, text = towers_of(model, NAME)
    spec = text.text_spec
    vision_config = their_tower(shape_of(vision.blocks)) | {
        "image_size": vision.image_spec.size,
        "patch_size": vision.patch_size,
    }
    text_config = their_tower(shape_of(text.blocks)) | {
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


def their_tower(shape: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a tower's config for what `shape_of` gives."""
    return {
        "hidden_size": shape["width"],
        "intermediate_size": shape["mlp_dim"],
        "num_hidden_layers": shape["num_layers"],
        "num_attention_heads": shape["num_heads"],
        "hidden_act": TO_TRANSFORMERS[shape["activation"]],
        "layer_norm_eps": shape["norm_eps"],
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


def read(location: str, config: Any, processor: Any) -> Foreign:
    """The CLIPModel or SiglipModel there, read but not yet ours; the others as `read_config` gives them.

    Raises:
        ConfigError: it is or has something that our towers are not.
    """
    node = node_of(config, spec_of_processor(processor))
    theirs = TransformersModel(location)
    return Foreign(
        family=config.model_type,
        node=node,
        spec=spec_of(config),
        state=theirs.model.state_dict(),
        vocabulary=location if has_tokenizer(location) else None,
        notes=notes_on(processor),
        load=lambda: theirs,
    )


def notes_on(processor: Any) -> list[str]:
    """In what an image processor is not ours, a sentence each."""
    notes = [] if processor.resample == BICUBIC else ["its images are resized by another kernel than bicubic, ours is"]
    return [*notes, "its images are padded to squares, ours are cut"] if getattr(processor, "do_pad", False) else notes


def node_of(config: Any, image: ImageSpec) -> Node:
    """The model node of the shape that a CLIPConfig or SiglipConfig describes. Raises ConfigError."""
    kind = config.model_type
    if kind == "siglip2":
        raise not_readable(
            "Siglip2Model", ["NaFlex patches (SigLIP-2 of fixed resolution is published as SiglipModel)"]
        )
    if kind not in ("clip", "siglip"):
        raise not_readable(f"a model of type {kind} of transformers", [f"{kind} as a whole"])
    vision, text = config.vision_config, config.text_config
    wrong = [f"{tower.model_type}.hidden_act={tower.hidden_act}" for tower in (vision, text)
             if tower.hidden_act not in FROM_TRANSFORMERS]  # fmt: skip
    wrong += [] if vision.num_channels == 3 else [f"num_channels={vision.num_channels}"]
    wrong += [] if getattr(vision, "vision_use_head", True) else ["vision_use_head=False"]
    wrong += [] if image.size == vision.image_size else [f"image_size={vision.image_size}, processor {image.size}"]
    if wrong:
        raise not_readable(type(config).__name__.removesuffix("Config") + "Model", wrong)
    ours = {"image": image_node(image), "patch_size": vision.patch_size, **our_tower(vision)}
    if kind == "siglip":
        return siglip_node(embed_dim=text.projection_size, vision=ours, text=our_tower(text))
    return clip_node(embed_dim=config.projection_dim, vision=ours, text=our_tower(text))


def spec_of(config: Any) -> TextSpec:
    """What the text tower of a CLIPConfig or SiglipConfig reads."""
    is_siglip, text = config.model_type == "siglip", config.text_config
    # Configs written before 2023 declare the end token 2; transformers then reads the highest id, and so do we.
    # SigLIP's configs keep the ends of CLIP's vocabulary, which theirs does not reach and no pooling of theirs reads.
    has_end = text.eos_token_id < text.vocab_size and (is_siglip or text.eos_token_id != 2)
    return TextSpec(
        vocab_size=text.vocab_size,
        context_length=text.max_position_embeddings,
        pad_id=text.pad_token_id,
        bos_id=text.bos_token_id if has_end else None,
        eos_id=text.eos_token_id if has_end else text.vocab_size - 1,
        pad_to_max=is_siglip,
    )


def our_tower(config: Any) -> dict[str, Any]:
    """The keywords of a tower of ours for a tower's config."""
    return {
        "width": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_dim": config.intermediate_size,
        "activation": FROM_TRANSFORMERS[config.hidden_act],
        "norm_eps": config.layer_norm_eps,
    }
