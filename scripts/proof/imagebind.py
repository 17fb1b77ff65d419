"""ImageBind: text finds sound, depth and motion although no text was ever trained beside one of them.

    python scripts/proof/imagebind.py               # CPU, two cores, some minutes
    python scripts/proof/imagebind.py --full        # three times the scenes and steps

Scenes. A run learns images and texts. A second one starts from it, keeps both frozen, and learns towers for sound,
depth and motion beside images alone (objective=imagebind). Then captions of scenes that nobody has seen look for the
sound, the depth map and the motion of their scene among those of 400, or in the long form 1,200. A value is the recall
of the first place, as a multiple of what chance gets; equal captions and equal scores share what they find.

The control is the second run on the same data after sounds, depth maps and motions have changed scenes: as many steps,
the same towers, the same losses, and nothing that binds. It stays near 1.
"""

from __future__ import annotations

import json
import random
import sys
import tarfile
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import _runs
from _table import Row, arguments, report

MODALITIES = {"audio": "wav", "depth": "depth.png", "motion": "motion.npy"}
BAR = 10.0
Parts = dict[str, bytes]


def main() -> int:
    options = arguments(__doc__)
    factor = 3 if options.full else 1
    with tempfile.TemporaryDirectory() as folder:
        rows = prove(Path(folder), num_samples=4000 * factor, num_steps=(400 * factor, 150 * factor))
    return report(rows, options.json)


def prove(folder: Path, *, num_samples: int, num_steps: tuple[int, int]) -> list[Row]:
    """A row for each modality, and the score of images and texts, which bounds them. `num_steps`: of the first run, and
    of the second."""
    data = _runs.make_scenes(folder, num_samples, "--modalities", ",".join(MODALITIES))
    wrong = rewritten(data, folder / "shuffled", shuffled)
    train(folder, data, "anchor", num_steps[0], "model=regions_tiny")
    bind = ("model=bound_tiny", "objective=imagebind", "optim=adamw_frozen_anchor", "evaluation=imagebind")
    for name, source in (("bound", data), ("control", wrong)):
        train(folder, source, name, num_steps[1], *bind, f"init={folder / 'anchor'}")
    rows = [
        Row(
            claim=f"text to {name}, R@1 as a multiple of chance",
            value=multiple(folder / "bound", name),
            bar=BAR,
            sense=">=",
            control=multiple(folder / "control", name),
        )
        for name in MODALITIES
    ]
    anchor = Row(claim="text to image, R@1 as a multiple of chance", value=multiple(folder / "bound", "image"), bar=BAR,
                 sense=">=")  # fmt: skip
    return [anchor, *rows]


def train(folder: Path, data: Path, name: str, num_steps: int, *words: str) -> None:
    """One run on `data`, in `folder / name`."""
    places = (f"data.train.shards={data / 'train'}", f"data.val.shards={data / 'val'}", f"run.dir={folder / name}")
    sizes = (f"trainer.max_steps={num_steps}", "trainer.global_batch=128", "schedule.warmup_steps=50")
    _runs.call(folder, ["train", "data=scenes", *words, *places, *sizes, "optim.weight_decay=0.1"], timeout=3600)


def multiple(run: Path, item: str) -> float:
    """R@1 of texts that look for `item`, as a multiple of chance."""
    result = json.loads((run / "evals" / f"{'retrieval' if item == 'image' else item}.json").read_text())
    return result[f"text_to_{item}"]["R@1"] / result["chance"]["R@1"]


def rewritten(data: Path, out: Path, change: Callable[[list[Parts]], None]) -> Path:
    """The dataset with `change` made to the samples of each training tar; evaluation keeps what it has."""
    for shard in sorted(data.glob("*/*.tar")):
        samples: dict[str, Parts] = {}
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, part = member.name.partition(".")
                samples.setdefault(key, {})[part] = tar.extractfile(member).read()  # type: ignore[union-attr]
        if shard.parent.name == "train":
            change(list(samples.values()))
        (out / shard.parent.name).mkdir(parents=True, exist_ok=True)
        with tarfile.open(out / shard.parent.name / shard.name, "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, parts in samples.items():
                for part, content in parts.items():
                    info = tarfile.TarInfo(f"{key}.{part}")
                    info.size = len(content)
                    tar.addfile(info, BytesIO(content))
    return out


def shuffled(samples: list[Parts]) -> None:
    """Every modality goes to other samples, each by an order of its own."""
    for name, part in MODALITIES.items():
        contents = [sample[part] for sample in samples]
        random.Random(name).shuffle(contents)
        for sample, content in zip(samples, contents, strict=True):
            sample[part] = content


if __name__ == "__main__":
    sys.exit(main())
