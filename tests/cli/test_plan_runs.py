"""`vlm-train plan` from the command line: pages, JSON, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlm_train.cli import plan
from vlm_train.cli.slurm_time import seconds_of
from vlm_train.errors import ConfigError, VlmError

SMALL = ["experiment=quickstart", "model.vision.num_layers=1", "model.text.num_layers=1"]


def test_a_page_tells_memory_time_and_money(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    words = ["gpus=1,8", "gpu=a100", "mfu=0.4", "price=2", "walltime=0:00:01", "samples=3611", "--json", str(file)]
    assert plan.main([*SMALL, *words]) == 0
    printed = capsys.readouterr().out
    wanted = ("vision", "optimizer state", "560 steps", "epochs of 3,611", "8 x a100", "312 TFLOP/s", "jobs",
              "$2.00 for a GPU and hour (as price= says)", "1 micro-batch of 64", "< $0.01",
              "fits into the 73.6 GB of a100")  # fmt: skip
    assert [told for told in wanted if told not in printed] == []
    (found,) = json.loads(file.read_text()).values()
    assert [each["num_gpus"] for each in found["settings"]] == [1, 8]
    assert found["num_steps"] == 560


def test_stages_are_planned_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["experiment=llava_tiny", "model.text.architecture.num_hidden_layers=1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("memory of a rank") == 2 and printed.count("1 x h100") == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["gpu=h1000"], "gpu=h100"),
        (["gpus=0"], "gpus="),
        (["gpus=8,x"], "gpus="),
        (["gpus=8,,16"], "8,,16"),
        (["walltime=24h"], "walltime=24:00:00"),
        (["walltime=0:00:00"], "walltime="),
        (["walltime=0:75:00"], "walltime="),
        (["mfu=40"], "mfu="),
        (["price=cheap"], "from 0 to 1,000,000"),
        (["disk=0"], "disk=1"),
        (["tokens=1000"], "tokens="),
        (["samples=-1"], "samples="),
        (["gpu=h100", "gpu=a100"], "given twice"),
        (["--json", "/nowhere/plan.json"], "--json"),
        (["experiment=distill_b32"], "teacher"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        plan.main([*SMALL[:1], *words] if "experiment" not in words[0] else words)
    assert told in str(refused.value)
    assert refused.value.exit_code == 2


def test_all_tells_of_each_experiment_or_why_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "groups", lambda: {"experiment": ["quickstart", "distill_b32"]})
    assert plan.main(["--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("quickstart") and "h100" in "\n".join(lines)
    assert "cannot be planned" in lines[2]
    monkeypatch.setattr("vlm_train.data.parallel.map_in_processes", lambda function, items, **_: map(function, items))
    assert plan.main(["--all", "trainer.max_steps=-1"]) == 1  # not one


def test_a_full_disk_is_told_with_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full")
    with pytest.raises(VlmError, match="--json cannot be written: No space left on device") as refused:
        plan.write(full, {"a": 1})
    assert refused.value.got == full


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800), ("0:30", 30), ("0:30:00", 1800), ("24:00:00", 86400), ("2-00:00:01", 172801), ("1-12", 129600),
        ("1-0:30", 88200), ("24h", None), ("1:2:3:4", None), ("-1", None), ("", None), ("1-", None),
        ("0", 0), ("99:99:99", None), ("1:60:00", None), ("1-24", None), ("1-25:00:00", None), ("0:60", None),
        ("100:00:00", 360000), ("99999-0", None), ("123456789", None), ("\N{ARABIC-INDIC DIGIT THREE}", None),
    ],
)  # fmt: skip
def test_times_are_those_of_slurm(text: str, seconds: int | None) -> None:
    assert seconds_of(text) == seconds
