"""ARO's files become questions about the part of the picture that is asked about; bad rows cost themselves alone."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_train.data.aro import import_aro
from vlm_train.data.sources.shards import ShardSource
from vlm_train.errors import DataError
from vlm_train.evaluation.composition import pairs_of

PIXELS = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
RELATION = {
    "image_id": "1", "image_path": "1.png", "bbox_x": 4, "bbox_y": 2, "bbox_w": 10, "bbox_h": 5,
    "true_caption": "the cat is on the mat", "false_caption": "the mat is on the cat", "relation_name": "on",
}  # fmt: skip
ATTRIBUTE = {key: value for key, value in RELATION.items() if key != "relation_name"} | {"attributes": ["old", "red"]}


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    Image.fromarray(PIXELS).save(tmp_path / "images" / "1.png")
    return tmp_path / "images"


def imported(images, rows):
    (images.parent / "questions.json").write_text(json.dumps(rows))
    done = import_aro(images.parent / "questions.json", images, images.parent / "out")
    source = ShardSource(shards=str(images.parent / "out" / "val"))
    return done, source.read(np.arange(len(source)))


def test_a_question_is_a_sample_with_its_part_of_the_picture(images):
    beyond = RELATION | {"bbox_x": -3, "bbox_w": 100}
    done, samples = imported(images, [RELATION, ATTRIBUTE, beyond])
    assert done.num_samples == {"val": 3} and done.num_errors == 0
    cut = [np.asarray(Image.open(io.BytesIO(sample.parts["png"]))) for sample in samples]
    assert np.array_equal(cut[0], PIXELS[2:7, 4:14]) and np.array_equal(cut[2], PIXELS[2:7])
    truths = [json.loads(sample.parts["json"]) for sample in samples]
    assert [truth["contrasts"][0]["type"] for truth in truths] == ["on", "old and red", "on"]
    (pair,) = pairs_of(truths[0], truths[0]["captions"])
    assert (pair.true, pair.false) == (RELATION["true_caption"], RELATION["false_caption"]) and not pair.held_out


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (RELATION | {"image_path": "2.png"}, "no_image"),
        (RELATION | {"image_path": "../1.png"}, "outside_folder"),
        (RELATION | {"true_caption": None}, "bad_row"),
        (RELATION | {"false_caption": "\ud800"}, "caption_utf8"),
        (RELATION | {"bbox_w": 0}, "bad_row"),
        (RELATION | {"bbox_x": 99}, "bad_row"),
        (RELATION | {"bbox_x": float("nan")}, "bad_row"),
        (RELATION | {"bbox_h": "5"}, "bad_row"),
        (5, "bad_row"),
    ],
)
def test_a_bad_row_costs_itself_alone(images, row, reason):
    done, samples = imported(images, [RELATION, row])
    assert done.facts["errors"] == {reason: 1} and len(samples) == 1


@pytest.mark.parametrize("document", [{}, [], [5], 5, {"images": []}, [{"image_path": "1.png"}]])
def test_a_file_of_something_else_is_an_error(images, document):
    with pytest.raises(DataError, match="not a file of ARO"):
        imported(images, document)


VALUES = (
    st.none() | st.integers() | st.floats() | st.sampled_from(["1.png", "on", "\0", "\ud800", ""]) | st.lists(st.none())
)


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(st.sampled_from([*RELATION, "attributes"]), VALUES))
def test_any_row_gives_a_sample_or_a_reason(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("aro") / "images"
    folder.mkdir()
    Image.fromarray(PIXELS).save(folder / "1.png")
    done, samples = imported(folder, [RELATION, RELATION | changes])
    assert len(samples) + done.num_errors == 2
