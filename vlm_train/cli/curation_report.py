"""`vlm-train data report`: what a chain of curation did, as one page."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_train.cli.options import Option, apart, arguments, local, out_file, plain
from vlm_train.cli.progress import Ticker
from vlm_train.errors import ConfigError
from vlm_train.locations import is_remote, scrubbed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def make_report(words: list[str]) -> None:
    """Runs the action."""
    known = {"--out": Option(out_file, Path("report.html")), "--calibration": Option(local)}
    (folder, *shards), options = arguments(words, {"DIR": local, "SHARDS": plain}, known, many=True)
    write_report(folder, shards, options["--out"], options["--calibration"])


def write_report(folder: Path, shards: Sequence[str], out: Path, calibration: Path | None) -> None:
    """Reads the folder, looks at the shards, and writes the page."""
    from vlm_train.cli.curation_page import Pictures, page, rows_shown
    from vlm_train.curation.report import examine, examples
    from vlm_train.data.indexing import open_manifest
    from vlm_train.data.sources.shards import ShardSource
    from vlm_train.data.writer import write_atomically

    open_manifest(shards, progress=Ticker("MB indexed"))
    source = ShardSource(shards=shards)
    apart("--out", out, [shard for shard in source.manifest.shards if not is_remote(shard)])
    if out.exists() and out.suffix != ".html" and out.resolve().is_relative_to(folder.resolve()):
        raise ConfigError("--out would overwrite a file of the selection", got=out, allowed="a file of its own",
                          remedy=f"--out {folder / 'report.html'}")  # fmt: skip
    report, content = examine(folder, source), _calibration(folder, calibration)
    if content is not None and content["manifest"] != report.manifest:
        print("the calibration is of other data: its pictures are left out")
    rows, tick = rows_shown(report, _own(content, report.manifest)), Ticker("pictures")
    pictures = {}
    for number, (row, example) in enumerate(zip(rows, examples(source, rows), strict=True), 1):
        pictures[row] = example
        tick(number, len(rows))
    commands = [shlex.join(["vlm-train", "data", "report", str(folder), *shards, "--out", str(out)])]
    commands += [str(report.fate.provenance["command"])] if "command" in report.fate.provenance else []
    document = page(folder.resolve().name, report, Pictures(pictures), calibration=content,
                    commands=[scrubbed(command) for command in commands])  # fmt: skip
    write_atomically(out, document)
    unread = sum(bool(example.reason) for example in pictures.values())
    print(f"{int(report.fate.is_kept.sum()):,} of {report.num_samples:,} samples are kept")
    if unread:
        print(f"{unread:,} of {len(rows):,} pictures that are shown cannot be read; the page says which")
    print(f"page: {out}, {len(document.encode()) / 1e6:.1f} MB")


def _calibration(folder: Path, given: Path | None) -> Mapping[str, Any] | None:
    """That of --calibration, or the one that lies in the folder."""
    from vlm_train.curation.calibration_curves import FILE, read

    if given is not None:
        return read(given)
    return read(folder) if (folder / FILE).is_file() else None


def _own(content: Mapping[str, Any] | None, manifest: str) -> Mapping[str, Any] | None:
    return content if content is not None and content["manifest"] == manifest else None
