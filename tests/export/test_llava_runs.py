"""`vlm-train export` and `import` of models that answer: LLaVA and Idefics2 come in as runs, and go out bit for bit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from idefics2_toys import make_idefics
from llava_toys import answering, make_model, words
from PIL import Image
from safetensors.torch import load_file

from vlm_train import build, origins
from vlm_train.cli.compose import compose_config
from vlm_train.cli.main import main
from vlm_train.cli.trained import pinned
from vlm_train.export import hf
from vlm_train.export.folders import export_model
from vlm_train.schema import check, read_config


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llava` and `idefics2`, as `export` writes them, and a picture."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = words()
    for name, model in (("llava", make_model(tokenizer)), ("idefics2", make_idefics(tokenizer))):
        export_model(answering(model, tokenizer), target="transformers", out=home / name, verify=False)
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(home / "one.png")
    return home


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(home)


def certificate(printed: str) -> list[float]:
    return [float(text) for text in re.findall(r"largest difference of .+? (\d\.\de[-+]\d+)", printed)]


@pytest.mark.parametrize("name", ["llava", "idefics2"])
def test_it_becomes_a_run_that_answers_and_goes_out_bitwise(
    name: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = home / "runs" / "imported" / name
    assert main(["import", f"from={name}", f"out={run}"]) == 0
    printed = capsys.readouterr().out
    found = certificate(printed)
    assert len(found) == 2 and found[0] < 1e-5 and found[1] < 1.5, printed  # logits measured 3.1e-6
    assert "tokens                               the same" in printed and "note" not in printed
    assert read_config(run).data.template == "chatml" and 'image=FILE prompt="..."' in printed
    assert main(["predict", f"run={run}", "image=one.png", "prompt=what?", "device=cpu", "max_tokens=4"]) == 0
    assert "what?" in capsys.readouterr().out
    out = home / f"{name}-again"
    assert main(["export", f"run={run}", f"out={out}"]) == 0
    printed = capsys.readouterr().out
    assert certificate(printed)[0] < 1e-5 and "AutoModelForImageTextToText" in printed
    theirs, again = load_file(home / name / "model.safetensors"), load_file(out / "model.safetensors")
    assert theirs.keys() == again.keys() and all(torch.equal(theirs[key], again[key]) for key in theirs)
    assert json.loads((home / name / "config.json").read_text()) == json.loads((out / "config.json").read_text())
    assert (home / name / "chat_template.jinja").read_text() == (out / "chat_template.jinja").read_text()


def test_a_training_starts_from_an_imported_llava(home: Path) -> None:
    run = home / "llava-start"
    assert main(["import", "from=llava", f"out={run}", "verify=false"]) == 0
    parts = build.load(run)
    conf = ["--config-dir", str(run / "conf"), "model=imported", "objective=next_token", "evaluation=vqa"]
    config = compose_config([*conf, f"init={run}", "data.template=chatml", "model.max_images=2"])
    check(config)
    config.init = pinned(config.init)
    tokenizer = origins.tokenizer(config)
    assert tokenizer is not None
    started = build.network(config, tokenizer)
    assert not torch.equal(started.model.connector.layers[0].weight, parts.model.connector.layers[0].weight)
    origins.start(started, origins.trained_weights(origins.start_checkpoint(config.init)), whose="it")
    assert all(torch.equal(started.model.state_dict()[key], value) for key, value in parts.model.state_dict().items())
    assert started.model.feature_layer == -2 and len(started.model.vision.blocks) == 2


def test_a_llava_whose_chat_template_is_not_ours_says_so(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("llava", home / "other")
    (home / "other" / "chat_template.jinja").write_text("Q {{ messages[0]['content'] }} A")
    run = home / "other-run"
    assert main(["import", "from=other", f"out={run}"]) == 0
    printed = capsys.readouterr().out
    assert "no template of ours" in printed and "not compared" in printed and certificate(printed)[0] < 1e-5
    assert read_config(run).data.template == "vicuna"


def test_a_llava_that_is_another_model_is_refused_and_leaves_no_run(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(hf.FROM_TRANSFORMERS, "quick_gelu", "gelu")
    assert main(["import", "from=llava", "out=x"]) == 1
    assert "not the same model" in capsys.readouterr().err and not (home / "x").exists()
    monkeypatch.undo()
    monkeypatch.chdir(home)
    assert main(["import", "from=llava", "out=z", "verify=false"]) == 0
    assert main(["export", "run=z", "out=y", "format=open_clip"]) == 2
    assert "no model that answers" in capsys.readouterr().err and not (home / "y").exists()
