"""`vlm-train data walk`: samples, embedded by a trained run, in an order in which neighbours are alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlm_train.cli.options import Option, arguments, choice, needed, new_place, plain, whole
from vlm_train.cli.progress import Ticker
from vlm_train.cli.trained import choose_checkpoint, choose_device, open_run
from vlm_train.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from vlm_train.build import Parts
    from vlm_train.engine.rundir import RunDirectory
    from vlm_train.evaluation.base import Embed
    from vlm_train.types import Batch, Source

    Embedded = tuple[NDArray[np.float32], NDArray[np.bool_]]

_MOST_WORKERS = 1024
_EXAMPLE_SIZE = 8


def make_walk(words: list[str]) -> None:
    """Runs the action."""
    known = {
        "--run": Option(plain),
        "--out": Option(new_place),
        "--by": Option(choice("image", "text", "both"), "image"),
        "--checkpoint": Option(plain),
        "--device": Option(plain),
        "--num-workers": Option(whole(0, _MOST_WORKERS), 1),
    }
    shards, options = arguments(words, {"SHARDS": plain}, known, many=True)
    out, run = needed(options, "--out", "DIR"), open_run(needed(options, "--run", "RUN"), key="--run")
    checkpoint = choose_checkpoint(run, options["--checkpoint"])
    write_walk(shards, run, checkpoint, out, device=choose_device(options["--device"]), by=options["--by"],
               num_workers=options["--num-workers"])  # fmt: skip


def write_walk(
    shards: Sequence[str],
    run: RunDirectory,
    checkpoint: Path,
    out: Path,
    *,
    device: torch.device,
    by: str,
    num_workers: int,
) -> None:
    """Embeds, orders, saves, and tells how near neighbours are."""
    import numpy as np

    from vlm_train import build
    from vlm_train.data.bisection import cosines, order_alike
    from vlm_train.data.indexing import open_manifest
    from vlm_train.data.sources.shards import ShardSource
    from vlm_train.data.walk import Walk
    from vlm_train.engine import checkpoints

    open_manifest(shards, progress=Ticker("MB indexed"))
    source = ShardSource(shards=shards)
    parts = build.load(run.path, checkpoint=checkpoint)
    features, usable = embed(parts, source, device, by=by, num_workers=num_workers)
    rows = np.flatnonzero(usable)[order_alike(features)]
    near, far = cosines(features)
    facts = {
        "run": str(run.path),
        "checkpoint": f"{checkpoint.name}@{checkpoints.identity(checkpoint)}",
        "by": by,
        "num_unusable": int((~usable).sum()),
        "cosine_of_neighbours": near,
        "cosine_of_any_two": far,
    }
    rows = np.concatenate([rows, np.flatnonzero(~usable)])
    Walk(rows, manifest=source.fingerprint, provenance=facts).save(out)
    print(f"{len(rows)} samples; the cosine of neighbours is {near:.3f} on average, of any two {far:.3f}")
    if facts["num_unusable"]:
        print(f"{facts['num_unusable']} of them cannot be used and come last; vlm-train data verify tells why")
    print(f"next: 'data.groups={{walk: {out}, size: {_EXAMPLE_SIZE}}}'")


def embed(parts: Parts, source: Source, device: torch.device, *, by: str, num_workers: int) -> Embedded:
    """Unit features of the samples that can be used [M, D], in file order, and which of all these are [N]."""
    from vlm_train import build

    loader = build.eval_loader(parts, source, num_workers=num_workers)
    features, usable = _collect(build.embedder(parts, device), loader, len(source), by=by)
    if len(features) < 2:
        raise DataError("there are no neighbours", got=f"{len(features)} samples that can be used",
                        allowed="two or more", remedy="vlm-train data verify SHARDS --mode full")  # fmt: skip
    return features, usable


def _collect(embedder: Embed, batches: Iterable[Batch], num: int, *, by: str) -> Embedded:
    import numpy as np
    import torch

    from vlm_train.evaluation.base import counted
    from vlm_train.evaluation.ranking import check_unit

    ticker, features, usable = Ticker("samples"), np.empty((0, 0), np.float32), np.zeros(num, bool)
    filled = done = 0
    for batch in batches:
        keep = counted(batch)
        sides = [embedder.images(batch)] if by != "text" else []
        sides += [embedder.texts(batch["captions"])] if by != "image" else []
        found = torch.cat(sides, dim=1)[keep.to(sides[0].device)] / len(sides) ** 0.5
        check_unit(found, "Features")
        if not features.size:
            features = np.empty((num, found.shape[1]), np.float32)
        features[filled : filled + len(found)] = found.cpu().numpy()
        usable[done : done + len(keep)] = keep.numpy()
        filled, done = filled + len(found), done + len(keep)
        ticker(done, num)
    return features[:filled], usable
