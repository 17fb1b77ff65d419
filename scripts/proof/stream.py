"""The stream of samples and pixels is one, whatever reads it, and a run that is killed goes on with it anywhere.

    python scripts/proof/stream.py                 world sizes 1, 2, 3, 8 with 0 and 2 workers, 3 runs killed at random
    python scripts/proof/stream.py --full          world sizes 1, 2, 3, 5, 7, 8 with 0 to 4 workers, 20 runs

Compared are whole global batches: uids, keys, captions, ids of the text, pixels, labels, weights and the reports of bad
samples. The first control lets each rank key its augmentation by its own number, the second forgets one step at each
resumption. The last rows are `vlm-train train` on two processes, killed with SIGKILL, resumed on three, killed, and
ended on one, with a picture that is cut off among the shards: the same bad samples are reported at the same steps, and
the losses differ by rounding from those of one process (control: another seed).
"""

from __future__ import annotations

import functools
import itertools
import json
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _runs
import torch
from _table import Row, arguments, report
from topology import largest

from vlm_train.data.collate import SampleEncoder
from vlm_train.data.pipeline import TrainLoader
from vlm_train.data.selection import Selection
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.steps import Ingredient, StreamSpec, TrainSteps
from vlm_train.data.tokenizer import BytePairTokenizer
from vlm_train.data.transforms import TrainTransform
from vlm_train.types import Batch, ImageSpec

GLOBAL_BATCH, NUM_STEPS, RUN_STEPS = 37, 12, 40  # 37 divides by no world size but 1
Make = Callable[[int, int], list[TrainLoader]]


def main() -> int:
    options = arguments(__doc__)
    worlds, workers = ((1, 2, 3, 5, 7, 8), range(5)) if options.full else ((1, 2, 3, 8), (0, 2))
    with tempfile.TemporaryDirectory() as folder:
        data = _runs.make_scenes(Path(folder))
        damage(data)
        make = functools.partial(loaders_of, ShardSource(shards=str(data / "train")))
        rows = [prove_topologies(make, worlds, list(workers)), prove_kills(make, worlds, 20 if options.full else 3)]
        rows += prove_training(Path(folder), data)
    return report(rows, options.json)


def damage(data: Path) -> None:
    """Breaks one picture in the first shard and has the shards indexed anew."""
    shard = sorted((data / "train").glob("*.tar"))[0]
    content = bytearray(shard.read_bytes())
    picture = content.index(b"\x89PNG")
    content[picture + 60 : picture + 200] = bytes(140)
    shard.write_bytes(content)


def loaders_of(source: ShardSource, world_size: int, workers: int, wrong: bool = False) -> list[TrainLoader]:
    """The loaders of all ranks; the `wrong` ones let the rank decide about the pixels."""
    tokenizer = BytePairTokenizer.train(["a red square"], vocab_size=260, context_length=64)
    transform = TrainTransform(spec=ImageSpec(size=32), scale=(0.3, 1.0), flip=0.5, color_jitter=0.4, grayscale=0.2)
    encoder = SampleEncoder(transform=transform, tokenizer=tokenizer)
    spec = StreamSpec(seed=3, global_batch=GLOBAL_BATCH, num_steps=NUM_STEPS, shuffle_window=2, epoch_end="wrap")
    loaders = []
    for rank in range(world_size):
        steps = TrainSteps(
            [Ingredient(source=source, selection=Selection.all(len(source)))], spec, encoder, rank, world_size
        )
        if wrong:
            steps._put = functools.partial(_put_by_rank, steps._put, rank)  # type: ignore[method-assign]
        loaders.append(TrainLoader(steps=steps, num_workers=workers))
    return loaders


def _put_by_rank(put: Callable[..., Any], rank: int, draft: Any, place: int, sample: Any, visit: int) -> Any:
    return put(draft, place, sample, visit + 1000 * rank)


def live(make: Make, life: Sequence[tuple[int, int, int]], lost: int = 0) -> list[Any]:
    """The global batches of a run of parts (ranks, workers, steps); each goes on from the JSON of the one before.

    `lost`: steps that are forgotten at each resumption, for the control.
    """
    found: list[Any] = []
    state = ""
    for world_size, workers, num_steps in life:
        loaders = make(world_size, workers)
        if state:
            parsed = json.loads(state)
            parsed["consumed"] -= lost * GLOBAL_BATCH
            for loader in loaders:
                loader.load_state_dict(parsed)
        streams = [iter(loader) for loader in loaders]
        found += [merged(batches) for batches in itertools.islice(zip(*streams, strict=True), num_steps)]
        state = json.dumps(loaders[0].state_dict())
        for stream in streams:
            stream.close()  # type: ignore[attr-defined]
    return found


