"""Low-rank adapters: what they compute, what they freeze, how they are merged, and how weights find their way in."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from generative_toys import SPEC, TEXT, draw_weights
from torch import Tensor, nn

from vlm_train.errors import ConfigError
from vlm_train.models.language import FAMILIES, CausalLanguageModel
from vlm_train.models.lora import fitted, merged, plain_names
from vlm_train.models.packing import Texts

LORA = {"rank": 4, "alpha": 6.0}
ALL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
TEXTS = Texts.of([2, 3], torch.device("cpu"))
X_ND = torch.randn(5, 48, generator=torch.Generator().manual_seed(1))


def make(lora: Any = None, seed: int = 0, **changes: Any) -> CausalLanguageModel:
    torch.manual_seed(seed)
    text = CausalLanguageModel(spec=SPEC, architecture={"model_type": "llama", **TEXT, **changes}, lora=lora)
    return text.eval()


def adapted(lora: Any = LORA, **changes: Any) -> CausalLanguageModel:
    """With adapters that do something."""
    text = make(lora, **changes)
    draw_weights(text)
    return text


def of(text: nn.Module) -> Tensor:
    return text(X_ND, TEXTS).detach()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_tied", [True, False])
def test_merged_weights_say_what_weights_and_adapters_say(family: str, is_tied: bool) -> None:
    """fp64; measured 5e-15 of hidden states up to 4. The twins: another alpha, and adapters left out."""
    text = adapted(model_type=family, tie_word_embeddings=is_tied).double()
    plain = make(model_type=family, tie_word_embeddings=is_tied).double()
    state = text.state_dict()
    plain.load_state_dict(merged(state))
    assert (of_double(plain) - of_double(text)).abs().max() < 1e-12
    assert list(plain.state_dict()) == plain_names(state)
    without = {name: x for name, x in state.items() if "lora_A" not in name and "lora_B" not in name}
    for twin in ({**state, "lora_scale": torch.tensor(1.0)}, without):
        plain.load_state_dict(merged(twin))
        assert (of_double(plain) - of_double(text)).abs().max() > 1e-2


def of_double(text: nn.Module) -> Tensor:
    return text(X_ND.double(), TEXTS).detach()


def test_an_adapter_is_the_formula_of_the_paper() -> None:
    """W x + (alpha / rank) B A x, in fp64; measured 0 to 2e-15."""
    layer: Any = adapted().double().blocks[0].mlp.up_proj  # type: ignore[union-attr]
    x = torch.randn(3, 48, dtype=torch.float64)
    added = x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    assert (layer(x) - (layer.base_layer(x) + 1.5 * added)).abs().max() < 1e-12
    assert (layer(x) - (layer.base_layer(x) + added)).abs().max() > 1e-2  # the twin: without alpha / rank


def test_only_adapters_learn_and_the_first_step_begins_with_the_model_as_it_was() -> None:
    text = make(LORA)
    learning = {name for name, parameter in text.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, _ in text.named_parameters() if ".lora_" in name} and len(learning) == 2 * 7 * 2
    plain = make()
    plain.load_state_dict(merged(text.state_dict()))
    assert torch.equal(of(plain), of(text)) and not torch.equal(of(text), of(make(LORA, seed=1)))
    text(X_ND, TEXTS).square().sum().backward()
    assert all((parameter.grad is not None) == (name in learning) for name, parameter in text.named_parameters())


def test_initial_values_come_from_the_seed() -> None:
    first, again, other = (make(LORA, seed=seed).state_dict() for seed in (0, 0, 1))
    name = "network.model.layers.1.mlp.up_proj.lora_A.default.weight"
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first[name], other[name]) and first[name].abs().max() < 48**-0.5


@pytest.mark.parametrize("targets", [None, ["q_proj", "v_proj"], ["down_proj"]])
def test_targets_are_linear_layers_of_the_blocks_and_never_the_vocabulary(targets: list[str] | None) -> None:
    text = make({**LORA, "targets": targets})
    found = {name.split(".lora_A")[0] for name, _ in text.named_parameters() if ".lora_A" in name}
    assert {name.rpartition(".")[2] for name in found} == (ALL if targets is None else set(targets))
    assert all(name.startswith("network.model.layers.") for name in found)


def test_dropout_is_of_the_adapters_and_of_the_generator() -> None:
    text = adapted({**LORA, "dropout": 0.5}).train()

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return of(text)

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    text.eval()
    assert torch.equal(drawn(1), drawn(2))


def test_a_copy_and_the_meta_device_have_the_same_tensors() -> None:
    whole = adapted(tie_word_embeddings=True)
    with torch.device("meta"):
        text = make(LORA, tie_word_embeddings=True)
    assert all(parameter.is_meta for parameter in text.parameters())
    learning = [name for name, parameter in whole.named_parameters() if parameter.requires_grad]
    assert [name for name, parameter in text.named_parameters() if parameter.requires_grad] == learning
    text.to_empty(device="cpu").load_state_dict(whole.state_dict())
    for model in (text, copy.deepcopy(whole), whole):
        assert model.vocabulary is model.network.get_input_embeddings().weight  # type: ignore[operator]
        assert all(torch.equal(x, whole.state_dict()[name]) for name, x in model.state_dict().items())
    assert torch.equal(of(copy.deepcopy(whole)), of(whole))


def test_adapters_generate_as_the_merged_weights_do() -> None:
    text, plain = adapted(), make()
    plain.load_state_dict(merged(text.state_dict()))
    ids = torch.tensor([[1, 5, 9, 3]])
    answers = [
        model.generate(text.embed(ids), torch.tensor([4]), max_new_tokens=8, eos_id=2) for model in (text, plain)
    ]
    assert torch.equal(*answers)
    base = make()
    base.load_state_dict(merged({**text.state_dict(), "lora_scale": torch.zeros(())}))
    assert not torch.equal(answers[0], base.generate(text.embed(ids), torch.tensor([4]), max_new_tokens=8, eos_id=2))


def into(text: CausalLanguageModel, state: dict[str, Tensor]) -> CausalLanguageModel:
    text.load_state_dict(fitted(state, text.state_dict()))
    return text


def test_weights_go_into_a_model_with_or_without_adapters() -> None:
    """fp32; measured 2e-6 of hidden states up to 4, and 0 where nothing is merged."""
    plain, text = make(seed=3), adapted()
    draw_weights(plain)
    assert torch.equal(of(into(make(LORA), plain.state_dict())), of(plain))  # a stage without, then one with
    assert torch.equal(of(into(make(LORA), text.state_dict())), of(text))  # both with the same
    assert (of(into(make(), text.state_dict())) - of(text)).abs().max() < 2e-5  # with, then without
    for other in ({**LORA, "alpha": 12.0}, {"rank": 2, "alpha": 3.0}, {**LORA, "targets": ["q_proj"]}):
        new = into(make(other), text.state_dict())
        assert (of(new) - of(text)).abs().max() < 2e-5, other
        added = [x for name, x in new.state_dict().items() if "lora_B" in name]
        assert added and not any(x.any() for x in added)  # the old adapters are merged, the new ones begin
    kept = into(make({**LORA, "dropout": 0.3}), text.state_dict())
    assert all(torch.equal(x, text.state_dict()[name]) for name, x in kept.state_dict().items())
    twin = make({**LORA, "alpha": 12.0})  # what `fitted` is for: the same names under another alpha
    twin.load_state_dict({**text.state_dict(), "lora_scale": twin.state_dict()["lora_scale"]})
    assert (of(twin) - of(text)).abs().max() > 1e-2


def test_shapes_without_values_are_fitted_too() -> None:
    with torch.device("meta"):
        plain, text = make().state_dict(), make(LORA).state_dict()
    for state, own in ((plain, text), (text, plain), (text, text)):
        found = fitted(state, own)
        assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in own.items()}


@pytest.mark.parametrize(
    ("lora", "told"),
    [
        ({}, "rank and alpha"),
        ({"rank": 4}, "add alpha"),
        ({**LORA, "rnak": 4}, "did you mean rank"),
        ({**LORA, "rank": 0}, "rank is out of range"),
        ({**LORA, "rank": 2.5}, "rank is out of range"),
        ({**LORA, "rank": True}, "rank is out of range"),
        ({**LORA, "alpha": 0}, "alpha is out of range"),
        ({**LORA, "alpha": "much"}, "alpha is out of range"),
        ({**LORA, "dropout": 1.0}, "dropout is out of range"),
        ({**LORA, "targets": []}, "targets is empty"),
        ({**LORA, "targets": ["q_porj"]}, "q_porj"),
        ({**LORA, "targets": ["lm_head"]}, "lm_head"),
    ],
)
def test_adapters_that_cannot_be_are_refused(lora: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(lora)
    assert told in str(caught.value) and caught.value.remedy
