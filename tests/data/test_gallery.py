"""Galleries: what is found where, under which name, and what is said when there is nothing."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm_train.data.gallery import FolderGallery, ShardGallery, open_gallery
from vlm_train.errors import DataError


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 9, 3), level, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def shard(path: Path, samples: dict[str, int]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, level in samples.items():
            for name, content in ((f"{key}.png", png(level)), (f"{key}.txt", f"caption {level}".encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_a_folder_is_searched_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    for number, name in enumerate(("z.PNG", "b/a.png", "b/c/m.png")):
        (tmp_path / name).write_bytes(png(number))
    (tmp_path / "notes.txt").write_text("no picture")
    gallery = open_gallery(str(tmp_path))
    names = [gallery.name(index) for index in range(len(gallery))]
    assert names == ["b/a.png", "b/c/m.png", "z.PNG"]
    assert [int(gallery.open(index).decode()[0, 0, 0]) for index in range(3)] == [1, 2, 0]
    assert len(open_gallery(str(tmp_path / "z.PNG"))) == 1
    assert open_gallery(str(tmp_path / "z.PNG")).name(0) == "z.PNG"


def test_shards_are_found_by_folder_and_pattern(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", {"a": 10, "b": 20})
    shard(tmp_path / "1.tar", {"c": 30})
    for where in (str(tmp_path), str(tmp_path / "{0..1}.tar"), str(tmp_path / "*.tar")):
        gallery = open_gallery(where)
        assert [gallery.name(index) for index in range(3)] == ["a caption 10", "b caption 20", "c caption 30"]
        assert gallery.open(1).decode()[0, 0].tolist() == [20, 20, 20]


def test_pictures_by_key_are_right_or_absent(tmp_path: Path) -> None:
    """A key that two shards hold names no picture: taking the first would show a wrong one."""
    shard(tmp_path / "0.tar", {"a": 10, "twice": 20})
    shard(tmp_path / "1.tar", {"twice": 30, "b": 40})
    found = ShardGallery(shards=str(tmp_path)).pixels(["b", "twice", "nowhere", "a"])
    assert {key: int(pixels[0, 0, 0]) for key, pixels in found.items()} == {"a": 10, "b": 40}


@pytest.mark.parametrize("where", ["missing", "missing.png", "empty", "missing/*.tar", "{0..3}.tar"])
def test_nothing_to_see_is_a_clear_error(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="no pictures to search in") as caught:
        open_gallery(where)
    assert where in str(caught.value) and "images=FOLDER" in str(caught.value) and caught.value.exit_code == 2


def test_a_broken_file_is_an_error_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff nonsense")
    with pytest.raises(DataError):
        FolderGallery(folder=tmp_path).open(0)


def test_a_pipe_is_an_error_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(OSError, match="regular"):
        FolderGallery(folder=tmp_path).open(0)
