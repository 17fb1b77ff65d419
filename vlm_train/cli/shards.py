"""`vlm-train data index|verify|stats|select|convert`: what is done with shards that are there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_train.cli.options import (
    Action,
    Option,
    apart,
    arguments,
    choice,
    count,
    local,
    needed,
    new_place,
    out_file,
    out_folder,
    plain,
    share,
)
from vlm_train.cli.progress import Ticker
from vlm_train.errors import ConfigError
from vlm_train.locations import in_texts, is_remote, scrubbed

if TYPE_CHECKING:
    from vlm_train.data.dialogue import DialogueEncoder
    from vlm_train.data.verify import Mode, Verdict

_SHOWN = 20
_SHARE, _MAX_SAMPLES = 0.01, 10_000
_SHARDS = {"SHARDS": plain}


def _index(words: list[str]) -> None:
    from vlm_train.data.indexing import open_manifest

    shards, _ = arguments(words, _SHARDS, {}, many=True)
    manifest = open_manifest(shards, progress=Ticker("MB indexed"))
    left_out = f", {manifest.num_errors} samples left out" if manifest.num_errors else ""
    print(f"{len(manifest)} samples in {len(manifest.shards)} shards{left_out}; manifest {manifest.fingerprint[:16]}")


def _verify(words: list[str]) -> int:
    from vlm_train.data.verify import verify

    known = {
        "--mode": Option(choice("fast", "full", "sample")),
        "--share": Option(share(zero=False, one=True)),
        "--run": Option(plain),
        "--selection": Option(local),
        "--json": Option(out_file),
    }
    shards, options = arguments(words, _SHARDS, known, many=True)
    part, out, run = options["--share"], options["--json"], options["--run"]
    mode: Mode = options["--mode"] or ("fast" if run is None else "full")
    if run is not None and mode == "fast":
        raise ConfigError("dialogues are read where samples are", got="--mode fast --run", allowed="full, sample",
                          remedy="--mode full, or leave out --mode")  # fmt: skip
    if part is not None and mode != "sample":
        raise ConfigError("--share is for --mode sample", got=f"--mode {mode} --share {part}", allowed="--mode sample",
                          remedy="add --mode sample, or leave out --share")  # fmt: skip
    if out is not None:
        _apart_from(shards, "--json", out)
    encoder = None if run is None else _dialogues_of(run)
    verdict = verify(
        shards,
        mode=mode,
        selection=options["--selection"],
        share=part or _SHARE,
        progress=Ticker("samples"),
        dialogue=None if encoder is None else encoder.read,
    )
    if mode == "sample" and verdict.num_samples and not verdict.num_checked:
        raise ConfigError("not one sample was drawn", got=f"--share {part or _SHARE} of {verdict.num_samples} samples",
                          allowed="a share that draws some", remedy="a larger --share, or --mode full")  # fmt: skip
    if out is not None:
        out.write_text(json.dumps(in_texts(scrubbed, verdict.as_dict()), indent=1) + "\n")
    _tell(verdict)
    if encoder is not None:
        _tell_dialogues(verdict, encoder)
    return 1 if verdict.problems else 0


def _dialogues_of(path: str) -> DialogueEncoder:
    """How a run reads dialogues; it need not have trained yet. Raises ConfigError where its model does not."""
    from vlm_train import build
    from vlm_train.cli.trained import open_run
    from vlm_train.data.tokenizer import load_tokenizer
    from vlm_train.schema import read_config

    run = open_run(path, key="--run")
    parts = build.network(read_config(run.path), load_tokenizer(str(run.tokenizer)), with_values=False)
    if not hasattr(parts.model, "dialogue"):
        raise ConfigError(f"{type(parts.model).__name__} reads no dialogues", got=f"--run {path}",
                          allowed="a run of a generative model, such as experiment=llava_tiny",
                          remedy="leave out --run")  # fmt: skip
    return build.dialogues(parts)


def _tell(verdict: Verdict) -> None:
    print(f"{verdict.num_samples} samples in {verdict.num_shards} shards, {verdict.num_left_out} left out by indexing")
    if verdict.mode != "fast":
        print(f"{verdict.num_checked} samples read and decoded")
    if verdict.highest_rate is not None:
        print(f"with 95 % confidence at most {100 * verdict.highest_rate:.2f} % of all samples cannot be used")
    for reason, times in verdict.by_reason().items():
        print(f"  {times:>8}  {reason}")
    for problem in verdict.problems[:_SHOWN]:
        detail = f" ({scrubbed(problem.detail)})" if problem.detail else ""
        print(f"  {problem.shard} {problem.key}: {problem.reason}{detail}")
    if len(verdict.problems) > _SHOWN:
        print(f"  and {len(verdict.problems) - _SHOWN} more; --json FILE lists all")


def _tell_dialogues(verdict: Verdict, encoder: DialogueEncoder) -> None:
    spec, found = encoder.spec, verdict.dialogues
    tiles = f", in up to {spec.max_tiles} tiles of {spec.tile_size} pixels" if spec.max_tiles > 1 else ""
    tiles += ", which become one map" if spec.tile_layout == "map" else ""
    print(
        f"dialogues by the template {encoder.template}, in {spec.context_length} tokens, {spec.num_image_tokens} to an "
        f"image, at most {spec.max_images} of these{tiles}:"
    )
    if found is None:
        print("  none that can be learned")
        return
    least, median, most = found.tokens
    print(f"  {found.num} can be learned; tokens: {least} to {most}, median {median:g}")
    print(f"  {100 * found.label_share:.1f} % of what is read is to be told, {100 * found.cut_share:.1f} % are cut")


def _stats(words: list[str]) -> None:
    from vlm_train.cli.stats_page import lines, write_page
    from vlm_train.data.stats import statistics

    shards, options = arguments(words, _SHARDS, {"--out": Option(out_file, Path("stats.html"))}, many=True)
    out = _apart_from(shards, "--out", options["--out"])
    found = statistics(shards)
    print("\n".join(lines(found)))
    write_page(out, scrubbed(" ".join(shards)), found)
    print(f"page: {out}")


def _select(words: list[str]) -> None:
    import numpy as np

    from vlm_train.data.indexing import open_manifest
    from vlm_train.data.select import select_rows

    known = {"--where": Option(plain), "--weight": Option(plain), "--out": Option(out_folder)}
    shards, options = arguments(words, _SHARDS, known, many=True)
    out, where, weight = needed(options, "--out", "DIR"), options["--where"], options["--weight"]
    if where is None and weight is None:
        raise ConfigError("nothing is selected", got="neither --where nor --weight",
                          allowed="--where CONDITION, --weight EXPRESSION, or both",
                          remedy='--where "width >= 256"')  # fmt: skip
    manifest = open_manifest(shards, progress=Ticker("MB indexed"))
    selection = select_rows(
        manifest.parts, np.diff(manifest.starts), manifest=manifest.fingerprint, where=where, weight=weight
    )
    selection.save(out)
    kept = selection.content.num_kept()
    print(f"{kept} of {len(manifest)} samples are kept, {len(selection)} in an epoch; data.selection={out}")
    if num_null := selection.provenance["num_null"]:
        print(f"{num_null} of the dropped have no value to judge by (NULL)")


def _convert(words: list[str]) -> None:
    from vlm_train.data.convert import convert

    known = {"--out": Option(new_place), "--selection": Option(local), "--max-samples": Option(count())}
    shards, options = arguments(words, _SHARDS, known, many=True)
    out, max_samples = needed(options, "--out", "FILE.beton|FOLDER"), options["--max-samples"]
    if max_samples is not None and out.suffix == ".beton":
        raise ConfigError("--max-samples is for tars", got=f"--out {out} --max-samples {max_samples}",
                          allowed="a .beton holds all samples", remedy="leave out --max-samples")  # fmt: skip
    done = convert(
        shards,
        out,
        selection=options["--selection"],
        max_samples=max_samples or _MAX_SAMPLES,
        progress=Ticker("samples"),
    )
    print(f"{out}: {done.num_written} samples, {done.num_bytes / 1e6:.1f} MB")
    if done.num_pixels:
        print(f"{done.num_pixels} images are stored as pixels: FFCV decodes upright RGB JPEG alone")
    if done.num_errors:
        print(f"{done.num_errors} samples could not be converted: {done.errors}")


def _apart_from(shards: Sequence[str], name: str, path: Path) -> Path:
    """The file to write; not one that is a shard, and so read. Shards are looked up only where a file is there."""
    if not path.exists():
        return path
    from vlm_train.data.patterns import expand_shards

    return apart(name, path, [shard for shard in expand_shards(shards) if not is_remote(shard)])


ACTIONS: dict[str, Action] = {
    "index": _index,
    "verify": _verify,
    "stats": _stats,
    "select": _select,
    "convert": _convert,
}
