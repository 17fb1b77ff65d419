"""Several sources in one stream: which source has which position, and which of its own samples stands there.

The weights are whole numbers n_s over a common denominator D, and one table of D places, repeated for ever, gives each
position its source. A table has every source n_s times, so spread that every prefix of the stream holds each source
within one sample of its share: place t goes to the source that must come soonest, of those that may come already. The
j-th sample of a source (from 0) may come from place floor(j D / n_s) on and must come before ceil((j + 1) D / n_s).
Some sequence keeps all of these windows (Tijdeman, "The chairman assignment problem", Discrete Mathematics 1980), and
the earliest deadline first keeps them if any does (Horn, "Some simple scheduling algorithms", Naval Research Logistics
Quarterly 1974).

How many samples of a source came before a position is arithmetic: whole tables times n_s, and a look into the table.
So nothing is stored for a source, and each wraps through its own epochs by its own order (`order.Stream`). One source
alone is a mixture of one: D = 1, and its positions are those of the stream. Where the samples of a batch are to come
from one source, so that a loss does not learn to tell sources apart, or samples of a source are to stay together
(`grouped`), a place of the table is a block of positions.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from vlm_train.checks.data import MAX_DENOMINATOR, check_weights
from vlm_train.data.order import Replacements, Stream
from vlm_train.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One source of a mixture.

    `name`: its name, "" for the only source of a run. `weight`: its part of the stream, relative to the other weights.
    `stream`: its samples in order, seeded by `order.source_seed`. `manifest`: fingerprint of its manifest.
    """

    name: str
    weight: float
    stream: Stream
    manifest: str


@dataclass(frozen=True, slots=True)
class Places:
    """What stands at positions [n]: number of the source, and in it the epoch, the manifest row and the loss weight."""

    sources: NDArray[np.int64]
    epochs: NDArray[np.int64]
    rows: NDArray[np.int64]
    weights: NDArray[np.float32]


