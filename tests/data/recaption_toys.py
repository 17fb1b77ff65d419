"""Captioners and scorers without a model, and a process that captions until it is killed."""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path

import numpy as np

from vlm_train.data.decode import SampleError
from vlm_train.data.recaption import Recipe, recaption
from vlm_train.data.scenes.make import Variant, make_scenes
from vlm_train.data.sources.shards import ShardSource
from vlm_train.errors import DataError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "proof"))  # for the process
import _runs

WORDS = ("red", "blue", "green", "circle", "square", "star", "left", "right")
NUM_TOKENS = 6


def mismatched_scenes(out: Path, num_samples: int = 40) -> Path:
    """Scenes, of which every second one, about, has the captions of another."""
    half = Variant(corruption={"caption_mismatch": 0.5})
    make_scenes(out, num_samples=num_samples, seed=3, size=32, val_fraction=0.0, variant=half, num_workers=1)
    return out / "train"


class Parrot:
    """Says words by the numbers that it is given; `own_dice` in place of these, as a sampler of torch has them."""

    def __init__(self, *, own_dice: bool = False, seconds: float = 0.0, unfit: str | None = None) -> None:
        self.source, self.settings = "parrot@0123456789abcdef", {"temperature": 1.0}
        self.dice = np.random.default_rng(0) if own_dice else None
        self.seconds, self.unfit = seconds, unfit
        self.sizes: list[int] = []

    def shown(self, image):
        key = hashlib.sha256(image.data).hexdigest()
        if self.unfit is not None and key.startswith(self.unfit):
            raise SampleError("image_corrupt", got="as asked")
        return key

    def captions(self, shown, uniforms):
        assert uniforms.shape == (len(shown), NUM_TOKENS) and ((uniforms >= 0) & (uniforms < 1)).all()
        self.sizes.append(len(shown))
        time.sleep(self.seconds)
        drawn = uniforms if self.dice is None else self.dice.random(uniforms.shape)
        words = [" ".join(WORDS[int(uniform * len(WORDS))] for uniform in row) for row in drawn]
        return [f"{key[:4]} {text}" for key, text in zip(shown, words, strict=True)]


class Mute(Parrot):
    """Says nothing of most pictures, and cannot be asked about some."""

    def captions(self, shown, uniforms):
        long = DataError("an answer does not fit behind its prompt", got="99 tokens")
        return [long if key[0] in "01" else " \0" if key[0] < "c" else key for key in shown]


class Oracle:
    """Knows which captions are true of which picture; `blind`: looks at the text alone."""

    source = "oracle@0123456789abcdef"

    def __init__(self, shards: Path, *, blind: bool = False) -> None:
        source, self.blind = ShardSource(shards=str(shards)), blind
        truth = _runs.truth_of(shards)
        samples = source.read(np.arange(len(source)))
        self.true = {hashlib.sha256(each.parts["png"]).hexdigest(): set(truth[each.uid][1]) for each in samples}

    def shown(self, image):
        return hashlib.sha256(image.data).hexdigest()

    def scores(self, shown, captions):
        return [[self.score(key, text) for text in some] for key, some in zip(shown, captions, strict=True)]

    def score(self, key, text):
        if self.blind:
            return hashlib.sha256(text.encode()).digest()[0] / 255
        return 0.9 if text in self.true[key] else 0.1


def caption(shards: Path, out: Path, *, rows=None, captioner=None, scorer=None, batch_size=8, **recipe):
    source = ShardSource(shards=str(shards))
    return recaption(
        source,
        np.arange(len(source)) if rows is None else rows,
        out,
        captioner=captioner or Parrot(),
        scorer=scorer,
        recipe=Recipe(**{"max_new_tokens": NUM_TOKENS, "part_size": 8} | recipe),
        batch_size=batch_size,
        progress=lambda done, total: None,
    )


if __name__ == "__main__":
    caption(Path(sys.argv[1]), Path(sys.argv[2]), captioner=Parrot(seconds=float(sys.argv[3])), num_captions=2)
