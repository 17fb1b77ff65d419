"""`predict` asks about several pictures together, in the order in which they are given."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from vlm_train.cli.main import main

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "proof"))
import _runs

COLOURS = ("red", "blue")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    """Where `run` is a model that reads two pictures and has hardly learned; `red.png` and `blue.png`."""
    folder = tmp_path_factory.mktemp("several")
    words = (
        "model=llava_tiny", "model.max_images=2", "model.vision.image.size=32", "model.vision.width=32",
        "model.vision.num_layers=1", "model.vision.num_heads=2", "model.text.architecture.hidden_size=32",
        "model.text.architecture.intermediate_size=64", "model.text.architecture.num_hidden_layers=1",
        "model.text.architecture.num_attention_heads=2", "model.text.architecture.num_key_value_heads=2",
        "model.tokenizer.vocab_size=300", "trainer.num_threads=1", "objective=next_token", "data=scenes",
        "data.template=chatml", "trainer.max_steps=8", "trainer.global_batch=16", "optim.lr=1e-2", "evaluation=none",
        "schedule.warmup_steps=1", "trainer.accelerator=cpu", "data.num_workers=0",
        f"data.train.shards={scenes / 'train'}", f"data.val.shards={scenes / 'val'}", f"run.dir={folder / 'run'}",
    )  # fmt: skip
    _runs.call(folder, ["train", *words])
    for colour in COLOURS:
        Image.new("RGB", (40, 60), colour).save(folder / f"{colour}.png")
    (folder / "words.png").write_text("no picture")
    return folder


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def pictures_seen(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The images of each call of the model."""
    from vlm_train.models.generative import GenerativeModel

    seen: list[torch.Tensor] = []
    plain = GenerativeModel.generate

    def generate(self, images, *rest, **named):
        seen.append(images.clone())
        return plain(self, images, *rest, **named)

    monkeypatch.setattr(GenerativeModel, "generate", generate)
    return seen


def test_pictures_come_first_where_no_prompt_places_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = pictures_seen(monkeypatch)
    placed = "<image>\n<image>\nwhat is this?"
    for first, second in (COLOURS, COLOURS[::-1]):
        ask = ["predict", "run=run", f"image={first}.png", f"image={second}.png", "device=cpu", "max_tokens=8"]
        assert main([*ask, "prompt=what is this?", f"prompt={placed}", "prompt=a <image> b <image>?"]) == 0
    told = capsys.readouterr().out
    answers = [part.split("\n  ")[1] for part in told.split("\n\n")]
    assert len(answers) == 6 and answers[0] == answers[1] and answers[3] == answers[4]
    there, back = (images[0] for images in seen)
    assert there.shape[0] == 2 and torch.equal(there.flip(0), back)
    assert not torch.equal(there, back)  # the twin: one picture twice


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("image=red.png image=blue.png image=red.png prompt=what?", "fewer pictures at once\n  got:     3 image="),
        ("image=red.png image=blue.png prompt=<image>", "pictures than there are\n  got:     1 <image>"),
        ("image=red.png prompt=<image><image>", "pictures than there are\n  got:     2 <image>"),
        ("image=red.png image=words.png prompt=what?", "image= is no picture\n  got:     words.png: "),
        ("image=red.png image=nowhere.png prompt=what?", "image= is no file\n  got:     nowhere.png"),
    ],
)
def test_pictures_that_cannot_be_asked_about(capsys: pytest.CaptureFixture[str], asked: str, said: str) -> None:
    assert main(["predict", "run=run", "device=cpu", *asked.split()]) == 2
    assert said in capsys.readouterr().err
