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
        ("trainer.devices=0", ["trainer.devices", "1 to 1024"]),
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
        ("data.train.shards=7", ["data.train.shards names no shards"]),
        ("data.train.shards=[true]", ["data.train.shards names no shards"]),
        ("data.train.shards={a: {shards: null}, b: {shards: x}}", ["data.train.shards.a.shards names no shards"]),
        ("data.groups=8", ["data.groups does not say", "walk and size"]),
        ("data.groups={walk: w}", ["data.groups does not say", "walk and size"]),
        ("data.groups={walk: 'https://h/w', size: 8}", ["data.groups.walk is no path"]),
        ("data.groups={walk: w, size: 7}", ["data.groups.size", "divides trainer.global_batch"]),
        ("data.groups={walk: w, size: 1}", ["data.groups.size", "above 1"]),
        ("data.groups={walk: w, size: true}", ["data.groups.size", "above 1"]),
        ("data.train.shards={a: {shards: x, groups: {walk: w, size: 7}}}", ["data.train.shards.a.groups.size"]),
        ("data.pure_batches=true", ["there is one source", "data.pure_batches"]),
        ("data.train.shards={a: {shards: x, selection: 5}}", ["data.train.shards.a.selection"]),
        ("data.train.shards={a: {shards: x, weight: 0}}", ["data.train.shards.a", "above 0"]),
        ("data.train.shards={a: {shards: x, weight: null}}", ["data.train.shards.a", "above 0"]),
        ("data.train.shards={a: {shards: x, weight: abc}}", ["data.train.shards.a", "above 0"]),
        ("data.train.shards={a: {shards: x, weight: nan}}", ["data.train.shards.a", "above 0"]),
        ("data.train.shards={a: {shards: x}, b: {shards: x, weight: 1e-9}}", ["data.train.shards.b", "too small"]),
        ("data.train.shards={a: x}", ["data.train.shards.a is no source"]),
        ("data.augment.scale=[0.5]", ["data.augment.scale", "[low, high]"]),
        ("data.augment.ratio=[1,2,3]", ["data.augment.ratio", "[low, high]"]),
        ("data.augment.color_jitter=-5", ["data.augment.color_jitter", "0 to 1"]),
        ("data.augment.grayscale=nan", ["data.augment.grayscale", "0 to 1"]),
        ("data.retry_seconds=.inf", ["data.retry_seconds"]),
        ("data.retry_seconds=inf", ["data.retry_seconds", "0 to 1000000000"]),
        ("data.cache_gb=1e400", ["data.cache_gb", "0 to 1000000000"]),
        ("optim.lr=inf", ["optim.lr is not finite"]),
        ("optim.betas=[1]", ["optim.betas", "tuple[float, float]"]),
        ("+model.text.pool=first", ["model.text.pool", "'last'"]),
        ("model.vision.width=-1", ["model.vision.width", "from 0"]),
        ("model.vision=null", ["model.vision"]),
        ("model.vision._target_=vlm_train./.x", ["model.vision._target_"]),
        ("evaluation.evaluators.retrieval=5", ["evaluation.evaluators.retrieval"]),
        ("+evaluation.evaluators.a/b={_target_: x.y}", ["evaluation.evaluators.a/b"]),
        ("+trainer.foo=1", ["no such key: trainer.foo"]),
        ("+data.augment.hue=1", ["no such key: data.augment.hue"]),
        ("trainer=null", ["no such choice in the group 'trainer'", "default"]),
        ("data=5", ["no such choice in the group 'data'", "openmoji"]),
        ("data=${nope}", ["no such choice in the group 'data'"]),
        ("run.id=${nope}", ["run.id cannot be resolved", "nope"]),
        ("checkpoint=${seed}", ["checkpoint cannot be resolved"]),
        ("seed=${seed}", ["seed cannot be resolved"]),
        ("data.train.shards=[a,${nope}]", ["data.train.shards.1 cannot be resolved"]),
        ("trainer.max_steps=???", ["trainer.max_steps", "no value"]),
        ("schedule=[]", ["schedule names nothing that can be built"]),
        ("seed=choice(1,2)", ["seed needs one value"]),
        pytest.param(f"seed={'9' * 5000}", ["seed cannot take this value"], id="digits"),
        pytest.param(f"seed={'[' * 3000}", ["cannot be parsed"], id="brackets"),
        ("~stages", ["stages cannot be taken out", "~KEY"]),
        ("~trainer.max_steps", ["trainer.max_steps cannot be taken out"]),
        ("~nothing", ["nothing cannot be taken out"]),
        ("=5", ["no such key"]),
        ("hydra.run.dir=x", ["no such key: hydra.run.dir"]),
        ("run.id=a/b", ["run.id cannot name a folder"]),
        ("run.dir=https://h/x", ["run.dir is no path on a local disk"]),
    ],
)
def test_a_mistake_is_answered_with_what_would_have_been_right(word: str, expected: list[str]) -> None:
    text = message(word)
    assert all(part in text for part in expected), text


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("data.shuffle_window=0", "groups are shuffled"),
        ("data.streaming=true data.epoch_end=wrap", "groups need a manifest"),
        ("data.train.shards={a:{shards:x}}", "data.groups is for a single source"),
    ],
)
def test_groups_do_not_contradict_what_else_is_said(other: str, said: str) -> None:
    groups = "data.groups={walk: w, size: 8}"
    assert compose_config([groups]).data.groups == {"walk": "w", "size": 8}
    assert said in message(groups, *other.split())


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


