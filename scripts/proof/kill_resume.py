"""Kill a training run with SIGKILL again and again; the joined metrics.jsonl must be that of a run nobody touched.

    python scripts/proof/kill_resume.py            3 kills on one process and on two
    python scripts/proof/kill_resume.py --full     20 kills each

Every column is compared as text but for the three that measure the machine. The control resumes with another seed for
the data order, which must differ.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import _runs
from _table import Row, arguments, report

NUM_STEPS = 60
DDP = ("trainer.devices=2", "strategy=ddp")


def main() -> int:
    options = arguments(__doc__)
    num_kills = 20 if options.full else 3
    with tempfile.TemporaryDirectory() as folder:
        rows = prove(Path(folder), (), num_kills, "one process") + prove(Path(folder), DDP, num_kills, "two processes")
    return report(rows, options.json)


def prove(folder: Path, machine: tuple[str, ...], num_kills: int, label: str) -> list[Row]:
    """Rows for one machine: steps that differ, and how often the run was killed."""
    data = folder / "scenes" if (folder / "scenes").exists() else _runs.make_scenes(folder)
    common = (f"trainer.max_steps={NUM_STEPS}", "checkpoint.every_steps=7", "data.num_workers=2", *machine)
    name = label.replace(" ", "-")
    runs = {kind: folder / f"{name}-{kind}" for kind in ("untouched", "killed", "other")}
    words = {kind: _runs.train_words(data, *common, f"run.dir={path}") for kind, path in runs.items()}
    _runs.call(folder, words["untouched"])
    _runs.call(folder, [*words["other"], "seed=1"])
    steps = sorted(random.Random(3).sample(range(2, NUM_STEPS - 1), num_kills))
    for step in steps:
        _runs.kill_after(folder, words["killed"], runs["killed"], step)
    _runs.call(folder, words["killed"])
    return [
        Row(
            claim=f"steps that differ after {num_kills} kills, {label}",
            value=num_different(runs["killed"], runs["untouched"]),
            bar=0,
            sense="==",
            control=num_different(runs["other"], runs["untouched"]),
        )
    ]


def num_different(left: Path, right: Path) -> int:
    """Lines that are not equal, missing ones included."""
    first, second = _runs.learned(left).splitlines(), _runs.learned(right).splitlines()
    longest = max(len(first), len(second))
    pad = [""] * longest
    return sum(a != b for a, b in zip((first + pad)[:longest], (second + pad)[:longest], strict=True))


if __name__ == "__main__":
    sys.exit(main())
