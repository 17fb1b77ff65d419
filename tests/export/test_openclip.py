"""open_clip's folders and files: what we write it loads to the same model, and what it wrote comes in bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm_train.data.tokenizer import BytePairTokenizer
from vlm_train.errors import CheckpointError, ConfigError
from vlm_train.export import openclip
from vlm_train.export.certificate import TOLERANCE, Trained, certify
from vlm_train.export.folders import ExportReport, export_model, read_model
from vlm_train.export.openclip_config import node_of
from vlm_train.export.towers import model_from
from vlm_train.models.dual_encoder import DualEncoder
from vlm_train.types import ImageSpec, Tokenizer

SCALE, BIAS = torch.tensor([3.0]), torch.tensor([-4.0])
SMALL: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 300, "width": 48, "heads": 3, "layers": 2},
}


def export(
    model: DualEncoder, tokenizer: Tokenizer, out: Path, *, bias: Tensor | None = None, verify: bool = True
) -> ExportReport:
    trained = Trained(model=model, tokenizer=tokenizer, logit_scale=SCALE, logit_bias=bias)
    return export_model(trained, target="open_clip", out=out, verify=verify)


def config_with(**changes: Any) -> dict[str, Any]:
    """SMALL with `vision_KEY`, `text_KEY` and KEY changed."""
    config: dict[str, Any] = json.loads(json.dumps(SMALL))
    for key, value in changes.items():
        tower, _, name = key.partition("_")
        node = config[f"{tower}_cfg"] if tower in ("vision", "text") else config
        node[name if tower in ("vision", "text") else key] = value
    return config


def open_clip_model(config: dict[str, Any]) -> Any:
    torch.manual_seed(5)
    kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    model = kind(**{key: value for key, value in config.items() if key != "custom_text"})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def save_folder(config: dict[str, Any], folder: Path, images: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """A folder as open_clip pushes it to a hub; returns the tensors."""
    folder.mkdir(parents=True)
    state = {name: tensor.detach().clone() for name, tensor in open_clip_model(config).state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    document = {"model_cfg": config, "preprocess_cfg": images or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    return state


@pytest.mark.parametrize(
    ("name", "bias"),
    [("clip", None), ("clip", BIAS), ("siglip_of_timm", BIAS)],
    ids=["softmax", "sigmoid", "timm"],
)
def test_open_clip_loads_what_we_write(
    request: pytest.FixtureRequest, name: str, bias: Tensor | None, out: Path
) -> None:
    model: DualEncoder = request.getfixturevalue(name)
    tokenizer: Tokenizer = request.getfixturevalue(f"{name.partition('_')[0]}_tokenizer")
    report = export(model, tokenizer, out, bias=bias)
    assert report.certificate is not None and report.certificate.has_tokens and report.left_out_bias is None
    assert report.certificate.features < 1e-6  # measured 1.9e-7
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    spec = model.image_spec
    assert theirs.visual.preprocess_cfg["mean"] == list(spec.mean) and "bicubic" in str(preprocess)
    grey = Image.new("RGB", (50, 40), (128, 0, 255))
    expected = model.normalize(torch.tensor([128, 0, 255], dtype=torch.uint8).view(1, 3, 1, 1))[0]
    assert torch.allclose(preprocess(grey), expected.expand(3, 32, 32), atol=1e-6)
    assert "open_clip.create_model_and_transforms" in (out / "README.md").read_text()


@pytest.mark.parametrize("name", ["clip", "siglip_of_timm"])
def test_ours_to_theirs_to_ours_is_bitwise(request: pytest.FixtureRequest, name: str, out: Path) -> None:
    model: DualEncoder = request.getfixturevalue(name)
    tokenizer: Tokenizer = request.getfixturevalue(f"{name.partition('_')[0]}_tokenizer")
    export(model, tokenizer, out, bias=BIAS, verify=False)
    again = read_model(str(out)).trained(tokenizer)
    assert again.model.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.model.state_dict()[key], tensor) for key, tensor in model.state_dict().items())
    assert torch.equal(again.logit_scale, SCALE) and again.logit_bias is not None
    assert torch.equal(again.logit_bias, BIAS)
    assert again.model.image_spec == model.image_spec and again.model.text_spec == model.text_spec


SIGLIP_TEXT = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
TIMM = {"image_size": 32, "timm_model_name": "vit_small_for_tests_patch8_siglip_32", "timm_pool": "map",
        "timm_proj": "none"}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        config_with(),
        config_with(quick_gelu=True),
        config_with(vision_mlp_ratio=2.6, text_mlp_ratio=1.7, text_act_kwargs={"approximate": "tanh"}),
        config_with(text_pool_type="eos", text_eos_id=7, init_logit_bias=-10.0),
        config_with(text_pool_type="last", text_no_causal_mask=True, text_proj_bias=True, custom_text=True),
        {**config_with(), "embed_dim": 64, "vision_cfg": TIMM, "text_cfg": {**SMALL["text_cfg"], **SIGLIP_TEXT},
         "custom_text": True, "init_logit_bias": -10.0},
    ],
    ids=["plain", "quick-gelu", "ratios", "eos", "custom-text", "siglip"],
)  # fmt: skip
def test_a_model_that_open_clip_made_comes_in_and_goes_out_bitwise(
    config: dict[str, Any], tmp_path: Path, clip_tokenizer: BytePairTokenizer
) -> None:
    theirs = save_folder(config, tmp_path / "theirs")
    foreign = read_model(str(tmp_path / "theirs"))
    trained = foreign.trained(None)
    found = certify(trained.reference(), foreign.load())
    assert found.features < 1e-6  # measured 1.8e-7
    written = Trained(
        model=trained.model,
        tokenizer=clip_tokenizer,  # of another vocabulary, which nothing reads here
        logit_scale=trained.logit_scale,
        logit_bias=trained.logit_bias,
    )
    export_model(written, target="open_clip", out=tmp_path / "ours", verify=False)
    again = load_file(tmp_path / "ours" / "open_clip_model.safetensors")
    flat = {name.removeprefix("text."): tensor for name, tensor in again.items()}
    theirs = {name.removeprefix("text."): tensor for name, tensor in theirs.items()}
    assert flat.keys() == theirs.keys() and all(torch.equal(flat[name], theirs[name]) for name in theirs)
    open_clip.create_model(f"local-dir:{tmp_path / 'ours'}")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vision_layers": [3, 4, 6, 3]}, "ModifiedResNet"),
        ({"vision_ls_init_value": 0.1}, "vision_cfg.ls_init_value=0.1"),
        ({"vision_no_ln_pre": True}, "vision_cfg.no_ln_pre=True"),
        ({"vision_pool_type": "avg"}, "vision_cfg.pool_type=avg"),
        ({"vision_attentional_pool": True}, "vision_cfg.attentional_pool=True"),
        ({"vision_patch_size": [8, 16]}, "vision_cfg.patch_size=[8, 16]"),
        ({"vision_cfg": {**TIMM, "timm_pool": "avg"}}, "vision_cfg.timm_pool=avg"),
        ({"vision_cfg": {**TIMM, "timm_model_name": "resnet18"}}, "vision_cfg.timm_model_name=resnet18"),
        ({"text_hf_model_name": "roberta-base"}, "text_cfg.hf_model_name=roberta-base"),
        ({"text_embed_cls": True}, "text_cfg.embed_cls=True"),
        ({"text_no_causal_mask": True}, "no_causal_mask=True with unmasked padding"),
        ({"text_from_the_future": 1}, "text_cfg.from_the_future=1"),
        ({"multimodal_cfg": {"width": 8}}, "multimodal_cfg"),
    ],
)
def test_what_our_towers_are_not_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    config = {**config_with(), **changes} if "vision_cfg" in changes else config_with(**changes)
    with pytest.raises(ConfigError) as caught:
        node_of(config, {})
    assert said in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        node_of(config_with(), {"resize_mode": "longest"})
    assert "resize_mode=longest" in str(caught.value)


def is_read(name: str) -> bool:
    try:
        node_of(open_clip.get_model_config(name), {})
    except ConfigError as error:
        assert "parts that our towers do not have" in error.what and "=" in str(error.got)
        return False
    return True


def test_every_architecture_of_open_clip_is_read_or_refused_by_name() -> None:
    names = [name for name in open_clip.list_models() if "SigLIP" not in name]  # timm takes a second to make each
    plain = {name for name in names if name.startswith("ViT-") and "CLIPA" not in name} - {"ViT-M-16-alt"}
    assert {name for name in names if is_read(name)} - {"small"} == plain and len(plain) > 30
    assert is_read("ViT-B-16-SigLIP") and is_read("ViT-B-32-SigLIP2-256")  # exact GELU, and tanh


def test_preprocessing_comes_along_or_is_told(tmp_path: Path) -> None:
    images = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.5], "resize_mode": "squash", "interpolation": "bilinear"}
    save_folder(config_with(), tmp_path / "theirs", images)
    foreign = read_model(str(tmp_path / "theirs"))
    spec = model_from(foreign.node, foreign.spec).image_spec
    assert spec == ImageSpec(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 0.5), resize="squash")
    assert len(foreign.notes) == 1 and "bilinear" in foreign.notes[0]


@pytest.mark.parametrize(
    ("vision", "text", "said"),
    [
        ({"pool": "mean"}, {}, "vision.pool=mean"),
        ({"pre_norm": False}, {}, "vision.pre_norm=False"),
        ({}, {"pool": "mean", "causal": False}, "text.pool=mean, text.causal=False"),
        ({"activation": "quick_gelu"}, {}, "vision.activation=quick_gelu"),
        ({"pool": "map", "pre_norm": False, "num_layers": 1}, {}, "image_projection=linear"),
    ],
)
def test_what_open_clip_cannot_hold_is_refused_by_name(
    clip_tokenizer: BytePairTokenizer, out: Path, vision: dict[str, Any], text: dict[str, Any], said: str
) -> None:
    node = {
        "embed_dim": 8,
        "vision": {"image": {"size": 32}, "patch_size": 8, "width": 32, "num_layers": 1, "num_heads": 1, **vision},
        "text": {"width": 32, "num_layers": 1, "num_heads": 1, **text},
    }
    with pytest.raises(ConfigError) as caught:
        export(model_from(node, clip_tokenizer.spec), clip_tokenizer, out)
    assert said in str(caught.value) and not out.exists()


def test_a_siglip_tower_that_timm_has_not_is_refused(
    siglip: DualEncoder, siglip_tokenizer: Tokenizer, out: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        export(siglip, siglip_tokenizer, out)  # gelu_tanh, where timm's have the exact GELU
    assert "activation=gelu_tanh" in str(caught.value)


def disturb_a_weight(folder: Path) -> None:
    path = folder / "open_clip_model.safetensors"
    state = load_file(path)
    state["visual.transformer.resblocks.1.mlp.c_fc.bias"][3] += 0.05
    save_file(state, path)


def take_the_other_gelu(folder: Path) -> None:
    path = folder / "open_clip_config.json"
    document = json.loads(path.read_text())
    document["model_cfg"]["quick_gelu"] = False
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("damage", [disturb_a_weight, take_the_other_gelu])
def test_a_folder_that_is_another_model_is_noticed(
    clip: DualEncoder, clip_tokenizer: BytePairTokenizer, out: Path, damage: Callable[[Path], None]
) -> None:
    export(clip, clip_tokenizer, out, verify=False)
    trained = Trained(model=clip, tokenizer=clip_tokenizer, logit_scale=SCALE).reference()
    certify(trained, openclip.OpenClipModel.from_folder(out))
    damage(out)
    with pytest.raises(CheckpointError, match="not the same model") as caught:
        certify(trained, openclip.OpenClipModel.from_folder(out))
    assert float(str(caught.value.got).split()[2].rstrip(",")) > 10 * TOLERANCE  # measured 1.9e-4 and 5.9e-3


@pytest.mark.parametrize("ending", ["pt", "bin", "safetensors"])
def test_a_file_with_a_named_architecture(tmp_path: Path, ending: str) -> None:
    """As open_clip's training leaves it: inside a checkpoint, behind the name of a wrapper, in half precision."""
    (tmp_path / "small.json").write_text(json.dumps(config_with()))
    open_clip.add_model_config(tmp_path / "small.json")
    state = {name: tensor.detach().half() for name, tensor in open_clip_model(config_with()).state_dict().items()}
    path = tmp_path / f"weights.{ending}"
    if ending == "safetensors":
        save_file(state, path)
    else:
        wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
        torch.save({"epoch": 3, "name": "run", "state_dict": wrapped}, path)
    foreign = read_model(str(path), "small")
    assert torch.equal(foreign.state["visual.proj"], state["visual.proj"].float())
    assert certify(foreign.trained(None).reference(), foreign.load()).features < 1e-6
    assert len(foreign.notes) == 1 and "does not say" in foreign.notes[0]
    for name, said in ((None, "no architecture="), ("smalll", "architecture=small")):
        with pytest.raises(ConfigError) as caught:
            read_model(str(path), name)
        assert said in str(caught.value)


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("this must never run",))


def test_a_pickle_that_needs_more_than_tensors_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "extra": Evil()}, path)
    with pytest.raises(ConfigError, match="cannot be read as weights alone"):
        read_model(str(path), "ViT-B-32")
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), str(path))
    with pytest.raises(ConfigError, match="cannot be read as weights alone"):
        read_model(str(path), "ViT-B-32")
    path.write_bytes(b"no archive")
    with pytest.raises(ConfigError, match="cannot be read as weights alone"):
        read_model(str(path), "ViT-B-32")
    assert "never run" not in capsys.readouterr().out
