"""Time and money by arithmetic, micro-batches that fit, and what is advised."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vlm_train.cli.compose import compose_config
from vlm_train.engine.flops import training_flops_per_sample
from vlm_train.errors import ConfigError
from vlm_train.plan.estimate import Machine, Planner
from vlm_train.plan.hardware import gpu_of

SMALL = ["model.vision.num_layers=1", "model.text.num_layers=1", "model.tokenizer.vocab_size=400"]
MACHINE = Machine(gpu=gpu_of("h100"), mfu=0.5, price=2.0, disk=1e9)


def planner(*words: str, machine: Machine = MACHINE) -> Planner:
    return Planner(compose_config([*SMALL, "schedule.warmup_steps=1", *words]), machine)


def with_memory(num_bytes: float) -> Machine:
    return replace(MACHINE, gpu=replace(MACHINE.gpu, memory=num_bytes))


def test_time_is_flops_over_what_gpus_do() -> None:
    """One pass where the share of a rank runs at once; a forward pass more where it does not."""
    made: Any = planner("trainer.global_batch=64", "trainer.max_steps=100", "trainer.micro_batch=16")
    plan = made.plan("small", [1, 4])
    flops = training_flops_per_sample(made.dry.parts.model, made.dry.sample.tokens)
    assert sum(part.flops or 0 for part in plan.parts) == pytest.approx(flops)
    once = flops * 64 / (989e12 * 0.5 * 4)
    assert plan.costs[1].step_seconds == pytest.approx(once)
    assert plan.costs[1].money == pytest.approx(once * 100 / 3600 * 4 * 2.0)
    assert plan.costs[1].mfu == pytest.approx(0.5)
    twice = (flops + plan.work.forward) * 64 / (989e12 * 0.5)
    assert [each.num_micro_batches for each in plan.settings] == [4, 1]
    assert plan.costs[0].step_seconds == pytest.approx(twice)
    assert plan.costs[0].mfu < 0.4


def test_the_largest_micro_batch_that_fits_is_taken() -> None:
    words = ["trainer.global_batch=256", "trainer.micro_batch=auto"]
    whole = planner(*words).setting(1)
    assert (whole.micro_batch, whole.fits) == (256, True)
    plan = planner(*words, machine=with_memory(0.4 * whole.memory)).plan("small", [1])
    tight = plan.settings[0]
    assert tight.fits and 8 < tight.micro_batch < 256
    assert plan.advice[0] == f"trainer.micro_batch=auto will find about {tight.micro_batch}"
    larger = planner("trainer.global_batch=256", f"trainer.micro_batch={2 * tight.micro_batch}",
                     machine=with_memory(0.4 * whole.memory)).setting(1)  # fmt: skip
    assert not larger.fits  # the twin
    share = planner("trainer.global_batch=256", "trainer.micro_batch=null", machine=with_memory(0.4 * whole.memory))
    assert (share.setting(1).micro_batch, share.setting(1).fits) == (256, False)


def test_what_does_not_fit_is_told_what_would() -> None:
    words = ["trainer.global_batch=64", "trainer.micro_batch=64"]
    whole = planner(*words).setting(1)
    plan = planner(*words, machine=with_memory(0.6 * whole.memory)).plan("small", [1])
    assert not plan.settings[0].fits and plan.advice[0].startswith("fits with trainer.micro_batch=")
    plan = planner(*words, machine=with_memory(1e3)).plan("small", [1])
    assert "does not fit" in plan.advice[0]


def test_ranks_share_state_under_fsdp2_and_copy_gradients_under_ddp() -> None:
    single, ddp, fsdp2 = (
        planner("trainer.global_batch=64", f"strategy={name}").setting(num).held
        for name, num in (("single", 1), ("ddp", 4), ("fsdp2", 4))
    )
    assert ddp.exchange == ddp.gradients == single.gradients
    assert fsdp2.optimizer < 0.3 * single.optimizer and fsdp2.gathered > 0


def test_a_rank_without_a_sample_is_refused() -> None:
    with pytest.raises(ConfigError, match="no sample"):
        planner("trainer.global_batch=64").plan("small", [65])
    with pytest.raises(ConfigError, match="no such GPU"):
        gpu_of("h10")
