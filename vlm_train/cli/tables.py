"""Aligned text for a terminal: tables, and what an evaluator measured with its controls beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlm_train.engine.scores import cells, controls_of, counts_of, scores_of


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, indent: str = "  ", left: int = 1) -> list[str]:
    """Columns as wide as their widest cell; the first `left` are aligned left, the others right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((indent + "  ".join(cells)).rstrip())
    return lines


def describe(name: str, result: Mapping[str, Any]) -> list[str]:
    """A result of an evaluator as lines: a row for each score, then controls and counts."""
    header, rows = cells(scores_of(result), interval=".2f")
    lines = table([name, *header], rows) if rows else [f"  {name}"]
    facts = [f"{key.replace('_', ' ')} {value:.2f}" for key, value in controls_of(result).items()]
    facts += [f"{value:,} {key.replace('_', ' ')}" for key, value in counts_of(result).items()]
    facts += [f"step {result['step']:,}"] if "step" in result else []
    return [*lines, f"  {', '.join(facts)}"] if facts else lines
