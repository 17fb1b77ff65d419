"""The documents say what is so: excerpts equal the files, commands parse, and what is named is there."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from vlm_train import __version__
from vlm_train.cli import (
    checkpoints,
    configs,
    data,
    doctor,
    evaluate,
    export,
    import_weights,
    plan,
    predict,
    submit,
    sweep_words,
    sync,
    watch,
)  # fmt: skip
from vlm_train.cli.arguments import parse
from vlm_train.cli.compose import compose_config
from vlm_train.cli.main import VERBS
from vlm_train.cli.paths import groups
from vlm_train.cli.slurm_config import is_of_launch
from vlm_train.data.decode import SampleError
from vlm_train.data.scenes.make import make_sample
from vlm_train.data.verify import Verdict
from vlm_train.data.writer import Summary
from vlm_train.errors import ConfigError
from vlm_train.schema import Config, flatten

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    path for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))] if path.exists()
]
# what tar.py and steps.py report beside the reasons of a SampleError
OTHER_REASONS = {
    "empty_member",
    "duplicate_key",
    "truncated",
    "no_end_marker",
    "bad_header",
    "unreadable",
    "bad_row",
    "bad_label",
    "outside_folder",
    "shard_unreadable",
}
EVALUATED = re.compile(r"(evaluation|data\.val|data\.classes)[.=]")

every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def text_of(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def fences(text: str, language: str) -> list[str]:
    """The contents of the code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def excerpts(text: str) -> list[tuple[str, str]]:
    """(file, quoted text) of each code block that a line ending in "`FILE`:" announces."""
    return re.findall(r"`([\w./-]+)`:\n\n```\w+\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """Words after `vlm-train` of every command in a shell block or between backquotes."""
    lines = "\n".join(fences(text, "bash")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`(vlm-train [^`]+)`", text)
    parts = [part for line in lines for part in line.split("&&")]
    found = [shlex.split(part, comments=True) for part in parts]
    return [words[1:] for words in found if words[:1] == ["vlm-train"]]


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def missing_links(text: str, folder: Path) -> list[str]:
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)) if ":" not in target]
    return [target for target in targets if not (folder / target).exists()]


def missing_files(text: str) -> list[str]:
    """Backquoted paths with a folder, and scripts in commands, that are not there (from the root or the package)."""
    named = re.findall(r"`([\w.-]+(?:/[\w.-]+)+\.(?:py|yaml|sh|md))`", prose(text))
    named = [name for name in named if "NAME" not in name]
    named += re.findall(r"(?:bash|python) (scripts/\S+)", text.replace("`", " "))
    return [name for name in named if not any((base / name).exists() for base in (ROOT, ROOT / "vlm_train"))]


def unknown_keys(text: str) -> set[str]:
    """Backquoted config keys that the composed config does not have."""
    known = set(flatten(OmegaConf.to_container(compose_config([]))))
    known |= {key.rsplit(".", depth)[0] for key in known for depth in range(1, key.count(".") + 1)}
    named = re.findall(rf"`((?:{'|'.join(Config.__dataclass_fields__)})\.[a-z_.]+)[`=]", prose(text))
    return set(named) - known


def accepts(words: list[str]) -> None:
    """Raises ConfigError where the command line would, before it does any work."""
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        raise ConfigError("no such verb", got=verb)
    readers: dict[str, Callable[[], Any]] = {
        "train": lambda: compose_config(sweep_words.split_sweep(rest)[0]),
        "data": lambda: data.main(rest),
        "configs": lambda: configs.main(rest),
        "predict": lambda: parse(rest, predict.KEYS, verb=verb, repeatable=("text",)),
        "export": lambda: parse(rest, export.KEYS, verb=verb),
        "plan": lambda: compose_config(parse(plan.split_flags(rest)[0], plan.KEYS, verb=verb, rest=True).overrides),
        "doctor": lambda: compose_config(doctor.parted(rest)[0]),
        "submit": lambda: compose_config([word for word in submit.split_options(rest)[0] if not is_of_launch(word)]),
        "watch": lambda: watch.parsed(rest),
        "checkpoints": lambda: check_checkpoints(rest),
        "sync": lambda: sync.parsed(rest),
        "import": lambda: parse(rest, import_weights.KEYS, verb=verb),
        "evaluate": lambda: check_evaluate(parse(rest, evaluate.KEYS, verb=verb, rest=True).overrides),
    }
    if rest:
        readers[verb]()


def check_checkpoints(rest: list[str]) -> None:
    """Its runs are not here."""
    try:
        checkpoints.main(rest)
    except ConfigError as error:
        if "is no run" not in error.what:
            raise


def check_evaluate(overrides: list[str]) -> None:
    for word in overrides:
        if not EVALUATED.match(word):
            raise ConfigError("evaluate does not take this", got=word)
    compose_config(overrides, checked=False)


class Nothing:
    """What a data verb gets instead of work: a manifest, verdict, selection or conversion of nothing."""

    shards: list[str] = []
    parts: list[str] = []
    problems: list[str] = []
    starts = [0]
    fingerprint = errors = ""
    num_errors = num_samples = num_shards = num_left_out = num_checked = num_written = num_bytes = num_pixels = 0
    highest_rate = None
    provenance = {"num_null": 0}

    def __len__(self) -> int:
        return 0

    @property
    def content(self) -> Nothing:
        return self

    def num_kept(self) -> int:
        return 0

    def by_reason(self) -> dict[str, int]:
        return {}

    def save(self, directory: str) -> None:
        pass


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data verbs read their words as ever, but make nothing."""
    summary = Summary(directory="", num_samples={}, num_bytes=0)
    for target in (
        "openmoji.import_openmoji",
        "importers.import_folder",
        "importers.import_coco",
        "aro.import_aro",
        "llava.import_llava",
        "scenes.make.make_scenes",
    ):
        monkeypatch.setattr(f"vlm_train.data.{target}", lambda *args, **kwargs: summary)
    for name in (
        "indexing.open_manifest",
        "stats.statistics",
        "select.select_rows",
        "convert.convert",
    ):
        monkeypatch.setattr(f"vlm_train.data.{name}", lambda *args, **kwargs: Nothing())
    monkeypatch.setattr("vlm_train.cli.walk.open_run", lambda path, key: Nothing())
    monkeypatch.setattr("vlm_train.cli.walk.choose_checkpoint", lambda run, path: Nothing())
    monkeypatch.setattr("vlm_train.cli.walk.write_walk", lambda *args, **kwargs: None)
    monkeypatch.setattr("vlm_train.cli.recaption.write_table", lambda *args: None)
    told = [{"facts": {"benchmarks": {}}}]
    monkeypatch.setattr("vlm_train.cli.curate.write_selection", lambda *args: told)
    monkeypatch.setattr("vlm_train.cli.calibrate.write_calibration", lambda *args: None)
    monkeypatch.setattr("vlm_train.cli.curation_report.write_report", lambda *args: None)
    monkeypatch.setattr("vlm_train.data.verify.verify", lambda *args, mode, **kwargs: Verdict(mode, 0, 0, 0))
    monkeypatch.setattr("vlm_train.cli.shards._dialogues_of", lambda path: None)
    monkeypatch.setattr("vlm_train.cli.stats_page.lines", lambda found: [])
    monkeypatch.setattr("vlm_train.cli.stats_page.write_page", lambda path, title, found: None)


@every_document
def test_excerpts_are_in_the_files(path: Path) -> None:
    for file, quoted in excerpts(path.read_text()):
        assert quoted in (ROOT / file).read_text(), f"{path.name} quotes {file} wrongly:\n{quoted}"


def test_a_changed_excerpt_is_noticed() -> None:
    quoted = excerpts(text_of("adding-a-loss.md"))
    assert [file for file, _ in quoted] == [
        "vlm_train/objectives/pairing.py",
        "vlm_train/objectives/sigmoid.py",
        "conf/objective/sigmoid.yaml",
        "tests/objectives/test_contrastive.py",
    ]
    assert quoted[2][1] == (ROOT / "conf/objective/sigmoid.yaml").read_text()
    assert quoted[0][1].replace("scale", "scales") not in (ROOT / quoted[0][0]).read_text()


@every_document
def test_commands_parse(path: Path, no_work: None) -> None:
    refused = {}
    for words in commands(path.read_text()):
        try:
            accepts(words)
        except ConfigError as error:
            refused[" ".join(words)] = str(error)
    assert refused == {}


@pytest.mark.parametrize(
    "command",
    [
        "vlm-train learn",
        "vlm-train train objective=sigmod",
        "vlm-train train data=shards",
        "vlm-train evaluate run=RUN optim.lr=1",
        "vlm-train predict run=RUN picture=DIR",
        "vlm-train data import folder IN OUT --val-frac 0.1",
        "vlm-train configs find lr",
        "vlm-train watch runs/a runs/b",
        "vlm-train checkpoints check runs/a",
        "vlm-train sync runs/a --mode later",
        "vlm-train doctor experiment=quickstrat",
        "vlm-train submit experiment=quickstart --swep seed=0,1",
    ],
)
def test_a_wrong_command_is_noticed(command: str, no_work: None) -> None:
    (words,) = commands(f"```bash\n{command}\n```\n")
    with pytest.raises(ConfigError):
        accepts(words)


def test_the_documents_hold_commands() -> None:
    assert sum(len(commands(path.read_text())) for path in DOCUMENTS) > 20


@every_document
def test_what_is_named_is_there(path: Path) -> None:
    text = path.read_text()
    assert missing_links(text, ROOT if path.name.startswith("README") else path.parent) == []
    assert missing_files(text) == []
    assert unknown_keys(text) == set()


def test_what_is_not_there_is_noticed() -> None:
    assert missing_links("[a](nowhere.md) [b](design.md#x) [c](https://x.org)", ROOT / "docs") == ["nowhere.md"]
    assert missing_files("`data/tar.py` `data/zip.py` `python scripts/proof/none.py`") == [
        "data/zip.py",
        "scripts/proof/none.py",
    ]
    assert unknown_keys("`data.epoch_ends` `trainer.devices=2` `optim.groups`") == {"data.epoch_ends"}


def test_the_table_of_bad_samples_is_complete() -> None:
    row = r"^\| (`\w+`(?:, `\w+`)*) \| .* \| (?:index|training|conversion) \|"
    rows = re.findall(row, text_of("data.md"), re.MULTILINE)
    listed = set(re.findall(r"\w+", " ".join(rows)))
    declared = set(re.findall(r"[a-z]+_[a-z0-9_]+", SampleError.reason.__doc__ or ""))
    assert listed == declared | OTHER_REASONS


def test_the_table_of_augmentation_is_complete() -> None:
    augment = flatten(OmegaConf.to_container(OmegaConf.structured(Config), throw_on_missing=False))
    expected = {key: value for key, value in augment.items() if key.startswith("data.augment.")}
    rows = dict(re.findall(r"^\| `(data\.augment\.\w+)` \| ([^|]+) \|", text_of("data.md"), re.MULTILINE))
    assert {key: json.loads(value) for key, value in rows.items()} == {key: _plain(v) for key, v in expected.items()}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def test_the_scene_of_the_data_document_is_real() -> None:
    (quoted,) = fences(text_of("data.md"), "json")
    shown = json.loads(quoted)
    _, parts = make_sample(56, seed=0, size=64)
    truth = json.loads(parts["json"])
    assert shown == {key: truth[key] for key in shown}
    further = set(truth) - set(shown)
    assert all(f"`{key}`" in text_of("data.md") for key in further)


def test_the_code_of_the_data_document_runs(tmp_path: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, walked = fences(text_of("data.md"), "python")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "openmoji").symlink_to(scenes)
    monkeypatch.chdir(tmp_path)
    for code in (chosen, walked):
        exec(compile(code, "data.md", "exec"), {})
    assert json.loads((tmp_path / "walks/labels/provenance.json").read_text())["rule"] == "by label"
    provenance = json.loads((tmp_path / "selections/animals/provenance.json").read_text())
    assert provenance["rule"] == "animals and nature" and provenance["num_rows"] > 0


def test_every_room_and_verb_is_in_the_design() -> None:
    design = text_of("design.md")
    rooms = {path.name.removesuffix(".py") for path in (ROOT / "vlm_train").iterdir() if path.name[0] not in "_."}
    assert {room for room in rooms - {"py.typed", "conf"} if f"`{room}`" not in design} == set()
    assert {verb for verb in VERBS if f"`{verb}`" not in design} == set()


def test_the_changelog_has_this_version_and_its_recipes_exist() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{__version__}]" in changelog
    named = re.findall(r"`experiment=(\w+)`", changelog)
    assert named and set(named) <= set(groups()["experiment"])


def test_the_licence_is_the_one_that_the_package_names() -> None:
    licence = (ROOT / "LICENSE").read_text()
    assert licence.split()[:4] == ["Apache", "License", "Version", "2.0,"] and licence.count("\n") == 202
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()


def test_what_the_failure_handbook_quotes_is_printed() -> None:
    """Its first column, in the sources; the twin is a text that nothing prints."""
    sources = "\n".join(path.read_text() for path in (ROOT / "vlm_train").rglob("*.py"))
    quoted = re.findall(r"^\| `([^`]+)` \|", text_of("failures.md"), re.MULTILINE)
    assert len(quoted) >= 20
    assert [text for text in [*quoted, "is nowhere to be seen"] if text not in sources] == ["is nowhere to be seen"]
