"""Copies of checkpoints in a store (a bucket, another disk), from which a run goes on that lost its folder.

`URL/RUN_ID/step-N/` holds the files of a checkpoint, below `run/` what else of the run is needed to go on (config,
tokenizer, lines of JSON), `run.json` with size and sha256 of these, and last of all manifest.json: without it, it is no
copy. A thread of its own copies what the store lacks after each commit, so a store that is slow or away never holds
training up: it is told, and tried again after the next save. What the run has removed goes there too, manifest first.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from vlm_train.engine import checkpoints
from vlm_train.engine.rundir import RunDirectory
from vlm_train.errors import CheckpointError, ConfigError
from vlm_train.locations import scrubbed, shown
from vlm_train.log import get_logger

LOG = get_logger(__name__)
RECORDS = ("config.yaml", "tokenizer/**/*", "*.jsonl", "evals/*")
"""Patterns of the files of a run that are copied with each checkpoint."""


class Store:
    """A folder in a file system of fsspec. Errors are the library's own.

    Raises:
        ConfigError: fsspec does not know the kind of URL, or a package for it is not installed.
    """

    def __init__(self, url: str, run_id: str) -> None:
        options = {"auto_mkdir": True} if url.startswith("file://") else {}
        try:
            self._fs, root = fsspec.core.url_to_fs(url, **options)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                "checkpoint.copy_to cannot be opened", got=f"{shown(url)} ({scrubbed(str(error))})",
                allowed="s3://BUCKET/FOLDER, gs://BUCKET/FOLDER, file:///FOLDER",
                remedy="pip install 'vlm-train[s3]' or 'vlm-train[gcs]', or another URL",
            ) from error  # fmt: skip
        self._root, self.shown = f"{root.rstrip('/')}/{run_id}", f"{shown(url).rstrip('/')}/{run_id}"

    def steps(self) -> list[str]:
        """Names of the complete copies, oldest first."""
        self._fs.invalidate_cache()
        found = self._fs.glob(f"{self._root}/step-*/manifest.json")
        return sorted(PurePosixPath(name).parent.name for name in found)

    def read(self, name: str) -> bytes:
        """The bytes of a file."""
        data: bytes = self._fs.cat_file(f"{self._root}/{name}")
        return data

    def write(self, name: str, data: bytes) -> None:
        """Makes a file of bytes."""
        self._fs.pipe_file(f"{self._root}/{name}", data)

    def put(self, file: Path, name: str) -> None:
        """Copies a file there."""
        self._fs.put_file(str(file), f"{self._root}/{name}")

    def get(self, name: str, file: Path) -> None:
        """Copies a file from there."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self._fs.get_file(f"{self._root}/{name}", str(file))

    def remove(self, step: str) -> None:
        """Removes a copy, which is none from the first moment on."""
        self._fs.rm_file(f"{self._root}/{step}/manifest.json")
        self._fs.rm(f"{self._root}/{step}", recursive=True)


