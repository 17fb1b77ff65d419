"""What the verbs of curation share: steps run one after another, over shards, into the folder of a selection."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_train.cli import engines
from vlm_train.cli.options import Option, local, out_folder, plain
from vlm_train.cli.progress import Ticker
from vlm_train.cli.tables import table
from vlm_train.errors import ConfigError
from vlm_train.locations import is_remote

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from vlm_train.curation.chain import Step

_LOCK = ".lock"
COMMON = {
    "--out": Option(out_folder),
    "--selection": Option(local),
    "--device": Option(plain),
    **engines.OPTIONS,
}
"""The options of every verb of curation."""


def given(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The options `names` that have a value, as a step calls them: `max_side` of --max-side."""
    return {name.strip("-").replace("-", "_"): options[name] for name in names if options[name] is not None}


def write_selection(
    shards: Sequence[str], steps: Callable[[], Mapping[str, Step]], options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Runs a chain of steps, writes the folder, and tells; returns what provenance.json says of each step."""
    from vlm_train.cli.models import Runs
    from vlm_train.curation.chain import Work, run_chain
    from vlm_train.data.indexing import open_manifest
    from vlm_train.data.selection import Selection

    chain, out, cores = steps(), options["--out"], len(os.sched_getaffinity(0))
    manifest, chosen = open_manifest(shards, progress=Ticker("MB indexed")), options["--selection"]
    _check_places(out, manifest.shards, chosen)
    with alone(out), engines.opened(options, out) as engine:
        among = None if chosen is None else Selection.load(chosen, manifest.fingerprint)
        work = Work(
            engine=engine,
            num_threads=min(options["--num-workers"] or cores, cores),
            models=Runs(engine, store=out / "embeddings", device=options["--device"], ticking=Ticker),
            ticking=Ticker,
            folder=out,
        )
        selection = run_chain(manifest, chain, work=work, among=among)
    told: list[dict[str, Any]] = selection.provenance["steps"]
    _tell(told, selection.content.num_kept(), len(manifest), out)
    return told


def _check_places(out: Path, shards: Sequence[str], chosen: Path | None) -> None:
    if chosen is not None and chosen.resolve() == out.resolve():
        raise ConfigError("--out is the selection to begin with, and would have less each time", got=out,
                          allowed="another folder", remedy=f"--out {out}-2")  # fmt: skip
    if any(Path(shard).absolute().parent == out.absolute() for shard in shards if not is_remote(shard)):
        raise ConfigError("--out is the folder of the shards", got=out, allowed="a folder of its own",
                          remedy="--out selections/NAME")  # fmt: skip


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keeps other commands out of a folder, which is made; one that is refused leaves none behind.

    Raises:
        ConfigError: another command has it.
    """
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with open(out / _LOCK, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{out} is being written by another command", got="two at once", allowed="one",
                              remedy="wait for it, or choose another --out") from None  # fmt: skip
        try:
            yield
        finally:
            if is_new and [path.name for path in out.iterdir()] == [_LOCK]:
                (out / _LOCK).unlink()
                out.rmdir()


def _tell(steps: Sequence[Mapping[str, Any]], num_kept: int, num: int, out: Path) -> None:
    """Prints what each rule of each step dropped."""
    cells = [
        [step["step"], rule, f"{dropped:,}", f"{100 * dropped / max(1, step['num_before']):.1f} %"]
        for step in steps
        for rule, dropped in (step["num_dropped"] or {"": 0}).items()
    ]
    print("\n".join(table(["step", "rule", "dropped", "of those before"], cells, left=2)))
    print(f"{num_kept:,} of {num:,} samples are kept")
    print(f"each dropped one, and why: {out / 'dropped.parquet'}\nnext: data.selection={out}")
