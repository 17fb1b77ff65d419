"""State dicts by the rules of a family, both ways. Nothing may be left over on either side."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from vlm_train.errors import CheckpointError
from vlm_train.export.rules import Family, rules_for
from vlm_train.models.lora import merged


def export_state(
    model: nn.Module, *, family: Family, logit_scale: Tensor | None = None, logit_bias: Tensor | None = None
) -> dict[str, Tensor]:
    """The model's tensors under the names of `family`, detached copies on the CPU; adapters are merged.

    Args:
        model: towers that `family` can hold.
        family: see `rules.Family`.
        logit_scale: [1], the logarithm of the temperature's inverse; a generative model has none.
        logit_bias: [1]; SigLIP always has it, open_clip's models may.

    Raises:
        CheckpointError: tensors without a rule, or rules without a tensor.
    """
    state = merged({name: tensor.detach().cpu() for name, tensor in model.state_dict().items()})
    extra = {"logit_scale": logit_scale, "logit_bias": logit_bias}
    state |= {name: tensor.detach().cpu() for name, tensor in extra.items() if tensor is not None}
    rules = rules_for(model, family, with_bias=logit_bias is not None)
    _check_names(state, {rule.ours for rule in rules}, side="our model")
    return {
        name: tensor.clone()
        for rule in rules
        for name, tensor in zip(rule.theirs, rule.forth(state[rule.ours]), strict=True)
    }


def import_state(model: nn.Module, state: Mapping[str, Tensor], *, family: Family) -> dict[str, Tensor]:
    """Loads a state dict of `family` into `model`; returns `logit_scale` [1] and `logit_bias` [1] where it has them.

    Raises:
        CheckpointError: names or shapes that do not fit.
    """
    rules = rules_for(model, family, with_bias="logit_bias" in state)
    _check_names(state, {name for rule in rules for name in rule.theirs}, side=f"the {family} checkpoint")
    ours = {rule.ours: rule.back(*(state[name] for name in rule.theirs)) for rule in rules}
    extra: dict[str, Tensor] = {name: ours.pop(name) for name in ("logit_scale", "logit_bias") if name in ours}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = {name: tuple(tensor.shape) for name, tensor in ours.items() if tuple(tensor.shape) != shapes[name]}
    if wrong:
        raise CheckpointError(
            f"a {family} checkpoint has tensors of another shape",
            got=wrong,
            allowed={name: shapes[name] for name in wrong},
            remedy="build the model with the sizes of the checkpoint",
        )
    model.load_state_dict(ours)
    return extra


def _check_names(state: Mapping[str, Tensor], expected: set[str], *, side: str) -> None:
    if state.keys() != expected:
        raise CheckpointError(
            f"the tensors of {side} are not those of this model",
            got=f"unexpected {sorted(state.keys() - expected)[:5]}, missing {sorted(expected - state.keys())[:5]}",
            remedy="check the number of layers, the pooling and the family",
        )
