"""What a dataset looks like in numbers: sizes, aspect ratios, captions, formats, repeats, what cannot be used.

Nearly all of it stands in the manifest, so it costs no reading of samples; only a small evenly spaced set of them is
read, for examples and for the rate of samples that do not decode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from vlm_train.data import decode
from vlm_train.data.decode import SampleError
from vlm_train.data.manifest import Manifest
from vlm_train.data.sources.shards import ShardSource
from vlm_train.types import RawSample

_PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
_COLUMNS = ("width", "height", "image_hash", "caption_chars", "caption_hash", "length", "label")


@dataclass(slots=True)
class Distribution:
    """How one quantity is spread. `edges` [n + 1] and `counts` [n] of a histogram; `percentiles`: value by per cent."""

    name: str
    unit: str
    mean: float
    percentiles: dict[int, float]
    edges: list[float]
    counts: list[int]

    @staticmethod
    def of(name: str, unit: str, values: NDArray[Any], num_bins: int = 40) -> Distribution:
        """Of `values` [N], N > 0, in bins of `edges_of`."""
        edges = edges_of(float(values.min()), float(values.max()), num_bins)
        counts, _ = np.histogram(values, edges)
        at = np.percentile(values, _PERCENTILES)
        return Distribution(
            name,
            unit,
            float(values.mean()),
            {share: float(value) for share, value in zip(_PERCENTILES, at, strict=True)},
            edges.tolist(),
            counts.tolist(),
        )


def edges_of(low: float, high: float, num_bins: int = 40) -> NDArray[np.float64]:
    """Edges [num_bins + 1] of bins from `low` to `high`, equal in the logarithm where that is more than a decade."""
    wide = low > 0 and high / low > 10
    if low == high:
        low, high = low - max(abs(low), 1) / 2, high + max(abs(low), 1) / 2
    edges = np.geomspace(low, high, num_bins + 1) if wide else np.linspace(low, high, num_bins + 1)
    edges[0], edges[-1] = low, high  # rounding must not lose the extremes
    return edges


@dataclass(slots=True)
class Example:
    """One sample to look at. `pixels` uint8 [H, W, 3], None where there is none; `reason` says why it does not decode,
    and is empty for a sample of texts alone."""

    shard: str
    key: str
    caption: str
    width: int = 0
    height: int = 0
    pixels: NDArray[np.uint8] | None = None
    reason: str = ""


@dataclass(slots=True)
class Statistics:
    """Of a dataset. `formats`: image format by number of samples; `left_out`: reason by number, of what indexing could
    not use; `ignored`: kind of tar member that is no sample by number; `num_distinct` pairs of images and first
    caption; `num_unreadable` of `num_read` examples."""

    num_samples: int
    num_shards: int
    num_bytes: int
    num_labelled: int
    num_distinct: int
    num_distinct_captions: int
    distributions: list[Distribution]
    formats: dict[str, int]
    left_out: dict[str, int]
    ignored: dict[str, int]
    num_read: int = 0
    num_unreadable: int = 0
    examples: list[Example] = field(default_factory=list)

    @property
    def error_rate(self) -> float:
        """Share of what indexing left out among all it saw."""
        total = sum(self.left_out.values())
        return total / max(1, total + self.num_samples)


def statistics(shards: str | Sequence[str], *, num_examples: int = 60, side: int = 160) -> Statistics:
    """Looks at a dataset.

    Args:
        shards: as `data.train.shards`.
        num_examples: samples that are read, evenly spaced.
        side: longest side of an example in pixels.

    Raises:
        DataError: a shard is missing, none of it can be used, or its part of the manifest is damaged.
    """
    source = ShardSource(shards=shards)
    manifest = source.manifest
    columns = _columns(manifest)
    found = Statistics(
        num_samples=len(manifest),
        num_shards=len(manifest.shards),
        num_bytes=sum(entry["size"] for entry in manifest.entries_of),
        num_labelled=int((columns["label"] >= 0).sum()),
        num_distinct=_num_distinct(columns["image_hash"], columns["caption_hash"]),
        num_distinct_captions=len(np.unique(columns["caption_hash"])),
        distributions=list(_distributions(columns)),
        formats=_formats(manifest),
        left_out=dict(Counter(error["reason"] for error in manifest.errors()).most_common()),
        ignored=dict(sum((Counter(entry["ignored"]) for entry in manifest.entries_of), Counter()).most_common()),
    )
    rows = np.unique(np.linspace(0, len(source) - 1, min(num_examples, len(source))).astype(np.int64))
    for row, sample in zip(rows.tolist(), source.read(rows), strict=True):
        found.examples.append(example_of(source, row, sample, side))
    found.num_read = len(found.examples)
    found.num_unreadable = sum(bool(example.reason) for example in found.examples)
    return found


def _columns(manifest: Manifest) -> dict[str, NDArray[Any]]:
    """NumPy columns of all parts; a missing label is -1."""
    parts: dict[str, list[NDArray[Any]]] = {name: [] for name in _COLUMNS}
    for shard in range(len(manifest.shards)):
        table = manifest.part(shard, _COLUMNS)
        for name in _COLUMNS:
            parts[name].append(pc.fill_null(table[name], -1).to_numpy() if name == "label" else table[name].to_numpy())
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _num_distinct(*columns: NDArray[np.uint64]) -> int:
    """How many different rows columns [N] have together."""
    return len(np.unique(np.stack(columns, axis=1).view(f"V{8 * len(columns)}")))


def _distributions(columns: dict[str, NDArray[Any]]) -> Iterator[Distribution]:
    has_image = columns["width"] > 0
    width, height = (columns[name][has_image].astype(np.float64) for name in ("width", "height"))
    if has_image.any():
        yield Distribution.of("shorter side", "pixels", np.minimum(width, height))
        yield Distribution.of("longer side", "pixels", np.maximum(width, height))
        yield Distribution.of("width / height", "", width / height)
        yield Distribution.of("megapixels", "", width * height / 1e6)
    yield Distribution.of("caption", "characters", columns["caption_chars"].astype(np.float64))
    yield Distribution.of("sample", "bytes", columns["length"].astype(np.float64))


def _formats(manifest: Manifest) -> dict[str, int]:
    """Samples by the ending of their first image part; columnwise, so that a hundred million rows are no matter."""
    counts: Counter[str] = Counter()
    for shard in range(len(manifest.shards)):
        parts = manifest.part(shard, ["parts"])["parts"].combine_chunks()
        names = parts.flatten().field("name").dictionary_encode()
        endings = [decode.image_parts({name: b""}) for name in names.dictionary.to_pylist()]
        codes = names.indices.to_numpy()
        images = np.array([bool(found) for found in endings])[codes]
        rows = np.repeat(np.arange(len(parts)), pc.list_value_length(parts).to_numpy())[images]
        first = np.unique(rows, return_index=True)[1]
        for code, count in zip(*np.unique(codes[images][first], return_counts=True), strict=True):
            counts[endings[code][0].rpartition(".")[2]] += int(count)
    return dict(counts.most_common())


def example_of(source: ShardSource, row: int, sample: RawSample | SampleError, side: int) -> Example:
    """What is shown of a sample that was read, whether it can be used or not. `side`: its longest, in pixels."""
    try:
        if isinstance(sample, SampleError):
            raise sample
        caption = decode.decode_captions(sample.parts, decode.decode_metadata(sample.parts))[0]
        if not decode.image_parts(sample.parts):
            return Example(sample.shard, sample.key, caption)
        image = decode.open_image(decode.first_image(sample.parts))
        scale = min(1.0, side / max(image.width, image.height))
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        pixels = image.decode(min_width=size[0], min_height=size[1])
        small = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
        return Example(sample.shard, sample.key, caption, image.width, image.height, small)
    except SampleError as error:
        return Example(*source.locate(row), "", reason=error.reason)
