"""Runs whose parts start from the parts of other runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _runs
import pytest
import torch

from vlm_train import origins
from vlm_train.cli import train
from vlm_train.cli.compose import compose_config
from vlm_train.cli.trained import pinned
from vlm_train.engine import checkpoints
from vlm_train.errors import ConfigError
from vlm_train.schema import learning_view, read_config

STEPS = ("trainer.max_steps=2", "trainer.global_batch=8", "schedule.warmup_steps=1", "checkpoint.every_steps=1")
TOWER = ("model.vision._target_=vlm_train.models.vision.vit.VisionTransformer", "+model.vision.activation=quick_gelu")
CLIP = (*_runs.TINY, "data=scenes", "evaluation=none", "seed=5", *STEPS)
ANSWERER = (*_runs.TINY_ANSWERER, *TOWER, "data.template=plain", *STEPS)
LINEAR = "model.connector._target_=vlm_train.models.connectors.linear.LinearConnector"


def words(scenes: Path, run: Path, *settings: str) -> list[str]:
    shards = (f"data.train.shards={scenes / 'train'}", f"data.val.shards={scenes / 'val'}")
    return ["train", *settings, *shards, f"run.dir={run}"]


@pytest.fixture(scope="module")
def lenders(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> dict[str, Path]:
    """A contrastive run and one that answers, with the same image tower."""
    folder = tmp_path_factory.mktemp("lenders")
    made = {"clip": folder / "clip", "llava": folder / "llava"}
    _runs.call(folder, words(scenes, made["clip"], *CLIP))
    _runs.call(folder, words(scenes, made["llava"], *ANSWERER, "model.tokenizer.vocab_size=320"))
    return made


def weights(run: Path, part: str) -> dict[str, torch.Tensor]:
    """Of a part of the model, in the newest checkpoint."""
    checkpoint = checkpoints.newest(run / "checkpoints")
    assert checkpoint is not None
    model = origins.trained_weights(checkpoint)["model"]
    return {name: tensor for name, tensor in model.items() if name.startswith(f"{part}.")}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_frozen_part_stays_what_it_was_in_its_lender(tmp_path: Path, scenes: Path, lenders: dict[str, Path]) -> None:
    """The tower of one, the language model of another, a new connector between them; the twin starts from nothing."""
    run, twin = tmp_path / "run", tmp_path / "twin"
    init = f"init={{vision: {lenders['clip']}, text: {lenders['llava']}}}"
    settings = (*ANSWERER, LINEAR, "model.tokenizer.vocab_size=320", "optim=adamw_connector")
    _runs.call(tmp_path, words(scenes, run, *settings, init))
    _runs.call(tmp_path, words(scenes, twin, *settings))
    for part, lender in (("vision", "clip"), ("text", "llava")):
        assert same(weights(run, part), weights(lenders[lender], part))
        assert not same(weights(twin, part), weights(lenders[lender], part))
    assert not same(weights(lenders["clip"], "vision"), weights(lenders["llava"], "vision"))
    lent, own = (path / "tokenizer" / "tokenizer.json" for path in (lenders["llava"], run))
    assert own.read_bytes() == lent.read_bytes()
    assert read_config(run).init == pinned({"vision": str(lenders["clip"]), "text": str(lenders["llava"])})
    with pytest.raises(ConfigError, match=r"another config(.|\n)*init\.vision: "):
        train.main(words(scenes, run, *settings, init.replace(str(lenders["clip"]), str(lenders["llava"])))[1:])


@pytest.mark.slow
def test_the_first_stage_starts_from_the_parts_and_the_next_from_it(
    tmp_path: Path, scenes: Path, lenders: dict[str, Path]
) -> None:
    init, run = f"init={{vision: {lenders['clip']}}}", tmp_path / "run"
    stages = ("+stages.one.optim=adamw_connector", "+stages.two.seed=1")
    _runs.call(tmp_path, words(scenes, run, *ANSWERER, init, *stages))
    first, second = run / "stage-01-one", run / "stage-02-two"
    assert same(weights(first, "vision"), weights(lenders["clip"], "vision"))
    assert not same(weights(second, "vision"), weights(lenders["clip"], "vision"))
    assert read_config(first).init == pinned({"vision": str(lenders["clip"])})
    assert read_config(second).init == pinned(str(first))


@pytest.mark.slow
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, scenes: Path, lenders: dict[str, Path]) -> None:
    clip = lenders["clip"]
    for init, change, told in (
        (f"{{nose: {clip}}}", (), ("this model has no part nose", "connector, ")),
        (f"{{connector: {clip}}}", (), ("has no part connector", "vision")),
        (f"{{vision: {clip}}}", ("model.vision.num_layers=2",), (f"vision of {clip}", "missing: ")),
        (f"{{vision: {clip}}}", ("model.vision.width=16",), (f"vision of {clip}", "another shape: ")),
        (f"{{text: {clip}}}", ("~model.tokenizer.special_tokens",), (f"text of {clip}", "missing: ")),
        (f"{{text: {clip}}}", ("model.tokenizer.vocab_size=310",), ("another tokenizer",)),
        (f"{{vision: {tmp_path}}}", (), ("is no run", f"init.vision={tmp_path}")),
        (f"{{vision: '{clip}@{'0' * 16}'}}", (), ("not there any more",)),
        ("{vision: 3}", (), ("init.vision is no path",)),
        ("{vision: null}", (), ("init.vision is no path",)),
    ):
        with pytest.raises(ConfigError) as caught:
            train.main(words(scenes, tmp_path / "run", *ANSWERER, *change, f"init={init}")[1:])
        assert all(text in str(caught.value) for text in told), str(caught.value)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_parts_are_known_by_the_hash_of_their_weights() -> None:
    def view(init: Any) -> dict[str, Any]:
        config = compose_config(["data=scenes"])
        config.init = init
        return {key: value for key, value in learning_view(config).items() if key.split(".")[0] == "init"}

    assert view({"vision": "/a/b@0123", "text": "c@4567"}) == {"init.vision": "0123", "init.text": "4567"}
    assert view("/a/b@0123") == {"init": "0123"}
    assert view(None) == {"init": None}
