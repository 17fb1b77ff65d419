"""Image towers from Hugging Face transformers and from timm, with the image they were trained on.

Size, mean and standard deviation come from the model's own processor or data config, never from ours: an encoder fed
with another normalisation still trains, only worse.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import timm
from timm.data import resolve_model_data_config
from timm.models import load_state_dict, remap_state_dict
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from vlm_train.assets import hub_access, resolve_asset
from vlm_train.errors import ConfigError, nearest
from vlm_train.models.layers import count_flops
from vlm_train.models.pretrained import PretrainedTower, on_meta
from vlm_train.models.vision.image import blank_image
from vlm_train.models.vision.vit import Layer, check_layer
from vlm_train.types import ImageSpec

TOKEN_TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Values of `model_type` of networks whose tokens a generative model may read."""


class HuggingFaceVision(PretrainedTower):
    """Any transformers image encoder: normalised pixels [B, 3, S, S] -> [B, D].

    Those of CLIP and SigLIP show their tokens, too, to a generative model: only they have `num_patches`.

    Args:
        path: local folder or hub name. Of a two-tower model (CLIP, SigLIP) the vision tower is taken.
        pool: `pooler` the network's own pooled output, `cls` its first token, `mean` the average of its tokens.
        pretrained: load the weights; otherwise only the architecture is taken.
        resize: how an image is brought to the tower's size, see `ImageSpec`; the processor's way unless given.

    Raises:
        ConfigError: the part cannot be found, or has no such pooling.
    """

    def __init__(
        self,
        *,
        path: str,
        pool: Literal["pooler", "cls", "mean"] = "pooler",
        pretrained: bool = True,
        resize: Literal["shortest", "squash", "pad"] | None = None,
    ) -> None:
        location = resolve_asset(path)
        with hub_access(path):
            config = AutoConfig.from_pretrained(location)
            processor = AutoImageProcessor.from_pretrained(location)
        network = load_network(location, config, pretrained=pretrained, tower="vision_model")
        check_pool(pool, network, allowed=("pooler", "cls", "mean"))
        super().__init__(network=network)
        self.pool = pool
        spec = spec_of_processor(processor)
        self.image_spec = spec if resize is None else replace(spec, resize=resize)
        own = getattr(network, "config", config)
        self.out_dim: int = own.hidden_size if hasattr(own, "hidden_size") else own.hidden_sizes[-1]
        self._cut_at: Layer | None = None
        self._tokens_flops: float | None = None  # counted by a run, a quarter of a second of CLIP's large tower
        if own.model_type in TOKEN_TOWERS:
            self.num_layers: int = own.num_hidden_layers
            self.num_patches: int = (own.image_size // own.patch_size) ** 2
            self.has_class_token = own.model_type == "clip_vision_model"

    def tokens(self, pixels_B3SS: Tensor, layer: Layer | None = None) -> Tensor:
        """Every token [B, P, D], CLIP's class token first.

        `layer`: as of `VisionTransformer.tokens`, but that None is what transformers calls `last_hidden_state`: with
        SigLIP's last norm, without CLIP's, which is for its pooled output. Until `drop_unread` all blocks run.
        """
        with self.gradients():
            if layer is None or layer == self._cut_at:
                return self.network(pixel_values=pixels_B3SS).last_hidden_state
            return self.network(pixel_values=pixels_B3SS, output_hidden_states=True).hidden_states[layer]

    def drop_unread(self, layer: Layer | None) -> None:
        """As of `VisionTransformer`; pooling, which no token goes through, is taken out, too. Only `tokens` is left."""
        network: Any = self.network
        self._tokens_flops = None
        if self.has_class_token or layer is not None:
            network.post_layernorm = nn.Identity()
        if getattr(network, "head", None) is not None:
            network.use_head, network.head = False, None
        if layer is not None:
            check_layer(layer, self.num_layers)
            network.encoder.layers = network.encoder.layers[: self.num_layers + 1 + layer]
            self._cut_at = layer

    def tokens_flops(self, layer: Layer | None = None) -> float:
        """Forward FLOPs of one image, of all that is still there: see `drop_unread`."""
        if self._tokens_flops is None:
            self._tokens_flops = count_flops(self.network, blank_image(self, self.image_spec))
        return self._tokens_flops

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        """[B, 3, S, S] normalised -> [B, D], not L2-normalised."""
        with self.gradients():
            output = self.network(pixel_values=pixels_B3SS)
            if self.pool == "pooler":
                return output.pooler_output.flatten(1)
            tokens_BPD = output.last_hidden_state
            return tokens_BPD[:, 0] if self.pool == "cls" else tokens_BPD.mean(dim=1)

    def forward_flops(self) -> float:
        """Forward FLOPs of one image."""
        return count_flops(self, blank_image(self, self.image_spec))


class TimmVision(PretrainedTower):
    """Any timm classifier without its classification layer: normalised pixels [B, 3, S, S] -> pooled features [B, D].

    Batch-norm networks see the statistics of the micro-batch while they train, so their result depends on how the
    global batch is cut; frozen, they do not.

    Args:
        name: architecture, e.g. `vit_base_patch16_224` or `tf_efficientnet_lite0`.
        pretrained: load timm's weights from the hub.
        checkpoint: load this file instead (`package:NAME` or a path to .safetensors or .pth). A file with other names
            but the same shapes in the same order is accepted.
        image_size: side in pixels; the network's own unless given.

    Raises:
        ConfigError: unknown name, weights that cannot be found, or a checkpoint of another architecture.
    """

    def __init__(
        self,
        *,
        name: str,
        pretrained: bool = True,
        checkpoint: str | None = None,
        image_size: int | None = None,
    ) -> None:
        if not timm.is_model(name):
            raise ConfigError(
                "timm has no such model",
                got=name,
                allowed=nearest(name, timm.list_models()) or "a name from timm.list_models()",
                remedy="correct model.vision.name",
            )
        from_hub = pretrained and checkpoint is None and not on_meta()
        with hub_access(name):
            network: Any = timm.create_model(name, pretrained=from_hub, **_size_argument(name, image_size))
        if checkpoint is not None and not on_meta():
            _load_checkpoint(network, checkpoint)
        data = resolve_model_data_config(network)
        network.reset_classifier(0)
        super().__init__(network=network)
        size = data["input_size"][-1] if image_size is None else image_size
        resize: Literal["shortest", "squash"] = "squash" if data["crop_mode"] == "squash" else "shortest"
        self.image_spec = ImageSpec(size=size, mean=tuple(data["mean"]), std=tuple(data["std"]), resize=resize)
        self.out_dim: int = getattr(network, "head_hidden_size", network.num_features)

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        """[B, 3, S, S] normalised -> [B, D], not L2-normalised."""
        with self.gradients():
            return self.network(pixels_B3SS)

    def forward_flops(self) -> float:
        """Forward FLOPs of one image."""
        return count_flops(self, blank_image(self, self.image_spec))


def load_network(location: str, config: Any, *, pretrained: bool, tower: str) -> nn.Module:
    """The transformers model at `location`, or its `tower` where the model has two; weights only if `pretrained`."""
    if pretrained and not on_meta():
        with hub_access(location):
            network = AutoModel.from_pretrained(location, config=config, use_safetensors=True)
    else:
        network = AutoModel.from_config(config)
    return getattr(network, tower, network)


def check_pool(pool: str, network: nn.Module, *, allowed: tuple[str, ...]) -> None:
    """Checks `pool`, and removes a pooling layer that it leaves unused, which data-parallel training would wait for.

    Raises:
        ConfigError: an unknown pooling; or, for the tower of a two-tower model, another than its own, whose last
            layers would be left without gradient.
    """
    is_clip = type(network).__name__.startswith(("CLIP", "Siglip"))
    names = ("pooler",) if is_clip else allowed
    if pool not in names:
        raise ConfigError(
            f"{type(network).__name__} cannot be pooled this way", got=pool, allowed=list(names), remedy="set pool"
        )
    if pool != "pooler" and getattr(network, "pooler", None) is not None:
        network.pooler = None  # type: ignore[assignment]


def spec_of_processor(processor: Any) -> ImageSpec:
    """The ImageSpec that a transformers image processor describes."""
    size: dict[str, Any] = dict(processor.size)
    is_cropped = bool(getattr(processor, "do_center_crop", False))
    side = dict(processor.crop_size)["height"] if is_cropped else size.get("height") or size["shortest_edge"]
    return ImageSpec(
        size=int(side),
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        resize="shortest" if is_cropped or "shortest_edge" in size else "squash",
    )


def _size_argument(name: str, image_size: int | None) -> dict[str, Any]:
    """timm's name for the image side, which only networks with learned positions take (others read any size)."""
    config = timm.get_pretrained_cfg(name)
    is_fixed = config is not None and config.fixed_input_size
    return {"img_size": image_size} if image_size is not None and is_fixed else {}


def _load_checkpoint(network: nn.Module, checkpoint: str) -> None:
    location = resolve_asset(checkpoint)
    with hub_access(checkpoint):
        state = load_state_dict(location, weights_only=True)
    own = network.state_dict()
    if [tuple(value.shape) for value in state.values()] != [tuple(value.shape) for value in own.values()]:
        raise ConfigError(
            "a checkpoint does not fit the timm model",
            got=f"{checkpoint}: {len(state)} tensors",
            allowed=f"{len(own)} tensors with the shapes of {type(network).__name__}",
            remedy="set model.vision.name to the architecture of the checkpoint",
        )
    network.load_state_dict(state if state.keys() == own.keys() else remap_state_dict(state, network))
