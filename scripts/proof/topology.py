"""The same config on one process, on two, and in micro-batches: the losses agree, step by step.

    python scripts/proof/topology.py               20 steps in fp32, 100 in fp64
    python scripts/proof/topology.py --full        also 3 and 4 processes

fp32 rounds differently on another number of ranks and the difference grows with the steps, chaotically; fp64 shows that
nothing else differs. The control trains with another seed.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import _runs
from _table import Row, arguments, report

MACHINES = {
    "two processes": ("trainer.devices=2", "strategy=ddp"),
    "one process, 3 micro-batches": ("trainer.micro_batch=8",),
    "two processes, 2 micro-batches": ("trainer.devices=2", "strategy=ddp", "trainer.micro_batch=6"),
}
FULL = {f"{n} processes": (f"trainer.devices={n}", "strategy=ddp") for n in (3, 4)}
FP32_STEPS, FP64_STEPS = 20, 100


def main() -> int:
    options = arguments(__doc__)
    machines = {**MACHINES, **(FULL if options.full else {})}
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for name in ("infonce", "sigmoid") for row in prove(Path(folder), name, machines)]
    return report(rows, options.json)


def prove(folder: Path, objective: str, machines: dict[str, tuple[str, ...]]) -> list[Row]:
    """Rows of one objective: the largest difference of a loss over the run, in both precisions."""
    data = folder / "scenes" if (folder / "scenes").exists() else _runs.make_scenes(folder)
    rows = []
    for precision, num_steps, bar in (("fp32", FP32_STEPS, 1e-5), ("fp64", FP64_STEPS, 1e-6)):

        def losses(label: str, *words: str, precision: str = precision, num_steps: int = num_steps) -> list[float]:
            run = folder / re.sub(r"\W+", "-", f"{objective} {precision} {label}")
            common = (f"objective={objective}", f"precision={precision}", f"trainer.max_steps={num_steps}")
            _runs.call(folder, _runs.train_words(data, *common, f"run.dir={run}", *words))
            return _runs.losses(run)

        alone, control = losses("alone"), losses("control", "seed=1")
        for name, words in machines.items():
            rows.append(
                Row(
                    claim=f"{objective} {precision}, {num_steps} steps: one process and {name}",
                    value=largest(losses(name, *words), alone),
                    bar=bar,
                    sense="<=",
                    control=largest(control, alone),
                )
            )
    return rows


def largest(left: list[float], right: list[float]) -> float:
    """Largest absolute difference; runs of unequal length have no number."""
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


if __name__ == "__main__":
    sys.exit(main())
