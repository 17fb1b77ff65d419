"""A generative model in the hands of transformers is LLaVA, number by number and token by token; and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from llava_toys import (
    SIGLIP,
    answering,
    check_twin_is_refused,
    drawing,
    make_model,
    make_vision,
    refusal_of,
    save_llava,
    save_tower,
    words,
)
from torch import Tensor

from vlm_train.errors import CheckpointError, ConfigError
from vlm_train.export.certificate import TOLERANCE, Prepare
from vlm_train.export.folders import compare, export_model, read_model
from vlm_train.export.llava import LlavaInTransformers, their_processor
from vlm_train.export.llava_config import is_unread
from vlm_train.export.rules import rules_for
from vlm_train.export.speaking import their_tokenizer
from vlm_train.models.connectors.linear import LinearConnector, MLPConnector
from vlm_train.models.connectors.pixel_shuffle import PixelShuffleConnector
from vlm_train.models.generative import GenerativeModel
from vlm_train.models.vision.vit import ConvVisionTransformer
from vlm_train.types import ImageSpec, Tokenizer

NEW = 8
QUESTIONS = ["<image>\nWhat is it?", "Is there a dog?", "<image>\nIs there a red square above the blue circle?", "Why?"]
MODELS: dict[str, Callable[[Tokenizer, Path], GenerativeModel]] = {
    "llava-1.5": lambda tokenizer, place: make_model(tokenizer),
    "tied": lambda tokenizer, place: make_model(tokenizer, architecture={"tie_word_embeddings": True}),
    "class-token": lambda tokenizer, place: make_model(tokenizer, feature_layer=-1, drop_class_token=False),
    "siglip": lambda tokenizer, place: make_model(tokenizer, vision=make_vision(**SIGLIP), feature_layer=-1),
    "squashed": lambda tokenizer, place: make_model(
        tokenizer, vision=make_vision(image={"size": 32, "resize": "squash", "mean": [0.5, 0.4, 0.5]})
    ),
    "linear": lambda tokenizer, place: make_model(tokenizer, connector=LinearConnector, feature_layer=-3),
    "qwen2": lambda tokenizer, place: make_model(tokenizer, architecture={"model_type": "qwen2"}),
    "mistral": lambda tokenizer, place: make_model(
        tokenizer, architecture={"model_type": "mistral", "sliding_window": None, "head_dim": 16}
    ),
    "clip-of-transformers": lambda tokenizer, place: make_model(tokenizer, vision=save_tower("clip", place)),
    "siglip-of-transformers": lambda tokenizer, place: make_model(
        tokenizer, vision=save_tower("siglip", place), feature_layer=-1
    ),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return words()


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path: Path) -> GenerativeModel:
    return MODELS[request.param](tokenizer, tmp_path / "tower")


def load(out: Path) -> tuple[Any, Any]:
    """As a user of transformers has them."""
    return (transformers.AutoModelForImageTextToText.from_pretrained(out).eval(),
            transformers.AutoProcessor.from_pretrained(out, backend="pil"))  # fmt: skip


def asked(processor: Any, texts: list[str]) -> tuple[Any, list[Any]]:
    """What transformers makes of questions, and their pictures."""
    pictures = [drawing(number) for number, text in enumerate(texts) if "<image>" in text]
    written = []
    for text in texts:
        parts = [*[{"type": "image"}] * text.count("<image>"), {"type": "text", "text": text.removeprefix("<image>\n")}]
        turns = [{"role": "user", "content": parts}]
        written.append(processor.apply_chat_template(turns, add_generation_prompt=True))
    return processor(text=written, images=pictures, padding=True, return_tensors="pt"), pictures


def our_answers(model: GenerativeModel, ids: list[list[int]], images: Tensor, stop_id: int) -> Tensor:
    """Greedy ones of ours to the prompts, whose images are normalised pixels [B, 1, 3, S, S]."""
    lengths = torch.tensor([len(row) for row in ids])
    ids_BT = torch.zeros(len(ids), int(lengths.max()), dtype=torch.int64)
    for row, prompt in enumerate(ids):
        ids_BT[row, : len(prompt)] = torch.tensor(prompt)
    has_image = torch.tensor(["<image>" in text for text in QUESTIONS]).long()
    return model.generate(images, has_image, ids_BT, lengths, max_new_tokens=NEW, eos_id=stop_id)


def test_an_exported_model_answers_as_ours_from_the_ids_of_its_own_processor(
    model: GenerativeModel, tokenizer: Tokenizer, prepare: Callable[[ImageSpec], Prepare], out: Path
) -> None:
    """In a batch of prompts of four lengths, two of them with a picture."""
    trained: Any = answering(model, tokenizer)
    own = prepare(model.image_spec)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = export_model(trained, target="transformers", out=out, prepare=own)
    assert report.certificate is not None and report.certificate.has_tokens and report.family == "llava"
    assert report.certificate.logits < 1e-5  # measured 3.1e-6 of logits up to 5
    assert report.certificate.pixels is not None and report.certificate.pixels < 1.5  # measured 1.0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    theirs, processor = load(out)
    inputs, _ = asked(processor, QUESTIONS)
    found = theirs.generate(**inputs, max_new_tokens=NEW, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    prompts = [trained.prompt(text) for text in QUESTIONS]
    image_id = theirs.config.image_token_index
    for row, prompt in enumerate(prompts):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
        assert [-1 if number == image_id else number for number in ids] == prompt
    images = torch.zeros(4, 1, 3, 32, 32)
    images[[0, 2], 0] = inputs["pixel_values"]
    ours = our_answers(model, prompts, images, trained.stop_id)
    assert len({tuple(row) for row in ours.tolist()}) >= 3
    for mine, other in zip(ours.tolist(), found.tolist(), strict=True):
        length = mine.index(trained.stop_id) + 1 if trained.stop_id in mine else NEW
        assert mine[:length] == other[:length]


def test_what_goes_out_comes_back_bitwise_and_goes_out_the_same(
    model: GenerativeModel, tokenizer: Tokenizer, out: Path, tmp_path: Path
) -> None:
    export_model(answering(model, tokenizer), target="transformers", out=out)
    foreign = read_model(str(out))
    again: Any = foreign.trained(None)
    theirs, state = load(out)[0].state_dict(), again.model.state_dict()
    num_words = model.text.vocab_size
    assert again.model.text.vocab_size == num_words + 1
    for rule in rules_for(model, "llava"):
        mine = rule.back(*(theirs[name] for name in rule.theirs))
        is_vocabulary = "embed_tokens" in rule.ours or "lm_head" in rule.ours
        assert torch.equal(mine[:num_words] if is_vocabulary else mine, model.state_dict()[rule.ours])
        if not rule.ours.startswith("vision.network"):
            assert torch.equal(mine, state[rule.ours]), rule.ours
    assert again.model.image_spec == model.image_spec
    assert again.model.tokens_per_image == model.tokens_per_image
    assert compare(again, foreign.load()).logits < 1e-5
    tokenizer_again = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer_again.convert_tokens_to_ids("<image>") == num_words == len(tokenizer_again) - 1


@pytest.mark.parametrize(
    ("vision", "text", "changes"),
    [
        ({}, {}, {}),
        ({}, {"tie_word_embeddings": True, "pad_token_id": 0}, {"vision_feature_layer": 2}),
        ({}, {"model_type": "qwen3", "head_dim": 8}, {"vision_feature_layer": -1, "image_seq_length": 17,
                                                      "vision_feature_select_strategy": "full"}),
        ({"model_type": "siglip_vision_model"}, {"model_type": "mistral", "sliding_window": None},
         {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}),
        ({"model_type": "siglip_vision_model", "vision_use_head": False}, {"model_type": "qwen2"},
         {"vision_feature_select_strategy": "full"}),
    ],
    ids=["clip", "tied-counted-from-the-front", "whole-clip-qwen3", "siglip-mistral", "siglip-qwen2"],
)  # fmt: skip
def test_a_model_that_transformers_saved_comes_in_and_goes_out_bitwise(
    vision: Any, text: Any, changes: Any, tokenizer: Tokenizer, out: Path, tmp_path: Path
) -> None:
    """What LLaVA reads of it. Its vocabulary has rows to spare, of which the token of images takes one."""
    num_tokens = tokenizer.spec.vocab_size + 5
    theirs = save_llava(tmp_path / "theirs", vision=vision, text=text, num_tokens=num_tokens, **changes)
    foreign = read_model(str(tmp_path / "theirs"))
    trained: Any = foreign.trained(None)
    assert compare(trained, foreign.load()).logits < 1e-5 and foreign.notes == []
    assert trained.model.tokens_per_image == theirs.config.image_seq_length

    export_model(answering(trained.model, tokenizer), target="transformers", out=out)
    again, state = load(out)[0], theirs.state_dict()
    read = {name for name in state if not is_unread(name, theirs.config)}
    assert len(read) > 40 and read <= again.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], state[name]) for name in read)
    for key in ("num_hidden_layers", "hidden_size", "hidden_act", "layer_norm_eps", "model_type"):
        assert getattr(again.config.vision_config, key) == getattr(theirs.config.vision_config, key)
    assert again.config.vision_feature_layer in (-1, -2)


@pytest.mark.parametrize("size", [16, 32, 48])
@pytest.mark.parametrize("patch_size", [4, 8, 16])
@pytest.mark.parametrize("kind", ["clip", "whole-clip", "siglip"])
def test_the_processor_counts_the_tokens_of_an_image_as_our_dialogues_do(
    size: int, patch_size: int, kind: str, tokenizer: Tokenizer
) -> None:
    tower = make_vision(image={"size": size}, patch_size=patch_size, **(SIGLIP if kind == "siglip" else {}))
    model = make_model(tokenizer, vision=tower, drop_class_token=kind != "whole-clip")
    processor = their_processor(model, their_tokenizer(answering(model, tokenizer)))
    ids = processor(text="<image> a <image>", images=[drawing(0), drawing(1)])["input_ids"][0]
    assert ids.count(processor.image_token_id) == 2 * model.dialogue.num_image_tokens
    assert model.dialogue.num_image_tokens == (size // patch_size) ** 2 + (kind == "whole-clip")


TWINS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "a layer too early": ("config.json", lambda config: config.update(vision_feature_layer=-3)),
    "another activation": ("config.json", lambda config: config["vision_config"].update(hidden_act="gelu")),
    "another mean": ("processor_config.json", lambda config: config["image_processor"].update(image_mean=[0.5] * 3)),
    "a token too many": ("processor_config.json", lambda config: config.update(num_additional_image_tokens=2)),
}


@pytest.mark.parametrize("twin", list(TWINS))
def test_a_folder_that_is_another_model_is_refused(
    twin: str, tokenizer: Tokenizer, prepare: Callable[[ImageSpec], Prepare], out: Path
) -> None:
    model = make_model(tokenizer)
    trained, own = answering(model, tokenizer), prepare(model.image_spec)
    export_model(trained, target="transformers", out=out, prepare=own)
    least = 100 * TOLERANCE  # measured 1.1 and 0.008
    check_twin_is_refused(out, TWINS[twin], lambda: compare(trained, LlavaInTransformers(out), prepare=own), least)


@pytest.mark.parametrize("layer", [-1, -3])
def test_a_layer_before_or_behind_is_another_model(layer: int, tmp_path: Path) -> None:
    save_llava(tmp_path)
    trained = read_model(str(tmp_path)).trained(None)
    document = json.loads((tmp_path / "config.json").read_text())
    assert document["vision_feature_layer"] == -2
    said = refusal_of(
        tmp_path,
        "config.json",
        lambda config: config.update(vision_feature_layer=layer),
        lambda: compare(trained, LlavaInTransformers(tmp_path)),
    )
    assert float(said[2].rstrip(",")) > 1000 * TOLERANCE  # measured 1.0 and 1.6


def test_another_chat_template_and_a_disturbed_weight_are_noticed(tokenizer: Tokenizer, out: Path) -> None:
    model: Any = make_model(tokenizer)
    export_model(answering(model, tokenizer), target="transformers", out=out)
    with pytest.raises(CheckpointError, match="tokens False"):
        compare(answering(model, tokenizer, "vicuna"), LlavaInTransformers(out))
    with torch.no_grad():
        model.connector.layers[0].bias[0] += 0.05
    with pytest.raises(CheckpointError, match="not the same model"):
        compare(answering(model, tokenizer), LlavaInTransformers(out))


@pytest.mark.parametrize(
    ("template", "system"),
    [("plain", None), ("vicuna", None), ("vicuna", ""), ("llama3", "Be brief."), ("mistral", 'Say "yes" or\nno.')],
)
def test_every_template_is_the_one_of_the_folder(
    template: str, system: str | None, tokenizer: Tokenizer, out: Path
) -> None:
    trained = answering(make_model(tokenizer), tokenizer, template, system)
    report = export_model(trained, target="transformers", out=out)
    assert report.certificate is not None and report.certificate.has_tokens
    assert load(out)[0].generation_config.eos_token_id == trained.stop_id


def test_the_token_of_images_is_never_an_answer(tokenizer: Tokenizer, out: Path) -> None:
    """Its row is the mean of the others, so greedy it never wins, and drawn it is left out."""
    model = make_model(tokenizer, architecture={"tie_word_embeddings": True})
    export_model(answering(model, tokenizer), target="transformers", out=out)
    theirs, processor = load(out)
    rows = theirs.lm_head.weight
    assert rows.data_ptr() == theirs.get_input_embeddings().weight.data_ptr()
    assert torch.allclose(rows[-1], rows[:-1].mean(dim=0)) and len(rows) == model.text.vocab_size + 1
    inputs, _ = asked(processor, QUESTIONS)
    logits = theirs(**inputs).logits
    assert (logits[..., -1] < logits[..., :-1].amax(dim=-1)).all()
    assert theirs.generation_config.suppress_tokens == [len(rows) - 1]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"feature_layer": None}, "feature_layer=None"),
        ({"connector": partial(MLPConnector, num_layers=3)}, "MLPConnector of 3 layers"),
        ({"connector": PixelShuffleConnector}, "PixelShuffleConnector"),
        ({"vision": {"pre_norm": False}}, "'pool': 'cls', 'pre_norm': False"),
        ({"vision": {"pool": "mean"}}, "'pool': 'mean', 'pre_norm': True"),
        ({"vision": ConvVisionTransformer}, "ConvVisionTransformer"),
    ],
)
def test_parts_that_llava_has_not_are_refused_by_name(
    changes: dict[str, Any], told: str, tokenizer: Tokenizer, out: Path
) -> None:
    changes = dict(changes)
    if changes.get("vision") is ConvVisionTransformer:
        changes["vision"] = ConvVisionTransformer(image={"size": 32}, patch_size=8, width=32, num_layers=3, num_heads=2)
    elif "vision" in changes:
        changes["vision"] = make_vision(**changes["vision"])
    with pytest.raises(ConfigError) as caught:
        export_model(answering(make_model(tokenizer, **changes), tokenizer), target="transformers", out=out)
    assert told in str(caught.value.got) and "feature_layer=-2" in str(caught.value.remedy) and not out.exists()


def test_open_clip_has_no_such_model(tokenizer: Tokenizer, out: Path) -> None:
    with pytest.raises(ConfigError, match="no model that answers"):
        export_model(answering(make_model(tokenizer), tokenizer), target="open_clip", out=out)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"vision_feature_layer": [-2, -1]}, "vision_feature_layer=[-2, -1]"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias=False"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act=relu"),
        ({"projector_hidden_act": "linear"}, "two linears with nothing between them"),
        ({"text": {"model_type": "gemma", "head_dim": 12}}, "text_config.model_type=gemma"),
        ({"vision": {"hidden_act": "relu"}}, "hidden_act=relu"),
        ({"vision": {"model_type": "siglip_vision_model"}}, "vision_feature_select_strategy=default"),
        ({"vision": {"image_size": 40}}, "image_size=40, processor 32"),
    ],
)
def test_what_our_models_are_not_is_refused_by_name(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    save_llava(tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        read_model(str(tmp_path))
    assert told in str(caught.value)
