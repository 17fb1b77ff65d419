"""What `vlm-train plan` says of memory is what the real module, optimizer and step of a config take.

    python scripts/proof/plan.py               a minute on two cores
    python scripts/proof/plan.py --full        every experiment that can be built here

Weights, gradients, optimizer state and moving average are compared byte by byte; what autograd keeps and the most that
is there at once, with what is counted while a real step runs. Wrong twins: a plan that gives state to what is frozen,
and one that forgets that activations are computed again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import _planned
from _table import Row, arguments, report

from vlm_train.cli.compose import compose_config
from vlm_train.cli.paths import groups
from vlm_train.cli.stages import compose_stages
from vlm_train.errors import VlmError
from vlm_train.plan.estimate import Machine, Planner
from vlm_train.plan.hardware import gpu_of

MACHINE = Machine(gpu=gpu_of("h100"), mfu=0.4, price=3.0, disk=1e9)
NUM_ROWS = 4
LARGEST = 700e6
"""Bytes of weights of what is built with values."""
SHORT = ("quickstart", "llava_tiny", "imagebind_scenes")


def main(argv: list[str] | None = None) -> int:
    options = arguments(__doc__.splitlines()[0], argv)
    rows = [recomputed()]
    for name in groups()["experiment"] if options.full else SHORT:
        try:
            for stage, config in stages(name):
                rows += compared(f"{name} {stage}".strip(), config)
        except VlmError as error:
            print(f"{name} cannot be planned: {error.what.splitlines()[0]}", flush=True)
    return report(rows, options.json)


def stages(name: str) -> Iterator[tuple[str, Any]]:
    """The stages of an experiment, or the whole of one without."""
    words = [f"experiment={name}", "trainer.accelerator=cpu", "trainer.micro_batch=null"]
    config = compose_config(words)
    yield from compose_stages(config, words).items() or [("", config)]


def compared(name: str, config: Any) -> list[Row]:
    """Rows of one config; none where it is too large to be built here."""
    config.trainer.global_batch, config.trainer.devices, config.strategy.name = NUM_ROWS, 1, "single"
    planner = Planner(config, MACHINE)
    setting = planner.setting(1)
    if setting.held.weights > LARGEST:
        print(f"{name} is not built here: {setting.held.weights / 1e9:.3g} GB", flush=True)
        return []
    real = _planned.Real(config, num_rows=NUM_ROWS).step()
    held = setting.held
    differ = sum(
        abs(told - found)
        for told, found in (
            (held.weights, real.weights),
            (held.gradients, real.gradients),
            (held.optimizer, real.optimizer),
            (held.average, real.average),
        )
    )
    frozen = sum(p.nbytes for p in planner.dry.learner.parameters() if not p.requires_grad)
    return [
        Row(
            claim=f"{name}: bytes held that differ",
            value=differ,
            bar=0,
            sense="==",
            control=2 * frozen if frozen else None,
        ),
        off(f"{name}: activations kept, % off", setting.activations.kept, real.kept),
        off(f"{name}: the most at once, % off", setting.working, real.peak),
    ]


def recomputed() -> Row:
    """Of the quickstart with strategy.recompute; the twin keeps what it could compute again."""
    words = ["experiment=quickstart", "trainer.accelerator=cpu", f"trainer.global_batch={NUM_ROWS}"]
    plain, config = compose_config(words), compose_config([*words, "strategy.recompute=true"])
    real = _planned.Real(config, num_rows=NUM_ROWS).step()
    told, twin = (Planner(each, MACHINE).setting(1).activations.kept for each in (config, plain))
    return off("quickstart, recomputed: activations kept, % off", told, real.kept, twin)


def off(claim: str, told: float, found: float, twin: float | None = None) -> Row:
    """By how many percent a plan and what was found differ."""
    control = None if twin is None else 100 * abs(twin / found - 1)
    return Row(claim=claim, value=100 * abs(told / found - 1), bar=10, sense="<=", control=control)


if __name__ == "__main__":
    sys.exit(main())
