"""Planted copies are what they are called, follow from seed and uids alone, and rules are judged as the words say."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_train.curation import calibration, calibration_curves
from vlm_train.curation.calibration import CONTROL, COPIES, NUM_OTHERS, OWN, SIDE, Planted, drawn, plant
from vlm_train.curation.calibration_curves import TRUE_COPIES, judged, measured, precision, read, recall, suggested
from vlm_train.curation.chain import Found, Work
from vlm_train.curation.engines import Local
from vlm_train.data.indexing import open_manifest
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.writer import DatasetWriter
from vlm_train.errors import DataError

NUM = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of several kinds in shards of 16: the last repeats the first with other words, two do not decode."""
    folder, contents = tmp_path_factory.mktemp("calibration"), []
    for number in range(NUM):
        random = np.random.default_rng(number)
        small = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        size = [(500, 420), (60, 90), (1, 1), (3, 200)][number] if number < 4 else (64, 48)
        contents.append(encoded(small.resize(size, Image.Resampling.BICUBIC)))
    contents[5] = encoded(Image.fromarray(np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 20))  # 16 bits
    contents[6], contents[7] = contents[6][:-50], contents[7][:-50]
    with DatasetWriter(folder / "all", parameters={}, max_samples=16) as writer:
        for number, content in enumerate([*contents, contents[0]]):
            writer.add("train", f"{number:03d}", {"png": content, "txt": f"sample {number}".encode()})
        writer.finish(num_errors=0, facts={})
    return folder / "all" / "train"


