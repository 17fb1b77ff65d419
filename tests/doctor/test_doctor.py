"""What is green, yellow and red, of figures and texts that machines give; and the verb on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vlm_train
from vlm_train.cli.main import main
from vlm_train.doctor import cluster, devices, machine, software, storage, tracking
from vlm_train.doctor.findings import GREEN, RED, YELLOW, Finding, found
from vlm_train.errors import ConfigError


def lights(findings: object) -> list[str]:
    return [finding.light for finding in findings]  # type: ignore[attr-defined]


def test_withdrawn_releases_are_red_and_others_are_not() -> None:
    bad = list(software.banned({"lightning": "2.6.3", "torch": "2.12.0"}))
    assert lights(bad) == [RED] and "malware" in bad[0].seen and "password" in bad[0].remedy
    assert not list(software.banned({"lightning": "2.6.6"}))


@pytest.mark.parametrize(
    ("installed", "expected"),
    [({"torch": "2.11.0", "my-own": "1"}, [GREEN]), ({"torch": "2.10.0", "my-own": "1"}, [YELLOW]),
     ({"my-own": "1"}, [RED]), ({}, [RED, RED])],
)  # fmt: skip
def test_packages_are_held_to_what_is_asked_for(installed: dict[str, str], expected: list[str]) -> None:
    asked = ["torch>=2.11", "my_own", 'ray>=2; extra == "ray"', 'tomli; python_version < "3"']
    assert lights(software.required(asked, installed)) == expected


def test_python(monkeypatch: pytest.MonkeyPatch) -> None:
    assert software.of_python((3, 10)).light == RED and software.of_python((3, 12)).light == GREEN


@pytest.mark.parametrize(("text", "limit"), [("200000 100000\n", 2.0), ("max 100000\n", None), ("nonsense", None)])
def test_cores_of_a_control_group(tmp_path: Path, text: str, limit: float | None) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert machine.cpu_limit(tmp_path) == limit
    assert machine.cpu_limit(tmp_path / "nowhere") is None


def test_more_processes_than_cores_are_told() -> None:
    assert lights(machine.cores(10_000, 3)) == [YELLOW] and lights(machine.cores(1, 0)) == [GREEN]


def test_small_shared_memory_is_told() -> None:
    assert machine.shared_memory(0.064).light == YELLOW and machine.shared_memory(8).light == GREEN


def test_a_clock_that_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lights(machine.clock(tmp_path)) == [GREEN]
    monkeypatch.setattr(machine.time, "time", lambda: 1e9)
    assert lights(machine.clock(tmp_path)) == [YELLOW]


def test_a_name_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lights(machine.name()) == [GREEN]
    monkeypatch.setattr(machine.socket, "gethostname", lambda: "no-such-host.invalid")
    assert lights(machine.name()) == [RED]


def test_a_device_far_below_the_median_is_named() -> None:
    (bad,) = devices.outliers([700, 690, 600, 710])
    assert bad.light == RED and "gpu 2" in bad.seen
    assert lights(devices.outliers([700, 690, 640, 710])) == [GREEN]


def test_gpus_that_others_use_or_that_are_broken() -> None:
    row = {"index": "1", "memory.total": "81920", "memory.used": "500"}
    assert not list(devices.of_gpu(row))
    used = row | {"memory.used": "30000", "ecc.errors.uncorrected.volatile.total": "3"}
    assert lights(devices.of_gpu(used)) == [YELLOW, RED]
    assert not list(devices.of_gpu(row | {"ecc.errors.uncorrected.volatile.total": "[N/A]"}))


def test_a_slow_link_is_told() -> None:
    assert devices.of_link("nccl", 8, 3.0).light == YELLOW and devices.of_link("nccl", 8, 300.0).light == GREEN


def test_a_disk_without_room_for_the_checkpoints(tmp_path: Path) -> None:
    full = list(storage.disk(tmp_path, checkpoint_gb=1e6))
    assert full[0].light == RED and "checkpoint.keep" in full[0].remedy
    assert "takes" in full[1].seen and not list(tmp_path.iterdir())


def test_data_that_cannot_be_used(scenes: Path, tmp_path: Path) -> None:
    (good,) = storage.data("train", str(scenes / "train"))
    assert good.light == GREEN and "samples" in good.seen
    bad = list(found([lambda: storage.data("train", str(tmp_path / "nothing"))]))
    assert lights(bad) == [RED] and "missing" in bad[0].seen and bad[0].remedy


def test_logins(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    home = {"HOME": str(tmp_path)}
    assert lights(tracking.wandb("wandb", "online", {"HOME": str(tmp_path / "other")})) == [RED]
    assert lights(tracking.wandb("wandb", "online", home)) == [GREEN]
    assert lights(tracking.wandb("wandb", "online", home | {"WANDB_BASE_URL": "https://own.example"})) == [RED]
    assert lights(tracking.wandb("wandb", "online", {"HOME": "/nowhere", "WANDB_MODE": "offline"})) == [RED]  # as it is
    assert lights(tracking.wandb("wandb", "online", home | {"WANDB_BASE_URL": ""})) == [GREEN]
    assert lights(tracking.wandb("wandb", "offline", {})) == [GREEN] == lights(tracking.wandb("none", "online", {}))


def test_ranks_that_are_no_numbers_are_told_and_left_out() -> None:
    environment = {"RANK": "a", "LOCAL_RANK": "0", "WORLD_SIZE": "", "HOME": "a"}
    bad = list(machine.ranks(environment))
    assert lights(bad) == [RED, RED] and [finding.remedy for finding in bad] == ["unset RANK", "unset WORLD_SIZE"]
    assert environment == {"LOCAL_RANK": "0", "HOME": "a"} and not list(machine.ranks(environment))


def test_a_strange_rank_is_told_by_every_verb(tmp_path: Path) -> None:
    """`doctor` goes on with its other checks."""
    (tmp_path / "config.yaml").write_text("trainer: {max_steps: 3}\n")
    root = str(Path(vlm_train.__file__).parents[1])
    cases = ((["doctor"], ("RANK", "SLURM_PROCID"), 1), (["watch", ".", "--once"], ("RANK",), 2),
             (["watch", ".", "--once"], ("SLURM_PROCID",), 2), (["watch", ".", "--once"], (), 0))  # fmt: skip
    for words, names, code in cases:
        environment = {**os.environ, **dict.fromkeys(names, "a"), "PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([sys.executable, "-m", "vlm_train.cli.main", *words], cwd=tmp_path, env=environment,
                              capture_output=True, text=True, timeout=120)  # fmt: skip
        told = done.stdout + done.stderr
        assert done.returncode == code and "Traceback" not in told, told
        assert all(f"{name}=a" in told and f"unset {name}" in told for name in names)
        assert ("open_files" in told) == (words == ["doctor"])


SLURM = """Configuration data as of 2026-11-29T12:00:00
ClusterName             = here
JobRequeue              = 0
KillWait                = 5 sec
PreemptMode             = REQUEUE
SLURM_VERSION           = 22.05.8
"""


def test_settings_of_slurm() -> None:
    settings = cluster.settings_of(SLURM)
    told = [finding.name for finding in cluster.judged(settings, save_seconds=20)]
    assert told == ["slurm", "slurm_requeue", "slurm_kill_wait"]
    assert [f.name for f in cluster.judged(settings | {"JobRequeue": "1"}, save_seconds=4)] == ["slurm"]
    short = {"PartitionName": "low", "PreemptMode": "REQUEUE", "GraceTime": "10"}
    assert lights(cluster.of_partition(short, 20)) == [YELLOW]
    assert not list(cluster.of_partition(short, 5)) and not list(cluster.of_partition({"PreemptMode": "OFF"}, 20))


def test_a_check_that_breaks_stops_no_other() -> None:
    def breaks() -> list[Finding]:
        raise RuntimeError("no such thing")

    told = list(found([breaks, lambda: [Finding("other", GREEN, "fine")]]))
    assert [finding.name for finding in told] == ["breaks", "other"] and "no such thing" in told[0].seen


def test_the_verb_on_this_machine(scenes: Path, tmp_path: Path) -> None:
    """Two ranks that really reduce, data that is really read; the twin asks for an account that nobody has."""
    shards = [f"data.{split}.shards={scenes / 'train'}" for split in ("train", "val")]
    words = ["doctor", "experiment=quickstart", *shards, "trainer.devices=2", "strategy=ddp", "--json", "doctor.json"]
    for extra, code in (((), 0), (("logger=wandb",), 1)):
        environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(Path.cwd())}
        environment.pop("WANDB_MODE", None)
        done = subprocess.run([sys.executable, "-m", "vlm_train.cli.main", *words, *extra], cwd=tmp_path,
                              env=environment, capture_output=True, text=True, timeout=120)  # fmt: skip
        told = {row["name"]: row for row in json.loads((tmp_path / "doctor.json").read_text())["findings"]}
        reds = [name for name, row in told.items() if row["light"] == RED]
        assert done.returncode == code, done.stdout + done.stderr
        assert reds == (["wandb"] if code else []) and "2 ranks" in told["all_reduce"]["seen"]
        assert told["data.train"]["light"] == GREEN and f"{len(reds)} red" in done.stdout


def test_misuse() -> None:
    with pytest.raises(ConfigError):
        from vlm_train.cli.doctor import main as doctor

        doctor(["--json"])
    assert main(["doctor", "trainer.devces=2"]) == 2
