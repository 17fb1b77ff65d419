"""What an answer in words is worth, beside the answers that people gave.

Answers are compared after `normalise`. It does what the evaluation of VQA says that it does (Goyal et al. 2017, arXiv
1612.00837, visualqa.org/evaluation), but for three things: every text is normalised, not only where people disagree; a
mark is judged where it stands, not by what happens elsewhere in the text; and articles stay where there is nothing
else, so that choice "A" is not the empty answer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

_ARTICLES = frozenset({"a", "an", "the"})
_DIGITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
)  # fmt: skip
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}
_JOINED = (  # not its, ill, id, well, were, which are words without it too
    "ain't", "aren't", "can't", "could've", "couldn't", "didn't", "doesn't", "don't", "hadn't", "hasn't", "haven't",
    "he's", "here's", "how's", "i'm", "i've", "isn't", "it'd", "it'll", "might've", "mightn't", "must've",
    "mustn't", "needn't", "she's", "should've", "shouldn't", "somebody's", "someone's", "that's", "there's",
    "they'd", "they'll", "they're", "they've", "wasn't", "we've", "weren't", "what's", "where's", "who's", "won't",
    "would've", "wouldn't", "you'd", "you'll", "you're", "you've",
)  # fmt: skip
_CONTRACTIONS = {word.replace("'", ""): word for word in _JOINED}
_THOUSANDS = re.compile(r"(?<=\d),(?=\d)")
_MARKS = re.compile(r"""[;/\[\]"{}()=+\\_\-<>@`,?!]""")
_FULL_STOP = re.compile(r"\.(?!\d)")
_APOSTROPHES = re.compile(r"[\u2018\u2019]")

_YES = frozenset({"yes", "yeah", "yep"})
_NO = frozenset({"no", "not", "nope", "isn't", "aren't", "wasn't", "weren't", "doesn't"})

_NUM_AGREEING = 3  # as many others must have said it for full credit
_MAX_GUESSES = 8


@lru_cache(maxsize=1 << 16)
def normalise(text: str) -> str:
    """A text in the form in which answers are compared: lower case; without marks, full stops (but decimal points),
    articles; numbers to ten in digits; contractions with their apostrophe; single spaces. Normalising twice changes
    nothing."""
    text = _APOSTROPHES.sub("'", text.lower())
    text = _FULL_STOP.sub("", _MARKS.sub(" ", _THOUSANDS.sub("", text)))
    words = [_CONTRACTIONS.get(word, _NUMBERS.get(word, word)) for word in text.split()]
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def exact_match(predicted: str, answers: Sequence[str]) -> float:
    """1.0 where it is one of the answers, else 0.0. Nothing said is never right."""
    said = normalise(predicted)
    return float(bool(said) and said in map(normalise, answers))


def token_f1(predicted: str, answers: Sequence[str]) -> float:
    """F1 of the words said, in 0..1, against the answer that gives the most (SQuAD: Rajpurkar et al. 2016, arXiv
    1606.05250). A word counts as often as both have it."""
    said = Counter(normalise(predicted).split())
    best = 0.0
    for words in (Counter(normalise(answer).split()) for answer in answers):
        shared = (said & words).total()
        best = max(best, 2 * shared / (said.total() + words.total()) if shared else 0.0)
    return best


def soft_accuracy(predicted: str, answers: Sequence[str]) -> float:
    """VQA accuracy, in 0..1: of the answers without one, how many agree, three being enough; the mean over who is left
    out. Of fewer than four answers, of which never three others can agree, `exact_match`.

    Of ten answers, 0, 1, 2, 3, 4 that agree are worth 0, 0.3, 0.6, 0.9, 1.
    """
    num = len(answers)
    if num <= _NUM_AGREEING:
        return exact_match(predicted, answers)
    said = normalise(predicted)
    agree = sum(normalise(answer) == said for answer in answers) if said else 0
    of_them = agree * min(agree - 1, _NUM_AGREEING)  # where one that agrees is left out
    of_others = (num - agree) * min(agree, _NUM_AGREEING)
    return (of_them + of_others) / (_NUM_AGREEING * num)


def yes_or_no(text: str) -> bool | None:
    """Whether an answer says yes (True) or no (False), by the first word that tells; None where none does."""
    words = normalise(text).split()
    return next((word in _YES for word in words if word in _YES or word in _NO), None)


class YesNoCounts(NamedTuple):
    """Of `num` questions of yes or no: how many were answered rightly; to how many the answer is yes; how many were
    answered by yes, and by yes rightly; and how many by neither."""

    num: int
    right: int
    yes: int
    said_yes: int
    right_yes: int
    neither: int

    @classmethod
    def of(cls, rows: Iterable[tuple[bool, bool | None]]) -> YesNoCounts:
        """Counts rows of (the answer, what was said)."""
        kept = list(rows)
        return cls(
            num=len(kept),
            right=sum(said == answer for answer, said in kept),
            yes=sum(answer for answer, _ in kept),
            said_yes=sum(said is True for _, said in kept),
            right_yes=sum(answer and said is True for answer, said in kept),
            neither=sum(said is None for _, said in kept),
        )

    def scores(self) -> dict[str, float]:
        """Shares in 0..1, as POPE prints them (Li et al. 2023, arXiv 2305.10355): accuracy; precision, recall and F1 of
        yes; the share answered by yes. What has no denominator is 0. Who says neither is wrong, and said no yes."""
        return {
            "accuracy": _share(self.right, self.num),
            "precision": _share(self.right_yes, self.said_yes),
            "recall": _share(self.right_yes, self.yes),
            "f1": _share(2 * self.right_yes, self.said_yes + self.yes),
            "yes_ratio": _share(self.said_yes, self.num),
        }


def coin_scores(share_yes: float) -> dict[str, float]:
    """What a fair coin is expected to score where this share of the answers is yes; of F1, that of its precision and
    recall."""
    return {
        "accuracy": 0.5,
        "precision": share_yes,
        "recall": 0.5,
        "f1": _share(share_yes, share_yes + 0.5),
        "yes_ratio": 0.5,
    }


class BlindReader:
    """Who knows every question of a split with its answer, but for the one that is asked, and never sees a picture.

    Args:
        rows: (question, its type, its answer) of the whole split.
    """

    def __init__(self, rows: Iterable[tuple[str, str, str]]) -> None:
        counts: dict[tuple[str, ...], Counter[str]] = {}
        for question, kind, answer in rows:
            for group in _groups(question, kind):
                counts.setdefault(group, Counter())[normalise(answer)] += 1
        # with one answer left out, the most frequent ones are still among these
        self._top = {
            group: dict(sorted(found.items(), key=lambda item: (-item[1], item[0]))[: _MAX_GUESSES + 1])
            for group, found in counts.items()
        }

    def guesses(self, question: str, kind: str, answer: str) -> list[str]:
        """The most frequent answer to this question in the rest of the split, or else to its type; several where they
        are equally frequent (8 at most), none where the rest has none. `answer`: its own, which is left out."""
        own = normalise(answer)
        for group in _groups(question, kind):
            rest = {text: count - (text == own) for text, count in self._top.get(group, {}).items()}
            most = max(rest.values(), default=0)
            if most:
                return [text for text, count in rest.items() if count == most][:_MAX_GUESSES]
        return []


def _groups(question: str, kind: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return ("question", normalise(question)), ("type", kind)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
