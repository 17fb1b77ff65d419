"""`vlm-train data`: datasets from what people have (`import`, `make`), and what is done with shards (`cli/shards`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vlm_train.cli import shards
from vlm_train.cli.options import Action, Ticker, arguments
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
           the manifest of shards (made on first use anyway)
       vlm-train data verify SHARDS ... [--mode fast|full|sample] [--share 0.01] [--selection DIR] [--json FILE]
           what is wrong with them, and where; exit code 1 if anything is
       vlm-train data stats SHARDS ... [--out stats.html]
           sizes, captions, formats, repeats, error rate; a page with pictures
       vlm-train data select SHARDS ... --where "width >= 256 AND height >= 256" --out DIR [--weight EXPRESSION]
           which samples count (and how often), by a condition on the manifest's columns
       vlm-train data convert SHARDS ... --out FILE.beton|FOLDER [--selection DIR] [--max-samples 10000]
           tars to one FFCV file, or anything to tars
SHARDS are tars, .beton files, folders of these or of images, globs, 'path/{00000..00012}.tar', or URLs of tars
(https:// s3:// gs://)"""


def main(words: list[str]) -> int:
    """Runs the verb."""
    if not words or words[0] in ("-h", "--help") or words[-1] in ("-h", "--help"):
        print(USAGE)
        return 0
    actions: dict[str, Action] = {"import": _import, "make": _make, **shards.ACTIONS}
    return _choose(actions, words[0], "vlm-train data")(words[1:]) or 0


def _choose(actions: Mapping[str, Action], name: str, verb: str) -> Action:
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

    (out,), options = arguments(words, ["OUT"], {"--size": 72})
    _tell(import_openmoji(Path(out), size=int(options["--size"]), progress=Ticker("drawings")))


def _import_folder(words: list[str]) -> None:
    from vlm_train.data.importers import import_folder

    (folder, out), options = arguments(words, ["FOLDER", "OUT"], {"--val-fraction": 0.0})
    _tell(import_folder(Path(folder), Path(out), val_fraction=options["--val-fraction"], progress=Ticker("images")))


def _import_coco(words: list[str]) -> None:
    from vlm_train.data.importers import import_coco

    (annotations, images, out), options = arguments(words, ["ANNOTATIONS", "IMAGES", "OUT"], {"--split": ""})
    split = options["--split"] or None
    _tell(import_coco(Path(annotations), Path(images), Path(out), split=split, progress=Ticker("images")))


def _make(words: list[str]) -> None:
    _choose({"scenes": _make_scenes}, words[0] if words else "", "vlm-train data make")(words[1:])


def _make_scenes(words: list[str]) -> None:
    from vlm_train.data.scenes.make import make_scenes

    defaults = {"--num-samples": 10_000, "--seed": 0, "--size": 64, "--val-fraction": 0.1}
    (out,), options = arguments(words, ["OUT"], defaults)
    summary = make_scenes(
        Path(out),
        num_samples=options["--num-samples"],
        seed=options["--seed"],
        size=options["--size"],
        val_fraction=options["--val-fraction"],
        progress=Ticker("scenes"),
    )
    _tell(summary)


def _tell(summary: Summary) -> None:
    counts = ", ".join(f"{split} {count}" for split, count in summary.num_samples.items())
    state = "is there already" if summary.already_there else "written"
    print(f"{summary.directory} {state}: {counts} samples, {summary.num_bytes / 1e6:.1f} MB")
    if summary.num_errors:
        print(f"{summary.num_errors} samples could not be imported: {summary.directory}/import_errors.jsonl")
