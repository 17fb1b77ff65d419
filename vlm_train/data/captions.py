"""The captions of a source, and nothing else of it, to train a tokenizer on.

They are taken by the same rules as in training (`decode.decode_captions`), so a tokenizer is trained on exactly the
texts that it will meet. Of a very large source evenly spaced samples are read: a byte-pair tokenizer is settled long
before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from vlm_train.data.chat import IMAGE, turns_of
from vlm_train.data.decode import SampleError, decode_captions, decode_metadata
from vlm_train.errors import DataError
from vlm_train.types import RawSample, Source

MAX_SAMPLES = 1_000_000
_CHUNK = 256


class CaptionStream:
    """Iterates captions; counts what it read and what it had to leave out.

    `num_captions`: captions given so far. `skipped`: number of samples left out, by reason. Both start anew with each
    iteration.

    Args:
        samples: gives the samples from the first on, each time it is called.
        with_dialogues: what is said in `conversations`, and by whom, comes behind the captions of a sample.
    """

    def __init__(self, samples: Callable[[], Iterable[RawSample | DataError]], with_dialogues: bool = False) -> None:
        self.samples, self.with_dialogues = samples, with_dialogues
        self.num_captions = 0
        self.skipped: Counter[str] = Counter()

    def __iter__(self) -> Iterator[str]:
        self.num_captions = 0
        self.skipped = Counter()
        for sample in self.samples():
            for caption in self._captions_of(sample):
                self.num_captions += 1
                yield caption

    def _captions_of(self, sample: RawSample | DataError) -> list[str]:
        try:
            if isinstance(sample, DataError):
                raise sample
            metadata = decode_metadata(sample.parts)
            captions = decode_captions(sample.parts, metadata)
            said = turns_of(metadata, captions[0]) if self.with_dialogues and "conversations" in metadata else []
            return [*captions, *(f"{turn.role} {turn.content.replace(IMAGE, ' ')}" for turn in said)]
        except SampleError as error:
            self.skipped[error.reason] += 1
            return []


def every_sample(source: Source, max_samples: int = MAX_SAMPLES) -> Iterator[RawSample | DataError]:
    """The samples of a source in file order, evenly spaced ones where there are more than `max_samples`."""
    num = min(len(source), max_samples)
    for start in range(0, num, _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, num), dtype=np.int64)
        yield from source.read(rows * len(source) // num)
