"""`vlm-train data import|make|index`: datasets from what people have, and the manifest of their shards."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlm_train.data.writer import Summary
from vlm_train.errors import ConfigError, nearest

USAGE = """usage: vlm-train data import openmoji OUT [--size 72]
           4,000 drawings with names; a tenth of the names is held out
       vlm-train data import folder FOLDER OUT [--val-fraction 0.1]
           images with KEY.txt beside them, or one captions.csv|json|jsonl|parquet with image, caption[, label]
       vlm-train data import coco ANNOTATIONS IMAGES OUT [--split NAME]
           COCO captions JSON, or Karpathy's dataset_coco.json
       vlm-train data make scenes OUT [--num-samples 10000] [--seed 0] [--size 64] [--val-fraction 0.1]
           rendered scenes with complete ground truth
       vlm-train data index SHARDS ...
           the manifest of tars (made on first use anyway)"""


def main(words: list[str]) -> int:
    """Runs the verb."""
    if not words or words[0] in ("-h", "--help") or words[-1] in ("-h", "--help"):
        print(USAGE)
        return 0
    actions: dict[str, Callable[[list[str]], None]] = {"import": _import, "make": _make, "index": _index}
    _choose(actions, words[0], "vlm-train data")(words[1:])
    return 0


def _choose(actions: Mapping[str, Callable[[list[str]], None]], name: str, verb: str) -> Callable[[list[str]], None]:
    if name not in actions:
        close = nearest(name, actions)
        raise ConfigError(f"{verb} does not know this", got=name, allowed=", ".join(actions),
                          remedy=f"{verb} {close[0]}" if close else "vlm-train data --help")  # fmt: skip
    return actions[name]


def _import(words: list[str]) -> None:
    importers = {"openmoji": _import_openmoji, "folder": _import_folder, "coco": _import_coco}
    _choose(importers, words[0] if words else "", "vlm-train data import")(words[1:])


def _import_openmoji(words: list[str]) -> None:
    from vlm_train.data.openmoji import import_openmoji

    (out,), options = _arguments(words, ["OUT"], {"--size": 72})
    _tell(import_openmoji(Path(out), size=int(options["--size"]), progress=Ticker("drawings")))


def _import_folder(words: list[str]) -> None:
    from vlm_train.data.importers import import_folder

    (folder, out), options = _arguments(words, ["FOLDER", "OUT"], {"--val-fraction": 0.0})
    _tell(import_folder(Path(folder), Path(out), val_fraction=options["--val-fraction"], progress=Ticker("images")))


def _import_coco(words: list[str]) -> None:
    from vlm_train.data.importers import import_coco

    (annotations, images, out), options = _arguments(words, ["ANNOTATIONS", "IMAGES", "OUT"], {"--split": ""})
    split = options["--split"] or None
    _tell(import_coco(Path(annotations), Path(images), Path(out), split=split, progress=Ticker("images")))


def _make(words: list[str]) -> None:
    _choose({"scenes": _make_scenes}, words[0] if words else "", "vlm-train data make")(words[1:])


def _make_scenes(words: list[str]) -> None:
    from vlm_train.data.scenes.make import make_scenes

    defaults = {"--num-samples": 10_000, "--seed": 0, "--size": 64, "--val-fraction": 0.1}
    (out,), options = _arguments(words, ["OUT"], defaults)
    summary = make_scenes(
        Path(out),
        num_samples=options["--num-samples"],
        seed=options["--seed"],
        size=options["--size"],
        val_fraction=options["--val-fraction"],
        progress=Ticker("scenes"),
    )
    _tell(summary)


def _index(words: list[str]) -> None:
    from vlm_train.data.manifest import open_manifest

    if not words:
        raise ConfigError("vlm-train data index needs SHARDS", allowed="folders, globs, brace patterns or tars")
    manifest = open_manifest(words, progress=lambda line: print(line, file=sys.stderr))
    print(f"{len(manifest)} samples in {len(manifest.shards)} shards; manifest {manifest.fingerprint[:16]}")


def _arguments(words: list[str], names: list[str], options: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Positional words by name and `--option value` or `--option=value`, converted to the type of the default."""
    values, given, rest = dict(options), [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            given.append(word)
            continue
        name, separator, text = word.partition("=")
        if name not in options:
            close = nearest(name, options)
            raise ConfigError(
                "no such option", got=name, allowed=", ".join(options), remedy=close[0] if close else None
            )
        text = text if separator else (rest.pop(0) if rest else "")
        try:
            values[name] = type(options[name])(text)
        except ValueError as error:
            raise ConfigError(f"{name} wants {type(options[name]).__name__}", got=repr(text)) from error
    if len(given) != len(names):
        raise ConfigError("wrong number of words", got=" ".join(given) or "none", allowed=" ".join(names),
                          remedy="vlm-train data --help")  # fmt: skip
    return given, values


class Ticker:
    """Progress of a countable task: one line on a terminal, one line each 30 seconds in a log."""

    def __init__(self, noun: str) -> None:
        self.noun, self.is_terminal, self._last = noun, sys.stderr.isatty(), time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Shows `done` of `total` if it is time to."""
        now = time.monotonic()
        if now - self._last < (0.2 if self.is_terminal else 30.0) and not (self.is_terminal and done == total):
            return
        self._last = now
        line = f"{done}/{total} {self.noun}"
        print(
            f"\r\x1b[K{line}" if self.is_terminal else line,
            end="\n" if not self.is_terminal or done == total else "",
            file=sys.stderr,
            flush=True,
        )


def _tell(summary: Summary) -> None:
    counts = ", ".join(f"{split} {count}" for split, count in summary.num_samples.items())
    state = "is there already" if summary.already_there else "written"
    print(f"{summary.directory} {state}: {counts} samples, {summary.num_bytes / 1e6:.1f} MB")
    if summary.num_errors:
        print(f"{summary.num_errors} samples could not be imported: {summary.directory}/import_errors.jsonl")
