"""The GPUs that a plan may be made for are named where a user looks for them."""

from __future__ import annotations

import re
from pathlib import Path

from vlm_train.cli.plan import USAGE
from vlm_train.plan.hardware import GPUS

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "plan.md"


def listed(text: str) -> dict[str, tuple[float, float, float]]:
    """The rows of the table: name -> (TFLOP/s, GB, dollars an hour)."""
    rows = re.findall(r"^\| `([\w-]+)` \| (\d+) \| (\d+) \| ([\d.]+) \|$", text, re.MULTILINE)
    return {name: (float(peak), float(memory), float(price)) for name, peak, memory, price in rows}


def test_the_table_of_gpus_is_what_is_assumed() -> None:
    found = {gpu.name: (round(gpu.peak / 1e12), gpu.memory / 1e9, gpu.price) for gpu in GPUS.values()}
    text = DOCUMENT.read_text()
    assert listed(text) == found
    assert listed(text.replace("| `h100` | 989", "| `h100` | 1000")) != found  # the twin


def test_the_help_names_every_gpu() -> None:
    told = set(re.findall(r"[\w-]+", USAGE))
    assert set(GPUS) <= told and "h1000" not in told