class Copies:
    """Keeps a store as the folder of checkpoints is, from a thread of its own.

    Args:
        run: whose checkpoints are copied.
        store: where to.
        keep, keep_every_steps: which copies stay, see `checkpoints.retired`.
    """

    def __init__(self, *, run: RunDirectory, store: Store, keep: int, keep_every_steps: int | None) -> None:
        self.run, self.store, self.keep, self.keep_every_steps = run, store, keep, keep_every_steps
        self._thread: threading.Thread | None = None
        self._is_asked = threading.Event()

    def start(self) -> None:
        """Copies what the store lacks. Returns at once; while a copy is on its way, this one follows it."""
        self._is_asked.set()
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._work, name="copies", daemon=True)
            self._thread.start()

    def wait(self, seconds: float) -> None:
        """Waits so long at most."""
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                LOG.warning("the copy to %s is not complete after %g s, and not waited for", self.store.shown, seconds)

    def _work(self) -> None:
        while self._is_asked.is_set():
            self._is_asked.clear()
            try:
                self.update()
            except Exception as error:  # of whatever library the store has
                LOG.warning(
                    "the copy to %s failed, and is tried again after the next save: %s", self.store.shown, error
                )

    def update(self) -> None:
        """Makes the store hold what the folder holds, the newest first; older copies stay by the rule of the folder,
        those of steps that were taken back do not."""
        found = checkpoints.committed(self.run.checkpoints)
        there = self.store.steps()
        for path in reversed(found):
            manifest = (path / "manifest.json").read_bytes()
            if path.name in there and self.store.read(f"{path.name}/manifest.json") == manifest:
                continue
            began = time.perf_counter()
            if path.name in there:
                self.store.remove(path.name)
            self._copy(path, json.loads(manifest)["files"])
            seconds = round(time.perf_counter() - began, 3)
            self.run.event("copy", {"step": checkpoints.step_of(path), "to": self.store.shown, "seconds": seconds})
        names = sorted({*there, *(path.name for path in found)})
        beyond = [name for name in there if found and name > found[-1].name]
        kept = [Path(name) for name in names if name not in beyond]
        old = [path.name for path in checkpoints.retired(kept, self.keep, self.keep_every_steps)]
        for name in [*beyond, *(name for name in old if name in there)]:
            self.store.remove(name)

    def _copy(self, path: Path, files: dict[str, Any]) -> None:
        for name in files:
            self.store.put(path / name, f"{path.name}/{name}")
        entries = {}
        for file in sorted({file for pattern in RECORDS for file in self.run.path.glob(pattern) if file.is_file()}):
            name, data = file.relative_to(self.run.path).as_posix(), file.read_bytes()  # lines may be added meanwhile
            self.store.write(f"{path.name}/run/{name}", data)
            entries[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        self.store.write(f"{path.name}/run.json", json.dumps(entries).encode())
        self.store.put(path / "manifest.json", f"{path.name}/manifest.json")


def restore(run: RunDirectory, store: Store) -> Path | None:
    """Brings the newest copy that verifies back into a run that has no checkpoint, with the records of its time.

    Raises CheckpointError where there are copies, and none of them verifies; what the store's library raises where it
    does not answer, for an older copy is no answer to that.
    """
    failures = []
    for step in reversed(store.steps()):
        temporary = checkpoints.begin(run.checkpoints, int(step.removeprefix("step-")))
        try:
            manifest = json.loads(store.read(f"{step}/manifest.json"))
            records = json.loads(store.read(f"{step}/run.json"))
            for name in (*manifest["files"], "manifest.json"):
                store.get(f"{step}/{name}", _inside(temporary / "state", name))
            for name in records:
                store.get(f"{step}/run/{name}", _inside(temporary / "run", name))
            return _moved(run, temporary, step, records)
        except (CheckpointError, FileNotFoundError, ValueError, KeyError, TypeError) as error:
            LOG.warning("passing over a bad copy, %s/%s: %s", store.shown, step, error)
            failures.append(f"{step}: {scrubbed(str(error))}")
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    if failures:
        raise CheckpointError(f"no copy in {store.shown} verifies", got="; ".join(failures),
                              remedy="run.id=OTHER starts afresh")  # fmt: skip
    return None


def _moved(run: RunDirectory, temporary: Path, step: str, records: dict[str, checkpoints.Entry]) -> Path:
    """Verifies what was brought, then moves it to its places: the checkpoint last."""
    named = temporary / step
    (temporary / "state").rename(named)
    checkpoints.verify(named)
    for name, expected in records.items():
        if checkpoints.entry(temporary / "run" / name) != expected:
            raise CheckpointError(f"the checksum of {name} does not match its copy's list")
    for name in records:
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (temporary / "run" / name).replace(run.path / name)
    final = named.rename(run.checkpoints / step)
    LOG.info("%s comes from a copy", final)
    return final


def _inside(folder: Path, name: str) -> Path:
    """The place of a file that a list of the store names. Raises CheckpointError where it lies elsewhere."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise CheckpointError(f"a copy names a file outside its folder: {name}")
    return folder / name
