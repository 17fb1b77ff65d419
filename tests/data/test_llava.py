"""LLaVA's files become samples with the images that they speak of; a bad row costs itself alone."""

from __future__ import annotations

import itertools
import json
import os

import numpy as np
import pytest
import several_images as toys
from data_fixtures import encoded, pixels
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.cli.main import main
from vlm_train.data.decode import SampleError
from vlm_train.data.llava import import_llava
from vlm_train.data.sources.shards import ShardSource
from vlm_train.errors import DataError

IMAGES = {"coco/a.jpg": encoded(pixels(1)), "coco/b.png": encoded(pixels(2), "PNG"), "c.jpg": encoded(pixels(3))}


def said(*texts):
    """A dialogue in LLaVA's own words, by turns."""
    return [{"from": side, "value": text} for side, text in zip(itertools.cycle(["human", "gpt"]), texts, strict=False)]


ONE = {"id": "000001", "image": "coco/a.jpg", "conversations": said("<image>\nWhat?", "A star.", "Red?", "Yes.")}
TWO = {"id": "2", "image": ["c.jpg", "coco/b.png"], "conversations": said("<image> or <image>?", "The first.")}
NONE = {"id": 3, "conversations": said("Who are you?", " Nobody. ")}


@pytest.fixture
def images(tmp_path):
    for name, content in IMAGES.items():
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "outside.jpg").write_bytes(IMAGES["c.jpg"])
    return tmp_path / "images"


def imported(images, rows, **options):
    content = rows if isinstance(rows, bytes) else json.dumps(rows).encode()
    (images.parent / "dialogues.json").write_bytes(content)
    return import_llava(images.parent / "dialogues.json", images, images.parent / "out", **options)


def samples_of(images, split="train"):
    source = ShardSource(shards=str(images.parent / "out" / split))
    assert source.manifest.num_errors == 0  # whatever was imported can be used
    return source.read(np.arange(len(source)))


def reasons(images):
    lines = (images.parent / "out" / "import_errors.jsonl").read_text().splitlines()
    return [json.loads(line)["reason"] for line in lines]


def test_a_dialogue_is_a_sample_with_its_images(images):
    done = imported(images, [ONE, TWO, NONE])
    assert done.num_samples == {"train": 3} and done.num_errors == 0
    one, two, none = samples_of(images)
    facts = [json.loads(sample.parts.pop("json")) for sample in (one, two, none)]
    assert one.parts == {"jpg": IMAGES["coco/a.jpg"], "txt": b"A star."}
    assert two.parts == {"0.jpg": IMAGES["c.jpg"], "1.png": IMAGES["coco/b.png"], "txt": b"The first."}
    assert none.parts == {"txt": b"Nobody."}
    assert facts[0] == {
        "captions": ["A star."],
        "id": "000001",
        "source": "llava",
        "conversations": [
            {"role": "user", "content": "<image>\nWhat?"},
            {"role": "assistant", "content": "A star."},
            {"role": "user", "content": "Red?"},
            {"role": "assistant", "content": "Yes."},
        ],
        "files": ["coco/a.jpg"],
    }
    assert [fact.get("files") for fact in facts[1:]] == [["c.jpg", "coco/b.png"], None]
    assert [fact["id"] for fact in facts] == ["000001", "2", 3]


def test_what_is_imported_is_learned_and_captions_are_too(images):
    imported(images, [ONE, TWO, NONE])
    samples = samples_of(images)
    batch = toys.batch_of(toys.encoder(toys.dialogues()), samples)
    assert batch["num_images"].tolist() == [1, 2, 0] and batch["captions"] == ["A star.", "The first.", "Nobody."]
    captioned = toys.batch_of(toys.encoder(None), samples[:2])
    assert captioned["captions"] == ["A star.", "The first."]
    with pytest.raises(SampleError, match="no_image"):
        toys.batch_of(toys.encoder(None), samples[2:])


BAD = [
    (ONE | {"image": "gone.jpg"}, "no_image"),
    (ONE | {"image": "../outside.jpg"}, "outside_folder"),
    (ONE | {"image": "coco/../../outside.jpg"}, "outside_folder"),
    (ONE | {"image": "/etc/hostname"}, "outside_folder"),
    (TWO | {"image": ["c.jpg", "../outside.jpg"]}, "outside_folder"),
    (TWO | {"image": ["c.jpg", 5]}, "bad_row"),
    (TWO | {"image": ["c.jpg", ""]}, "bad_row"),
    (ONE | {"image": 5}, "bad_row"),
    (ONE | {"image": "a\0.jpg"}, "bad_row"),
    (ONE | {"image": "\ud800.jpg"}, "bad_row"),
    (ONE | {"image": "coco"}, "unreadable"),
    (ONE | {"image": "notes.txt"}, "image_unknown"),
    (ONE | {"image": None}, "dialogue_image_count"),
    (NONE | {"image": "c.jpg"}, "dialogue_image_count"),
    (TWO | {"image": ["c.jpg"]}, "dialogue_image_count"),
    (ONE | {"conversations": said("<image>", "")}, "dialogue_no_label"),
    (ONE | {"conversations": said("<image>")}, "dialogue_no_label"),
    (ONE | {"conversations": []}, "dialogue_roles"),
    (ONE | {"conversations": [5]}, "dialogue_roles"),
    (ONE | {"conversations": [{"from": "cat", "value": "<image>"}]}, "dialogue_roles"),
    (ONE | {"conversations": said("<image>", 5)}, "dialogue_text"),
    (ONE | {"conversations": said("<image>", "\ud800")}, "dialogue_text"),
    (ONE | {"conversations": said("<image>", "x" * 2_000_000)}, "dialogue_too_long"),
    (ONE | {"conversations": {}}, "bad_row"),
    ({"id": 1}, "bad_row"),
    ("hello", "bad_row"),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=range(len(BAD)))
