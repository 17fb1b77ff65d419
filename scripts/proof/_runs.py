"""Real training runs in real processes, small enough to be repeated: shared by the proofs and the tests."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from vlm_train.data.sources.shards import ShardSource

# The model of model=llava_tiny, cut down.
TINY_ANSWERER = (
    "model=llava_tiny", "objective=next_token", "data=scenes", "evaluation=none", "model.vision.image.size=32",
    "model.vision.width=32", "model.vision.num_layers=1", "model.vision.num_heads=2",
    "model.text.architecture.hidden_size=32", "model.text.architecture.intermediate_size=64",
    "model.text.architecture.num_hidden_layers=2", "model.text.architecture.num_attention_heads=2",
    "model.text.architecture.num_key_value_heads=2", "model.tokenizer.vocab_size=300", "schedule.warmup_steps=1",
    "trainer.num_threads=1", "trainer.accelerator=cpu", "data.num_workers=0", "optim.lr=1e-2",
)  # fmt: skip
# The towers of model=clip_tiny, cut down: a step takes a few milliseconds, a run a few seconds.
TINY = (
    "model.vision.image.size=32", "model.vision.patch_size=8", "model.vision.width=32", "model.vision.num_layers=1",
    "model.vision.num_heads=2", "model.text.width=32", "model.text.num_layers=1", "model.text.num_heads=2",
    "model.embed_dim=16", "model.tokenizer.vocab_size=300", "schedule.warmup_steps=5", "evaluation=retrieval",
    "data=shards", "trainer.global_batch=24", "trainer.num_threads=1",
)  # fmt: skip
MACHINE_COLUMNS = ("samples_per_second", "data_wait", "mfu")


def make_scenes(folder: Path, num_samples: int = 240, *extra: str) -> Path:
    """A scenes dataset below `folder` through the command line, with further options."""
    out = folder / "scenes"
    sizes = ["--num-samples", str(num_samples), "--seed", "1", "--size", "32"]
    call(folder, ["data", "make", "scenes", str(out), *sizes, *extra])
    return out


def truth_of(shards: Path) -> dict[bytes, tuple[list[str], list[str]]]:
    """Of scenes by uid: the captions that a sample has, and those that are true."""
    source, found = ShardSource(shards=str(shards)), {}
    for sample in source.read(np.arange(len(source))):
        told = json.loads(sample.parts["json"])
        found[sample.uid] = told["captions"], told.get("corruption", {}).get("true_captions", told["captions"])
    return found


def train_words(data: Path, *extra: str) -> list[str]:
    """Words of a small training command on `data`."""
    return ["train", *TINY, f"data.train.shards={data / 'train'}", f"data.val.shards={data / 'val'}", *extra]


def start(folder: Path, words: Sequence[str], **popen: Any) -> subprocess.Popen[str]:
    """Starts `vlm-train WORDS` in `folder`; the child gets no terminal and no network."""
    command = [sys.executable, "-m", "vlm_train.cli.main", *words]
    return subprocess.Popen(command, cwd=folder, env=_environment(), text=True, stdin=subprocess.DEVNULL, **popen)


def _environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "PYTHONUNBUFFERED": "1"}


def call_anew(folder: Path, words: Sequence[str], timeout: float = 300) -> str:
    """As `call`, by an interpreter of its own, which sees what the environment wants to be imported."""
    process = start(folder, words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = process.communicate(timeout=timeout)
    if process.returncode != 0:
        raise AssertionError(f"vlm-train {' '.join(words)} ended with {process.returncode}:\n{output}")
    return output


def call(folder: Path, words: Sequence[str], expect: int = 0, timeout: float = 300) -> str:
    """Runs `vlm-train WORDS` to its end and returns what it printed; another exit code than `expect` is an error."""
    with tempfile.NamedTemporaryFile("r", errors="replace") as log:
        process = begin(folder, words, Path(log.name))
        process.join(timeout)
        is_late = process.is_alive()
        if is_late:
            process.kill()
            process.join()
        output = log.read()
    if is_late or process.exitcode != expect:
        ended = f"took more than {timeout:g} s" if is_late else f"ended with {process.exitcode}, not {expect}"
        raise AssertionError(f"vlm-train {' '.join(words)} {ended}:\n{output}")
    return output


def begin(folder: Path, words: Sequence[str], log: Path) -> BaseProcess:
    """Starts `vlm-train WORDS` in `folder`, with what it says in a file.

    The process is a copy of one that has imported everything, which takes longer than most of these runs.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vlm_train.training", "vlm_train.cli.main"])
    process = context.Process(target=_command, args=(str(folder), list(words), _environment(), str(log)))
    process.start()
    return process


def _command(folder: str, words: list[str], environment: dict[str, str], log: str) -> None:
    """What the process of `begin` does: as `start`, with what it says in a file."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, (path, flags) in enumerate([(os.devnull, os.O_RDONLY), (log, os.O_WRONLY | os.O_APPEND)]):
        os.dup2(os.open(path, flags), number)
    os.dup2(1, 2)
    sys.argv = ["vlm-train", *words]
    from vlm_train.cli.main import main

    sys.exit(main(words))


def signal_after(folder: Path, words: Sequence[str], run: Path, step: int, number: int, timeout: float = 300) -> int:
    """Starts a run, sends signal `number` once metrics.jsonl tells `step`, SIGTERM to all its processes as a scheduler
    does, others to the first; returns the exit code."""
    with open(folder / "log.txt", "a") as log:
        process = start(folder, words, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + timeout
        while last_step(run) < step and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        if process.poll() is not None:
            raise AssertionError(f"the run ended before step {step}:\n{(folder / 'log.txt').read_text()[-3000:]}")
        send = os.killpg if number == signal.SIGTERM else os.kill
        send(process.pid, number)
        return process.wait(timeout=60)


def kill_after(folder: Path, words: Sequence[str], run: Path, step: int) -> None:
    """SIGKILL to the launching process once metrics.jsonl tells `step`."""
    assert signal_after(folder, words, run, step, signal.SIGKILL) == -signal.SIGKILL


def rows(run: Path) -> list[dict[str, Any]]:
    """The complete rows of metrics.jsonl."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def last_step(run: Path) -> int:
    """The last step that metrics.jsonl tells."""
    found = rows(run)
    return found[-1]["step"] if found else 0


def learned(run: Path) -> str:
    """metrics.jsonl as text without the columns that measure the machine."""
    return "".join(
        json.dumps({key: value for key, value in row.items() if key not in MACHINE_COLUMNS}) + "\n" for row in rows(run)
    )


def losses(run: Path) -> list[float]:
    """The loss of every step."""
    return [row["loss"] for row in rows(run)]