def encoded(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def test_the_draw_follows_uids_and_takes_each_picture_once(data: Path) -> None:
    shards = sorted(map(str, data.glob("*.tar")))
    forward, backward = open_manifest(shards), open_manifest(shards[::-1])
    rows = drawn(forward, 1000, seed=0)
    assert len(rows) == NUM and len(set(rows.tolist())) == NUM  # not the repeated one, either of the two
    uids = [forward.uids(rows[:9]).tolist(), backward.uids(drawn(backward, 9, seed=0)).tolist()]
    assert uids[0] == uids[1] and uids[0] != forward.uids(drawn(forward, 9, seed=1)).tolist()


def test_copies_are_what_they_are_called(data: Path, tmp_path: Path) -> None:
    found = plant(ShardSource(shards=str(data)), tmp_path, engine=Local(num_workers=1), num_samples=8, seed=3)
    assert found.num_unreadable == 2 and len(found.rows) == NUM
    own = found.kinds == OWN
    assert own.sum() == NUM - 2 and found.num_copied() == sum(found.origin[own] < 8)
    source = ShardSource(shards=found.manifest.shards)
    samples = source.read(np.arange(len(source)))
    pictures = [
        Image.open(io.BytesIO(content)) for sample in samples for name, content in sample.parts.items() if name != "txt"
    ]
    original = dict(zip(found.origin[own].tolist(), [pictures[row] for row in np.flatnonzero(own)], strict=True))
    assert max(max(picture.size) for picture in pictures) == SIDE
    assert {picture.mode for picture in pictures} == {"RGB"}
    for kind, number, picture in zip(found.kinds.tolist(), found.origin.tolist(), pictures, strict=True):
        size = original[number].size
        if kind == "resized":
            assert all(0.4 * side - 1 <= new <= 0.95 * side + 1 for new, side in zip(picture.size, size, strict=True))
        elif kind == "cropped":
            assert all(0.9 * side - 1 <= new <= side for new, side in zip(picture.size, size, strict=True))
        else:
            assert picture.size == size
        if kind == CONTROL:
            assert np.array_equal(np.asarray(picture)[:, ::-1], np.asarray(original[number]))
        if kind == "covered" and min(size) >= 40:
            share = (np.asarray(picture) != np.asarray(original[number])).any(axis=2).mean()
            assert 0.08 <= share <= 0.12
        assert (picture.format == "JPEG") == (kind == "recompressed")


def test_workers_and_the_order_of_shards_change_nothing_that_is_planted(data: Path, tmp_path: Path) -> None:
    shards, planted = sorted(map(str, data.glob("*.tar"))), []
    for number, (order, workers) in enumerate(((shards, 1), (shards[::-1], 2))):
        folder = tmp_path / str(number)
        plant(ShardSource(shards=order), folder, engine=Local(num_workers=workers), num_samples=3, seed=0)
        planted.append({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.tar")})
    assert planted[0] == planted[1] and planted[0]
    plant(ShardSource(shards=shards), tmp_path / "other", engine=Local(num_workers=1), num_samples=3, seed=1)
    assert (tmp_path / "other" / "00000" / "00000.tar").read_bytes() not in planted[0].values()  # the twin


def test_the_numbers_beside_the_copied_ones_are_bounded(data: Path, tmp_path: Path) -> None:
    found = plant(ShardSource(shards=str(data)), tmp_path, engine=Local(num_workers=1), num_samples=2, seed=0)
    assert len(found.rows) == 2 * (1 + NUM_OTHERS)


def test_data_without_a_picture_that_decodes_is_refused(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "bad", parameters={}) as writer:
        writer.add("train", "a", {"png": encoded(Image.new("RGB", (90, 90)))[:-40], "txt": b"x"})
        writer.finish(num_errors=0, facts={})
    with pytest.raises(DataError, match="no picture to copy"):
        plant(ShardSource(shards=str(tmp_path / "bad" / "train")), tmp_path / "x", engine=Local(num_workers=1),
              num_samples=2, seed=0)  # fmt: skip


def set_of(num: int) -> Planted:
    """`num` own pictures, of which each is copied by each kind: row = kind * num + number."""
    kinds = np.repeat([OWN, *COPIES], num)
    manifest: Any = SimpleNamespace(uids=lambda: None)
    return Planted(manifest, np.tile(np.arange(num), len(kinds) // num), kinds, np.arange(num) + 100, 0)


def test_what_a_rule_says_is_found_wrong_through_own_or_missed() -> None:
    planted, num = set_of(6), 6
    copies = num * (1 + list(COPIES).index("cropped"))
    kept = np.arange(len(planted.kinds))
    kept[copies + 0] = 0  # found
    kept[1] = copies + 1  # found: the copy is kept and its own goes
    kept[copies + 2] = 0  # wrong: its own stays for itself
    kept[3], kept[copies + 3] = 0, 0  # through own
    kept[4] = 0  # its own goes for another, it stays: missed
    assert judged(planted, "cropped", kept) == {"found": 2, "wrong": 1, "through_own": 1}
    assert judged(planted, "resized", kept) == {"found": 0, "wrong": 0, "through_own": 0}


@dataclass(frozen=True)
class Rule:
    """Takes rows for copies as `pairs` of planted rows and the kept one say, of those it is given."""

    pairs: Mapping[int, int]

    def settings(self, work: Any) -> dict[str, Any]:
        return {"radius": 1, "other": "x"}

    def find(self, manifest: Any, among: np.ndarray, work: Any) -> Found:
        rows = np.array([row for row, like in self.pairs.items() if among[row] and among[like]], np.int64)
        like = np.array([self.pairs[row] for row in rows.tolist()], np.int64)
        return Found(rows, np.full(len(rows), "r"), like, rows.astype(np.float64))


WORK: Any = SimpleNamespace(ticking=lambda noun: lambda done, num: None)


def test_a_rule_that_takes_all_for_one_is_never_suggested() -> None:
    planted, num = set_of(50), 50
    right = {kind * num + number: number for kind in range(1, 5) for number in range(num) if number % 2}
    everything = dict.fromkeys(range(1, len(planted.kinds)), 0)
    work: Work = WORK
    rule = measured(planted, "near", "radius", {1.0: Rule(right), 2.0: Rule(everything)}, work=work)
    fine, coarse = rule["points"]
    assert (recall(fine, num), precision(fine)) == (0.5, 1.0) and fine["num_own_dropped"] == 0
    assert recall(coarse, num) == 1 / num and coarse["num_own_dropped"] == num - 1
    assert suggested(rule, num, 0.99) == 1.0
    # the twin: who counts what goes through own pictures as found would suggest it
    for kind in TRUE_COPIES:
        coarse["kinds"][kind]["found"] += coarse["kinds"][kind]["through_own"]
    assert suggested(rule, num, 0.99) == 2.0
    assert rule["settings"] == {"other": "x"}
    assert [pair["threshold"] for pair in rule["own_pairs"]] == [2.0] * calibration_curves.PAIRS_SHOWN
    assert rule["own_pairs"][0] == {"threshold": 2.0, "value": 1.0, "row": 101, "like": 100}


def test_the_suggestion_is_the_largest_recall_at_the_precision_or_none() -> None:
    def point(threshold: float, found: int, wrong: int) -> dict[str, Any]:
        each = {"found": found, "wrong": wrong, "through_own": 0}
        return {"threshold": threshold, "kinds": dict.fromkeys(COPIES, each), "num_own_dropped": 0}

    rule = {"points": [point(0, 0, 0), point(1, 90, 0), point(2, 95, 1), point(3, 95, 0), point(4, 99, 2)]}
    assert suggested(rule, 100, 0.99) == 3 and suggested(rule, 100, 0.985) == 2 and suggested(rule, 100, 0.5) == 4
    assert suggested({"points": [point(0, 0, 0), point(1, 5, 5)]}, 100, 0.99) is None
    assert precision(point(0, 0, 0)) is None


def test_a_damaged_calibration_is_refused(tmp_path: Path) -> None:
    planted: Any = set_of(3)
    rule = measured(planted, "near", "radius", {1.0: Rule({4: 1})}, work=WORK)
    content = calibration_curves.save(tmp_path, planted, [rule], manifest="ab", seed=0, target=0.9)
    assert read(tmp_path) == json.loads(json.dumps(content))
    path = tmp_path / calibration_curves.FILE
    whole = path.read_text()
    for text in (
        "",
        "[]",
        whole[:-40],
        whole.replace('"found"', '"fond"'),
        whole.replace('"version": 1', '"version": 9'),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match="cannot be read"):
            read(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "nowhere")


def test_makers_take_the_smallest_pictures() -> None:
    for size in ((1, 1), (1, 300), (300, 1), (2, 3)):
        for make in COPIES.values():
            content = make(Image.new("RGB", size, (9, 8, 7)), np.random.default_rng(0))
            assert min(Image.open(io.BytesIO(content)).size) >= 1
    assert calibration.png(Image.new("RGB", (1, 1)))[:4] == b"\x89PNG"
