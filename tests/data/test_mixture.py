import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.data.mixture import MAX_DENOMINATOR, Member, Mixture, numerators, periodic_table
from vlm_train.data.order import Stream, WindowedOrder, source_seed
from vlm_train.data.selection import Selection
from vlm_train.errors import ConfigError

TIMES = st.one_of(
    st.lists(st.integers(1, 60), min_size=1, max_size=20),
    st.lists(st.sampled_from([1, 1, 2, 7, 500]), min_size=1, max_size=20),
)
ANYTHING = st.one_of(st.floats(), st.integers(-2, 10**320), st.floats(1e-6, 10), st.text(max_size=2), st.none())
NAMES = ("cc12m", "laion", "coco", "own")
PINNED = "abacabacababacd"


def member(name, weight=1.0, *, num_rows=40, seed=3, window=2, epoch_end="wrap", selection=None, manifest="m"):
    starts = np.append(np.arange(0, num_rows, 7), num_rows)
    selection = selection or Selection.all(num_rows)
    order = WindowedOrder(selection=selection, shard_starts=starts, seed=source_seed(seed, name), shuffle_window=window)
    stream = Stream(order=order, global_batch=6, epoch_end=epoch_end)
    return Member(name=name, weight=weight, stream=stream, manifest=manifest)


def farthest(table, times):
    """The largest distance of any prefix of the endless sequence from its shares, in samples, exactly."""
    period, length = sum(times), len(table)
    seen = np.cumsum(np.array(table)[:, None] == np.arange(len(times)), axis=0)
    return Fraction(int(np.abs(seen * period - np.arange(1, length + 1)[:, None] * np.array(times)).max()), period)


@settings(max_examples=120, deadline=None)
@given(times=TIMES)
def test_every_prefix_has_each_source_within_one_sample_of_its_share(times):
    table = periodic_table(times)
    assert np.bincount(table, minlength=len(times)).tolist() == times
    assert farthest(table, times) < 1