class Mixture:
    """The endless stream of a run: global position -> source, epoch, row, weight; a pure function.

    Args:
        members: the sources, in any order: it decides their numbers, not where their samples stand.
        block: how many positions in a row belong to one source.

    Raises:
        ConfigError: a name comes twice, a weight is not above 0, or several sources do not all `wrap`.
    """

    def __init__(self, members: Sequence[Member], *, block: int = 1) -> None:
        self.members, self.block = list(members), block
        _check(self.members)
        self._times = np.array(numerators({member.name: member.weight for member in self.members}))
        by_name = np.array(sorted(range(len(self.members)), key=lambda number: self.members[number].name))
        table = by_name[periodic_table(self._times[by_name].tolist())]
        self._table = table.astype(np.uint8 if len(self.members) <= 256 else np.uint16)
        self._before = np.zeros(len(table), np.int32)  # how often the source of each place came earlier in the table
        for number, times in enumerate(self._times):
            self._before[table == number] = np.arange(times)

    def locate(self, positions: NDArray[np.int64]) -> Places:
        """What stands at global positions [n]; a padding place has weight 0, row 0."""
        blocks, within = np.divmod(positions, self.block)
        periods, inside = np.divmod(blocks, len(self._table))
        sources = self._table[inside].astype(np.int64)
        cursors = (periods * self._times[sources] + self._before[inside]) * self.block + within
        epochs, rows = np.zeros_like(positions), np.zeros_like(positions)
        weights = np.zeros(len(positions), np.float32)
        for source in np.unique(sources):
            mine = sources == source
            epochs[mine], rows[mine], weights[mine] = self.members[source].stream.locate(cursors[mine])
        return Places(sources, epochs, rows, weights)

    def cursors(self, position: int) -> NDArray[np.int64]:
        """How many samples of each source [num_sources] came before a global position."""
        blocks, within = divmod(position, self.block)
        periods, inside = divmod(blocks, len(self._table))
        whole = periods * self._times + np.bincount(self._table[:inside], minlength=len(self.members))
        return whole * self.block + within * (np.arange(len(self.members)) == self._table[inside])

    def epochs(self, position: int) -> list[int]:
        """The epoch that each source is in at a global position."""
        lengths = [member.stream.epoch_length for member in self.members]
        return [int(cursor) // length for cursor, length in zip(self.cursors(position), lengths, strict=True)]

    @property
    def shares(self) -> list[Fraction]:
        """What part of the stream each source has, exactly."""
        return [Fraction(times, len(self._table)) for times in self._times.tolist()]

    @property
    def epoch_length(self) -> int:
        """Positions until every source has come through its first epoch."""
        streams = [member.stream for member in self.members]
        return max(
            math.ceil(Fraction(-(-stream.epoch_length // self.block)) / share) * self.block
            for stream, share in zip(streams, self.shares, strict=True)
        )

    def replacements(self, source: int, row: int) -> Replacements:
        """The rows of the same source to try, in order, when its sample at `row` is bad."""
        return self.members[source].stream.order.replacements(row)

    @property
    def fingerprint(self) -> str:
        """sha256 over what the stream is made of: names, shares, manifests and selections, in order of names, and how
        many samples in a row are of one source where that is more than one."""
        facts = [
            (member.name, str(share), member.manifest, member.stream.order.selection.fingerprint)
            for member, share in zip(self.members, self.shares, strict=True)
        ]
        text = json.dumps(sorted(facts)) + (f" in blocks of {self.block}" if self.block > 1 else "")
        return hashlib.sha256(text.encode()).hexdigest()


def numerators(weights: Mapping[str, float]) -> list[int]:
    """Whole numbers in proportion to the weights, with a sum of at most 65,536.

    A weight counts as the decimal that it is written as: 0.1 and 0.9 are exactly 1 and 9. Where that needs a larger
    sum, the sum is 65,536, and the largest remainders are rounded up.

    Raises:
        ConfigError: a weight is not a number above 0, or smaller than 1/65,536 of all.
    """
    check_weights(weights)
    exact = [Fraction(str(weight)) for weight in weights.values()]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    whole = [times // math.gcd(*whole) for times in whole]
    if sum(whole) <= MAX_DENOMINATOR:
        return whole
    shares = [Fraction(times * MAX_DENOMINATOR, sum(whole)) for times in whole]
    rounded = [math.floor(share) for share in shares]
    names = list(weights)
    by_remainder = sorted(range(len(shares)), key=lambda number: (rounded[number] - shares[number], names[number]))
    for number in by_remainder[: MAX_DENOMINATOR - sum(rounded)]:
        rounded[number] += 1
    return rounded


def periodic_table(times: Sequence[int]) -> NDArray[np.int64]:
    """Source [D] at each place of a period in which source s comes `times[s]` times, D their sum; see the head."""
    period = sum(times)
    table = np.empty(period, np.int64)
    waiting = [(0, number, 0) for number in range(len(times))]  # (place from which it may come, source, its count)
    ready: list[tuple[int, int, int]] = []  # (place before which it must come, source, its count)
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            _, number, count = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(count + 1) * period // times[number]), number, count))
        _, number, count = heapq.heappop(ready)
        table[place] = number
        heapq.heappush(waiting, ((count + 1) * period // times[number], number, count + 1))
    return table


def _check(members: Sequence[Member]) -> None:
    names = [member.name for member in members]
    if len(set(names)) < len(names):
        raise ConfigError(
            "two sources of a mixture have the same name",
            got=", ".join(f"`{name}`" for name in names),
            allowed="a name of its own for each: it decides the order of the source's samples",
        )
    for member in members:
        if len(members) > 1 and member.stream.epoch_end != "wrap":
            raise ConfigError(
                f"source `{member.name}` of a mixture has `epoch_end: {member.stream.epoch_end}`",
                got="sources that end their epochs at different positions",
                allowed="`wrap`: the sources of a mixture have no common epoch that a step could end with",
                remedy="data.epoch_end=wrap",
            )
