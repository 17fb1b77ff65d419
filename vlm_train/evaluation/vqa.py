"""How well questions about pictures are answered in words.

Three controls stand beside every score. `shuffled_images`: the same questions, asked of the next picture in the split.
`blind_model`: the model itself, asked with blank pictures. `blind_prior`: what a reader answers who never sees a
picture (`answers.BlindReader`). A model that does not beat all of them has not looked.

Credits are added up over ranks as integers, so any number of ranks gives the same result, to the last bit, given equal
answers. Where several guesses are equally good, each counts its share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from vlm_train.distributed import collectives
from vlm_train.evaluation.answering import Answerer
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
from vlm_train.evaluation.base import interval_95, percent
from vlm_train.evaluation.questions import Answer, Choice, Question, Told, ask, sum_by_name
from vlm_train.types import Batch

_CREDITS = {"exact_match": exact_match, "f1": token_f1, "accuracy": soft_accuracy}
_NUM_EXAMPLES = 5
_STEPS = 1 << 60  # a credit is added up as a whole number of these, which no order of adding can change


class VisualQuestions:
    """Which questions about a picture are answered rightly.

    Args:
        types: see `questions.Choice`.
        max_per_image: see `questions.Choice`.

    Raises:
        ConfigError: as `questions.Choice`.
    """

    name, asks = "vqa", Answerer

    def __init__(self, *, types: Sequence[str] | None = None, max_per_image: int | None = None) -> None:
        self.choice = Choice(types, max_per_image)

    def run(self, embedder: Answer, batches: Iterator[Batch]) -> dict[str, Any]:
        """Scores in percent. Collective: every rank brings its share, in equally many batches.

        Returns:
            `exact_match` (with any of the answers), `f1` of the words, `accuracy` (VQA's, where people may disagree);
            `exact_match_by_type`; the controls `shuffled_images`, `blind_model` and `blind_prior`, of each of these,
            and the exact match of two, `exact_match_shuffled_images` and `text_blind_prior`; `interval_95`, pictures as
            trials; `num_questions`, `num_images`; `num_unanswerable` questions that the model could not be asked, which
            count as wrong; `examples` [{question, answer, predicted}].

        Raises:
            DataError: as `questions.ask`.
        """
        asked = ask(embedder, batches, self.choice, what="questions with answers")
        (scores, by_type), (shuffled, shuffled_by_type), (blank, blank_by_type), (blind, blind_by_type) = (
            _credits(told) for told in (asked.own, asked.shuffled, asked.blank, _blind(asked.own))
        )
        trials = sum_by_name(asked.images)
        return {
            **scores,
            "exact_match_by_type": by_type,
            "shuffled_images": {**shuffled_by_type, **shuffled},
            "blind_model": {**blank_by_type, **blank},
            "blind_prior": {**blind_by_type, **blind},
            "exact_match_shuffled_images": shuffled["exact_match"],
            "text_blind_prior": blind["exact_match"],
            "interval_95": {
                **{name: interval_95(score, trials[""]) for name, score in scores.items()},
                "exact_match_by_type": _intervals(by_type, trials),
            },
            "num_questions": sum(collectives.gather_objects(len(asked.own))),
            "num_images": trials[""],
            "num_unanswerable": asked.num_unanswerable,
            "examples": _examples(asked.own),
        }


class YesNo:
    """How the questions that are answered by yes or no are answered, as POPE asks whether an object is in a picture (Li
    et al. 2023, arXiv 2305.10355): a model that says yes to everything finds every object, and many that are not there.

    Args:
        types: see `questions.Choice`.
        max_per_image: see `questions.Choice`.

    Raises:
        ConfigError: as `questions.Choice`.
    """

    name, asks = "yes_no", Answerer

    def __init__(self, *, types: Sequence[str] | None = None, max_per_image: int | None = None) -> None:
        self.choice = Choice(types, max_per_image, wanted=lambda question: normalise(question.answer) in ("yes", "no"))

    def run(self, embedder: Answer, batches: Iterator[Batch]) -> dict[str, Any]:
        """Scores in percent. Collective: every rank brings its share, in equally many batches.

        Returns:
            `accuracy`; `precision`, `recall` and `f1` of yes; `yes_ratio`, the share answered by yes;
            `accuracy_by_type`; `chance`, a fair coin's of each; the controls `shuffled_images` and `blind_model`, of
            each, and `blind_prior`, of the accuracies; `interval_95` of the accuracies, pictures as trials;
            `num_questions`, `num_images`; `num_unanswerable`, see `VisualQuestions`; `num_yes` whose answer is yes;
            `num_neither` that were answered by neither.

        Raises:
            DataError: as `questions.ask`.
        """
        asked = ask(embedder, batches, self.choice, what="questions that are answered by yes or no")
        counts = _yes_no_counts(asked.own)
        scores = _percent_of(counts.scores())
        by_type = _right_by_type(asked.own)
        blind = _blind(asked.own)
        trials = sum_by_name(asked.images)
        return {
            **scores,
            "accuracy_by_type": by_type,
            "chance": {**dict.fromkeys(by_type, 50.0), **_percent_of(coin_scores(counts.yes / counts.num))},
            "shuffled_images": _yes_no_scores(asked.shuffled),
            "blind_model": _yes_no_scores(asked.blank),
            "blind_prior": {**_right_by_type(blind), **_means([("accuracy", _right(row)) for row in blind])},
            "interval_95": {
                "accuracy": interval_95(scores["accuracy"], trials[""]),
                "accuracy_by_type": _intervals(by_type, trials),
            },
            "num_questions": counts.num,
            "num_images": trials[""],
            "num_unanswerable": asked.num_unanswerable,
            "num_yes": counts.yes,
            "num_neither": counts.neither,
        }


def _blind(own: Told) -> Told:
    """The questions of this rank, answered by who knows those of all ranks and no picture."""
    mine = [(question.text, question.kind, question.answer) for question, _ in own]
    rows = ((text, kind, answer) for part in collectives.gather_objects(mine) for text, kind, answer in part)
    reader = BlindReader(rows)
    return [(question, reader.guesses(question.text, question.kind, question.answer)) for question, _ in own]


def _credits(told: Told) -> tuple[dict[str, float], dict[str, float]]:
    """The mean of each credit over the questions of all ranks, and of each type the mean exact match; in percent."""
    credits = [
        (question.kind, {name: _expected(credit, question, said) for name, credit in _CREDITS.items()})
        for question, said in told
    ]
    by_name = _means(item for _, found in credits for item in found.items())
    return {name: by_name[name] for name in _CREDITS}, _means((kind, found["exact_match"]) for kind, found in credits)


def _expected(credit: Callable[[str, Sequence[str]], float], question: Question, said: list[str]) -> float:
    return sum(credit(text, question.answers) for text in said) / max(1, len(said))


def _right(row: tuple[Question, list[str]]) -> float:
    """The share of what was said that says yes, or no, rightly."""
    question, said = row
    return sum(yes_or_no(text) == yes_or_no(question.answer) for text in said) / max(1, len(said))


def _right_by_type(told: Told) -> dict[str, float]:
    return _means((row[0].kind, _right(row)) for row in told)


def _yes_no_counts(told: Told) -> YesNoCounts:
    """Of all ranks."""
    mine = YesNoCounts.of(
        (bool(yes_or_no(question.answer)), yes_or_no(said[0]) if said else None) for question, said in told
    )
    return YesNoCounts(**sum_by_name(mine._asdict()))


def _yes_no_scores(told: Told) -> dict[str, float]:
    """All scores of a control in percent, the accuracies by type among them."""
    return {**_right_by_type(told), **_percent_of(_yes_no_counts(told).scores())}


def _means(rows: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The mean credit of each name over all ranks, in percent, in the order of the names."""
    sums: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for name, credit in rows:
        sums[name] += round(credit * _STEPS)
        counts[name] += 1
    total = sum_by_name(sums)
    return {name: percent(total[name] / (num * _STEPS)) for name, num in sum_by_name(counts).items()}


def _percent_of(shares: Mapping[str, float]) -> dict[str, float]:
    return {name: percent(share) for name, share in shares.items()}


def _intervals(by_type: Mapping[str, float], trials: Mapping[str, int]) -> dict[str, list[float]]:
    return {kind: interval_95(score, trials[kind]) for kind, score in by_type.items()}


def _examples(own: Told) -> list[dict[str, str]]:
    """The first questions of the split that were asked."""
    rows = [(question, said[0]) for question, said in own if said][:_NUM_EXAMPLES]
    mine = [{"question": question.text, "answer": question.answer, "predicted": text} for question, text in rows]
    return [row for part in collectives.gather_objects(mine) for row in part][:_NUM_EXAMPLES]
