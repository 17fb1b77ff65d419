from __future__ import annotations

import pytest
import torch
from torch import nn

from vlm_train.engine.optim import AdamW, ParameterRule, match_rules
from vlm_train.errors import ConfigError


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(3, 2)
        self.objective = nn.Module()
        self.objective.logit_scale = nn.Parameter(torch.zeros(1))


def adamw(groups: list[dict]) -> AdamW:
    return AdamW(lr=1e-3, weight_decay=0.1, groups=groups)


def test_the_first_match_decides() -> None:
    rules = [ParameterRule(pattern="a.*", lr=1.0), ParameterRule(pattern=".*", lr=2.0)]
    chosen = match_rules(["a.x", "b.x"], rules)
    assert (chosen["a.x"].lr, chosen["b.x"].lr) == (1.0, 2.0)


def test_a_rule_without_a_parameter_is_an_error() -> None:
    with pytest.raises(ConfigError, match="matches no parameter"):
        match_rules(["a"], [ParameterRule(pattern=".*"), ParameterRule(pattern="b")])


def test_a_parameter_without_a_rule_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"no entry .* the parameter b"):
        match_rules(["a", "b"], [ParameterRule(pattern="a")])


def test_patterns_match_whole_names() -> None:
    with pytest.raises(ConfigError):
        match_rules(["model.weight"], [ParameterRule(pattern="model")])


def test_nothing_of_one_dimension_is_decayed() -> None:
    optimizer = adamw([{"pattern": ".*", "lr": 1e-3, "weight_decay": 0.1}]).build(Two())
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3


def test_frozen_parameters_do_not_learn_and_are_not_optimized() -> None:
    module = Two()
    optim = adamw([{"pattern": "model\\..*", "frozen": True}, {"pattern": ".*", "lr": 1e-3, "weight_decay": 0.0}])
    optim.apply_frozen(module)
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["objective.logit_scale"]
    assert sum(len(group["params"]) for group in optim.build(module).param_groups) == 1


@pytest.mark.parametrize("keys", [{"lr": 0.0}, {"lr": 1e-3, "ema_decay": 1.0}])
def test_senseless_values_are_refused(keys: dict) -> None:
    with pytest.raises(ConfigError):
        AdamW(**keys, groups=[])
