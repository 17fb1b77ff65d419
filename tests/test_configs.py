"""Every choice of every group composes, passes the checks, is instantiated and takes a step on real data."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from typing import Any

import lightning
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlm_train import build, training
from vlm_train.cli.compose import compose_config, resolve
from vlm_train.cli.paths import conf_dir, groups, headline
from vlm_train.engine.rundir import RunDirectory
from vlm_train.errors import ConfigError
from vlm_train.log import get_logger
from vlm_train.schema import Config, check, flatten, learning_view

TEXTS = ("auto", "abc", "https://u:hush@h/x?y", "a/b", "..", "a\0b", "${nope}", "???", "vlm_train.x.Y", "1e9", "nan")
WORDS = ("shards", "weight", "selection", "_target_", "_partial_", "a", "name", "lr")
OTHER_ROOTS = ("curation", "launch")  # groups that no run has
CHOICES = [(group, choice) for group, choices in groups().items() if group not in OTHER_ROOTS for choice in choices]
NEEDS = {
    ("precision", "fp16"): "a GPU",
    ("logger", "wandb"): "tests/engine/test_wandb.py",
    ("compile", "blocks"): "a minute",
    ("attention", "xformers"): "xformers and a GPU",
    ("objective", "distill"): "tests/cli/test_distilled_runs.py",
    ("objective", "weighted"): "tests/cli/test_distilled_runs.py",
    ("experiment", "distill_b32"): "tests/cli/test_distilled_runs.py",
    ("objective", "imagebind"): "tests/cli/test_bound_runs.py",
    ("experiment", "imagebind"): "tests/cli/test_bound_runs.py",
    **{
        (group, name): "tests/models/test_generative_recipes.py"  # their towers lie on the hub
        for group in ("model", "experiment")
        for name in ("llama3v_seed_8b", "idefics2_8b", "nano_vlm")
    },
}
NEEDS |= {(group, "llava_1_5_7b"): "tests/models/test_llava_recipe.py" for group in ("model", "experiment")}
ANSWERS = ["objective=next_token", "evaluation=none"]
EXTRA = {
    ("strategy", "ddp"): [],
    ("data", "shards"): [],
    ("experiment", "lit_minilm"): [],
    ("schedule", "wsd"): ["schedule.decay_steps=1"],
    ("optim", "adamw_frozen_text"): ["model=clip_minilm"],
    ("optim", "adamw_frozen_vision"): ["model=efficientnet_tiny"],
    ("optim", "adamw_frozen_anchor"): ["model=bound_tiny"],
    ("objective", "sigmoid"): ["model=siglip_tiny"],
    ("objective", "captioning"): ["model=coca_tiny"],
    ("objective", "coca"): ["model=coca_tiny"],
    ("objective", "distill"): ["objective.teacher=runs/teacher"],
    ("objective", "weighted"): ["objective.parts.distill.teacher=runs/teacher"],
    ("experiment", "distill_b32"): ["objective.parts.distill.teacher=runs/teacher"],
    ("objective", "next_token"): ["model=llava_tiny", "evaluation=none"],
    **{("evaluation", name): ["model=llava_tiny", *ANSWERS[:1]] for name in ("vqa", "captions", "prompts")},
    **{("model", f"{name}_tiny"): ANSWERS for name in ("llava", "llama3v_seed", "idefics2", "nano_vlm")},
    **{("optim", f"adamw_{part}"): ["model=llava_tiny", *ANSWERS] for part in ("connector", "language", "adapted")},
}
TEXT = ["model.text.width=32", "model.text.num_layers=1", "model.text.num_heads=2", "model.tokenizer.vocab_size=300"]
TOWERS = ["model.vision.width=32", "model.vision.num_layers=1", "model.vision.num_heads=2", "model.embed_dim=32", *TEXT]
COCA = [
    *(word.replace("vision", "vision.tower") for word in TOWERS),
    *(f"model.{part}.width=32" for part in ("vision", "decoder")),
    *("model.vision.num_queries=4", "model.decoder.num_layers=1", "model.decoder.num_heads=2"),
]
RESNET = [
    "model.vision.width=8",
    "model.vision.layers=[1,1,1,1]",
    "model.vision.out_dim=32",
    "model.embed_dim=32",
    *TEXT,
]
OTHERS = [
    f"model.others.{name}.{size}"
    for name in ("depth", "audio", "motion")
    for size in ("width=32", "num_layers=1", "num_heads=2")
]
LARGE = {  # choices of published size, cut down
    **dict.fromkeys(("clip_b32", "clip_b16", "clip_l14", "flip_b16", "clipa_b16"), TOWERS),
    **dict.fromkeys(("finetune", "distill_b32", "negclip"), TOWERS),
    "siglip_b16": [*TOWERS, "objective=sigmoid"],
    "siglip_so400m": [*TOWERS, "objective=sigmoid", "model.vision.mlp_dim=64", "model.text.mlp_dim=64"],
    "clip_rn50": RESNET,
    "coca_b32": COCA,
    "bound_h14": [*TOWERS, *OTHERS],
}
SMALL = ["trainer.max_steps=2", "trainer.global_batch=6", "schedule.warmup_steps=1", "data.num_workers=0"]


def words_for(group: str, choice: str, scenes: Path) -> list[str]:
    data = [f"data.train.shards={scenes / 'train'}", f"data.val.shards={scenes / 'val'}"]
    classes = [f"data.classes={scenes.parent / 'classes.json'}"]
    return [f"{group}={choice}", *SMALL, *EXTRA.get((group, choice), []), *LARGE.get(choice, []), *data, *classes]


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
    trainer = training.make_trainer(config, [Stop()])
    trainer.fit(training.training_module(parts, placement), train_dataloaders=build.train_loader(parts, placement))
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
    words = [[f"experiment={name}", *EXTRA.get(("experiment", name), [])] for name in groups()["experiment"]]
    views = [str(learning_view(compose_config(each))) for each in words]
    assert len(set(views)) == len(views)


def test_root_keys_are_a_known_set() -> None:
    """Knobs are expensive: a new one is added here, with a line in CHANGELOG.md."""
    assert sorted(Config.__dataclass_fields__) == [
        "attention", "checkpoint", "compile", "data", "evaluation", "init", "logger", "model", "objective", "optim",
        "precision", "run", "schedule", "seed", "spikes", "stages", "strategy", "trainer",
    ]  # fmt: skip


def test_keys_that_scripts_rely_on_exist() -> None:
    keys = set(flatten(OmegaConf.to_container(compose_config(["experiment=quickstart"]))))
    for key in (
        "run.id", "run.dir", "run.resume", "seed", "trainer.max_steps", "trainer.devices", "trainer.num_nodes",
        "trainer.global_batch", "trainer.micro_batch", "strategy.name", "precision.name", "compile.enabled",
        "checkpoint.every_steps", "checkpoint.keep", "logger.name", "data.train.shards", "data.val.shards",
        "data.selection", "data.num_workers", "optim.lr",
    ):  # fmt: skip
        assert key in keys


NUMBERS = st.one_of(st.floats(), st.integers(), st.sampled_from([0, 1, -1, 2**31, 2**63, 10**400]))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=5), st.sampled_from(TEXTS))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(WORDS) | st.integers(0, 3), inner, max_size=3)
    ),
    max_leaves=6,
)


@functools.cache
def composed() -> DictConfig:
    config = compose_config(["experiment=quickstart"])
    merged = OmegaConf.merge(OmegaConf.structured(Config), config)
    assert isinstance(merged, DictConfig)
    return merged


@functools.cache
def keys() -> list[str]:
    """Every key and every node above one."""
    flat = list(flatten(OmegaConf.to_container(composed())))
    return sorted({*flat, *(key.rsplit(".", depth)[0] for key in flat for depth in range(1, key.count(".") + 1))})


@settings(max_examples=600, deadline=None)
@given(data=st.data(), value=VALUES, merge=st.booleans())
def test_any_value_of_any_key_is_taken_or_refused_by_name(data: st.DataObject, value: Any, merge: bool) -> None:
    key, config = data.draw(st.sampled_from(keys())), copy.deepcopy(composed())
    try:
        OmegaConf.update(config, key, value, merge=merge)
    except (OmegaConfBaseException, ValueError, TypeError, AssertionError, OverflowError):
        return  # by the types of the schema, which `compose` explains: see the next test
    try:
        resolve(config)
        check(config)
    except ConfigError as error:
        assert key in str(error)
        assert None not in (error.got, error.allowed, error.remedy)


@pytest.mark.parametrize("key", ["seed", "optim.lr", "data.train.shards", "data.cache_gb", "model.vision.width"])
def test_a_number_that_python_does_not_print_is_refused(key: str) -> None:
    config, value = copy.deepcopy(composed()), 10**5000
    try:
        OmegaConf.update(config, key, {"a": {"shards": "x", "weight": value}} if "shards" in key else value)
    except (OmegaConfBaseException, ValueError, OverflowError):
        return
    with pytest.raises(ConfigError, match=key):
        check(config)


SPELT = st.one_of(
    st.sampled_from(["null", "nan", ".inf", "-inf", "1e400", "-1", "0", "1.5", "true", "abc", "''", "[]", "{}", "???"]),
    st.sampled_from(
        ["[1,2,3]", "[[a]]", "{a: 1}", "{a: {b: null}}", "${nope}", "${seed}", "1,2", "a b", "]", "{", "$x"]
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6),
)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), sign=st.sampled_from(["", "", "", "+", "++", "~"]), spelt=SPELT)
def test_any_word_gives_a_config_or_an_error_that_names_the_key(data: st.DataObject, sign: str, spelt: str) -> None:
    key = data.draw(st.sampled_from(keys()))
    word = f"{sign}{key}={spelt}" if sign != "~" else f"~{key}"
    try:
        assert compose_config(["experiment=quickstart", word]).seed is not None
    except ConfigError as error:
        assert key in str(error)
        assert None not in (error.got, error.allowed, error.remedy)


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
