"""Features that are read are those that were computed, whatever became of the files; or they are computed."""

from __future__ import annotations

import copy
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from feature_toys import HUGE, NUM_PICTURES, features_of, key_of, put, right
from generative_toys import gradients, loss, make_batch, make_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from vlm_train.distributed import collectives
from vlm_train.distributed.testing import run_ranks
from vlm_train.models import feature_files, feature_store
from vlm_train.models.feature_files import FeatureFiles
from vlm_train.models.feature_store import FeatureStore, fingerprint, keys_of, reason_against
from vlm_train.models.generative import GenerativeModel
from vlm_train.models.vision.vit import VisionTransformer


def frozen(**changes: Any) -> GenerativeModel:
    model = make_model(**changes).train()
    model.vision.requires_grad_(False)  # type: ignore[attr-defined]
    return model


def with_store(model: GenerativeModel, folder: Path, settings: str = "", **options: Any) -> FeatureStore:
    store = FeatureStore(folder=folder, limit=options.pop("limit", HUGE), tower=model.vision, settings=settings,  # type: ignore[arg-type]
                         any_rank=options.pop("any_rank", collectives.all_reduce_max))  # fmt: skip
    model.feature_store = store
    return store


def told(model: GenerativeModel) -> dict[str, Tensor]:
    """The loss, and every gradient."""
    value = loss(model, make_batch())
    model.zero_grad()
    value.backward()
    return {"loss": value.detach(), **gradients(model)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("changes", [{}, {"feature_layer": -2}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_loss_and_gradients_are_those_of_a_tower_that_runs(tmp_path: Path, changes: Any, dtype: torch.dtype) -> None:
    expected = told(frozen(**changes).to(dtype))
    for num_read in (0, 4):  # computed and kept, then read
        model = frozen(**changes).to(dtype)
        store = with_store(model, tmp_path)
        assert same(told(model), expected)
        assert (store.num_read, store.num_computed) == (num_read, 4 - num_read)


def test_another_tower_reads_nothing_of_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: a store named without the weights."""

    def other() -> GenerativeModel:
        model = frozen()
        with torch.no_grad():
            model.vision.position[-1, -1] += 0.5  # type: ignore[attr-defined]
        return model

    expected = told(other())
    for settings in ("of one", "of another"):
        model = frozen()
        with_store(model, tmp_path, settings)
        told(model)
    assert len(list(tmp_path.iterdir())) == 2
    model = other()
    store = with_store(model, tmp_path, "of one")
    assert same(told(model), expected) and store.num_read == 0
    monkeypatch.setattr(feature_store, "weights_digest", lambda tower: b"")
    for of_whom in (frozen, other):
        model = of_whom()
        store = with_store(model, tmp_path, "of one")
        twin = told(model)
    assert store.num_read == 4 and not same(twin, expected)


def test_a_name_follows_from_all_that_decides() -> None:
    def tower(seed: int = 0, **changes: Any) -> VisionTransformer:
        torch.manual_seed(seed)
        sizes = {"image": {"size": 16}, "patch_size": 8, "width": 16, "num_layers": 1, "num_heads": 2}
        return VisionTransformer(**{**sizes, **changes})

    with_buffer = tower()
    with_buffer.register_buffer("shift", torch.zeros(()))
    renamed = tower()
    renamed.blocks.append(nn.Identity())  # no weight: it is for the settings to say
    names = [fingerprint(*each) for each in [
        (tower(), "a"), (tower(), "b"), (tower(seed=1), "a"), (tower().double(), "a"), (with_buffer, "a"),
        (tower(pool="mean"), "a"), (renamed, "a"), (tower(), "a"),
    ]]  # fmt: skip
    assert len(set(names[:-2])) == 6 and names[-1] == names[-2] == names[0]


def test_a_picture_is_known_by_its_pixels() -> None:
    pictures = torch.arange(4 * 3 * 2 * 2).view(4, 3, 2, 2).to(torch.uint8)
    keys = keys_of(pictures)
    assert len(set(keys)) == 4 and {len(key) for key in keys} == {16}
    assert keys_of(pictures.flip(0)) == keys[::-1] and keys_of(pictures[2:]) == keys[2:]
    assert keys_of(pictures.to(memory_format=torch.channels_last)) == keys
    assert not {*keys} & {*keys_of(pictures.float()), *keys_of(pictures.view(torch.int8)), *keys_of(pictures + 1)}


def test_where_one_picture_is_absent_the_tower_reads_the_whole_batch(tmp_path: Path) -> None:
    """As it would without a store: what it makes of a picture depends on how many it reads. Measured on a CPU in fp32:
    2e-6 between one picture alone and the same among others."""
    store, read = with_store(frozen(), tmp_path), []

    def compute(images: Tensor) -> Tensor:
        read.append(len(images))
        return images.flatten(2).float() + len(images)

    pictures = torch.randint(0, 256, (6, 3, 2, 2), dtype=torch.uint8)
    assert torch.equal(store(pictures[:3], compute), pictures[:3].flatten(2) + 3.0)
    assert torch.equal(store(pictures[1:5], compute), pictures[1:5].flatten(2) + 4.0)  # of those that are there, too
    assert torch.equal(store(pictures[:2], compute), pictures[:2].flatten(2) + 3.0)  # as they were first computed
    assert torch.equal(store(pictures[4:5].repeat(2, 1, 1, 1), compute), pictures[[4, 4]].flatten(2) + 4.0)
    assert read == [3, 4]


def test_only_training_reads_a_store_and_a_copy_has_the_same(tmp_path: Path) -> None:
    model = frozen()
    store = with_store(model, tmp_path)
    flops = frozen().forward_flops(20, 1.0)
    assert model.forward_flops(20, 1.0) == {**flops, "vision": 0.0} != flops
    model.eval()
    loss(model, make_batch())
    assert (store.num_read, store.num_computed) == (0, 0)
    model.train()
    told(model)
    assert copy.deepcopy(model).feature_store is store


def test_stored_and_computed_features_have_one_layout() -> None:
    tower = VisionTransformer(image={"size": 16}, patch_size=8, width=32, num_layers=3, num_heads=2, pool="mean")
    model = frozen(vision=tower, feature_layer=-1)
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    assert model._tokens(images).is_contiguous()


def test_a_tower_that_learns_or_draws_has_no_use_for_a_store() -> None:
    tower: Any = frozen().vision
    assert reason_against(tower) is None
    tower.extra = nn.Sequential(nn.Dropout(0.0), nn.BatchNorm1d(2)).requires_grad_(False)
    assert "extra.1" in str(reason_against(tower))
    assert reason_against(tower.eval()) is None
    tower.extra = nn.Dropout(0.1)
    assert "extra" in str(reason_against(tower))
    tower.extra, tower.position.requires_grad = None, True
    assert "learns" in str(reason_against(tower))


# The files.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of one tower, in a store that nothing else is in."""
    return tmp_path / "store" / "tower"


def test_any_number_of_writers_and_readers_share_a_folder(folder: Path) -> None:
    early = FeatureFiles(folder, HUGE)
    assert early.read([key_of(0)]) is None
    put(folder, 0, 1, 1).add([key_of(number) for number in (1, 2)], torch.stack([features_of(1), features_of(2)]))
    other = put(folder, 3)
    both = early.read([key_of(3), key_of(0), key_of(2), key_of(0)])
    assert both is not None and torch.equal(both, torch.stack([features_of(number) for number in (3, 0, 2, 0)]))
    assert early.read([key_of(0), key_of(4)]) is None
    other.add([key_of(4)], features_of(4)[None])
    assert early.read([key_of(0), key_of(4)]) is not None
    assert right(folder) == {0, 1, 2, 3, 4}
    assert len(list(folder.glob("*.index"))) == 2


@pytest.mark.parametrize("suffix", ["index", "features"])
def test_a_file_cut_anywhere_gives_what_is_whole(folder: Path, suffix: str) -> None:
    put(folder, *range(NUM_PICTURES))
    (path,) = folder.glob(f"*.{suffix}")
    whole = path.read_bytes()
    numbers = [set()]
    for length in range(0, len(whole) + 1, 1 if suffix == "index" else 7):
        path.write_bytes(whole[:length])
        numbers.append(right(folder))
        assert numbers[-1] == set(range(len(numbers[-1]))) and numbers[-1] >= numbers[-2]
    path.write_bytes(whole)
    assert right(folder) == set(range(NUM_PICTURES)) and len(numbers[len(numbers) // 2]) not in (0, NUM_PICTURES)
    path.write_bytes(whole[: len(whole) // 2])
    for _ in range(3):
        put(folder, *range(NUM_PICTURES))  # goes on in a file of its own, whose name may come before or behind
    assert right(folder) == set(range(NUM_PICTURES))


@pytest.mark.parametrize("suffix", ["index", "features"])
def test_a_byte_that_changed_never_gives_features(folder: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """The twin: records without a checksum."""
    put(folder, *range(NUM_PICTURES))
    (path,) = folder.glob(f"*.{suffix}")
    whole = path.read_bytes()
    places = range(0, len(whole), 3 if suffix == "index" else 41)
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 5]) + whole[place + 1 :])
        assert len(right(folder)) in (0, *range(NUM_PICTURES - 2, NUM_PICTURES + 1))  # a key may become another
    swapped = bytearray(whole)
    start = 32 if suffix == "index" else 0
    size = (len(whole) - start) // NUM_PICTURES
    swapped[start : start + size], swapped[start + size : start + 2 * size] = (
        whole[start + size : start + 2 * size], whole[start : start + size],
    )  # fmt: skip
    path.write_bytes(swapped)
    assert right(folder) == set(range(2, NUM_PICTURES))
    monkeypatch.setattr(feature_files, "check_of", lambda features, key: bytes(4))
    put(folder.parent / "twin", *range(4))
    (path,) = (folder.parent / "twin").glob(f"*.{suffix}")
    whole, place = path.read_bytes(), 32 if suffix == "index" else 8
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 5]) + whole[place + 1 :])
    with pytest.raises(AssertionError):
        right(folder.parent / "twin")


def test_after_a_kill_everything_that_was_told_is_there(folder: Path) -> None:
    """SIGKILL to a process that writes, again and again into one folder."""
    code = "import sys, feature_toys; feature_toys.write_until_killed(sys.argv[1])"
    for _ in range(2):
        num_before = len(list(folder.glob("*.index")))
        process = subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=Path(__file__).parent)
        deadline = time.monotonic() + 240
        while len(list(folder.glob("*.index"))) == num_before and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    most = max((path.stat().st_size - 32) // 16 for path in folder.glob("*.index"))
    assert right(folder, range(most + 10)) == set(range(most)) and most > 1


@contextmanager
def no_file_larger_than(num_bytes: int) -> Iterator[None]:
    """What a full disk is to whoever writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_the_keeping_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    feature_files.LOG.handlers.clear()
    model = frozen()
    expected = told(model)
    with_store(model, tmp_path)
    with no_file_larger_than(700):
        results = [told(model) for _ in range(3)]
    assert all(same(result, expected) for result in results)
    files = model.feature_store._files  # type: ignore[union-attr]
    assert files is not None and not files._writes
    model = frozen()
    store = with_store(model, tmp_path)
    assert same(told(model), expected) and store.num_computed == 4  # what was half written does not count
    assert same(told(model), expected) and store.num_read == 4


def test_a_store_keeps_to_its_limit_and_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(feature_files.LOG, "warning", lambda text, *values: said.append(text % values))
    limit = 3 * (3 * 5 * 4 + 20) + 32
    files = put(tmp_path / "one", 0, 1, limit=limit)
    for number in (2, 3, 4):
        files.add([key_of(number)], features_of(number)[None])
    assert right(tmp_path / "one") == {0, 1, 2} and len(said) == 1 and "feature_store_gb" in said[0]
    put(tmp_path / "another", 5, limit=limit)  # the limit is that of all towers
    assert right(tmp_path / "another") == set() and len(said) == 2
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.*")) <= limit


def test_what_is_no_feature_is_not_of_the_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links to nothing and to themselves, files, folders of others; and folders that go away while they are read."""
    store = folder.parent
    put(store / "old", 0)
    (store / "of others").mkdir()
    (store / "of others" / "photo.jpg").write_bytes(bytes(10**6))
    (store / "of others" / "gone.index").symlink_to("nowhere")
    (store / "gone").symlink_to("nowhere")
    (store / "circle").symlink_to(store)
    (store / "note.index").write_text("no folder")
    files = put(folder, *range(3), limit=1000)
    assert right(folder) == {0, 1, 2}
    size_of, sizes = feature_files._size_of, []

    def size_after_it_went_away(path: str) -> int:
        shutil.rmtree(store / "old", ignore_errors=True)
        sizes.append(size_of(path))
        return sizes[-1]

    monkeypatch.setattr(feature_files, "_size_of", size_after_it_went_away)
    files.add([key_of(3)], features_of(3)[None])
    assert right(folder) == {0, 1, 2, 3} and sizes.count(0) >= 2


# root obeys modes, too, once it has laid down the right not to
OBEDIENT = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"] if os.geteuid() == 0 else []


def test_a_store_that_may_not_be_written_is_read(tmp_path: Path) -> None:
    if OBEDIENT and (shutil.which("setpriv") is None or subprocess.run([*OBEDIENT, "true"]).returncode):
        pytest.skip("root may write everywhere here")
    put(tmp_path / "one", 0)
    (tmp_path / "one").chmod(0o500)
    code = "import sys, feature_toys; feature_toys.read_where_nothing_may_be_written(sys.argv[1])"
    command = [*OBEDIENT, sys.executable, "-c", code, str(tmp_path / "one")]
    subprocess.run(command, cwd=Path(__file__).parent, check=True, timeout=240)
    assert right(tmp_path / "one") == {0}
    assert put(tmp_path / "twin", 0, 1) and right(tmp_path / "twin") == {0, 1}


# Ranks.


def sharded_ranks(folder: str, agree: bool) -> dict[str, Any]:
    """What two ranks get when only the first finds its pictures, and how often each ran the tower."""
    rank = collectives.rank()
    model = frozen()
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    mine = images[2 * rank : 2 * rank + 2]
    name = fingerprint(model.vision, "")  # type: ignore[arg-type]
    expected = model._tokens(mine)
    if rank == 0:
        with_store(model, Path(folder))(mine, model._tokens)
    collectives.barrier()
    if agree:  # else the tower is whole, or this test would wait for ever
        mesh = init_device_mesh("cpu", (2,))
        for block in model.vision.blocks:  # type: ignore[attr-defined]
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.unshard()  # type: ignore[operator]
        assert fingerprint(model.vision, "") == name  # type: ignore[arg-type]
    store, calls = with_store(model, Path(folder)), []

    def compute(pictures: Tensor) -> Tensor:
        calls.append(len(pictures))
        return model._tokens(pictures)

    results = [torch.equal(store(mine, compute), expected) for _ in range(2)]
    return {"equal": all(results), "calls": calls}


@pytest.mark.slow
def test_ranks_that_share_a_towers_weights_run_it_together_or_not_at_all(tmp_path: Path) -> None:
    """The twin: a tower that is whole on each rank, which the other need not wait for."""
    assert run_ranks(sharded_ranks, 2, str(tmp_path / "one"), True) == [{"equal": True, "calls": [2]}] * 2
    apart = run_ranks(sharded_ranks, 2, str(tmp_path / "two"), False)
    assert apart == [{"equal": True, "calls": []}, {"equal": True, "calls": [2]}]
