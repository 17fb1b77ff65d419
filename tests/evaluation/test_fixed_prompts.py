"""Fixed prompts: whom they are asked of, what is expected, which pictures are kept, and that ranks change nothing."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from answering_toys import TOO_LONG, asked
from embedding_toys import batches
from PIL import Image
from torch import Tensor

from vlm_train.distributed import collectives
from vlm_train.distributed.testing import run_ranks
from vlm_train.engine.scores import counts_of, scores_of
from vlm_train.errors import ConfigError, DataError
from vlm_train.evaluation.answering import Reply
from vlm_train.evaluation.fixed_prompts import FixedPrompts
from vlm_train.types import Batch, Grid

SPLIT: list[dict] = [
    {"qa": [asked("which?", "red"), asked("how many?", "2")]},
    {"conversations": ["what is it?", "a ball"]},
    {},
    {"qa": 5},
    {"qa": [asked("is it red?", "no")]},
]
KEYS = [f"key{n}" for n in range(len(SPLIT))]


class Written:
    """How dialogues are written; of a sample with `conversations` the first of them is asked."""

    stop_id = 0

    def __init__(self, reads_questions: bool = True) -> None:
        self.reads_questions = reads_questions

    def question(self, text: str, grids: Sequence[Grid]) -> list[int]:
        raise AssertionError(text)

    def opening(self, metadata: Mapping[str, Any], caption: str) -> tuple[str, str]:
        found = metadata.get("conversations") if self.reads_questions else None
        return (found[0], found[1]) if found else ("<image>", caption)


class Toy:
    """Says which picture it was shown and how it was asked."""

    def __init__(self, reads_questions: bool = True) -> None:
        self.dialogues = Written(reads_questions)
        self.calls: list[int] = []

    def open_picture(self, path: Path) -> tuple[Tensor, Grid]:
        if path.suffix != ".png" or not path.is_file():
            raise DataError("there is no such file", got=path)
        return torch.full((3, 3, 2, 2), 200, dtype=torch.uint8), Grid(1, 2)

    def answers(self, batch: Batch, questions: Sequence[Sequence[str]], *, max_new_tokens: int) -> list[list[Reply]]:
        assert len(batch["images"]) == len(questions) == len(batch["grids"])
        self.calls.append(int(collectives.all_reduce_sum(torch.tensor(len(questions)))))
        rows = zip(batch["images"].tolist(), batch["num_images"].tolist(), batch["grids"].tolist(), strict=True)
        return [
            [self.say(text, images, num, grids) for text in texts]
            for texts, (images, num, grids) in zip(questions, rows, strict=True)
        ]

    @staticmethod
    def say(text: str, images: list, num: int, grids: list) -> Reply:
        if text.startswith(TOO_LONG):
            return DataError("dialogue_too_long", got="99 tokens")
        return f"{text} of {[image[0][0][0] for image in images[:num]]} {[grid[:2] for grid in grids if grid[0]]}"


def split_of(batch_size: int = 2, images: int = 1, split: list[dict] = SPLIT) -> Iterator[Batch]:
    """Sample n shows n, and with several images 10 n in the second; sample 2 is text alone."""
    for batch in batches([[f"caption {n}"] for n in range(len(split))], batch_size, metadata=split):
        pixels = batch["images"][:, 0, 0, 0].tolist()
        batch["num_images"] = torch.tensor([0 if pixel == 2 else images for pixel in pixels])
        if images > 1:
            batch["images"] = torch.stack([batch["images"], batch["images"] * 10], dim=1)
        yield batch


def run(toy: Toy | None = None, batch_size: int = 2, images: int = 1, **options: Any) -> tuple[dict, FixedPrompts]:
    evaluator = FixedPrompts(**options)
    return evaluator.run(toy or Toy(), split_of(batch_size, images)), evaluator


def test_without_prompts_the_first_samples_are_asked_their_first_question() -> None:
    result, evaluator = run(num=4)
    rows = [(row["image"], row["prompt"], row["expected"], row["answer"]) for row in result["answers"]]
    assert rows == [
        ("key0", "which?", "red", "which? of [0] [[1, 1]]"),
        ("key1", "what is it?", "a ball", "what is it? of [1] [[1, 1]]"),
        ("key2", "<image>", "caption 2", "<image> of [] []"),  # a text alone is asked about no picture
        ("key3", "<image>", "caption 3", "<image> of [3] [[1, 1]]"),
    ]
    assert [len(row["pictures"]) for row in result["answers"]] == [1, 1, 0, 1] and result["num_prompts"] == 4
    assert set(evaluator.pictures) == {name for row in result["answers"] for name in row["pictures"]}
    shown = Image.open(io.BytesIO(evaluator.pictures[result["answers"][3]["pictures"][0]]))
    assert shown.getpixel((0, 0)) == (3, 0, 0)
    assert scores_of(result) == [] and counts_of(result) == {"prompts": 4}


def test_where_no_question_is_read_the_caption_is_expected() -> None:
    result, _ = run(Toy(reads_questions=False), num=2)
    assert [(row["prompt"], row["expected"]) for row in result["answers"]] == [
        ("<image>", "caption 0"), ("<image>", "caption 1"),
    ]  # fmt: skip
    result, _ = run(Toy(reads_questions=False), prompts=[{"image": "key1", "prompt": "which?"}])
    assert result["answers"][0]["expected"] == "caption 1"


def test_prompts_are_about_files_and_keys_in_their_order(tmp_path: Path) -> None:
    photo, text = tmp_path / "photo.png", tmp_path / "text.txt"
    photo.write_text("a picture")
    text.write_text("none")
    given = [("key4", "Is it red"), (str(photo), "what?"), ("key0", "how many?"), ("nowhere", "what?"), ("key1", "hm?"),
             (str(text), "what?"), ("key1", f"{TOO_LONG} there was")]  # fmt: skip
    prompts = [{"image": image, "prompt": prompt} for image, prompt in given]
    result, evaluator = run(images=2, prompts=prompts)
    assert [row["prompt"] for row in result["answers"]] == [prompt for _, prompt in given]
    assert [row["expected"] for row in result["answers"]] == ["no", None, "2", None, None, None, None]
    answers = [row["answer"] for row in result["answers"]]
    assert answers == [
        "Is it red of [4, 40] [[1, 1], [1, 1]]", "what? of [200, 200, 200] [[1, 2]]",
        "how many? of [0, 0] [[1, 1], [1, 1]]", None, "hm? of [1, 10] [[1, 1], [1, 1]]", None, None,
    ]  # fmt: skip
    reasons = [row["reason"] for row in result["answers"]]
    assert [bool(reason) for reason in reasons] == [answer is None for answer in answers]
    assert "no sample" in reasons[3] and "99 tokens" in reasons[6]
    assert result["answers"][1]["image"] == "photo.png" and len(result["answers"][1]["pictures"]) == 1
    # two of key4 and of key1, one of key0, whose two are equal, and the overview of the photo
    assert len(evaluator.pictures) == 6


@pytest.mark.parametrize("prompts", [[], ["what?"], [{"image": "a"}], [{"image": "a", "prompt": 3}], [{"a": "b"}]])
def test_what_is_no_prompt_is_refused(prompts: list) -> None:
    with pytest.raises(ConfigError, match="no prompts"):
        FixedPrompts(prompts=prompts)
    with pytest.raises(ConfigError):
        FixedPrompts(num=0)


def everything() -> list:
    toys, found = [], []
    keys = [{"image": key, "prompt": "what?"} for key in (*KEYS[::-1], "nowhere")]
    for options in ({"num": 4}, {"num": 1}, {"prompts": keys}):
        toys.append(Toy())
        result, evaluator = run(toys[-1], **options)
        found.append([result, sorted(evaluator.pictures)])
    twice = [{}, *[{"qa": [asked("which?", str(n))]} for n in range(3)]]
    first = FixedPrompts(prompts=[{"image": "same", "prompt": "which?"}])
    named = list(split_of(1, split=twice))
    for batch in named:
        batch["keys"] = [
            "same" if row.get("qa") else key for key, row in zip(batch["keys"], batch["metadata"], strict=True)
        ]
    found.append(first.run(Toy(), iter(named))["answers"])
    return [json.dumps(found), [toy.calls for toy in toys]]


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_world_size_asks_the_same(world_size: int) -> None:
    alone = everything()
    assert json.loads(alone[0])[-1][0]["expected"] == "0"  # of a key that is there more than once the first
    results = run_ranks(everything, world_size)
    assert [result[0] for result in results] == [alone[0]] * world_size
    assert all(result[1] == alone[1] for result in results)
