"""What an answer is worth: normalising, F1, VQA accuracy, yes and no, and a reader who sees no picture."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_train.evaluation.answers import (
    BlindReader,
    YesNoCounts,
    coin_scores,
    exact_match,
    normalise,
    soft_accuracy,
    token_f1,
    yes_or_no,
)

WORDS = st.sampled_from(["red", "a", "The", "two", "2", "dont", "don't", "1,000", "3.5", "no.", "ball-room", "?", "x"])
TEXTS = st.lists(WORDS, max_size=6).map(" ".join) | st.text(max_size=12)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  The Red\nBall. ", "red ball"),
        ("an apple, a pear", "apple pear"),
        ("Two", "2"),
        ("none", "0"),
        ("ten twenty", "10 twenty"),
        ("dont", "don't"),
        ("It isn\u2019t.", "it isn't"),
        ("its", "its"),
        ("1,000.5", "1000.5"),
        ("at 3.30 p.m.", "at 3.30 pm"),
        ("black/white", "black white"),
        ("(yes)!", "yes"),
        ("10:30", "10:30"),
        ("A.", "a"),
        ("...", ""),
        ("", ""),
    ],
)
def test_normalising_by_example(text: str, normal: str) -> None:
    assert normalise(text) == normal


@given(TEXTS)
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once == " ".join(once.split())
    assert normalise(f" {text}\n") == once


@given(TEXTS, TEXTS)
def test_laws_of_f1(said: str, answer: str) -> None:
    f1 = token_f1(said, [answer])
    assert 0.0 <= f1 <= 1.0 and f1 == token_f1(answer, [said])
    same_words = Counter(normalise(said).split()) == Counter(normalise(answer).split())
    assert (f1 == 1.0) == (same_words and bool(normalise(said)))
    assert exact_match(said, [answer]) <= f1
    assert token_f1(said, [answer, "red"]) == max(f1, token_f1(said, ["red"]))


def test_f1_counts_a_word_as_often_as_both_have_it() -> None:
    assert token_f1("red red ball", ["red ball"]) == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    as_sets = 1.0  # what counting each word once would give
    assert abs(token_f1("red red ball", ["red ball"]) - as_sets) > 0.1
    assert token_f1("a big red ball", ["the red cube", "big ball"]) == pytest.approx(0.8)


def left_out_one_by_one(said: str, answers: list[str]) -> float:
    worth = []
    for left_out in range(len(answers)):
        others = answers[:left_out] + answers[left_out + 1 :]
        worth.append(min(sum(normalise(other) == normalise(said) for other in others) / 3, 1.0))
    return sum(worth) / len(worth)


@pytest.mark.parametrize(("agree", "worth"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten_answers_by_hand(agree: int, worth: float) -> None:
    # three of ten: each of the three leaves two others (2/3), each of the seven leaves three (1): (3 * 2/3 + 7) / 10
    answers = ["Red."] * agree + [f"other {n}" for n in range(10 - agree)]
    assert soft_accuracy("red", answers) == pytest.approx(worth, abs=1e-12)
    assert soft_accuracy("red", answers) == pytest.approx(left_out_one_by_one("red", answers), abs=1e-12)
    if 0 < agree < 4:  # without leaving anyone out, one, two, three of ten would be worth 1/3, 2/3, 1
        assert min(agree / 3, 1.0) - worth > 0.03


@given(st.text("ab", max_size=1), st.lists(st.sampled_from("ab"), min_size=4, max_size=12))
def test_vqa_accuracy_of_four_or_more_is_the_mean_over_who_is_left_out(said: str, answers: list[str]) -> None:
    assert soft_accuracy(said, answers) == pytest.approx(left_out_one_by_one(said, answers), abs=1e-12)


def test_of_few_answers_vqa_accuracy_is_exact_match() -> None:
    assert soft_accuracy("red", ["red"]) == 1.0 and soft_accuracy("red", ["blue"]) == 0.0
    assert soft_accuracy("red", ["red", "blue", "green"]) == 1.0


def test_nothing_said_earns_nothing() -> None:
    for said in ("", "?", " ."):
        assert exact_match(said, ["", "?"]) == token_f1(said, ["", "?"]) == soft_accuracy(said, ["?"] * 10) == 0.0


def test_choices_of_one_letter_are_answers() -> None:
    assert exact_match("A.", ["A"]) == 1.0 and exact_match("a", ["B"]) == 0.0
    assert exact_match("A dog", ["the dog"]) == 1.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Yes.", True),
        ("yes, it is not red", True),
        ("No, there is no ball; yes, I looked", False),
        ("There isn't one", False),
        ("there is not a ball", False),
        ("a red ball", None),
        ("", None),
        ("nothing known", None),  # begins with no, and does not say it
        ("yesterday", None),
    ],
)
def test_yes_and_no_are_read_from_the_first_word_that_tells(text: str, says: bool | None) -> None:
    assert yes_or_no(text) is says


def test_yes_no_scores_by_hand() -> None:
    rows = [(True, True)] * 3 + [(True, False)] + [(True, None)] * 2 + [(False, True)] + [(False, False)] * 3
    scores = YesNoCounts.of(rows).scores()
    assert scores == pytest.approx({"accuracy": 0.6, "precision": 0.75, "recall": 0.5, "f1": 0.6, "yes_ratio": 0.4})
    assert YesNoCounts.of(rows).neither == 2


def test_who_always_says_yes_finds_everything_and_is_no_better_than_a_coin() -> None:
    always = YesNoCounts.of([(n < 5, True) for n in range(10)]).scores()
    assert (always["recall"], always["yes_ratio"], always["accuracy"]) == (1.0, 1.0, 0.5)
    never = YesNoCounts.of([(n < 5, False) for n in range(10)]).scores()
    assert (never["precision"], never["recall"], never["f1"], never["accuracy"]) == (0.0, 0.0, 0.0, 0.5)
    assert YesNoCounts.of([]).scores()["accuracy"] == 0.0


@given(st.lists(st.tuples(st.booleans(), st.none() | st.booleans()), min_size=1))
def test_f1_is_the_harmonic_mean_and_a_coin_scores_between(rows: list[tuple[bool, bool | None]]) -> None:
    scores = YesNoCounts.of(rows).scores()
    both = scores["precision"] + scores["recall"]
    assert scores["f1"] == pytest.approx(2 * scores["precision"] * scores["recall"] / both if both else 0.0)
    share = sum(answer for answer, _ in rows) / len(rows)
    coin = coin_scores(share)
    assert coin["f1"] == pytest.approx(2 * share * 0.5 / (share + 0.5)) and coin["precision"] == pytest.approx(share)


def test_the_blind_reader_does_not_know_the_question_that_is_asked() -> None:
    rows = [("Which?", "color", answer) for answer in ("red", "red", "blue")] + [("once", "color", "green")]
    reader = BlindReader(rows)
    assert reader.guesses("which", "color", "blue") == ["red"]
    assert set(reader.guesses("which?", "color", "Red.")) == {"blue", "red"}  # one of each is left
    assert reader.guesses("once", "color", "green") == ["red"]  # falls back on its type
    assert BlindReader([("once", "size", "big")]).guesses("once", "size", "big") == []
    # knowing its own answer too, it would be right about whatever is asked once
    assert reader.guesses("once", "color", "something else") == ["green"]


@given(st.lists(st.tuples(st.sampled_from("pq"), st.sampled_from("xyz"), st.sampled_from("rstuv")), min_size=1))
def test_the_blind_reader_gives_the_most_frequent_answers_of_the_rest(rows: list[tuple[str, str, str]]) -> None:
    reader = BlindReader(rows)
    for place, (question, kind, answer) in enumerate(rows):
        rest = rows[:place] + rows[place + 1 :]
        counts = Counter(a for q, _, a in rest if q == question) or Counter(a for _, k, a in rest if k == kind)
        most = max(counts.values(), default=0)
        expected = {text for text, count in counts.items() if count == most}
        assert set(reader.guesses(question, kind, answer)) == expected


def test_of_many_equal_answers_it_keeps_some() -> None:
    rows = [("q", "t", f"word{n:03}") for n in range(100)]
    assert len(BlindReader(rows).guesses("q", "t", "word000")) == 8
    rows += [("q", "t", "word099")]
    assert BlindReader(rows).guesses("q", "t", "word000") == ["word099"]
