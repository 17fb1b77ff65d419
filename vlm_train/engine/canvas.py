"""A sheet of paper for pictures: text that fits, framed tiles, colours; drawn at twice the size for sharp screens.

All lengths are points, one CSS pixel each. The font is DejaVu Sans, which matplotlib ships: it has the letters of most
alphabets and needs no font on the machine.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SCALE = 2
WHITE, INK, MUTED, LINE, PANEL = "#ffffff", "#1f2328", "#656d76", "#d0d7de", "#f6f8fa"
GREEN, GREY, BLUE, ORANGE = "#1a7f37", "#c4cad1", "#3267c6", "#e8590c"
# white to dark blue, evenly darker from place to place, between which `heat` goes straight
_HEAT = np.array([[247, 250, 253], [203, 221, 240], [146, 186, 222], [84, 142, 197], [35, 93, 158], [10, 44, 92]])


class Canvas:
    """A white sheet of `width` x `height` points."""

    def __init__(self, *, width: float, height: float) -> None:
        self.image = Image.new("RGB", (round(width * SCALE), round(height * SCALE)), WHITE)
        self._draw = ImageDraw.Draw(self.image)

    def text(
        self,
        at: tuple[float, float],
        text: str,
        *,
        size: int = 12,
        colour: str = INK,
        bold: bool = False,
        anchor: str = "la",
    ) -> None:
        """One line; `anchor` as in Pillow: horizontal l, m, r, then vertical a (top), m (middle), s (baseline)."""
        self._draw.text((at[0] * SCALE, at[1] * SCALE), text, fill=colour, font=_font(size, bold), anchor=anchor)

    def lines(
        self, at: tuple[float, float], lines: list[str], *, size: int, colour: str = INK, centre: float = 0
    ) -> None:
        """Lines below each other; centred in a column of width `centre` if that is given."""
        for number, line in enumerate(lines):
            place = (at[0] + centre / 2, at[1] + number * size * 1.3)
            self.text(place, line, size=size, colour=colour, anchor="ma" if centre else "la")

    def slanted(self, at: tuple[float, float], text: str, *, size: int, colour: str = MUTED) -> None:
        """A line that rises by 90 degrees and ends its foot at `at`."""
        width, height = text_width(text, size), size * 1.4
        layer = Image.new("L", (round(width * SCALE) + SCALE, round(height * SCALE)))
        ImageDraw.Draw(layer).text((0, layer.height // 2), text, fill=255, font=_font(size, False), anchor="lm")
        mask = layer.rotate(90, expand=True)
        corner = (round(at[0] * SCALE - mask.width / 2), round(at[1] * SCALE - mask.height))
        self.image.paste(colour, (*corner, corner[0] + mask.width, corner[1] + mask.height), mask)

    def box(
        self, at: tuple[float, float], size: tuple[float, float], *, fill: str | None = None, line: str | None = None,
        weight: float = 1, radius: float = 0,
    ) -> None:  # fmt: skip
        """A rectangle with its line inside."""
        corners = [v * SCALE for v in (at[0], at[1])] + [(at[0] + size[0]) * SCALE - 1, (at[1] + size[1]) * SCALE - 1]
        self._draw.rounded_rectangle(corners, radius * SCALE, fill=fill, outline=line, width=round(weight * SCALE))

    def tile(
        self, at: tuple[float, float], side: float, pixels: np.ndarray | None, *, frame: str = LINE, weight: float = 1
    ) -> None:
        """A picture uint8 [H, W, 3] inside a framed square, whole; None is said to be missing."""
        margin = weight + (2 if weight > 1 else 0)
        inner = round((side - 2 * margin) * SCALE)
        if pixels is None:
            self.box(at, (side, side), fill=PANEL)
            self.text((at[0] + side / 2, at[1] + side / 2), "no picture", size=9, colour=MUTED, anchor="mm")
        else:
            picture = _contained(pixels, inner)
            left = round((at[0] + margin) * SCALE) + (inner - picture.width) // 2
            top = round((at[1] + margin) * SCALE) + (inner - picture.height) // 2
            self.image.paste(picture, (left, top), _rounded(picture.size, 5 * SCALE))
        self.box(at, (side, side), line=frame, weight=weight, radius=7)

    def heat_map(self, at: tuple[float, float], cell: float, values: np.ndarray) -> None:
        """Values [R, C] in 0..1 as coloured cells."""
        colours = Image.fromarray(heat(values))
        size = (round(values.shape[1] * cell * SCALE), round(values.shape[0] * cell * SCALE))
        self.image.paste(colours.resize(size, Image.Resampling.NEAREST), (round(at[0] * SCALE), round(at[1] * SCALE)))

    def save(self, path: Path) -> None:
        """Writes a PNG beside `path` and renames it: readers see the old or the new one, never a part."""
        temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        self.image.save(temporary, "PNG")
        os.replace(temporary, path)


def heat(values: np.ndarray) -> np.ndarray:
    """Values 0..1 of any shape to uint8 RGB [..., 3], pale to dark."""
    stops = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(values, stops, _HEAT[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def text_width(text: str, size: int, bold: bool = False) -> float:
    """Width of a line in points."""
    return _font(size, bold).getlength(text) / SCALE


def wrap(text: str, width: float, size: int, max_lines: int) -> list[str]:
    """The text in at most `max_lines` lines of `width` points; what does not fit ends in an ellipsis."""
    lines: list[str] = []
    words = " ".join(text.split()).split(" ")
    while words and len(lines) < max_lines:
        line = words.pop(0)
        while words and text_width(f"{line} {words[0]}", size) <= width:
            line = f"{line} {words.pop(0)}"
        lines.append(line)
    if words:
        lines[-1] = f"{lines[-1]} {words[0]}…"
    return [_cut(line, width, size) for line in lines]


def _cut(line: str, width: float, size: int) -> str:
    if text_width(line, size) <= width:
        return line
    line = line.removesuffix("…")
    while line and text_width(f"{line}…", size) > width:
        line = line[:-1]
    return f"{line.rstrip()}…"


@cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size * SCALE)


def _contained(pixels: np.ndarray, side: int) -> Image.Image:
    """The whole picture at the largest size that fits the square."""
    picture = Image.fromarray(pixels)
    factor = side / max(picture.size)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.BICUBIC)


@cache
def _rounded(size: tuple[int, int], radius: int) -> Image.Image:
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, size[0] - 1, size[1] - 1), radius, fill=255)
    return mask
