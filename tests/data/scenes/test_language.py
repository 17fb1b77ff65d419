"""Everything said about a scene is labelled truly: each sentence is read and judged a second time."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scene_reader import NOUN, answer, kind_of, kinds, make, relation_holds, says

from vlm_train.data.scenes.claims import Thing, related
from vlm_train.data.scenes.language import CONTRASTS
from vlm_train.data.scenes.make import Variant, make_sample
from vlm_train.data.scenes.world import COLORS, SHAPES, World, check_world
from vlm_train.errors import ConfigError

NUM = 1500


@pytest.fixture(scope="module")
def scenes() -> list[tuple[np.ndarray, dict, str]]:
    return [make(index) for index in range(NUM)]


def test_every_caption_is_true_and_complete(scenes):
    for _, truth, text in scenes:
        assert text == truth["captions"][0]
        assert len(truth["captions"]) >= 3
        for caption in truth["captions"]:
            assert says(caption, truth) is True, caption
            named = {(match[2], match[3]) for match in NOUN.finditer(caption)}
            assert named == set(kinds(truth))


def test_every_negative_is_false_and_its_twin_true(scenes):
    types: Counter[str] = Counter()
    for _, truth, _ in scenes:
        assert truth["negatives"] == [row["false"] for row in truth["contrasts"]]
        for row in truth["contrasts"]:
            assert says(row["true"], truth) is True, row
            assert says(row["false"], truth) is False, row
            types[row["type"]] += 1
    assert set(types) == {"attribute", "replacement", "relation", "order", "count", "negation"}
    assert types["attribute"] + types["replacement"] > 0.7 * NUM and types["attribute"] > 0.3 * NUM
    assert min(types[kind] for kind in ("relation", "order", "count", "negation")) > 0.7 * NUM


WORLDS = st.builds(
    lambda shapes, colors, objects: World(num_shapes=shapes, num_colors=colors, fewest=min(objects), most=max(objects)),
    st.integers(1, 9), st.integers(1, 10), st.tuples(*[st.integers(1, 5)] * 2),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(WORLDS, st.integers(0, 10**6))
def test_a_smaller_world_has_what_it_says_and_nothing_false_is_said_of_it(world, index):
    if world.num_shapes * world.num_colors < world.most:
        with pytest.raises(ConfigError, match="no such world"):
            check_world(world)
        return
    check_world(world)
    truth = json.loads(make_sample(index, seed=0, size=32, variant=Variant(world=world))[1]["json"])
    assert world.fewest <= len(truth["regions"]) <= world.most
    assert {row["class"] for row in truth["regions"]} <= set(SHAPES[: world.num_shapes])
    assert {row["attributes"][0] for row in truth["regions"]} <= set(list(COLORS)[: world.num_colors])
    assert all(says(caption, truth) is True for caption in [*truth["captions"], *truth["negations"]])
    assert all(says(row["true"], truth) is True and says(row["false"], truth) is False for row in truth["contrasts"])
    assert all(answer(row["question"], truth, size=32) == row["answer"] for row in truth["qa"])
    assert world.fewest < world.most or "count" not in {row["type"] for row in truth["contrasts"]}


def test_the_checker_can_fail(scenes):
    """The twin of the two tests above: captions of the next scene are mostly refuted."""
    neighbours = [(one[1], two[1]) for one, two in itertools.pairwise(scenes)]
    refuted = sum(says(other["captions"][0], truth) is False for truth, other in neighbours)
    assert refuted > 0.95 * (NUM - 1)


def test_relations_are_all_the_plain_ones(scenes):
    names = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}
    for _, truth, _ in scenes:
        rows = truth["regions"]
        expected = {
            (i, name, j)
            for i, j in itertools.permutations(range(len(rows)), 2)
            for name, words in names.items()
            if relation_holds(truth, kind_of(rows[i]), words, kind_of(rows[j]))
        }
        assert {(row["subject"], row["predicate"], row["object"]) for row in truth["relations"]} == expected


@given(
    a=st.tuples(*[st.integers(0, 9)] * 2),
    b=st.tuples(*[st.integers(0, 9)] * 2),
    sizes=st.tuples(*[st.integers(1, 4)] * 4),
)
def test_opposite_relations_never_hold_together(a, b, sizes):
    first = Thing("circle", "red", "small", (a[0], a[1], a[0] + sizes[0], a[1] + sizes[1]), "center")
    second = Thing("star", "blue", "small", (b[0], b[1], b[0] + sizes[2], b[1] + sizes[3]), "center")
    for relation, opposite in (("left of", "right of"), ("above", "below")):
        verdict = related(first, relation, second)
        assert related(first, opposite, second) is (None if verdict is None else not verdict)
        assert related(second, opposite, first) is verdict


def test_counts_and_negations(scenes):
    for _, truth, _ in scenes:
        words = Counter(word for row in truth["regions"] for word in (row["class"], row["attributes"][0], "object"))
        assert truth["counts"] == dict(words)
        assert len(truth["negations"]) >= 2
        assert all(says(sentence, truth) is True for sentence in truth["negations"])


def test_every_answer_is_right(scenes):
    types: Counter[str] = Counter()
    for _, truth, _ in scenes:
        for row in truth["qa"]:
            assert answer(row["question"], truth) == row["answer"], row
            types[row["type"]] += 1
    assert set(types) == {"color", "shape", "size", "count", "existence", "position", "spatial"}


def test_yes_and_no_are_even(scenes):
    for kind in ("existence", "spatial"):
        answers = Counter(row["answer"] for _, truth, _ in scenes for row in truth["qa"] if row["type"] == kind)
        total = sum(answers.values())
        assert abs(answers["yes"] - total / 2) < 3 * math.sqrt(total) / 2  # three standard deviations


def test_the_text_alone_does_not_tell_a_true_caption_from_a_false_one(scenes):
    """A blind judge by the frequency of each word among true and among false captions stays at chance."""
    for kind in CONTRASTS:
        pairs = [row for _, truth, _ in scenes for row in truth["contrasts"] if row["type"] == kind]
        half = len(pairs) // 2
        score: Counter[str] = Counter()
        for row in pairs[:half]:
            score.update(row["true"].split())
            score.subtract(row["false"].split())
        judged = [
            sum(score[word] for word in row["true"].split()) - sum(score[word] for word in row["false"].split())
            for row in pairs[half:]
        ]
        right = sum(1.0 if value > 0 else 0.5 if value == 0 else 0.0 for value in judged) / len(judged)
        assert abs(right - 0.5) < 3.5 * 0.5 / math.sqrt(len(judged)), (kind, right)


def test_conversations_ask_the_questions_and_carry_the_image_once(scenes):
    for _, truth, _ in scenes:
        turns = truth["conversations"]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert "".join(turn["content"] for turn in turns).count("<image>") == 1
        assert turns[0]["content"].startswith("<image>\n")
        asked = {row["question"]: row["answer"] for row in truth["qa"]}
        for user, assistant in zip(turns[::2], turns[1::2], strict=True):
            assert asked[user["content"].removeprefix("<image>\n")] == assistant["content"]


def test_contexts_have_two_answers_and_each_is_right(scenes):
    categories: Counter[str] = Counter()
    for _, truth, _ in scenes:
        for row in truth["contexts"]:
            assert len(set(row["contexts"])) == len(set(row["answers"])) == 2
            categories[row["category"]] += 1
            for context, given_answer in zip(row["contexts"], row["answers"], strict=True):
                if row["category"] == "preference":
                    color = re.fullmatch(r"I want something (\w+)\.", context)[1]
                    (region,) = [r for r in truth["regions"] if r["attributes"][0] == color]
                    assert given_answer == f"the {color} {region['class']}"
                else:
                    seen = answer(row["question"].removeprefix("in the scene itself, "), truth)
                    mirrored = "mirror" in context
                    assert given_answer == ({"yes": "no", "no": "yes"}[seen] if mirrored else seen)
    assert set(categories) == {"preference", "orientation"}
    first = Counter(
        row["answers"][0] for _, t, _ in scenes for row in t["contexts"] if row["category"] == "orientation"
    )
    assert abs(first["yes"] - first["no"]) < 3 * math.sqrt(sum(first.values()))
