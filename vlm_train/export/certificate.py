"""How far another library is from a model of ours: both read the same pixels and texts, and what they say is compared.

Used both ways: on a folder that was just written, and on a model that was just read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vlm_train.errors import CheckpointError
from vlm_train.models.dual_encoder import DualEncoder
from vlm_train.models.generative import GenerativeModel
from vlm_train.types import TextSpec, Tokenizer

CERTIFIED_TEXTS = ["a red square above a blue circle", "Two dogs, one ball.", "", "a long caption " * 40]
"""What the certificate encodes: plain, with capitals and punctuation, empty, and longer than any context."""

TOLERANCE = 1e-5  # of unit features in fp32; ViT-B/32 with random weights measures 3e-7, a wrong activation 1e-2
PIXEL_TOLERANCE = 2.0  # grey levels of 255, on a smooth picture: two resamplings, each rounded

Prepare = Callable[[Image.Image], NDArray[np.uint8]]
"""Evaluation's way from a picture to uint8 pixels [3, S, S]; data/ has it, which this floor does not see."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """What a model makes of images and texts: unit features [B, E] each, and logits [B, B], a row per image."""

    images: Tensor
    texts: Tensor
    logits: Tensor


class Seeing(Protocol):
    """Whatever has pixels of its own making."""

    name: str

    def prepare(self, picture: Image.Image) -> Tensor | None:
        """Normalised pixels [3, S, S]; None where it came without preprocessing."""


