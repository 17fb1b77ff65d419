"""Pictures show the pixels they were given, where they should be, with the right frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_train.data.tokenizer import BytePairTokenizer
from vlm_train.engine import canvas, pictures
from vlm_train.engine.canvas import GREEN, GREY, SCALE, Canvas, heat, text_width, wrap
from vlm_train.evaluation.retrieval import RetrievalExamples
from vlm_train.types import Batch, ImageSpec

SIDE = 8


def colour(name: str) -> tuple[int, int, int]:
    return tuple(int(name[start : start + 2], 16) for start in (1, 3, 5))  # type: ignore[return-value]


def pixel(sheet: Canvas, x: float, y: float) -> tuple[int, int, int]:
    return sheet.image.getpixel((round(x * SCALE), round(y * SCALE)))  # type: ignore[return-value]


def plain(red: int, green: int, blue: int) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), (red, green, blue), np.uint8)


def test_the_first_batch_shows_its_own_pixels_in_order() -> None:
    tokenizer = BytePairTokenizer.train(["red"], vocab_size=259, context_length=16)
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    images = torch.stack([torch.from_numpy(plain(*rgb)).permute(2, 0, 1) for rgb in colours])
    ids, mask = tokenizer(["red", "green", "blue"])
    batch = Batch(images=images, text_ids=ids, text_mask=mask, captions=["red", "green", "blue"], step=0,
                  weights=torch.ones(3), uids=torch.arange(6).view(3, 2))  # fmt: skip
    sheet = pictures.first_batch(batch, tokenizer, ImageSpec(size=SIDE))
    centres = [(24 + 116 * column + 52, 68 + 52) for column in range(3)]
    assert [pixel(sheet, x, y) for x, y in centres] == colours


def test_the_right_image_and_only_it_is_framed_green() -> None:
    shown = {"a": plain(200, 0, 0), "b": plain(0, 0, 200)}
    examples = RetrievalExamples(
        keys=["a", "b"],
        captions=["first", "second"],
        similarity=torch.eye(2),
        searches=[("first", [("a", 0.9), ("b", 0.1)]), ("second", [("a", 0.8), ("b", 0.7)])],
    )
    sheet = pictures.retrieval_grid(examples, shown, subtitle="")
    frames = [[pixel(sheet, 24 + 220 + 130 * place + 58, 68 + 146 * row + 0.5) for place in (0, 1)] for row in (0, 1)]
    assert frames == [[colour(GREEN), colour(GREY)], [colour(GREY), colour(GREEN)]]
    inside = [[pixel(sheet, 24 + 220 + 130 * place + 58, 68 + 146 * row + 58) for place in (0, 1)] for row in (0, 1)]
    assert inside == [[(200, 0, 0), (0, 0, 200)]] * 2


def test_the_diagonal_of_a_good_model_is_dark_and_a_missing_picture_is_no_obstacle(tmp_path: Path) -> None:
    num = 4
    examples = RetrievalExamples(
        [f"k{i}" for i in range(num)], ["caption"] * num, torch.eye(num), [("c", [("k9", 0.5)])]
    )
    sheet = pictures.similarity(examples, {}, subtitle="")
    left, top = 24 + 230, 68 + 150
    cells = np.array(
        [[sum(pixel(sheet, left + 20 * j + 10, top + 20 * i + 10)) for j in range(num)] for i in range(num)]
    )
    assert (cells.diagonal() < 200).all() and (cells[~np.eye(num, dtype=bool)] > 700).all()
    path = tmp_path / "x.png"
    pictures.retrieval_grid(examples, {}, subtitle="").save(path)
    assert Image.open(path).format == "PNG" and [file.name for file in tmp_path.iterdir()] == ["x.png"]


def test_a_collapsed_model_can_be_drawn() -> None:
    examples = RetrievalExamples(["k"], ["c"], torch.ones(1, 1), [])
    assert pictures.similarity(examples, {}, subtitle="").image.width > 0


@pytest.mark.parametrize(
    "text", ["one", "a somewhat longer caption of many words " * 4, "unbreakable" * 20, "", "日本語 text"]
)
def test_wrapped_text_fits(text: str) -> None:
    lines = wrap(text, 100, 10, 2)
    assert len(lines) <= 2 and all(text_width(line, 10) <= 100 for line in lines)
    assert (" ".join(lines) == " ".join(text.split())) == (not any("…" in line for line in lines))


def test_a_tile_keeps_the_whole_picture() -> None:
    wide = np.zeros((4, 16, 3), np.uint8)
    sheet = Canvas(width=100, height=100)
    sheet.tile((0, 0), 100, wide)
    assert pixel(sheet, 50, 50) == (0, 0, 0) and pixel(sheet, 50, 20) == (255, 255, 255)


def test_heat_darkens_evenly() -> None:
    light = heat(np.linspace(0, 1, 50)).astype(int).sum(axis=1)
    assert (np.diff(light) < 0).all() and canvas.heat(np.array([-1.0]))[0].tolist() == heat(np.array([0.0]))[0].tolist()
