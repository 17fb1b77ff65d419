"""One space for more than image and text: ImageBind (arXiv 2305.05665).

A dual encoder, and beside it a tower with a projection for each further modality, `others`. Nothing binds two of them
to each other but the pairs of the objective: where all are paired with images, text finds sound although no text was
ever seen beside a sound.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, Protocol, cast

from torch import Tensor, nn

from vlm_train.errors import ConfigError
from vlm_train.models.dual_encoder import DualEncoder, TextTower, VisionTower, unit_length
from vlm_train.models.layers import Linear, linear_flops
from vlm_train.types import Batch, ModalitySpec, Outputs


class ModalityTower(Protocol):
    """What a tower of a further modality must offer: [B, *reads.shape] -> [B, out_dim]."""

    reads: ModalitySpec
    out_dim: int

    def __call__(self, values: Tensor) -> Tensor:
        """One vector per sample, not L2-normalised."""

    def forward_flops(self) -> float:
        """Forward FLOPs of one sample."""


class BoundTower(nn.Module):
    """A tower and its projection to the common space."""

    def __init__(self, *, tower: ModalityTower, embed_dim: int) -> None:
        super().__init__()
        self.tower = tower
        self.projection = Linear(tower.out_dim, embed_dim, bias=False, std=tower.out_dim**-0.5)

    def forward(self, values: Tensor) -> Tensor:
        """[B, *shape] -> unit vectors [B, E]."""
        return unit_length(self.projection(self.tower(values)))

    def forward_flops(self) -> float:
        """Forward FLOPs of one sample."""
        return self.tower.forward_flops() + linear_flops(self.projection, 1)


class BoundEncoder(DualEncoder):
    """Image, text and other towers with projections to a common space.

    Every row of a batch goes through every tower that is run, also rows that have nothing of the modality: what is not
    there is zeros, and objectives leave it out.

    Args:
        vision, text, embed_dim, image_projection, text_bias, patch_dropout: see `DualEncoder`.
        others: modality -> its tower; at least one.

    Raises:
        ConfigError: see `DualEncoder`; a tower under another name than that of what it reads.
    """

    forward_methods = ("encode_image", "encode_text", "encode_other")

    def __init__(
        self,
        *,
        vision: VisionTower,
        text: TextTower,
        others: Mapping[str, ModalityTower],
        embed_dim: int,
        image_projection: Literal["linear", "none"] = "linear",
        text_bias: bool = False,
        patch_dropout: float = 0.0,
    ) -> None:
        super().__init__(
            vision=vision,
            text=text,
            embed_dim=embed_dim,
            image_projection=image_projection,
            text_bias=text_bias,
            patch_dropout=patch_dropout,
        )
        reads = {name: tower.reads.name for name, tower in others.items()}
        taken = [spec.name for spec in self.modalities]
        if not reads or any(name != read or name in taken for name, read in reads.items()):
            raise ConfigError(
                "model.others does not name its towers by what they read", got=f"{reads or 'no tower'}",
                allowed="{audio: a tower that reads audio, ...}, each modality once",
                remedy="model.others.audio.reads.name=audio",
            )  # fmt: skip
        self.others = nn.ModuleDict(
            {name: BoundTower(tower=tower, embed_dim=embed_dim) for name, tower in others.items()}
        )
        self.modalities += tuple(tower.reads for tower in others.values())
        self.outputs = DualEncoder.outputs | {f"{name}_features" for name in others}

    def give_only(self, outputs: Collection[str]) -> None:
        """From now on `forward` gives these outputs alone; the towers of others neither run nor learn. Each can still
        encode."""
        self.outputs = frozenset(outputs)
        for name, part in self._parts().items():
            if f"{name}_features" not in self.outputs:
                part.requires_grad_(False)

    def forward(self, batch: Batch) -> Outputs:
        """`NAME_features` [B, E] of `outputs`: of `image` and `text` from the fields that `DualEncoder` reads, of
        each other modality from the field of its name."""
        fields: Any = batch
        outputs = {
            f"{name}_features": self.encode_other(name, fields[name])
            for name in self.others
            if f"{name}_features" in self.outputs
        }
        if "image_features" in self.outputs:
            outputs["image_features"] = self.embed_images(batch)
        if "text_features" in self.outputs:
            outputs["text_features"] = self.encode_text(batch["text_ids"], batch["text_mask"])
        return outputs

    def encode_other(self, name: str, values: Tensor) -> Tensor:
        """[B, *shape] of modality `name` -> unit vectors [B, E].

        Raises:
            ConfigError: no tower reads it, or it has another shape.
        """
        allowed = {spec.name: spec.shape for spec in self.modalities if spec.name in self.others}
        if values.shape[1:] != allowed.get(name):
            raise ConfigError(
                f"no tower of the model reads this {name}", got=tuple(values.shape), allowed=allowed,
                remedy="build the data with the model's own modalities",
            )  # fmt: skip
        return cast(Tensor, self.others[name](values))

    def forward_flops(self, num_text_tokens: float) -> dict[str, float]:
        """Forward FLOPs of one sample by part (`vision`, `text`, `others.NAME`), of those that run."""
        flops = super().forward_flops(num_text_tokens)
        for output, part in (("image_features", "vision"), ("text_features", "text")):
            if output not in self.outputs:
                del flops[part]
        others = {name: cast(BoundTower, part).forward_flops() for name, part in self.others.items()}
        return flops | {f"others.{name}": each for name, each in others.items() if f"{name}_features" in self.outputs}

    def _parts(self) -> dict[str, nn.Module]:
        """Every module by the modality that it serves alone."""
        image = nn.ModuleList(filter(None, [cast(nn.Module, self.vision), self.image_projection]))
        text = nn.ModuleList([cast(nn.Module, self.text), self.text_projection])
        return {"image": image, "text": text, **dict(self.others.items())}