def test_the_largest_table_keeps_its_shares_too():
    for times in (
        [1] * 19 + [MAX_DENOMINATOR - 19],
        [MAX_DENOMINATOR // 16] * 16,
        [3, 65_533],
        [13_107, 13_109, 39_320],
    ):
        assert farthest(periodic_table(times), times) < 1


def test_wrong_twins_leave_the_shares():
    """What other loaders do: draw each position at random, put the sources in blocks, or shuffle a period."""
    times = [5, 3, 2, 1]
    drawn = random.Random(0).choices(range(4), times, k=1100)
    blocks = np.repeat(np.arange(4), times)
    shuffled = np.random.default_rng(0).permutation(blocks)
    assert farthest(drawn, times) > 10 and farthest(blocks, times) > 2 and farthest(shuffled, times) > 1
    assert farthest(periodic_table(times), times) < 1


@settings(max_examples=80, deadline=None)
@given(cents=st.lists(st.integers(1, 9999), min_size=1, max_size=20))
def test_decimals_are_exact(cents):
    weights = {f"s{number}": cent / 1000 for number, cent in enumerate(cents)}
    whole = numerators(weights)
    if sum(cents) <= MAX_DENOMINATOR:
        assert [Fraction(times, sum(whole)) for times in whole] == [Fraction(cent, sum(cents)) for cent in cents]
    assert sum(whole) <= MAX_DENOMINATOR
    shares = [Fraction(cent, sum(cents)) * sum(whole) for cent in cents]
    assert all(abs(times - share) < 1 for times, share in zip(whole, shares, strict=True))


def test_what_does_not_fit_is_rounded_to_the_largest_remainder():
    whole = numerators({"a": 0.123456789, "b": 0.5, "c": 0.376543211})
    assert sum(whole) == MAX_DENOMINATOR and whole == [8091, 32768, 24677]
    assert numerators({"a": 0.1, "b": 0.9}) == [1, 9] and numerators({"a": 3, "b": 1.5}) == [2, 1]
    assert numerators({"a": 1e-4, "b": 0.9999}) == [1, 9999]


@settings(max_examples=200, deadline=None)
@given(weights=st.dictionaries(st.text(max_size=3), ANYTHING, min_size=1, max_size=4))
def test_any_weights_are_whole_numbers_or_refused_by_name(weights):
    try:
        whole = numerators(weights)
    except ConfigError as error:
        assert any(f"`{name}`" in error.what for name in weights) and error.got and error.allowed and error.remedy
        return
    assert min(whole) >= 1 and sum(whole) <= MAX_DENOMINATOR


@pytest.mark.parametrize("wrong", [0, -1, float("nan"), float("inf"), "1", True, None])
def test_a_weight_that_cannot_be_is_refused_by_name(wrong):
    with pytest.raises(ConfigError, match="source `laion` cannot have this weight"):
        numerators({"cc12m": 1, "laion": wrong})


def test_a_weight_too_small_to_be_drawn_is_refused_by_name():
    with pytest.raises(ConfigError, match="weight of source `coco` is too small"):
        numerators({"cc12m": 1, "coco": 1e-6})


@settings(max_examples=60, deadline=None)
@given(
    times=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    window=st.integers(0, 6),
    start=st.integers(0, 10**12),
    block=st.sampled_from([1, 1, 2, 7, 64]),
)
def test_each_source_goes_through_its_own_stream_without_a_gap(times, window, start, block):
    members = [member(name, times[i], num_rows=9 + 11 * i, window=window) for i, name in enumerate(NAMES[: len(times)])]
    mixture, positions = Mixture(members, block=block), start + np.arange(150)
    places = mixture.locate(positions)
    first, last = mixture.cursors(start), mixture.cursors(start + 150)
    for number, one in enumerate(members):
        mine = places.sources == number
        expected = one.stream.locate(np.arange(first[number], last[number]))
        found = (places.epochs[mine], places.rows[mine], places.weights[mine])
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert mixture.epochs(start) == [
        int(cursor) // one.stream.epoch_length for cursor, one in zip(first, members, strict=True)
    ]


@settings(max_examples=40, deadline=None)
@given(asked=st.lists(st.integers(0, 500), min_size=1, max_size=9))
def test_a_position_does_not_depend_on_what_else_is_asked(asked):
    mixture = Mixture([member(name, weight) for name, weight in zip(NAMES, (4, 3, 2, 1), strict=True)])
    whole, some = mixture.locate(np.arange(501)), mixture.locate(np.array(asked))
    for name in ("sources", "epochs", "rows", "weights"):
        assert np.array_equal(getattr(whole, name)[asked], getattr(some, name))


@settings(max_examples=60, deadline=None)
@given(times=st.lists(st.integers(1, 9), min_size=2, max_size=4), block=st.integers(1, 50), start=st.integers(0, 10**9))
def test_in_blocks_every_batch_is_of_one_source_and_the_shares_stay(times, block, start):
    members = [member(name, times[i]) for i, name in enumerate(NAMES[: len(times)])]
    batches = block * (start + np.arange(20))[:, None] + np.arange(block)
    sources = Mixture(members, block=block).locate(batches.ravel()).sources.reshape(20, block)
    assert (sources == sources[:, :1]).all()
    single = Mixture(members).locate(start + np.arange(20)).sources
    assert np.array_equal(sources[:, 0], single)  # batches come as samples do without
    mixed = Mixture(members).locate(batches.ravel()).sources.reshape(20, block)  # the twin
    assert block < sum(times) or not (mixed == mixed[:, :1]).all()


@pytest.mark.parametrize("epoch_end", ["drop", "wrap", "pad_zero_weight"])
def test_one_source_is_its_own_stream(epoch_end):
    alone = member("", 0.3, epoch_end=epoch_end)
    mixture, positions = Mixture([alone]), np.arange(200)
    places = mixture.locate(positions)
    expected = alone.stream.locate(positions)
    assert all(map(np.array_equal, (places.epochs, places.rows, places.weights), expected))
    assert not places.sources.any() and mixture.epoch_length == alone.stream.epoch_length
    assert len(set(places.weights.tolist())) == (2 if epoch_end == "pad_zero_weight" else 1)


def test_another_source_does_not_reorder_the_others():
    def rows_of(mixture, name):
        places = mixture.locate(np.arange(600))
        return places.rows[places.sources == [one.name for one in mixture.members].index(name)]

    two = Mixture([member("laion", 2), member("coco", 1)])
    three = Mixture([member("own", 5), member("coco", 1), member("laion", 2)])
    renamed = Mixture([member("laion2", 2), member("coco", 1)])
    assert np.array_equal(rows_of(two, "laion")[:100], rows_of(three, "laion")[:100])
    assert not np.array_equal(rows_of(two, "laion")[:100], rows_of(renamed, "laion2")[:100])


def test_the_order_in_which_sources_are_listed_changes_nothing():
    weights = {"cc12m": 1, "laion": 1, "coco": 1, "own": 2}
    mixtures = [Mixture([member(name, weights[name]) for name in names]) for names in (NAMES, NAMES[::-1])]
    streams = []
    for mixture in mixtures:
        places = mixture.locate(np.arange(99))
        streams.append(
            [(mixture.members[s].name, r) for s, r in zip(places.sources, places.rows.tolist(), strict=True)]
        )
    assert streams[0] == streams[1] and mixtures[0].fingerprint == mixtures[1].fingerprint


def test_the_mixture_is_pinned():
    """The stream of a run must not change with a release: these figures were computed once and are the definition."""
    assert "".join("abcd"[s] for s in periodic_table([7, 4, 3, 1])) == PINNED


def test_repeat_weights_hold_inside_a_mixture():
    weighted = member("laion", 1, num_rows=4, selection=Selection.from_weights([0.5, 0, 1, 2.5]))
    places = Mixture([weighted, member("coco", 3)]).locate(np.arange(4 * 4 * 256))
    times = Counter(places.rows[places.sources == 0].tolist())
    assert times == {0: 128, 2: 256, 3: 640}


def test_a_bad_sample_is_replaced_from_its_own_source():
    mixture = Mixture([member("laion", num_rows=14), member("coco", num_rows=40)])
    assert sorted(mixture.replacements(0, 3)) == [row for row in range(14) if row != 3]


def test_an_epoch_of_a_mixture_is_over_when_every_source_has_come_through():
    mixture = Mixture([member("laion", 0.75, num_rows=90), member("coco", 0.25, num_rows=9)])
    assert mixture.epoch_length == 120 and min(mixture.epochs(120)) == 1 and min(mixture.epochs(119)) == 0
    in_blocks = Mixture(mixture.members, block=16)
    length = in_blocks.epoch_length
    assert length % 16 == 0 and min(in_blocks.epochs(length)) == 1
    assert min(in_blocks.epochs(length - 4 * 16)) == 0  # one table of places earlier


def test_the_fingerprint_tells_what_the_stream_is_made_of():
    def of(**changes):
        return Mixture([member("laion", **changes), member("coco", 1)]).fingerprint

    other = Selection.from_mask(np.arange(40) % 2 == 0)
    prints = [of(), of(weight=2), of(manifest="n"), of(selection=other), Mixture([member("laion")]).fingerprint]
    prints.append(Mixture([member("laion"), member("coco", 1)], block=8).fingerprint)
    assert len(set(prints)) == 6 and of() == of(weight=1)


@pytest.mark.parametrize("epoch_end", ["drop", "pad_zero_weight"])
def test_several_sources_must_wrap(epoch_end):
    with pytest.raises(ConfigError, match=r"`coco` of a mixture has `epoch_end: (.|\n)*epoch_end=wrap"):
        Mixture([member("laion"), member("coco", epoch_end=epoch_end)])


def test_two_sources_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="same name"):
        Mixture([member("laion"), member("coco"), member("laion")])
