"""`vlm-train submit`: what it writes, that SLURM takes it, and what it refuses."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import _clusters
import _runs
import pytest

from vlm_train.cli import slurm_ranks
from vlm_train.cli.slurm_job import read_task
from vlm_train.cli.slurm_script import script
from vlm_train.cli.submit import main
from vlm_train.errors import ConfigError, VlmError

CPU = ("trainer.accelerator=cpu", "launch.dry_run=true")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def submitted(run: Path) -> Path:
    (folder,) = (run / "submit").iterdir()
    return folder


def words(*extra: str) -> list[str]:
    return [*_runs.train_words(Path("scenes"))[1:], *CPU, *extra]


SHAPES = {
    "one node": (),
    "nodes": ("trainer.num_nodes=2", "trainer.devices=2", "strategy=ddp", "launch.cpus=1"),
    "array": ("--sweep", "seed=0,1,2", "launch.max_at_once=2"),
    "pyxis": ("launch.container=image.sqsh", 'launch.container_mounts=["/data:/data"]'),
    "apptainer": ("launch.container=image.sif", "launch.container_runtime=apptainer"),
    "everything": ("launch.partition=low", "launch.mem=1G", "launch.time=1-00:00:00", 'launch.sbatch=["--exclusive"]',
                   'launch.setup=["module load cuda"]', "launch.signal_seconds=300"),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_slurm_takes_every_shape_of_job(here: Path, slurm: None, shape: str) -> None:
    assert main(words("run.dir=a run", *SHAPES[shape])) == 0
    job = submitted(here / "a run") / "job.sbatch"
    text = job.read_text()
    assert "@" not in text.replace("USR1@", "").replace("[@]", "")  # all is put in
    assert subprocess.run(["bash", "-n", str(job)]).returncode == 0
    if shape == "nodes":  # the cluster of one node has none to give, and says so when it has understood the rest
        assert "--nodes=2" in text and "--ntasks-per-node=2" in text
    tried = subprocess.run(["sbatch", "--test-only", str(job)], capture_output=True, text=True)
    understood = "Requested node configuration is not available" if shape == "nodes" else "to start at"
    assert understood in tried.stderr
    job.write_text(text.replace("--signal=USR1", "--signal=USR9"))  # the twin
    assert subprocess.run(["sbatch", "--test-only", str(job)], capture_output=True).returncode != 0


def test_without_a_controller_it_is_said(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if lack := _clusters.lacks_slurm():
        pytest.skip(lack)
    (here / "slurm.conf").write_text("ClusterName=nobody\n")
    monkeypatch.setenv("SLURM_CONF", str(here / "slurm.conf"))
    with pytest.raises(VlmError, match="installed, but no controller answers") as refused:
        main([word for word in words("run.dir=run") if "dry_run" not in word])
    job = submitted(here / "run") / "job.sbatch"
    assert refused.value.remedy == f"there: sbatch {job}" and len(str(refused.value.got).splitlines()) == 1


def test_what_slurm_refuses_is_one_line(here: Path, slurm: None) -> None:
    with pytest.raises(VlmError, match="sbatch refused the job") as refused:
        main([word for word in words("run.dir=run", "launch.partition=nowhere") if "dry_run" not in word])
    assert "invalid partition specified: nowhere; " in str(refused.value.got)


def test_a_disk_without_room_is_told_and_nothing_is_left(here: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))  # bytes of a file
    try:
        with pytest.raises(VlmError, match="cannot be written: File too large"):
            main(words("run.dir=run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(here.glob("run/submit/*"))
    assert main(words("run.dir=run")) == 0  # the twin


def test_a_job_reads_its_own_copy_of_code_and_config(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words("run.dir=run", "optim.lr=0.5", "run.resume=never")) == 0
    told = capsys.readouterr().out
    folder = submitted(here / "run")
    assert "not sent: launch.dry_run=true" in told and f"next: sbatch {folder}/job.sbatch" in told
    assert (folder / "job.sbatch").read_text() in told
    config, stages, command = read_task(folder / "tasks" / "00")
    assert (config.optim.lr, config.run.dir, config.run.id, config.run.resume) == (0.5, "run", "run", "auto")
    assert not stages and "optim.lr=0.5" in command and "launch.dry_run=true" not in command
    code = "import vlm_train, vlm_train.cli.paths as p; print(vlm_train.__file__); print(p.conf_dir(), p.slurm_dir())"
    environment = {"PYTHONPATH": str(folder / "code"), "PYTHONSAFEPATH": "1", "PATH": "/bin"}
    root = Path(__file__).parent.parent.parent  # whose package must not win over the copy
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=root)
    assert all(path.startswith(str(folder / "code")) for path in found.stdout.split())


def test_what_is_learned_does_not_know_the_job(here: Path) -> None:
    from vlm_train.schema import learning_view

    views = []
    for name, extra in {"a": ("launch.time=5",), "b": ("launch.partition=x",), "c": ("seed=1",)}.items():
        assert main(words(f"run.dir={name}", *extra)) == 0
        views.append(learning_view(read_task(submitted(here / name) / "tasks" / "00")[0]))
    assert views[0] == views[1] != views[2]


def test_a_sweep_is_an_array_of_runs_of_their_own(here: Path) -> None:
    assert main(words("run.id=s", "--sweep", "seed=3,4", "--sweep=optim.lr=0.1,0.2")) == 0
    folder = submitted(here / "runs" / "default" / "s")
    tasks = [read_task(task)[0] for task in sorted((folder / "tasks").iterdir())]
    assert [(task.seed, task.optim.lr) for task in tasks] == [(3, 0.1), (3, 0.2), (4, 0.1), (4, 0.2)]
    assert len({task.run.dir for task in tasks}) == len({task.run.id for task in tasks}) == 4
    assert "#SBATCH --array=0-3\n" in (folder / "job.sbatch").read_text()


def test_stages_are_composed_when_submitted(here: Path) -> None:
    stages = ("++stages.one.optim.lr=0.1", "++stages.two.optim.lr=0.2")
    assert main(words("run.dir=run", *stages)) == 0
    _, found, _ = read_task(submitted(here / "run") / "tasks" / "00")
    assert {name: stage.optim.lr for name, stage in found.items()} == {"stage-01-one": 0.1, "stage-02-two": 0.2}


def test_gpus_are_asked_for_by_the_devices_of_the_run(here: Path) -> None:
    from vlm_train.cli.compose import compose_config
    from vlm_train.cli.slurm_config import compose_launch

    launch = compose_launch(["launch.gpu_type=a100"])
    text = script(compose_config(["trainer.devices=4", "strategy=ddp"]), launch, Path("/x/submit/y"), [Path("/x")])
    assert "#SBATCH --gres=gpu:a100:4\n" in text and "--gpu-bind=none" in text
    cpu = compose_config(["trainer.devices=4", "strategy=ddp", "trainer.accelerator=cpu"])
    text = script(cpu, launch, Path("/x/submit/y"), [Path("/x")])
    assert "--gres" not in text and "--gpu-bind" not in text


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (("trainer.devices=2", "strategy=ddp"), ["2 x h100", "jobs", "since launch.gpu_type does not say"]),
        (
            ("launch.gpu_type=A100_40GB", "launch.time=0:02", "launch.signal_seconds=1"),
            ["1 x a100-40gb", "in turn", "on a100-40gb, at 35%"],
        ),
        (("launch.gpu_type=abacus",), ["not planned: launch.gpu_type=abacus is none of h200"]),
        (("launch.time=0",), ["for as long as it takes", "1 x h100"]),
        (("experiment=distill_b32", "objective.parts.distill.teacher=runs/none"), ["not planned: runs/none is no run"]),
        (("trainer.accelerator=cpu",), []),
    ],
)
def test_a_job_is_planned_before_it_is_sent(
    here: Path, capsys: pytest.CaptureFixture[str], extra: tuple[str, ...], told: list[str]
) -> None:
    long = ("data=shards", "data.train.shards=a", "data.val.shards=b", "trainer.max_steps=1000000")
    chosen = extra if "experiment" in extra[0] else (*long, *extra)
    assert main(["run.dir=run", "launch.dry_run=true", *chosen]) == 0
    printed = capsys.readouterr().out.partition("#!/bin/bash")[0]
    assert [part for part in told if part not in printed] == []
    assert bool(told) == ("h100" in printed or "planned" in printed or "a100" in printed)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (("launch.partitio=x",), "launch.partition"),
        (("launch=slrum",), "launch=slurm"),
        (("launch.time=soon",), "launch.time"),
        (("launch.time=99:99:99",), "launch.time"),
        (("launch.time=1-25:00:00",), "launch.time"),
        (("launch.time=2", "launch.signal_seconds=120"), "told to save from its start"),
        (("launch.signal_seconds=65536",), "launch.signal_seconds=65535"),
        (("launch.mem=lots",), "launch.mem=64G"),
        (('launch.sbatch=["evil"]',), "no option"),
        (('launch.sbatch=["--time=1:00:00"]',), "launch.time=..."),
        (('launch.container_mounts=["a"]',), "launch.container_mounts"),
        ((r'launch.setup=["echo \"a"]',), "no bash: line 1"),
        (('launch.setup=["cat <<END"]',), "here-document"),
        (('run.dir="a\\\\b"',), "backslash"),
        (("run.dir=run\udcff",), "UTF-8"),
        (("launch.account=a\udcff",), "UTF-8"),
        (('launch.setup=["echo \udcff"]',), "UTF-8"),
        (("launch.cpus=0",), "launch.cpus"),
        (("launch.container_runtime=docker",), "pyxis, apptainer"),
        (("--sweep", "seed=1"), "--sweep"),
        (("--sweep", "sede=1,2"), "seed"),
        (("--sweep", "trainer.accelerator=cpu,gpu"), "trainer.accelerator"),
        (("--wach",), "--watch"),
        (("--watch",), "--watch"),
        (("optim.lrr=1",), "optim.lr"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_nothing_is_written(here: Path, extra: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        main(words("run.dir=run", *extra))
    assert said in str(refused.value) and refused.value.remedy
    assert not list(here.iterdir())


def test_ranks_of_srun_are_told_in_torchruns_words() -> None:
    srun = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "7",
            "SLURM_STEP_TASKS_PER_NODE": "4,3", "MASTER_ADDR": "a", "MASTER_PORT": "1"}  # fmt: skip
    found = dict(srun)
    slurm_ranks.adopt(found)
    added = {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3", "GROUP_RANK": "1"}
    assert found == srun | added
    torchrun = {**srun, "RANK": "0"}
    slurm_ranks.adopt(torchrun)
    assert torchrun == {**srun, "RANK": "0"}
    with pytest.raises(ConfigError, match="MASTER_PORT"):
        slurm_ranks.adopt({key: value for key, value in srun.items() if key != "MASTER_PORT"})
    assert slurm_ranks.tasks_by_node("8(x2),4") == [8, 8, 4]
