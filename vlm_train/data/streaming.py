"""The steps of a run that reads its tars from front to back (`tape`): for what cannot be read at random.

Every rank and every worker passes through the same stream and decodes its own places of it. So the samples and their
pixels are those of any other number of ranks and workers, at the price of reading everything each time, and a run that
goes on reads from the beginning of the epoch up to where it stood.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from vlm_train.data.collate import Draft, SampleEncoder
from vlm_train.data.decode import SampleError
from vlm_train.data.files import StorageOptions
from vlm_train.data.formats.choose import kind_of
from vlm_train.data.patterns import expand_shards
from vlm_train.data.steps import StreamSpec, StreamSteps
from vlm_train.data.tape import ShuffledTapes
from vlm_train.errors import CheckpointError, ConfigError
from vlm_train.locations import identity, name_of, shown
from vlm_train.types import Batch, RawSample

_NUM_REPLACEMENTS = 32


class TapeSteps(StreamSteps):
    """A rank's share of each global batch of a stream of tars.

    A sample that cannot be decoded is replaced by the last good one before it in the epoch, at most 32 places back;
    where there is none its row has weight 0.

    Args:
        shards: locations of tars, compressed or not (`patterns.expand_shards`).
        spec: what the stream is; `epoch_end` must be `wrap`, for nobody knows where an epoch ends before it does.
        buffer: samples that are mixed together; 0 keeps the order of the files.
        encoder: how records become batches.
        rank: this process.
        world_size: number of processes.
        options: for servers.

    Raises:
        ConfigError: another `epoch_end`, or more ranks than samples in a global batch.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        spec: StreamSpec,
        *,
        buffer: int,
        encoder: SampleEncoder,
        rank: int,
        world_size: int,
        options: StorageOptions | None = None,
    ) -> None:
        super().__init__(spec, rank, world_size)
        if spec.epoch_end != "wrap":
            raise ConfigError(
                "a stream cannot tell where its epoch ends before it does",
                got=f"data.epoch_end={spec.epoch_end}",
                allowed="wrap",
                remedy="data.epoch_end=wrap",
            )
        self.encoder = encoder
        self.tapes = ShuffledTapes(tars(shards, options), seed=spec.seed, buffer=buffer, options=options)
        self._samples: Iterator[RawSample] | None = None
        self._errors: list[dict[str, str]] = []
        self._before: deque[RawSample] = deque(maxlen=_NUM_REPLACEMENTS + 1)
        self._epoch = self._epoch_start = self._position = 0

    def __getstate__(self) -> dict[str, Any]:  # a worker reads for itself, from the place that was sought
        return {**self.__dict__, "_samples": None}

    def definition(self) -> dict[str, Any]:
        """See `StreamSteps.definition`. The content of the tars is not known: their names stand for it."""
        names = json.dumps([name_of(identity(shard)) for shard in self.tapes.shards])
        shards = hashlib.sha256(names.encode()).hexdigest()
        return {**super().definition(), "shards": shards, "buffer": self.tapes.buffer}

    def place(self, consumed: int, batch: Batch | None) -> dict[str, Any]:
        """The epoch in which the last step began, and its first position."""
        return batch["place"] if batch else {"epoch": 0, "epoch_start": 0}

    def seek(self, place: dict[str, Any]) -> None:
        """Starts at the beginning of the epoch that `place` names. Raises CheckpointError where it names none."""
        epoch, epoch_start = place.get("epoch"), place.get("epoch_start")
        if type(epoch) is not int or type(epoch_start) is not int or min(epoch, epoch_start) < 0:
            raise CheckpointError(
                "the loader state is damaged: `epoch` and `epoch_start` are no place in a stream",
                got=place,
                allowed="two counts",
            )
        self._rewind(epoch, epoch_start)

    def batch(self, step: int) -> Batch:
        """Samples of positions [s G + start, s G + stop)."""
        first = step * self.spec.global_batch
        if first < self._position:
            self._rewind(0, 0)
        self._pass_to(first)
        place = {"epoch": self._epoch, "epoch_start": self._epoch_start}
        self._pass_to(first + self.share[0])
        self._errors.clear()  # what was met on the way is reported by whom it belongs to
        num = self.share[1] - self.share[0]
        draft, weights, errors = self.encoder.draft(num), [1.0] * num, []
        for row in range(num):
            position, sample = self._position, self._next()
            error = self._put(draft, row, sample, position)
            if error is not None:
                earlier = itertools.islice(reversed(self._before), 1, None)
                stand_in = next((s for s in earlier if self._put(draft, row, s, position) is None), None)
                weights[row] = 0.0 if stand_in is None else 1.0
                replaced_by = stand_in.key if stand_in else None
                errors.append(_report(sample.shard, sample.key, error.reason, error.detail, replaced_by))
        errors += [_report(error["shard"], error["key"], error["reason"], "", None) for error in self._errors]
        batch = draft.batch(weights=weights)
        batch["step"], batch["errors"], batch["place"] = step, errors, place
        return batch

    def _put(self, draft: Draft, row: int, sample: RawSample, position: int) -> SampleError | None:
        try:
            draft.put(row, sample, seed=self.spec.seed, visit=position)
        except SampleError as error:
            return error
        return None

    def _rewind(self, epoch: int, epoch_start: int) -> None:
        self._samples, self._epoch, self._epoch_start, self._position = None, epoch, epoch_start, epoch_start
        self._before.clear()
        self._errors.clear()

    def _pass_to(self, position: int) -> None:
        while self._position < position:
            self._next()

    def _next(self) -> RawSample:
        """The sample at the present position; the epoch after this one begins where it ends."""
        while True:
            if self._samples is None:
                self._samples = self.tapes.epoch(self._epoch, self._errors)
            sample = next(self._samples, None)
            if sample is not None:
                self._position += 1
                self._before.append(sample)
                return sample
            self._samples, self._epoch, self._epoch_start = None, self._epoch + 1, self._position
            self._before.clear()


def tars(shards: str | Sequence[str], options: StorageOptions | None = None) -> list[str]:
    """Locations of shards that must be tars. Raises ConfigError for .beton files and folders of images."""
    found = expand_shards(shards, options)
    other = [shown(shard) for shard in found if kind_of(shard) != "tar"]
    if other:
        raise ConfigError("only tars can be streamed", got=", ".join(other[:3]), allowed="tars, compressed or not",
                          remedy="data.streaming=false: these are read at random")  # fmt: skip
    return found


def _report(shard: str, key: str, reason: str, detail: str, replaced_by: str | None) -> dict[str, Any]:
    return {
        "shard": shard,
        "key": key,
        "row": None,
        "reason": reason,
        "detail": detail[:200],
        "replaced_by": replaced_by,
    }
