"""What a person looks at: the batch a model receives, whom it takes for whom, and what it finds.

`first_batch` shows the images after augmentation, each with its caption decoded back from the ids that the model reads:
most data bugs are visible here, before anything is spent. `similarity` shows the first validation pairs against each
other: a model that knows something has a dark diagonal. `search_grid` shows what texts find.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from vlm_train.engine.batch_statistics import BatchStatistics, batch_statistics
from vlm_train.engine.canvas import BLUE, GREEN, GREY, INK, LINE, MUTED, ORANGE, PANEL, Canvas, text_width, wrap
from vlm_train.evaluation.retrieval import RetrievalExamples
from vlm_train.types import Batch, ImageSpec, Tokenizer

Pixels = Mapping[str, np.ndarray]
"""Key -> uint8 [H, W, 3]. A picture that cannot be shown has no entry."""

_EDGE = 24.0
_HEAD = 68.0
_NUM_SHOWN = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A picture found by a text. `is_right`: None where nobody knows."""

    name: str
    score: float
    pixels: np.ndarray | None
    is_right: bool | None = None


def first_batch(batch: Batch, tokenizer: Tokenizer, image: ImageSpec, *, num_ranks: int = 1) -> Canvas:
    """The first images of a batch with their decoded captions, and the batch's statistics."""
    statistics = batch_statistics(batch, tokenizer, image)
    num_columns, side, gap = 8, 104.0, 12.0
    rows = (batch["weights"].cpu() != 0).nonzero().flatten().tolist()[:_NUM_SHOWN]
    row_height = side + 40
    grid_width = num_columns * (side + gap)
    num_rows = -(-len(rows) // num_columns)
    canvas = Canvas(width=2 * _EDGE + grid_width + 290, height=max(_HEAD + num_rows * row_height + _EDGE, 560))
    _heading(
        canvas,
        f"First batch, as the model receives it (step {batch['step'] + 1})",
        "after augmentation; captions decoded back from the token ids"
        + (f"; the share of rank 0 of {num_ranks}" if num_ranks > 1 else ""),
    )
    ids = batch["text_ids"].cpu()
    for place, row in enumerate(rows):
        x = _EDGE + place % num_columns * (side + gap)
        y = _HEAD + place // num_columns * row_height
        pixels = batch["images"][row]
        first = pixels[0] if pixels.ndim == 4 else pixels  # of the images of a dialogue
        canvas.tile((x, y), side, first.permute(1, 2, 0).cpu().numpy())
        caption = tokenizer.decode(ids[row].tolist())
        canvas.lines((x, y + side + 4), wrap(caption, side, 10, 2), size=10, colour=MUTED, centre=side)
    _statistics_panel(canvas, (_EDGE + grid_width + 20, _HEAD), statistics)
    return canvas


def _statistics_panel(canvas: Canvas, at: tuple[float, float], statistics: BatchStatistics) -> None:
    x, y = at
    canvas.box((x, y), (270, 468), fill=PANEL, line=LINE, radius=8)
    lengths = statistics.token_lengths
    shares = [
        ("truncated captions", statistics.num_truncated),
        ("altered by the tokenizer", statistics.num_altered),
        ("repeated captions", statistics.num_repeated_captions),
        ("repeated samples", statistics.num_repeated_samples),
        ("images of one colour", statistics.num_constant_images),
    ]
    canvas.text((x + 16, y + 14), f"{statistics.num_samples} samples", size=15, bold=True)
    canvas.text((x + 16, y + 46), "pixels after normalisation", size=11, colour=MUTED)
    for number, name in enumerate(("red", "green", "blue")):
        canvas.text((x + 16, y + 64 + 18 * number), name)
        moments = f"{statistics.pixel_mean[number]:+.2f} ± {statistics.pixel_std[number]:.2f}"
        canvas.text((x + 254, y + 64 + 18 * number), moments, anchor="ra")
    for number, (name, count) in enumerate(shares):
        top = y + 134 + 20 * number
        canvas.text((x + 16, top), name)
        share = f"{count}  ({count / max(statistics.num_samples, 1):.1%})"
        canvas.text((x + 254, top), share, anchor="ra", bold=count > 0)
    canvas.text((x + 16, y + 252), f"tokens a caption, context {statistics.context_length}", size=11, colour=MUTED)
    if lengths:
        line = f"{min(lengths)} to {max(lengths)}, median {median(lengths):g}"
        canvas.text((x + 16, y + 268), line)
        _histogram(canvas, (x + 16, y + 296), (238, 132), lengths)


def _histogram(canvas: Canvas, at: tuple[float, float], size: tuple[float, float], lengths: Sequence[int]) -> None:
    """Bars of the token lengths, at most 24 of them."""
    low, high = min(lengths), max(lengths)
    counts, _ = np.histogram(lengths, bins=min(high - low + 1, 24), range=(low, high + 1))
    width = size[0] / max(len(counts), 4)
    for number, count in enumerate(counts.tolist()):
        height = size[1] * count / counts.max()
        if count:
            canvas.box((at[0] + number * width, at[1] + size[1] - height), (width - 2, height), fill=BLUE, radius=2)
    canvas.text((at[0], at[1] + size[1] + 6), str(low), size=10, colour=MUTED)
    canvas.text((at[0] + width * len(counts) - 2, at[1] + size[1] + 6), str(high), size=10, colour=MUTED, anchor="ra")


def similarity(examples: RetrievalExamples, pixels: Pixels, *, subtitle: str) -> Canvas:
    """Cosine of each image (row) and each caption (column), as colours; the right pairs are outlined."""
    matrix = examples.similarity.double().numpy()
    num, cell = len(matrix), 20.0
    left, labels = _EDGE + 230, 150.0
    top = _HEAD + labels
    canvas = Canvas(width=left + num * cell + 150 + _EDGE, height=top + num * cell + _EDGE)
    _heading(canvas, "Images against captions", subtitle)
    diagonal = float(matrix.diagonal().mean())
    others = (float(matrix.sum()) - float(matrix.trace())) / max(num * (num - 1), 1)
    limits = min(others, float(matrix.max())), float(matrix.max())  # below the average wrong pair all is pale
    canvas.heat_map((left, top), cell, (matrix - limits[0]) / max(limits[1] - limits[0], 1e-12))
    for number, (key, caption) in enumerate(zip(examples.keys, examples.captions, strict=True)):
        offset = number * cell
        short = wrap(caption, labels - 12, 10, 1)[0]
        canvas.slanted((left + offset + cell / 2, top - 6), short, size=10)
        canvas.tile((left - cell - 2, top + offset + 0.5), cell - 1, pixels.get(key), weight=0.5)
        name = wrap(caption, left - cell - 10 - _EDGE, 10, 1)[0]
        canvas.text((left - cell - 8, top + offset + cell / 2), name, size=10, colour=MUTED, anchor="rm")
        canvas.box((left + offset, top + offset), (cell, cell), line=ORANGE, weight=1.5)
    canvas.box((left, top), (num * cell, num * cell), line=LINE)
    _scale_bar(canvas, (left + num * cell + 24, top), limits)
    for row, (name, value) in enumerate((("right pairs", diagonal), ("wrong pairs", others))):
        place = (left + num * cell + 24, top + 250 + 44 * row)
        canvas.text(place, name, size=11, colour=MUTED)
        canvas.text((place[0], place[1] + 15), f"{value:+.3f}", size=15, bold=True)
    return canvas


def _scale_bar(canvas: Canvas, at: tuple[float, float], limits: tuple[float, float], height: float = 200) -> None:
    canvas.text((at[0], at[1]), "cosine", size=11, colour=MUTED)
    canvas.heat_map((at[0], at[1] + 20), 2, np.repeat(np.linspace(1, 0, round(height / 2))[:, None], 8, axis=1))
    canvas.text((at[0] + 24, at[1] + 20), f"{limits[1]:+.2f}", size=11)
    canvas.text((at[0] + 24, at[1] + 20 + height), f"≤ {limits[0]:+.2f}", size=11, anchor="ls")


def retrieval_grid(examples: RetrievalExamples, pixels: Pixels, *, subtitle: str) -> Canvas:
    """Captions of the validation split and the images that they find, the right one framed green."""
    rows = []
    for (text, hits), right in zip(examples.searches, examples.keys, strict=False):
        answers = [Answer(name="", score=s, pixels=pixels.get(key), is_right=key == right) for key, s in hits]
        rows.append((text, answers))
    return search_grid(rows, subtitle=subtitle)


def search_grid(rows: Sequence[tuple[str, Sequence[Answer]]], *, subtitle: str) -> Canvas:
    """One row for each text: the pictures that score highest, best first, with score and (where known) name."""
    side, gap, text_column = 116.0, 14.0, 220.0
    num_columns = max((len(answers) for _, answers in rows), default=0)
    has_names = any(answer.name for _, answers in rows for answer in answers)
    row_height = side + (44 if has_names else 30)
    width = max(2 * _EDGE + text_column + num_columns * (side + gap), 560)
    canvas = Canvas(width=width, height=_HEAD + len(rows) * row_height + _EDGE / 2)
    _heading(canvas, "Text finds image", subtitle)
    if any(answer.is_right is not None for _, answers in rows for answer in answers):
        _legend(canvas, width - _EDGE)
    for number, (text, answers) in enumerate(rows):
        y = _HEAD + number * row_height
        _query(canvas, (_EDGE, y), text, answers, (text_column - 20, side))
        for place, answer in enumerate(answers):
            _answer(canvas, (_EDGE + text_column + place * (side + gap), y), answer, side)
    return canvas


def _query(
    canvas: Canvas, at: tuple[float, float], text: str, answers: Sequence[Answer], size: tuple[float, float]
) -> None:
    lines = wrap(text, size[0], 15, 4)
    known = any(answer.is_right is not None for answer in answers)
    block = len(lines) * 15 * 1.3 + (20 if known else 0)
    y = at[1] + (size[1] - block) / 2
    canvas.lines((at[0], y), lines, size=15)
    if known:
        place = next((number for number, answer in enumerate(answers, 1) if answer.is_right), None)
        found = f"right image at place {place}" if place else f"right image not in the first {len(answers)}"
        canvas.text((at[0], y + block - 14), found, size=10, colour=GREEN if place else MUTED)


def _answer(canvas: Canvas, at: tuple[float, float], answer: Answer, side: float) -> None:
    x, y = at
    frame, weight = (GREEN, 4.0) if answer.is_right else (GREY if answer.is_right is False else LINE, 1.5)
    canvas.tile(at, side, answer.pixels, frame=frame, weight=weight)
    colour = GREEN if answer.is_right else INK if answer.is_right is None else MUTED
    canvas.text((x + side / 2, y + side + 4), f"{answer.score:.3f}", size=11, colour=colour,
                bold=bool(answer.is_right), anchor="ma")  # fmt: skip
    if answer.name:
        canvas.lines((x, y + side + 19), wrap(answer.name, side, 9, 1), size=9, colour=MUTED, centre=side)


def _legend(canvas: Canvas, right: float) -> None:
    for name, frame, weight in (("other image", GREY, 1.5), ("right image", GREEN, 3.0)):
        right -= text_width(name, 11)
        canvas.text((right, 28), name, size=11, colour=MUTED)
        canvas.box((right - 20, 28), (13, 13), line=frame, weight=weight, radius=3)
        right -= 36


def _heading(canvas: Canvas, title: str, subtitle: str) -> None:
    canvas.text((_EDGE, 18), title, size=18, bold=True)
    canvas.text((_EDGE, 43), subtitle, size=11, colour=MUTED)
