from __future__ import annotations

import pytest

from vlm_train.cli.arguments import parse
from vlm_train.cli.tables import describe, table
from vlm_train.errors import ConfigError

KEYS = {"run": "RUN", "text": "TEXT", "top": "N"}


def test_keys_values_and_overrides_are_told_apart() -> None:
    found = parse(["run=a=b", "text=x", "text=y", "optim.lr=1"], KEYS, verb="v", repeatable=("text",), rest=True)
    assert found.required("run", example="run=R") == "a=b"
    assert found.all("text", example="text=T") == ["x", "y"] and found.overrides == ["optim.lr=1"]
    assert found.optional("top") is None and found.count("top", 8) == 8


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run=a", "run=b"], "given twice"),
        (["runs=a"], "run=..."),
        (["text="], "has no value"),
        (["help"], "does not know"),
    ],
)
def test_mistakes_are_named(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(words, KEYS, verb="v")


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5"])
def test_a_count_is_a_count(text: str) -> None:
    with pytest.raises(ConfigError, match="is no count"):
        parse([f"top={text}"], KEYS, verb="v").count("top", 8)


def test_what_is_missing_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="needs text="):
        parse([], KEYS, verb="v").all("text", example='text="a red car"')


def test_columns_line_up() -> None:
    assert table(["name", "n"], [["a", "1"], ["longer", "200"]], indent="") == [
        "name      n",
        "a         1",
        "longer  200",
    ]


def test_a_result_is_printed_with_its_controls() -> None:
    result = {"step": 1200, "text_to_image": {"R@1": 12.345}, "chance_text_to_image": {"R@1": 0.24}, "num_pairs": 4000,
              "interval_95": {"text_to_image": {"R@1": [10.0, 15.0]}}}  # fmt: skip
    assert describe("retrieval", result) == [
        "  retrieval          score  chance    95% interval",
        "  text to image R@1  12.35    0.24  10.00 to 15.00",
        "  4,000 pairs, step 1,200",
    ]
