"""Real clusters on this machine, for as long as a proof or a test lasts: SLURM of one node, Ray of a head and workers.

Each begins its daemons on free ports with all their files in one folder, and ends exactly those that it began.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

_PATIENCE = 60  # seconds
_SLURM = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol")
_CONFIG = """\
ClusterName=proof
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=2
MaxArraySize={max_array}
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=100000,bf_interval=1
SlurmdParameters=config_overrides
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=low Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={grace_time}
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
_NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=4000 State=UNKNOWN"


def lacks_slurm() -> str | None:
    """Why there can be no SLURM here; None where there can."""
    path = os.environ["PATH"] + ":/usr/sbin"
    if missing := [name for name in _SLURM if shutil.which(name, path=path) is None]:
        return f"{missing[0]} is not installed: apt-get install slurm-wlm munge"
    return None if os.getuid() == 0 else "its daemons run as root"


@contextmanager
def slurm_cluster(
    folder: Path, *, num_cpus: int = 4, max_array: int = 1001, grace_time: int = 20, num_nodes: int = 1
) -> Iterator[int]:
    """SLURM of one node, or of two that are this machine, with `num_cpus` processors each, whatever this machine has:
    the process of its first node. `folder`: a new one. Jobs of the partition `high` take the place of those of `low`,
    which have `grace_time` seconds to save."""
    folder.mkdir()
    (folder / "state").mkdir()
    key, path = folder / "munge.key", folder / "slurm.conf"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    names = (host, "localhost")[:num_nodes]  # ranks find each other by these
    nodes = [_NODE.format(name=name, host=host, port=free_port(), cpus=num_cpus) for name in names]
    path.write_text(_CONFIG.format(folder=folder, host=host, nodes="\n".join(nodes), max_array=max_array,
                                   grace_time=grace_time, controller_port=free_port()))  # fmt: skip
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}"]
    munge += [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
    with ExitStack() as stack:
        stack.enter_context(_variable("SLURM_CONF", str(path)))
        stack.enter_context(_daemon(munge, folder))
        until((folder / "munge.socket").exists, "munged")
        stack.enter_context(_daemon(["slurmctld", "-D", "-f", str(path)], folder))
        daemons = [
            stack.enter_context(_daemon(["slurmd", "-D", "-f", str(path), "-N", name], folder)) for name in names
        ]
        until(lambda: set(told("sinfo", "--noheader", "--Node", "--format=%T").split()) == {"idle"}, "slurmd")
        stack.callback(_end_jobs)
        yield daemons[0]


def told(*command: str) -> str:
    """What a command prints, whatever it thinks of it."""
    return subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE).stdout


def _end_jobs() -> None:
    told("scancel", "--user=root")
    until(lambda: not told("squeue", "--noheader").strip(), "the end of all jobs")


@contextmanager
def ray_cluster(*, num_nodes: int = 2, num_cpus: int = 2) -> Iterator[tuple[str, list[int]]]:
    """Ray of a head without processors and of nodes with `num_cpus` each: (address, process of each node)."""
    with ExitStack() as stack:
        stack.enter_context(_variable("RAY_USAGE_STATS_ENABLED", "0"))
        stack.enter_context(_variable("RAY_AUTH_MODE", "disabled"))  # else Ray leaves a secret in the home
        from ray.cluster_utils import Cluster

        common = {"object_store_memory": 100_000_000, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **common})
        stack.callback(cluster.shutdown)
        nodes = [cluster.add_node(num_cpus=num_cpus, **common) for _ in range(num_nodes)]
        yield cluster.address, [node.all_processes["raylet"][0].process.pid for node in nodes]


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """An environment variable for as long as the block lasts."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        os.environ.update({} if before is None else {name: before})


def free_port() -> int:
    """A port that nobody listens to now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@contextmanager
def _daemon(command: list[str], folder: Path) -> Iterator[int]:
    """A process that ends with the block; its session with it, where a daemon began others."""
    environment = {**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin"}
    with open(folder / f"{Path(command[0]).name}.out", "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment,
                                   start_new_session=True)  # fmt: skip
    try:
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def until(is_so: Callable[[], bool], what: str, patience: float = _PATIENCE) -> None:
    """Waits. Raises AssertionError where it takes too long."""
    deadline = time.monotonic() + patience
    while not is_so():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.1)
