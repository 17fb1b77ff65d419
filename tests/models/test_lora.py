"""Low-rank adapters: what they compute, what they freeze, how they are merged, and how weights find their way in."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from generative_toys import SPEC, TEXT, draw_weights
from torch import Tensor, nn

from vlm_train.errors import ConfigError
from vlm_train.models.language import FAMILIES, CausalLanguageModel
from vlm_train.models.lora import fitted, merged, plain_names
from vlm_train.models.nf4 import NF4Linear, num_weights, quantized
from vlm_train.models.packing import Texts

LORA = {"rank": 4, "alpha": 6.0}
QLORA = {**LORA, "quantize": "nf4"}
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


def with_adapters_of(lora: Any, text: CausalLanguageModel, **changes: Any) -> CausalLanguageModel:
    """Of the weights of `text`, quantised or not, and of its adapters as they are."""
    new, state = make(lora, **changes), text.state_dict()
    kept = {name: tensor for name, tensor in state.items() if ".lora_" in name}
    without = {**state, **{name: torch.zeros_like(x) for name, x in kept.items() if "lora_B" in name}}
    new.load_state_dict({**fitted(without, new.state_dict()), **kept})
    return new


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


@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_weights_learn_and_say_what_the_weights_that_they_stand_for_do(family: str) -> None:
    """fp64, hidden states and every gradient of adapters: measured 0 of values up to 46. The twins: weights that were
    not quantised, and the magnitudes of other rows."""
    drawn = adapted(model_type=family)
    packed = with_adapters_of(QLORA, drawn, model_type=family).double()
    plain = with_adapters_of(LORA, packed.float(), model_type=family).double()
    packed.double()
    layers = [layer for layer in packed.modules() if isinstance(layer, NF4Linear)]
    assert len(layers) == 2 * 7
    found, expected = learned(packed), learned(plain)
    assert len(found) == 1 + 2 * 2 * 7 and distance(found, expected) < 1e-9
    assert distance(learned(drawn.double()), expected) > 1e-2
    for layer in layers:
        layer.absmax.data = layer.absmax.roll(1, dims=0)
    assert distance(learned(packed), expected) > 1e-2


def learned(text: CausalLanguageModel) -> dict[str, Tensor]:
    hidden = text(X_ND.double(), TEXTS)
    text.zero_grad()
    hidden.square().sum().backward()
    gradients = {name: p.grad for name, p in text.named_parameters() if p.grad is not None}
    return {"hidden": hidden.detach(), **gradients}


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def test_weights_are_quantised_once_and_dequantised_where_they_are_merged() -> None:
    """fp32; measured 2e-6 of hidden states up to 4 where adapters are merged, and bit by bit elsewhere."""
    plain, text = make(seed=3), with_adapters_of(QLORA, adapted())
    draw_weights(plain)
    begun = into(make(QLORA), plain.state_dict()).state_dict()  # a stage without, then one with
    name = "network.model.layers.1.mlp.up_proj"
    weight = plain.state_dict()[f"{name}.weight"]
    assert all(torch.equal(x, begun[f"{name}.base_layer.{part}"])
               for part, x in zip(("weight", "absmax"), quantized(weight), strict=True))  # fmt: skip
    kept = into(make({**QLORA, "dropout": 0.3}), text.state_dict())  # both with the same
    assert all(torch.equal(x, text.state_dict()[name]) for name, x in kept.state_dict().items())
    for lora in (None, LORA, {**LORA, "rank": 2}):  # with, then without
        assert (of(into(make(lora), text.state_dict())) - of(text)).abs().max() < 2e-5
    pairs = (({**QLORA, "alpha": 12.0}, text), ({**QLORA, "rank": 2}, text), (QLORA, adapted()))
    for other, before in pairs:  # merged, then quantised with the rest
        new, dense = into(make(other), before.state_dict()).state_dict(), merged(before.state_dict())[f"{name}.weight"]
        assert torch.equal(new[f"{name}.base_layer.weight"], quantized(dense)[0])
        assert not any(x.any() for key, x in new.items() if "lora_B" in key)
    once = into(make(QLORA), into(make(), into(make(QLORA), plain.state_dict()).state_dict()).state_dict())
    assert all(torch.equal(x, begun[key]) for key, x in once.state_dict().items() if "base_layer" in key)
    rolled = {key: x.roll(1, 0) if "absmax" in key else x for key, x in text.state_dict().items()}
    swapped = {key: x << 4 | x >> 4 if x.dtype == torch.uint8 else x for key, x in text.state_dict().items()}
    for twin in (rolled, swapped):  # magnitudes of other rows, and weights that are swapped
        assert (of(into(make(), twin)) - of(text)).abs().max() > 1e-2


def test_weights_of_a_folder_are_quantised_as_they_are_read(tmp_path: Path) -> None:
    plain = make(seed=3)
    plain.network.save_pretrained(tmp_path)  # type: ignore[operator]
    text = CausalLanguageModel(spec=SPEC, path=str(tmp_path), lora=QLORA)
    found, expected = text.state_dict(), fitted(plain.state_dict(), text.state_dict())
    assert found.keys() == expected.keys() and all(torch.equal(x, expected[name]) for name, x in found.items())


@pytest.mark.parametrize("targets", [None, ["q_proj", "v_proj"]])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_has_an_adapter_is_quantised_and_nothing_else_and_merges_as_it_is(
    family: str, targets: list[str] | None
) -> None:
    """fp64; measured 0. Names of a merged state are those of a model without adapters, in order."""
    lora = {**QLORA, "targets": targets}
    text = make(lora, model_type=family)
    packed = {name for name, x in text.named_parameters() if x.dtype == torch.uint8}
    assert packed == {f"{name.split('.lora_A')[0]}.base_layer.weight"
                      for name, _ in text.named_parameters() if ".lora_A" in name}  # fmt: skip
    assert {name for name, x in text.named_parameters() if x.requires_grad} == {
        name for name, _ in text.named_parameters() if ".lora_" in name
    }
    text = with_adapters_of(lora, adapted({**LORA, "targets": targets}, model_type=family), model_type=family).double()
    plain = make(model_type=family).double()
    plain.load_state_dict(merged(text.state_dict()))
    assert (of_double(plain) - of_double(text)).abs().max() < 1e-12
    assert list(plain.state_dict()) == plain_names(text.state_dict())


def test_quantised_weights_cost_what_weights_cost() -> None:
    text, packed = make(LORA), make(QLORA)
    for flops in ("forward_flops", "frozen_flops"):
        assert getattr(packed, flops)(34) == getattr(text, flops)(34) > 0
    assert packed.frozen_flops(34) < packed.forward_flops(34)
    assert num_weights(packed) == num_weights(text) == sum(p.numel() for p in text.parameters())
    assert sum(p.numel() for p in packed.parameters()) < 0.7 * num_weights(text)  # the twin: bytes are no weights


def test_shapes_without_values_are_fitted_too() -> None:
    with torch.device("meta"):
        plain, text, packed = (make(lora).state_dict() for lora in (None, LORA, QLORA))
    pairs = [(state, own) for state in (plain, text, packed) for own in (plain, text, packed)]
    for state, own in pairs:
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
        ({**LORA, "quantize": "int8"}, "quantize is no kind"),
        ({**LORA, "targets": []}, "targets is empty"),
        ({**LORA, "targets": ["q_porj"]}, "q_porj"),
        ({**LORA, "targets": ["lm_head"]}, "lm_head"),
    ],
)
def test_adapters_that_cannot_be_are_refused(lora: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(lora)
    assert told in str(caught.value) and caught.value.remedy
