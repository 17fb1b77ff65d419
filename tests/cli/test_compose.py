from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlm_train.cli.compose import compose_config, defining_file
from vlm_train.errors import ConfigError


def message(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_config(["experiment=quickstart", *words])
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("optim.ler=1", ["optim.lr", "conf/optim/adamw.yaml"]),
        ("trainer.max_step=3", ["trainer.max_steps", "conf/trainer/default.yaml"]),
        ("data.train.shard=x", ["data.train.shards", "conf/data/"]),
        ("run.resum=auto", ["run.resume", "vlm_train/schema.py"]),
        ("objetive=sigmoid", ["objective"]),
        ("objective=sigmod", ["sigmoid", "conf/objective/sigmoid.yaml", "infonce"]),
        ("model.vision.widht=3", ["model.vision.width"]),
        ("trainer.max_steps=abc", ["trainer.max_steps", "abc"]),
        ("optim.lr=abc", ["optim.lr", "abc", "float"]),
        ("model.vision.width=1.5", ["model.vision.width", "1.5", "int"]),
        ("+foo=1", ["foo"]),
        ("+model.vision.foo=1", ["foo", "VisionTransformer"]),
        ("trainer.devices=2", ["strategy=ddp"]),
        ("trainer.devices=0", ["trainer.devices", ">= 1"]),
        ("trainer.micro_batch=0", ["trainer.micro_batch"]),
        ("schedule.warmup_steps=abc", ["schedule.warmup_steps"]),
        ("data.augment.scale=[0,1]", ["data.augment.scale"]),
        ("data.epoch_end=loop", ["drop", "wrap"]),
        ("logger.mode=x", ["online", "offline"]),
        ("precision=fp8", ["bf16", "fp32"]),
        ("nonsense", ["group=choice"]),
        ("optim.groups=[", ["cannot be parsed"]),
        ("run.dir=a,b", ["comma"]),
        ("data.train.shards=null", ["data.train.shards"]),
    ],
)
def test_a_mistake_is_answered_with_what_would_have_been_right(word: str, expected: list[str]) -> None:
    text = message(word)
    assert all(part in text for part in expected), text


def test_brace_patterns_need_no_second_quoting() -> None:
    config = compose_config(["data=shards", "data.train.shards=a b/{00000..00012}.tar", "data.val.shards={1..2}.tar"])
    assert config.data.train.shards == "a b/{00000..00012}.tar" and config.data.val.shards == "{1..2}.tar"


def test_a_folder_of_own_configs_stands_beside_ours(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nseed: 7\ntrainer: {max_steps: 5}\nschedule: {warmup_steps: 1}\n"
    )
    config = compose_config(["--config-dir", str(tmp_path), "experiment=mine"])
    assert (config.seed, config.trainer.max_steps, config.run.experiment) == (7, 5, "mine")
    assert message("--config-dir", str(tmp_path / "none"))


def test_an_own_recipe_with_a_misspelt_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    for text in ("trainer: {max_step: 5}", "model: {vision: {widht: 5}}", "optim: {lrr: 1.0}"):
        (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
        with pytest.raises(ConfigError):
            compose_config(["--config-dir", str(tmp_path), "experiment=mine"])


def test_the_defining_file() -> None:
    assert defining_file("objective.init_bias") == "conf/objective/sigmoid.yaml"
    assert defining_file("trainer.num_threads") == "vlm_train/schema.py"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["train", "--help"],
        ["configs"],
        ["data"],
        ["predict", "--help"],
        ["evaluate", "--help"],
        ["export", "--help"],
    ],
)
def test_help_is_quick_because_nothing_heavy_is_imported(words: list[str]) -> None:
    """Time is printed, not asserted; that neither torch nor hydra is loaded is what keeps it under half a second."""
    script = (
        "import sys\nfrom vlm_train.cli.main import main\ncode = main(sys.argv[1:])\n"
        "heavy = {'torch', 'hydra', 'lightning', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    print(f"{time.perf_counter() - begin:.2f} s")
    assert done.returncode == 0, done.stderr
    assert "vlm-train" in done.stdout


def test_an_unknown_verb_is_answered_with_the_nearest() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vlm_train.cli.main", "trian"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "vlm-train train" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["list"],
        ["show", "objective/sigmoid"],
        ["show", "experiment=quickstart"],
        ["keys"],
        ["search", "lr"],
        ["search", "qqq"],
    ],
)
def test_configs_can_be_listed_shown_and_searched(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from vlm_train.cli.configs import main

    assert main(words) == 0
    assert len(capsys.readouterr().out) > 10


@pytest.mark.parametrize("words", [["lst"], ["show", "objective/sigmod"], ["search"]])
def test_configs_mistakes(words: list[str]) -> None:
    from vlm_train.cli.configs import main

    with pytest.raises(ConfigError):
        main(words)


@pytest.mark.parametrize(("global_batch", "bias"), [(64, -4.143), (22_000, -10.0), (1, 0.0)])
def test_the_sigmoid_bias_starts_at_the_share_of_right_pairs(global_batch: int, bias: float) -> None:
    config = compose_config(["objective=sigmoid", f"trainer.global_batch={global_batch}"], checked=False)
    assert config.objective.init_bias == pytest.approx(bias, abs=2e-3)
