"""What a report shows of fixed prompts: the answers of all evaluations, the newest first."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from vlm_train.engine.prompts_page import prompt_cards


def told(answer: str | None, image: str = "key", expected: str | None = "a red ball", prompt: str = "what?") -> dict:
    reason = None if answer is not None else "dialogue_too_long: 99 tokens"
    return {
        "image": image,
        "prompt": prompt,
        "expected": expected,
        "answer": answer,
        "reason": reason,
        "pictures": ["ab"],
    }


def evaluated(step: int, *answers: dict) -> dict:
    return {"name": "prompts", "step": step, "answers": list(answers)}


@pytest.fixture
def media(tmp_path: Path) -> Path:
    Image.new("RGB", (2, 2)).save(tmp_path / "prompt-ab.png")
    return tmp_path


def rows_of(page: str) -> list[tuple[str, str]]:
    return [
        (steps, re.sub("<[^>]*>", "", text)) for steps, text in re.findall("<tr><td>(.*?)</td><td.*?>(.*?)</td>", page)
    ]


def test_answers_stand_by_step_the_newest_first_and_a_repeated_one_once(media: Path) -> None:
    said = ["", "a ball", "a ball", "A red ball.", "a ball"]
    page = prompt_cards([evaluated(1000 * n, told(text)) for n, text in enumerate(said)], media)
    assert rows_of(page) == [
        ("4,000", "a ball"), ("3,000", "✓ A red ball."), ("1,000 \u2013 2,000", "a ball"), ("0", "nothing"),
    ]  # fmt: skip
    assert page.count("data:image/png;base64,") == 1 and page.count("a red ball") == 1


def test_a_right_answer_is_marked_only_where_one_is_expected(media: Path) -> None:
    assert "✓" in prompt_cards([evaluated(1, told("the red ball"))], media)
    for other in (told("a red ball", expected=None), told("a blue ball"), told("", expected="")):
        assert "✓" not in prompt_cards([evaluated(1, other)], media)


def test_each_prompt_has_its_own_answers_and_one_that_is_asked_no_more_is_gone(media: Path) -> None:
    old, new = told("x", image="old"), told("y", image="new")
    page = prompt_cards([evaluated(1, old), evaluated(2, told("z", image="new"), old), evaluated(3, new)], media)
    assert rows_of(page) == [("3", "y"), ("2", "z")]


def test_what_was_not_answered_says_why_and_nothing_is_markup(media: Path) -> None:
    page = prompt_cards([evaluated(1, told(None, prompt="<image>\n<b>&</b>?", expected="<i>"))], media)
    assert "dialogue_too_long: 99 tokens" in page and "&lt;b&gt;&amp;&lt;/b&gt;?" in page and "&lt;i&gt;" in page
    assert "<i>" not in page and "&lt;image&gt;" not in page
    assert "the picture alone" in prompt_cards([evaluated(1, told("a", prompt="<image>"))], media)


def test_without_prompts_or_pictures_there_is_nothing_of_them(tmp_path: Path) -> None:
    assert prompt_cards([], tmp_path) == prompt_cards([{"name": "vqa", "step": 1, "accuracy": 3.0}], tmp_path) == ""
    assert prompt_cards([evaluated(1)], tmp_path) == ""
    assert "<img" not in prompt_cards([evaluated(1, told("a"))], tmp_path)
