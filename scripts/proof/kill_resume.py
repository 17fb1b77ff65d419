"""Kill training runs with SIGKILL at random instants; what they tell must be what a run that nobody touched tells.

    python scripts/proof/kill_resume.py            a few kills of each kind: one process, DDP and FSDP2 on two
    python scripts/proof/kill_resume.py --full     210 kills

Instants are spread over start-up, steps, the writing of a checkpoint, its commit and evaluation; what is killed is a
random rank or the launcher. Every column of metrics.jsonl is compared as text but for the three that measure the
machine, and after each kill the newest checkpoint must verify and not be older than the newest before.

The controls: another seed for the data order, which must differ; and a writer that fills folders again in place of
committing new ones, killed between the same calls, which must leave checkpoints that do not verify.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import _runs
from _killing import EVALUATE_EVERY, PHASES, Killer, run_writer
from _table import Row, arguments, report

from vlm_train.engine import checkpoints
from vlm_train.errors import CheckpointError

NUM_STEPS = 60
MACHINES: dict[str, tuple[str, ...]] = {
    "one process": (),
    "DDP on two": ("trainer.devices=2", "strategy=ddp"),
    "FSDP2 on two": ("trainer.devices=2", "strategy=fsdp2"),
}
KILLS = {"one process": (8, 110), "DDP on two": (1, 50), "FSDP2 on two": (1, 50)}  # short form, full form


def main() -> int:
    options = arguments(__doc__)
    rows, counts = [], Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        data = _runs.make_scenes(Path(folder))
        for machine in MACHINES:
            place = Path(folder) / machine.replace(" ", "-")
            place.mkdir()
            num_kills = KILLS[machine][options.full]
            num_different, num_lost, phases = torment(place, data, machine, num_kills)
            counts += phases
            print(f"{machine}: {num_kills} kills ({told(phases)}), {num_different} steps differ, {num_lost} lost")
            rows.append((machine, num_kills, num_different, num_lost))
        control = num_different_with_another_seed(Path(folder), data)
        writer = {kind: num_bad_of_writer(Path(folder) / kind, kind) for kind in ("committed", "in-place")}
    print(f"kills by phase: {told(counts)}")
    table = [
        Row(claim=f"steps that differ after {kills} kills, {machine}", value=different, bar=0, sense="==",
            control=control)
        for machine, kills, different, _ in rows
    ]  # fmt: skip
    lost = sum(row[3] for row in rows) + writer["committed"]
    claim = f"kills of {counts.total()} runs and {NUM_WRITERS} writers after which the newest checkpoint was bad"
    table.append(Row(claim=claim, value=lost, bar=0, sense="==", control=writer["in-place"]))
    return report(table, options.json)


def told(phases: Counter[str]) -> str:
    return ", ".join(f"{phases[phase]} {phase}" for phase in PHASES)


def words_of(data: Path, run: Path, machine: str) -> list[str]:
    common = (f"trainer.max_steps={NUM_STEPS}", "checkpoint.every_steps=3", "data.num_workers=1",
              f"evaluation.every_steps={EVALUATE_EVERY}", f"run.dir={run}")  # fmt: skip
    return _runs.train_words(data, *common, *MACHINES[machine])


def torment(folder: Path, data: Path, machine: str, num_kills: int) -> tuple[int, int, Counter[str]]:
    """(steps that differ, checkpoints lost, kills by phase) of as many runs as the kills need."""
    untouched = folder / "untouched"
    _runs.call(folder, words_of(data, untouched, machine))
    choose, phases, num_different, num_lost, number = random.Random(3), Counter[str](), 0, 0, 0
    began = time.monotonic()
    while phases.total() < num_kills:
        number += 1
        run = folder / f"run-{number}"
        words = words_of(data, run, machine)
        killer = Killer(folder, words, run, num_ranks=2 if MACHINES[machine] else 1, choose=choose)
        is_finished, newest = False, 0
        while not is_finished and phases.total() < num_kills:
            aim = PHASES[phases.total() % len(PHASES)] if num_kills > 1 else "commit"
            met = killer.kill_in(aim)
            is_finished = met is None
            if met is not None:
                phases[met] += 1
                before, newest = newest, newest_good(run)
                num_lost += newest < before
                if phases.total() % 10 == 0:
                    print(f"  {machine}: {phases.total()} kills in {time.monotonic() - began:.0f} s", flush=True)
        if not is_finished:
            _runs.call(folder, words)
        num_different += num_different_lines(run, untouched)
    return num_different, num_lost, phases


def newest_good(run: Path) -> int:
    """The step of the newest checkpoint if that one verifies; -1 where it is bad, 0 where there is none."""
    found = checkpoints.named(run / "checkpoints")[-1:]
    try:
        for path in found:
            checkpoints.verify(path)
    except CheckpointError as error:
        print(f"  lost: {error}")
        return -1
    return checkpoints.step_of(found[0]) if found else 0


def num_different_with_another_seed(folder: Path, data: Path) -> int:
    """The control of the steps."""
    other = folder / "other"
    _runs.call(folder, [*words_of(data, other, "one process"), "seed=1"])
    return num_different_lines(other, folder / "one-process" / "untouched")


NUM_WRITERS = 20


def num_bad_of_writer(folder: Path, kind: str) -> int:
    """How often the newest checkpoint of a killed writer does not verify."""
    (folder / "checkpoints").mkdir(parents=True)
    num_bad, choose = 0, random.Random(5)
    for _ in range(NUM_WRITERS):
        run_writer(folder, kind, choose.randint(1, 60))
        num_bad += any(newest_is_bad(path) for path in checkpoints.named(folder / "checkpoints"))
    return num_bad


def newest_is_bad(path: Path) -> bool:
    try:
        checkpoints.verify(path)
    except CheckpointError:
        return True
    return False


def num_different_lines(left: Path, right: Path) -> int:
    """Lines that are not equal, missing ones included."""
    first, second = _runs.learned(left).splitlines(), _runs.learned(right).splitlines()
    longest = max(len(first), len(second))
    pad = [""] * longest
    return sum(a != b for a, b in zip((first + pad)[:longest], (second + pad)[:longest], strict=True))


if __name__ == "__main__":
    sys.exit(main())
