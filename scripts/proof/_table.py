"""What every proof prints and writes: rows of claim, value, bar and control, and one verdict.

A row holds when its value meets the bar and its control, the same measurement on a deliberately wrong twin, does not:
a bar that the wrong version also meets would prove nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

_MEETS = {
    "<=": lambda value, bar: value <= bar,
    ">=": lambda value, bar: value >= bar,
    "==": lambda value, bar: value == bar,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One claim. `control`: what the wrong twin measures, or None where no twin exists."""

    claim: str
    value: float
    bar: float
    sense: Literal["<=", ">=", "=="]
    control: float | None = None

    def holds(self) -> bool:
        """The value meets the bar and the control fails it. A NaN value never holds."""
        meets = _MEETS[self.sense]
        return meets(self.value, self.bar) and (self.control is None or not meets(self.control, self.bar))


def arguments(description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The two options of every proof: `--json FILE` and `--full`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    parser.add_argument("--full", action="store_true", help="the long form")
    return parser.parse_args(argv)


def report(rows: Sequence[Row], json_path: Path | None) -> int:
    """Prints the table, writes the JSON, and returns the exit status: 0 when every row holds, else 1."""
    width = max(len(row.claim) for row in rows)
    print(f"{'claim':<{width}}  {'value':>10}     {'bar':>8}  {'control':>10}")
    for row in rows:
        control = "-" if row.control is None else f"{row.control:.3g}"
        verdict = "holds" if row.holds() else "FAILS"
        print(f"{row.claim:<{width}}  {row.value:>10.3g}  {row.sense} {row.bar:>8.3g}  {control:>10}  {verdict}")
    failed = sum(not row.holds() for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} rows hold", file=sys.stderr if failed else sys.stdout)
    if json_path is not None:
        json_path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 1 if failed else 0
