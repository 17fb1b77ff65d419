"""What a rewind leaves out, what is a spike, and when it is enough."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_train.engine.callbacks.spikes import Spikes, limit_of
from vlm_train.engine.rewinds import Diverged, Spike, go_back, jumps_of
from vlm_train.engine.rundir import RunDirectory, append_line
from vlm_train.types import stream_step


def spike(step: int) -> Spike:
    return Spike(step=step, reason="the loss is not finite", value=float("nan"), limit=None)


@given(history=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12)), max_size=8))
def test_a_run_goes_on_behind_what_it_has_met(tmp_path_factory, history: list[tuple[int, int]]) -> None:
    """`history`: steps until the next spike, and how many steps are taken back with it. The stream is played through
    by hand: each step takes the next batch, and nothing that was met is ever met again."""
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    run.create()
    told: list[int] = []  # the batch of each step that stands
    met = 0
    for progress, rewind_steps in history:
        for _ in range(progress + 1):
            told, met = [*told, met], met + 1
        step = len(told) - 1
        assert [stream_step(s, jumps_of(run.rewinds())) for s in range(step + 1)] == told
        go_back(run, spike(step), run.rewinds(), rewind_steps=rewind_steps, max_rewinds=100)
        told = told[: max(step - rewind_steps, 0)]
    jumps = jumps_of(run.rewinds())
    assert [stream_step(s, jumps) for s in range(len(told) + 5)] == [*told, *range(met, met + 5)]
    assert jumps == sorted(jumps) and len(run.rewinds()) == len(history)


def test_the_line_says_why_and_what_is_left_out(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.create()
    for step in range(1, 9):
        append_line(run.metrics, {"step": step, "loss": 1.0})
    for step in (3, 6, 8):
        folder = run.checkpoints / f"step-{step:08d}"
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps({"step": step, "files": {}}))
    row, checkpoint = go_back(run, spike(8), [], rewind_steps=2, max_rewinds=1)
    assert checkpoint is not None and checkpoint.name == "step-00000006"  # 8 is taken back too
    assert [path.name for path in sorted(run.checkpoints.iterdir())] == ["step-00000003", "step-00000006"]
    (line,) = run.rewinds()
    assert {key: line[key] for key in row} == row == {
        "step": 9, "reason": "the loss is not finite", "value": "nan", "threshold": None, "kept": 6, "skipped": [6, 9],
    }  # fmt: skip
    assert run.metrics.read_text().count("\n") == 6
    with pytest.raises(Diverged, match=r"step 7 .* after 1 rewinds(.|\n)*optim.lr(.|\n)*spikes.max_rewinds"):
        go_back(run, spike(6), [row], rewind_steps=0, max_rewinds=1)


@given(
    losses=st.lists(st.floats(1, 2), min_size=5, max_size=40),
    threshold=st.floats(0, 10),
    outlier=st.floats(100, 1e300),
)
def test_the_limit_is_in_deviations_and_does_not_follow_a_spike(
    losses: list[float], threshold: float, outlier: float
) -> None:
    limit = limit_of(losses, threshold)
    assert limit >= sorted(losses)[len(losses) // 2 - 1] and limit <= 2 + threshold * 1.4826
    assert limit_of([*losses, outlier], threshold) <= 2 + threshold * 1.4826  # mean and deviation would follow it
    shifted = limit_of([4 * loss + 8 for loss in losses], threshold)
    assert shifted == pytest.approx(4 * limit + 8)


class Precision:
    def __init__(self, scaler: object | None) -> None:
        self.scaler = scaler


class Alone:
    """As much of a Trainer and of a module as the callback asks for."""

    device = "cpu"

    def __init__(self, scaler: object | None = None) -> None:
        self.precision_plugin = Precision(scaler)


def judged(tmp_path: Path, rows: list[tuple[float, float]], *, threshold: float | None, scaler: Any = None) -> Any:
    """The spike that a run over (loss, gradient norm) ends with, or None."""
    callback, trainer = Spikes(run=RunDirectory(tmp_path), threshold=threshold, window=4), Alone(scaler)
    assert isinstance(callback, lightning.Callback)
    callback.on_train_start(trainer, trainer)  # type: ignore[arg-type]
    try:
        for step, (loss, norm) in enumerate(rows):
            outputs = {"row": {"loss": loss, "grad_norm": norm}}
            callback.on_train_batch_end(trainer, trainer, outputs, {"step": step}, step)  # type: ignore[arg-type]
    except Spike as found:
        return found
    return None


NAN, INF = float("nan"), float("inf")
CALM = [(1.0, 1.0), (1.1, 1.0), (0.9, 1.0), (1.0, 1.0)]


def test_what_is_not_finite_is_a_spike_but_for_what_the_scaler_leaves_out(tmp_path: Path) -> None:
    assert judged(tmp_path, [*CALM, (50.0, 99.0)], threshold=None) is None
    found = judged(tmp_path, [(1.0, 1.0), (INF, 1.0)], threshold=None)
    assert found.step == 1 and "loss is not finite" in found.reason
    assert "loss is not finite" in judged(tmp_path, [(NAN, NAN)], threshold=5.0, scaler=object()).reason
    found = judged(tmp_path, [(1.0, INF)], threshold=None)
    assert "gradient norm is not finite" in found.reason and found.value == INF
    assert judged(tmp_path, [(1.0, INF), (1.0, NAN)], threshold=None, scaler=object()) is None


def test_a_loss_is_judged_by_a_full_window_of_recorded_losses(tmp_path: Path) -> None:
    # median 1, median absolute deviation 0.05: five deviations end at 1.37065
    assert judged(tmp_path, [*CALM, (1.37, 1.0)], threshold=5.0) is None
    found = judged(tmp_path, [*CALM, (1.371, 1.0)], threshold=5.0)
    assert found.step == 4 and found.limit == pytest.approx(1.37065) and found.value == 1.371
    assert judged(tmp_path, [*CALM[:3], (9.0, 1.0)], threshold=5.0) is None
    for step, (loss, _) in enumerate(CALM, start=1):
        append_line(tmp_path / "metrics.jsonl", {"step": step, "loss": loss})
    assert judged(tmp_path, [(1.371, 1.0)], threshold=5.0).step == 0  # as a resumed run
