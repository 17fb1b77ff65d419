"""A chain of curation that looks at pictures, at a model's features and at captions, on small shards with copies: run
on any engine, killed at any moment, and compared byte for byte. Shared by the proof and the tests."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import _runs
import numpy as np
import psutil

from vlm_train.curation import columns
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.writer import DatasetWriter

CHAIN = """\
steps:
  copies: {_target_: vlm_train.curation.dedup.NearDuplicates, radius: 4}
  semantic: {_target_: vlm_train.curation.dedup.SemanticDuplicates, run: %(run)s, eps: 0.001}
  score: {_target_: vlm_train.curation.scores.Score, run: %(run)s, keep: 0.8}
"""
STAGES = ("fingerprints", "copies", "images", "semantic", "captions", "score")


class Chain:
    """The chain over shards of `folder`, each of which begins with the first samples of all. `shard_size`: samples."""

    def __init__(self, folder: Path, *, shard_size: int) -> None:
        self.folder = folder
        scenes = _runs.make_scenes(folder)
        steps = ("trainer.max_steps=8", "trainer.accelerator=cpu", "data.num_workers=0", "evaluation=none")
        _runs.call(folder, _runs.train_words(scenes, "run.dir=run", *steps))
        source = ShardSource(shards=str(scenes / "train"))
        samples = list(source.read(np.arange(len(source))))
        with DatasetWriter(folder / "all", parameters={}, max_samples=shard_size) as writer:
            for number, sample in enumerate([*samples, *samples[:40]]):
                parts = {name: bytes(sample.parts[name]) for name in ("png", "txt")}
                writer.add("train", f"{number:05d}", parts)
            writer.finish(num_errors=0, facts={})
        configs = folder / "configs" / "curation"
        configs.mkdir(parents=True)
        (configs / "proved.yaml").write_text(CHAIN % {"run": folder / "run"})
        self.num_shards = len(list((folder / "all" / "train").glob("*.tar")))

    def fresh(self, name: str) -> tuple[Path, Path]:
        """(shards of which nothing is known yet, where the folder of the selection will be)."""
        shards = self.folder / name / "shards"
        shutil.copytree(self.folder / "all" / "train", shards, ignore=shutil.ignore_patterns("_manifest"))
        return shards, self.folder / name / "out"

    def words(self, place: tuple[Path, Path], *extra: str) -> list[str]:
        """Of the command line. `place`: see `fresh`; `extra`: further words, such as the engine."""
        shards, out = place
        config = ["--config-dir", str(self.folder / "configs"), "curation=proved"]
        return ["data", "curate", *config, f"shards={shards}", f"out={out}", "device=cpu", *extra]

    def run(self, place: tuple[Path, Path], *extra: str) -> dict[str, bytes]:
        """Runs it to its end, and returns what it wrote."""
        _runs.call(self.folder, self.words(place, *extra))
        return written(place)

    def progress(self, place: tuple[Path, Path]) -> tuple[int, str]:
        """(files that are finished, the stage that works)."""
        shards, out = place
        parts = (shards / "_manifest").glob("*.parquet")
        num = [
            sum(columns.has_columns(part, columns.FINGERPRINT) for part in parts),
            int((out / "steps" / "copies.parquet").exists()),
            len(list(out.glob("embeddings/*-image/*.npz"))),
            int((out / "steps" / "semantic.parquet").exists()),
            len(list(out.glob("embeddings/*-text/*.npz"))),
            int((out / "steps" / "score.parquet").exists()),
        ]
        full = (self.num_shards, 1, self.num_shards, 1, self.num_shards, 1)
        stage = next((name for name, n, of in zip(STAGES, num, full, strict=True) if n < of), STAGES[-1])
        return sum(num), stage

    def killed(
        self, place: tuple[Path, Path], *extra: str, num_kills: int, workers: Callable[[int], Sequence[psutil.Process]]
    ) -> list[str]:
        """Kills it again and again, at moments spread over its work. `workers`: of a driver; one of them goes first,
        every second time. Returns the stages in which the driver was killed."""
        draw, stages, log = random.Random(0), [], self.folder / "killed.log"
        log.touch()
        targets = sorted(draw.randrange(3 * self.num_shards + 2) for _ in range(num_kills))
        for number, target in enumerate(targets):
            driver = _runs.begin(self.folder, self.words(place, *extra), log)
            wait(lambda target=target, driver=driver: self.progress(place)[0] >= target or not driver.is_alive())
            time.sleep(draw.uniform(0, 0.3))
            victims = workers(driver.pid) if number % 2 else []
            if victims:
                end(draw.choice(victims))
                time.sleep(draw.uniform(0, 0.1))
            if driver.is_alive():
                stages.append(self.progress(place)[1])
            driver.kill()
            driver.join()
        return stages


def wait(is_so: Callable[[], bool], seconds: float = 120) -> None:
    """Waits for something, for so long."""
    deadline = time.monotonic() + seconds
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.02)


def end(process: psutil.Process) -> None:
    """SIGKILL, where it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)


def written(place: tuple[Path, Path]) -> dict[str, bytes]:
    """All that the command leaves, byte for byte: the parts of the manifest, and the folder with all that is in it."""
    shards, out = place
    parts = sorted((shards / "_manifest").glob("*.parquet"))
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {path.name: path.read_bytes() for path in parts} | {
        str(path.relative_to(out)): path.read_bytes() for path in files
    }


def children(driver: int) -> list[psutil.Process]:
    """The processes that the local engine began."""
    try:
        found = psutil.Process(driver).children(recursive=True)
        return [process for process in found if "multiprocessing.spawn" in " ".join(process.cmdline())]
    except psutil.Error:
        return []


def descendants(nodes: Sequence[int], word: str) -> list[psutil.Process]:
    """The processes below those `nodes` whose command line holds a word."""
    found = []
    for node in nodes:
        for process in psutil.Process(node).children(recursive=True):
            try:
                found += [process] if word in " ".join(process.cmdline()) else []
            except psutil.Error:
                continue
    return found
