"""Saves behind the training: what is written is the state of the step, whatever changes while it is written."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from vlm_train.distributed import collectives
from vlm_train.distributed.testing import run_ranks
from vlm_train.engine import checkpoints, saving, states
from vlm_train.engine.rundir import RunDirectory
from vlm_train.engine.saving import Saver, Staging, State
from vlm_train.errors import CheckpointError


def saver_of(path: Path, *, asynchronous: bool = True) -> Saver:
    run = RunDirectory(path)
    run.create()
    return Saver(run=run, keep=2, keep_every_steps=None, asynchronous=asynchronous)


def state(value: float) -> State:
    return State(content={"state_dict": {"w": torch.full((3,), value)}, "optimizer_states": []}, is_sharded=False)


def saved(path: Path, step: int) -> torch.Tensor:
    return states.read_weights(path / "checkpoints" / checkpoints.name_of(step))["w"]


class Gate:
    """Holds the writing thread until `open` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, write = threading.Event(), saving._write_whole
        monkeypatch.setattr(saving, "_write_whole", lambda *words: self._held(write, *words))

    def _held(self, write: Callable[..., Any], *words: Any) -> Any:
        assert self.open.wait(30)
        return write(*words)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.open.set()


@pytest.mark.parametrize("is_copied", [True, False], ids=["right", "twin"])
def test_what_changes_while_it_is_written_is_not_saved(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch, is_copied: bool
) -> None:
    """The twin hands the thread the tensors that train."""
    if not is_copied:
        monkeypatch.setattr(Staging, "copied", lambda self, state: state)
    saver, trained = saver_of(tmp_path), state(1.0)
    saver.save(3, trained)
    trained.content["state_dict"]["w"].fill_(2.0)
    assert not checkpoints.committed(tmp_path / "checkpoints")
    gate.open.set()
    saver.join()
    assert torch.equal(saved(tmp_path, 3), torch.full((3,), 1.0 if is_copied else 2.0))


def test_one_save_is_on_its_way_and_each_is_told_when_it_is_committed(tmp_path: Path, gate: Gate) -> None:
    saver = saver_of(tmp_path)
    saver.save(1, state(1.0))
    assert not (tmp_path / "events.jsonl").exists()
    threading.Timer(0.2, gate.open.set).start()
    saver.save(2, state(2.0))  # waits for the first
    assert checkpoints.committed(tmp_path / "checkpoints")[0].name == "step-00000001"
    saver.join()
    told = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(row["event"], row["step"], row["path"]) for row in told] == [
        ("checkpoint", 1, "step-00000001"), ("checkpoint", 2, "step-00000002"),
    ]  # fmt: skip


@pytest.mark.parametrize("asynchronous", [True, False])
def test_an_error_is_raised_once_with_its_cause_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    saver = saver_of(tmp_path, asynchronous=asynchronous)
    saver.save(1, state(1.0))
    saver.join()

    def fail(content: dict[str, Any], folder: Path) -> None:
        (folder / checkpoints.STATE).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=r"step 2 could not.*No space") as raised:
        patch.setattr(saving, "_write_whole", fail)
        saver.save(2, state(2.0))
        saver.join()
    assert isinstance(raised.value.__cause__, OSError) and "MB free" in str(raised.value)
    saver.join()  # not again
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["LATEST", "step-00000001"]
    saver.save(3, state(3.0))
    saver.join()
    assert torch.equal(saved(tmp_path, 3), torch.full((3,), 3.0))


def test_a_synchronous_save_makes_no_copy_and_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Staging, "copied", None)
    saver = saver_of(tmp_path, asynchronous=False)
    saver.save(1, state(1.0))
    assert checkpoints.committed(tmp_path / "checkpoints") and saver._thread is None


def test_a_rank_with_nothing_to_write_writes_nothing(tmp_path: Path) -> None:
    saver = saver_of(tmp_path)
    saver.save(1, State(content=None, is_sharded=False))
    saver.join()
    assert not list((tmp_path / "checkpoints").iterdir())


