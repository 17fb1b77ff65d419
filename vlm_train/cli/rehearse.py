"""`python -m vlm_train.cli.rehearse RUN_DIR RECORD`: what `trainer.micro_batch=auto` starts; `engine/rehearsal.py`.

What it learns stands in RECORD. It ends with exit code 0 when the answer is known, with NO_MEMORY when the size that it
was at did not fit.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from vlm_train.cli.outcome import tell
from vlm_train.cli.rank import die_with_parent
from vlm_train.engine.rehearsal import NO_MEMORY, Search, is_out_of_memory
from vlm_train.engine.rundir import RunDirectory
from vlm_train.engine.stops import SIGNALS
from vlm_train.log import get_logger


def main(arguments: list[str]) -> int:
    """Rehearses until a size does not fit; returns the exit code."""
    die_with_parent()
    get_logger("vlm_train").setLevel("WARNING")  # the run says the same
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # they are for the run; who started this ends it
    try:
        rehearse(RunDirectory(arguments[0]), Path(arguments[1]))
    except Exception as error:
        if is_out_of_memory(error):
            return NO_MEMORY
        tell(error, arguments, who="[rehearsal] ")
        return 1
    return 0


def rehearse(run: RunDirectory, record: Path) -> None:
    """Tries what is left to be tried, as rank 0 of as many as the run has, of which no other is there."""
    from torch.utils.data import DataLoader

    from vlm_train import build, training
    from vlm_train.build import Placement
    from vlm_train.data.tokenizer import load_tokenizer
    from vlm_train.engine.callbacks.rehearsal import Rehearsal, Rehearsed
    from vlm_train.engine.micro_batches import even_sizes
    from vlm_train.engine.trainer import set_up_torch
    from vlm_train.plan.batches import Zeros, largest_sample, make_batch
    from vlm_train.schema import read_config

    config = read_config(run.path)
    placement = Placement(rank=0, world_size=Placement.from_environment().world_size)
    if "RANK" in os.environ:
        os.environ["RANK"] = "0"
    trainer = config.trainer
    set_up_torch(accelerator=trainer.accelerator, deterministic=trainer.deterministic, num_threads=trainer.num_threads)
    if config.strategy.name != "single":
        _join_nobody(placement.world_size)
    sizes = even_sizes(trainer.global_batch, placement.world_size)
    search = Search(sizes)
    search.read(record)
    parts = build.network(config, load_tokenizer(str(run.tokenizer)))
    build.bind_teachers(parts)
    sample = largest_sample(parts.model, config.data.hard_captions)
    batch = make_batch(Zeros(), parts, sample, sizes[0])
    batch["step"] = 0
    tries = training.make_trainer(
        config, [Rehearsal(search, batch, record)], trains_a_part=training.trains_a_part(parts)
    )
    nothing: Any = [0]  # a loader is there for the trainer's sake: steps come from the callback
    try:
        tries.fit(training.training_module(parts, placement), train_dataloaders=DataLoader(nothing, batch_size=None))
    except Rehearsed:
        return


def _join_nobody(world_size: int) -> None:
    """A process group of `world_size` ranks, whose exchanges come back at once."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what holds memory that is not there cannot be relied on to end in order
