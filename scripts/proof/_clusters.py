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
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
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
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=100000
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs={num_cpus} RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def lacks_slurm() -> str | None:
    """Why there can be no SLURM here; None where there can."""
    path = os.environ["PATH"] + ":/usr/sbin"
    if missing := [name for name in _SLURM if shutil.which(name, path=path) is None]:
        return f"{missing[0]} is not installed: apt-get install slurm-wlm munge"
    return None if os.getuid() == 0 else "its daemons run as root"


@contextmanager
def slurm_cluster(folder: Path, *, num_cpus: int = 4, max_array: int = 1001) -> Iterator[int]:
    """SLURM of one node with `num_cpus` processors, whatever this machine has: the process of its node. `folder`: a new
    one."""
    folder.mkdir()
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key, path = folder / "munge.key", folder / "slurm.conf"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    path.write_text(_CONFIG.format(folder=folder, host=host, num_cpus=num_cpus, max_array=max_array,
                                   controller_port=free_port(), node_port=free_port()))  # fmt: skip
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}"]
    munge += [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
    with ExitStack() as stack:
        stack.enter_context(_variable("SLURM_CONF", str(path)))
        stack.enter_context(_daemon(munge, folder))
        until((folder / "munge.socket").exists, "munged")
        stack.enter_context(_daemon(["slurmctld", "-D", "-f", str(path)], folder))
        node = stack.enter_context(_daemon(["slurmd", "-D", "-f", str(path), "-N", host], folder))
        until(lambda: "idle" in told("sinfo", "--noheader", "--format=%T"), "slurmd")
        stack.callback(_end_jobs)
        yield node


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


def until(is_so: Callable[[], bool], what: str) -> None:
    """Waits. Raises AssertionError where it takes too long."""
    deadline = time.monotonic() + _PATIENCE
    while not is_so():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.1)