@pytest.mark.parametrize(
    "text",
    [
        b"seed: [",
        b"- 1",
        b"\xff\xfe",
        b"defaults: 5",
        b"defaults: [mine]",
        b"a: &a [*a]",
        b"seed: {a: 1}",
        b"seed: !!x 1",
    ],
)
def test_an_own_recipe_that_is_no_config_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_bytes(b"# @package _global_\n" + text)
    with pytest.raises(ConfigError) as caught:
        compose_config(["--config-dir", str(tmp_path), "experiment=mine"])
    assert None not in (caught.value.got, caught.value.allowed, caught.value.remedy)


def test_a_nested_recipe_gives_its_run_one_name(tmp_path: Path) -> None:
    (tmp_path / "experiment" / "deep").mkdir(parents=True)
    (tmp_path / "experiment" / "deep" / "mine.yaml").write_text("# @package _global_\nseed: 7\n")
    config = compose_config(["--config-dir", str(tmp_path), "experiment=deep/mine"])
    assert config.run.experiment == "deep-mine"


def test_a_wrong_value_is_refused_before_torch_and_before_a_run(tmp_path: Path) -> None:
    words = ["data.augment.color_jitter=-5", "data.train.shards={a: {shards: x, weight: 0}}", "data.cache_gb=nan"]
    script = (
        "import sys\nfrom vlm_train.cli.main import main\n"
        "codes = [main(['train', 'experiment=quickstart', word]) for word in sys.argv[1:]]\n"
        "sys.exit(f'{codes}' if set(codes) != {2} or 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr.count("error:") == 3, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("schedule.warmup_steps=99999", "schedule.warmup_steps"),
        ("optim.lr=0", "optim.lr"),
        ("optim.groups=[5]", "optim cannot be built"),
        ("objective.init_temperature=0", "objective cannot be built"),
    ],
)
def test_what_a_class_refuses_is_refused_before_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, said: str
) -> None:
    from vlm_train.cli.train import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        main(["experiment=quickstart", word])
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize(
    ("module", "heavy", "twin"),
    [
        ("vlm_train.cli.runs", "torch", "vlm_train.engine.states"),
        ("vlm_train.build", "lightning", "vlm_train.training"),
    ],
)
def test_nobody_waits_for_what_is_not_needed(module: str, heavy: str, twin: str) -> None:
    """Choosing a run needs no torch, and neither a search nor a launcher of ranks needs Lightning."""
    code = f"import sys, {module}; sys.exit(int('{heavy}' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert subprocess.run([sys.executable, "-c", code.replace(module, twin)], check=False).returncode == 1
