"""`vlm-train plan`: what a config takes of memory, time and money, before anything of it is there."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_train.cli.arguments import Arguments, parse
from vlm_train.cli.options import count, number, out_file, taken, whole
from vlm_train.cli.paths import groups
from vlm_train.cli.slurm_time import ALLOWED, seconds_of
from vlm_train.errors import ConfigError, VlmError

if TYPE_CHECKING:
    from vlm_train.cli.stages import Stages
    from vlm_train.plan.estimate import Machine, Plan

USAGE = """usage: vlm-train plan [experiment=NAME] [group=choice] [key=value] [gpu=NAME] [gpus=N,N,...] [--json FILE]
       vlm-train plan --all [gpu=NAME] [gpus=N] [--json FILE]

  vlm-train plan experiment=clip_b16 gpu=h100 gpus=8,16,64 mfu=0.4
  vlm-train plan experiment=flip_b16 gpu=h100 gpus=64 walltime=24:00:00
  vlm-train plan --all

From the config alone, without a GPU, weights or data: parameters and FLOPs by module, memory of a rank, steps, hours,
GPU hours, money, checkpoints; and what would fit better. Weights, gradients and optimizer state are exact, activations
are those of one step that runs on shapes, time is FLOPs over what the GPUs do at a given utilisation.

  gpu=NAME           kind of GPU; h100 if left out: h200, h100, h100-nvl, h100-pcie, a100, a100-40gb, l40s, l4, a10,
                     v100, t4, rtx-4090, rtx-3090
  gpus=N,N,...       on how many; trainer.devices x trainer.num_nodes if left out
  mfu=X              share of the GPU's peak while a step computes; 0.35 if left out
  price=USD          of a GPU for an hour, in place of what is assumed of the kind
  walltime=TIME      of a job, as SLURM takes it (H:MM:SS); how many of them the run takes
  samples=N          of the dataset, for epochs; the manifest's if it is there
  tokens=N           of a text or dialogue; the longest that the model reads if left out
  disk=GB            a second, of checkpoints; 1 if left out
  --all              one line for each experiment
  --json FILE        also write it all as JSON"""

GPU, MFU, DISK = "h100", 0.35, 1.0
"""What is planned for where the words do not say: a kind, a share of its peak, gigabytes a second."""
KEYS = {"gpu": "NAME", "gpus": "N,N,...", "mfu": "SHARE", "price": "USD", "walltime": "H:MM:SS", "samples": "N",
        "tokens": "N", "disk": "GB"}  # fmt: skip


def main(words: list[str]) -> int:
    """Runs the verb."""
    if any(word in ("-h", "--help") for word in words):
        print(USAGE)
        return 0
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a hub that cannot be reached is asked for half a minute a model
    rest, is_all, file = split_flags(words)
    arguments = parse(rest, KEYS, verb="plan", rest=True)
    nums_gpus = arguments.optional("gpus", _counts)
    walltime = arguments.optional("walltime", _walltime)
    samples = arguments.optional("samples", count())
    if is_all:
        return _all(arguments, nums_gpus, file)
    from vlm_train.cli.plan_page import described

    plans = _plans(arguments.overrides, machine_of(arguments), nums_gpus, arguments.optional("tokens", count()))
    print("\n".join(described(plans, machine_of(arguments), walltime, samples)))
    write(file, {plan.name: asdict(plan) for plan in plans})
    return 0


def machine_of(arguments: Arguments) -> Machine:
    """What is planned for. Raises ConfigError."""
    mfu = arguments.optional("mfu", number(0.01, 1.0, example=MFU), MFU)
    price = arguments.optional("price", number(0.0, 1e6, example=2.0))
    disk = arguments.optional("disk", number(0.001, 1e6, example=DISK), DISK)
    from vlm_train.plan.estimate import Machine
    from vlm_train.plan.hardware import gpu_of

    gpu = gpu_of(arguments.optional("gpu", default=GPU))
    return Machine(gpu=gpu, mfu=mfu, price=gpu.price if price is None else price, disk=disk * 1e9)


def _walltime(name: str, text: str) -> int:
    seconds = seconds_of(text)
    if not seconds:
        raise ConfigError(f"{name} is no time", got=text, allowed=f"{ALLOWED}, above 0",
                          remedy=f"{name}24:00:00")  # fmt: skip
    return seconds


def _counts(name: str, text: str) -> list[int]:
    one = whole(1, 1 << 20, what="is no number of GPUs")
    return [one(name, part or text) for part in text.split(",")]  # nothing between commas: all of it is shown


def split_flags(words: list[str]) -> tuple[list[str], bool, Path | None]:
    """The other words, whether `--all` is among them, and the file of `--json`. Raises ConfigError."""
    rest, files = taken(words, "--json")
    rest, folders = taken(rest, "--config-dir")
    others = [word for word in rest if word != "--all"]
    file = out_file("--json", files[-1]) if files else None
    return [*others, *(f"--config-dir={folder}" for folder in folders)], "--all" in rest, file


def _plans(
    words: list[str], machine: Machine, nums_gpus: list[int] | None, tokens: int | None, *, briefly: bool = False
) -> list[Plan]:
    """A plan for each stage of the config that these words describe. Raises ConfigError."""
    from vlm_train.cli.compose import compose_config
    from vlm_train.cli.stages import compose_stages

    config = compose_config(words)
    return plans_of(config, compose_stages(config, words), machine, nums_gpus, tokens, briefly=briefly)


def plans_of(
    config: Any,
    stages: Stages,
    machine: Machine,
    nums_gpus: list[int] | None = None,
    tokens: int | None = None,
    *,
    briefly: bool = False,
) -> list[Plan]:
    """A plan for each stage of a run, or for the run where it has none. Raises ConfigError."""
    from vlm_train.plan.estimate import Planner

    plans = []
    for name, stage in (stages or {config.run.experiment: config}).items():
        planner = Planner(stage, machine, tokens, briefly=briefly)
        default = [stage.trainer.devices * stage.trainer.num_nodes]
        plans.append(planner.plan(name, nums_gpus or default))
    return plans


def _all(arguments: Arguments, nums_gpus: list[int] | None, file: Path | None) -> int:
    """One line for each experiment, and why one cannot be planned."""
    from vlm_train.cli.plan_page import HEADER, assumptions
    from vlm_train.data.parallel import map_in_processes

    machine, tokens = machine_of(arguments), arguments.optional("tokens", count())
    names = groups()["experiment"]
    brief = functools.partial(
        _brief, words=arguments.overrides, machine=machine, nums_gpus=nums_gpus and nums_gpus[:1], tokens=tokens
    )
    told: dict[str, Any] = {}
    print(HEADER, flush=True)
    for name, (line, content) in zip(names, map_in_processes(brief, names, chunk_size=1), strict=True):
        told[name] = content
        print(line, flush=True)
    print("\n".join(["", *assumptions(machine)]))
    write(file, told)
    return 1 if all(isinstance(content, dict) for content in told.values()) else 0  # not one could be planned


def _brief(
    name: str, words: list[str], machine: Machine, nums_gpus: list[int] | None, tokens: int | None
) -> tuple[str, Any]:
    """(line, what --json tells) of an experiment."""
    from vlm_train.cli.plan_page import summary

    try:
        plans = _plans([f"experiment={name}", *words], machine, nums_gpus, tokens, briefly=True)
    except VlmError as error:
        return f"{name:22} cannot be planned: {error.what.splitlines()[0]}", {"cannot be planned": error.what}
    return summary(name, plans), [asdict(plan) for plan in plans]


def write(file: Path | None, content: Any) -> None:
    """Writes what `--json` asked for. Raises VlmError where the file cannot be written."""
    if file is None:
        return
    try:
        file.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise VlmError(f"--json cannot be written: {error.strerror}", got=file, allowed="a disk with room",
                       remedy="choose another place for --json") from error  # fmt: skip
