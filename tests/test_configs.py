"""Every choice of every group composes, passes the checks, is instantiated and takes a step on real data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning
import pytest
from omegaconf import DictConfig

from vlm_train import build
from vlm_train.cli.compose import compose_config
from vlm_train.cli.paths import conf_dir, groups, headline
from vlm_train.engine.rundir import RunDirectory
from vlm_train.log import get_logger
from vlm_train.schema import Config, flatten, learning_view

CHOICES = [(group, choice) for group, choices in groups().items() for choice in choices]
NEEDS = {
    ("precision", "fp16"): "a GPU",
    ("logger", "wandb"): "tests/engine/test_wandb.py",
    ("compile", "blocks"): "a minute",
}
EXTRA = {
    ("strategy", "ddp"): [],
    ("data", "shards"): [],
    ("experiment", "lit_minilm"): [],
    ("schedule", "wsd"): ["schedule.decay_steps=1"],
    ("optim", "adamw_frozen_text"): ["model=clip_minilm"],
    ("optim", "adamw_frozen_vision"): ["model=efficientnet_tiny"],
    ("objective", "sigmoid"): ["model=siglip_tiny"],
}
SMALL = ["trainer.max_steps=2", "trainer.global_batch=6", "schedule.warmup_steps=1", "data.num_workers=0"]


def words_for(group: str, choice: str, scenes: Path) -> list[str]:
    data = [f"data.train.shards={scenes / 'train'}", f"data.val.shards={scenes / 'val'}"]
    classes = [f"data.classes={scenes.parent / 'classes.json'}"]
    return [f"{group}={choice}", *SMALL, *EXTRA.get((group, choice), []), *data, *classes]


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=[f"{g}={c}" for g, c in CHOICES])
def test_every_choice_trains_a_step(group: str, choice: str, scenes: Path, tmp_path: Path) -> None:
    (scenes.parent / "classes.json").write_text('{"name": "shapes", "classes": ["circle", "square"]}')
    words = words_for(group, choice, scenes)
    if (group, choice) == ("precision", "fp16"):
        words.append("trainer.accelerator=gpu")
    config = compose_config([*words, f"run.dir={tmp_path}"])
    if (group, choice) in NEEDS:
        return
    row = one_step(config, tmp_path)
    assert row["loss"] > 0 and row["grad_norm"] > 0


def one_step(config: DictConfig, folder: Path) -> dict[str, Any]:
    """The first row of a run that is stopped after one step; everything is built as in training."""
    run = RunDirectory(folder)
    run.create()
    build.prepare(config, run, fresh=True, progress=get_logger("test").info)
    placement = build.Placement(rank=0, world_size=1)
    parts = build.network(config, build.load_tokenizer(str(run.tokenizer)))
    build.evaluation_suite(parts, placement)
    rows: list[dict[str, Any]] = []

    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            rows.append(outputs["row"])
            trainer.should_stop = True

    config.strategy.name = "single"
    trainer = build.make_trainer(config, [Stop()])
    trainer.fit(build.training_module(parts, placement), train_dataloaders=build.train_loader(parts, placement))
    return rows[0]


@pytest.mark.parametrize("path", sorted(conf_dir().rglob("*.yaml")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_config_file_begins_with_what_it_is_for(path: Path) -> None:
    assert len(headline(path)) > 15
    assert path.read_text().startswith("#")


@pytest.mark.parametrize("choice", groups()["experiment"])
def test_a_recipe_is_short_and_says_how_to_run_it(choice: str) -> None:
    text = (conf_dir() / "experiment" / f"{choice}.yaml").read_text()
    assert text.count("\n") <= 60
    assert f"experiment={choice}" in text


def test_no_two_recipes_are_the_same() -> None:
    views = [str(learning_view(compose_config([f"experiment={name}"]))) for name in groups()["experiment"]]
    assert len(set(views)) == len(views)


def test_root_keys_are_a_known_set() -> None:
    """Knobs are expensive: a new one is added here, with a line in CHANGELOG.md."""
    assert sorted(Config.__dataclass_fields__) == [
        "checkpoint", "compile", "data", "evaluation", "logger", "model", "objective", "optim", "precision", "run",
        "schedule", "seed", "strategy", "trainer",
    ]  # fmt: skip


def test_keys_that_scripts_rely_on_exist() -> None:
    keys = set(flatten(__import__("omegaconf").OmegaConf.to_container(compose_config(["experiment=quickstart"]))))
    for key in (
        "run.id", "run.dir", "run.resume", "seed", "trainer.max_steps", "trainer.devices", "trainer.num_nodes",
        "trainer.global_batch", "trainer.micro_batch", "strategy.name", "precision.name", "compile.enabled",
        "checkpoint.every_steps", "checkpoint.keep", "logger.name", "data.train.shards", "data.val.shards",
        "data.selection", "data.num_workers", "optim.lr",
    ):  # fmt: skip
        assert key in keys


def test_commands_in_config_headers_compose() -> None:
    """`vlm-train train ...` lines in comments are promises."""
    found = 0
    for path in sorted(conf_dir().rglob("*.yaml")):
        for words in re.findall(r"^# .*?vlm-train train ((?:[\w./]+=[^\s`]+ ?)+)", path.read_text(), re.MULTILINE):
            listed = [word.strip("'").replace("'", "") for word in words.split()]
            if not any("PATH" in word or "NAME" in word for word in listed):
                compose_config(listed)
                found += 1
    assert found > 15
