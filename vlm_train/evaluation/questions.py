"""The questions of a split, asked of a model.

Questions are the `qa` of KEY.json, [{question, answer or answers, type}]; several answers are those of several people
to one question. Each is asked about the images of its own sample, all of them; of a sample of text alone about none.

Two controls ask it of others: the next sample in the split, with all that this has besides (the last one of a batch or
of a rank has a next one too, so where these end changes nothing), and blank images in place of its own. The second asks
each different question once, since the answer is the same wherever it stands.

A question that cannot be asked, because it and its images do not fit the model, counts as answered wrongly.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from vlm_train.distributed import collectives
from vlm_train.errors import ConfigError, DataError, nearest
from vlm_train.evaluation.answering import MAX_NEW_TOKENS, Pictures, Reply
from vlm_train.evaluation.answers import normalise
from vlm_train.evaluation.base import check_counts, counted
from vlm_train.log import get_logger
from vlm_train.types import Batch, Grid, grids_of, rank_share

LOG = get_logger(__name__)

UNTYPED = "untyped"
"""The type of a question whose dataset names none."""

_MAX_NAMED = 20  # questions that the log names

_FORM = '`qa`: [{"question": TEXT, "answer": TEXT or "answers": [TEXT], "type": TEXT}]'


class Answer(Protocol):
    """Questions about pictures to texts. Collective."""

    def answers(
        self, batch: Batch, questions: Sequence[Sequence[str]], *, max_new_tokens: int = MAX_NEW_TOKENS
    ) -> list[list[Reply]]:
        """A reply to each question; `questions` holds a list for each row of the batch, about the images of that row.
        Lists may be empty, and differ in length between rows and between ranks."""

    def blind_answers(self, questions: Sequence[tuple[str, Pictures]]) -> list[Reply]:
        """A reply to each question, about blank pictures with these tiles. Ranks may ask unequally many."""


class Question(NamedTuple):
    """`answer`: the one answer, or the one given most often; `answers`: all that count as right; `kind`: its type."""

    text: str
    answer: str
    answers: Sequence[str]
    kind: str


Told = list[tuple[Question, list[str]]]
"""Questions with what was answered: one text, several that are equally likely, or none, which is never right."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which questions of a sample are asked.

    Args:
        types: of these types only; None asks all.
        max_per_image: so many of a sample, beginning at one that hangs on its key, so that all types have their turn.
        wanted: and only these.

    Raises:
        ConfigError: no type, or a number below 1.
    """

    types: Sequence[str] | None = None
    max_per_image: int | None = None
    wanted: Callable[[Question], bool] = lambda question: True

    def __post_init__(self) -> None:
        if self.max_per_image is not None:
            check_counts("max_per_image", [self.max_per_image])
        if self.types is not None and (isinstance(self.types, str) or not list(self.types)):
            raise ConfigError("types of an evaluator cannot be this", got=self.types or "no type",
                              allowed="a list of types, or null for all", remedy="types: [color, count]")  # fmt: skip

    def among(self, questions: Sequence[Question], key: str) -> list[Question]:
        """The questions of a sample that are asked. `key`: the sample's."""
        found = [row for row in questions if self.wanted(row) and (self.types is None or row.kind in self.types)]
        if self.max_per_image is None or len(found) <= self.max_per_image:
            return found
        first = zlib.crc32(key.encode()) % len(found)
        return (found[first:] + found[:first])[: self.max_per_image]


@dataclass(slots=True)
class Asked:
    """What this rank asked: questions with the answers about their `own` images; as many, not always the same ones,
    with those about the next sample's, `shuffled`; and its own with those about blank ones, `blank`. `images`: samples
    that were asked about, in all ("") and by type. `num_unanswerable`: own questions of all ranks that could not be
    asked."""

    own: Told = field(default_factory=list)
    shuffled: Told = field(default_factory=list)
    blank: Told = field(default_factory=list)
    images: Counter[str] = field(default_factory=Counter)
    num_unanswerable: int = 0
    grids: list[Pictures] = field(default_factory=list)  # the tiles of the pictures of each own question
    refused: list[str] = field(default_factory=list)  # own questions of this rank that could not be asked, and why
    types: Counter[str] = field(default_factory=Counter)  # of all questions that could be asked
    first: tuple[Batch, int] | None = None  # the first picture: the one before it lies on another rank
    last: list[Question] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # samples whose questions are none, and why


