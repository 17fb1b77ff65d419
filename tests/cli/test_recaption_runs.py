"""`vlm-train data recaption` with real runs, and a training on the table that it makes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import _runs
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from test_answering_runs import ONE_STAGE, SMALL

from vlm_train import build
from vlm_train.cli import recaption
from vlm_train.cli.compose import compose_config
from vlm_train.cli.main import main
from vlm_train.data import building
from vlm_train.data.recaption_table import CaptionTable
from vlm_train.data.selection import Selection
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.tokenizer import load_tokenizer
from vlm_train.engine import checkpoints
from vlm_train.engine.rundir import RunDirectory
from vlm_train.errors import ConfigError
from vlm_train.schema import plain


def untrained(folder: Path, words: list[str]) -> Path:
    """A run as training would have begun it, with a checkpoint."""
    config, run = compose_config(words), RunDirectory(folder)
    run.create()
    tokenizer = build.make(config.model.tokenizer)(building.train_captions(plain(config.data), with_dialogues=True))
    tokenizer.save(str(run.tokenizer))
    parts = build.network(config, load_tokenizer(str(run.tokenizer)))
    state = {f"model.{name}": tensor for name, tensor in parts.model.state_dict().items()}
    state |= {f"objective.{name}": tensor for name, tensor in parts.objective.state_dict().items()}
    temporary = checkpoints.begin(run.checkpoints, 0)
    torch.save({"state_dict": state}, temporary / checkpoints.STATE)
    checkpoints.commit(temporary, 0, keep=1)
    run.config.write_text(OmegaConf.to_yaml(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Iterator[Path]:
    """Where `writer` is a run that writes, and `judge` one that embeds."""
    place = tmp_path_factory.mktemp("recaptioning")
    shards = (f"data.train.shards={scenes / 'val'}", f"data.val.shards={scenes / 'val'}")
    untrained(place / "writer", [*SMALL, *ONE_STAGE, "precision=fp32", *shards])
    untrained(place / "judge", _runs.train_words(scenes, "trainer.max_steps=1")[1:])
    num_threads = torch.get_num_threads()
    yield place
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(False)


def command(scenes: Path, folder: Path, out: str, *extra: str) -> list[str]:
    places = ["--out", str(folder / out), "--run", str(folder / "writer"), "--device", "cpu", "--max-tokens", "8"]
    return ["data", "recaption", str(scenes / "val"), *places, *extra]


def test_captions_are_written_scored_and_trained_on(
    scenes: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    judged = ["--scorer", str(folder / "judge"), "--num-captions", "2", "--part-size", "8"]
    assert main(command(scenes, folder, "table", *judged)) == 0
    said, num = capsys.readouterr().out, len(ShardSource(shards=str(scenes / "val")))
    assert f"captions of {num} samples" in said and f"next: data.captions={folder / 'table'}" in said
    facts = json.loads((folder / "table/provenance.json").read_text())
    assert facts["captioner"].startswith("default/writer@") and facts["scorer"].startswith("default/judge@")
    assert facts["prompt"] == "Describe the picture." and facts["num_rows"] == num and facts["num_original"] > num
    assert main(command(scenes, folder, "table", *judged, "--batch-size", "5")) == 0
    assert "is there already" in capsys.readouterr().out
    table = CaptionTable.load(folder / "table")

    train = _runs.train_words(scenes, "run.dir=run", "trainer.max_steps=1", "schedule.warmup_steps=0",
                              "trainer.accelerator=cpu", "data.num_workers=0", "data.captions=table",
                              "trainer.global_batch=8")  # fmt: skip
    train = [f"data.train.shards={scenes / 'val'}" if word.startswith("data.train.shards") else word for word in train]
    told: list[str] = []
    monkeypatch.setattr(building.log, "info", lambda text, *values: told.append(text % values))
    assert main(train) == 0
    assert told == [f"{num} of {num} samples have captions in table"]
    (saved,) = (folder / "run/checkpoints").glob("step-*/state.ckpt")
    assert table.fingerprint in json.dumps(torch.load(saved, weights_only=True)["loops"])
    wrong = [word if "global_batch" not in word else f"data.train.shards={scenes / 'train'}" for word in train]
    assert main([*wrong, "run.dir=other"]) == 2
    assert "was made for other samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--model", "blip"], "one model writes the captions"),
        (["--min-score", "0.3"], "nothing scores the captions"),
        (["--temperature", "0", "--num-captions", "2"], "the likeliest caption is one"),
        (["--temperature", "0", "--top-p", "0.5"], "none is drawn"),
        (["--temperature", "hot"], "--temperature is out of range"),
        (["--scorer", "writer"], "writes, and does not score"),
        (["--scorer", "nowhere"], "nowhere does not exist"),
        (["--selection", "nowhere"], "selection `nowhere` cannot be read"),
    ],
)
def test_what_cannot_be_is_told_before_the_work(
    scenes: Path,
    folder: Path,
    extra: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    assert main(command(scenes, folder, "new", *extra)) == 2
    assert said in capsys.readouterr().err and not (folder / "new").exists()


def test_a_run_that_embeds_writes_no_captions(scenes: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = command(scenes, folder, "new")
    assert main([word.replace("writer", "judge") for word in words]) == 2
    assert "writes no captions" in capsys.readouterr().err


def test_equal_samples_share_a_row_and_a_selection_says_which(scenes: Path, tmp_path: Path) -> None:
    shutil.copytree(scenes / "val", tmp_path / "copy")
    source = ShardSource(shards=[str(scenes / "val"), str(tmp_path / "copy")])
    num = len(source) // 2
    assert recaption._rows(source, None).tolist() == list(range(num))
    few = [3, num + 3, num + 5, num + 1]
    chosen = Selection.from_mask(np.isin(np.arange(2 * num), few), manifest=source.fingerprint)
    chosen.save(tmp_path / "few")
    assert recaption._rows(source, tmp_path / "few").tolist() == [3, num + 1, num + 5]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.captions=s3://bucket/table"], "no path on a local disk"),
        (["data.captions=table", "data.streaming=true", "data.epoch_end=wrap"], "captions need a manifest"),
        (["data.captions=table", "data.train.shards={a: {shards: x}}"], "data.captions is for a single source"),
        (["data.train.shards={a: {shards: x, captions: 5}}"], "data.train.shards.a.captions is no path"),
    ],
)
def test_a_table_that_no_training_could_read_is_refused(words: list[str], said: str) -> None:
    compose_config(["data.captions=table"])
    compose_config(["data.train.shards={a: {shards: x, captions: table}}"])
    with pytest.raises(ConfigError, match=said):
        compose_config(words)
