"""Our training step beside open_clip's own, in the form that the proof runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "proof"))
import against_open_clip


@pytest.mark.slow
def test_the_proof_holds(tmp_path: Path) -> None:
    target = tmp_path / "rows.json"
    assert against_open_clip.main(["--json", str(target)]) == 0
    rows = json.loads(target.read_text())
    assert len(rows) == 3
    assert [row["value"] < 1e-12 for row in rows] == [True, True, False]  # fp64: measured 2.2e-15
    assert all(row["control"] > 1e-4 for row in rows)
