"""Captions that repeat: leaders against a loop, caps, chains, draws, and that no order or shard decides."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import _pairs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.curation import captions, leaders, minhash
from vlm_train.curation.captions import CaptionCopies
from vlm_train.curation.ranks import drawn
from vlm_train.curation.texts import normalised
from vlm_train.errors import ConfigError

WORDS = ["a", "small", "large", "red", "blue", "circle", "square", "above", "below", "the", "Circle", "circle."]
CAPTIONS = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(" ".join), min_size=1, max_size=16)


def grams(text: str) -> set[str]:
    return {text[start : start + 5] for start in range(max(1, len(text) - 4))}


def jaccard(first: str, second: str) -> float:
    a, b = grams(first), grams(second)
    return len(a & b) / len(a | b)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """(bands [U, 3], which are alike [U, U])."""
    num = draw(st.integers(1, 14))
    random = np.random.default_rng(draw(st.integers(0, 10_000)))
    alike = random.random((num, num)) < draw(st.sampled_from([0.2, 0.6, 0.9]))
    return random.integers(0, draw(st.integers(1, 8)), (num, 3)).astype(np.uint32), alike | alike.T


@settings(max_examples=200, deadline=None)
@given(graph=graphs(), most=st.integers(1, 5) | st.just(100))
def test_leaders_are_those_of_a_loop_in_the_order(graph: tuple[np.ndarray, np.ndarray], most: int) -> None:
    bands, is_alike = graph
    asked: Counter[tuple[int, int]] = Counter()

    def alike(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        asked.update(zip(first.tolist(), second.tolist(), strict=True))
        return is_alike[first, second]

    found, _ = leaders.led(len(bands), *leaders.candidates(bands), alike, most)
    expected: list[int] = []
    leading: dict[tuple[int, int], list[int]] = {}  # (band, hash) -> its first leaders
    for text, hashes in enumerate(bands.tolist()):
        buckets = [leading.setdefault(bucket, []) for bucket in enumerate(hashes)]
        open_ones = [bucket for bucket in buckets if len(bucket) < most]
        near = [n for bucket in buckets for n in bucket if is_alike[n, text]]
        expected.append(min(near, default=text))
        if not near:
            for bucket in open_ones:
                bucket.append(text)
    assert found.tolist() == expected
    assert set(asked.values()) <= {1}


def groups_in_words(written: list[str], uids: list[bytes], similarity: float) -> list[int]:
    """Of each caption the sample that leads its group: what the docstring says, over all pairs that share a band."""
    bands = minhash.bands(minhash.gram_sets([normalised(text) for text in written]))
    first = {}
    for number in sorted(range(len(written)), key=lambda n: uids[n]):
        first.setdefault(normalised(written[number]), number)
    leading: list[int] = []
    leader_of: dict[str, int] = {}
    for text, number in first.items():
        near = [n for n in leading if (bands[n] == bands[number]).any()
                and jaccard(normalised(written[n]), text) >= similarity]  # fmt: skip
        leading += [] if near else [number]
        leader_of[text] = near[0] if near else number
    return [leader_of[normalised(text)] for text in written]


@settings(max_examples=15, deadline=None)
@given(written=CAPTIONS, most=st.integers(1, 3), seed=st.integers(0, 9), size=st.integers(2, 16))
def test_a_group_keeps_so_many_whatever_the_order(written: list[str], most: int, seed: int, size: int) -> None:
    step = CaptionCopies(max_per_caption=most, similarity=0.6, seed=seed)
    found = _pairs.run(step, written)
    order = np.random.default_rng(seed).permutation(len(written)).tolist()
    assert _pairs.run(step, written, order=order, max_samples=size) == found
    with _pairs.fresh() as folder:
        uids = _pairs.write(folder, written).uids()
    group = groups_in_words(written, [bytes(uid) for uid in uids], 0.6)
    draws = drawn(uids, seed)
    for leader in set(group):
        members = sorted((n for n in range(len(written)) if group[n] == leader), key=lambda n: int(draws[n]))
        kept, beyond = members[:most], members[most:]
        assert not set(kept) & set(found)
        for number in beyond:
            is_exact = normalised(written[number]) == normalised(written[kept[0]])
            rule = captions.EXACT if is_exact else captions.NEAR
            assert found[number] == (rule, kept[0], len(members))


def test_no_caption_goes_where_the_cap_is_not_reached() -> None:
    written = ["image"] * 5 + ["a red circle above a blue square"] * 2
    assert _pairs.run(CaptionCopies(max_per_caption=5), written) == {}
    found = _pairs.run(CaptionCopies(max_per_caption=3), written)
    assert len(found) == 2 and all(told == ("caption_exact", told[1], 5) for told in found.values())


def test_what_is_normalised_alike_is_exact() -> None:
    written = ["A dog, running!", "a dog running", "A  DOG — running"]
    assert Counter(rule for rule, _, _ in _pairs.run(CaptionCopies(max_per_caption=1), written).values()) == {
        "caption_exact": 2
    }


def test_a_chain_does_not_swallow_what_is_not_alike() -> None:
    """Each caption is near to the next, and the first to hardly any: components would make one group of them."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    written = [letters[start:] + "0123456789"[:start] for start in range(10)]
    chain = [jaccard(one, two) for one, two in pairwise(written)]
    assert min(chain) >= 0.8 and jaccard(written[0], written[9]) < 0.6
    found = _pairs.run(CaptionCopies(max_per_caption=1, similarity=0.8), written)
    assert 1 < len(written) - len(found) < len(written)
    with _pairs.fresh() as folder:
        uids = [bytes(uid) for uid in _pairs.write(folder, written).uids()]
    group = groups_in_words(written, uids, 0.8)
    assert len(set(group)) == len(written) - len(found)
    assert all(jaccard(written[number], written[leader]) >= 0.8 for number, leader in enumerate(group))


def test_another_seed_draws_others() -> None:
    written = ["the same caption"] * 30
    kept = [
        set(range(30)) - set(_pairs.run(CaptionCopies(max_per_caption=10, seed=seed), written)) for seed in (0, 0, 1)
    ]
    assert kept[0] == kept[1] != kept[2] and len(kept[2]) == 10


def test_only_rows_that_are_among_count() -> None:
    written = ["the same caption"] * 4
    assert _pairs.run(CaptionCopies(max_per_caption=2), written, among=[1, 3]) == {}
    assert len(_pairs.run(CaptionCopies(max_per_caption=2), written, among=[0, 1, 3])) == 1


def test_workers_change_nothing(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    written = [" ".join(random.choice(WORDS, 4)) for _ in range(60)]
    manifest = _pairs.write(tmp_path, written, max_samples=20)
    step, among = CaptionCopies(max_per_caption=1, similarity=0.7), np.ones(60, bool)
    one, two = (step.find(manifest, among, _pairs.work(tmp_path, num_workers=num)) for num in (1, 2))
    assert len(one.rows) and _pairs.told(manifest, one) == _pairs.told(manifest, two) and one.facts == two.facts


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_per_caption": 0}, "max_per_caption"),
        ({"max_per_caption": 1.5}, "max_per_caption"),
        ({"max_per_caption": 1, "similarity": 0.3}, "similarity"),
        ({"max_per_caption": 1, "similarity": 1.5}, "similarity"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CaptionCopies(**given).settings(_pairs.work(Path()))
