"""The dataset of scenes: pure, the same bytes from any number of processes, and honest about damage."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scene_reader import make, says

from vlm_train.data.scenes import make_scenes
from vlm_train.data.scenes.make import Variant, make_sample
from vlm_train.errors import ConfigError


@settings(max_examples=10, deadline=None)
@given(index=st.integers(0, 2**40), seed=st.integers(0, 2**40), size=st.sampled_from([32, 64, 97, 224]))
def test_a_sample_is_a_pure_function_of_its_arguments(index, seed, size):
    one, two = (make_sample(index, seed=seed, size=size) for _ in range(2))
    assert one == two
    assert one != make_sample(index + 1, seed=seed, size=size)
    image, truth, _ = make(index, seed, size)
    assert image.shape == (size, size, 3)
    assert all(0 <= row["box"][0] < row["box"][2] <= size for row in truth["regions"])
    assert all(0 <= row["box"][1] < row["box"][3] <= size for row in truth["regions"])


def parts_of(directory: Path) -> dict[str, bytes]:
    found = {}
    for shard in sorted(directory.glob("*/*.tar")):
        with tarfile.open(shard) as tar:
            found |= {f"{shard.parent.name}/{member.name}": tar.extractfile(member).read() for member in tar}
    return found


def test_a_longer_dataset_begins_with_the_shorter_one(tmp_path):
    short = make_scenes(tmp_path / "short", num_samples=150, seed=3, num_workers=1)
    long = make_scenes(tmp_path / "long", num_samples=400, seed=3, num_workers=2)
    other = make_scenes(tmp_path / "other", num_samples=150, seed=4, num_workers=1)
    assert sum(short.num_samples.values()) == 150 and sum(long.num_samples.values()) == 400
    assert 20 <= long.num_samples["val"] <= 60
    assert parts_of(tmp_path / "short").items() <= parts_of(tmp_path / "long").items()
    assert not parts_of(tmp_path / "other").items() <= parts_of(tmp_path / "long").items()
    assert sum(other.num_samples.values()) == 150


def test_any_number_of_processes_writes_the_same_bytes(tmp_path):
    for workers in (1, 2):
        make_scenes(tmp_path / str(workers), num_samples=200, num_workers=workers)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name / "train").iterdir()} for name in ("1", "2"))
    assert one == two
    assert make_scenes(tmp_path / "1", num_samples=200).already_there


@pytest.mark.parametrize("kind", ["count", "order"])
def test_a_type_that_is_held_out_is_no_negative(tmp_path, kind):
    """Not even where another type gives the same false caption, as relation and order do."""
    num_same = 0
    for index in range(60):
        whole = make_sample(index, seed=0, size=32)[1]
        part = make_sample(index, seed=0, size=32, variant=Variant(hold_out=kind))[1]
        assert whole["png"] == part["png"]
        first, second = json.loads(whole["json"]), json.loads(part["json"])
        false = [row["false"] for row in first["contrasts"] if row["type"] == kind]
        assert second["negatives"] == [text for text in first["negatives"] if text not in false]
        rest = {"negatives": [], "captions": []}
        assert {**first, **rest} == {**second, **rest}
        twins = [row["true"] for row in first["contrasts"] if row["false"] in second["negatives"]]
        assert set(second["captions"]) <= set(twins) or second["captions"] == first["captions"]
        assert part["txt"].decode() == second["captions"][0]
        num_same += len(first["negatives"]) - len(second["negatives"]) - len(false)
    assert (num_same > 0) == (kind == "order")
    with pytest.raises(ConfigError, match="no such type"):
        make_scenes(tmp_path / "out", num_samples=1, variant=Variant(hold_out="colour"))


def test_corruption_is_written_down():
    damaged: Counter[str] = Counter()
    for index in range(400):
        image, truth, text = make(index, blur=0.2, noise=0.2, occlusion=0.2, caption_mismatch=0.2)
        clean_image, clean, _ = make(index)
        record = truth.get("corruption", {"kind": "none"})
        damaged[record["kind"]] += 1
        assert (image != clean_image).any() == (record["kind"] in ("blur", "noise", "occlusion"))
        assert truth["regions"] == clean["regions"] and truth["negatives"] == clean["negatives"]
        if record["kind"] == "caption_mismatch":
            assert record["true_captions"] == clean["captions"]
            assert text == truth["captions"][0]
            assert all(says(caption, truth) is False for caption in truth["captions"])
        else:
            assert truth["captions"] == clean["captions"]
        if record["kind"] == "occlusion":
            x0, y0, x1, y1 = record["box"]
            outside = np.ones((64, 64), bool)
            outside[y0:y1, x0:x1] = False
            assert (image[y0:y1, x0:x1] == 128).all() and (image[outside] == clean_image[outside]).all()
    assert set(damaged) == {"none", "blur", "noise", "occlusion", "caption_mismatch"}
    assert all(50 <= num <= 110 for num in damaged.values())  # 80 each expected, standard deviation 8


@pytest.mark.parametrize("corruption", [{"blurry": 0.1}, {"blur": -0.1}, {"blur": 0.6, "noise": 0.6}])
def test_impossible_corruption_is_refused(tmp_path, corruption):
    with pytest.raises(ConfigError):
        make_scenes(tmp_path / "out", num_samples=1, variant=Variant(corruption=corruption))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [{"num_samples": 0}, {"size": 16}, {"val_fraction": 1}])
def test_impossible_arguments_are_refused(tmp_path, arguments):
    with pytest.raises(ConfigError, match="cannot be made"):
        make_scenes(tmp_path, **{"num_samples": 1, **arguments})
