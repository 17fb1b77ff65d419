"""The search for the largest micro-batch: its order, its processes, what ranks agree on, and what a run keeps of it."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from vlm_train.distributed import collectives
from vlm_train.distributed.testing import run_ranks
from vlm_train.engine import rehearsal
from vlm_train.engine.callbacks.micro_batch import MicroBatch
from vlm_train.engine.callbacks.rehearsal import Rehearsal, Rehearsed, try_size
from vlm_train.engine.micro_batches import Budgets, even_sizes
from vlm_train.engine.module import TrainingModule
from vlm_train.engine.optim import AdamW
from vlm_train.engine.rehearsal import Answer, Conditions, Search, is_out_of_memory, rehearsed
from vlm_train.engine.rundir import RunDirectory, append_line, read_lines
from vlm_train.engine.schedule import Cosine
from vlm_train.engine.steps import StepPlan
from vlm_train.engine.trainer import lightning_trainer
from vlm_train.errors import ConfigError, VlmError
from vlm_train.objectives.infonce import InfoNCE
from vlm_train.types import Batch

CONDITIONS = Conditions(device="T4, 16 GiB", num_ranks=2, settings="ddp")


@given(st.integers(1, 4096), st.integers(1, 64))
def test_every_size_cuts_the_share_of_every_rank_into_filled_micro_batches(share: int, num_ranks: int) -> None:
    for global_batch in {share * num_ranks, share * num_ranks + num_ranks - 1}:
        sizes = even_sizes(global_batch, num_ranks)
        largest = -(-global_batch // num_ranks)
        assert sizes[0] == largest and sizes == sorted(set(sizes), reverse=True)
        assert all(-(-largest // size) <= global_batch // num_ranks for size in sizes)


@given(st.integers(1, 4096), st.integers(0, 4096))
def test_the_search_ends_at_the_largest_size_that_fits(share: int, room: int) -> None:
    search = Search(even_sizes(share, 1))
    while (size := search.next()) is not None:
        assert size not in search.tried
        search.tried[size] = size <= room
    assert search.found == max((size for size in search.sizes if size <= room), default=0)
    assert len(search.tried) <= 7  # of up to 36 sizes; the whole share first
    assert next(iter(search.tried)) == share


# What a rehearsal does, without a model: sizes above ROOM end it as they end one.
CHILD = """
import os, signal, sys
from pathlib import Path
from vlm_train.engine.rehearsal import Search
from vlm_train.engine.rundir import append_line
room, how, record = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
append_line(record.parent.parent / "starts.jsonl", {})
search = Search([16, 8, 4, 2, 1])
search.read(record)
while (size := search.next()) is not None:
    append_line(record, {"size": size})
    if size > room:
        os.kill(os.getpid(), signal.SIGKILL) if how == "killed" else sys.exit(int(how))
    append_line(record, {"size": size, "fits": True})
    search.tried[size] = True
"""


def found_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, how: str) -> tuple[Search, int]:
    """(the search, how many processes it took)."""
    monkeypatch.setattr(rehearsal.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(rehearsal.__file__).parents[2]))
    search = rehearsed(Search([16, 8, 4, 2, 1]), [sys.executable, "-c", CHILD, str(room), how], lambda: None)
    return search, sum(1 for _ in read_lines(tmp_path / "starts.jsonl"))


@pytest.mark.parametrize("how", [str(rehearsal.NO_MEMORY), "killed"])
def test_a_process_goes_on_until_a_size_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Told by the process, or by a kernel that has killed it."""
    search, starts = found_by(tmp_path, monkeypatch, 4, how)
    assert list(search.tried.items()) == [(16, False), (2, True), (4, True), (8, False)]
    assert (search.found, starts) == (4, 2)


def test_one_process_is_enough_where_the_share_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search, starts = found_by(tmp_path, monkeypatch, 16, "1")
    assert (search.tried, starts) == ({16: True}, 1)


def test_nothing_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search, _ = found_by(tmp_path, monkeypatch, 0, str(rehearsal.NO_MEMORY))
    assert search.found == 0
    command = [sys.executable, "-c", f"import sys; sys.exit({rehearsal.NO_MEMORY})"]  # the weights alone were too much
    assert rehearsed(Search([4, 2, 1]), command, lambda: None).found == 0


def test_another_failure_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VlmError, match="rehearsal"):
        found_by(tmp_path, monkeypatch, 4, "1")


