"""Steps that drop samples for what they are by themselves: the size and shape of the picture, the caption.

A row goes by the first of the rules that it breaks, in the order of the fields; a rule has the name of its field, those
of `forms` the names of the forms. What rules cannot look at (a sample without a picture, a caption that cannot be read)
stays and is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import regex
from numpy.typing import NDArray

from vlm_train.curation import texts
from vlm_train.curation.chain import Found, Settings, Work
from vlm_train.curation.columns import add_columns
from vlm_train.curation.limits import check_number, check_whole
from vlm_train.data.manifest import Manifest, read_part
from vlm_train.errors import ConfigError, DataError, nearest

DATACOMP_BASIC: dict[str, dict[str, Any]] = {
    "images": {"min_side": 200, "max_aspect": 3.0},
    "captions": {"min_chars": 6, "min_words": 3, "languages": ["en"]},
}
"""DataComp's basic filter (Gadre et al., 2023, arXiv 2304.14108), as fields of `ImageRules` and `CaptionRules`: more
than 2 words and more than 5 characters, English by fastText, a shorter side of 200 pixels, at most 3 : 1. Its fastText
model is the large lid.176.bin; ours is the small form of the same."""

_LANGUAGE, _LANGUAGE_SCORE = "caption_language", "caption_language_score"
_LISTS = ("forms", "patterns", "languages")
MOST_SECONDS = 2.0
"""That a pattern may take for a caption."""

_KEEPS, _UNREAD = -1, -2

Limits = dict[str, Any]
Check = tuple[str, NDArray[np.bool_], NDArray[np.float64]]
"""(rule, which rows [n] break it, what it looked at [n])."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRules:
    """Limits of the first picture, in pixels as they are stored; what lies on a limit stays. `min_side`: of the shorter
    side; `max_side`: of the longer; `max_aspect`: longer by shorter; `min_pixels`, `max_pixels`: width times height.
    None is no limit. The value of a row is the side, the aspect or the number of pixels."""

    min_side: int | None = None
    max_side: int | None = None
    max_aspect: float | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None

    def settings(self, work: Work) -> Settings:
        """See `Step`."""
        limits = _limits(self)
        for name, limit in limits.items():
            if name == "max_aspect":
                check_number(name, limit, low=1)
            else:
                check_whole(name, limit, low=1)
        _check_order(limits, ("side", "pixels"))
        return limits

    def find(self, manifest: Manifest, among: NDArray[np.bool_], work: Work) -> Found:
        """See `Step`."""
        table = manifest.table(["width", "height"])
        width, height = (table[name].to_numpy().astype(np.float64) for name in ("width", "height"))
        shorter, longer, pixels = np.minimum(width, height), np.maximum(width, height), width * height
        measured = {"min_side": shorter, "max_side": longer, "max_aspect": longer / np.maximum(shorter, 1),
                    "min_pixels": pixels, "max_pixels": pixels}  # fmt: skip
        limits, has_picture = _limits(self), shorter > 0
        broken, values = _first_broken([_beyond(name, limits[name], measured[name]) for name in limits], has_picture)
        return _found(list(limits), broken, values, among, {"num_without_picture": int((among & ~has_picture).sum())})


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionRules:
    """Limits of the first caption; what lies on a limit stays. None, and an empty list, is no limit.

    `min_chars`, `max_chars`; `min_words`, `max_words`: `texts.words_in`; `min_letters`: the share of letters;
    `max_repeats`: the share of words that were there before; `max_run`: how often a character stands in a row in a
    word; `forms`: captions that are nothing but one of these (`texts.FORMS`) go; `patterns`: regular expressions (those
    of the package regex, so all of Python's), captions in which one is found go; `languages`: codes as `en`, captions
    in others go.

    The value of a row is the number that was compared; of `patterns` which of them it was, counted from 0; of
    `languages` how sure the model is of the language it found; of a form none.
    """

    min_chars: int | None = None
    max_chars: int | None = None
    min_words: int | None = None
    max_words: int | None = None
    min_letters: float | None = None
    max_repeats: float | None = None
    max_run: int | None = None
    forms: Sequence[str] = ()
    patterns: Sequence[str] = ()
    languages: Sequence[str] = ()

    def settings(self, work: Work) -> Settings:
        """See `Step`."""
        limits = _limits(self)
        for name, limit in limits.items():
            if name in ("min_letters", "max_repeats"):
                check_number(name, limit, low=0, high=1)
            elif name not in _LISTS:
                check_whole(name, limit, low=1)
        _check_order(limits, ("chars", "words"))
        _check_words("forms", limits, texts.FORMS)
        _check_words("languages", limits, texts.LANGUAGES)
        for pattern in limits.get("patterns", []):
            _check_pattern(pattern)
        languages = {"language_columns": texts.language_columns().version} if "languages" in limits else {}
        return {**limits, "caption_columns": texts.CAPTION.version, **languages}

    def find(self, manifest: Manifest, among: NDArray[np.bool_], work: Work) -> Found:
        """See `Step`."""
        limits = _limits(self)
        for columns in [texts.CAPTION, *([texts.language_columns()] if "languages" in limits else [])]:
            add_columns(manifest, columns, engine=work.engine, progress=work.ticking("samples"))
        facts = zip(manifest.parts, manifest.entries_of, strict=True)
        items = [_Part(part.absolute(), entry["content"], limits) for part, entry in facts]
        judged = list(work.engine.map(_judge, items))
        broken, values = np.concatenate([each for each, _ in judged]), np.concatenate([each for _, each in judged])
        names = [rule for name, limit in limits.items() for rule in (limit if name == "forms" else [name])]
        return _found(names, broken, values, among, {"num_without_caption": int((among & (broken == _UNREAD)).sum())})


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of the manifest, with the hash of its rows, and the limits that its captions are held to."""

    part: Path
    content: str
    limits: Limits


def _judge(item: _Part) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """Of the rows of a part: the number of the rule that each breaks, -1 for none, -2 where nothing can be said; and
    what that rule looked at."""
    wanted = [field.name for field in texts.CAPTION.fields] + ["caption_chars", _LANGUAGE, _LANGUAGE_SCORE]
    table = read_part(item.part, item.content, wanted)
    is_read = table["caption"].is_valid().to_numpy()
    checks = [check for name, limit in item.limits.items() for check in _checks(table, name, limit)]
    broken, values = _first_broken(checks, is_read)
    return np.where(is_read, broken, np.int8(_UNREAD)), values


def _checks(table: pa.Table, name: str, limit: Any) -> list[Check]:
    if name == "forms":
        forms, nothing = _strings(table, "caption_form"), np.full(len(table), np.nan)
        return [(form, forms == form, nothing) for form in limit]
    if name == "languages":
        return [(name, ~np.isin(_strings(table, _LANGUAGE), limit), _floats(table, _LANGUAGE_SCORE))]
    if name == "patterns":
        captions = table["caption"].fill_null("").to_pylist()
        patterns = [regex.compile(pattern) for pattern in limit]
        number = np.array([_first_found(patterns, text) for text in captions], np.float64)
        return [(name, number >= 0, number)]
    return [_beyond(name, limit, _floats(table, f"caption_{name[4:]}"))]


def _first_found(patterns: Sequence[regex.Pattern[str]], text: str) -> int:
    """Which pattern is found in a text, -1 for none."""
    for number, pattern in enumerate(patterns):
        try:
            if pattern.search(text, timeout=MOST_SECONDS):
                return number
        except TimeoutError:
            raise DataError("a pattern takes too long, as if it tried ever more ways to match",
                            got=f"{pattern.pattern!r} in {text[:80]!r}", allowed=f"{MOST_SECONDS:g} seconds a caption",
                            remedy="do not repeat what is repeated already, as (a+)+ does") from None  # fmt: skip
    return -1


def _beyond(name: str, limit: float, measured: NDArray[np.float64]) -> Check:
    return name, measured < limit if name.startswith("min_") else measured > limit, measured


def _first_broken(
    checks: Sequence[Check], is_judged: NDArray[np.bool_]
) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """Of each row the number of the first check that it breaks, -1 for none, and what that looked at."""
    broken, values = np.full(len(is_judged), _KEEPS, np.int8), np.full(len(is_judged), np.nan)
    for number, (_, breaks, measured) in reversed(list(enumerate(checks))):
        rows = breaks & is_judged
        broken[rows], values[rows] = number, measured[rows]
    return broken, values


def _found(
    names: Sequence[str],
    broken: NDArray[np.int8],
    values: NDArray[np.float64],
    among: NDArray[np.bool_],
    facts: dict[str, Any],
) -> Found:
    rows = np.flatnonzero(among & (broken >= 0))
    return Found(rows, np.array(names)[broken[rows]], np.full(len(rows), -1), values[rows], facts)


def _strings(table: pa.Table, name: str) -> NDArray[np.str_]:
    return np.array(table[name].fill_null("").to_pylist(), np.str_)


def _floats(table: pa.Table, name: str) -> NDArray[np.float64]:
    return table[name].cast(pa.float64()).to_numpy()  # NaN where it is null: it breaks no limit


def _limits(rules: ImageRules | CaptionRules) -> Limits:
    """The limits that are set, in the order of the fields. Raises ConfigError where there is none."""
    every = {field.name: getattr(rules, field.name) for field in fields(rules)}
    limits = {
        name: list(limit) if name in _LISTS else limit
        for name, limit in every.items()
        if limit is not None and not (name in _LISTS and not len(limit))
    }
    if not limits:
        raise ConfigError("rules without a limit drop nothing", got="no limit", allowed=", ".join(every),
                          remedy="set one of them, or leave the step out")  # fmt: skip
    return limits


def _check_order(limits: Limits, measures: Sequence[str]) -> None:
    for measure in measures:
        low, high = limits.get(f"min_{measure}"), limits.get(f"max_{measure}")
        if low is not None and high is not None and low > high:
            raise ConfigError(f"min_{measure} is above max_{measure}: nothing could stay", got=f"{low} and {high}",
                              remedy=f"min_{measure}={high}, or leave one of them out")  # fmt: skip


def _check_words(name: str, limits: Limits, known: Sequence[str]) -> None:
    for word in limits.get(name, []):
        if word not in known:
            close = nearest(str(word), known) or list(known)
            raise ConfigError(f"{name} has no such choice", got=word, allowed=", ".join(known),
                              remedy=f"{name}: [{close[0]}]")  # fmt: skip


def _check_pattern(pattern: str) -> None:
    try:
        regex.compile(pattern)
    except (regex.error, TypeError) as error:
        raise ConfigError("a pattern is no regular expression", got=f"{pattern!r}: {error}",
                          remedy="put a backslash before what is meant as it stands") from None  # fmt: skip
