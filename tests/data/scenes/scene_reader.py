"""Reads a scene's sentences and questions by itself, to judge them by `regions` alone.

It shares no code with the package: what is true is derived here a second time.
"""

from __future__ import annotations

import io
import json
import re

import numpy as np
from PIL import Image

from vlm_train.data.scenes.make import Variant, make_sample
from vlm_train.data.scenes.world import COLORS, SHAPES

NUMBERS = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
NOUN = re.compile(rf"(?:an? )(?:(small|large) )?({'|'.join(COLORS)}) ({'|'.join(SHAPES)})")
PREDICATES = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (1, -1), "below": (1, 1)}


def make(index: int, seed: int = 5, size: int = 64, **corruption: float) -> tuple[np.ndarray, dict, str]:
    _, parts = make_sample(index, seed=seed, size=size, variant=Variant(corruption=corruption))
    return np.asarray(Image.open(io.BytesIO(parts["png"]))), json.loads(parts["json"]), parts["txt"].decode()


def kinds(truth: dict) -> dict[tuple[str, str], dict]:
    return {kind_of(row): row for row in truth["regions"]}


def kind_of(region: dict) -> tuple[str, str]:
    return region["attributes"][0], region["class"]


def relation_holds(truth: dict, subject: tuple[str, str], words: str, other: tuple[str, str]) -> bool | None:
    """None where the boxes meet along the axis; the second opinion on `claims.related`."""
    axis, sign = PREDICATES[words]
    found = kinds(truth)
    if subject not in found or other not in found:
        return False
    (low, high), (other_low, other_high) = (found[kind]["box"][axis::2] for kind in (subject, other))
    if high <= other_low:
        return sign < 0
    return sign > 0 if other_high <= low else None


def says(sentence: str, truth: dict) -> bool | None:
    """Whether a sentence is true of the regions; None where it is open; raises when it cannot be read."""
    regions = truth["regions"]
    if (match := re.fullmatch(r"there (?:is|are) (\w+) objects?", sentence)) and match[1] in NUMBERS:
        return len(regions) == NUMBERS[match[1]]
    if match := re.fullmatch(r"there is (no|an?) (?:(\w+) )?(\w+)", sentence):
        color, shape = match[2], match[3]
        seen = any(
            (color is None or row["attributes"][0] == color) and shape in (row["class"], "object") for row in regions
        )
        return seen == (match[1] != "no")
    nouns = [(match[1], (match[2], match[3])) for match in NOUN.finditer(sentence)]
    rest = NOUN.sub("", sentence)
    words = next((words for words in PREDICATES if words in sentence), None)
    known = {"", ",", "and", "with", *(words or "").split()}
    prefix = re.match(r"(a picture of|an image of|a drawing of|here we see|\w+ objects?:) ", rest)
    assert set(rest[prefix.end() if prefix else 0 :].replace(",", " ").split()) <= known, sentence
    there = all(kind in kinds(truth) and size in (None, kinds(truth)[kind]["attributes"][1]) for size, kind in nouns)
    if prefix and prefix[1].endswith(":") and NUMBERS[prefix[1].split()[0]] != len(regions):
        return False
    if words is None or not there:
        return there
    return relation_holds(truth, nouns[0][1], words, nouns[1][1])


def answer(question: str, truth: dict, size: int = 64) -> str:
    """The answer to a question about a picture of `size` pixels, from the regions alone."""
    rows = truth["regions"]
    if match := re.fullmatch(r"what color is the (\w+)\?", question):
        (row,) = [row for row in rows if row["class"] == match[1]]
        return row["attributes"][0]
    if match := re.fullmatch(r"what shape is the (\w+) object\?", question):
        (row,) = [row for row in rows if row["attributes"][0] == match[1]]
        return row["class"]
    if match := re.fullmatch(r"is the (\w+) (\w+) small or large\?", question):
        return kinds(truth)[match[1], match[2]]["attributes"][1]
    if match := re.fullmatch(r"how many (.+) are there\?", question):
        noun = match[1].removesuffix(" objects")
        singular = noun[:-2] if noun == "crosses" else noun.removesuffix("s")
        return str(sum(noun == row["attributes"][0] or singular in (row["class"], "object") for row in rows))
    if match := re.fullmatch(r"is there an? (\w+) (\w+)\?", question):
        return "yes" if (match[1], match[2]) in kinds(truth) else "no"
    if match := re.fullmatch(r"where is the (\w+) (\w+)\?", question):
        x0, y0, x1, y1 = kinds(truth)[match[1], match[2]]["box"]
        names = [["top", "", "bottom"][_third(y0, y1, size)], ["left", "", "right"][_third(x0, x1, size)]]
        return " ".join(filter(None, names)) or "center"
    match = re.fullmatch(r"is the (\w+) (\w+) (.+) the (\w+) (\w+)\?", question)
    holds = relation_holds(truth, (match[1], match[2]), match[3], (match[4], match[5]))
    return {True: "yes", False: "no", None: "open"}[holds]


def _third(low: int, high: int, size: int) -> int:
    """In which third of a side the middle of [low, high] lies."""
    middle = (low + high) / 2
    return 0 if middle < size / 3 else 1 if middle < 2 * size / 3 else 2