def test_what_says_that_memory_was_not_there() -> None:
    """On this CPU by a real allocation; the twins are errors of other kinds."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    wrapped = ValueError("the step failed")
    wrapped.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert is_out_of_memory(wrapped) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(ValueError("out of memory"))


def test_an_answer_holds_under_its_conditions_alone(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert rehearsal.known(run, CONDITIONS) is None
    row = {"micro_batch": 8, "devices": ["T4, 16 GiB", "V100, 32 GiB"], "ranks": 2, "settings": "ddp"}
    run.event("micro_batch", row)
    assert rehearsal.known(run, CONDITIONS) == 8
    for change in ({"device": "H200, 139 GiB"}, {"num_ranks": 4}, {"settings": "fsdp2"}):
        changed = {name: getattr(CONDITIONS, name) for name in ("device", "num_ranks", "settings")} | change
        assert rehearsal.known(run, Conditions(**changed)) is None


class Trained:
    """What the callback sees of a trainer and a module."""

    def __init__(self) -> None:
        self.is_global_zero = collectives.rank() == 0
        plan = StepPlan(global_batch=24, budgets=Budgets(), rank=collectives.rank(), world_size=2, seed=0)
        self.gradient_step = SimpleNamespace(plan=plan)


def told(folder: str, samples: list[int]) -> int | str:
    """The micro-batch that ranks take who have found `samples`, or what they are told."""
    tried = {12: True} if collectives.rank() == 0 else {}
    own = Answer(samples=samples[collectives.rank()], tried=tried, seconds=1.0, conditions=CONDITIONS)
    seen: Any = Trained()
    try:
        for _ in range(2):  # as after a spike
            MicroBatch(RunDirectory(folder), own).on_train_start(seen, seen)
    except ConfigError as error:
        return str(error)
    return int(seen.gradient_step.plan.budgets.samples)


def on_a_rank(folder: str) -> list[int | str]:
    return [told(f"{folder}/some", [12, 4]), told(f"{folder}/none", [12, 0])]


def test_ranks_agree_on_the_smallest_and_tell_it_once(tmp_path: Path) -> None:
    """And all of them end where one has no room for a sample."""
    for name in ("some", "none"):
        (tmp_path / name).mkdir()
    for agreed, refused in run_ranks(on_a_rank, 2, str(tmp_path)):
        assert agreed == 4 and "not even the smallest" in refused
    (row,) = read_lines(tmp_path / "some" / "events.jsonl")
    kept = {key: row[key] for key in ("micro_batch", "num_micro_batches", "devices", "ranks", "tried")}
    assert kept == {"micro_batch": 4, "num_micro_batches": 3, "devices": ["T4, 16 GiB"], "ranks": 2,
                    "tried": {"12": True}}  # fmt: skip
    assert not (tmp_path / "none" / "events.jsonl").exists()


class Normed(nn.Module):
    """Two towers, and the statistics of a batch norm."""

    outputs = frozenset({"image_features", "text_features"})

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vision, self.text, self.norm = nn.Linear(6, 4), nn.Linear(6, 4), nn.BatchNorm1d(6)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        image, text = self.norm(batch["images"]), batch["text_ids"].float()
        return {
            "image_features": nn.functional.normalize(self.vision(image), dim=-1),
            "text_features": nn.functional.normalize(self.text(text), dim=-1),
        }


def make_batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    images, texts = torch.randn(6, 6, generator=generator), torch.randint(0, 9, (6, 6), generator=generator)
    return Batch(images=images, text_ids=texts, weights=torch.ones(6), step=step)


def trained(*callbacks: Any) -> dict[str, torch.Tensor]:
    """The state of a model after three steps with whole micro-batches."""
    group = {"pattern": ".*", "lr": 1e-2, "weight_decay": 0.1}
    module = TrainingModule(
        model=Normed(), objective=InfoNCE(), optim=AdamW(lr=1e-2, groups=[group]),
        schedule=Cosine(total_steps=9, warmup_steps=0),
        plan=StepPlan(global_batch=6, budgets=Budgets(samples=6), rank=0, world_size=1, seed=0),
    )  # fmt: skip
    trainer: Any = lightning_trainer(
        accelerator="cpu", devices=1, num_nodes=1, strategy="single", precision="fp32", callbacks=list(callbacks)
    )
    batches: Any = [make_batch(step) for step in range(3)]
    trainer.fit(module, train_dataloaders=DataLoader(batches, batch_size=None))
    return {name: value.clone() for name, value in module.state_dict().items()}


class InPlace(Rehearsal):
    """The twin: a rehearsal on what is trained."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        try_size(trainer, pl_module, self.batch, 6)


def test_a_rehearsal_on_what_is_trained_would_change_it(tmp_path: Path) -> None:
    """Why it is a process of its own; what tests/cli/test_rehearsed_runs.py compares would tell."""
    untouched, twin = trained(), trained(InPlace(Search([6]), make_batch(9), tmp_path / "sizes.jsonl"))
    assert all(torch.equal(value, trained()[name]) for name, value in untouched.items())
    differ = [name for name, value in untouched.items() if not torch.equal(value, twin[name])]
    assert {"model.norm.running_mean", "model.vision.weight"} <= set(differ)


def test_sizes_are_written_before_and_behind_each_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_train.engine.callbacks.rehearsal.keep_margin", lambda device: None)
    record = tmp_path / "sizes.jsonl"
    append_line(record, {"size": 6, "fits": False})  # of a process before
    search = Search(even_sizes(6, 1))
    search.read(record)
    with pytest.raises(Rehearsed):
        trained(Rehearsal(search, make_batch(9), record))
    rows = list(read_lines(record))[1:]
    assert [row["size"] for row in rows[::2]] == [row["size"] for row in rows[1::2]]
    assert all("fits" not in row for row in rows[::2]) and all(row["fits"] for row in rows[1::2])
    assert search.found == 3


LIMITED = """
import resource, sys
from types import SimpleNamespace
from vlm_train.engine.rehearsal import keep_margin
if gigabytes := float(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes * 1e9), resource.RLIM_INFINITY))
keep_margin(SimpleNamespace(type="cpu"))
print(resource.getrlimit(resource.RLIMIT_DATA)[0], resource.getrlimit(resource.RLIMIT_AS)[0])
"""


def limits(gigabytes: str) -> list[int]:
    """(data, addresses) that a process may have after it was given so much data; 0: all."""
    words = [sys.executable, "-c", LIMITED, gigabytes]
    done = subprocess.run(words, cwd=Path(rehearsal.__file__).parents[2], capture_output=True, text=True, check=True)
    return list(map(int, done.stdout.split()))


def test_a_margin_stays_of_what_a_process_may_take() -> None:
    """The machine bounds data, nothing the addresses; a limit of the process bounds data further."""
    free, limited = limits("0"), limits("2")
    assert limited[0] == int((1 - rehearsal.MARGIN) * 2e9 - rehearsal.READERS) < free[0]
    assert free[1] == limited[1] == resource.getrlimit(resource.RLIMIT_AS)[0]
