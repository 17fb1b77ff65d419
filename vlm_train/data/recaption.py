"""New captions for the samples of shards, beside the shards: models write them, another may throw bad ones out.

The order of work, part by part: read, show each picture to the captioner, write captions, and, as BLIP's CapFilt does
(Li et al. 2022, arXiv 2201.12086), score every caption, the sample's own too, by a model that was trained to tell which
texts fit; captions below `min_score` go, whoever wrote them.

What is drawn depends on the seed, the uid and the number of the caption: neither on who else is in the batch nor on
what was done before. A part is a file that is committed by rename, so a killed command goes on behind the last one; the
settings stand in the folder, and other settings are refused. `provenance.json` comes last and makes the table whole.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vlm_train.data.decode import (
    MAX_CAPTION_CHARS,
    EncodedImage,
    SampleError,
    decode_captions,
    decode_metadata,
    first_image,
    open_image,
)
from vlm_train.data.recaption_folder import Recaptioned, claimed, finish, finished
from vlm_train.data.recaption_table import ORIGINAL, VERSION, Caption, facts_of, part_name, write_part
from vlm_train.data.transforms import keyed_generator
from vlm_train.errors import DataError
from vlm_train.types import RawSample, Source

_DECIMALS = 4  # of a score: the size of a batch changes a cosine of fp32 in the seventh

Progress = Callable[[int, int], None]


class Captioner(Protocol):
    """What writes captions."""

    source: str  # its name and the hash of its weights
    settings: Mapping[str, Any]  # what else decides its captions; plain JSON

    def shown(self, image: EncodedImage) -> Any:
        """A picture as the model is shown it; called from several threads. Raises SampleError."""

    def captions(self, shown: Sequence[Any], uniforms: NDArray[np.float64]) -> list[str | DataError]:
        """A caption for each picture [N], or why it cannot be captioned. `uniforms` [N, T], in [0, 1): what its tokens
        are drawn by."""


class Scorer(Protocol):
    """What tells how well texts fit a picture."""

    source: str

    def shown(self, image: EncodedImage) -> Any:
        """A picture as the model is shown it; called from several threads. Raises SampleError."""

    def scores(self, shown: Sequence[Any], captions: Sequence[Sequence[str]]) -> list[list[float]]:
        """For each picture [N] the cosine of each of its captions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What the table is, beside its models and samples.

    Attributes:
        num_captions: how many the captioner writes for a picture.
        max_new_tokens: of one caption.
        seed: of what is drawn.
        originals: whether the sample's own captions are in the table, where they survive.
        min_score: captions whose cosine is below go; None keeps all.
        part_size: samples of a part, which a kill costs.
    """

    num_captions: int = 1
    max_new_tokens: int = 64
    seed: int = 0
    originals: bool = True
    min_score: float | None = None
    part_size: int = 1024


def recaption(
    source: Source,
    rows: NDArray[np.int64],
    out: Path,
    *,
    captioner: Captioner,
    scorer: Scorer | None,
    recipe: Recipe,
    batch_size: int,
    progress: Progress,
) -> Recaptioned:
    """Writes the table of captions for `rows` of a source, or finishes it.

    Args:
        source: the samples.
        rows: which of them, each content once.
        out: the folder.
        captioner: writes captions.
        scorer: judges them; None keeps all.
        recipe: what the table is.
        batch_size: captions that are written at once; changes nothing but speed.
        progress: called with (samples done, samples in all).

    Raises:
        DataError: the folder holds something else, or a table by other settings; another process is writing it; a
            shard cannot be read; not one picture could be captioned.
    """
    settings = {
        "version": VERSION,
        "manifest": source.fingerprint,
        "rows": hashlib.sha256(np.asarray(rows, "<i8").tobytes()).hexdigest(),
        "captioner": captioner.source,
        **captioner.settings,
        "scorer": None if scorer is None else scorer.source,
        **asdict(recipe),
    }
    with claimed(out, settings):
        if (found := finished(out)) is not None:
            return found
        work = _Work(source, captioner, scorer, recipe, batch_size)
        starts = range(0, len(rows), recipe.part_size)
        names = [part_name(number) for number in range(len(starts))]
        for name, start in zip(names, starts, strict=True):
            if facts_of(out / name) is None:
                chosen = rows[start : start + recipe.part_size]
                write_part(out / name, *work.part(chosen, partial(_progress_behind, progress, start, len(rows))))
            progress(min(start + recipe.part_size, len(rows)), len(rows))
        return finish(out, settings, names)


def _progress_behind(progress: Progress, start: int, total: int, num: int) -> None:
    progress(start + num, total)


@dataclass(frozen=True, slots=True)
class _Opened:
    """A sample whose picture can be read: what captioner and scorer are shown of it, and its own captions."""

    uid: bytes
    own: list[str]
    shown: Any
    judged: Any


class _Work:
    """Makes parts."""

    def __init__(
        self, source: Source, captioner: Captioner, scorer: Scorer | None, recipe: Recipe, batch_size: int
    ) -> None:
        self.source, self.captioner, self.scorer = source, captioner, scorer
        self.recipe, self.batch_size = recipe, batch_size
        self.pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))  # decoders release the interpreter lock

    def part(
        self, rows: NDArray[np.int64], progress: Callable[[int], None]
    ) -> tuple[list[tuple[bytes, list[Caption]]], dict[str, Any]]:
        """The rows of a part, and its facts."""
        counts, errors, found = Counter[str](), [], []
        for start in range(0, len(rows), self.batch_size):
            chosen = rows[start : start + self.batch_size]
            for row, result in zip(chosen.tolist(), self._batch(chosen, counts), strict=True):
                if isinstance(result, DataError):
                    errors.append(self._report(row, result))
                else:
                    found.append(result)
            progress(min(start + self.batch_size, len(rows)))
        counts["num_skipped"] = len(errors)
        return found, {"counts": dict(sorted(counts.items())), "errors": errors, "num_rows": len(found)}

    def _report(self, row: int, error: DataError) -> dict[str, str]:
        shard, key = self.source.locate(row)
        reason, detail = (error.reason, error.detail) if isinstance(error, SampleError) else (error.what, error.got)
        if reason == "shard_unreadable":  # not of the sample: whoever calls again goes on here
            raise DataError(f"shard `{shard}` cannot be read", got=detail, remedy="the same command, once it is there")
        return {"shard": shard, "key": key, "reason": reason, "detail": str(detail or "")[:200]}

    def _batch(self, rows: NDArray[np.int64], counts: Counter[str]) -> list[tuple[bytes, list[Caption]] | DataError]:
        found: list[Any] = list(self.pool.map(self._opened, self.source.read(rows)))
        usable = [place for place, each in enumerate(found) if isinstance(each, _Opened)]
        good = []
        for place, texts in zip(usable, self._written([found[place] for place in usable]), strict=True):
            if isinstance(texts, DataError):
                found[place] = texts
            else:
                good.append((place, self._candidates(found[place].own, texts, counts)))
        kept = self._kept([found[place] for place, _ in good], [captions for _, captions in good], counts)
        for (place, _), captions in zip(good, kept, strict=True):
            found[place] = (found[place].uid, captions)
        return found

    def _opened(self, sample: RawSample | DataError) -> _Opened | DataError:
        try:
            if isinstance(sample, DataError):
                return sample
            image = open_image(first_image(sample.parts))
            own = decode_captions(sample.parts, decode_metadata(sample.parts)) if self.recipe.originals else []
            judged = None if self.scorer is None else self.scorer.shown(image)
            return _Opened(sample.uid, own, self.captioner.shown(image), judged)
        except SampleError as error:
            return error

    def _written(self, opened: Sequence[_Opened]) -> Iterator[list[str] | DataError]:
        """The captions of each picture."""
        num = self.recipe.num_captions
        asked = [(each, number) for each in opened for number in range(num)]
        told: list[str | DataError] = []
        for start in range(0, len(asked), self.batch_size):
            some = asked[start : start + self.batch_size]
            uniforms = np.array([self._uniforms(each.uid, number) for each, number in some])
            told += self.captioner.captions([each.shown for each, _ in some], uniforms)
        for start in range(0, len(told), num):
            problem = next((each for each in told[start : start + num] if isinstance(each, DataError)), None)
            yield problem or [str(each) for each in told[start : start + num]]

    def _uniforms(self, uid: bytes, number: int) -> list[float]:
        keyed = keyed_generator(self.recipe.seed, number, uid, "recaption")
        return [keyed.random() for _ in range(self.recipe.max_new_tokens)]

    def _candidates(self, own: Sequence[str], written: Sequence[str], counts: Counter[str]) -> list[Caption]:
        """The sample's own captions before those that were written, each text once."""
        cleaned = [text.replace("\0", "").strip()[:MAX_CAPTION_CHARS] for text in written]
        new = [text for text in cleaned if text]
        source_of = dict.fromkeys(new, self.captioner.source) | dict.fromkeys(own, ORIGINAL)
        texts = list(dict.fromkeys([*own, *new]))
        counts["num_empty"] += len(cleaned) - len(new)
        counts["num_repeated"] += len(own) + len(new) - len(texts)
        return [Caption(text, source_of[text]) for text in texts]

    def _kept(
        self, opened: Sequence[_Opened], candidates: Sequence[list[Caption]], counts: Counter[str]
    ) -> Iterator[list[Caption]]:
        """The captions that are good enough, with their scores where there is a scorer."""
        least = self.recipe.min_score
        for some in self._scored(opened, candidates):
            kept = [each for each in some if least is None or (each.score is not None and each.score >= least)]
            for each in some:
                kind = "original" if each.source == ORIGINAL else "synthetic"
                counts[f"num_{kind}" if each in kept else f"num_{kind}_dropped"] += 1
            counts["num_without"] += not kept
            yield kept

    def _scored(self, opened: Sequence[_Opened], candidates: Sequence[list[Caption]]) -> Sequence[list[Caption]]:
        if self.scorer is None or not opened:
            return candidates
        texts = [[each.text for each in some] for some in candidates]
        return [
            [each._replace(score=round(score, _DECIMALS)) for each, score in zip(some, scores, strict=True)]
            for some, scores in zip(candidates, self.scorer.scores([e.judged for e in opened], texts), strict=True)
        ]
