"""evaluate, predict, export, pictures and the report of one real run that was interrupted and resumed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_train.cli.main import main
from vlm_train.data.gallery import ShardGallery

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "proof"))
import _runs

NUM_STEPS = 40


class Trained:
    """What the fixture leaves: a run, with its report and first picture as they were at the interruption."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run, self.data = folder, folder / "run", folder / "scenes"
        self.early_report = ""
        self.first_batch = b""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    found = Trained(tmp_path_factory.mktemp("trained"))
    _runs.make_scenes(found.folder)
    words = _runs.train_words(
        found.data, f"run.dir={found.run}", f"trainer.max_steps={NUM_STEPS}", "evaluation.every_steps=20",
        "checkpoint.every_steps=20", "trainer.accelerator=cpu", "data.num_workers=0",
    )  # fmt: skip
    assert _runs.signal_after(found.folder, words, found.run, step=21, number=signal.SIGINT) == 130
    found.early_report = (found.run / "report.html").read_text()
    found.first_batch = (found.run / "media" / "first_batch.png").read_bytes()
    (found.run / "media" / "similarity.png").unlink()
    _runs.call(found.folder, words)
    return found


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, trained: Trained) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(trained.folder)
    yield


def records(run: Path) -> dict[str, bytes]:
    """Everything a plain evaluation may write."""
    files = [*run.glob("evals/*"), *run.glob("media/*"), run / "report.html"]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def test_an_interrupted_run_leaves_its_report(trained: Trained) -> None:
    assert re.search(rf"stopped at step \d+ of {NUM_STEPS}", trained.early_report)
    assert trained.early_report.count("<img") == 3


def test_pictures_and_report_of_the_whole_run(trained: Trained) -> None:
    media = trained.run / "media"
    assert {path.name for path in media.iterdir()} == {"first_batch.png", "similarity.png", "retrieval_grid.png"}
    assert (media / "first_batch.png").read_bytes() == trained.first_batch  # drawn once, not again on resume
    report = (trained.run / "report.html").read_text()
    assert "finished" in report and "resumed after step" in report and "http" not in report.replace("http-equiv", "")
    assert "Evaluation over steps" in report and report.count("<img") == 3
    events = [json.loads(line) for line in (trained.run / "events.jsonl").read_text().splitlines()]
    machines = [event for event in events if event["event"] == "environment"]
    assert len(machines) == 2 and machines[0]["num_parameters"] == sum(machines[0]["parts"].values())


