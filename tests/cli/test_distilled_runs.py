"""A student that is trained against a run: equal on any machine, and refused where the two do not fit."""

from __future__ import annotations

from pathlib import Path

import _runs
import pytest

MACHINES = {"one": (), "two": ("trainer.devices=2", "strategy=ddp"), "micro": ("trainer.micro_batch=9",)}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    run = tmp_path_factory.mktemp("teacher") / "run"
    _runs.call(run.parent, _runs.train_words(scenes, "trainer.max_steps=20", f"run.dir={run}"))
    return run


def words(data: Path, run: Path, teacher: Path, *extra: str) -> list[str]:
    common = ("objective=weighted", f"objective.parts.distill.teacher={teacher}", "model.vision.width=16")
    return [*_runs.train_words(data), *common, "trainer.max_steps=8", f"run.dir={run}", *extra]


@pytest.mark.slow
def test_the_machine_does_not_change_what_a_student_learns(tmp_path: Path, scenes: Path, teacher: Path) -> None:
    losses = {}
    for name, machine in MACHINES.items():
        _runs.call(tmp_path, words(scenes, tmp_path / name, teacher, "precision=fp64", *machine))
        losses[name] = _runs.losses(tmp_path / name)
    assert losses["two"] == pytest.approx(losses["one"], abs=1e-12)
    assert losses["micro"] == pytest.approx(losses["one"], abs=1e-12)
    row = _runs.rows(tmp_path / "one")[-1]
    assert row["distill/divergence"] > 0 and row["contrast/loss"] + row["distill/loss"] == pytest.approx(row["loss"])
    alone = _runs.train_words(scenes, "trainer.max_steps=8", "precision=fp64", f"run.dir={tmp_path / 'alone'}")
    _runs.call(tmp_path, alone)  # the twin: without the teacher
    assert _runs.losses(tmp_path / "alone") != pytest.approx(losses["one"], abs=1e-3)
    teacher.rename(tmp_path / "gone")  # only training needs it
    assert "R@1" in _runs.call(tmp_path, ["evaluate", f"run={tmp_path / 'one'}"])
    (tmp_path / "gone").rename(teacher)


@pytest.mark.slow
def test_a_teacher_that_does_not_fit_is_refused(tmp_path: Path, scenes: Path, teacher: Path) -> None:
    other_size = words(scenes, tmp_path / "a", teacher, "model.vision.image.size=40")
    assert "images of another size" in _runs.call(tmp_path, other_size, expect=2)
    own_tokenizer = words(scenes, tmp_path / "b", teacher, "model.tokenizer.vocab_size=280")
    assert "another tokenizer" in _runs.call(tmp_path, own_tokenizer, expect=2)
    nowhere = words(scenes, tmp_path / "c", tmp_path / "nowhere")
    assert "is no run" in _runs.call(tmp_path, nowhere, expect=2)