def merged(batches: Sequence[Batch]) -> tuple[Any, ...]:
    """All that a model or a report sees of one step, in rank order; texts without the padding of their rank."""
    parts: list[Any] = []
    for name in ("images", "uids", "weights", "labels"):
        parts.append(torch.cat([batch[name] for batch in batches]).numpy().tobytes())  # type: ignore[literal-required]
    for batch in batches:
        parts += [ids[mask].tolist() for ids, mask in zip(batch["text_ids"], batch["text_mask"], strict=True)]
    for name in ("captions", "keys", "errors"):
        parts.append([item for batch in batches for item in batch[name]])  # type: ignore[literal-required]
    return (batches[0]["step"], *parts)


def num_different(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Steps that are not equal, missing ones included."""
    return sum(a != b for a, b in itertools.zip_longest(left, right))


def prove_topologies(make: Callable[..., list[TrainLoader]], worlds: Sequence[int], workers: Sequence[int]) -> Row:
    """Steps that differ from one process without workers, summed over all numbers of ranks and workers."""
    reference = live(make, [(1, 0, NUM_STEPS)])
    if not any(errors for *_, errors in reference):
        raise AssertionError("the bad sample was not met")
    value = sum(num_different(live(make, [(w, k, NUM_STEPS)]), reference) for w in worlds for k in workers)
    control = num_different(live(functools.partial(make, wrong=True), [(2, 0, NUM_STEPS)]), reference)
    claim = f"steps that differ, {len(worlds)} world sizes x {len(workers)} numbers of workers"
    return Row(claim=claim, value=value, bar=0, sense="==", control=control)


def prove_kills(make: Make, worlds: Sequence[int], num_runs: int) -> Row:
    """Steps that differ from an untouched run, summed over runs that move at random steps to other machines."""
    reference, generator = live(make, [(1, 0, NUM_STEPS)]), random.Random(0)
    value = control = 0
    for _ in range(num_runs):
        stops = [0, *sorted(generator.sample(range(1, NUM_STEPS), 3)), NUM_STEPS]
        life = [(generator.choice(worlds), generator.randint(0, 2), b - a) for a, b in itertools.pairwise(stops)]
        value += num_different(live(make, life), reference)
        control += num_different(live(make, life, lost=1), reference)
    claim = f"steps that differ, {num_runs} runs that move 3 times"
    return Row(claim=claim, value=value, bar=0, sense="==", control=control)


def prove_training(folder: Path, data: Path) -> list[Row]:
    """A run on two processes, then three, then one, against one process alone."""
    alone, moved, other = folder / "alone", folder / "moved", folder / "other"
    common = (f"trainer.max_steps={RUN_STEPS}", "checkpoint.every_steps=4", "data.max_error_rate=0.1")
    words = functools.partial(_runs.train_words, data, *common)
    _runs.call(folder, words(f"run.dir={alone}"))
    _runs.call(folder, words(f"run.dir={other}", "seed=1"))
    for devices, step in ((2, 10), (3, 25)):
        machine = ("strategy=ddp", f"trainer.devices={devices}")
        _runs.kill_after(folder, words(f"run.dir={moved}", *machine), moved, step)
    _runs.call(folder, words(f"run.dir={moved}"))
    if not bad_samples(alone):
        raise AssertionError("the bad sample was not met")
    label = "training killed on 2 processes, killed on 3, ended on 1"
    return [
        Row(
            claim=f"reports of bad samples that differ, {label}",
            value=num_different(bad_samples(moved), bad_samples(alone)),
            bar=0,
            sense="==",
            control=num_different(bad_samples(other), bad_samples(alone)),
        ),
        Row(
            claim=f"largest difference of a loss, {label}",
            value=largest(_runs.losses(moved), _runs.losses(alone)),
            bar=1e-5,
            sense="<=",
            control=largest(_runs.losses(other), _runs.losses(alone)),
        ),
    ]


def bad_samples(run: Path) -> list[dict[str, Any]]:
    """The rows of data_errors.jsonl that training wrote, not indexing (step 0)."""
    rows = [json.loads(line) for line in (run / "data_errors.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == "train" and row["step"] > 0]


if __name__ == "__main__":
    sys.exit(main())
