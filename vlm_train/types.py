"""Words that every floor uses: what flows along the road, and the protocols by which the floors see each other.

Shape letters, used in docstrings and as suffixes of tensor names (`image_BPD`) in `models/` and `objectives/`:
    B batch   W world (ranks)   K micro-batches   T text tokens   P image patches   D width
    H heads   V vocabulary      N boxes or regions   S image side in pixels   G global batch

Words: a *source* is a dataset on disk; its *manifest* is the table of its samples; a *selection* says which samples
count; a *sample* exists before collate, a *batch* after; a *micro-batch* is what one rank runs forward at once; a
*step* is one optimizer step over the *global batch*; an *objective* trains, a *metric* measures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypedDict, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from vlm_train.errors import DataError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Cleaning = Literal["whitespace", "lower", "canonicalize"]
"""What is done to a text before a tokenizer reads it: spaces joined; and in lower case; and without punctuation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSpec:
    """What an image tower wants to be fed. `size` in pixels (square); `mean` and `std` apply to RGB in 0..1.

    `resize`: how evaluation brings an image to `size`: `shortest` (bicubic on the short side, then centre crop: CLIP),
    `squash` (bicubic to the square: SigLIP) or `pad` (made square by borders of the mean colour, then bicubic:
    LLaVA-1.5).
    """

    size: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resize: Literal["shortest", "squash", "pad"] = "shortest"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSpec:
    """What a tokenizer produces and a text tower is built for.

    `pad_to_max` is False where trailing padding cannot change the result (causal or masked attention), so a batch may
    be trimmed to its longest text; True where the tower reads a fixed position (SigLIP).
    """

    vocab_size: int
    context_length: int
    pad_id: int
    bos_id: int | None
    eos_id: int
    pad_to_max: bool = False


@dataclass(slots=True)
class RawSample:
    """One record as it lies in a source: undecoded bytes by part name (`jpg`, `txt`, `json`, `0.jpg`, ...)."""

    uid: bytes  # 16 bytes: the first 128 bits of sha256 over every part, with its role and length
    key: str
    shard: str
    parts: dict[str, bytes]


class BatchRows(TypedDict, total=False):
    """The fields of a batch that have a row for each sample: what a micro-batch has a slice of."""

    images: Tensor  # [B, 3, S, S] uint8; the image tower normalises on its own device. Of dialogues [B, I, 3, S, S]
    num_images: Tensor  # [B] int64: how many of a dialogue's I images there are; each tile is one
    grids: Tensor  # [B, M, 4] int64: the `Grid` of M pictures, 0 where none is (of tiles: evaluation, or in a map)
    dialogue_ids: Tensor  # [B, T] int64: a dialogue, with a run of IMAGE_ID for each image; padding behind it
    dialogue_labels: Tensor  # [B, T] int64: the token to be told behind each, NO_LABEL where none is
    dialogue_lengths: Tensor  # [B] int64: tokens of each dialogue
    text_ids: Tensor  # [B, T] int64
    text_mask: Tensor  # [B, T] bool, True on real tokens
    weights: Tensor  # [B] float32; 0 marks a padding row that must not count
    uids: Tensor  # [B, 2] int64, the 128 bits of the uid
    labels: Tensor  # [B] int64, -1 where the sample has none
    hard_text_ids: Tensor  # [B, H, T] int64, captions that are almost right
    hard_text_mask: Tensor  # [B, H, T] bool, True on real tokens
    hard_counts: Tensor  # [B, H] bool, False where a sample has fewer than H
    contents: Tensor  # [B, 2] int64: hashes of the image and of the caption
    regions: Tensor  # [B, N, F] int64: boxes and names of what stands in the picture, see data/modalities/regions.py
    depth: Tensor  # [B, 1, S, S] float32 in 0..1: the depth of the picture's pixels, see data/modalities/depth.py
    audio: Tensor  # [B, M, T] float32: a log-mel spectrogram, see data/modalities/audio.py
    motion: Tensor  # [B, C, T] float32: readings of C channels, see data/modalities/motion.py
    there: Tensor  # [B, len(MODALITIES)] bool: which of these the sample has
    draws: Tensor  # [B] int64: a random number of the sample at its place in the stream, for randomness in the model
    captions: list[str]  # the caption that text_ids encodes
    all_captions: list[list[str]]  # every caption of the sample (evaluation only)
    keys: list[str]
    metadata: list[dict[str, Any]]  # KEY.json of each sample (evaluation only)
    finish: Tensor  # [B, 3] float32, factors for imaging.recolour; only where that is left to the trainer's device


class Batch(BatchRows, total=False):
    """What the loader hands to one rank for one step: rows, and what is true of the whole step. Absent fields are
    absent keys, never None."""

    place: dict[str, Any]  # where a stream of tars stood when the step began: epoch, epoch_start
    step: int  # global step this batch belongs to (0-based)
    errors: list[dict[str, Any]]  # samples that could not be read: {shard, key, row, reason}


MODALITIES = ("regions", "depth", "audio", "motion")
"""What a sample may have beside its image and its text: each a field of the batch, read in `data/modalities/`."""

NUM_REGION_BUCKETS = 4096
"""Into how many buckets the names of regions fall; 0 is no name."""

