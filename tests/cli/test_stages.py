"""Runs that start from weights, and runs in stages: what is handed over, what is refused, and SIGKILL in any stage."""

from __future__ import annotations

import json
from pathlib import Path

import _runs
import pytest
import torch

from vlm_train import build, origins
from vlm_train.cli import export, train
from vlm_train.cli.compose import compose_config
from vlm_train.cli.stages import check_handover, compose_stages, told_of
from vlm_train.cli.trained import open_run, pinned
from vlm_train.engine import checkpoints
from vlm_train.errors import ConfigError
from vlm_train.schema import learning_view, read_config

NUM_STEPS = 6
STAGES = (
    "+stages.masked={model: {patch_dropout: 0.5, vision: {image: {size: 32}}}, trainer: {max_steps: 6}, "
    "optim: {lr: 1.0e-3}}",
    "+stages.large={model: {vision: {image: {size: 48}}, tokenizer: {context_length: 32}}, trainer: {max_steps: 6}, "
    "optim: {lr: 1.0e-4}, seed: 1}",
)
SIZE = "model.vision.image.size=32"
SHORT = ("schedule.warmup_steps=2", "checkpoint.every_steps=2")
FIRST, SECOND = "stage-01-masked", "stage-02-large"


def words(data: Path, run: Path, *extra: str) -> list[str]:
    """A command whose image size is for the stages to say."""
    return [word for word in _runs.train_words(data, *SHORT, f"run.dir={run}", *extra) if word != SIZE]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    """A finished run in two stages."""
    folder = tmp_path_factory.mktemp("stages")
    output = _runs.call(folder, words(scenes, folder / "whole", *STAGES))
    assert output.count("trained: ") == 2
    return folder / "whole"


@pytest.mark.slow
def test_the_second_stage_goes_on_with_the_weights_of_the_first(whole: Path, scenes: Path) -> None:
    first, second = read_config(whole / FIRST), read_config(whole / SECOND)
    assert first.init is None and FIRST in second.init
    assert (first.optim.lr, second.optim.lr) == (1e-3, 1e-4)
    assert (first.model.patch_dropout, second.model.patch_dropout) == (0.5, 0.0)
    assert [row["step"] for row in _runs.rows(whole / SECOND)] == list(range(1, NUM_STEPS + 1))
    parts = build.network(second, build.load_tokenizer(str(whole / SECOND / "tokenizer")))
    weights = origins.trained_weights(origins.start_checkpoint(second.init))
    origins.start(parts, weights, whose="the first stage")
    assert parts.model.vision.position.shape == (37, 32) and parts.model.text.position.shape == (32, 32)
    kept = "text.token_embedding.weight"
    assert torch.equal(parts.model.state_dict()[kept], weights["model"][kept])
    assert torch.equal(parts.objective.logit_scale, weights["objective"]["logit_scale"])
    tokens = [json.loads((whole / stage / "tokenizer" / "tokenizer.json").read_text()) for stage in (FIRST, SECOND)]
    assert tokens[0]["model"] == tokens[1]["model"]


