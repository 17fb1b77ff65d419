"""Brings dialogues in LLaVA's format into shards: a sample for each, with the images that it speaks of, or none.

The files are those of Liu et al. 2023 (github.com/haotian-liu/LLaVA, as `llava_v1_5_mix665k.json`) and all in their
format: a list of {id, image: a path or a list of paths, conversations: [{from: human | gpt, value}]}. KEY.json gets
`conversations` as turns {role, content}, and the first answer as the caption, so that the same shards also train a
model of captions.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_train.data.chat import IMAGE, Turn, num_images, turns_of
from vlm_train.data.decode import SampleError
from vlm_train.data.importers import Kinds, numbered_rows, require, write_records
from vlm_train.data.local import printable, regular
from vlm_train.data.records import Errors, Record, failure, is_name, read_image
from vlm_train.data.writer import Progress, Summary, to_json
from vlm_train.errors import DataError

_KINDS: Kinds = {"id": (str, int, type(None)), "image": (str, list, type(None)), "conversations": (list,)}
_MAX_BYTES = (1 << 31) - (1 << 16)  # of the images of a sample: as a tar's samples can be read, with room for texts


@dataclass(slots=True)
class Dialogue(Record):
    """One dialogue to import. `number`: which of its file it is, from 1 on. `file`: its first image, empty where it has
    none; `more`: the others."""

    more: list[str] = field(default_factory=list)
    number: int = 0

    @property
    def name(self) -> str:
        """Many dialogues may speak of one picture."""
        return _name(self.number, self.files, self.fields)

    @property
    def files(self) -> list[str]:
        """All images in order."""
        return [self.file, *self.more] if self.file else []


def import_llava(
    dialogues_json: Path,
    images_dir: Path,
    out: Path,
    *,
    val_fraction: float = 0.0,
    max_samples: int = 1000,
    progress: Progress | None = None,
) -> Summary:
    """Imports a file of dialogues to the split `train`.

    A dialogue that could not be learned is left out with the reason that training would give (`dialogue_roles` and so
    on); which images and how many tokens a model takes is not known here.

    Args:
        dialogues_json: the file.
        images_dir: the folder below which the images are that it names; none is taken from elsewhere.
        out: the dataset directory.
        val_fraction: share of the dialogues that go to `val`, by the hash of the first image (equal ones stay
            together), of texts alone by KEY.json.
        max_samples: samples to a shard.
        progress: called after each dialogue.

    Raises:
        DataError: a file of another format, or no dialogue that can be imported.
    """
    path, images_dir = Path(dialogues_json), Path(images_dir)
    if not 0 <= val_fraction <= 1:
        raise DataError("a share of the dialogues", got=val_fraction, allowed="from 0 to 1")
    require(path, "file of dialogues", os.path.exists)
    require(images_dir, "image folder", os.path.isdir)
    errors: Errors = []
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", opener=regular) as file:
            rows = numbered_rows(json.load(file), "dialogues", _KINDS, errors)
        if not rows:
            raise ValueError("no row has the keys of a dialogue")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} is not a file of dialogues",
            got=f"{type(error).__name__}: {error}",
            allowed="a list of {id, image, conversations} in JSON, as LLaVA has them",
            remedy="check the path, or write the dialogues in this form",
        ) from error
    found = [_dialogue(number, row, errors) for number, row in rows.items()]
    records = [dialogue for dialogue in found if dialogue is not None]
    parameters = {"dataset": "llava", "val_fraction": val_fraction}
    return write_records(records, errors, images_dir, Path(out), parameters, max_samples, progress, read=_parts)


def _dialogue(number: int, row: Mapping[str, Any], errors: Errors) -> Dialogue | None:
    listed = row.get("image")
    files = listed if isinstance(listed, list) else [listed] if listed else []
    name = _name(number, files, row)
    if not all(map(is_name, files)):
        errors.append(failure(name, "bad_row", f"{reprlib.repr(listed)} is no name of a file"))
        return None
    try:
        turns = turns_of({"conversations": _from_a_question_on(row["conversations"])}, "")
        caption = _first_answer(turns)
        if num_images(turns) != len(files):
            got = f"{num_images(turns)} {IMAGE} in the text"
            raise SampleError("dialogue_image_count", got=got, allowed=f"{len(files)}, as there are images")
    except SampleError as error:
        errors.append(failure(name, error.reason, error.detail[:200]))
        return None
    said = [{"role": turn.role, "content": turn.content} for turn in turns]
    fields = {"id": row.get("id"), "source": "llava", "conversations": said}
    first, more = (files[0], files[1:]) if files else ("", [])
    return Dialogue(file=first, captions=[caption], fields=fields, more=more, number=number)


def _name(number: int, files: Sequence[object], row: Mapping[str, Any]) -> str:
    """Where a dialogue stands, as `numbered_rows` says it, and what it is about."""
    about = files[0] if files else row.get("id")
    return f"dialogues {number}" if about is None else f"dialogues {number}: {about}"


def _from_a_question_on(turns: list[Any]) -> list[Any]:
    """Without an answer that nothing was asked before, as LLaVA's own reader takes dialogues; ShareGPT has such."""
    begins_late = len(turns) > 1 and isinstance(turns[0], dict) and turns[0].get("from") == "gpt"
    return turns[1:] if begins_late else turns


def _first_answer(turns: Sequence[Turn]) -> str:
    """The first answer that says something. Raises SampleError where none does."""
    for turn in turns:
        if turn.role == "assistant" and turn.content.strip():
            return turn.content.strip()
    raise SampleError("dialogue_no_label", got="no answer with text")


def _parts(record: Record, folder: Path) -> dict[str, bytes] | str:
    """The parts of a sample (images as they are, txt, json), or the reason why there is none."""
    assert isinstance(record, Dialogue)
    images: dict[str, bytes] = {}
    for place, file in enumerate(record.files):
        image = read_image(file, folder)
        if isinstance(image, str):
            return image
        suffix, content = image
        images[f"{place}.{suffix}" if record.more else suffix] = content
    if sum(map(len, images.values())) > _MAX_BYTES:
        return "sample_too_large"
    metadata = {"captions": record.captions, **record.fields}
    if record.files:
        metadata["files"] = [printable(file) for file in record.files]
    return {**images, "txt": record.captions[0].encode(), "json": to_json(metadata)}