NUM_REGION_NAMES = 4
"""Names of one region: its class, and attributes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModalitySpec:
    """What a tower wants of a modality: `name`, one of `MODALITIES`, and the `shape` of one sample."""

    name: str
    shape: tuple[int, ...]


IMAGE_ID = -1
"""In the ids of a dialogue: here the language model reads a token of an image."""

NO_LABEL = -100
"""In the labels of a dialogue: nothing is to be told here."""

TileLayout = Literal["rows", "map"]
"""What tiles of a picture become: tile behind tile, row by row, or one map of tokens (`models.image_layout`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DialogueSpec:
    """What a generative model wants of a dialogue: at most `context_length` tokens, and at most `max_images` pictures.

    A picture is one image to the model, of `num_image_tokens` tokens, or several: at most `max_tiles` tiles of
    `tile_size` pixels a side, and an overview in front of them (`data.tiles`). 1 is no tiles. Those of a map have a
    square of tokens each.
    """

    context_length: int
    num_image_tokens: int
    max_images: int = 1
    max_tiles: int = 1
    tile_size: int = 0
    tile_layout: TileLayout = "rows"

    @property
    def num_places(self) -> int:
        """The most images of a dialogue, tiles and overviews counted."""
        return self.max_images * Grid(1, self.max_tiles).num_images


class Grid(NamedTuple):
    """The tiles of a picture, in rows. `map_rows`, `map_columns`: where they are a map, as many tokens as show it."""

    rows: int
    columns: int
    map_rows: int = 0
    map_columns: int = 0

    @property
    def is_map(self) -> bool:
        """Whether the tiles become one map of tokens."""
        return self.map_rows + self.map_columns > 0

    @property
    def num_images(self) -> int:
        """How many images the picture is to a model: several tiles have an overview in front of them."""
        num_tiles = self.rows * self.columns
        return num_tiles + (1 if num_tiles > 1 else 0)

    def num_tokens(self, num_image_tokens: int) -> int:
        """How many tokens the language model reads of the picture; those of a map have a newline behind each row."""
        if self.is_map:
            return num_image_tokens + self.map_rows * (self.map_columns + 1)
        return self.num_images * num_image_tokens


WHOLE = Grid(1, 1)
"""A picture that is one image."""


def grids_of(batch: Batch) -> list[tuple[Grid, ...]]:
    """The pictures of each row of a batch of dialogues."""
    if "grids" not in batch:
        return [(WHOLE,) * number for number in batch["num_images"].tolist()]
    return [tuple(Grid(*grid) for grid in row if grid[0]) for row in batch["grids"].tolist()]


Outputs = dict[str, "Tensor"]
"""What a model returns; the keys are declared by `Model.outputs`."""


@dataclass(slots=True)
class LossOutput:
    """A sum and a count, never a mean: the engine divides by the count over the whole global batch.

    `sum`: scalar, fp32 (or fp64), with graph. `count`: scalar, terms in the sum on this rank. `metrics`: name ->
    (sum, count), detached scalars that the engine adds up over ranks and micro-batches before dividing.
    """

    sum: Tensor
    count: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids. One face for our byte-pair tokenizer and any Hugging Face tokenizer."""

    spec: TextSpec

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids [B, T] int64 and mask [B, T] bool; T = context_length (the collate trims)."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of one row of ids, without special tokens."""

    def save(self, directory: str) -> None:
        """Writes files that `load_tokenizer(directory)` and `transformers.AutoTokenizer` read."""


class Source(Protocol):
    """A dataset with random access. Row numbers are manifest rows."""

    fingerprint: str  # sha256 over the content of the manifest, hex: what a loader state is checked against

    @property
    def shard_starts(self) -> NDArray[np.int64]:
        """First row of each shard and the end, [num_shards + 1]."""

    def __len__(self) -> int: ...

    def read(self, rows: NDArray[np.int64]) -> Sequence[RawSample | DataError]:
        """The samples of rows [n], in that order; one that cannot be had is the error in its place."""

    def locate(self, row: int) -> tuple[str, str]:
        """(shard name, key) of a row."""


class Model(Protocol):
    """A network with declared outputs and, beside `forward`, named methods that strategies must know of."""

    outputs: frozenset[str]
    forward_methods: tuple[str, ...]  # e.g. ("encode_image", "encode_text")
    image_spec: ImageSpec
    text_spec: TextSpec
    modalities: tuple[ModalitySpec, ...]  # what its towers read beside images and texts

    def __call__(self, batch: Batch) -> Outputs:
        """Runs every tower that the batch has fields for."""

    def forward_flops(self, num_text_tokens: int) -> dict[str, float]:
        """Forward FLOPs of one sample by part (`vision`, `text`): 2 per multiply-add, no recompute, no padding."""


def has_modality(batch: Batch, name: str) -> Tensor:
    """Which rows of the batch have modality `name`, one of `MODALITIES`: bool [B]."""
    return batch["there"][:, MODALITIES.index(name)]


class Evaluator(Protocol):
    """Measures a model. `run` is called on every rank with this rank's batches and returns the same dict on each."""

    name: str

    def run(self, embedder: Any, batches: Iterator[Batch]) -> Mapping[str, Any]:
        """Collective: one result, equal on every rank."""


def rank_share(total: int, rank: int, world_size: int) -> tuple[int, int]:
    """The slice [start, stop) of `total` items that belongs to `rank`; contiguous, sizes differ by at most one.

    The same rule cuts the global batch into rank batches and an evaluation set into shares, so that any world size
    works and rank order equals item order.
    """
    quotient, remainder = divmod(total, world_size)
    start = rank * quotient + min(rank, remainder)
    return start, start + quotient + (1 if rank < remainder else 0)


Jumps = Sequence[tuple[int, int]]
"""(step of the run, step of the stream), ascending: from the one on, a run reads the stream from the other on."""


def stream_step(step: int, jumps: Jumps) -> int:
    """The step of the stream whose batch the run's step `step` trains on; the same without jumps."""
    start, place = max((jump for jump in jumps if jump[0] <= step), default=(0, 0))
    return place + step - start
