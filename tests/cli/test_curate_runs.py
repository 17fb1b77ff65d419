"""`vlm-train data curate`: a chain that a config describes, gone on with, changed, and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from vlm_train.cli.compose import composed
from vlm_train.cli.curate import alone
from vlm_train.cli.curation_config import _check, _curation
from vlm_train.cli.main import main
from vlm_train.cli.paths import conf_dir, groups, headline
from vlm_train.data.indexing import open_manifest
from vlm_train.data.selection import Selection
from vlm_train.errors import ConfigError


@pytest.mark.parametrize("choice", groups()["curation"])
def test_every_recipe_composes_and_says_how_it_is_run(choice: str) -> None:
    needs = [] if choice == "copies" else ["curation.steps.score.run=runs/any"]
    config = composed([f"curation={choice}", "shards=a", "out=b", *needs], _curation)
    _check(config)
    text = (conf_dir() / "curation" / f"{choice}.yaml").read_text()
    assert headline(conf_dir() / "curation" / f"{choice}.yaml") and f"curation={choice} shards=" in text
    with pytest.raises(ConfigError, match="shards"):
        _check(composed([f"curation={choice}", "out=b", *needs], _curation))


def test_a_chain_goes_on_behind_what_is_done(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    extra = tmp_path / "own" / "curation"
    extra.mkdir(parents=True)
    target = "_target_: vlm_train.curation.dedup.NearDuplicates"
    (extra / "twice.yaml").write_text(f"steps:\n  fine: {{{target}, radius: 0}}\n  coarse: {{{target}, radius: 12}}\n")
    words = ["data", "curate", "--config-dir", "own", "curation=twice", f"shards={scenes / 'train'}", "out=x"]
    assert main(words) == 0
    told = capsys.readouterr().out
    first = facts("x")
    assert [step["step"] for step in first["steps"]] == ["fine", "coarse"] and "coarse" in told
    before = {path.name: path.stat().st_mtime_ns for path in Path("x/steps").iterdir()}
    assert main([*words, "curation.steps.coarse.radius=14"]) == 0
    after = {path.name: path.stat().st_mtime_ns for path in Path("x/steps").iterdir()}
    assert after["fine.parquet"] == before["fine.parquet"] and after["coarse.parquet"] > before["coarse.parquet"]
    assert facts("x")["steps"][1]["settings"]["radius"] == 14
    assert main([*words, "~curation.steps.fine"]) == 0  # other rows come to the step behind
    assert [path.name for path in Path("x/steps").iterdir()] == ["coarse.parquet"]
    manifest = open_manifest(str(scenes / "train"))
    dropped = pq.read_table("x/dropped.parquet")
    selection = Selection.load("x", manifest.fingerprint)
    assert (
        len(dropped)
        == len(manifest) - selection.content.num_kept()
        == sum(facts("x")["steps"][0]["num_dropped"].values())
    )
    assert main(words) == 0 and facts("x") == first


def facts(folder: str) -> dict:
    return json.loads(Path(folder, "provenance.json").read_text())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "shards has no value"),
        (["shards=a", "out=b", "~curation.steps.copies"], "has steps"),
        (["shards=a", "out=b", "curation.engin=ray"], "curation.engine"),
        (["shards=a", "out=b", "curation.steps.copies.radus=4"], "curation.steps.copies.radius"),
        (["shards=a", "out=b", "curation.steps.copies.tolerance=2"], "+curation.steps.copies.tolerance=..."),
        (["shards=a", "out=b", "curation.steps.copies.radius=four"], "int"),
        (["shards=HERE", "out=b", "curation.steps.copies.radius=99"], "from 0 to 16"),
        (["shards=a", "out=b", "curation=copes"], "curation=copies"),
        (["shards=nowhere", "out=b"], "nowhere"),
        (["shards=5", "out=b"], "no places"),
        (["shards=HERE", "out=b", "+curation.steps.x={_target_: vlm_train.curation.engines.Local}"], "is no step"),
        (["shards=HERE", "out=HERE"], "folder of the shards"),
        (["shards=a", "out=b", "+curation.steps.x=1"], "has steps"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "curate", *(word.replace("HERE", str(scenes / "train")) for word in words)]) == 2
    told = capsys.readouterr().err
    assert said in told and "remedy" in told
    assert not Path("b").exists()


def test_one_command_at_a_time_and_what_is_not_ours_stays(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["data", "curate", f"shards={scenes / 'train'}", "out=b"]
    Path("b/steps").mkdir(parents=True)
    Path("b/steps/mine.parquet").write_text("precious")
    with alone(Path("b")):
        assert main(words) == 2
        assert "another command" in capsys.readouterr().err
    assert main(words) == 0 and Path("b/steps/mine.parquet").read_text() == "precious"
    assert main([*words, "selection=b"]) == 2 and "less each time" in capsys.readouterr().err
    assert main(["data", "report", "b", str(scenes / "train"), "--out", "b/selection.npy"]) == 2
    assert "would overwrite" in capsys.readouterr().err
    assert main(["data", "report", "b", str(scenes / "train"), "--out", "b/page.html"]) == 0


def test_a_selection_of_nothing_and_a_name_that_is_none_are_refused_before_work(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["data", "curate", f"shards={scenes / 'train'}", "out=b"]
    assert main([*words, "selection=nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    extra = tmp_path / "own" / "curation"
    extra.mkdir(parents=True)
    (extra / "up.yaml").write_text("steps:\n  ../up: {_target_: vlm_train.curation.dedup.NearDuplicates}\n")
    assert main([*words, "--config-dir", "own", "curation=up"]) == 2
    assert "cannot be called so" in capsys.readouterr().err
    assert not Path("b").exists()
