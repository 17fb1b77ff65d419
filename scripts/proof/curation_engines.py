"""Curation on this machine, on Ray and on SLURM, with any number of workers and killed again and again: the same bytes.

    python scripts/proof/curation_engines.py            local processes, and 3 kills
    python scripts/proof/curation_engines.py --full     Ray (a head and two nodes) and SLURM too, and 10 kills of each

A chain of three steps looks at pictures, at what a model makes of them, and at captions. What is compared is every file
that it leaves: the parts of the manifest, embeddings, what each step drops, the selection and its provenance. A kill is
SIGKILL to the driver, every second time to one of its workers first, wherever these work; moments are spread over the
whole of the work. The control is the same chain that keeps 0.7 in place of 0.8 by its score.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import _clusters
import psutil
from _curating import Chain, children, descendants, written
from _table import Row, arguments, report

NUM_WORKERS = (1, 2, 4)


def main() -> int:
    options = arguments(__doc__)
    num_kills = 10 if options.full else 3
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        chain = Chain(Path(name), shard_size=80)
        expected = chain.run(chain.fresh("expected"), "curation.num_workers=1")
        other = chain.run(chain.fresh("other"), "curation.num_workers=1", "curation.steps.score.keep=0.7")
        engine = Proved(chain, expected, differing(other, expected), num_kills)
        rows = engine.prove("local", [], children)
        if options.full:
            address, nodes = stack.enter_context(_clusters.ray_cluster())
            words = ["curation.engine=ray", f"curation.ray.address='{address}'"]
            rows += engine.prove("ray", words, lambda _: descendants(nodes, "ray::_call"))
        if options.full and (lack := _clusters.lacks_slurm()) is None:
            daemon = stack.enter_context(_clusters.slurm_cluster(Path(name) / "slurm"))
            rows += engine.prove("slurm", ["curation.engine=slurm"], lambda _: descendants([daemon], "slurm_task"))
        elif options.full:
            print(f"without SLURM: {lack}", file=sys.stderr)
        return report(rows, options.json)


@dataclass(frozen=True, slots=True)
class Proved:
    """What all engines are held against. `control`: files that another chain writes otherwise."""

    chain: Chain
    expected: dict[str, bytes]
    control: int
    num_kills: int

    def prove(self, label: str, words: list[str], workers: Callable[[int], Sequence[psutil.Process]]) -> list[Row]:
        """Rows for one engine. `words`: of the command line; `workers`: of a driver."""
        rows = []
        for num in NUM_WORKERS:
            found = self.chain.run(self.chain.fresh(f"{label}-{num}"), *words, f"curation.num_workers={num}")
            rows.append(Row(claim=f"{label}: files that differ, {num} workers", value=differing(found, self.expected),
                            bar=0, sense="==", control=self.control))  # fmt: skip
            print(f"{label}: {num} workers done", flush=True)
        place, words = self.chain.fresh(f"{label}-killed"), [*words, "curation.num_workers=2"]
        stages = self.chain.killed(place, *words, num_kills=self.num_kills, workers=workers)
        print(f"{label}: killed in {', '.join(stages)}", flush=True)
        before = differing(written(place), self.expected)
        found = self.chain.run(place, *words)
        rows.append(Row(claim=f"{label}: files that differ after {self.num_kills} kills",
                        value=differing(found, self.expected), bar=0, sense="==", control=before))  # fmt: skip
        claims = ((f"{label}: kills that met it at work", len(stages), self.num_kills - 1),
                  (f"{label}: stages that were killed", len(set(stages)), 2))  # fmt: skip
        return rows + [Row(claim=claim, value=value, bar=bar, sense=">=") for claim, value, bar in claims]


def differing(found: dict[str, bytes], expected: dict[str, bytes]) -> int:
    """Files that one has and the other has not, or not so."""
    return sum(found.get(name) != expected.get(name) for name in {*found, *expected})


if __name__ == "__main__":
    sys.exit(main())
