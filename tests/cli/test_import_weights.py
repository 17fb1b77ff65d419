"""`vlm-train import`: foreign folders become runs that the other verbs read, and go out again bit for bit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, SiglipConfig, SiglipImageProcessor, SiglipModel

from vlm_train.cli.compose import compose_config
from vlm_train.cli.main import main
from vlm_train.data.tokenizer import BytePairTokenizer
from vlm_train.engine.report import write_report
from vlm_train.engine.rundir import RunDirectory
from vlm_train.export import hf
from vlm_train.schema import check

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as other libraries leave them: `clip` and `siglip` of transformers, `open_clip`."""
    home = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    words = BytePairTokenizer.train(["a cat, two dogs"], vocab_size=280, context_length=20)
    text = {**TOWER, "max_position_embeddings": 20, "vocab_size": 280}
    ends = {"bos_token_id": words.spec.bos_id, "eos_token_id": words.spec.eos_id, "pad_token_id": words.spec.pad_id}
    config = CLIPConfig(vision_config={**TOWER, "image_size": 32, "patch_size": 8}, text_config=text | ends)
    CLIPModel(config).save_pretrained(home / "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(home / "clip")
    words.save(str(home / "clip"))
    (home / "clip" / "text_spec.json").unlink()  # as others keep a tokenizer
    text = {**TOWER, "max_position_embeddings": 20, "vocab_size": 300, "projection_size": 32}
    config = SiglipConfig(vision_config={**TOWER, "image_size": 32, "patch_size": 8}, text_config=text)
    SiglipModel(config).save_pretrained(home / "siglip")
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(home / "siglip")
    (home / "open_clip").mkdir()
    (home / "open_clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL, "preprocess_cfg": {}}))
    save_file(open_clip.CLIP(**SMALL).state_dict(), home / "open_clip" / "open_clip_model.safetensors")
    drawing = np.random.default_rng(0).integers(0, 256, (5, 40, 50, 3), dtype=np.uint8)
    (home / "photos").mkdir()
    for number, pixels in enumerate(drawing):
        Image.fromarray(pixels).save(home / "photos" / f"{number}.png")
    return home


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(home)


def certificate(printed: str) -> list[float]:
    return [float(text) for text in re.findall(r"largest difference of .+? (\d\.\de[-+]\d+)", printed)]


@pytest.mark.parametrize(
    ("name", "target", "file"),
    [("clip", "transformers", "model.safetensors"), ("open_clip", "open_clip", "open_clip_model.safetensors")],
)
def test_a_foreign_model_becomes_a_run_and_goes_out_bitwise(
    home: Path, capsys: pytest.CaptureFixture[str], name: str, target: str, file: str
) -> None:
    run = home / "runs" / "imported" / name
    assert main(["import", f"from={name}", f"out={run}"]) == 0
    printed = capsys.readouterr().out
    found = certificate(printed)
    assert len(found) == 3 and found[0] < 1e-6, printed  # features measured 2.1e-7
    assert "tokens                               the same" in printed
    assert main(["predict", f"run={run}", "text=a cat", "images=photos", "device=cpu"]) == 0
    assert len(re.findall(r"\d\.png", capsys.readouterr().out)) == 5
    out = home / f"{name}-again"
    assert main(["export", f"run={run}", f"out={out}", f"format={target}"]) == 0
    assert certificate(capsys.readouterr().out)[0] < 1e-6
    theirs, again = load_file(home / name / file), load_file(out / file)
    assert theirs.keys() == again.keys() and all(torch.equal(theirs[key], again[key]) for key in theirs)


def test_a_model_without_tokenizer_is_imported_and_says_so(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = home / "bare"
    assert main(["import", "from=siglip", f"out={run}"]) == 0
    printed = capsys.readouterr().out
    assert certificate(printed)[0] < 1e-6 and "without a tokenizer: it comes without one" in printed
    assert "not compared" in printed
    assert main(["predict", f"run={run}", "text=a", "images=photos", "device=cpu"]) == 2
    assert "tokenizer" in capsys.readouterr().err
    BytePairTokenizer.train(["a cat, two dogs"], vocab_size=280, context_length=20, pad_to_max=True).save("words")
    (home / "words" / "text_spec.json").unlink()  # as others keep one
    run = home / "whole"
    assert main(["import", "from=siglip", f"out={run}", "tokenizer=words"]) == 0
    assert main(["predict", f"run={run}", "text=a cat", "images=photos", "device=cpu"]) == 0
    assert len(re.findall(r"\d\.png", capsys.readouterr().out)) == 5


def test_a_training_can_take_the_imported_model(home: Path) -> None:
    run = home / "for-training"
    assert main(["import", "from=open_clip", f"out={run}", "verify=false"]) == 0
    config = compose_config(["--config-dir", str(run / "conf"), "model=imported"])
    check(config)
    assert config.model.vision.width == 32 and config.model.tokenizer.path.endswith("for-training/tokenizer")


def test_evaluate_measures_an_imported_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "make", "scenes", "scenes", "--num-samples", "40", "--seed", "1", "--size", "32"]) == 0
    run = home / "evaluated"
    assert main(["import", "from=open_clip", f"out={run}", "verify=false"]) == 0
    words = [f"run={run}", "data.val.shards=scenes/val", "out=scores.json", "device=cpu"]
    assert main(["evaluate", *words]) == 0
    assert "retrieval" in json.loads((home / "scores.json").read_text())["results"]
    write_report(RunDirectory(run))
    assert "finished" in (run / "report.html").read_text()
    assert main(["train", f"run.resume={run}", "--config-dir", str(run / "conf"), "model=imported"]) == 0
    assert "is finished already" in capsys.readouterr().out  # nothing trains over the weights that came in


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["from=nowhere/at/all", "out=x"], "not where the config says"),
        (["from=photos", "out=x"], "holds no model that can be imported"),
        (["from=clip", "out=photos"], "out= is in use"),
        (["from=clip"], "needs out="),
        (["out=x"], "needs from="),
        (["from=clip", "out=x", "architecture=ViT-B-32"], "says its architecture itself"),
        (["from=siglip", "out=x", "tokenizer=photos"], "cannot be loaded"),
        (["from=siglip", "out=x", "tokenizer=package:open-clip-torch"], "more tokens than the model has rows"),
        (["from=open_clip/open_clip_model.safetensors", "out=x", "architecture=ViT-B-3"], "architecture=ViT-B-32"),
        (["from=open_clip/open_clip_config.json", "out=x", "architecture=ViT-B-32"], "weights alone"),
        (["from=clip", "out=x", "verify=perhaps"], "no such choice"),
    ],
)
def test_what_import_refuses(home: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert main(["import", *words]) == 2
    assert said in capsys.readouterr().err and not (home / "x").exists()


def test_weights_that_are_not_those_of_the_config_leave_no_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(home / "open_clip", home / "wrong")
    document = {"model_cfg": {**SMALL, "embed_dim": 17}, "preprocess_cfg": {}}
    (home / "wrong" / "open_clip_config.json").write_text(json.dumps(document))
    assert main(["import", "from=wrong", "out=x"]) == 1
    assert "another shape" in capsys.readouterr().err and not (home / "x").exists()


def test_an_import_that_is_another_model_is_refused_and_leaves_no_run(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(hf.FROM_TRANSFORMERS, "quick_gelu", "gelu")  # the classic mistake
    assert main(["import", "from=clip", "out=x"]) == 1
    assert "not the same model" in capsys.readouterr().err and not (home / "x").exists()
