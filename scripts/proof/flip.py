"""Half of the patches left out for the same time learns as much: FLIP (arXiv 2212.00794) on openmoji.

    python scripts/proof/flip.py               about fifteen minutes on two cores
    python scripts/proof/flip.py --full        three seeds

Equal time is made of numbers of steps, so that what else the machine does cannot decide: short runs of both kinds in
turn tell how much less of a processor's time a step of the masked one takes, loading included, and it gets as many more
steps. As in the paper, its last part reads all patches. Judged by R@10 over held-out drawings whose names no training
picture has; the control is chance.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import _runs
from _table import Row, arguments, report

NUM_STEPS = 560
SHORT = (8, 40)
"""Steps of the runs that tell the time of one."""
SHARE_TUNED = 0.15
"""Of the time, for all patches at the end."""
MASKED = "model.patch_dropout=0.5"
MEASURED, UNMEASURED = "evaluation=retrieval", "evaluation=none"


def main(argv: list[str] | None = None) -> int:
    options = arguments(__doc__.splitlines()[0], argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _runs.call(folder, ["data", "import", "openmoji", "data/openmoji"], timeout=900)
        gain = images_gained(folder, num_pairs=5 if options.full else 3)
        scores = [compare(folder, gain, seed) for seed in range(3 if options.full else 1)]
    plain, masked, chance = (statistics.mean(score[place] for score in scores) for place in range(3))
    rows = [
        Row(
            claim="images a second of a processor in training, half of the patches / all",
            value=gain,
            bar=1.5,
            sense=">=",
        ),
        Row(
            claim=f"points of R@10 above all patches at equal time [all {plain:.1f}, masked {masked:.1f}]",
            value=masked - plain,
            bar=-2.0,
            sense=">=",
            control=chance - plain,
        ),
    ]
    return report(rows, options.json)


def images_gained(folder: Path, num_pairs: int) -> float:
    """Median over pairs, one after the other, of the ratio of their images a second of a processor."""
    ratios = []
    for number in range(num_pairs):
        seconds = [
            seconds_a_step(folder, f"{number}-{name}", words) for name, words in (("all", []), ("half", [MASKED]))
        ]
        ratios.append(seconds[0] / seconds[1])
        print(f"pair {number}: {seconds[0] * 1e3:.0f} and {seconds[1] * 1e3:.0f} ms of a processor a step", flush=True)
    return statistics.median(ratios)


def seconds_a_step(folder: Path, name: str, words: list[str]) -> float:
    """Processor time of a step, loading included: of a longer run less a shorter one, over the steps between."""
    seconds = []
    for num_steps in SHORT:
        before = os.times()
        measured = [f"trainer.max_steps={num_steps}", "schedule.warmup_steps=5", "trainer.num_threads=1", UNMEASURED]
        train(folder, folder / f"speed-{name}-{num_steps}", [*measured, *words])
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return (seconds[1] - seconds[0]) / (SHORT[1] - SHORT[0])


def compare(folder: Path, gain: float, seed: int) -> tuple[float, float, float]:
    """R@10 with all patches, masked for the same time, and by chance."""
    tuned = round(NUM_STEPS * SHARE_TUNED)
    masked = round((NUM_STEPS - tuned) * gain)
    plain, first, second = (folder / f"{name}-{seed}" for name in ("all", "masked", "tuned"))
    train(folder, plain, [f"trainer.max_steps={NUM_STEPS}", f"seed={seed}", MEASURED])
    train(folder, first, [f"trainer.max_steps={masked}", f"seed={seed}", MASKED, UNMEASURED])
    tune = [f"trainer.max_steps={tuned}", f"seed={seed + 100}", f"init={first}", "optim.lr=1e-4"]
    train(folder, second, [*tune, MEASURED])
    told = [json.loads((run / "evals" / "retrieval.json").read_text()) for run in (plain, second)]
    print(f"seed {seed}: {NUM_STEPS} steps against {masked} masked and {tuned} with all", flush=True)
    first_score, second_score = (score["text_to_image"]["R@10"] for score in told)
    return first_score, second_score, told[0]["chance"]["R@10"]


def train(folder: Path, run: Path, words: list[str]) -> None:
    fixed = ["train", "experiment=quickstart", f"run.dir={run}", f"checkpoint.every_steps={10**6}"]
    _runs.call(folder, [*fixed, *words], timeout=3600)


if __name__ == "__main__":
    sys.exit(main())
