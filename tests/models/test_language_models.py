"""Causal language models: what a token reads in each family, tied weights, and which models and folders are refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from generative_toys import SPEC, TEXT, draw_weights, make_text
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vlm_train.errors import ConfigError
from vlm_train.models import language
from vlm_train.models.language import FAMILIES, CausalLanguageModel, left_padded
from vlm_train.models.packing import Texts
from vlm_train.types import TextSpec

LLAMA = {"model_type": "llama", **TEXT}


LENGTHS = [5, 3, 7]


def hidden_of(text: Any, ids_BT: Tensor) -> Tensor:
    """[B, T, D] of texts that are equally long."""
    num, length = ids_BT.shape
    return text(text.embed(ids_BT.flatten()), Texts.of([length] * num, ids_BT.device)).view(num, length, -1)


def alone_and_together(text: Any, texts: Texts) -> tuple[Tensor, Tensor]:
    """Hidden states of texts of 5, 3 and 7 tokens, each alone and one behind the other as `texts` says."""
    x_ND = torch.randn(sum(LENGTHS), text.width, generator=torch.Generator().manual_seed(1))
    alone = [text(part, Texts.of([len(part)], x_ND.device)) for part in x_ND.split(LENGTHS)]
    return torch.cat(alone), text(x_ND, texts)


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_read_alone_and_logits_are_products_with_the_vocabulary(family: str) -> None:
    """fp32; measured 1e-6 of hidden states up to 4, and 0 of the logits."""
    right = Texts.of(LENGTHS, torch.device("cpu"))
    as_one = Texts.of([sum(LENGTHS)], torch.device("cpu"))
    twins = {
        "one text": as_one,
        "borders forgotten, positions anew": replace(as_one, positions_N=right.positions_N),
        "positions through the row": replace(right, positions_N=3 * as_one.positions_N),
    }
    with torch.no_grad():
        text = make_text(model_type=family)
        alone, together = alone_and_together(text, right)
        assert (alone - together).abs().max() < 1e-5
        for name, twin in twins.items():
            assert torch.subtract(*alone_and_together(text, twin)).abs().max() > 1e-2, name
        ids = torch.arange(3, 13)
        theirs = text.network(input_ids=ids[None]).logits[0]
        hidden = text(text.embed(ids), Texts.of([10], ids.device))
        assert (hidden @ text.vocabulary.T - theirs).abs().max() < 1e-5


def test_left_padding_moves_every_text_to_the_same_end() -> None:
    x_BTD = torch.arange(1.0, 9).view(2, 4, 1)
    moved, mask = left_padded(x_BTD, torch.tensor([1, 3]))
    assert (moved.squeeze(-1) * mask).tolist() == [[0, 0, 1], [5, 6, 7]]
    assert mask.tolist() == [[False, False, True], [True, True, True]]


def test_attention_is_dropped_out_where_the_architecture_says_so() -> None:
    text = make_text(attention_dropout=0.5)
    x_ND, texts = torch.randn(5, 48), Texts.of([2, 3], torch.device("cpu"))
    assert not torch.equal(text.train()(x_ND, texts), text(x_ND, texts))
    assert torch.equal(text.eval()(x_ND, texts), text(x_ND, texts))


def test_a_frozen_one_runs_in_evaluation_mode_and_with_a_graph() -> None:
    text = make_text(attention_dropout=0.5).train().requires_grad_(False)
    x_ND, texts = torch.randn(5, 48, requires_grad=True), Texts.of([5], torch.device("cpu"))
    assert torch.equal(text(x_ND, texts), text(x_ND, texts))
    text(x_ND, texts).square().sum().backward()
    assert x_ND.grad is not None and x_ND.grad.any()
    assert all(parameter.grad is None for parameter in text.parameters())
    assert len(text.train().blocks) == 2 and not text.network.training


@pytest.mark.parametrize("is_tied", [True, False])
def test_what_is_tied_stays_tied_off_the_meta_device(is_tied: bool) -> None:
    with torch.device("meta"):
        text = CausalLanguageModel(spec=SPEC, architecture={**LLAMA, "tie_word_embeddings": is_tied})
    whole = make_text(tie_word_embeddings=is_tied)
    assert next(text.parameters()).is_meta and text.state_dict().keys() == whole.state_dict().keys()
    text.to_empty(device="cpu").load_state_dict(whole.state_dict())
    for model in (text, copy.deepcopy(text), whole.double()):
        assert (model.vocabulary is model.network.get_input_embeddings().weight) == is_tied  # type: ignore[operator]
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in whole.named_parameters()]


def test_every_row_of_the_embedding_learns_also_that_of_the_padding(tmp_path: Path) -> None:
    """As in a folder whose padding is its end of text: transformers would give that row no gradient."""
    folder = save(tmp_path, pad_token_id=2)
    for text in (make_text(), CausalLanguageModel(spec=SPEC, path=folder)):
        text.embed(torch.arange(64)[None]).square().sum().backward()
        gradient = text.network.get_input_embeddings().weight.grad  # type: ignore[operator]
        assert gradient.abs().amax(dim=1).min() > 0


def save(folder: Path, **keys: Any) -> str:
    """A folder of a tiny llama, in bf16, with generation options that are not greedy."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**TEXT, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, **keys})
    network = transformers.LlamaForCausalLM(config)
    draw_weights(network)
    network.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=3.0, repetition_penalty=5.0, max_length=7
    )
    network.to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def test_a_folder_is_loaded_in_fp32_and_its_generation_options_are_not_taken(tmp_path: Path) -> None:
    folder = save(tmp_path)
    text = CausalLanguageModel(spec=SPEC, path=folder)
    assert {parameter.dtype for parameter in text.parameters()} == {torch.float32} and not text.is_tied
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[1, 5, 9, 3]])
    assert torch.equal(hidden_of(text, ids) @ text.vocabulary.T, theirs(ids).logits)
    found = text.generate(text.embed(ids), torch.tensor([4]), max_new_tokens=8, eos_id=2)
    mask = torch.ones_like(ids)
    assert not torch.equal(found, theirs.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 4:])
    theirs.generation_config = transformers.GenerationConfig()
    greedy = theirs.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=2)
    assert torch.equal(found, greedy[:, 4:])
    fresh = CausalLanguageModel(spec=SPEC, path=folder, pretrained=False)
    assert fresh.vocabulary.shape == text.vocabulary.shape and not torch.equal(fresh.vocabulary, text.vocabulary)


