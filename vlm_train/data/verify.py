"""Says what is wrong with shards, and where.

`fast` looks at what costs no reading of samples: is each file there, of the size and version that were indexed, are the
parts and the index what the manifest says. `full` reads and decodes every sample. `sample` does so for a share of them,
drawn by hash, so that the same ones are drawn again, and bounds the rate of bad ones in all (Clopper and Pearson,
Biometrika 26, 1934). What indexing left out is listed in every mode. Where samples are read, their dialogues may be
read too, as a model's data are (`data.dialogue`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlm_train.data import decode
from vlm_train.data.decode import SampleError
from vlm_train.data.formats.base import SCHEMA
from vlm_train.data.home import INDEX, Entry
from vlm_train.data.indexing import open_manifest
from vlm_train.data.local import printable
from vlm_train.data.manifest import Manifest, read_part
from vlm_train.data.modalities import reading
from vlm_train.data.order import derive
from vlm_train.data.parallel import map_in_processes
from vlm_train.data.selection import Selection
from vlm_train.data.sources.shards import ShardSource
from vlm_train.errors import DataError
from vlm_train.locations import name_of
from vlm_train.types import NO_LABEL, RawSample

if TYPE_CHECKING:
    from vlm_train.data.dialogue import Encoded

Mode = Literal["fast", "full", "sample"]
Progress = Callable[[int, int], None]
"""Called with (samples or shards done, in all)."""

ReadDialogue = Callable[[Mapping[str, bytes], Mapping[str, Any], str], "Encoded"]
"""(parts, KEY.json, caption) -> the dialogue, as `DialogueEncoder.read`. Raises SampleError."""

_Sizes = NDArray[np.int64]  # [num, 3] of dialogues: tokens that are read, those of them to be told, those cut off

_CHUNK = 256
_CONFIDENCE = 0.95
_REMEDY = "remove it: it is made again on next use"


@dataclass(slots=True)
class Problem:
    """One thing that is wrong. `key` is empty where it is the shard's; `reason` is one of docs/data.md's words."""

    shard: str
    key: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Dialogues:
    """The `num` dialogues that a model can learn from. `tokens`: least, median and most of a dialogue, with those that
    its context does not hold; `label_share`: how many of the tokens that it reads are to be told; `cut_share`: how many
    dialogues are longer than the context."""

    num: int
    tokens: tuple[int, float, int]
    label_share: float
    cut_share: float

    @staticmethod
    def of(sizes: Sequence[_Sizes]) -> Dialogues | None:
        """Of all of these; None of no dialogue."""
        read, told, cut = np.concatenate([np.zeros((0, 3), np.int64), *sizes]).T
        if not len(read):
            return None
        whole = read + cut
        tokens = (int(whole.min()), float(np.median(whole)), int(whole.max()))
        return Dialogues(len(read), tokens, float(told.sum() / read.sum()), float((cut > 0).mean()))


@dataclass(slots=True)
class Verdict:
    """What was looked at and what was found. `num_checked` samples were read and decoded; `highest_rate`: with 95 %
    confidence at most this share of all samples cannot be used, None where none was drawn; `dialogues`: None where none
    was read."""

    mode: Mode
    num_shards: int
    num_samples: int
    num_left_out: int
    num_checked: int = 0
    problems: list[Problem] = field(default_factory=list)
    highest_rate: float | None = None
    dialogues: Dialogues | None = None

    def by_reason(self) -> dict[str, int]:
        """How many problems of each kind, the most frequent first."""
        return dict(Counter(problem.reason for problem in self.problems).most_common())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "by_reason": self.by_reason()}


def verify(
    shards: str | Sequence[str],
    *,
    mode: Mode = "fast",
    selection: Path | None = None,
    share: float = 0.01,
    seed: int = 0,
    progress: Progress | None = None,
    num_workers: int | None = None,
    dialogue: ReadDialogue | None = None,
) -> Verdict:
    """Checks shards; those that are not indexed yet are indexed first.

    Args:
        shards: as `data.train.shards`.
        mode: how much is looked at.
        selection: checked against its own fingerprint, and for belonging to these shards.
        share: in mode `sample`, the share of the samples that is read.
        seed: which they are.
        progress: called now and then.
        num_workers: processes; None is one per core.
        dialogue: reads the dialogue of each sample that is read; it must travel to processes.

    Raises:
        DataError: a shard is missing, or none of it can be used; the selection is damaged, or of other shards.
    """
    manifest = open_manifest(shards)
    left_out = [Problem(error["shard"], error["key"], error["reason"]) for error in manifest.errors()]
    verdict = Verdict(mode, len(manifest.shards), len(manifest), len(left_out), problems=left_out)
    verdict.problems += _manifest_problems(manifest)
    if selection is not None:
        Selection.load(selection, manifest.fingerprint).verify()
    if mode == "fast":
        return verdict
    _source.cache_clear()
    chunks = list(_chunks(manifest, share if mode == "sample" else None, seed))
    total, num_bad = sum(len(chunk.rows) for chunk in chunks), 0
    sizes: list[_Sizes] = []
    checked = map_in_processes(partial(_check, dialogue), chunks, num_workers=num_workers, chunk_size=4)
    for chunk, (problems, found) in zip(chunks, checked, strict=True):
        verdict.num_checked += len(chunk.rows)
        num_bad += len(problems)
        verdict.problems += problems
        sizes.append(found)
        if progress is not None:
            progress(verdict.num_checked, total)
    verdict.dialogues = Dialogues.of(sizes)
    if mode == "sample" and total:
        verdict.highest_rate = highest_rate(num_bad, total)
    return verdict


def highest_rate(num_bad: int, num_checked: int) -> float:
    """The exact one-sided upper bound of a rate, at 95 % confidence: the p at which `num_bad` or fewer of `num_checked`
    come up with a probability of 5 %."""
    if num_bad >= num_checked:
        return 1.0
    low, high = num_bad / num_checked, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(num_bad, num_checked, middle) > 1 - _CONFIDENCE else (low, middle)
    return high


def _at_most(num_bad: int, num: int, rate: float) -> float:
    """Probability of at most `num_bad` hits in `num` draws, summed by logarithms."""
    if rate >= 1:
        return 0.0
    counts = np.arange(num_bad + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log((num - counts[:-1]) / (counts[:-1] + 1)))])
    return float(np.exp(logs + counts * np.log(rate) + (num - counts) * np.log1p(-rate)).sum())


def _manifest_problems(manifest: Manifest) -> Iterator[Problem]:
    """The files of the manifest against the hashes in root.json."""
    for number, (shard, entry) in enumerate(zip(manifest.shards, manifest.entries_of, strict=True)):
        name = printable(name_of(shard))
        for ending, facts in entry["files"].items():
            file = manifest.file(number, ending)
            if _sha256(file) != facts["sha256"] and not (ending == "parquet" and _only_grew(file, entry)):
                reason = "part_changed" if ending == "parquet" else "index_changed"
                yield Problem(name, "", reason, f"{printable(str(file))} is not what indexing wrote; {_REMEDY}")
        entries = manifest.entries(np.arange(manifest.starts[number], manifest.starts[number + 1]))
        found = [hashlib.sha256(values.tobytes()).hexdigest() for values in (entries, entries["uid"])]
        if found != [entry["index_sha256"], entry["content"]]:
            index = printable(str(manifest.folders[number] / INDEX))
            yield Problem(name, "", "index_changed", f"{index} is damaged; {_REMEDY}")


def _sha256(file: Path) -> str | None:
    try:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return None


def _only_grew(part: Path, entry: Entry) -> bool:
    """Whether a part is what indexing wrote but for further columns, which other tools may add."""
    try:
        return set(read_part(part, entry["content"]).column_names) > set(SCHEMA.names)
    except DataError:
        return False


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Rows within a shard to read, and the hash of its content as it was opened."""

    shard: str
    content: str
    rows: NDArray[np.int64]


