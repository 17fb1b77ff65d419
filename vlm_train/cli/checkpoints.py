"""`vlm-train checkpoints list|verify|prune RUN`: what a run has saved, whether it can be trusted, and what may go."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_train.cli.options import count, taken
from vlm_train.cli.tables import table
from vlm_train.errors import CheckpointError, ConfigError, nearest

if TYPE_CHECKING:
    from vlm_train.engine.rundir import RunDirectory

USAGE = """usage: vlm-train checkpoints list RUN        steps, times, sizes; whether each file is there and whole
       vlm-train checkpoints verify RUN      the same, and whether each file holds what was written
       vlm-train checkpoints prune RUN       removes all but the newest
           --keep N                          how many stay; without it as many as the run's checkpoint.keep
           --dry-run                         only says what would go

RUN is the folder of a run; of one in stages each stage is shown. Exit code 1: one is bad. prune never removes the
newest that verifies, nor those of checkpoint.keep_every_steps; a bad one goes where a newer good one stands."""


def main(words: list[str]) -> int:
    """Runs the verb."""
    if not words or any(word in ("-h", "--help") for word in words):
        print(USAGE)
        return 0
    actions = {"list": _list, "verify": _verify, "prune": _prune}
    if words[0] not in actions:
        close = nearest(words[0], actions)
        raise ConfigError("vlm-train checkpoints does not know this action", got=words[0], allowed=", ".join(actions),
                          remedy=f"vlm-train checkpoints {close[0] if close else '--help'}")  # fmt: skip
    return actions[words[0]](words[1:])


def _list(words: list[str]) -> int:
    return _shown(words, checksums=False)


def _verify(words: list[str]) -> int:
    return _shown(words, checksums=True)


def _prune(words: list[str]) -> int:
    from vlm_train.cli.runs import locked
    from vlm_train.engine import checkpoints
    from vlm_train.schema import read_config

    is_dry = "--dry-run" in words
    keep, words = _keep([word for word in words if word != "--dry-run"])
    for run in _runs(words):
        settings = read_config(run.path).get("checkpoint", {})
        with nullcontext() if is_dry else locked(run):  # who trains it removes by the same rule
            gone = checkpoints.prune(
                run.checkpoints, keep or settings.get("keep", 2), settings.get("keep_every_steps"), dry=is_dry
            )
        for path in gone:
            print(f"{'would remove' if is_dry else 'removed'} {path}")
        if not gone:
            print(f"{run.path}: nothing to remove")
    return 0


def _shown(words: list[str], *, checksums: bool) -> int:
    """A table a run; 1 if one is bad, else 0."""
    num_bad = 0
    for run in _runs(words):
        rows, errors = _rows(run, checksums=checksums)
        print(run.path)
        print("\n".join(table(["step", "saved at", "MB", "written by", "state"], rows)) if rows else "  none yet")
        for error in errors:
            print(f"  {error}")
        num_bad += len(errors)
    return 1 if num_bad else 0


def _rows(run: RunDirectory, *, checksums: bool) -> tuple[list[list[str]], list[str]]:
    """(rows of the table, what is wrong with the bad ones)."""
    from vlm_train.engine import checkpoints

    rows, errors, good = [], [], "verified" if checksums else "complete"
    for path in checkpoints.named(run.checkpoints):
        try:
            checkpoints.verify(path, checksums=checksums)
            state = good
        except CheckpointError as error:
            errors.append(error.what)
            state = "bad"
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        num_shards = len(list((path / checkpoints.STATE).glob("*.distcp")))
        saved_at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(path.stat().st_mtime))
        writers = f"{num_shards} ranks" if num_shards else "one rank"
        rows.append([f"{checkpoints.step_of(path):,}", saved_at, f"{size / 1e6:,.1f}", writers, state])
    return rows, errors


def _keep(words: list[str]) -> tuple[int | None, list[str]]:
    """(N of `--keep N`, the other words)."""
    rest, values = taken(words, "--keep")
    if values and not values[-1]:
        raise ConfigError("--keep needs a number", got="nothing behind it", allowed="1 or more", remedy="--keep 2")
    return (count()("--keep", values[-1]) if values else None), rest


def _runs(words: list[str]) -> list[RunDirectory]:
    """The run that the one word names, or its stages. Raises ConfigError."""
    from vlm_train.cli.trained import STAGE
    from vlm_train.engine.rundir import RunDirectory

    if len(words) != 1 or words[0].startswith("-"):
        raise ConfigError("vlm-train checkpoints needs one run", got=" ".join(words) or "none",
                          allowed="the folder of a run",
                          remedy="vlm-train checkpoints list runs/<experiment>/latest")  # fmt: skip
    path = Path(words[0])
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"{path} is no run: it has no config.yaml", got=path, allowed="the folder of a run",
                          remedy="vlm-train checkpoints list runs/<experiment>/latest")  # fmt: skip
    stages = sorted(path.glob(f"{STAGE}*/config.yaml"))
    return [RunDirectory(stage.parent) for stage in stages] or [RunDirectory(path)]
