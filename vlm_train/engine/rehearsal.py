"""`trainer.micro_batch=auto`: the largest micro-batch that fits, found before the first step.

A process of its own rehearses whole steps (`cli/rehearse.py`): the same model, objective, optimizer and strategy, on
samples as large as the config allows. It ends before training begins, so nothing of it can stay in what is trained: no
weight, no statistic of a batch norm, no random state, no memory. It may also be killed, which is how Linux answers who
asks a CPU for too much.

It is rank 0 of a process group in which nobody else is: an exchange comes back at once, with this rank's own rows in
the place of the others' (torch's `fake` backend). So no rank can wait for one whose memory was too small, whatever the
strategy exchanges, and the buffers of exchanges are there all the same. Each rank rehearses for its own device, and
`callbacks/micro_batch.py` lets them agree on the smallest answer. The exception is fsdp2, under which each rehearsal
would need the whole model in the memory of the host: there the first rank of each machine speaks for all of its ranks.

A size is right when two whole steps end, the second with the optimizer's state, and MARGIN of the device's memory is
still free. The sizes that are tried are those into which a share is cut evenly (`micro_batches.even_sizes`): the whole
share first, which is the answer for most small models, and then by bisection. A process goes on until a size does not
fit; another one tries what is left.

The answer is a `micro_batch` line of events.jsonl. A run that is resumed takes it from there, unless the kind of
device, the number of ranks or one of the settings that stand in the line is another.
"""

from __future__ import annotations

import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_train.engine.rundir import RunDirectory, append_line, read_lines
from vlm_train.errors import VlmError

if TYPE_CHECKING:
    import torch

MARGIN = 0.08
"""Of the device's memory: for what a rehearsal does not hold, which are the buffers of real exchanges (NCCL: about 1 GB
on large machines), memory in pieces after days of training, and kernels that are loaded later."""
READERS = 1.25 * 2**30
"""Of a limit on the memory of one process: for what a rank has beside its step. Measured: 1.1 GB, of which Arrow
reserves 1 GiB at its first read."""
NO_MEMORY = 12
"""Exit code of a rehearsal that a size was too large for."""
KILLED = -9  # by the kernel, where it has no memory left

_SAYS_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "std::bad_alloc", "ALLOC_FAILED")
_SIGN_OF_LIFE_SECONDS = 0.2