def _chunks(manifest: Manifest, share: float | None, seed: int) -> Iterator[_Chunk]:
    for number, (shard, entry) in enumerate(zip(manifest.shards, manifest.entries_of, strict=True)):
        rows = np.arange(manifest.starts[number + 1] - manifest.starts[number])
        if share is not None:
            drawn = derive(seed, (rows + manifest.starts[number]).astype(np.uint64))
            rows = rows[(drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53 < share]
        for start in range(0, len(rows), _CHUNK):
            yield _Chunk(shard, entry["content"], rows[start : start + _CHUNK])


@lru_cache(maxsize=8)
def _source(shard: str) -> ShardSource:
    return ShardSource(shards=shard)


def _check(dialogue: ReadDialogue | None, chunk: _Chunk) -> tuple[list[Problem], _Sizes]:
    source = _source(chunk.shard)
    if source.manifest.entries_of[0]["content"] != chunk.content:
        problem = Problem(source.name_of(0), "", "shard_changed", "another process has indexed it anew meanwhile")
        return [problem] * len(chunk.rows), np.zeros((0, 3), np.int64)
    problems: list[Problem] = []
    sizes: list[tuple[int, int, int]] = []
    for row, sample in zip(chunk.rows.tolist(), source.read(chunk.rows), strict=True):
        try:
            if isinstance(sample, SampleError):
                raise sample
            sizes += _decode(sample, dialogue)
        except SampleError as error:
            problems.append(Problem(*source.locate(row), error.reason, error.detail[:200]))
    return problems, np.array(sizes, np.int64).reshape(-1, 3)


def _decode(sample: RawSample, dialogue: ReadDialogue | None) -> list[tuple[int, int, int]]:
    """Every image of a sample, its texts, and what it has of other modalities; the sizes of its dialogue, if that is
    read. Raises SampleError."""
    metadata = decode.decode_metadata(sample.parts)
    caption = decode.decode_captions(sample.parts, metadata)[0]
    for name in decode.image_parts(sample.parts):
        decode.open_image(sample.parts[name]).decode()
    reading.check(sample.parts)
    if dialogue is None:
        return []
    encoded = dialogue(sample.parts, metadata, caption)
    return [(len(encoded.ids), int((encoded.labels != NO_LABEL).sum()), encoded.num_cut)]
