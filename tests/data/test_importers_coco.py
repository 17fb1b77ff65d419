"""A row of an annotation file that cannot be used costs itself alone, and what cannot be imported at all is said."""

from __future__ import annotations

import json
import os

import pytest
from data_fixtures import encoded, pixels
from hypothesis import given, settings
from hypothesis import strategies as st
from promptly import promptly

from vlm_train.data.importers import import_coco, import_folder
from vlm_train.data.sources.shards import ShardSource
from vlm_train.errors import DataError

IMAGE = {"id": 1, "file_name": "a.jpg"}
CAPTION = {"image_id": 1, "caption": "x"}
PICTURE = {"filename": "a.jpg", "split": "train", "sentences": [{"raw": "x"}]}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(encoded(pixels(1)))
    return folder


def reasons(images, document, **options):
    """{reason: count} of an import that brings one image with the caption `x`."""
    content = document if isinstance(document, bytes) else json.dumps(document).encode()
    (images.parent / "coco.json").write_bytes(content)
    out = images.parent / "out"
    done = import_coco(images.parent / "coco.json", images, out, **options)
    (sample,) = ShardSource(shards=str(out / "train")).read([0])
    assert done.num_samples == {"train": 1} and sample.parts["txt"] == b"x"
    errors = [json.loads(line) for line in (out / "import_errors.jsonl").read_text().splitlines()]
    assert done.num_errors == len(errors)
    return done.facts["errors"]


def official(*images, annotations=(), **more):
    return {"images": [IMAGE, *images], "annotations": [CAPTION, *annotations], **more}