TENSORS = st.builds(
    lambda size, kind: torch.arange(size).to(kind),
    st.integers(0, 5),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8]),
)
TREES = st.recursive(
    TENSORS | st.integers() | st.text(max_size=3) | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=8,
)


def leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict | list):
        yield len(tree)
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(part)
    else:
        yield tree


@given(trees=st.lists(st.dictionaries(st.text(max_size=2), TREES, max_size=4), min_size=1, max_size=3))
def test_a_copy_says_the_same_and_shares_nothing(trees: list[dict[str, Any]]) -> None:
    staging = Staging()  # one for all: buffers of a tree of another form must not be taken
    for tree in trees:
        copied = staging.copied(tree)
        for one, other in zip(leaves(tree), leaves(copied), strict=True):
            if isinstance(one, torch.Tensor):
                assert one.dtype == other.dtype and torch.equal(one, other)
                assert one.numel() == 0 or one.data_ptr() != other.data_ptr()
            else:
                assert one == other and type(one) is type(other)


def test_buffers_are_filled_again_and_tied_weights_stay_tied() -> None:
    staging, weight = Staging(), torch.randn(4, 3).T
    tied = OrderedDict(a=weight, b=weight.detach())
    tied._metadata = {"": {"version": 1}}
    first = staging.copied({"state_dict": tied})["state_dict"]
    assert first["a"].data_ptr() == first["b"].data_ptr() and first["a"].stride() == weight.stride()
    assert first._metadata == tied._metadata
    place = first["a"].data_ptr()
    weight.add_(1)
    second = staging.copied({"state_dict": tied})["state_dict"]
    assert second["a"].data_ptr() == place and torch.equal(second["b"], weight)


def sharded_state(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> State:
    content = {
        "state_dict": get_model_state_dict(model),
        "optimizer_states": [get_optimizer_state_dict(model, optimizer)],
        "global_step": step,
    }
    return State(content=content, is_sharded=True)


def trained(num_steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    fully_shard(model, mesh=init_device_mesh("cpu", (collectives.world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(num_steps):
        step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 7)).square().sum().backward()
    optimizer.step()


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.full_tensor() for name, value in get_model_state_dict(model).items()}


def save_while_training(path: str) -> dict[str, Any]:
    """Steps with their own collectives go on while the thread writes; a later save fails on the last rank alone."""
    model, optimizer = trained(2)
    saver, before = saver_of(Path(path)), whole(model)
    saver.save(2, sharded_state(model, optimizer, 2))
    while int(collectives.all_reduce_max(torch.tensor([int(saver._thread.is_alive())]))):  # as many steps on each
        step(model, optimizer)
    saver.join()
    failure, is_last = "", collectives.rank() == collectives.world_size() - 1
    with mock.patch.object(distributed_checkpoint, "FileSystemWriter", _Full) if is_last else nullcontext():
        saver.save(3, sharded_state(model, optimizer, 3))
        try:
            saver.join()
        except CheckpointError as error:
            failure = str(error)
    saver.save(4, sharded_state(model, optimizer, 4))
    saver.join()
    return {"before": before, "after": whole(model), "failure": failure}


class _Full(distributed_checkpoint.FileSystemWriter):
    """A disk that is full for this rank."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        raise OSError(28, "No space left on device")


def test_ranks_write_their_shards_while_they_train_and_fail_together(tmp_path: Path) -> None:
    found = run_ranks(save_while_training, 2, str(tmp_path / "run"))
    folder = tmp_path / "run" / "checkpoints"
    first, last = checkpoints.committed(folder)
    assert [checkpoints.step_of(first), checkpoints.step_of(last)] == [2, 4]
    read = states.read_weights(first)
    assert all(torch.equal(read[name], value) for name, value in found[0]["before"].items())
    assert not all(torch.equal(read[name], value) for name, value in found[0]["after"].items())  # training went on
    names = set(checkpoints.read_manifest(first)["files"])
    assert names == {f"state.ckpt/{name}" for name in (".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt")}
    assert states.read_sharded(first / checkpoints.STATE)["global_step"] == 2
    assert all("step 3 could not be written: rank 1: [Errno 28] No space" in each["failure"] for each in found)
    assert not list(folder.glob(".*"))