def questions_of(metadata: dict[str, Any]) -> list[Question]:
    """The questions of a sample. Raises KeyError, TypeError, AttributeError or ValueError for what is none."""
    found = []
    rows = metadata.get("qa") or []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{str(rows)[:80]} is no list of questions")
    for row in rows:
        answers = row["answers"] if row.get("answers") is not None else [row["answer"]]
        if not isinstance(answers, list) or not answers:
            raise ValueError(f"{answers!r} is no list of answers")
        text, kind = row["question"], row.get("type") or UNTYPED
        for each in (text, kind, row.get("answer", ""), *answers):
            if not isinstance(each, str):
                raise ValueError(f"{each!r} is no text")
            each.encode("utf-8")  # JSON can spell half a surrogate pair, which no tokenizer takes
        often = Counter(map(normalise, answers)).most_common(1)[0][0]  # of equals the first
        found.append(Question(text, row.get("answer", often), answers, kind))
    return found


def ask(answerer: Answer, batches: Iterator[Batch], choice: Choice, *, what: str) -> Asked:
    """Asks each sample its own questions and those of the sample before it, in one call for a batch, and then all of
    them about blank images. Collective.

    Args:
        answerer: the model.
        batches: this rank's, as many as every rank has.
        choice: which questions.
        what: what the evaluator needs, for its error.

    Raises:
        DataError: no question at all, none of a type that is to be asked, or a sample whose questions are none.
    """
    asked = Asked()
    batch: Batch | None = None
    for batch in batches:
        own: list[list[Question]] = [[] for _ in counted(batch)]
        before: list[list[Question]] = [[] for _ in own]
        for row in counted(batch).nonzero().flatten().tolist():
            own[row] = _chosen_or_none(asked, batch, row, choice)
            if own[row]:
                before[row], asked.last = asked.last, own[row]
                asked.first = asked.first or (batch, row)
                asked.images.update({"", *(question.kind for question in own[row])})
        _raise_problems(asked)
        texts = [[question.text for question in [*mine, *others]] for mine, others in zip(own, before, strict=True)]
        for row, replies in enumerate(answerer.answers(batch, texts)):
            _keep(asked, batch, row, own[row], replies)
            asked.shuffled += _told(before[row], replies[len(own[row]) :])
    _check(asked, batch, choice, what)
    assert batch is not None
    _close_ring(answerer, asked, batch)
    _ask_blind(answerer, asked)
    _tell_refused(asked)
    return asked


def sum_by_name(mine: Mapping[str, int]) -> dict[str, int]:
    """Integers by name, added up over ranks, in the order of the names. Collective."""
    total: Counter[str] = Counter()
    for part in collectives.gather_objects(mine):
        total.update(part)
    return dict(sorted(total.items()))


def _chosen_or_none(asked: Asked, batch: Batch, row: int, choice: Choice) -> list[Question]:
    """What is wrong is kept, to be raised where every rank is told."""
    try:
        found = questions_of(batch["metadata"][row])
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else f"{error}"
        asked.problems.append(f"{batch['keys'][row]}: {what}")
        return []
    asked.types.update(question.kind for question in found if choice.wanted(question))
    return choice.among(found, batch["keys"][row])


def _keep(asked: Asked, batch: Batch, row: int, questions: Sequence[Question], replies: Sequence[Reply]) -> None:
    """What the own questions of a row were answered."""
    mine = replies[: len(questions)]
    asked.own += _told(questions, mine)
    asked.grids += [grids_of(batch)[row]] * len(questions)
    asked.refused += [
        f"{batch['keys'][row]} ({reply.what}: {reply.got})" for reply in mine if isinstance(reply, DataError)
    ]