def test_flops_are_those_that_torch_counts() -> None:
    for family in FAMILIES:
        text = make_text(model_type=family, head_dim=16) if family == "qwen3" else make_text(model_type=family)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            nn.functional.linear(text(torch.randn(11, 48), Texts.of([11], torch.device("cpu"))), text.vocabulary)
        assert text.forward_flops(11) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architecture": None}, "needs a path or an architecture"),
        ({"path": "somewhere"}, "needs a path or an architecture"),
        ({"architecture": {"model_type": "gpt2"}}, "model_type=gpt2"),
        ({"architecture": {}}, "model_type=None"),
        ({"architecture": {**LLAMA, "hiden_size": 4}}, "hidden_size"),
        ({"architecture": {**LLAMA, "vocab_size": 64}}, "vocab_size is the tokenizer's"),
        ({"architecture": {**LLAMA, "hidden_size": "wide"}}, "expected int"),
        ({"architecture": {**LLAMA, "num_attention_heads": 5}}, "not a multiple"),
        ({"architecture": {**LLAMA, "max_position_embeddings": 47}}, "context at most 47"),
        ({"architecture": {**LLAMA, "model_type": "mistral", "sliding_window": 40}}, "context at most 40"),
        ({"architecture": {**LLAMA, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}},
         "rope_type=dynamic"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CausalLanguageModel(**{"spec": SPEC, "architecture": LLAMA, **changes})
    assert told in str(caught.value) and caught.value.remedy


def test_a_folder_of_another_tokenizer_or_family_and_an_answer_without_room_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "llama")
    wide = TextSpec(vocab_size=65, context_length=8, pad_id=0, bos_id=1, eos_id=2)
    with pytest.raises(ConfigError, match="65 tokens"):
        CausalLanguageModel(spec=wide, path=folder)
    transformers.BloomConfig(vocab_size=64).save_pretrained(tmp_path / "bloom")
    with pytest.raises(ConfigError, match="model_type=bloom"):
        CausalLanguageModel(spec=SPEC, path=str(tmp_path / "bloom"))
    with pytest.raises(ConfigError, match="60 tokens and 5 new ones"):
        make_text().generate(torch.randn(1, 61, 48), torch.tensor([60]), max_new_tokens=5, eos_id=2)


def test_a_family_that_is_left_out_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin of `FAMILIES`: Granite's logits are scaled behind the vocabulary."""
    monkeypatch.setattr(language, "FAMILIES", ("granite",))
    with torch.no_grad():
        text = make_text(model_type="granite", logits_scaling=4.0)
        ids = torch.arange(3, 13)[None]
        assert (hidden_of(text, ids) @ text.vocabulary.T - text.network(input_ids=ids).logits).abs().max() > 1e-2
