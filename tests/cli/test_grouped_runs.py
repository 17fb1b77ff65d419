"""`vlm-train data walk` with a real run, and real runs on the groups that it makes: on any ranks, after a kill."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vlm_train.cli import walk
from vlm_train.cli.main import main
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.walk import Walk
from vlm_train.types import Batch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "proof"))
import _runs

GROUPS = "data.groups={walk: walk, size: 8}"


def words(scenes: Path, run: str, *extra: str) -> list[str]:
    common = (f"run.dir={run}", "trainer.max_steps=12", "checkpoint.every_steps=4", "precision=fp64",
              "trainer.accelerator=cpu")  # fmt: skip
    found = _runs.train_words(scenes, *common, *extra)
    return ["evaluation=none" if word == "evaluation=retrieval" else word for word in found]


@pytest.fixture(scope="module")
def trained(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run`, trained without groups, and `walk`, made by it."""
    folder = tmp_path_factory.mktemp("grouped")
    _runs.call(folder, words(scenes, "run"))
    assert main(make(scenes, folder, "walk")) == 0
    return folder


def make(scenes: Path, folder: Path, out: str, *extra: str) -> list[str]:
    places = ["--run", str(folder / "run"), "--out", str(folder / out)]
    return ["data", "walk", str(scenes / "train"), *places, "--device", "cpu", "--num-workers", "0", *extra]


def test_a_walk_is_made_by_a_trained_run(scenes: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = ShardSource(shards=str(scenes / "train"))
    found = {"image": Walk.load(trained / "walk", source.fingerprint)}
    for by in ("text", "both"):
        assert main(make(scenes, trained, by, "--by", by)) == 0
        assert "the cosine of neighbours is" in capsys.readouterr().out
        found[by] = Walk.load(trained / by, source.fingerprint)
    for by, one in found.items():
        assert one.num_rows == len(source) and one.provenance["by"] == by and one.provenance["num_unusable"] == 0
        assert one.provenance["cosine_of_neighbours"] > one.provenance["cosine_of_any_two"] + 1e-3
        assert one.provenance["checkpoint"].startswith("step-00000012@")
    assert len({one.fingerprint for one in found.values()}) == 3


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--by", "colour"], "--by has no such choice"),
        (["--checkpoint", "step-7"], "step-7 is no checkpoint"),
        (["--run", "nowhere"], "nowhere does not exist"),
        (["--out", "walk"], "--out is in use"),
        (["--device", "cuda:99"], "no such device"),
    ],
)
def test_what_no_walk_can_be_made_of_is_told(
    scenes: Path,
    trained: Path,
    extra: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(trained)
    given = {"--run": "run", "--out": "new"} | {extra[0]: extra[1]}
    assert main(["data", "walk", str(scenes / "train"), *itertools.chain.from_iterable(given.items())]) == 2
    assert said in capsys.readouterr().err and not (trained / "new").exists()


class Stub:
    """An embedder that gives each picture the vector that its first pixel asks for."""

    def images(self, batch: Batch) -> torch.Tensor:
        return torch.nn.functional.one_hot(batch["images"][:, 0, 0, 0].long(), 4).float()


def test_samples_that_cannot_be_used_are_known_by_their_rows() -> None:
    batches = [
        {"images": torch.tensor(kinds).reshape(-1, 1, 1, 1), "weights": torch.tensor(weights)}
        for kinds, weights in (([1, 2, 3], [1.0, 0.0, 1.0]), ([0, 2], [0.0, 1.0]))
    ]
    features, usable = walk._collect(Stub(), batches, 5, by="image")  # type: ignore[arg-type]
    assert usable.tolist() == [True, False, True, False, True]
    assert features.argmax(axis=1).tolist() == [1, 3, 2] and np.all(features.sum(axis=1) == 1)


@pytest.mark.slow
def test_grouped_runs_learn_the_same_on_any_ranks_and_after_a_kill(scenes: Path, trained: Path) -> None:
    _runs.call(trained, words(scenes, "whole", GROUPS))
    pair = words(scenes, "pair", GROUPS, "trainer.devices=2", "strategy=ddp", "data.num_workers=2")
    _runs.kill_after(trained, pair, trained / "pair", 5)
    _runs.call(trained, words(scenes, "pair", GROUPS, "trainer.micro_batch=5"))
    losses = _runs.losses(trained / "whole")
    assert _runs.losses(trained / "pair") == pytest.approx(losses, abs=1e-12)
    assert losses != pytest.approx(_runs.losses(trained / "run"), abs=1e-3)  # the twin: without groups
    state = torch.load(trained / "whole" / "checkpoints" / "step-00000012" / "state.ckpt", weights_only=True)
    assert f"{Walk.load(trained / 'walk', manifest(trained)).fingerprint} by 8" in json.dumps(state["loops"])


def manifest(trained: Path) -> str:
    return json.loads((trained / "walk" / "provenance.json").read_text())["manifest"]
