"""How long training stands still for a checkpoint: asynchronous against synchronous saves, sharded and in one file.

    python scripts/bench/checkpoint_stall.py            4 pairs of each form
    python scripts/bench/checkpoint_stall.py --full     15 pairs of each form

Two gloo ranks on this CPU hold about 25 million parameters and the two moments of AdamW: 300 MB. In turn, within one
pair of processes, each form is saved synchronously and asynchronously; blocked is the longest of the ranks, from the
call of `save` to its return, with nothing else on its way. What the thread does afterwards is waited for before the
next measurement, so neither pays for the other. The state that is compared with is read back in the tests.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "proof"))
from _table import Row, arguments, report

from vlm_train.distributed import collectives
from vlm_train.distributed.testing import run_ranks
from vlm_train.engine.rundir import RunDirectory
from vlm_train.engine.saving import Saver, State

NUM_LAYERS, WIDTH = 24, 1024  # 25.2 M parameters
FORMS = {"fsdp2": "a file of each of two ranks", "ddp": "one file by rank 0"}


def main() -> int:
    options = arguments(__doc__)
    num_pairs = 15 if options.full else 4
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(measure, 2, folder, num_pairs, timeout=1800.0)
    rows = []
    for form, told in FORMS.items():
        blocked = {kind: [max(pair) for pair in zip(*(rank[f"{form}-{kind}"] for rank in ranks), strict=True)]
                   for kind in ("synchronous", "asynchronous")}  # fmt: skip
        for kind, seconds in blocked.items():
            print(f"{form:6} {kind:12} blocks {statistics.median(seconds):6.3f} s in the middle, at most "
                  f"{max(seconds):.3f} s, of {num_pairs}")  # fmt: skip
        ratios = [new / old for new, old in zip(blocked["asynchronous"], blocked["synchronous"], strict=True)]
        claim = f"blocked seconds, asynchronous / synchronous, {told}"
        rows.append(Row(claim=claim, value=statistics.median(ratios), bar=0.25, sense="<="))
    return report(rows, options.json)


def measure(folder: str, num_pairs: int) -> dict[str, list[float]]:
    """Seconds that this rank was blocked, for each form and kind, pair by pair; the first of each only warms up."""
    found: dict[str, list[float]] = {}
    for form in FORMS:
        model, optimizer = trained(form == "fsdp2")
        savers = {kind: saver_of(Path(folder) / f"{form}-{kind}", kind) for kind in ("synchronous", "asynchronous")}
        for pair in range(num_pairs + 1):
            for kind, saver in savers.items():
                seconds = blocked(saver, model, optimizer, form, pair + 1)
                found.setdefault(f"{form}-{kind}", []).extend([seconds] if pair else [])
        if collectives.rank() == 0:
            for saver in savers.values():
                shutil.rmtree(saver.run.path)
        collectives.barrier()
    return found


def blocked(saver: Saver, model: nn.Module, optimizer: torch.optim.Optimizer, form: str, step: int) -> float:
    """Seconds from the call to its return, of a save that nothing was before."""
    collectives.barrier()
    started = time.perf_counter()
    saver.save(step, state_of(model, optimizer, form))
    seconds = time.perf_counter() - started
    saver.join()
    return seconds


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, form: str) -> State:
    """What the strategy of a run gathers."""
    content: dict[str, Any] | None
    if form == "fsdp2":
        moments = get_optimizer_state_dict(model, optimizer)
        content = {"state_dict": get_model_state_dict(model), "optimizer_states": [moments]}
    elif collectives.rank() == 0:
        content = {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    else:
        content = None
    return State(content=content, is_sharded=form == "fsdp2")


def trained(is_sharded: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and an optimizer that has made a step, so that its moments are there."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_LAYERS)))
    if is_sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (collectives.world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, WIDTH)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def saver_of(path: Path, kind: str) -> Saver:
    run = RunDirectory(path)
    run.create()
    return Saver(run=run, keep=1, keep_every_steps=None, asynchronous=kind == "asynchronous")


if __name__ == "__main__":
    sys.exit(main())