def test_evaluate_measures_what_training_measured(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    """Down to the byte, with as many threads as training had; and the history tells no step twice."""
    before = records(trained.run)
    (trained.run / "media" / "retrieval_grid.png").unlink()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main(["evaluate", f"run={trained.run}", "device=cpu"]) == 0
    finally:
        torch.set_num_threads(num_threads)
    after = records(trained.run)
    for name in ("evals/retrieval.json", "evals/history.jsonl", "media/retrieval_grid.png", "media/similarity.png"):
        assert after[name] == before[name], name
    result = json.loads(after["evals/retrieval.json"])
    printed = capsys.readouterr().out
    score, chance = result["text_to_image"]["R@1"], result["chance"]["R@1"]
    assert re.search(rf"text to image R@1 +{score:.2f} +{chance:.2f} +\d", printed)


def test_ranks_share_the_measuring_and_change_nothing(trained: Trained, capfd: pytest.CaptureFixture[str]) -> None:
    before = records(trained.run)
    assert main(["evaluate", f"run={trained.run}", "device=cpu", "devices=2"]) == 0
    printed = capfd.readouterr().out
    assert printed.count("text to image R@1 ") == 1  # one rank tells it
    assert records(trained.run)["evals/retrieval.json"] == before["evals/retrieval.json"]
    share = trained.folder / "share.json"  # the twin: half of the samples is not the whole
    words = [f"data.val.shards={trained.data / 'train'}", "device=cpu", "devices=2", f"out={share}"]
    assert main(["evaluate", f"run={trained.run}", *words]) == 0
    result = json.loads(share.read_text())["results"]["retrieval"]
    assert result["num_images"] > json.loads(before["evals/retrieval.json"])["num_images"]


def test_a_rank_that_fails_ends_the_others(trained: Trained, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["device=cpu", "devices=2", "+evaluation.evaluators.retrieval.ks=[0]"]
    assert main(["evaluate", f"run={trained.run}", *words]) == 2
    assert "[rank 0]" in capfd.readouterr().err


def test_another_evaluation_leaves_the_records_alone(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    before = records(trained.run)
    first = sorted((trained.run / "checkpoints").glob("step-*"))[0]
    out = trained.folder / "other.json"
    overrides = [f"data.val.shards={trained.data / 'train'}", "+evaluation.evaluators.retrieval.ks=[1,2]"]
    assert main(["evaluate", f"run={trained.run}", f"out={out}", "evaluation=retrieval", *overrides]) == 0
    result = json.loads(out.read_text())["results"]["retrieval"]
    assert set(result["text_to_image"]) == {"R@1", "R@2"} and result["num_images"] > 100
    assert main(["evaluate", f"run={trained.run}", f"checkpoint={first.name}"]) == 0
    assert "not written" in capsys.readouterr().out
    assert records(trained.run) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.lr=1"], "belongs to how the run was trained"),
        (["evaluation=retreival"], "evaluation=retrieval"),
        (["evaluation.batchsize=3"], "evaluation.batch_size"),
        (["evaluation=none"], "nothing to measure"),
        (["evaluation.batch_size=1,2"], "one value"),
        (["checkpoint=step-3"], "no checkpoint"),
        (["device=tpu"], "no such device"),
        (["device=cpu", "devices=99999"], "a core or a GPU each"),
        (["out=nowhere/x.json"], "existing folder"),
    ],
)
def test_what_evaluate_refuses(
    trained: Trained, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    before = records(trained.run)
    assert main(["evaluate", f"run={trained.run}", *words]) == 2
    assert said in capsys.readouterr().err and records(trained.run) == before


def test_predict_finds_pictures_in_a_folder(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    """Shards and the same pictures as files give the same ranking; broken files are named and do not matter."""
    source = ShardGallery(shards=str(trained.data / "val"))
    folder = trained.folder / "photos"
    (folder / "deep").mkdir(parents=True)
    for number in range(len(source)):
        Image.fromarray(source.open(number).decode()).save(folder / "deep" / f"{source.keys[number]}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff nonsense")
    rankings = []
    for where in (trained.data / "val", folder):
        out = trained.folder / "grid.png"
        words = [
            f"run={trained.run}",
            "text=a red circle",
            "text=two squares",
            f"images={where}",
            f"out={out}",
            "top=3",
        ]
        assert main(["predict", *words, "device=cpu"]) == 0
        printed = capsys.readouterr().out
        rankings.append(re.findall(r"^ +(\d) +(-?\d\.\d+) +(?:deep/)?([^\s.]+)", printed, re.MULTILINE))
        assert "a red circle" in printed and np.asarray(Image.open(out)).std() > 0
    assert "1 of 22 pictures could not be used" in printed and "broken.jpg" in printed
    assert len(rankings[0]) == 6
    scores = [[float(score) for _, score, _ in ranking] for ranking in rankings]
    assert scores[0] == pytest.approx(scores[1], abs=2e-4)  # four digits are printed
    assert {name for *_, name in rankings[0]} == {name for *_, name in rankings[1]}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run=nowhere", "text=a", "images=scenes/val"], "nowhere does not exist"),
        (["run=scenes", "text=a", "images=scenes/val"], "scenes is no run"),
        (["run=run", "images=scenes/val"], "needs text="),
        (["run=run", "text=a"], "needs images="),
        (["run=run", "text=a", "images=nowhere"], "no pictures to search in"),
        (["run=run", "text=a", "images=scenes/val", "out=nowhere/x.png"], "out= cannot be written"),
        (["run=run", "text=a", "images=scenes/val", "top=none"], "is no count"),
    ],
)
def test_what_predict_refuses(
    trained: Trained, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["predict", *words]) == 2
    assert said in capsys.readouterr().err


def test_export_prints_its_certificate(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", f"run={trained.run}", "out=exported"]) == 0
    printed = capsys.readouterr().out
    differences = [float(text) for text in re.findall(r"difference of .+? (\d\.\de-\d+)$", printed, re.MULTILINE)]
    assert len(differences) == 2 and differences[0] <= 1e-5  # the tolerance of export/hf.py; measured 9e-8
    assert "model.safetensors" in printed and (trained.folder / "exported" / "config.json").is_file()
    assert main(["export", f"run={trained.run}", "out=exported"]) == 2
    assert "out= is in use" in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    for verb in ("predict", "evaluate", "export"):
        code = f"import sys; from vlm_train.cli.main import main; main(['{verb}', '--help'])"
        code += "; sys.exit('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith(f"usage: vlm-train {verb} run=RUN")
