"""The same prompts at every evaluation, so that a person sees what a model learns to say.

Nothing is scored. A prompt whose picture is not there, or that does not fit the model, has the reason in place of an
answer.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from vlm_train.distributed import collectives
from vlm_train.errors import ConfigError, DataError
from vlm_train.evaluation.answering import Answerer, Prompts, Reply
from vlm_train.evaluation.answers import normalise
from vlm_train.evaluation.base import check_counts, counted
from vlm_train.evaluation.questions import questions_of
from vlm_train.log import get_logger
from vlm_train.types import Batch, Grid, grids_of

LOG = get_logger(__name__)

_SHOWN_SIDE = 192  # pixels of the pictures that are kept for a report


class Shown(Protocol):
    """What prompts ask of a model beside answers; `answering.Answerer` has it."""

    dialogues: Prompts

    def open_picture(self, path: Path) -> tuple[Tensor, Grid]:
        """A file to what the model sees of it, uint8 [N, 3, S, S], and its tiles. Raises DataError."""


class Sample(NamedTuple):
    """Something that is asked about: `images` uint8 [N, 3, S, S] of pictures with tiles `grids`; what `prompt` is asked
    and which answer is `expected`, None where nobody knows one."""

    name: str
    prompt: str
    expected: str | None
    images: Tensor
    grids: tuple[Grid, ...]


class FixedPrompts:
    """What a model answers to some prompts.

    `pictures`: of the last `run`, by the names that its result gives them, each a PNG.

    Args:
        prompts: [{image, prompt}]; `image` is a file, or the key of a validation sample. None takes the first samples
            of the validation split, each with its first question.
        num: how many of these.
        max_new_tokens: an answer that has not ended by then is cut off.

    Raises:
        ConfigError: prompts of another form, or a number below 1.
    """

    name, asks = "prompts", Answerer

    def __init__(
        self, *, prompts: Sequence[Mapping[str, str]] | None = None, num: int = 6, max_new_tokens: int = 64
    ) -> None:
        check_counts("num", [num])
        check_counts("max_new_tokens", [max_new_tokens])
        if prompts is not None and not (prompts and all(map(_is_prompt, prompts))):
            raise ConfigError("these are no prompts about pictures", got=prompts, allowed="a list of {image, prompt}",
                              remedy='prompts: [{image: photo.jpg, prompt: "What is this?"}]')  # fmt: skip
        self.prompts, self.num, self.max_new_tokens = prompts, num, max_new_tokens
        self.pictures: dict[str, bytes] = {}

    def run(self, embedder: Any, batches: Iterator[Batch]) -> dict[str, Any]:
        """Answers, no scores. Collective: every rank brings its share, in equally many batches.

        Returns:
            `answers` [{image, prompt, expected, answer, reason, pictures}]: the name of what was asked about; the
            answer that is known to be right, or None; what the model said, or None and the reason; and the names of
            `pictures`. `num_prompts`.
        """
        if self.prompts is None:
            found = self._first_samples(embedder.dialogues, batches)
        else:
            found = self._chosen(embedder, self.prompts, batches)
        told = embedder.answers(
            _batch_of(list(found.values())),
            [[sample.prompt] for sample in found.values()],
            max_new_tokens=self.max_new_tokens,
        )
        mine = [[place, _row(sample, *reply)] for (place, sample), reply in zip(found.items(), told, strict=True)]
        drawn = {name: png for sample in found.values() for name, png in _drawn(sample).items()}
        parts = collectives.gather_objects([mine, drawn])
        self.pictures = {name: base64.b64decode(png) for _, pictures in parts for name, png in pictures.items()}
        rows = {place: row for part, _ in parts for place, row in part}
        for place, prompt in enumerate(self.prompts or []):
            rows.setdefault(place, _missing(prompt))
        answers = [rows[place] for place in sorted(rows)]
        if collectives.rank() == 0:
            _tell_refused(answers)
        return {"num_prompts": len(answers), "answers": answers}

    def _first_samples(self, dialogues: Prompts, batches: Iterator[Batch]) -> dict[int, Sample]:
        """Of the first samples of the split those that this rank has, by place."""
        rows: list[Sample] = []
        for batch, row in _rows_of(batches):
            if len(rows) < self.num:  # the others are read all the same, for what the loader tells of them
                rows.append(_sample(batch, row, dialogues, _openings(batch, row, dialogues)[0][0]))
        before = sum(collectives.gather_objects(len(rows))[: collectives.rank()])
        return {place: sample for place, sample in enumerate(rows, start=before) if place < self.num}

    def _chosen(
        self, answerer: Shown, prompts: Sequence[Mapping[str, str]], batches: Iterator[Batch]
    ) -> dict[int, Sample]:
        """Of the prompts those that this rank asks, by place. A key that is there more than once is the first one's."""
        found = _of_files(answerer, prompts) if collectives.rank() == 0 else {}
        for batch, row in _rows_of(batches):
            for place, prompt in enumerate(prompts):
                if prompt["image"] == batch["keys"][row] and place not in found:
                    found[place] = _sample(batch, row, answerer.dialogues, prompt["prompt"])
        before = collectives.gather_objects(sorted(found))[: collectives.rank()]
        taken = {place for part in before for place in part}
        return {place: found[place] for place in sorted(found) if place not in taken}


