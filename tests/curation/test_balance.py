"""Balancing: matches against substrings, counts and draws against a loop, exact shares, and that no order decides."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import _pairs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.curation import balance, frequent
from vlm_train.curation.balance import Balance
from vlm_train.curation.caption_parts import add_captions, caption_parts
from vlm_train.curation.engines import Local
from vlm_train.curation.entries import Entries, words_of
from vlm_train.curation.ranks import num_of_share
from vlm_train.errors import ConfigError, DataError

WORDS = ["new", "york", "dog", "hot", "hotdog", "a", "Dog,", "dog.", "it's", "ﬁre", "猫"]
TEXT = st.lists(st.sampled_from(WORDS), min_size=1, max_size=7).map(" ".join)
CAPTIONS = st.lists(TEXT, min_size=1, max_size=16)
LISTS = st.lists(st.lists(st.sampled_from(["new", "york", "dog", "hot", "HOT", "fire", "猫", "zebra"]), min_size=1,
                          max_size=3).map(" ".join), min_size=1, max_size=8)  # fmt: skip


def spaced(text: str) -> str:
    return f" {' '.join(words_of(text))} "


@given(entries=LISTS, captions=CAPTIONS)
def test_an_entry_matches_as_a_substring_between_spaces(entries: list[str], captions: list[str]) -> None:
    compiled = Entries.of(entries)
    found = {(int(c), compiled.texts[e]) for c, e in zip(*compiled.match(captions), strict=True)}
    distinct = {spaced(entry).strip() for entry in entries}
    assert set(compiled.texts) == distinct
    assert found == {(n, e) for n, text in enumerate(captions) for e in distinct if f" {e} " in spaced(text)}
    assert len(compiled.match(captions)[0]) == len(found)


def test_borders_of_words_count() -> None:
    def of(entry: str, caption: str) -> bool:
        return bool(len(Entries.of([entry]).match([caption])[0]))

    assert of("hot dog", "A HOT  dog, please") and of("dog", "dog: a dog") and of("new york", "in New York!")
    assert not of("hot dog", "a hotdog") and not of("dog", "dogs") and not of("hot dog", "hot, dog")
    assert of("it's", "it's") and not of("it", "it's")


def test_an_entry_has_one_hash_in_any_list() -> None:
    alone, among = Entries.of(["dog"]), Entries.of(["cat", "dog", "zebra"])
    assert alone.hashes[0] == among.hashes[among.texts.index("dog")]
    assert among.fingerprint == Entries.of(["zebra", "DOG", "cat", "dog "]).fingerprint != alone.fingerprint


def in_words(captions: list[str], entries: list[str], uids: np.ndarray, seed: int) -> tuple[list[float], Counter[str]]:
    """Of each caption the least draw * count over its entries, inf without one; the counts."""
    compiled = Entries.of(entries)
    matched = [[e for e in compiled.texts if f" {e} " in spaced(text)] for text in captions]
    counts = Counter(entry for some in matched for entry in some)
    draws = balance.mix(balance.drawn(uids, seed)[:, None] + compiled.hashes[None]) >> np.uint64(11)
    share = draws.astype(np.float64) * 2.0**-53
    return [
        min((share[n, compiled.texts.index(e)] * counts[e] for e in some), default=np.inf)
        for n, some in enumerate(matched)
    ], counts


def listed(folder: Path, entries: list[str]) -> str:
    file = folder / "entries.txt"
    file.write_text("\n".join(entries) + "\n", "utf-8")
    return str(file)


@settings(max_examples=15, deadline=None)
@given(captions=CAPTIONS, entries=LISTS, seed=st.integers(0, 9), size=st.integers(2, 16), t=st.integers(1, 4))
def test_a_sample_stays_if_an_entry_lets_it_pass(
    captions: list[str], entries: list[str], seed: int, size: int, t: int
) -> None:
    with _pairs.fresh() as folder:
        step = Balance(entries=listed(folder, entries), t=t, seed=seed)
        found = _pairs.run(step, captions)
        order = np.random.default_rng(seed).permutation(len(captions)).tolist()
        again = _pairs.run(step, captions, order=order, max_samples=size)
        uids = _pairs.write(folder, captions).uids()
    assert {n: told[0] for n, told in again.items()} == {n: told[0] for n, told in found.items()}
    least, counts = in_words(captions, entries, uids, seed)
    for number, value in enumerate(least):
        passes = any(count <= t for entry, count in counts.items() if f" {entry} " in spaced(captions[number]))
        assert not (passes and number in found)  # what is rare stays, all of it
        if np.isinf(value):
            assert found[number][0] == "unmatched" and np.isnan(found[number][2])
        elif value >= t:
            assert found[number] == ("balance", -1, value)
        else:
            assert number not in found


def test_unmatched_samples_may_stay(tmp_path: Path) -> None:
    file, captions = listed(tmp_path, ["dog"]), ["a dog", "a cat"]
    assert _pairs.run(Balance(entries=file, t=5), captions) == {
        1: ("unmatched", -1, pytest.approx(np.nan, nan_ok=True))
    }
    assert _pairs.run(Balance(entries=file, t=5, unmatched="keep"), captions) == {}


@settings(max_examples=6, deadline=None)
@given(keep=st.sampled_from([0.1, 0.29, 0.5, 0.93]), seed=st.integers(0, 9))
def test_exactly_a_share_of_the_matched_stays(keep: float, seed: int) -> None:
    captions = ["a dog"] * 20 + ["a dog and a cat"] * 5 + ["a zebra"] * 2 + ["nothing"] * 3
    with _pairs.fresh() as folder:
        step = Balance(entries=listed(folder, ["dog", "cat", "zebra"]), keep=keep, seed=seed)
        found = _pairs.run(step, captions)
        order = np.random.default_rng(seed).permutation(30).tolist()
        again = _pairs.run(step, captions, order=order, max_samples=7)
    assert {n: told[:2] for n, told in found.items()} == {n: told[:2] for n, told in again.items()}
    assert len(found) - 3 == 27 - num_of_share(keep, 27)


def test_frequent_entries_are_held_down_to_about_t(tmp_path: Path) -> None:
    """Of 600 "dog" about 60 stay (a binomial number of standard deviation 7.3), of 20 "zebra" all."""
    captions = [f"a dog number{n}" for n in range(600)] + [f"a zebra number{n}" for n in range(20)]
    manifest = _pairs.write(tmp_path, captions)
    step = Balance(entries=listed(tmp_path, ["dog", "zebra"]), t=60)
    found = step.find(manifest, np.ones(620, bool), _pairs.work(tmp_path))
    dropped = _pairs.told(manifest, found)
    assert abs(600 - len(dropped) - 60) < 4 * 7.4 and max(dropped) < 600
    assert found.facts["most_frequent"] == {"dog": 600, "zebra": 20} and found.facts["num_matched"] == 620


def published(captions: list[str], order: list[int], entries: list[str], t: float, seed: int) -> set[int]:
    """The twin: draws of a generator, one after the other in the order in which samples are stored."""
    draws, stays = random.Random(seed), set()
    counts = Counter(e for text in captions for e in entries if f" {e} " in spaced(text))
    for number in order:
        matched = [e for e in entries if f" {e} " in spaced(captions[number])]
        if any(draws.random() < min(1, t / counts[e]) for e in matched):
            stays.add(number)
    return stays


def test_draws_of_a_generator_depend_on_the_order(tmp_path: Path) -> None:
    captions, entries = [f"a dog number{n}" for n in range(60)], ["dog"]
    orders = [list(range(60)), list(reversed(range(60)))]
    assert published(captions, orders[0], entries, 20, 0) != published(captions, orders[1], entries, 20, 0)
    step = Balance(entries=listed(tmp_path, entries), t=20)
    ours = [_pairs.run(step, captions, order=order) for order in orders]
    assert ours[0] == ours[1] and 0 < len(ours[0]) < 60
    assert _pairs.run(Balance(entries=step.entries, t=20, seed=1), captions).keys() != ours[0].keys()


@settings(max_examples=8, deadline=None)
@given(captions=CAPTIONS, least=st.integers(1, 4), size=st.integers(2, 16))
def test_own_entries_are_the_words_and_pairs_that_are_frequent(captions: list[str], least: int, size: int) -> None:
    counts: Counter[str] = Counter()
    for text in captions:
        words = words_of(text)
        pairs = {f"{a} {b}" for a, b in pairwise(words)}
        solid = [name for name in set(words) | pairs if not set(name.split()) & {",", "."}]
        counts.update(solid)
    expected = {name for name, count in counts.items() if count >= least}
    with _pairs.fresh() as folder:
        manifest = _pairs.write(folder, captions, max_samples=size)
        add_captions(manifest, _pairs.work(folder))
        parts = caption_parts(manifest, np.arange(len(captions)))
        if not expected:
            with pytest.raises(DataError, match="min_count"):
                frequent.find_entries(parts, Local(num_workers=1), least)
        else:
            assert set(frequent.find_entries(parts, Local(num_workers=1), least).texts) == expected


def test_counts_of_many_parts_are_added(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(frequent, "_MERGED", 1)
    captions = ["a dog"] * 3 + ["a cat"] * 2
    assert set(_pairs.run(Balance(min_count=3, t=100), captions, max_samples=1)) == set()
    manifest = _pairs.write(tmp_path, captions, max_samples=1)
    found = Balance(min_count=3, t=100).find(manifest, np.ones(5, bool), _pairs.work(tmp_path))
    assert found.facts["most_frequent"] == {"a": 5, "a dog": 3, "dog": 3}


def test_workers_change_nothing(tmp_path: Path) -> None:
    captions = [f"a dog number{n % 9} of {n}" for n in range(40)]
    manifest = _pairs.write(tmp_path, captions, max_samples=16)
    step, among = Balance(min_count=4, keep=0.4), np.ones(40, bool)
    one, two = (step.find(manifest, among, _pairs.work(tmp_path, num_workers=num)) for num in (1, 2))
    assert len(one.rows) and _pairs.told(manifest, one) == _pairs.told(manifest, two) and one.facts == two.facts


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"min_count": 2}, "t or keep"),
        ({"min_count": 2, "t": 3, "keep": 0.5}, "t or keep"),
        ({"t": 3}, "entries or min_count"),
        ({"min_count": 2, "entries": "x", "t": 3}, "entries or min_count"),
        ({"min_count": 0, "t": 3}, "min_count"),
        ({"min_count": 2, "t": 0}, "t is out of range"),
        ({"min_count": 2, "keep": 2.0}, "keep"),
        ({"min_count": 2, "t": 3, "unmatched": "both"}, "unmatched"),
        ({"entries": "nowhere.txt", "t": 3}, "nowhere.txt"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Balance(**given).settings(_pairs.work(Path()))


def test_an_empty_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no entries"):
        Balance(entries=listed(tmp_path, ["", "  "]), t=1).settings(_pairs.work(tmp_path))
