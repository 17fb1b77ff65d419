"""`vlm-train data prune`: a selection without samples that break rules, say what many others say, do not fit their
captions, or lie where pictures are dense."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_train.cli import curate
from vlm_train.cli.options import Option, arguments, choice, count, local, needed, number, plain, several, share, whole
from vlm_train.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlm_train.curation.chain import Step

_PRESETS = ("datacomp-basic",)
_LARGEST_ASPECT, _SMALLEST_SIMILARITY = 1000, 0.5
_HIGHEST_SEED = 2**63 - 1

_SHARE, _PART = number(0, 1), share(zero=False, one=False)


def _languages(name: str, text: str) -> list[str]:
    """Codes as fastText has them, between commas."""
    from vlm_train.curation.texts import LANGUAGES

    return several(*LANGUAGES)(name, text)


_IMAGES = {
    "--min-side": Option(count()),
    "--max-side": Option(count()),
    "--max-aspect": Option(number(1, _LARGEST_ASPECT)),
    "--min-pixels": Option(count()),
    "--max-pixels": Option(count()),
}
_CAPTIONS = {
    "--min-chars": Option(count()),
    "--max-chars": Option(count()),
    "--min-words": Option(count()),
    "--max-words": Option(count()),
    "--min-letters": Option(_SHARE),
    "--max-repeats": Option(_SHARE),
    "--max-run": Option(count()),
    "--forms": Option(several("url", "file_name", "date", "number")),
    "--patterns": Option(local),
    "--languages": Option(_languages),
}
_COPIES = {
    "--max-per-caption": Option(count()),
    "--similarity": Option(number(_SMALLEST_SIMILARITY, 1)),
    "--seed": Option(whole(0, _HIGHEST_SEED)),
}
_BY_A_RUN = {"--min-score": Option(number(-1, 1)), "--keep": Option(_PART), "--density": Option(_PART)}


def prune(words: list[str]) -> None:
    """Runs the action."""
    known = {
        **curate.COMMON,
        "--preset": Option(choice(*_PRESETS)),
        **_IMAGES,
        **_CAPTIONS,
        **_COPIES,
        "--run": Option(plain),
        **_BY_A_RUN,
    }
    shards, options = arguments(words, {"SHARDS": plain}, known, many=True)
    _check(options)
    curate.write_selection(shards, lambda: _steps(options), options)


def _check(options: Mapping[str, Any]) -> None:
    """Refuses what contradicts itself, or would do nothing."""
    needed(options, "--out", "DIR")
    if options["--min-score"] is not None and options["--keep"] is not None:
        raise ConfigError("--min-score and --keep are two limits of one score", allowed="one of them",
                          got=f"--min-score {options['--min-score']} --keep {options['--keep']}",
                          remedy="leave out one of them")  # fmt: skip
    _check_belongs(options, [*_BY_A_RUN], "--run", "is what a model says", "RUN")
    _check_belongs(options, ["--device"], "--run", "is where a model runs", "RUN")
    if options["--run"] is not None and not _given(options, _BY_A_RUN):
        raise ConfigError("--run has nothing to do", got="--run alone", allowed="one of " + ", ".join(_BY_A_RUN),
                          remedy="add --keep 0.5, or leave out --run")  # fmt: skip
    _check_belongs(options, ["--similarity", "--seed"], "--max-per-caption", "is of captions that repeat", "10")
    if not _given(options, {"--preset": None, **_IMAGES, **_CAPTIONS, "--max-per-caption": None, **_BY_A_RUN}):
        raise ConfigError("nothing is said of what is to go", got="no rule", allowed="one rule at least",
                          remedy="add --preset datacomp-basic, or see vlm-train data prune --help")  # fmt: skip


def _check_belongs(options: Mapping[str, Any], names: list[str], to: str, what: str, example: str) -> None:
    given = [name for name in names if options[name] is not None]
    if given and options[to] is None:
        raise ConfigError(f"{given[0]} {what}", got=f"{' '.join(given)} without {to}", allowed=f"{to} beside it",
                          remedy=f"add {to} {example}, or leave out {given[0]}")  # fmt: skip


def _given(options: Mapping[str, Any], names: Mapping[str, Any]) -> bool:
    return any(options[name] is not None for name in names)


def _steps(options: Mapping[str, Any]) -> dict[str, Step]:
    """The steps in the order in which they run; an option goes before what the preset says."""
    from vlm_train.curation import rules

    preset = rules.DATACOMP_BASIC if options["--preset"] is not None else {}
    images = {**preset.get("images", {}), **curate.given(options, *_IMAGES)}
    captions = {**preset.get("captions", {}), **curate.given(options, *_CAPTIONS)}
    if options["--patterns"] is not None:
        captions["patterns"] = _lines(options["--patterns"])
    steps: dict[str, Step] = {}
    if images:
        steps["images"] = rules.ImageRules(**images)
    if captions:
        steps["captions"] = rules.CaptionRules(**captions)
    if options["--max-per-caption"] is not None:
        from vlm_train.curation.captions import CaptionCopies

        steps["caption_copies"] = CaptionCopies(**curate.given(options, *_COPIES))
    return {**steps, **_of_a_run(options)}


def _of_a_run(options: Mapping[str, Any]) -> dict[str, Step]:
    steps: dict[str, Step] = {}
    if options["--min-score"] is not None or options["--keep"] is not None:
        from vlm_train.curation.scores import Score

        steps["score"] = Score(**curate.given(options, "--run", "--min-score", "--keep"))
    if options["--density"] is not None:
        from vlm_train.curation.density import Density

        steps["density"] = Density(run=options["--run"], keep=options["--density"])
    return steps


def _lines(file: Path) -> list[str]:
    """The lines of a file of regular expressions."""
    try:
        lines = [line for line in file.read_text("utf-8-sig").splitlines() if line]
    except (OSError, UnicodeError) as error:
        raise ConfigError("--patterns cannot be read", got=f"{file}: {error}", allowed="a text file in UTF-8",
                          remedy="give the path of one, a regular expression a line") from None  # fmt: skip
    if not lines:
        raise ConfigError("--patterns has no pattern", got=file, allowed="a regular expression a line",
                          remedy="write one into it, or leave out --patterns")  # fmt: skip
    return lines
