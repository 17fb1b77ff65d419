"""A generative model through the command line: two stages learn, questions are answered beside their controls, what
evaluation heard `predict` says, and neither SIGKILL nor the machine changes what is learned."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from vlm_train.cli.main import main
from vlm_train.data.gallery import ShardGallery
from vlm_train.schema import read_config

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "proof"))
import _runs

SMALL = (
    "model.vision.image.size=32", "model.vision.width=32", "model.vision.num_layers=1", "model.vision.num_heads=2",
    "model.text.architecture.hidden_size=32", "model.text.architecture.intermediate_size=64",
    "model.text.architecture.num_hidden_layers=1", "model.text.architecture.num_attention_heads=2",
    "model.text.architecture.num_key_value_heads=2", "model.tokenizer.vocab_size=300", "optim.lr=1e-2",
    "trainer.global_batch=24", "trainer.num_threads=1", "trainer.accelerator=cpu", "data.num_workers=0",
)  # fmt: skip
STAGES = (
    "experiment=llava_tiny", "stages.align.trainer.max_steps=12", "stages.align.schedule.warmup_steps=2",
    "stages.instruct.trainer.max_steps=80", "stages.instruct.schedule.warmup_steps=2", "checkpoint.every_steps=5",
)  # fmt: skip
ALIGN, INSTRUCT = "stage-01-align", "stage-02-instruct"
ONE_STAGE = (
    "model=llava_tiny", "objective=next_token", "data=scenes", "data.template=chatml", "trainer.max_steps=5",
    "schedule.warmup_steps=1", "evaluation=none", "precision=fp64",
)  # fmt: skip
MAPS = (
    "model.vision.image.size=16", "+model.max_tiles=4", "+model.tile_layout=map", "data.augment.scale=null",
    "checkpoint.every_steps=2",
)  # fmt: skip
RETRIEVAL = "vlm_train.evaluation.retrieval.Retrieval"
MACHINES = {
    "one": (),
    "micro": ("trainer.micro_batch=7",),
    "two": ("trainer.devices=2", "strategy=ddp", "trainer.micro_tokens=300", "trainer.micro_images=2"),
    "other seed": ("seed=1",),
}


def words(scenes: Path, run: Path | str, *extra: str) -> list[str]:
    shards = (f"data.train.shards={scenes / 'train'}", f"data.val.shards={scenes / 'val'}")
    return ["train", *SMALL, *shards, f"run.dir={run}", *extra]


@pytest.fixture(scope="module")
def undone() -> Iterator[None]:
    """Training in this process leaves nothing behind."""
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, scenes: Path, undone: None) -> Path:
    """Where `run` is a finished run in two stages, `picture.png` the first picture of its validation split, and `clip`
    a run of a dual encoder."""
    folder = tmp_path_factory.mktemp("answering")
    _runs.call(folder, words(scenes, folder / "run", *STAGES))
    few = ("trainer.max_steps=1", "schedule.warmup_steps=0", "trainer.accelerator=cpu", "data.num_workers=0")
    assert main(_runs.train_words(scenes, f"run.dir={folder / 'clip'}", *few)) == 0
    Image.fromarray(ShardGallery(shards=str(scenes / "val")).open(0).decode()).save(folder / "picture.png")
    return folder


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def evals(folder: Path, stage: str, name: str) -> dict:
    return json.loads((folder / "run" / stage / "evals" / f"{name}.json").read_text())


def test_both_stages_learn_and_tell_how_often_they_are_right(folder: Path) -> None:
    assert [read_config(folder / "run" / stage).data.template for stage in (ALIGN, INSTRUCT)] == ["plain", "chatml"]
    for stage, num_steps in ((ALIGN, 12), (INSTRUCT, 80)):
        rows = _runs.rows(folder / "run" / stage)
        assert [row["step"] for row in rows] == list(range(1, num_steps + 1))
        assert all(0 <= row["accuracy"] <= 1 and row["labels_per_sample"] > 2 for row in rows)
        assert rows[-1]["loss"] < rows[0]["loss"] - 1 and rows[-1]["accuracy"] > rows[0]["accuracy"]
    assert (folder / "run" / INSTRUCT / "report.html").read_text().count("exact match") > 0


def test_answers_are_measured_beside_the_wrong_picture_and_no_picture(folder: Path) -> None:
    result = evals(folder, INSTRUCT, "vqa")
    assert result["step"] == 80 and 0 < result["num_images"] <= 21 < result["num_questions"]
    assert result["text_blind_prior"] == result["blind_prior"]["exact_match"] > 10
    assert result["exact_match_shuffled_images"] == result["shuffled_images"]["exact_match"]
    kinds = set(result["exact_match_by_type"])
    assert kinds >= {"color", "count", "existence", "shape"}
    for control in ("shuffled_images", "blind_model", "blind_prior"):
        assert set(result[control]) == {"exact_match", "f1", "accuracy", *kinds}
    assert all(0 <= result[name] <= 100 for name in ("exact_match", "f1", "accuracy"))
    assert any(row["predicted"] for row in result["examples"])
    result = evals(folder, INSTRUCT, "yes_no")
    assert result["chance"]["accuracy"] == 50.0 and 0 < result["num_yes"] < result["num_questions"]
    assert {"accuracy", "f1", "yes_ratio"} <= set(result["shuffled_images"]) and "accuracy" in result["blind_prior"]


def test_evaluate_measures_what_training_measured(folder: Path) -> None:
    before = evals(folder, INSTRUCT, "vqa"), evals(folder, INSTRUCT, "yes_no")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main(["evaluate", "run=run", "device=cpu"]) == 0
    finally:
        torch.set_num_threads(num_threads)
    assert (evals(folder, INSTRUCT, "vqa"), evals(folder, INSTRUCT, "yes_no")) == before


def test_predict_answers_as_evaluation_heard(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = evals(folder, INSTRUCT, "vqa")["examples"]
    prompts = [f"prompt={row['question']}" for row in examples]
    assert len(prompts) > 2
    ask = ["predict", "run=run", "image=picture.png", *prompts, "device=cpu"]
    assert main([*ask, "max_tokens=32"]) == 0
    assert capsys.readouterr().out == "".join(f"\n{row['question']}\n  {row['predicted']}\n" for row in examples)
    ask[1] = f"run=run/{ALIGN}"
    assert main([*ask, "max_tokens=32"]) == 0
    told = capsys.readouterr().out
    captioned = told.split("\n")[2::3]  # the twin: a stage that was never asked says one thing to all
    assert len(captioned) == len(examples) and len(set(captioned)) == 1 < len({row["predicted"] for row in examples})
    assert main([*ask, "max_tokens=1"]) == 0
    assert len(capsys.readouterr().out) < len(told)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("predict run=run text=a images=picture.png", "GenerativeModel answers, and does not search"),
        ("predict run=clip image=picture.png prompt=what?", "DualEncoder cannot answer"),
        ("predict run=run prompt=what?", "needs image="),
        ("predict run=run image=picture.png", "needs prompt="),
        ("predict run=run image=picture.png prompt=what? text=a", "either searches pictures or answers about some"),
        ("predict run=run image=run prompt=what?", "image= is no file"),
        ("predict run=run image=picture.png image=picture.png prompt=what?", "to read fewer pictures at once"),
        ("predict run=run image=picture.png prompt=<image><image>", "speaks of another number of pictures"),
        ("predict run=run image=nowhere prompt=what?", "image= is no file"),
        ("predict run=run image=picture.png prompt=what? max_tokens=0", "max_tokens= is no count"),
        ("predict run=run image=picture.png prompt=what? max_tokens=1000", "a prompt is too long"),
        (f"predict run=run image=picture.png prompt={'x.' * 400}", "a prompt is too long"),
        ("evaluate run=run device=cpu evaluation=retrieval", "retrieval asks what GenerativeModel cannot tell"),
        ("evaluate run=clip device=cpu evaluation=vqa", "vqa asks what DualEncoder cannot tell"),
    ],
)
def test_a_run_is_not_asked_for_what_it_cannot_do(capsys: pytest.CaptureFixture[str], command: str, said: str) -> None:
    assert main(command.split()) == 2
    told = capsys.readouterr().err
    assert said in told and all(f"\n  {part}:" in told for part in ("got", "allowed", "remedy")), told


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("experiment=llava_tiny", "evaluation=retrieval"), "retrieval asks what GenerativeModel cannot tell"),
        ((*ONE_STAGE, "objective=infonce"), "InfoNCE needs outputs that the model does not return"),
        ((*ONE_STAGE, "data.template=chatmll"), "data.template is not known"),
        (("experiment=llava_tiny", "stages.instruct.data.template=chatmll"), "stage instruct: data.template is not"),
        (("experiment=llava_tiny", "stages.instruct.data.template=own"), "stage stage-02-instruct: template=own"),
        (
            ("experiment=llava_tiny", f"+stages.instruct.evaluation.evaluators.mine._target_={RETRIEVAL}"),
            "stage stage-02-instruct: the evaluator mine asks",
        ),
        *(
            ((*ONE_STAGE, f"model.tokenizer.special_tokens={tokens}"), "are no special tokens")
            for tokens in ("abc", "[a]", "[ab,ab]", "['<|endoftext|>']", "[12]")
        ),
        ((*ONE_STAGE, "data.template=own"), "the tokenizer brings no chat template"),
        ((*ONE_STAGE, "model.context_length=16"), "does not hold its dialogues"),
        ((*ONE_STAGE, "trainer.micro_batch=0"), "trainer.micro_batch is out of range"),
        ((*ONE_STAGE, "trainer.micro_tokens=159"), "a dialogue may be larger than a micro-batch"),
    ],
)
def test_a_recipe_that_cannot_train_is_refused(
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words(scenes, "refused", *given)) == 2
    told = capsys.readouterr().err
    assert said in told and all(f"\n  {part}:" in told for part in ("got", "allowed", "remedy")), told
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.slow
def test_killed_in_the_second_stage_the_same_command_tells_the_same_story(
    tmp_path: Path, scenes: Path, folder: Path
) -> None:
    run = tmp_path / "run"
    command = words(scenes, run, *STAGES)
    _runs.kill_after(tmp_path, command, run / INSTRUCT, 12)
    assert 12 <= _runs.last_step(run / INSTRUCT) < 80
    _runs.call(tmp_path, command)
    for stage in (ALIGN, INSTRUCT):
        assert _runs.learned(run / stage) == _runs.learned(folder / "run" / stage)
    assert _runs.learned(run / ALIGN) != _runs.learned(run / INSTRUCT)
    assert '"resume"' in (run / INSTRUCT / "events.jsonl").read_text()
    answers = "evals/vqa.json"
    assert (run / INSTRUCT / answers).read_bytes() == (folder / "run" / INSTRUCT / answers).read_bytes()


@pytest.mark.slow
def test_ranks_and_micro_batches_do_not_change_what_is_learned(tmp_path: Path, scenes: Path) -> None:
    rows = {}
    for name, machine in MACHINES.items():
        command = words(scenes, tmp_path / name, *ONE_STAGE, *machine)
        if name == "two":
            _runs.call(tmp_path, command)
        else:
            assert main(command) == 0
        rows[name] = _runs.rows(tmp_path / name)
    for column in ("loss", "grad_norm", "accuracy", "labels_per_sample"):
        expected = [row[column] for row in rows["one"]]
        for name in ("micro", "two"):
            # sums of fp64 in another order; measured 2.1e-16
            assert [row[column] for row in rows[name]] == pytest.approx(expected, rel=1e-12), (name, column)
        assert [row[column] for row in rows["other seed"]] != pytest.approx(expected, rel=1e-3)  # the twin


@pytest.fixture(scope="module")
def oblong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of every aspect, of one tile of 16 pixels and of several, with what is asked about them."""
    folder = tmp_path_factory.mktemp("oblong")
    sizes = [(12 + 7 * number % 50, 12 + 11 * number % 60) for number in range(60)]
    for split, some in (("train", sizes), ("val", sizes[::8])):
        with tarfile.open(folder / f"{split}.tar", "w") as tar:
            for number, size in enumerate(some):
                red = 4 * number
                file = io.BytesIO()
                Image.new("RGB", size, (red, 255 - red, 0)).save(file, "PNG")
                told = {"captions": [f"number {number}"], "qa": [{"question": "which?", "answer": str(number)}]}
                told["conversations"] = [
                    {"role": "user", "content": "<image>\nwhich?"}, {"role": "assistant", "content": f"it is {number}"},
                ]  # fmt: skip
                for name, content in (("png", file.getvalue()), ("json", json.dumps(told).encode())):
                    info = tarfile.TarInfo(f"{number:03}.{name}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


@pytest.mark.slow
def test_tiles_in_a_map_are_learned_alike_by_any_machine_and_after_a_kill(tmp_path: Path, oblong: Path) -> None:
    shards = (f"data.train.shards={oblong / 'train.tar'}", f"data.val.shards={oblong / 'val.tar'}")

    def command(name: str, *extra: str) -> list[str]:
        return [*words(oblong, tmp_path / name, *ONE_STAGE, *MAPS, *shards), "evaluation=vqa",
                "~evaluation.evaluators.yes_no", *extra]  # fmt: skip

    machines = {"two": ("trainer.devices=2", "strategy=ddp", "trainer.micro_tokens=300"),
                "sharded": ("trainer.devices=2", "strategy=fsdp2"), "rows": ("model.tile_layout=rows",)}  # fmt: skip
    for name, machine in {"one": (), **machines}.items():
        if "trainer.devices=2" in machine:
            _runs.call(tmp_path, command(name, *machine))
        else:
            assert main(command(name, *machine)) == 0
    _runs.kill_after(tmp_path, command("killed"), tmp_path / "killed", 3)
    _runs.call(tmp_path, command("killed"))
    assert _runs.learned(tmp_path / "killed") == _runs.learned(tmp_path / "one")
    told = {name: (tmp_path / name / "evals" / "vqa.json").read_text() for name in ("one", "two", "sharded", "killed")}
    assert len(set(told.values())) == 1 and json.loads(told["one"])["num_questions"] == 8
    for column in ("loss", "grad_norm", "labels_per_sample"):
        rows = {name: [row[column] for row in _runs.rows(tmp_path / name)] for name in ("one", *machines)}
        for name in ("two", "sharded"):
            assert rows[name] == pytest.approx(rows["one"], rel=1e-12), (name, column)
        assert column == "labels_per_sample" or rows["rows"] != pytest.approx(rows["one"], rel=1e-3)  # the twin