OFFICIAL = [
    (official(annotations=[{"image_id": 1, "caption": None}]), {"bad_row": 1}),
    (official(annotations=[{"image_id": 1}, 5, None, {"caption": "y"}]), {"bad_row": 4}),
    (official(annotations=[{"image_id": [1], "caption": "y"}, {"image_id": True, "caption": "y"}]), {"bad_row": 2}),
    (official(annotations=[{"image_id": 1, "caption": "\ud800"}]), {"caption_utf8": 1}),
    (official({"id": 2, "file_name": 5}), {"bad_row": 1}),
    (official({"id": [2], "file_name": "b.jpg"}, "b.jpg", {"id": 2}), {"bad_row": 3}),
    (official({"id": 2, "file_name": "a\0.jpg"}), {"bad_row": 1}),
    (official({"id": 2, "file_name": "\ud800.jpg"}), {"bad_row": 1}),
    (official({"id": 2, "file_name": "b.jpg", "license": []}), {"bad_row": 1}),
    (official({"id": 2, "file_name": "b.jpg", "coco_url": {}}), {"bad_row": 1}),
    (official({"id": 1, "file_name": "b.jpg"}), {"bad_row": 1}),
    (official({"id": 2, "file_name": "c" * 300}, annotations=[{"image_id": 2, "caption": "y"}]), {"no_image": 1}),
    (official({"id": 2, "file_name": "../a"}, annotations=[{"image_id": 2, "caption": "y"}]), {"outside_folder": 1}),
    (official(licenses=None), {}),
    (official(licenses=[5, {"id": 1}, {"id": 1, "name": "free"}]), {"bad_row": 2}),
    (json.dumps(official(annotations=[{"image_id": 1, "caption": "@"}])).replace("@", "\xff").encode("latin-1"),
     {"caption_utf8": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("document", "expected"), OFFICIAL, ids=range(len(OFFICIAL)))
def test_a_bad_row_of_an_official_file(images, document, expected):
    assert reasons(images, document) == expected


KARPATHY = [
    ({**PICTURE, "sentences": [{"raw": None}, {}, 5]}, {"bad_row": 3, "no_caption": 1}),
    ({**PICTURE, "sentences": None}, {"bad_row": 1}),
    ({**PICTURE, "sentences": [{"raw": "\ud800"}]}, {"caption_utf8": 1, "no_caption": 1}),
    ({**PICTURE, "split": ["train"]}, {"bad_row": 1}),
    ({**PICTURE, "split": "dev\ud800"}, {"unknown_split": 1}),
    ({**PICTURE, "filename": 5}, {"bad_row": 1}),
    ({**PICTURE, "filename": ""}, {"bad_row": 1}),
    ({**PICTURE, "filename": "a\0.jpg"}, {"bad_row": 1}),
    ({**PICTURE, "filepath": "\0"}, {"bad_row": 1}),
    ({**PICTURE, "filename": "c" * 300}, {"no_image": 1}),
    ({**PICTURE, "cocoid": {}}, {"bad_row": 1}),
    (7, {"bad_row": 1}),
]


@pytest.mark.parametrize(("row", "expected"), KARPATHY, ids=range(len(KARPATHY)))
def test_a_bad_row_of_karpathys_file(images, row, expected):
    assert reasons(images, {"images": [PICTURE, row], "dataset": ["no name"]}) == expected


def test_fields_with_half_a_surrogate_pair_are_kept(images):
    image = {**IMAGE, "coco_url": "http://\ud800", "license": "l"}
    assert (
        reasons(images, {"images": [image], "annotations": [CAPTION], "licenses": [{"id": "l", "name": "\udfff"}]})
        == {}
    )
    (sample,) = ShardSource(shards=str(images.parent / "out" / "train")).read([0])
    metadata = json.loads(sample.parts["json"])
    assert (metadata["url"], metadata["license"]) == ("http://\ud800", "\udfff")


NOT_COCO = ["[" * 100_000, "[1]", "5", "", '{"images": 5}', '{"images": [1]}', '{"images": [], "annotations": []}']
NOT_COCO += [json.dumps({"images": [IMAGE]}), json.dumps({"images": [IMAGE], "annotations": {}})]


@pytest.mark.parametrize("content", NOT_COCO, ids=range(len(NOT_COCO)))
def test_a_file_of_another_kind_is_an_error(tmp_path, images, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match="not a COCO caption file"):
        import_coco(tmp_path / "x.json", images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_file_is_not_waited_for(tmp_path, images):
    os.mkfifo(tmp_path / "pipe.json")
    for path in ("pipe.json", "images"):
        with promptly(), pytest.raises(DataError, match="not a COCO caption file"):
            import_coco(tmp_path / path, images, tmp_path / "out")
    with pytest.raises(DataError, match="no such image folder"):
        import_coco(tmp_path / "pipe.json", images / "a.jpg", tmp_path / "out")
    with pytest.raises(DataError, match="no such folder"):
        import_folder(images / "a.jpg", tmp_path / "out")


@pytest.mark.parametrize("split", ["..", "a/b", "", ".unfinished", "dataset.json"])
def test_a_split_is_a_plain_name(images, split):
    with pytest.raises(DataError, match="cannot be the name of a folder"):
        reasons(images, official(), split=split)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_share_is_from_0_to_1(tmp_path, images, fraction):
    with pytest.raises(DataError, match="a share of the images"):
        import_folder(images, tmp_path / "out", val_fraction=fraction)


values = st.recursive(
    st.none() | st.booleans() | st.integers(0, 3) | st.sampled_from(["a.jpg", "train", "x", "\0", "\ud800", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [*IMAGE, *CAPTION, *PICTURE, "raw", "images", "annotations", "licenses", "license", "name"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=200)
@given(
    document=st.fixed_dictionaries(
        {"images": st.lists(values | st.just(IMAGE) | st.just(PICTURE), max_size=3)},
        optional={"annotations": st.lists(values | st.just(CAPTION), max_size=3), "licenses": values},
    )
)
def test_any_document_gives_records_failures_or_an_error(tmp_path_factory, document):
    folder = tmp_path_factory.mktemp("coco")
    (folder / "a.jpg").write_bytes(encoded(pixels(1)))
    (folder / "coco.json").write_text(json.dumps(document))
    try:
        done = import_coco(folder / "coco.json", folder, folder / "out")
    except DataError:
        return
    assert sum(done.num_samples.values()) >= 1


def test_flickr30k_as_karpathy_split_it(tmp_path, images, capsys):
    """No `filepath`, no `cocoid`; five captions are kept; an image that is not there is told, and why."""
    from vlm_train.cli.main import main

    rows = [
        {"sentids": [5 * n + k for k in range(5)], "imgid": n, "split": split, "filename": name,
         "sentences": [{"raw": f"Sentence {k} of {n}.", "tokens": [], "imgid": n} for k in range(5)]}
        for n, (split, name) in enumerate([("test", "a.jpg"), ("test", "gone.jpg"), ("train", "a.jpg")])
    ]  # fmt: skip
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": rows, "dataset": "flickr30k"}))
    out = tmp_path / "flickr"
    words = ["data", "import", "coco", str(tmp_path / "dataset_flickr30k.json"), str(images), str(out)]
    assert main([*words, "--split", "test"]) == 0
    (sample,) = ShardSource(shards=str(out / "test")).read([0])
    metadata = json.loads(sample.parts["json"])
    assert metadata["captions"] == [f"Sentence {k} of 0." for k in range(5)]
    assert (metadata["source"], metadata["image_id"]) == ("flickr30k", 0)
    assert "1 samples could not be imported (no_image 1)" in capsys.readouterr().out
