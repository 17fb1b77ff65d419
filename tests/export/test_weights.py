"""Parity of features and gradients with transformers and open_clip on the same weights; round trips bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import open_clip
import pytest
import torch
import transformers
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from torch import Tensor, nn

from vlm_train.data.tokenizer import BytePairTokenizer
from vlm_train.errors import CheckpointError, ConfigError
from vlm_train.export.hf import config_of, family_of
from vlm_train.export.openclip import TEXT
from vlm_train.export.rules import rules_for
from vlm_train.export.weights import export_state, import_state
from vlm_train.models.dual_encoder import DualEncoder
from vlm_train.models.text.transformer import TextTransformer
from vlm_train.models.vision.resnet import ResNet
from vlm_train.models.vision.vit import VisionTransformer
from vlm_train.types import Tokenizer

TEXTS = ["a red square", "two dogs, one ball and a square", "", "dogs"]
SCALE, BIAS = torch.tensor([2.5]), torch.tensor([-3.0])
TOLERANCE = 1e-6  # features measured 1.9e-7 (CLIP), 1.0e-7 (SigLIP), 1.9e-7 (open_clip)
GRADIENT_TOLERANCE = 1e-5  # relative to the largest gradient of the tensor; measured 1e-6


def transformers_clip(model: DualEncoder) -> nn.Module:
    theirs = transformers.CLIPModel(config_of(model))
    theirs.load_state_dict(export_state(model, family="clip", logit_scale=SCALE))
    return theirs


def transformers_siglip(model: DualEncoder) -> nn.Module:
    theirs = transformers.SiglipModel(config_of(model))
    theirs.load_state_dict(export_state(model, family="siglip", logit_scale=SCALE, logit_bias=BIAS))
    return theirs


def open_clip_clip(model: DualEncoder, *, quick_gelu: bool = True) -> nn.Module:
    spec = model.text_spec
    theirs = CLIP(
        24,
        CLIPVisionCfg(layers=3, width=64, head_width=32, patch_size=8, image_size=32),
        CLIPTextCfg(
            context_length=spec.context_length,
            vocab_size=spec.vocab_size,
            width=48,
            heads=3,
            layers=2,
            mlp_ratio=100 / 48,
        ),
        quick_gelu=quick_gelu,
    )
    theirs.load_state_dict(export_state(model, family="open_clip", logit_scale=SCALE))
    return theirs


def open_clip_siglip(model: DualEncoder) -> nn.Module:
    spec = model.text_spec
    vision = CLIPVisionCfg(
        timm_model_name="vit_small_for_tests_patch8_siglip_32", timm_pool="map", timm_proj="none", image_size=32
    )
    text = CLIPTextCfg(
        context_length=spec.context_length,
        vocab_size=spec.vocab_size,
        width=48,
        heads=3,
        layers=2,
        no_causal_mask=True,
        proj_bias=True,
        pool_type="last",
        norm_kwargs={"eps": 1e-6},
        act_kwargs={"approximate": "tanh"},
    )
    theirs = CustomTextCLIP(64, vision, text, init_logit_bias=-10)
    state = export_state(model, family="open_clip_timm", logit_scale=SCALE, logit_bias=BIAS)
    theirs.load_state_dict({theirs_name(name): tensor for name, tensor in state.items()})
    return theirs


def theirs_name(name: str) -> str:
    """The names of a text tower that open_clip calls custom."""
    return name if name.startswith(("visual.", "logit_")) else TEXT + name


def features_of(theirs: nn.Module, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(theirs, CLIP | CustomTextCLIP):
        return theirs.encode_image(pixels, normalize=True), theirs.encode_text(ids, normalize=True)
    output = theirs(pixel_values=pixels, input_ids=ids)
    return output.image_embeds, output.text_embeds


def largest_difference(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


CASES = pytest.mark.parametrize(
    ("name", "family", "build"),
    [
        ("clip", "clip", transformers_clip),
        ("siglip", "siglip", transformers_siglip),
        ("clip", "open_clip", open_clip_clip),
        ("siglip_of_timm", "open_clip_timm", open_clip_siglip),
    ],
    ids=["transformers-clip", "transformers-siglip", "open_clip", "open_clip-timm"],
)


@pytest.fixture
def model_and_ids(request: pytest.FixtureRequest, name: str) -> tuple[DualEncoder, Tensor, Tensor]:
    tokenizer: Tokenizer = request.getfixturevalue(f"{name.partition('_')[0]}_tokenizer")
    return request.getfixturevalue(name), *tokenizer(TEXTS)


@CASES
def test_features_and_gradients_equal_theirs(
    model_and_ids: tuple[DualEncoder, Tensor, Tensor], family: str, build: Callable[..., nn.Module], pixels: Tensor
) -> None:
    model, ids, mask = model_and_ids
    theirs = build(model)
    ours_out = model.encode_image(pixels), model.encode_text(ids, mask)
    theirs_out = features_of(theirs, pixels, ids)
    assert largest_difference(ours_out, theirs_out) < TOLERANCE
    weight = torch.randn(4, model.embed_dim, generator=torch.Generator().manual_seed(3))
    for image_features, text_features in (ours_out, theirs_out):
        ((image_features * weight).sum() + (text_features * weight.flip(0)).sum()).backward()
    ours_grad = {name: parameter.grad for name, parameter in model.named_parameters()}
    theirs_grad = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for rule in rules_for(model, family):  # type: ignore[arg-type]
        if rule.ours.startswith("logit"):
            continue
        mine = ours_grad[rule.ours]
        prefix = TEXT if f"{TEXT}token_embedding.weight" in theirs_grad and rule.ours.startswith("text") else ""
        other = rule.back(*(theirs_grad[prefix + name] for name in rule.theirs))
        # a key's bias shifts all scores of a query equally, so its gradient is rounding noise around zero
        scale = max(mine.abs().max().item(), 1e-3)
        assert (mine - other).abs().max().item() / scale < GRADIENT_TOLERANCE, rule.ours


@CASES
def test_round_trip_is_bitwise(
    model_and_ids: tuple[DualEncoder, Tensor, Tensor], family: str, build: Callable[..., nn.Module]
) -> None:
    model = model_and_ids[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    theirs = {name.removeprefix(TEXT): tensor for name, tensor in build(model).state_dict().items()}
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    extra = import_state(model, theirs, family=family)  # type: ignore[arg-type]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(extra["logit_scale"], SCALE)
    assert torch.equal(extra["logit_bias"], BIAS) if model.text_projection.bias is not None else len(extra) == 1
    again = export_state(model, family=family, **extra)  # type: ignore[arg-type]
    assert again.keys() == theirs.keys() and all(torch.equal(again[name], theirs[name]) for name in theirs)


def test_the_wrong_activation_is_seen(clip: DualEncoder, pixels: Tensor, clip_tokenizer: BytePairTokenizer) -> None:
    ids, mask = clip_tokenizer(TEXTS)
    ours = clip.encode_image(pixels), clip.encode_text(ids, mask)
    wrong = features_of(open_clip_clip(clip, quick_gelu=False), pixels, ids)
    assert largest_difference(ours, wrong) > 1e-3  # measured 7e-3


def test_an_end_token_read_one_too_late_is_seen(clip: DualEncoder, clip_tokenizer: BytePairTokenizer) -> None:
    ids, mask = clip_tokenizer(["a", "dogs"])
    right = clip.encode_text(ids, mask)
    eos_position = (ids == clip_tokenizer.spec.eos_id).int().argmax(dim=1, keepdim=True)
    late = ids.scatter(1, eos_position, 5).scatter(1, eos_position + 1, clip_tokenizer.spec.eos_id)
    assert (clip.encode_text(late, mask) - right).abs().max() > 1e-2


def test_open_clip_reads_every_text_where_we_do(clip: DualEncoder, clip_tokenizer: BytePairTokenizer) -> None:
    ids, _ = clip_tokenizer(TEXTS)
    assert torch.equal(ids.argmax(dim=1), (ids == clip_tokenizer.spec.eos_id).int().argmax(dim=1))
    assert open_clip.__version__ >= "3.3.0"


def test_a_foreign_or_partial_checkpoint_is_refused(clip: DualEncoder) -> None:
    state = export_state(clip, family="clip", logit_scale=SCALE)
    missing = {name: tensor for name, tensor in state.items() if name != "text_projection.weight"}
    with pytest.raises(CheckpointError, match=r"missing \['text_projection.weight'\]"):
        import_state(clip, missing, family="clip")
    with pytest.raises(CheckpointError, match="unexpected"):
        import_state(clip, state, family="open_clip")
    state["text_projection.weight"] = torch.zeros(3, 3)
    with pytest.raises(CheckpointError, match="another shape"):
        import_state(clip, state, family="clip")


def test_towers_that_transformers_cannot_hold_are_named(clip: DualEncoder, clip_tokenizer: BytePairTokenizer) -> None:
    spec = clip_tokenizer.spec
    text = TextTransformer(spec=spec, width=32, num_layers=1, num_heads=1, pool="mean", causal=False)
    mean = VisionTransformer(image={"size": 32}, patch_size=8, width=32, num_layers=1, num_heads=1, pool="mean")
    with pytest.raises(ConfigError) as caught:
        family_of(DualEncoder(vision=mean, text=text, embed_dim=8))
    for part in ("vision.pool=mean", "text.pool=mean", "text.causal=False"):
        assert part in str(caught.value.got)
    resnet = ResNet(image={"size": 32}, layers=[1, 1, 1, 1], width=8)
    with pytest.raises(ConfigError) as caught:
        family_of(DualEncoder(vision=resnet, text=text, embed_dim=8))
    assert "vision ResNet" in str(caught.value)
    assert family_of(clip) == "clip"