def _told(questions: Iterable[Question], replies: Iterable[Reply]) -> Told:
    rows = zip(questions, replies, strict=True)
    return [(question, [] if isinstance(reply, DataError) else [reply]) for question, reply in rows]


def _ask_blind(answerer: Answer, asked: Asked) -> None:
    """Each different question of all ranks is asked once, by one of them."""
    mine = [(question.text, tuple(grids)) for (question, _), grids in zip(asked.own, asked.grids, strict=True)]
    parts = collectives.gather_objects(sorted(set(mine)))
    different = sorted({(text, tuple(Grid(*grid) for grid in grids)) for part in parts for text, grids in part})
    start, stop = rank_share(len(different), collectives.rank(), collectives.world_size())
    replies = answerer.blind_answers(different[start:stop])
    said = [[] if isinstance(reply, DataError) else [reply] for reply in replies]
    known = dict(zip(different, [row for part in collectives.gather_objects(said) for row in part], strict=True))
    asked.blank = [(question, known[key]) for (question, _), key in zip(asked.own, mine, strict=True)]


def _tell_refused(asked: Asked) -> None:
    """One line of the log for all of them."""
    refused = [row for part in collectives.gather_objects(asked.refused) for row in part]
    asked.num_unanswerable = len(refused)
    if refused and collectives.rank() == 0:
        named = list(dict.fromkeys(refused))
        more = f", and {len(named) - _MAX_NAMED} more" if len(named) > _MAX_NAMED else ""
        LOG.warning("%d questions cannot be asked of this model and count as wrong: %s%s", len(refused),
                    ", ".join(named[:_MAX_NAMED]), more)  # fmt: skip


def _raise_problems(asked: Asked) -> None:
    """Before anything of the batch is asked, on every rank."""
    problems = [problem for part in collectives.gather_objects(asked.problems) for problem in part]
    if problems:
        more = f", and {len(problems) - _MAX_NAMED} more of its batch" if len(problems) > _MAX_NAMED else ""
        raise DataError("The questions of a sample cannot be read", got="; ".join(problems[:_MAX_NAMED]) + more,
                        allowed=_FORM, remedy="mend `qa` of these KEY.json")  # fmt: skip


def _check(asked: Asked, batch: Batch | None, choice: Choice, what: str) -> None:
    """What cannot be measured is an error on every rank."""
    if batch is None:
        raise DataError("There is nothing to evaluate", got="no batches", allowed=_FORM, remedy="check data.val.shards")
    types = sum_by_name(asked.types)
    missing = [kind for kind in choice.types or [] if kind not in types]
    if missing or not types:
        close = nearest(missing[0], types) if missing else []
        raise DataError(
            f"This evaluator needs {what}, `qa` in KEY.json",
            got=f"none of type {missing[0]}" if types else "no picture with one",
            allowed=f"types: {', '.join(types)}" if types else _FORM,
            remedy=f"is it {close[0]}?" if close else "evaluate on scenes (vlm-train data make scenes)",
        )


def _close_ring(answerer: Answer, asked: Asked, batch: Batch) -> None:
    """The first picture of each rank is asked what belongs to the last one of the rank before. `batch`: any, for a rank
    without questions, which takes part all the same."""
    lasts = collectives.gather_objects(asked.last)
    ranks = [rank for rank, questions in enumerate(lasts) if questions]
    batch, row = asked.first or (batch, 0)
    before = lasts[ranks[ranks.index(collectives.rank()) - 1]] if asked.first else []
    questions = [Question(*each) for each in before]
    texts: list[list[str]] = [[] for _ in counted(batch)]
    texts[row] = [question.text for question in questions]
    asked.shuffled += _told(questions, answerer.answers(batch, texts)[row])
