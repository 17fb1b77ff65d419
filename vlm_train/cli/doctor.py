"""`vlm-train doctor`: whether this machine, and what a run asks of it, is as it should be, before the run begins."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_train.cli.options import out_file, taken
from vlm_train.errors import VlmError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from vlm_train.doctor.findings import Check, Finding

USAGE = """usage: vlm-train doctor [train's words] [--json FILE]

  vlm-train doctor                                        this machine
  vlm-train doctor experiment=quickstart logger=wandb     and what this run needs: its data, ranks, disk, login
  srun --nodes=2 --ntasks-per-node=1 vlm-train doctor     each machine of a cluster

Looks at versions, cores, memory, limits, name and clock, GPUs, driver, arithmetic, all-reduce, the disk, the data, W&B
and SLURM. Green: as it should be. Yellow: works, worse or at a risk. Red: will not work; exit code 1."""

_COLOURS = {"green": 32, "yellow": 33, "red": 31}


def main(words: list[str]) -> int:
    """Runs the verb."""
    if any(word in ("-h", "--help") for word in words):
        print(USAGE)
        return 0
    words, file = parted(words)
    from vlm_train.doctor.findings import RED
    from vlm_train.doctor.machine import ranks

    findings = list(_told([ranks]))  # before all else: our modules ask for the rank when they are imported
    from vlm_train.cli.compose import compose_config
    from vlm_train.cli.stages import compose_stages

    config = compose_config(words) if words else None
    stages = list(compose_stages(config, words).values()) or [config] if config is not None else []
    findings += _told(checks_of(config, stages))
    lights = [finding.light for finding in findings]
    print(f"\n{', '.join(f'{lights.count(light)} {light}' for light in _COLOURS)}")
    if file is not None:
        rows = [{"name": f.name, "light": f.light, "seen": f.seen, "remedy": f.remedy} for f in findings]
        file.write_text(json.dumps({"host": os.uname().nodename, "findings": rows}, indent=1) + "\n")
    return 1 if RED in lights else 0


def _told(checks: Iterable[Check]) -> Iterator[Finding]:
    """What the checks find, printed as they find it."""
    from vlm_train.doctor.findings import found

    for finding in found(checks):
        print(_line(finding), flush=True)
        yield finding


def parted(words: list[str]) -> tuple[list[str], Path | None]:
    """(words of train, the file of --json). Raises ConfigError."""
    rest, files = taken(words, "--json")
    return rest, out_file("--json", files[-1]) if files else None


def checks_of(config: Any, stages: Iterable[Any] = ()) -> Iterator[Check]:
    """The checks of a machine, and of a run where there is a config; `stages`: the configs that it trains."""
    from vlm_train.doctor import cluster, devices, machine, software, storage, tracking

    trainer = config.trainer if config is not None else None
    folder = _existing(Path(config.run.dir or "runs") if config is not None else Path("runs"))
    num_ranks = trainer.devices if trainer is not None else 1
    yield software.versions
    yield partial(machine.cores, num_ranks, config.data.num_workers if config is not None else 0)
    yield machine.memory
    yield machine.limits
    yield machine.name
    yield partial(machine.clock, folder)
    yield devices.gpus
    yield devices.arithmetic
    yield partial(_all_reduce, num_ranks if config is not None else None)
    yield partial(_disk, folder, config, stages)
    if config is not None:
        from vlm_train.schema import plain

        for split in ("train", "val"):
            shards = plain(config.data[split].shards)
            if shards:
                yield partial(storage.data, split, shards)
        yield partial(tracking.wandb, config.logger.name, config.logger.mode)
    yield cluster.slurm


def _disk(folder: Path, config: Any, stages: Iterable[Any]) -> Iterator[Finding]:
    """The disk of the runs; against the checkpoints of a run, the largest of its stages, where they can be planned."""
    from vlm_train.doctor import storage

    if config is None:
        return storage.disk(folder)
    from vlm_train.plan.dry import DryRun
    from vlm_train.plan.memory import checkpoint_bytes

    try:
        largest = max(checkpoint_bytes(DryRun(stage)) for stage in stages)
    except VlmError:
        return storage.disk(folder)
    return storage.disk(folder, largest / 1e9, config.checkpoint.keep)


def _all_reduce(num_ranks: int | None) -> Iterator[Finding]:
    """Among the ranks of this machine: as many as are asked for, else one for each GPU."""
    import tempfile

    import torch

    from vlm_train.cli.launcher import launch
    from vlm_train.doctor.devices import of_link
    from vlm_train.doctor.findings import RED, Finding

    num = num_ranks or torch.cuda.device_count()
    if num < 2:
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rate.json"
        try:
            why = "" if launch([str(file)], num, module="vlm_train.cli.doctor") == 0 else "see what was printed above"
        except VlmError as error:
            why = error.what
        if why:
            yield Finding("all_reduce", RED, f"{num} ranks of this machine cannot talk to each other: {why}",
                          "NCCL_DEBUG=INFO tells more")  # fmt: skip
            return
        backend, rate = json.loads(file.read_text())
    yield of_link(backend, num, rate)


def measure(arguments: list[str]) -> None:
    """What each rank of the measurement runs."""
    from vlm_train.doctor.devices import all_reduce_rate

    found = all_reduce_rate()
    if os.environ["RANK"] == "0":
        Path(arguments[0]).write_text(json.dumps(found))


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def _line(finding: Finding) -> str:
    light = f"{finding.light:6}"
    if sys.stdout.isatty():
        light = f"\x1b[{_COLOURS[finding.light]}m{light}\x1b[0m"
    remedy = f"\n{'':24}-> {finding.remedy}" if finding.remedy else ""
    return f"{light} {finding.name:16} {finding.seen}{remedy}"


if __name__ == "__main__":
    from vlm_train.cli.rank import run_rank

    run_rank(measure, sys.argv[1:])
