"""Evaluation of answers: who reads the picture, who reads the question, and that ranks and batches change nothing."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from answering_toys import (
    COLORS,
    WITHOUT,
    Toy,
    asked,
    blind,
    color_of,
    everything,
    oracle,
    pictures,
    seeing,
    split_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.data.scenes.make import make_sample
from vlm_train.distributed import collectives
from vlm_train.distributed.testing import run_ranks
from vlm_train.engine.scores import controls_of, counts_of, scores_of
from vlm_train.errors import ConfigError, DataError
from vlm_train.evaluation.answers import normalise
from vlm_train.evaluation.questions import UNTYPED, Choice, questions_of
from vlm_train.evaluation.vqa import VisualQuestions, YesNo

WITH = [n for n in range(len(COLORS)) if n not in WITHOUT]


def run(say, metadata=None, batch_size: int = 3, evaluator=None) -> dict:
    metadata = pictures() if metadata is None else metadata
    return (evaluator or VisualQuestions()).run(Toy(say), split_of(metadata, batch_size))


def test_an_oracle_answers_everything_and_loses_the_next_picture() -> None:
    result = run(oracle)
    # of the ten answers to one question the oracle gives the most frequent one, which is right by every measure
    assert result["exact_match"] == result["f1"] == result["accuracy"] == 100.0
    assert set(result["exact_match_by_type"].values()) == {100.0}
    assert result["exact_match_shuffled_images"] < 60.0
    assert (result["num_images"], result["num_questions"]) == (9, 29)


def test_one_that_sees_colors_falls_where_the_next_picture_has_another() -> None:
    result = run(seeing)
    by_type = result["exact_match_by_type"]
    assert by_type["color"] == 100.0 and by_type["count"] == 0.0
    ring = [*WITH[1:], WITH[0]]
    same = [COLORS[here] == COLORS[there] for here, there in zip(WITH, ring, strict=True)]
    assert result["shuffled_images"]["color"] == pytest.approx(100.0 * sum(same) / len(same))
    assert result["shuffled_images"]["color"] < 50.0
    assert result["exact_match_shuffled_images"] == result["shuffled_images"]["exact_match"]


def test_one_that_reads_only_the_question_does_not_fall_and_has_the_prior() -> None:
    # each question often enough that the one left out does not decide which answer is the most frequent
    metadata = [{"qa": [asked("which?", "red" if n % 4 else "blue", "t"), asked(f"{n % 2}?", "no", "u")]}
                for n in range(20)]  # fmt: skip
    result = run(blind(metadata), metadata)
    assert result["exact_match"] == result["exact_match_shuffled_images"] == result["text_blind_prior"] == 87.5
    result = run(blind(pictures()))
    for metric in ("exact_match", "f1", "accuracy"):
        assert result[metric] == result["shuffled_images"][metric]
    assert result["exact_match"] > result["text_blind_prior"] + 10.0  # it knows what it is asked


def test_the_prior_by_hand() -> None:
    metadata = [
        {"qa": [asked("which?", "red", "color"), asked("how many?", "2", "count")]},
        {"qa": [asked("Which", "red", "color"), asked("one?", "1", "count")]},
        {"qa": [asked("which?", "blue", "color"), asked("one only?", "red", "color")]},
        {"qa": [asked("what?", "a thing")]},
    ]
    result = run(oracle, metadata)
    # which: left with red and blue for a red one (1/2 each), with two red ones for the blue; how many and one: the type
    # is left with the other's answer; one only: with red, red, blue; what: with nothing
    assert result["text_blind_prior"] == pytest.approx(100.0 * (0.5 + 0.5 + 0 + 0 + 0 + 1 + 0) / 7)
    assert result["blind_prior"]["color"] == 50.0 and result["blind_prior"][UNTYPED] == 0.0
    assert set(result["exact_match_by_type"]) == {"color", "count", UNTYPED}


def test_people_who_disagree_are_worth_their_share() -> None:
    people = ["a big ball"] * 2 + ["ball"] * 5 + ["sphere", "toy", "moon"]
    metadata = [{"qa": [asked("what is it?", people)]}]
    said = {"big ball": (100.0, 100.0, 60.0), "the toy ball": (0.0, 200 / 3, 0.0), "moon": (100.0, 100.0, 30.0)}
    for answer, worth in said.items():
        result = run(lambda picture, metadata, question, answer=answer: answer, metadata)
        assert (result["exact_match"], result["f1"], result["accuracy"]) == pytest.approx(worth)
    assert result["examples"] == [{"question": "what is it?", "answer": "ball", "predicted": "moon"}]


def test_each_score_stands_beside_its_controls() -> None:
    for evaluator, names in (
        (VisualQuestions(), ["exact match", "f1", "accuracy"]),
        (YesNo(), ["accuracy", "precision", "recall", "f1", "yes ratio"]),
    ):
        result = json.loads(json.dumps(run(seeing, evaluator=evaluator)))
        scores = {score.name: score for score in scores_of(result)}
        assert list(scores)[: len(names)] == names
        assert all("shuffled_images" in score.controls for score in scores.values())
        for name, score in scores.items():
            if "accuracy" in name or "match" in name:
                assert "blind_prior" in score.controls and score.interval is not None
        assert counts_of(result)["questions"] >= counts_of(result)["images"] == 9
    assert set(controls_of(run(seeing))) == {"exact_match_shuffled_images", "text_blind_prior"}


def test_yes_and_no_with_their_controls() -> None:
    result = run(seeing, evaluator=YesNo())
    assert result["accuracy"] == result["precision"] == result["recall"] == result["f1"] == 100.0
    assert (result["num_questions"], result["num_yes"]) == (9, sum(COLORS[n] == "red" for n in WITH))
    assert result["yes_ratio"] == result["chance"]["precision"] == pytest.approx(500 / 9)
    assert result["shuffled_images"]["accuracy"] < 60.0
    always = run(lambda picture, metadata, question: "yes, there is", evaluator=YesNo())
    assert always["recall"] == always["yes_ratio"] == 100.0 and always["accuracy"] == pytest.approx(500 / 9)
    # of five yes and four no, a yes left out leaves a tie, a no left out leaves more yes
    assert always["blind_prior"]["accuracy"] == pytest.approx(100 * (5 * 0.5 + 4 * 0.0) / 9)
    silent = run(lambda picture, metadata, question: "a ball", evaluator=YesNo())
    assert silent["accuracy"] == 0.0 and silent["num_neither"] == 9


def test_types_and_a_number_choose_what_is_asked() -> None:
    result = run(oracle, evaluator=VisualQuestions(types=["color", "existence"]))
    assert set(result["exact_match_by_type"]) == {"color", "existence"} and result["num_questions"] == 18
    metadata = pictures()
    few = [Choice(max_per_image=2).among(questions_of(row), f"key{n}") for n, row in enumerate(metadata)]
    assert [len(rows) for rows in few] == [0 if n in WITHOUT else 2 for n in range(len(metadata))]
    assert {row.kind for rows in few for row in rows} >= {"color", "existence", "count"}
    assert all(len({row.text for row in rows}) == len(rows) for rows in few)
    assert run(oracle, evaluator=VisualQuestions(max_per_image=2))["num_questions"] == 18


@pytest.mark.parametrize("bad", [{"types": []}, {"types": "color"}, {"max_per_image": 0}])
def test_what_cannot_be_chosen_is_refused(bad: dict) -> None:
    for kind in (VisualQuestions, YesNo):
        with pytest.raises(ConfigError, match="of an evaluator cannot be this"):
            kind(**bad)


def test_nothing_to_ask_is_an_error_that_names_qa() -> None:
    for evaluator in (VisualQuestions(), YesNo()):
        for metadata in ([{}, {}], [{"qa": []}]):
            with pytest.raises(DataError, match="`qa`"):
                run(oracle, metadata, evaluator=evaluator)
    with pytest.raises(DataError, match="yes or no"):
        run(oracle, [{"qa": [asked("which?", "red")]}], evaluator=YesNo())
    with pytest.raises(DataError, match=r"is it color\?"):
        run(oracle, evaluator=VisualQuestions(types=["count", "colour"]))
    with pytest.raises(DataError, match="no batches"):
        VisualQuestions().run(Toy(oracle), iter([]))


@pytest.mark.parametrize(
    "bad",
    [
        {"qa": 5},
        {"qa": ["which?"]},
        {"qa": [{"question": "which?"}]},
        {"qa": [{"question": "which?", "answer": 3}]},
        {"qa": [{"question": "which?", "answers": []}]},
        {"qa": [{"question": "which?", "answers": "red"}]},
        {"qa": [{"answer": "red"}]},
        {"qa": [{"question": "which \ud800?", "answer": "red"}]},
        {"qa": {"question": "which?", "answer": "red"}},
    ],
)
def test_a_sample_whose_questions_are_none_is_named(bad: dict) -> None:
    with pytest.raises(DataError, match="key1: "):
        run(oracle, [{"qa": [color_of(0)]}, bad])


VALUES = st.none() | st.text(max_size=3) | st.integers() | st.lists(st.text(max_size=2), max_size=2)
ROWS = st.dictionaries(st.sampled_from(["question", "answer", "answers", "type"]), VALUES)


@settings(deadline=None)
@given(st.dictionaries(st.just("qa"), VALUES | st.lists(ROWS | VALUES, max_size=3)))
def test_any_metadata_gives_questions_or_one_of_few_errors(metadata: dict) -> None:
    try:
        found = questions_of(metadata)
    except (TypeError, KeyError, AttributeError, ValueError):
        return
    assert all(isinstance(text, str) for row in found for text in (row.text, row.answer, row.kind, *row.answers))


SPLITS = st.lists(st.lists(st.tuples(st.sampled_from("pq"), st.sampled_from("rst")), max_size=3), min_size=1)


@settings(deadline=None, max_examples=50)
@given(SPLITS.filter(any), st.integers(1, 5))
def test_controls_are_those_of_the_whole_split_however_it_is_cut(split: list, batch_size: int) -> None:
    metadata = [{"qa": [asked(question, answer) for question, answer in rows]} for rows in split]
    shown = {n: Counter(answer for _, answer in rows).most_common(1)[0][0] for n, rows in enumerate(split) if rows}
    result = run(lambda picture, metadata, question: shown.get(picture, "t"), metadata, batch_size)
    ring = dict(zip(shown, [*list(shown)[1:], next(iter(shown))], strict=True))
    rows = [(n, question, answer) for n, part in enumerate(split) for question, answer in part]
    right = [answer == shown[n] for n, _, answer in rows]
    wrong_picture = [answer == shown[ring[n]] for n, _, answer in rows]
    assert result["exact_match"] == pytest.approx(100 * sum(right) / len(rows))
    assert result["exact_match_shuffled_images"] == pytest.approx(100 * sum(wrong_picture) / len(rows))
    of_blank = [answer == "t" for _, _, answer in rows]
    assert result["blind_model"]["exact_match"] == pytest.approx(100 * sum(of_blank) / len(rows))


def test_scenes_have_questions_for_both_evaluators() -> None:
    metadata = [json.loads(make_sample(n, seed=0, size=32)[1]["json"]) for n in range(12)]
    result = run(oracle, metadata, batch_size=5)
    assert result["exact_match"] == 100.0
    assert set(result["exact_match_by_type"]) == {"color", "shape", "size", "count", "existence", "position", "spatial"}
    assert run(oracle, metadata, evaluator=YesNo(types=["existence"]))["accuracy"] == 100.0


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_world_size_gives_the_scores_of_one_process(world_size: int) -> None:
    alone = everything()
    results = run_ranks(everything, world_size)
    assert [result[0] for result in results] == [alone[0]] * world_size
    # as many calls on every rank, each with as many questions over all of them
    assert all(result[1] == results[0][1] for result in results)
    assert [sum(calls) for calls in results[0][1]] == [sum(calls) for calls in alone[1]]
    assert all("key" in result[2] and "no 'answer'" in result[2] for result in results)


def test_the_mean_of_the_shares_own_scores_is_not_the_score() -> None:
    whole = run(seeing)
    shares = [VisualQuestions().run(Toy(seeing), iter([share])) for share in split_of(pictures(), 8)]
    assert [share["num_questions"] for share in shares] == [24, 5]
    for metric in ("exact_match", "text_blind_prior", "exact_match_shuffled_images"):
        assert abs(sum(share[metric] for share in shares) / 2 - whole[metric]) > 0.5  # where no bit may differ


def test_a_question_keeps_its_words() -> None:
    """What is compared is normalised; what is asked is not."""
    heard: list[str] = []
    run(lambda picture, metadata, question: heard.append(question) or "x", [{"qa": [asked("Is THE dog 1,000?", "x")]}])
    assert set(heard) == {"Is THE dog 1,000?"} and normalise(heard[0]) == "is dog 1000"
    assert collectives.world_size() == 1