def test_a_bad_row_costs_itself_and_says_why(images, row, reason):
    (images / "notes.txt").write_text("no image")
    done = imported(images, [ONE, row, NONE])
    assert done.num_samples == {"train": 2} and done.facts["errors"] == {reason: 1}
    assert reasons(images) == [reason]
    assert [json.loads(sample.parts["json"])["id"] for sample in samples_of(images)] == ["000001", 3]


def test_a_row_that_was_left_out_is_found_by_its_number(images):
    """Many dialogues are about one picture."""
    bad = [TWO | {"image": "coco/a.jpg", "conversations": said("<image>")}, {"conversations": said("x")}]
    imported(images, [ONE, "hello", *bad, ONE | {"image": "none.jpg"}])
    lines = (images.parent / "out" / "import_errors.jsonl").read_text().splitlines()
    named = {json.loads(line)["file"] for line in lines}
    assert named == {"dialogues 2", "dialogues 3: coco/a.jpg", "dialogues 4", "dialogues 5: none.jpg"}


def test_a_pipe_is_not_waited_for(images):
    os.mkfifo(images / "pipe.jpg")
    assert imported(images, [NONE, ONE | {"image": "pipe.jpg"}]).facts["errors"] == {"unreadable": 1}


def test_an_answer_that_nothing_was_asked_before_is_passed_over_as_llava_does(images):
    early = {"id": 1, "conversations": [{"from": "gpt", "value": "Hi."}, *said("Who?", "Me.")]}
    imported(images, [early])
    (sample,) = samples_of(images)
    assert json.loads(sample.parts["json"])["conversations"] == [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Me."},
    ]


@pytest.mark.parametrize("content", [b"", b"5", b"{}", b"[]", b"[1]", b"[" * 100_000, b'[{"id": 1}]'])
def test_a_file_of_another_kind_is_an_error(images, content):
    with pytest.raises(DataError, match="not a file of dialogues"):
        imported(images, content)
    assert not (images.parent / "out").exists()


def test_nothing_to_import_is_an_error_that_says_why(images):
    with pytest.raises(DataError, match="could be imported") as caught:
        imported(images, [ONE | {"image": "gone.jpg"}])
    assert caught.value.got == {"no_image": 1}


def test_a_finished_import_is_left_alone_and_a_changed_image_is_seen(images):
    first = imported(images, [ONE, TWO, NONE])
    again = imported(images, [ONE, TWO, NONE])
    assert again.already_there and again.num_samples == first.num_samples
    (images / "coco" / "b.png").write_bytes(encoded(pixels(9), "PNG"))  # the second image of a sample
    with pytest.raises(DataError, match="other parameters"):
        imported(images, [ONE, TWO, NONE])


def test_a_killed_import_is_made_anew(images, monkeypatch):
    def killed(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        imported(images, [ONE, TWO, NONE], max_samples=1, progress=killed)
    assert not (images.parent / "out" / "dataset.json").exists()
    done = imported(images, [ONE, TWO, NONE], max_samples=1)
    assert done.num_samples == {"train": 3} and not done.already_there


def test_equal_images_stay_on_one_side(images):
    rows = [row | {"id": number} for number, row in enumerate([ONE, TWO, NONE] * 4)]
    rows += [NONE | {"id": n, "conversations": said(f"{n}?", "Yes.")} for n in range(100, 140)]
    done = imported(images, rows, val_fraction=0.5)
    ids = {split: {json.loads(s.parts["json"])["id"] for s in samples_of(images, split)} for split in ("train", "val")}
    assert set(done.num_samples) == {"train", "val"} and sum(done.num_samples.values()) == 52
    for start in (0, 1):  # of ONE and of TWO
        assert len({split for split, found in ids.items() if found & set(range(start, 12, 3))}) == 1


texts = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(["<image>", "<image>\n<image>", "yes"])
values = st.none() | st.integers() | texts | st.lists(texts, max_size=3)
turns = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system", "x"]), "value": texts}) | values
rows = st.lists(
    st.fixed_dictionaries({}, optional={"id": values, "image": values | st.sampled_from(list(IMAGES)),
                                        "conversations": st.lists(turns, max_size=5)}) | values, max_size=4,
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(found=rows)
def test_whatever_a_file_holds_every_row_is_a_sample_that_trains_or_an_error(tmp_path_factory, found):
    folder = tmp_path_factory.mktemp("any")
    (folder / "images" / "coco").mkdir(parents=True)
    for name, content in IMAGES.items():
        (folder / "images" / name).write_bytes(content)
    done = imported(folder / "images", [ONE, *found])
    assert done.num_samples["train"] + done.num_errors == 1 + len(found)
    source = ShardSource(shards=str(folder / "out" / "train"))
    assert len(source) + source.manifest.num_errors == done.num_samples["train"]
    made = toys.encoder(toys.dialogues(max_images=20, context_length=4096))
    assert len(toys.batch_of(made, source.read(np.arange(len(source))))["keys"]) == len(source)


def test_the_command(images, capsys):
    (images.parent / "x.json").write_text(json.dumps([ONE, TWO, ONE | {"image": "gone.jpg"}]))
    words = ["data", "import", "llava", str(images.parent / "x.json"), str(images.parent / "out")]
    assert main(words) == 2 and "--images" in capsys.readouterr().err
    assert main([*words, "--images", str(images)]) == 0
    told = capsys.readouterr().out
    assert "train 2 samples" in told and "1 samples could not be imported (no_image 1)" in told
