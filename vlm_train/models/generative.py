"""An image tower, a connector and a language model: dialogues about images, as in LLaVA (Liu et al. 2023, arXiv
2304.08485).

1. The tower makes tokens of each image that is there, the connector brings them to the width of the language model.
2. They are laid where a dialogue has IMAGE_ID, picture after picture in the order of the batch (`image_layout`).
3. The language model reads the dialogues one behind the other, each alone and without padding. Its logits are never
   formed here: they are `token_hidden @ token_vocabulary.T`.

Every forward pass runs tower and connector once, if need be on one blank image that counts for nothing: where gradients
are exchanged, a rank without an image must not leave the others waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from vlm_train.errors import ConfigError
from vlm_train.models.connectors.base import Connector
from vlm_train.models.feature_store import FeatureStore
from vlm_train.models.image_layout import layout_of
from vlm_train.models.language import CausalLanguageModel
from vlm_train.models.packing import Texts
from vlm_train.models.vision.image import Normalize
from vlm_train.models.vision.vit import Layer
from vlm_train.types import (
    IMAGE_ID,
    WHOLE,
    Batch,
    DialogueSpec,
    Grid,
    ImageSpec,
    ModalitySpec,
    Outputs,
    TileLayout,
    grids_of,
)


class TokenTower(Protocol):
    """What an image tower must offer: normalised pixels [N, 3, S, S] -> tokens [N, P, out_dim]."""

    image_spec: ImageSpec
    out_dim: int
    num_patches: int

    @property
    def has_class_token(self) -> bool:
        """Whether a class token stands in front of those of the patches."""

    def tokens(self, pixels_N3SS: Tensor, *, layer: Layer | None = None) -> Tensor:
        """One token per patch, and its class token; of a layer as in `VisionTransformer`."""

    def drop_unread(self, layer: Layer | None) -> None:
        """Takes out what `tokens` at this layer does not run."""

    def tokens_flops(self, *, layer: Layer | None = None) -> float:
        """Forward FLOPs of one image."""


class GenerativeModel(nn.Module):
    """Images and the tokens before -> hidden states that are to tell each next token of a dialogue.

    Args:
        vision: image tower that shows its tokens, such as `VisionTransformer`.
        connector: called with `in_dim`, `out_dim` and `num_patches` it makes the connector.
        text: the language model.
        context_length: most tokens of a dialogue, those of its images included.
        max_images: most images of a dialogue.
        max_tiles: most tiles of an image that has more pixels than the tower sees, each of which is one more image to
            it, with an overview in front of them (`data.tiles`); 1 is no tiles.
        tile_layout: what these become: `rows`, tile behind tile, or `map`, one map of the picture as in LLaVA-NeXT.
        drop_class_token: whether the connector gets the tokens of patches alone.
        feature_layer: where the tower is read: None behind its last norm, -1 before that, -2, as LLaVA reads CLIP, a
            block before. What lies behind is taken out of the tower.

    Raises:
        ConfigError: a tower without tokens or without this layer, a context that the language model or the images do
            not leave, or a layout that the tiles cannot have.
    """

    outputs = frozenset({"token_hidden", "token_vocabulary"})
    forward_methods: tuple[str, ...] = ("generate",)
    modalities: tuple[ModalitySpec, ...] = ()
    part_inputs: Mapping[str, Sequence[str]] = {"connector": ("vision",), "text": ("connector", "layout")}
    """Part -> the parts whose results it reads: through it come the gradients of those."""
    feature_store: FeatureStore | None = None
    """Where the tower's tokens come from in training, if it is frozen; whoever trains the model puts it here."""

    def __init__(
        self,
        *,
        vision: TokenTower,
        connector: Callable[..., Connector],
        text: CausalLanguageModel,
        context_length: int,
        max_images: int = 1,
        max_tiles: int = 1,
        tile_layout: TileLayout = "rows",
        drop_class_token: bool = True,
        feature_layer: Layer | None = None,
    ) -> None:
        super().__init__()
        pool = getattr(vision, "pool", None)
        if not (hasattr(vision, "tokens") and hasattr(vision, "num_patches")) or pool == "map":
            raise ConfigError(
                "the image tower of a generative model must show its tokens, and have no pooling that none would read",
                got=f"{type(vision).__name__} with pool={pool}",
                allowed="VisionTransformer with pool=cls or mean, HuggingFaceVision of CLIP or SigLIP",
                remedy="take another tower in model.vision, or set model.vision.pool=mean",
            )
        self.first_patch = int(vision.has_class_token and drop_class_token)
        num_patches = vision.num_patches + int(vision.has_class_token) - self.first_patch
        vision.drop_unread(feature_layer)
        self.vision, self.text, self.feature_layer = vision, text, feature_layer
        self.connector = connector(in_dim=vision.out_dim, out_dim=text.width, num_patches=num_patches)
        self.layout = layout_of(tile_layout, self.connector, width=text.width, max_tiles=max_tiles)
        self.image_spec, self.text_spec = vision.image_spec, text.text_spec
        self.normalize = Normalize(self.image_spec)
        self.dialogue = DialogueSpec(
            context_length=context_length,
            num_image_tokens=self.tokens_per_image,
            max_images=max_images,
            max_tiles=max_tiles,
            tile_size=self.image_spec.size,
            tile_layout=tile_layout,
        )
        self._check_context()

    def _check_context(self) -> None:
        spec = self.dialogue
        if spec.max_tiles < 1:
            raise ConfigError("max_tiles is no number of tiles", got=spec.max_tiles, allowed="1, no tiles, or more",
                              remedy="model.max_tiles=1")  # fmt: skip
        of_images = spec.max_images * self.layout.largest(spec.max_tiles).num_tokens(spec.num_image_tokens)
        if not of_images < spec.context_length <= self.text.context:
            raise ConfigError(
                "the context of a generative model does not hold its dialogues",
                got=f"context_length={spec.context_length}",
                allowed=f"more than {of_images}, the tokens of {spec.num_places} images of {spec.num_image_tokens} "
                f"each, and at most {self.text.context}, the places of the language model",
                remedy="set model.context_length, model.max_images, model.max_tiles, or another connector",
            )

    @property
    def tokens_per_image(self) -> int:
        """How many tokens of a dialogue an image takes."""
        return self.connector.num_tokens

    def forward(self, batch: Batch) -> Outputs:
        """Reads `images`, `num_images`, `dialogue_ids`, `dialogue_lengths` and, of tiles in a map, `grids`. Returns
        `token_hidden` [B, T, D], zeros on padding, and `token_vocabulary` [V, D]. A batch of texts alone may be without
        images.

        Raises:
            ConfigError: images that do not have the shape of the tower's, or as many tokens as the dialogues say.
        """
        ids_BT, lengths_B = batch["dialogue_ids"], batch["dialogue_lengths"]
        pictures = grids_of(batch) if "grids" in batch else None
        x_BTD, lengths = self._read(batch.get("images"), batch["num_images"], ids_BT, lengths_B, pictures)
        return {
            "token_hidden": self._hidden(x_BTD, lengths),
            # a copy, since sharded strategies put hooks on what a model returns, and on a parameter they would stay
            "token_vocabulary": self.text.vocabulary.clone(),
        }

    def _hidden(self, x_BTD: Tensor, lengths: list[int]) -> Tensor:
        """[B, T, D], zeros on padding, which the language model does not meet."""
        texts = Texts.of(lengths, x_BTD.device)
        places_N = texts.places(x_BTD.shape[1])
        flat_ND = x_BTD.flatten(0, 1)
        hidden_ND = cast(Tensor, self.text(flat_ND.index_select(0, places_N), texts))
        num_tokens = x_BTD.shape[1]  # what follows is no view, on which sharded strategies could not put their hooks
        return hidden_ND.new_zeros(x_BTD.shape).index_put((places_N // num_tokens, places_N % num_tokens), hidden_ND)

    def _read(
        self,
        images: Tensor | None,
        num_images_B: Tensor,
        ids_BT: Tensor,
        lengths_B: Tensor,
        pictures: Sequence[Sequence[Grid]] | None,
    ) -> tuple[Tensor, list[int]]:
        """Dialogues as the language model reads them [B, T, D], and the length of each."""
        is_image_BT = ids_BT == IMAGE_ID
        # one transfer from the device for everything that the host must know
        known = torch.stack([num_images_B, is_image_BT.sum(dim=1), lengths_B]).tolist()
        num_images, num_image_tokens, lengths = cast(list[list[int]], known)
        if pictures is None:
            pictures = [(WHOLE,) * number for number in num_images]
        self._check_counts(num_images, num_image_tokens, pictures)
        x_BTD = self.text.embed(ids_BT.clamp(min=0))
        tokens_NQD = self._image_tokens(images, num_images).to(x_BTD.dtype)
        tokens_MD = self.layout(tokens_NQD, [grid for row in pictures for grid in row] or [WHOLE])
        if not sum(num_images):
            return x_BTD + (0 * tokens_MD).sum(), lengths
        places = torch.nonzero_static(is_image_BT.flatten(), size=sum(num_image_tokens)).squeeze(1)
        x_ND = x_BTD.flatten(0, 1).index_copy(0, places, tokens_MD)
        return x_ND.view_as(x_BTD), lengths

    def _check_counts(
        self, num_images: Sequence[int], num_image_tokens: Sequence[int], pictures: Sequence[Sequence[Grid]]
    ) -> None:
        for row, (number, found, grids) in enumerate(zip(num_images, num_image_tokens, pictures, strict=True)):
            num_wanted = sum(grid.num_images for grid in grids)
            wanted = sum(grid.num_tokens(self.tokens_per_image) for grid in grids)
            if (number, found) != (num_wanted, wanted):
                raise ConfigError(
                    "a dialogue does not have the tokens of its images",
                    got=f"row {row}: {found} image tokens for {number} images",
                    allowed=f"{wanted} for {num_wanted}, {self.tokens_per_image} for each image",
                    remedy="build the data with the model's own dialogue",
                )

    def _image_tokens(self, images: Tensor | None, num_images: Sequence[int]) -> Tensor:
        """[N, Q, D] of the images that are there, row after row; of a blank one where none is."""
        size, like = self.image_spec.size, self.normalize.scale
        if not sum(num_images):
            return self._connected(like.new_zeros(1, 3, size, size))
        if images is None:
            images = like.new_empty(len(num_images), 0, 3, size, size)
        images_BI3SS = images if images.ndim == 5 else images[:, None]
        self._check_images(images_BI3SS, num_images)
        width = images_BI3SS.shape[1]
        places = [row * width + index for row, number in enumerate(num_images) for index in range(number)]
        index_N = torch.tensor(places).to(images.device, non_blocking=True)
        return self._connected(images_BI3SS.flatten(0, 1).index_select(0, index_N))

    def _check_images(self, images_BI3SS: Tensor, num_images: Sequence[int]) -> None:
        size = self.image_spec.size
        shape = (len(num_images), max(images_BI3SS.shape[1], *num_images), 3, size, size)
        if images_BI3SS.shape != shape:
            raise ConfigError(
                "a batch of images does not have the shape that its dialogues say",
                got=tuple(images_BI3SS.shape),
                allowed=shape,
                remedy="build the data with the model's own image_spec and dialogue",
            )

    def _connected(self, images_N3SS: Tensor) -> Tensor:
        """[N, Q, D] of images, uint8 or normalised."""
        store = self.feature_store if self.training else None
        tokens_NPD = self._tokens(images_N3SS) if store is None else store(images_N3SS, self._tokens)
        return cast(Tensor, self.connector(tokens_NPD[:, self.first_patch :]))

    def _tokens(self, images_N3SS: Tensor) -> Tensor:
        """What the tower makes of images. In the layout that stored ones have, since arithmetic may depend on it."""
        pixels_N3SS = self.normalize(images_N3SS) if images_N3SS.dtype == torch.uint8 else images_N3SS
        return self.vision.tokens(pixels_N3SS, layer=self.feature_layer).contiguous()

    @torch.no_grad()
    def generate(
        self,
        images: Tensor | None,
        num_images: Tensor,
        ids_BT: Tensor,
        lengths_B: Tensor,
        *,
        max_new_tokens: int,
        eos_id: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        pictures: Sequence[Sequence[Grid]] | None = None,
    ) -> Tensor:
        """The answers to prompts, fields as those of a batch: ids [B, max_new_tokens], see `CausalLanguageModel`.
        `pictures`: as `grids` of a batch say; None where each is one image.

        Raises:
            ConfigError: as `forward`, or a prompt that leaves no room.
        """
        x_BTD, _ = self._read(images, num_images, ids_BT, lengths_B, pictures)
        return self.text.generate(
            x_BTD, lengths_B, max_new_tokens=max_new_tokens, eos_id=eos_id, temperature=temperature, top_p=top_p
        )

    def forward_flops(self, num_text_tokens: float, num_images: float = 1.0) -> dict[str, float]:
        """Forward FLOPs of one dialogue by part, 2 per multiply-add.

        `num_text_tokens`: all that the language model reads, the tokens of the images included. A tower with a store
        counts for nothing: how often it runs is not known before.
        """
        of_image = self.vision.tokens_flops(layer=self.feature_layer) if self.feature_store is None else 0.0
        return {
            "vision": num_images * of_image,
            "connector": num_images * self.connector.forward_flops(),
            "text": self.text.forward_flops(num_text_tokens),
        }
