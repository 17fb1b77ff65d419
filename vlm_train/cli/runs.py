"""Which run a command means: a new one, or one to go on with.

`run.resume=auto` (default) goes on with the run named by run.id or run.dir; without a name, with the experiment's
newest run if that is unfinished and its config says the same about what is learned. `never` always starts afresh. A
path to a run or to one of its checkpoints goes on from there.
"""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from omegaconf import DictConfig

from vlm_train.engine import checkpoints
from vlm_train.engine.rundir import RunDirectory
from vlm_train.errors import CheckpointError, ConfigError
from vlm_train.schema import learning_view, load_config


class Folder(Protocol):
    """What one process at a time trains in, and its config: a run, or a sweep."""

    path: Path
    config: Path

    def create(self) -> None:
        """Makes the folder."""


def choose_run(config: DictConfig) -> tuple[RunDirectory, Path | None]:
    """(directory, checkpoint named by run.resume if any). Fills run.id and run.dir. Raises ConfigError."""
    resume = config.run.resume
    if resume not in ("auto", "never"):
        return _named_by_path(config, Path(resume))
    root = Path("runs") / config.run.experiment
    named = config.run.dir or (str(root / config.run.id) if config.run.id else None)
    if named is not None:
        run = RunDirectory(named)
        if resume == "never" and run.config.is_file():
            raise ConfigError(f"{run.path} exists already", got="run.resume=never", allowed="a new run.id or run.dir",
                              remedy="leave run.resume at auto to go on with it")  # fmt: skip
        refuse_other_config(config, run)
    else:
        latest = RunDirectory(root / "latest")
        goes_on = resume == "auto" and latest.config.is_file() and not latest.is_finished()
        if goes_on and not differences(config, latest):
            run = RunDirectory(latest.path.resolve().relative_to(Path.cwd().resolve()))
        else:
            run = RunDirectory(root / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}")
    _name(config, run)
    return run, None


def _named_by_path(config: DictConfig, path: Path) -> tuple[RunDirectory, Path | None]:
    at_checkpoint = is_checkpoint(path)
    run = RunDirectory(checkpoints.place_of(path).parent.parent if at_checkpoint else path)
    if not run.config.is_file():
        raise ConfigError("run.resume names neither a run nor a checkpoint", got=path,
                          allowed="auto, never, runs/<experiment>/<id> or .../checkpoints/step-XXXXXXXX",
                          remedy="run.resume=auto")  # fmt: skip
    if at_checkpoint:
        checkpoints.verify(path)
    refuse_other_config(config, run)
    _name(config, run)
    return run, checkpoints.place_of(path) if at_checkpoint else None


def _name(config: DictConfig, run: RunDirectory) -> None:
    """Fills run.dir and run.id: a run has the name of its folder, unless it was once given another."""
    before = load_config(run.config).get("run") if run.config.is_file() else None
    given = before.id if before and before.id and Path(before.dir).name != before.id else None
    if given and config.run.id not in (None, given):
        raise ConfigError(f"the run in {run.path} has another name", got=f"run.id={config.run.id}", allowed=given,
                          remedy=f"leave out run.id={config.run.id}")  # fmt: skip
    config.run.dir, config.run.id = str(run.path), given or config.run.id or run.path.name


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint that was committed under the name of its step."""
    return path.is_dir() and checkpoints.place_of(path) in checkpoints.committed(checkpoints.place_of(path).parent)


def differences(config: DictConfig, run: Folder) -> dict[str, tuple[object, object]]:
    """key -> (saved, now) for every key that says what is learned and has changed."""
    before, now = learning_view(load_config(run.config)), learning_view(config)
    return {key: (before.get(key), now.get(key)) for key in sorted({*before, *now}) if before.get(key) != now.get(key)}


def refuse_other_config(config: DictConfig, run: Folder) -> None:
    """Raises ConfigError where what is there was trained with another config; what failed before its first step was
    not trained at all."""
    if not run.config.is_file() or (isinstance(run, RunDirectory) and not run.has_learned()):
        return
    changed = differences(config, run)
    if changed:
        listing = "; ".join(f"{key}: {before} -> {now}" for key, (before, now) in list(changed.items())[:8])
        raise ConfigError(f"{run.path} was trained with another config", got=listing,
                          allowed="changes of the machine only (devices, micro_batch, num_workers, logger, ...)",
                          remedy="restore these keys, or give the new run its own run.id")  # fmt: skip


def bring_back(config: DictConfig, run: RunDirectory) -> Path | None:
    """The newest copy in `checkpoint.copy_to` of a run that has no checkpoint, brought into its folder; None without.

    Raises ConfigError if that was trained with another config, or is not wanted; CheckpointError if nobody can tell.
    """
    if not config.checkpoint.copy_to:
        return None
    from vlm_train.engine.copies import Store, restore

    store = Store(config.checkpoint.copy_to, config.run.id)
    try:
        is_there = bool(store.steps())
    except Exception as error:  # of whatever library the store has
        raise CheckpointError(f"whether {store.shown} holds copies of this run cannot be told: {error}",
                              remedy="run again later, or leave out checkpoint.copy_to") from error  # fmt: skip
    if is_there and config.run.resume == "never":
        raise ConfigError(f"{store.shown} holds copies of a run of this name", got="run.resume=never",
                          allowed="a new run.id", remedy="leave run.resume at auto to go on from them")  # fmt: skip
    found = restore(run, store)
    if found is not None:
        refuse_other_config(config, run)
    return found


def point_latest(run: RunDirectory) -> None:
    """runs/<experiment>/latest -> this run, by rename. Runs outside runs/ have no pointer, nor has it one itself."""
    if run.path.parent.parent.name != "runs" or run.path.name == "latest":
        return
    temporary = run.path.parent / f".latest-{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(run.path.name)
    os.replace(temporary, run.path.parent / "latest")


@contextmanager
def locked(run: Folder) -> Iterator[None]:
    """Holds the run for this process. Raises ConfigError if another one holds it, or if it cannot be made."""
    try:
        run.create()
        lock = open(run.path / ".lock", "a+")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(
            f"the run cannot be written: {error.strerror}",
            got=f"run.dir={run.path}",
            allowed="a folder, or a name that is not taken, where this user may write",
            remedy="run.dir=runs/mine",
        ) from error
    with lock as file:
        _acquire(file, run)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _acquire(file: IO[str], run: Folder, patience: float = 15.0) -> None:
    """A just-killed owner's workers get `patience` seconds to vanish."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.2)
        if time.monotonic() > deadline:
            file.seek(0)
            raise ConfigError(f"{run.path} is being trained by another process", got=f"process {file.read()}",
                              remedy="wait for it, stop it, or start another run: run.resume=never")  # fmt: skip
