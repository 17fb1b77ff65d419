"""The openmoji dataset: 4,000 true pairs, nothing of val in train, the same bytes every time."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm_train.data.openmoji import Drawing, caption_of, choose, find_drawings, import_openmoji
from vlm_train.errors import DataError


def read_split(folder: Path) -> list[dict]:
    samples: dict[str, dict] = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, part = member.name.split(".", 1)
                samples.setdefault(key, {"key": key})[part] = tar.extractfile(member).read()
    for sample in samples.values():
        sample["json"] = json.loads(sample["json"])
    return list(samples.values())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "openmoji"
    seen: list[tuple[int, int]] = []
    summary = import_openmoji(out, num_workers=2, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == len(seen)
    return out, summary, read_split(out / "train"), read_split(out / "val")


def test_exactly_4000_samples(dataset):
    _, summary, train, val = dataset
    assert summary.num_samples == {"train": len(train), "val": len(val)}
    assert len(train) + len(val) == 4000
    # measured 425; the hash of about 3,780 groups of equal drawings at 10 %
    assert 350 <= len(val) <= 450


def test_captions_are_distinct_and_agree(dataset):
    _, _, train, val = dataset
    captions = [sample["txt"].decode() for sample in train + val]
    assert len(set(captions)) == 4000
    assert all(sample["json"]["captions"] == [sample["txt"].decode()] for sample in train + val)
    assert not any("_" in caption or caption != caption.strip() or "  " in caption for caption in captions)


def test_no_caption_and_no_picture_of_val_is_in_train(dataset):
    _, _, train, val = dataset
    for part in ("txt", "png"):
        assert not {sample[part] for sample in train} & {sample[part] for sample in val}
    # the twin: a split by the hash of the bare caption tears equal drawings apart
    fraction = [(int(hashlib.sha256(s["txt"]).hexdigest()[:16], 16) / 2**64, s["png"]) for s in train + val]
    assert {png for f, png in fraction if f < 0.1} & {png for f, png in fraction if f >= 0.1}


def test_unseen_base_says_whether_a_sibling_was_trained_on(dataset):
    _, summary, train, val = dataset
    trained = {sample["json"]["base"] for sample in train}
    assert all(sample["json"]["unseen_base"] == (sample["json"]["base"] not in trained) for sample in val)
    num_unseen = sum(sample["json"]["unseen_base"] for sample in val)
    assert num_unseen == summary.facts["num_val_with_unseen_base"]
    assert 0 < num_unseen < len(val)


def test_a_skin_tone_that_is_not_drawn_is_not_claimed(dataset):
    _, _, train, val = dataset
    picture = {sample["txt"].decode(): sample["png"] for sample in train + val}
    base = {sample["txt"].decode(): sample["json"]["base"] for sample in train + val}
    toned = [caption for caption in picture if "skin tone" in caption and base[caption] in picture]
    assert len(toned) > 1500
    assert all(picture[caption] != picture[base[caption]] for caption in toned if caption != base[caption])


def test_pictures_are_rgb_on_white_and_not_blank(dataset):
    _, _, train, val = dataset
    for sample in (train + val)[::37]:
        image = Image.open(io.BytesIO(sample["png"]))
        pixels = np.asarray(image)
        assert (image.mode, image.size) == ("RGB", (72, 72))
        assert (pixels[0, 0] == 255).all()
        assert pixels.std() > 5


def test_same_drawing_lists_the_other_captions_of_equal_pictures(dataset):
    _, _, train, val = dataset
    by_picture: dict[bytes, set[str]] = {}
    for sample in train + val:
        by_picture.setdefault(sample["png"], set()).add(sample["txt"].decode())
    for sample in train + val:
        assert set(sample["json"]["same_drawing"]) == by_picture[sample["png"]] - {sample["txt"].decode()}


def test_classes_and_labels(dataset):
    out, summary, train, val = dataset
    classes = json.loads((out / "classes.json").read_text())
    assert classes["name"] == "categories"
    assert all("{}" in template for template in classes["templates"])
    labelled = [sample["json"] for sample in train + val if "label" in sample["json"]]
    assert all(classes["classes"][row["label"]] == row["category"] for row in labelled)
    assert {row["label"] for row in labelled} == set(range(len(classes["classes"])))
    assert 4000 - len(labelled) == summary.facts["num_without_category"] < 40
    by_caption = {row["captions"][0]: row["category"] for row in labelled}
    assert by_caption["flag: France"] == "Flags"
    assert by_caption["waving hand: light skin tone"] == "People & Body"


def test_attribution_travels_with_the_data(dataset):
    out, _, train, _ = dataset
    text = (out / "ATTRIBUTION.md").read_text()
    assert "OpenMoji" in text and "CC BY-SA 4.0" in text and "creativecommons.org/licenses/by-sa/4.0" in text
    assert {(sample["json"]["source"], sample["json"]["license"]) for sample in train} == {("openmoji", "CC BY-SA 4.0")}


def test_another_run_gives_the_same_bytes_and_another_size_does_not(dataset, tmp_path):
    out, _, _, _ = dataset
    import_openmoji(tmp_path / "again", num_workers=1)
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert names == sorted(
        str(p.relative_to(tmp_path / "again")) for p in (tmp_path / "again").rglob("*") if p.is_file()
    )
    assert all((out / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)
    assert import_openmoji(out).already_there
    with pytest.raises(DataError, match="other parameters"):
        import_openmoji(out, size=64)


@pytest.mark.parametrize(
    ("name", "caption", "base"),
    [
        ("waving_hand_light_skin_tone", "waving hand: light skin tone", "waving hand"),
        (
            "handshake_dark_skin_tone_medium-light_skin_tone",
            "handshake: dark skin tone, medium-light skin tone",
            "handshake",
        ),
        ("man_medium_skin_tone_bald", "man: medium skin tone, bald", "man: bald"),
        ("woman_red_hair", "woman: red hair", "woman: red hair"),
        ("family_man_woman_boy", "family: man, woman, boy", "family: man, woman, boy"),
        ("kiss_woman_man_dark_skin_tone", "kiss: woman, man, dark skin tone", "kiss: woman, man"),
        ("medium-dark_skin_tone", "medium-dark skin tone", "medium-dark skin tone"),
        ("keycap_#", "keycap: #", "keycap: #"),
        ("one_o\u2019clock", "one o'clock", "one o'clock"),
    ],
)
def test_captions_read_like_words(name, caption, base):
    assert caption_of(name, "x") == (caption, base)


def test_a_flag_is_called_a_flag():
    assert caption_of("France", "\U0001f1eb\U0001f1f7") == ("flag: France", "flag: France")


def test_too_few_drawings_is_an_error_with_a_remedy():
    drawings: list[Drawing] = find_drawings()[:100]
    with pytest.raises(DataError) as caught:
        choose(drawings, {drawing.caption: drawing.caption.encode() for drawing in drawings})
    assert caught.value.got == 100
    assert "pip install" in caught.value.remedy
