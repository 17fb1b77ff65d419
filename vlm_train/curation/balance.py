"""The step that balances what captions speak of, after MetaCLIP (Xu et al., 2023, arXiv 2309.16671).

Of each entry of a list (`entries`) it is counted in how many captions it stands. An entry of count c lets a sample pass
with probability min(1, t / c): so the rare ones keep all their samples, frequent ones about t. A sample stays if one of
its entries lets it pass.

Where the published code draws from a generator in the order of the samples, here a draw is a hash of (seed, uid, entry)
in [0, 1), so it depends on nothing else. Then a sample passes at t exactly if t > min over its entries of draw * count:
this least t is the value of a row, and any t, or that which keeps a given share, follows from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlm_train.curation import frequent, texts
from vlm_train.curation.caption_parts import CaptionPart, add_captions, caption_parts
from vlm_train.curation.chain import Found, Settings, Work
from vlm_train.curation.entries import Entries, Matches
from vlm_train.curation.limits import check_number, check_one_of, check_share, check_whole
from vlm_train.curation.ranks import drawn, highest, num_of_share
from vlm_train.data.manifest import Manifest
from vlm_train.data.order import mix
from vlm_train.errors import ConfigError

BALANCE, UNMATCHED = "balance", "unmatched"
_UNIT = 2.0**-53
_NUM_TOLD = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """Samples that none of their entries lets pass, by the rule `balance`, and those whose first caption has no entry,
    by the rule `unmatched`, unless `unmatched` is "keep".

    `entries`: a file in UTF-8, an entry a line; or `min_count`: entries are the words and pairs of words that stand in
    so many captions at least. `t`: as above; or `keep`: the share of the samples with an entry that stays, exactly, of
    equal ones those of lower uid. One of each two is set. The value of a row of `balance` is the t that it takes to
    stay: it stays for greater ones. A sample whose caption cannot be read stays and is counted.
    """

    entries: str | None = None
    min_count: int | None = None
    t: float | None = None
    keep: float | None = None
    unmatched: Literal["drop", "keep"] = "drop"
    seed: int = 0

    def settings(self, work: Work) -> Settings:
        """See `Step`."""
        check_one_of("t", "keep", (self.t, self.keep), what="balancing has one limit", example="t: 20000")
        check_one_of("entries", "min_count", (self.entries, self.min_count), what="entries come from one place",
                     example="min_count: 20")  # fmt: skip
        if self.t is not None:
            check_number("t", self.t, low=1)
        if self.keep is not None:
            check_share("keep", self.keep)
        if self.min_count is not None:
            check_whole("min_count", self.min_count, low=1)
        if self.unmatched not in ("drop", "keep"):
            raise ConfigError("an unknown choice for samples without an entry", got=self.unmatched,
                              allowed="drop or keep", remedy="unmatched=drop")  # fmt: skip
        return {
            **({"t": self.t} if self.keep is None else {"keep": self.keep}),
            **({"entries": read_entries(self.entries).fingerprint} if self.entries else {"min_count": self.min_count}),
            "unmatched": self.unmatched,
            "seed": self.seed,
            "caption_columns": texts.CAPTION.version,
        }

    def find(self, manifest: Manifest, among: NDArray[np.bool_], work: Work) -> Found:
        """See `Step`."""
        add_captions(manifest, work)
        rows = np.flatnonzero(among)
        parts = caption_parts(manifest, rows)
        if self.entries is None:
            entries = frequent.find_entries(parts, work.engine, self.min_count or 1)
        else:
            entries = read_entries(self.entries)
        counts = np.zeros(len(entries), np.int64)
        for numbers, found in work.engine.map(_count, [_Matched(part, entries.texts) for part in parts]):
            counts[numbers] += found
        items = [
            _Drawn(_Matched(part, entries.texts), counts, manifest.uids(part.first + part.rows), self.seed)
            for part in parts
        ]
        least = np.concatenate([np.empty(0), *work.engine.map(_least, items)])
        matched = np.flatnonzero(np.isfinite(least))
        if self.keep is None:
            goes = matched[least[matched] >= self.t]
        else:
            num = num_of_share(self.keep, len(matched))
            goes = matched[~highest(-least[matched], manifest.uids(rows[matched]), num)]
        without = np.flatnonzero(np.isinf(least)) if self.unmatched == "drop" else np.empty(0, np.int64)
        dropped = np.concatenate([goes, without])
        rules = np.repeat([BALANCE, UNMATCHED], [len(goes), len(without)])
        values = np.where(np.isfinite(least[dropped]), least[dropped], np.nan)
        facts = {"num_without_caption": int(np.isnan(least).sum()), "num_matched": len(matched)}
        return Found(rows[dropped], rules, np.full(len(dropped), -1), values, {**facts, **_told(entries, counts)})


def read_entries(file: str) -> Entries:
    """The entries of a file, one a line.

    Raises:
        ConfigError: it cannot be read, is not in UTF-8, or has none.
    """
    try:
        return _compiled(tuple(Path(file).read_text("utf-8-sig").splitlines()))
    except (OSError, UnicodeError) as error:
        raise ConfigError("the entries to balance by cannot be read", got=f"{file}: {error}",
                          allowed="a file in UTF-8", remedy="give its path, an entry a line") from None  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class _Matched:
    """Rows of a part, and the entries that are looked for."""

    part: CaptionPart
    entries: tuple[str, ...]

    def match(self) -> tuple[Entries, list[str | None], Matches]:
        entries, captions = _compiled(self.entries), self.part.captions()
        return entries, captions, entries.match([caption or "" for caption in captions])


@dataclass(frozen=True, slots=True, eq=False)
class _Drawn:
    """The same with what draws take: in how many captions each entry stands [E], the uids of the rows, the seed."""

    matched: _Matched
    counts: NDArray[np.int64]
    uids: NDArray[np.uint8]
    seed: int


@lru_cache(maxsize=1)
def _compiled(texts: tuple[str, ...]) -> Entries:
    """A process builds the tree once."""
    return Entries.of(texts)


def _count(item: _Matched) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(entries that occur in these rows, in how many of them)."""
    _, _, (_, numbers) = item.match()
    found, counts = np.unique(numbers, return_counts=True)
    return found, counts


def _least(item: _Drawn) -> NDArray[np.float64]:
    """Of each row the t that it takes to stay; inf where no entry stands in the caption, NaN where there is none."""
    entries, captions, (caption, entry) = item.matched.match()
    draws = mix(drawn(item.uids, item.seed)[caption] + entries.hashes[entry]) >> np.uint64(11)
    least = np.array([np.nan if text is None else np.inf for text in captions])
    np.minimum.at(least, caption, draws.astype(np.float64) * _UNIT * item.counts[entry])
    return least


def _told(entries: Entries, counts: NDArray[np.int64]) -> dict[str, Any]:
    """What provenance says of the entries: how many occur, and the most frequent."""
    order = np.argsort(-counts, kind="stable")[:_NUM_TOLD]
    return {
        "num_entries": len(entries),
        "num_entries_found": int((counts > 0).sum()),
        "most_frequent": {entries.texts[number]: int(counts[number]) for number in order.tolist()},
    }
