"""GPUs and what joins them: driver and libraries, who else is there, arithmetic, all-reduce."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from vlm_train.doctor.findings import GREEN, RED, YELLOW, Finding
from vlm_train.engine.flops import peak_flops

LEAST_OF_MEDIAN = 0.9
"""What a healthy device reaches of the median of all."""
LEAST_LINK = {"nccl": 10.0, "gloo": 0.1}
"""GB/s of an all-reduce, for each rank."""

_SIDE = 8192
_ROUNDS = 5
_REDUCED = {"nccl": 256 << 20, "gloo": 16 << 20}  # bytes
_FIELDS = ("index", "name", "driver_version", "memory.total", "memory.used", "ecc.errors.uncorrected.volatile.total",
           "clocks_throttle_reasons.hw_thermal_slowdown")  # fmt: skip


def gpus() -> Iterator[Finding]:
    """What torch sees, against what the driver sees."""
    rows = nvidia_smi()
    if not torch.cuda.is_available():
        if rows:
            yield Finding("gpus", RED, f"the driver ({rows[0]['driver_version']}) has {len(rows)} GPUs, torch "
                          f"{torch.__version__} for CUDA {torch.version.cuda} sees none", "a newer driver, or a torch "
                          "built for this one: https://pytorch.org/get-started/locally; CUDA_VISIBLE_DEVICES may hide "
                          "them")  # fmt: skip
        else:
            yield Finding("gpus", GREEN, "none: training runs on the processor")
        return
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    seen = f"{kinds}; CUDA {torch.version.cuda}, NCCL {nccl}"
    if len(set(names)) > 1:
        yield Finding("gpus", YELLOW, seen, "ranks wait for the slowest: name equal ones in CUDA_VISIBLE_DEVICES")
    else:
        yield Finding("gpus", GREEN, seen)
    for row in rows:
        yield from of_gpu(row)


def nvidia_smi() -> list[dict[str, str]]:
    """A row for each GPU of the driver; none where there is no driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60)
    lines = told.stdout.splitlines() if told.returncode == 0 else []
    return [dict(zip(_FIELDS, (word.strip() for word in line.split(",")), strict=False)) for line in lines]


def of_gpu(row: Mapping[str, str]) -> Iterator[Finding]:
    """What is wrong with one GPU."""
    name = f"gpu {row['index']}"
    used, total = float(row["memory.used"]), float(row["memory.total"])
    if used > 0.1 * total:
        yield Finding("gpu_memory", YELLOW, f"{name}: {used / 1024:.1f} of {total / 1024:.1f} GB are in use",
                      "end who uses it (nvidia-smi names them), or take another: CUDA_VISIBLE_DEVICES")  # fmt: skip
    errors = row.get("ecc.errors.uncorrected.volatile.total", "")
    if errors.isdecimal() and int(errors):
        yield Finding("gpu_ecc", RED, f"{name}: {errors} uncorrected memory errors since it was started",
                      "leave this machine out (--exclude of SLURM) and tell its administrator")  # fmt: skip
    if row.get("clocks_throttle_reasons.hw_thermal_slowdown", "") == "Active":
        yield Finding("gpu_heat", YELLOW, f"{name} is slowed down: too hot", "tell the administrator")


def arithmetic() -> Iterator[Finding]:
    """How fast each device multiplies matrices; one far below the others slows all ranks down."""
    if torch.cuda.is_available():
        rates = [matmul_rate(torch.device("cuda", number)) for number in range(torch.cuda.device_count())]
        yield from outliers(rates)
    else:
        reached = peak_flops(torch.device("cpu"), torch.float32)
        assert reached is not None  # of a processor it is measured
        yield Finding("matmul", GREEN, f"{reached / 1e12:.2f} TFLOP/s in float32 on {torch.get_num_threads()} threads")


def matmul_rate(device: torch.device) -> float:
    """TFLOP/s of the product of two square matrices in bfloat16 on a GPU."""
    first, second = (torch.randn(_SIDE, _SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(_ROUNDS + 1):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        first @ second
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * _SIDE**3 / min(seconds[1:]) / 1e12


def outliers(rates: Sequence[float]) -> Iterator[Finding]:
    """`rates`: TFLOP/s by device."""
    median = statistics.median(rates)
    slow = [number for number, rate in enumerate(rates) if rate < LEAST_OF_MEDIAN * median]
    for number in slow:
        yield Finding("matmul", RED, f"gpu {number}: {rates[number]:.0f} TFLOP/s, the median is {median:.0f}",
                      "leave it out: CUDA_VISIBLE_DEVICES, or --exclude the machine")  # fmt: skip
    if not slow:
        yield Finding("matmul", GREEN, f"{min(rates):.0f} to {max(rates):.0f} TFLOP/s in bfloat16")


def of_link(backend: str, num_ranks: int, gigabytes: float) -> Finding:
    """`gigabytes`: a second, see `all_reduce_rate`."""
    seen = f"{num_ranks} ranks of this machine reduce {gigabytes:.2f} GB/s each ({backend})"
    if gigabytes < LEAST_LINK[backend]:
        return Finding("all_reduce", YELLOW, seen, "nvidia-smi topo -m: are the GPUs joined by NVLink? NCCL_DEBUG=INFO "
                       "tells which way NCCL takes" if backend == "nccl" else "fewer ranks than cores")  # fmt: skip
    return Finding("all_reduce", GREEN, seen)


def all_reduce_rate() -> tuple[str, float]:
    """(backend, GB/s that this rank sends and receives in a ring). Collective; the group of torchrun's environment."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend)
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if backend == "nccl" else torch.device("cpu")
    values, seconds = torch.ones(_REDUCED[backend] // 4, device=device), []
    for _ in range(_ROUNDS + 1):
        _finish(device)
        start = time.perf_counter()
        dist.all_reduce(values)
        _finish(device)
        seconds.append(time.perf_counter() - start)
        values.fill_(1.0)
    dist.destroy_process_group()
    return backend, 2 * (world - 1) / world * _REDUCED[backend] / min(seconds[1:]) / 1e9


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
