"""The computer itself: cores, memory, shared memory, limits of the system, its name, its clock."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, MutableMapping
from pathlib import Path

import psutil

from vlm_train.doctor.findings import GREEN, RED, YELLOW, Finding

LEAST_FILES = 4096
LEAST_SHARED_GB = 1.0
MOST_SKEW = 2.0
"""Seconds between the clock of this machine and the one that dates files."""

RANK_NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID")
"""Variables by which torchrun and srun tell a process which of how many ranks it is."""


def ranks(environment: MutableMapping[str, str] = os.environ) -> Iterator[Finding]:
    """What launchers say of this process. What is no number is taken out of the environment, for every other check
    would end at it."""
    for name in [name for name in RANK_NUMBERS if not environment.get(name, "0").isdecimal()]:
        yield Finding("ranks", RED, f"{name}={environment.pop(name)} in the environment is no number: "
                      "no run can tell which of its ranks it is", f"unset {name}")  # fmt: skip


def cores(num_ranks: int = 1, num_workers: int = 0) -> Iterator[Finding]:
    """Those that this process may use, against what is asked of them."""
    usable, there = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    limit = cpu_limit(Path("/sys/fs/cgroup"))
    usable = min(usable, max(1, int(limit))) if limit else usable
    wanted = num_ranks * (1 + num_workers)
    seen = f"{usable} of {there} usable"
    if wanted > usable:
        yield Finding("cores", YELLOW, f"{seen}; {num_ranks} ranks with {num_workers} workers each want {wanted}",
                      "fewer data.num_workers, or more cores: --cpus-per-task of SLURM, --cpus of docker")  # fmt: skip
    else:
        yield Finding("cores", GREEN, seen)


def cpu_limit(folder: Path) -> float | None:
    """Cores that a control group allows, None where it sets no limit."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def memory() -> Iterator[Finding]:
    """Main memory, and the shared memory through which loader processes hand batches over."""
    about = psutil.virtual_memory()
    light = GREEN if about.available > 2e9 else YELLOW
    yield Finding("memory", light, f"{about.available / 1e9:.1f} of {about.total / 1e9:.1f} GB free",
                  "" if light == GREEN else "end what else runs here, or ask for more: --mem of SLURM")  # fmt: skip
    folder = Path("/dev/shm")
    if folder.is_dir():
        yield shared_memory(shutil.disk_usage(folder).total / 1e9)


def shared_memory(gigabytes: float) -> Finding:
    """Of /dev/shm."""
    seen = f"/dev/shm has {gigabytes:.1f} GB"
    if gigabytes < LEAST_SHARED_GB:
        return Finding("shared_memory", YELLOW, f"{seen}: loader processes die with a bus error when it is full",
                       "docker run --ipc=host or --shm-size=8g; else data.num_workers=0")  # fmt: skip
    return Finding("shared_memory", GREEN, seen)


def limits() -> Iterator[Finding]:
    """Open files, and locked memory that network cards need."""
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= files < LEAST_FILES:
        yield Finding("open_files", YELLOW, f"at most {files} open files (up to {hard})", f"ulimit -n {LEAST_FILES}")
    else:
        yield Finding("open_files", GREEN, f"at most {files if files >= 0 else 'any number of'} open files")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if Path("/sys/class/infiniband").is_dir() and 0 <= locked < 1 << 30:
        yield Finding("locked_memory", RED, f"{locked >> 10} kB: InfiniBand cannot be used",
                      "ulimit -l unlimited, in the limits of the daemon that starts jobs")  # fmt: skip


def name() -> Iterator[Finding]:
    """Whether ranks can find this machine by its name."""
    own = socket.gethostname()
    try:
        address = socket.getaddrinfo(own, None)[0][4][0]
    except OSError as error:
        yield Finding("host_name", RED, f"{own} has no address: {error}", f"a line `127.0.0.1 {own}` in /etc/hosts")
    else:
        yield Finding("host_name", GREEN, f"{own} is {address}")


def clock(folder: Path) -> Iterator[Finding]:
    """Against the clock of the server that keeps the runs."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        before = time.time()
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())
        dated, after = os.stat(file.name).st_mtime, time.time()
    skew = max(before - dated, dated - after, 0.0)
    if skew > MOST_SKEW:
        yield Finding("clock", YELLOW, f"files are dated {skew:.1f} s off this machine's clock",
                      "one time server for all machines (chrony, ntpd)")  # fmt: skip
    else:
        yield Finding("clock", GREEN, "that of the disk, within 2 s")
