"""`vlm-train data calibrate` as a user runs it: what it prints, leaves and refuses, and what a report shows of it."""

from __future__ import annotations

import json
from pathlib import Path

import _runs
import numpy as np
import pytest
from page_fixtures import encoded, looked_at, smooth, write
from PIL import Image

from vlm_train.cli import calibrate
from vlm_train.cli.calibration_page import lines
from vlm_train.cli.main import main
from vlm_train.curation.calibration import COPIES
from vlm_train.data.indexing import open_manifest

FEW = ["--num-samples", "5", "--num-workers", "1"]
TOLERANCE = 1.0


@pytest.fixture(autouse=True)
def one_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes twelve searches."""
    monkeypatch.setattr(calibrate, "TOLERANCES", {"near": (TOLERANCE,), "near without covered": (TOLERANCE,)})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with detail, of which two are smaller copies of others: pairs of the user's own."""
    pictures = [detailed(number) for number in range(22)]
    smaller = [np.asarray(Image.fromarray(each).resize((96, 72), Image.Resampling.BICUBIC)) for each in pictures[:2]]
    return write(tmp_path_factory.mktemp("data") / "all", [encoded(each) for each in [*pictures, *smaller]])


def detailed(number: int) -> np.ndarray:
    noise = np.random.default_rng(1000 + number).normal(0, 10, (96, 128, 3))
    return np.clip(smooth(number, 128, 96) + noise, 0, 255).astype(np.uint8)


def test_it_measures_suggests_and_leaves_nothing_but_its_result(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "calibrate", str(data), "--out", "cal", *FEW]) == 0
    told = capsys.readouterr().out
    assert sorted(path.name for path in Path("cal").iterdir()) == [".lock", "calibration.html", "calibration.json"]
    content = json.loads(Path("cal/calibration.json").read_text())
    assert content["manifest"] == open_manifest(str(data)).fingerprint and content["num_planted"] == 5
    near = content["rules"][0]
    assert near["rule"] == "near" and [point["threshold"] for point in near["points"]] == [TOLERANCE]
    for point in near["points"]:
        assert set(point["kinds"]) == set(COPIES) and point["num_own_dropped"] == 2
        told_of = point["kinds"]["recompressed"]
        assert told_of["found"] + told_of["through_own"] >= 4  # of 5; two have a smaller copy among the user's own
        assert point["kinds"]["mirrored"]["found"] == 0
    assert {tuple(sorted((pair["row"], pair["like"]))) for pair in near["own_pairs"]} == {(0, 22), (1, 23)}
    assert f"suggested: tolerance {near['suggested']:g}" in told and "mirrored (control)" in told
    document = Path("cal/calibration.html").read_text()
    parser = looked_at(document)
    assert parser.found == [] and parser.images == 4 * len(content["rules"]) and "<polyline" in document
    before = Path("cal/calibration.json").read_bytes()
    assert main(["data", "calibrate", str(data), "--out", "again", *FEW[:2], "--num-workers", "2"]) == 0
    assert Path("again/calibration.json").read_bytes() == before
    assert main(["data", "calibrate", str(data), "--out", "other", *FEW, "--seed", "1"]) == 0
    assert Path("other/calibration.json").read_bytes() != before  # the twin

    assert main(["data", "dedup", str(data), "--out", "sel", "--num-workers", "1"]) == 0
    capsys.readouterr()
    assert main(["data", "report", "sel", str(data), "--calibration", "cal"]) == 0
    document = Path("report.html").read_text()
    assert "Found in your own data by near" in document and looked_at(document).found == []
    assert "other data" not in capsys.readouterr().out
    content["manifest"] = "0" * 64
    Path("sel/calibration.json").write_text(json.dumps(content))  # found where none is named
    assert main(["data", "report", "sel", str(data)]) == 0
    document = Path("report.html").read_text()
    assert "Calibration" in document and "Found in your own data by near" not in document
    assert "other data" in capsys.readouterr().out


def test_a_precision_that_nothing_reaches_is_said() -> None:
    each = {"found": 5, "wrong": 5, "through_own": 0}
    point = {"threshold": 4.0, "kinds": dict.fromkeys(COPIES, each), "num_own_dropped": 3}
    rule = {"rule": "near", "setting": "radius", "settings": {}, "points": [point], "own_pairs": []}
    content = {"num_planted": 10, "num_own": 50, "num_unreadable": 2, "precision": 0.99, "seed": 0}
    told = "\n".join(lines({**content, "rules": [{**rule, "suggested": None}]}))
    assert "no radius reaches a precision of 99 %: none is suggested" in told and "50 % (50 %)" in told
    told = "\n".join(lines({**content, "rules": [{**rule, "suggested": 4.0}]}))
    assert "suggested: radius 4" in told and "3 of 50 own pictures would go too" in told


def test_a_model_is_measured_over_its_eps(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    few = ("trainer.max_steps=8", "trainer.accelerator=cpu", "data.num_workers=0", "evaluation=none")
    _runs.call(tmp_path, _runs.train_words(scenes, "run.dir=run", *few))
    words = ["data", "calibrate", str(scenes / "train"), "--run", "run", "--device", "cpu", *FEW]
    assert main([*words, "--out", "x"]) == 0
    assert "recall (precision) by eps" in capsys.readouterr().out
    rules = json.loads(Path("x/calibration.json").read_text())["rules"]
    points = rules[-1]["points"]
    assert rules[-1]["setting"] == "eps" and [point["threshold"] for point in points] == list(calibrate.EPS)
    own = [point["num_own_dropped"] for point in points]
    assert own == sorted(own) and own[-1] > own[0]
    assert sorted(path.name for path in Path("x").iterdir()) == [".lock", "calibration.html", "calibration.json"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--out is missing"),
        (["--out", "x", "--device", "cpu"], "--device is about embeddings"),
        (["--out", "x", "--run", "nowhere"], "nowhere"),
        (["--out", "x", "--precision", "0"], "--precision"),
        (["--out", "x", "--num-samples", "0"], "--num-samples"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words, said
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "calibrate", str(data), *words]) == 2
    told = capsys.readouterr().err
    assert said in told and "remedy" in told
    assert not Path("x").exists()
