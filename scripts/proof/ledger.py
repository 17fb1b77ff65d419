"""Where the time of a run goes: the accounts add up to its wall time, and what is slow shows in the right one.

    python scripts/proof/ledger.py             two ranks, 40 steps each, and one hang under the automatic limit
    python scripts/proof/ledger.py --full      160 steps each

Slow are, in turn: the loader (0.1 s a batch), the disk (0.5 s a flush), rank 1 (0.1 s a step), and rank 1 for ever. The
control of each is the run in which nothing is slow, measured alike.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import _runs
import _slowness
from _table import Row, arguments, report

from vlm_train.engine.heartbeat import ACCOUNTS, EXIT_HANG
from vlm_train.engine.ledger import Totals, lives_of, totals

RANKS = ("trainer.devices=2", "strategy=ddp", "checkpoint.asynchronous=false")
NUM_CHECKPOINTS = 4


def main() -> int:
    options = arguments(__doc__)
    num_steps = 160 if options.full else 40
    with tempfile.TemporaryDirectory() as folder:
        return report(prove(Path(folder), num_steps), options.json)


def prove(folder: Path, num_steps: int) -> list[Row]:
    """The rows."""
    data = _runs.make_scenes(folder)
    words = _runs.train_words(
        data, *RANKS, f"trainer.max_steps={num_steps}", f"checkpoint.every_steps={num_steps // NUM_CHECKPOINTS}"
    )
    found, walls = {}, {}
    for kind in ("none", "loader", "disk", "rank"):
        began = time.time()
        _slowness.call(folder, kind, [*words, f"run.dir={folder / kind}"])
        found[kind] = accounts(folder / kind)
        walls[kind] = time.time() - began
    plain = found["none"].seconds
    late = num_steps * _slowness.LATE_SECONDS
    flushed = NUM_CHECKPOINTS * _slowness.FLUSH_SECONDS
    sought = {"loader": ("data_wait", late), "disk": ("checkpoint", flushed), "rank": ("communication", late)}
    booked = {kind: sum(totals.seconds[name] for name in ACCOUNTS) for kind, totals in found.items()}
    worst = max(booked, key=lambda kind: abs(booked[kind] / walls[kind] - 1))
    return [
        Row(
            claim="all accounts against the time that the command took, worst of four runs: share off",
            value=abs(booked[worst] / walls[worst] - 1),
            bar=0.01,
            sense="<=",
            control=found[worst].seconds["startup"] / walls[worst],  # what is off when one account is left out
        ),
        *(
            Row(
                claim=f"slow {kind}: seconds of {account} for each that was slept",
                value=found[kind].seconds[account] / seconds,
                bar=0.9,
                sense=">=",
                control=plain[account] / seconds,
            )
            for kind, (account, seconds) in sought.items()
        ),
        *hang(folder, words),
    ]


def hang(folder: Path, words: list[str]) -> list[Row]:
    """A rank that never comes back, and the run in which all do."""
    run = folder / "hang"
    length = f"trainer.max_steps={2 * _slowness.HANGS_AT}"
    _slowness.call(folder, "hang", [*words, length, f"run.dir={run}"], expect=EXIT_HANG)
    told = events(run, "hang")
    name = f"rank 1 has not reached all_reduce of step {_slowness.HANGS_AT}"
    standing = max(rank["seconds"] for rank in told[0]["ranks"])
    return [
        Row(
            claim="a rank hangs: `hang` events that name it, its step and the exchange",
            value=sum(name in row["sentence"] and "_slowness.py, line" in row["sentence"] for row in told),
            bar=1,
            sense="==",
            control=len(events(folder / "none", "hang")),
        ),
        Row(claim="seconds that it stood still, by itself", value=standing, bar=120, sense="<="),
    ]


def accounts(run: Path) -> Totals:
    """Rank 0's."""
    found = totals(lives_of(run / "time.jsonl"))
    assert found is not None
    return found


def events(run: Path, name: str) -> list[dict]:
    """Lines of events.jsonl of one kind."""
    rows = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [row for row in rows if row["event"] == name]


if __name__ == "__main__":
    sys.exit(main())
