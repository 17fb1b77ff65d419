"""What is written into a job reaches SLURM as it was meant: names, folders and times."""

from __future__ import annotations

import contextlib
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _clusters
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vlm_train.cli import slurm_script
from vlm_train.cli.slurm_config import LaunchConfig
from vlm_train.cli.slurm_script import script
from vlm_train.cli.slurm_time import seconds_of
from vlm_train.errors import ConfigError


def written(name: str, folder: Path, time: object = 0) -> str:
    """The job of a run of this name and account, in this folder. Raises ConfigError."""
    run = SimpleNamespace(experiment="e", id=name)
    trainer = SimpleNamespace(num_nodes=1, devices=1, accelerator="cpu")
    config: Any = SimpleNamespace(run=run, trainer=trainer, data=SimpleNamespace(num_workers=0))
    folder.mkdir(exist_ok=True)
    with contextlib.chdir(folder):
        return script(config, LaunchConfig(time=time, account=name), folder, [folder])


def shown(text: str) -> str:
    """What SLURM tells of a job that it is given and keeps back."""
    sent = subprocess.run(["sbatch", "--parsable", "--hold"], input=text, capture_output=True, text=True, check=True)
    told = _clusters.told("scontrol", "show", "job", sent.stdout.strip())
    _clusters.told("scancel", sent.stdout.strip())
    return told


def known_to_slurm(name: str, folder: Path) -> dict[str, str] | None:
    """What SLURM knows of that job; None where the job is refused before."""
    try:
        told = shown(written(name, folder))
    except ConfigError:
        return None
    forms = {"name": "JobName=e-(.*)", "account": "Account=(.*) QOS=", "chdir": "WorkDir=(.*)"}
    if "%" not in str(folder):  # which scontrol reads as a pattern, and otherwise than slurmd
        forms["output"] = "StdOut=(.*)"
    return {key: re.search(form, told)[1] for key, form in forms.items()}  # type: ignore[index]


def meant(name: str, folder: Path) -> dict[str, str]:
    output = {} if "%" in str(folder) else {"output": f"{folder}/log.txt"}
    account = name.encode().lower().decode()  # SLURM makes the letters of ASCII small
    return {"name": name, "account": account, "chdir": str(folder), **output}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_characters="\0\r/", exclude_categories=["Cs"]), min_size=1, max_size=40))
@example("it's")
@example("a#b")
@example('"q" and  blanks ')
@example("100%j%%a")
@example("back\\slash")
@example("\N{LATIN SMALL LETTER A WITH GRAVE}\N{CJK UNIFIED IDEOGRAPH-65E5}\t\x01")
def test_any_text_reaches_slurm_whole_or_is_refused(tmp_path: Path, slurm: None, text: str) -> None:
    found = known_to_slurm(text, tmp_path)
    assert found == (None if "\n" in text else meant(text, tmp_path))
    folder = tmp_path / f"x{text}"
    found = known_to_slurm("plain", folder)
    assert found == (None if "\n" in text or "\\" in text else meant("plain", folder))


def test_a_job_works_and_logs_in_a_folder_of_any_name(tmp_path: Path, slurm: None) -> None:
    folder = tmp_path / """it's 100%j%%a "q" #x"""
    asked = [line for line in written("plain", folder).splitlines() if line.startswith("#SBATCH")]
    subprocess.run(["sbatch"], input="\n".join(["#!/bin/bash", *asked, "pwd"]), text=True, check=True)
    log = folder / "log.txt"
    _clusters.until(lambda: log.is_file() and log.read_text() != "", "the log")
    assert log.read_text() == f"{folder}\n"


def test_twin_without_quotes_slurm_takes_a_part(tmp_path: Path, slurm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_script, "_word", str)
    found = known_to_slurm("a#b", tmp_path)
    assert found is not None and found["account"] == "a"


@pytest.mark.parametrize("time", [1, "90:30", "1:30:00", "100:00:00", "1-12", "1-0:30", "2-00:00:01", "9999-23:59:00"])
def test_slurm_reads_times_as_we_do(tmp_path: Path, slurm: None, time: object) -> None:
    """It rounds up to minutes."""
    found = re.search(r"TimeLimit=(\S+)", shown(written("plain", tmp_path, time)))
    seconds = seconds_of(str(time))
    assert found and seconds and seconds_of(found[1]) == -(-seconds // 60) * 60


@pytest.mark.parametrize("time", [0, "0:00:00"])
def test_no_time_is_no_limit(tmp_path: Path, slurm: None, time: object) -> None:
    assert "TimeLimit=UNLIMITED" in shown(written("plain", tmp_path, time))
    assert "TimeLimit=00:01:00" in shown(written("plain", tmp_path, 1))  # the twin
