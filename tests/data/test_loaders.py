"""Evaluation, and what happens around worker processes."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import BAD, COUNTS, SPEC, ByteTokenizer, loader_of, merged, write_dataset

from vlm_train.data.collate import SampleEncoder
from vlm_train.data.pipeline import EvalLoader
from vlm_train.data.selection import Selection
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.transforms import EvalTransform, TrainTransform
from vlm_train.errors import ConfigError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return ShardSource(shards=str(write_dataset(tmp_path_factory.mktemp("data"), COUNTS, bad=BAD)))


class _Broken(TrainTransform):
    def plan(self, width, height, generator):
        raise self.error


@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_in_a_worker_keeps_its_message(source, workers):
    for error, shown in (
        (ConfigError("a bad key", got="x", remedy="mend it"), "a bad key"),
        (RuntimeError("something nobody expected"), "something nobody expected"),
    ):
        loader = loader_of(source, Selection.all(len(source)), workers=workers)
        transform = _Broken(spec=SPEC)
        transform.error = error
        loader._steps.encoder = SampleEncoder(transform=transform, tokenizer=ByteTokenizer())
        with pytest.raises(type(error), match=shown) as caught:
            next(iter(loader))
        assert getattr(caught.value, "remedy", None) == getattr(error, "remedy", None)


def eval_batches(source, rank, world_size, batch_size=4, workers=0):
    encoder = SampleEncoder(transform=EvalTransform(spec=SPEC), tokenizer=ByteTokenizer())
    loader = EvalLoader(
        source=source, encoder=encoder, batch_size=batch_size, rank=rank, world_size=world_size, num_workers=workers
    )
    batches = list(loader)
    assert len(batches) == len(loader)
    return batches


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8, 40])
def test_evaluation_covers_each_sample_once_in_order(source, world_size):
    ranks = [eval_batches(source, rank, world_size) for rank in range(world_size)]
    shapes = [[batch["images"].shape for batch in batches] for batches in ranks]
    assert all(shape == shapes[0] for shape in shapes)
    uids = np.concatenate(
        [b["uids"].numpy()[b["weights"].numpy() > 0] for batches in ranks for b in batches if b["weights"].any()]
    )
    good = [row for row in range(len(source)) if row not in BAD]
    assert uids.tobytes() == source.manifest.uids(np.array(good)).tobytes()
    errors = [error for batches in ranks for batch in batches for error in batch["errors"]]
    assert [error["row"] for error in errors] == list(BAD) and {error["replaced_by"] for error in errors} == {None}


def test_evaluation_workers_stay_between_passes_and_change_nothing(source):
    encoder = SampleEncoder(transform=EvalTransform(spec=SPEC), tokenizer=ByteTokenizer())
    loader = EvalLoader(source=source, encoder=encoder, batch_size=5, rank=0, world_size=1, num_workers=2)
    passes = [list(loader) for _ in range(2)]
    first, second = ([merged([batch]) for batch in batches] for batches in passes)
    assert first == second == [merged([batch]) for batch in eval_batches(source, 0, 1, 5)]
    batch = passes[0][0]
    assert batch["all_captions"][0] == ["picture 0"] and batch["metadata"][0]["label"] == 0


_CHILD = """
import multiprocessing, os, sys, threading, time
# as a library does in real runs
os.register_at_fork(after_in_child=lambda: threading.Thread(target=time.sleep, args=(10**6,), daemon=True).start())
from data_fixtures import *
from vlm_train.data.selection import Selection
from vlm_train.data.sources.shards import ShardSource
source = ShardSource(shards=sys.argv[1])
stream = iter(loader_of(source, Selection.all(len(source)), workers=2, num_steps=10_000))
next(stream)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
if sys.argv[2] == "fail":
    raise RuntimeError("the trainer failed")
while True:
    next(stream)
    time.sleep(0.01)
"""


def start_trainer(data, how):
    path = f"{os.getcwd()}:{Path(__file__).parent}"
    command = [sys.executable, "-c", _CHILD, str(data), how]
    return subprocess.Popen(command, text=True, stdout=-1, stderr=-1, env=os.environ | {"PYTHONPATH": path})


def test_a_trainer_that_fails_ends_although_its_workers_run(tmp_path):
    trainer = start_trainer(write_dataset(tmp_path, (20,)), "fail")
    _, shown = trainer.communicate(timeout=60)
    assert trainer.returncode == 1 and shown.rstrip().endswith("the trainer failed")


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_workers_leave_signals_to_the_trainer_and_die_with_it(tmp_path):
    trainer = start_trainer(write_dataset(tmp_path, (20,)), "run")
    try:
        workers = [int(pid) for pid in trainer.stdout.readline().split()]
        assert len(workers) == 2
        for sent, pid in itertools.product((signal.SIGINT, signal.SIGTERM), workers):
            os.kill(pid, sent)
        time.sleep(0.3)
        assert all(map(_alive, workers)) and trainer.poll() is None
        trainer.kill()
        trainer.wait(timeout=10)
        deadline = time.monotonic() + 10
        while any(map(_alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(_alive, workers))
    finally:
        trainer.kill()
        trainer.communicate(timeout=10)
