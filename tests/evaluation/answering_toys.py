"""Pictures with questions, and models that answer from the picture, from the question alone, or not at all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from embedding_toys import batches

from vlm_train.distributed import collectives
from vlm_train.errors import DataError
from vlm_train.evaluation.answering import Pictures, Reply
from vlm_train.evaluation.vqa import VisualQuestions, YesNo
from vlm_train.types import Batch

COLORS = ["red", "blue", "red", "green", "red", "blue", "red", "red", "green", "blue", "red"]
NUM = len(COLORS)
WITHOUT = (3, 10)  # pictures without questions
BLANK = 255  # the number of a picture without anything
TOO_LONG = "once upon a time"  # how a question begins that does not fit


def asked(question: str, answer: str | list[str], kind: str | None = None) -> dict:
    return {
        "question": question,
        **({"answers": answer} if isinstance(answer, list) else {"answer": answer}),
        **({"type": kind} if kind else {}),
    }


def color_of(picture: int) -> dict:
    return asked("What color is it?", COLORS[picture], "color")


def pictures() -> list[dict]:
    """Unequally many questions a picture; people disagree about one; one question is asked once in the split."""
    rows = [
        {
            "qa": [
                color_of(n),
                asked("is it red?", "yes" if COLORS[n] == "red" else "no", "existence"),
                *[asked(f"how many {thing} are there?", str((n * n) % 3), "count") for thing in "abc"[: n % 4]],
            ]
        }
        for n in range(NUM)
    ]
    rows[4]["qa"].append(asked("what is it?", ["a big ball"] * 2 + ["ball"] * 5 + ["sphere", "toy", "moon"]))
    for n in WITHOUT:
        rows[n] = {}
    return rows


Say = Callable[[int, dict, str], str]
"""(number of the picture, KEY.json of the row, question) -> answer."""


class Toy:
    """Answers with a function; takes part in a collective for each call, so that ranks that call unequally often do
    not go unnoticed."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.calls: list[int] = []

    def answers(self, batch: Batch, questions: Sequence[Sequence[str]], **options: int) -> list[list[Reply]]:
        pixels = batch["images"][:, 0, 0, 0].tolist()
        assert len(questions) == len(pixels) == len(batch["num_images"])
        self.count(sum(map(len, questions)))
        return [
            [self.reply(pixel, metadata, text) for text in texts]
            for pixel, metadata, texts in zip(pixels, batch["metadata"], questions, strict=True)
        ]

    def blind_answers(self, questions: Sequence[tuple[str, Pictures]]) -> list[Reply]:
        """As of a picture that is none of the split."""
        self.count(len(questions))
        return [self.reply(BLANK, {"qa": []}, text) for text, grids in questions]

    def count(self, num: int) -> None:
        self.calls.append(int(collectives.all_reduce_sum(torch.tensor(num))))

    def reply(self, picture: int, metadata: dict, question: str) -> Reply:
        if question.startswith(TOO_LONG):
            return DataError("dialogue_too_long", got=f"{len(question)} tokens")
        return self.say(picture, metadata, question)


def oracle(picture: int, metadata: dict, question: str) -> str:
    """What KEY.json of the row says."""
    rows = {row["question"]: row for row in metadata["qa"]}
    return rows.get(question, {"answer": "unknown"}).get("answer", "ball")


def seeing(picture: int, metadata: dict, question: str) -> str:
    """Sees only the picture, whose pixels say which one it is, and in it only colors."""
    if picture == BLANK:
        return "yes"
    if "red" in question:
        return "Yes, it is." if COLORS[picture] == "red" else "No, it is not."
    return f"{COLORS[picture]}." if "color" in question else "I cannot tell"


def blind(split: list[dict]) -> Say:
    """Knows all questions of the split, the one that is asked too, and never looks."""
    told: dict[str, Counter[str]] = {}
    for row in (row for metadata in split for row in metadata.get("qa", [])):
        told.setdefault(row["question"], Counter())[row.get("answer", "ball")] += 1
    return lambda picture, metadata, question: told[question].most_common(1)[0][0]


def split_of(metadata: list[dict], batch_size: int) -> Iterator[Batch]:
    for batch in batches([[]] * len(metadata), batch_size, metadata=metadata):
        batch["num_images"] = torch.ones(len(batch["keys"]), dtype=torch.int64)
        yield batch


def all_results() -> list:
    """Everything that the evaluators say, as text, so that equality means equality of every bit; and their calls."""
    toys, results = [], []
    for metadata in (pictures(), pictures()[:2], pictures()[2:4]):  # some ranks have no picture, or none with questions
        for evaluator in (VisualQuestions(), VisualQuestions(types=["color"], max_per_image=1), YesNo()):
            toys.append(Toy(seeing))
            results.append(evaluator.run(toys[-1], split_of(metadata, 2)))
    return [json.dumps(results), [toy.calls for toy in toys]]


def message() -> str:
    """Only one rank has a sample that cannot be read."""
    metadata = [*pictures()[:5], {"qa": [{"question": "which?"}]}]
    try:
        VisualQuestions().run(Toy(seeing), split_of(metadata, 2))
    except DataError as error:
        return str(error)
    return "no error"


def everything() -> list:
    return [*all_results(), message()]