@dataclass(slots=True)
class Search:
    """Bisection for the largest size that fits. `sizes` descend; `tried`: size -> whether it fits."""

    sizes: Sequence[int]
    tried: dict[int, bool] = field(default_factory=dict)

    @property
    def found(self) -> int:
        """The largest size that is known to fit; 0 where none is."""
        return max((size for size, fits in self.tried.items() if fits), default=0)

    def next(self) -> int | None:
        """What to try next; None when the answer is known."""
        failed = min((size for size, fits in self.tried.items() if not fits), default=None)
        left = [size for size in self.sizes if size > self.found and (failed is None or size < failed)]
        return (left[0] if not self.tried else left[len(left) // 2]) if left else None

    def read(self, record: Path) -> int | None:
        """Takes over what a rehearsal has written; returns the size that it was at, None where it was at none."""
        size = None
        for row in read_lines(record):
            if "fits" in row:
                self.tried[row["size"]] = row["fits"]
            size = None if "fits" in row else row["size"]
        return size


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What an answer holds for: the kind of device, how many ranks, and what else decides about memory."""

    device: str
    num_ranks: int
    settings: str

    @classmethod
    def of(cls, config: Any, num_ranks: int) -> Conditions:
        """Those of this rank in a run."""
        strategy, compiled = config.strategy, "compiled" if config.compile.enabled else "not compiled"
        recompute = "recomputed" if strategy.recompute else "kept"
        settings = f"{strategy.name}, {compiled}, {config.attention.name}, activations {recompute}"
        return cls(device=device_kind(config.trainer.accelerator), num_ranks=num_ranks, settings=settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What this rank knows. `samples`: the micro-batch, 0 where not even one sample fits; `tried`: size -> whether it
    fits, empty where the answer is that of an earlier process or of another rank."""

    samples: int
    tried: Mapping[int, bool]
    seconds: float
    conditions: Conditions


def answer(
    run: RunDirectory,
    config: Any,
    sizes: Sequence[int],
    num_ranks: int,
    command: Sequence[str],
    alive: Callable[[], Any],
) -> Answer:
    """The micro-batch of this rank, from an earlier process or by rehearsal.

    Args:
        run: the run's directory.
        config: of the run.
        sizes: samples at once that may be tried, descending.
        num_ranks: of the run.
        command: starts a rehearsal, to which the file is added that it writes its sizes to.
        alive: called now and then while a rehearsal is waited for.

    Raises:
        VlmError: a rehearsal ended for another reason than memory.
    """
    conditions, began = Conditions.of(config, num_ranks), time.monotonic()
    samples = known(run, conditions)
    if samples is None and config.strategy.name == "fsdp2" and int(os.environ.get("LOCAL_RANK", "0")) != 0:
        samples = sizes[0]
    if samples is not None:
        return Answer(samples=samples, tried={}, seconds=0.0, conditions=conditions)
    search = rehearsed(Search(sizes), command, alive)
    return Answer(samples=search.found, tried=search.tried, seconds=time.monotonic() - began, conditions=conditions)


def known(run: RunDirectory, conditions: Conditions) -> int | None:
    """The answer that the run's last `micro_batch` line holds, if it was found under the same conditions."""
    rows = [row for row in read_lines(run.events, "event") if row["event"] == "micro_batch"]
    if not rows:
        return None
    same = conditions.num_ranks == rows[-1]["ranks"] and conditions.settings == rows[-1]["settings"]
    return int(rows[-1]["micro_batch"]) if same and conditions.device in rows[-1]["devices"] else None


def rehearsed(search: Search, command: Sequence[str], alive: Callable[[], Any]) -> Search:
    """`search` with its answer; see `answer`."""
    with tempfile.TemporaryDirectory(prefix="vlm-train-rehearsal-") as folder:
        record = Path(folder) / "sizes.jsonl"
        while search.next() is not None:
            code = _run([*command, str(record)], alive)
            at = search.read(record)
            if code in (NO_MEMORY, KILLED):  # before its first try: there is no room for the weights
                append_line(record, {"size": search.sizes[-1] if at is None else at, "fits": False})
                search.read(record)
            elif code:
                raise VlmError("the rehearsal for trainer.micro_batch=auto failed", got=f"exit code {code}, see above",
                               remedy="trainer.micro_batch=N in the place of auto")  # fmt: skip
    return search


def _run(command: Sequence[str], alive: Callable[[], Any]) -> int:
    """Its exit code. It has a session of its own: signals for the run are not for it, and it goes with its parent."""
    environment = {**os.environ, "VLM_TRAIN_PARENT": str(os.getpid())}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        while True:
            try:
                return process.wait(_SIGN_OF_LIFE_SECONDS)
            except subprocess.TimeoutExpired:
                alive()
    finally:
        process.kill()
        process.wait()


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, says that memory was not there: on a GPU or on a CPU."""
    import torch

    while error is not None:
        said = isinstance(error, RuntimeError) and any(words in str(error) for words in _SAYS_NO_MEMORY)
        if said or isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def device_kind(accelerator: str) -> str:
    """What this rank trains on, with its memory."""
    import torch

    if accelerator != "cpu" and torch.cuda.is_available():
        about = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0")))
        return f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
    return f"cpu, {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"


def keep_margin(device: torch.device) -> None:
    """From now on this process may take what is free of the device's memory, without MARGIN of all of it."""
    if device.type != "cuda":
        _limit_host_memory()
        return
    import torch

    free, total = torch.cuda.mem_get_info(device)
    mine = free + torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction(max(mine / total - MARGIN, 0.0), device)


def _limit_host_memory() -> None:
    """On a CPU: of what the machine or the container has left, the share of one of its ranks; and what a limit of this
    process (`ulimit`) leaves beside readers."""
    free, total = _host_memory()
    share = (free - MARGIN * total) / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    for kind, bounds in ((resource.RLIMIT_DATA, [_own_data() + share]), (resource.RLIMIT_AS, [])):
        soft, hard = resource.getrlimit(kind)
        bounds = [*bounds, *([(1 - MARGIN) * soft - READERS] if soft != resource.RLIM_INFINITY else [])]
        if bounds:
            resource.setrlimit(kind, (max(int(min(bounds)), 0), hard))


def _host_memory() -> tuple[float, float]:
    """Bytes that are left, and that there are: of the machine, or of the container where that has fewer left."""
    about = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    machine = tuple(1024.0 * int(about[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
    most, now = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if not most.is_file() or not most.read_text().strip().isdigit():
        return machine[0], machine[1]
    allowed = float(most.read_text())
    return min((allowed - float(now.read_text()), allowed), (machine[0], machine[1]))


def _own_data() -> int:
    """Bytes of this process as RLIMIT_DATA counts them."""
    return int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