def _is_prompt(row: Any) -> bool:
    texts = row.values() if isinstance(row, Mapping) and set(row) == {"image", "prompt"} else [None]
    return all(isinstance(text, str) for text in texts)


def _rows_of(batches: Iterator[Batch]) -> Iterator[tuple[Batch, int]]:
    """Every sample, as a batch and its row."""
    for batch in batches:
        for row in counted(batch).nonzero().flatten().tolist():
            yield batch, row


def _of_files(answerer: Shown, prompts: Sequence[Mapping[str, str]]) -> dict[int, Sample]:
    found = {}
    for place, prompt in enumerate(prompts):
        path = Path(prompt["image"]).expanduser()
        try:
            images, grid = answerer.open_picture(path)
        except DataError as error:
            if path.is_file():
                LOG.warning("%s is no picture that can be read: %s", path, error)
            continue
        found[place] = Sample(path.name, prompt["prompt"], None, images, (grid,))
    return found


def _openings(batch: Batch, row: int, dialogues: Prompts) -> list[tuple[str, str]]:
    """Questions of a sample with their answers, the first of its `qa` in front."""
    opening = dialogues.opening(batch["metadata"][row], batch["all_captions"][row][0])
    if not dialogues.reads_questions:
        return [opening]
    try:
        asked = [(question.text, question.answer) for question in questions_of(batch["metadata"][row])]
    except (TypeError, KeyError, AttributeError, ValueError):  # it has a dialogue all the same
        asked = []
    return [*asked, opening]


def _sample(batch: Batch, row: int, dialogues: Prompts, prompt: str) -> Sample:
    known = _openings(batch, row, dialogues)
    answers = {normalise(text): answer for text, answer in reversed(known)}
    expected = answers.get(normalise(prompt)) if dialogues.reads_questions else known[0][1]
    images = batch["images"][row] if batch["images"].ndim == 5 else batch["images"][row][None]
    mine = images[: int(batch["num_images"][row])].cpu().clone()  # a view would keep the whole batch
    return Sample(batch["keys"][row], prompt, expected, mine, tuple(grids_of(batch)[row]))


def _batch_of(samples: Sequence[Sample]) -> Batch:
    """Of none too, for a rank that has no prompt."""
    num_images = [len(sample.images) for sample in samples]
    shape = samples[0].images.shape[1:] if samples else (3, 1, 1)
    images = torch.zeros(len(samples), max([1, *num_images]), *shape, dtype=torch.uint8)
    most = max([1, *(len(sample.grids) for sample in samples)])
    grids = torch.zeros(len(samples), most, len(Grid._fields), dtype=torch.int64)
    for row, sample in enumerate(samples):
        images[row, : len(sample.images)] = sample.images
        grids[row, : len(sample.grids)] = torch.tensor(sample.grids).view(-1, len(Grid._fields))
    return Batch(images=images, num_images=torch.tensor(num_images, dtype=torch.int64), grids=grids)


def _row(sample: Sample, reply: Reply) -> dict[str, Any]:
    refused = isinstance(reply, DataError)
    return {
        "image": sample.name,
        "prompt": sample.prompt,
        "expected": sample.expected,
        "answer": None if refused else reply,
        "reason": f"{reply.what}: {reply.got}" if isinstance(reply, DataError) else None,
        "pictures": list(_drawn(sample)),
    }


def _missing(prompt: Mapping[str, str]) -> dict[str, Any]:
    reason = "no picture in a file and no sample of the validation split has this name"
    return {**prompt, "expected": None, "answer": None, "reason": reason, "pictures": []}


def _tell_refused(answers: Sequence[Mapping[str, Any]]) -> None:
    refused = [f"{row['image']} ({row['reason']})" for row in answers if row["reason"]]
    if refused:
        LOG.warning("%d prompts have no answer: %s", len(refused), ", ".join(refused))


def _drawn(sample: Sample) -> dict[str, str]:
    """The pictures of a sample, of one in tiles its overview: name -> PNG in base64. A name comes of the pixels."""
    found, place = {}, 0
    for grid in sample.grids:
        image = Image.fromarray(sample.images[place].permute(1, 2, 0).contiguous().numpy())
        image.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
        file = io.BytesIO()
        image.save(file, "PNG")
        name = hashlib.sha256(file.getvalue()).hexdigest()[:16]
        found[name] = base64.b64encode(file.getvalue()).decode()
        place += grid.num_images
    return found