@pytest.mark.slow
def test_killed_in_either_stage_the_same_command_tells_the_same_story(
    tmp_path: Path, scenes: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "whole"
    command = words(scenes, run, *STAGES)
    for stage in (FIRST, SECOND):
        _runs.kill_after(tmp_path, command, run / stage, 3)
    _runs.call(tmp_path, command)
    for stage in (FIRST, SECOND):
        assert _runs.learned(run / stage) == _runs.learned(whole / stage)
    assert _runs.learned(whole / FIRST) != _runs.learned(whole / SECOND)
    assert train.main(command[1:]) == 0 and "is finished already" in capsys.readouterr().out
    with pytest.raises(
        ConfigError, match=r"trained with another config(.|\n)*stages\.large\.optim\.lr: 0\.0001 -> 0\.0002"
    ):
        train.main([*command[1:], "stages.large.optim.lr=2.0e-4"])


@pytest.mark.slow
def test_other_verbs_and_other_runs_find_the_last_stage(
    tmp_path: Path, scenes: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert open_run(str(whole)).path == whole / SECOND
    assert export.main([f"run={whole}", f"out={tmp_path / 'out'}"]) == 0 and SECOND in capsys.readouterr().out
    settings = ("model.vision.image.size=48", "model.tokenizer.context_length=32", "trainer.max_steps=2")
    command = words(scenes, tmp_path / "tuned", f"init={whole}", *settings)
    _runs.call(tmp_path, command)
    saved = read_config(tmp_path / "tuned")
    assert saved.init == pinned(str(whole))
    assert _runs.rows(tmp_path / "tuned")[0]["loss"] < _runs.rows(whole / FIRST)[0]["loss"]
    first = checkpoints.committed(whole / FIRST / "checkpoints")[-1]
    for run, change, told in (
        ("tuned", [f"init={first}", *settings], "init: "),
        ("wider", [f"init={first}", "model.embed_dim=24"], "image_projection.weight (16, 32) for (24, 32)"),
        ("wider", [f"init={first}", "model.tokenizer.vocab_size=310"], "another tokenizer"),
        ("wider", [f"init={first}@{'0' * 16}"], "not there any more"),
        ("wider", [f"init={tmp_path}"], "is no run"),
    ):
        with pytest.raises(ConfigError) as caught:
            train.main(words(scenes, tmp_path / run, *change)[1:])
        assert told in str(caught.value)
    assert not (tmp_path / "wider" / "config.yaml").exists()


def compose(*extra: str) -> tuple[object, dict[str, object]]:
    given = [*(word for word in _runs.TINY if word != SIZE), *SHORT, "data=openmoji", *STAGES, *extra]
    config = compose_config(given)
    return config, compose_stages(config, given)


def test_words_of_the_command_line_hold_in_every_stage_and_stage_keys_in_one() -> None:
    _, stages = compose("trainer.global_batch=12", "stages.large.optim.lr=3.0e-4", "data.augment.scale=[0.5,1.0]")
    assert list(stages) == [FIRST, SECOND]
    first, second = stages.values()
    assert (first.trainer.global_batch, second.trainer.global_batch) == (12, 12)
    assert (first.optim.lr, second.optim.lr) == (1e-3, 3e-4)
    assert second.optim.groups[0].lr == 3e-4 and second.schedule.total_steps == NUM_STEPS  # ${...} follow their stage
    assert list(first.data.augment.scale) == [0.5, 1.0]
    _, stages = compose("+stages.large.schedule=wsd")
    assert [stage.schedule._target_.split(".")[-1] for stage in stages.values()] == ["Cosine", "WarmupStableDecay"]


def test_stages_have_an_order_and_machine_keys_in_them_are_the_machines() -> None:
    config, _ = compose()
    view = learning_view(config)
    assert view["stages"] == "masked large" and view["stages.large.optim.lr"] == 1e-4
    other, _ = compose("+stages.large.trainer.micro_batch=3", "+stages.large.compile.enabled=true")
    assert learning_view(other) == view


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("+stages.large.model.text_bias=true", "missing: text_projection.bias"),
        ("+stages.large.model.tokenizer.pad_to_max=true", "another tokenizer"),
        ("+stages.large.objective=sigmoid", "missing: logit_bias"),
        ("+stages.large.model.vision.widht=3", "widht"),
        ("stages.large.trainer.max_steps=0", "trainer.max_steps is out of range"),
        ("trainer.max_steps=3", "stages.masked.trainer.max_steps=..."),
    ],
)
def test_a_stage_that_cannot_follow_is_refused_before_the_first(word: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_handover(compose(word)[1])
    assert told in str(caught.value) and "stage" in str(caught.value)


@pytest.mark.parametrize(
    ("remedy", "told"),
    [
        ("schedule.warmup_steps=7", "stages.large.schedule.warmup_steps=7"),
        ("run.resume=never", "run.resume=never"),
        ("vlm-train configs search optim.lr", "vlm-train configs search optim.lr"),
        (None, None),
    ],
)
@pytest.mark.parametrize("name", ["large", SECOND])
def test_the_remedy_is_one_for_the_stage(remedy: str | None, told: str | None, name: str) -> None:
    with pytest.raises(ConfigError, match=name) as caught, told_of(name):
        raise ConfigError("it cannot be", remedy=remedy)
    assert caught.value.remedy == told


@pytest.mark.parametrize("word", ["+stages.a.run.id=x", "+stages.a=3", "+stages.a.init=x", "+stages={latest/x: {}}"])
def test_what_is_no_stage_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="stages"):
        compose_config([word])


@pytest.mark.parametrize("choice", ["flip_b16", "clipa_b16"])
def test_the_stages_of_a_recipe_follow_each_other(choice: str) -> None:
    given = [f"experiment={choice}"]
    check_handover(compose_stages(compose_config(given), given))