class Library(Seeing, Protocol):
    """A dual encoder in the hands of another library."""

    def encode(self, pixels_B3SS: Tensor, ids_BT: Tensor) -> Encoded:
        """Normalised pixels and ids, through the other library."""

    def tokenize(self, texts: list[str]) -> Tensor | None:
        """ids [B, T] padded to the context; None where it came without a tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A dual encoder and what belongs to it: its tokenizer, None where there is none, and the objective's
    `logit_scale` [1] (a logarithm) and `logit_bias` [1] (None for a softmax)."""

    model: DualEncoder
    tokenizer: Tokenizer | None
    logit_scale: Tensor
    logit_bias: Tensor | None = None

    @property
    def objective(self) -> dict[str, Tensor]:
        """The tensors of its objective by name."""
        bias = {} if self.logit_bias is None else {"logit_bias": self.logit_bias}
        return {"logit_scale": self.logit_scale, **bias}

    def reference(self) -> Trained:
        """A copy on the CPU in fp32, in evaluation mode."""
        bias = None if self.logit_bias is None else self.logit_bias.detach().to("cpu", torch.float32)
        return Trained(
            model=copy.deepcopy(self.model).to("cpu", torch.float32).eval(),
            tokenizer=self.tokenizer,
            logit_scale=self.logit_scale.detach().to("cpu", torch.float32),
            logit_bias=bias,
        )

    def encode(self, images_B3SS: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Encoded:
        """uint8 images and ids, through our model."""
        images, texts = self.model.encode_image(images_B3SS), self.model.encode_text(ids_BT, mask_BT)
        logits = self.logit_scale.exp() * images @ texts.T
        return Encoded(
            images=images, texts=texts, logits=logits if self.logit_bias is None else logits + self.logit_bias
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """Largest absolute differences: of unit features (None of a model that has none), of logits, and of evaluation's
    pixels in grey levels (None where no preprocessing was compared); and whether tokens were compared."""

    library: str
    features: float | None
    logits: float
    pixels: float | None
    has_tokens: bool


@torch.no_grad()
def certify(trained: Trained, library: Library, *, prepare: Prepare | None = None) -> Certificate:
    """Compares `trained`, a `reference()`, with the same model in another library.

    Raises:
        CheckpointError: they differ.
    """
    model, spec = trained.model, trained.model.text_spec
    size = model.image_spec.size
    images = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = library.tokenize(CERTIFIED_TEXTS) if trained.tokenizer is not None else None
    ids, mask = _random_texts(spec) if trained.tokenizer is None else trained.tokenizer(CERTIFIED_TEXTS)
    ours, other = trained.encode(images, ids, mask), library.encode(model.normalize(images), ids)
    found = Certificate(
        library=library.name,
        features=max(distance(ours.images, other.images), distance(ours.texts, other.texts)),
        logits=distance(ours.logits, other.logits),
        pixels=pixel_distance(model, library, prepare),
        has_tokens=theirs is not None,
    )
    logit_tolerance = TOLERANCE * max(1.0, trained.logit_scale.exp().item())
    are_same_tokens = theirs is None or _are_same(ids, theirs, mask, all_positions=spec.pad_to_max)
    require_same(found, logit_tolerance=logit_tolerance, are_same_tokens=are_same_tokens)
    return found


def require_same(found: Certificate, *, logit_tolerance: float, are_same_tokens: bool) -> None:
    """Refuses a model that is not the same in the other library. Raises CheckpointError."""
    rows = [  # what was found, what is allowed, whether it fits
        (f"logit difference {found.logits:.1e}", f"{logit_tolerance:.0e}", found.logits <= logit_tolerance),
        (f"same tokens {are_same_tokens}", "the same tokens", are_same_tokens),
        (f"grey levels {found.pixels}", f"{PIXEL_TOLERANCE} grey levels",
         found.pixels is None or found.pixels <= PIXEL_TOLERANCE),
    ]  # fmt: skip
    if found.features is not None:
        is_near = found.features <= TOLERANCE
        rows.insert(0, (f"feature difference {found.features:.1e}", f"{TOLERANCE:.0e}", is_near))
    if not all(fits for _, _, fits in rows):
        raise CheckpointError(
            f"the model in {found.library} is not the same model",
            got=", ".join(got for got, _, _ in rows),
            allowed=f"at most {', '.join(allowed for _, allowed, _ in rows)}",
            remedy=f"report this with the versions of {found.library} and vlm-train",
        )


def distance(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; infinite where shapes differ."""
    return (a - b).abs().max().item() if a.shape == b.shape else float("inf")


def _are_same(ours: Tensor, theirs: Tensor, mask: Tensor, *, all_positions: bool) -> bool:
    """Whether two tokenizers agree; what stands behind the end matters only to towers that read it."""
    return ours.shape == theirs.shape and bool(((ours == theirs) | (~mask & (not all_positions))).all())


def _random_texts(spec: TextSpec) -> tuple[Tensor, Tensor]:
    """ids and mask [4, T] of texts of different lengths that end with the end token and hold it nowhere else."""
    generator = torch.Generator().manual_seed(1)
    others = torch.arange(spec.vocab_size)
    others = others[others != spec.eos_id]
    ids = others[torch.randint(len(others), (4, spec.context_length), generator=generator)]
    ends = torch.linspace(1, spec.context_length - 1, 4).long()[:, None]
    places = torch.arange(spec.context_length)
    ids = ids.masked_fill(places == ends, spec.eos_id).masked_fill(places > ends, spec.pad_id)
    return ids, places <= ends


def smooth_picture(width: int, height: int) -> Image.Image:
    """Waves of colour, on which two resamplings agree but for their rounding."""
    x, y = np.linspace(0, 1, width)[None, :], np.linspace(0, 1, height)[:, None]
    waves = np.stack(np.broadcast_arrays(x, y, 0.5 + 0.5 * np.sin(7 * x + 5 * y)), axis=-1)
    return Image.fromarray((20 + 215 * waves).astype(np.uint8))


def pixel_distance(model: DualEncoder | GenerativeModel, library: Seeing, prepare: Prepare | None) -> float | None:
    """Grey levels between two preparations of a smooth picture that is wider than high; None without one of them."""
    spec = model.image_spec
    picture = smooth_picture(spec.size * 9 // 4, spec.size * 3 // 2)
    theirs = None if prepare is None else library.prepare(picture)
    if prepare is None or theirs is None:
        return None
    ours = model.normalize(torch.from_numpy(prepare(picture))[None])[0]
    return 255 * distance(ours * torch.tensor(spec.std)[:, None, None], theirs * torch.tensor(spec.std)[:, None, None])
