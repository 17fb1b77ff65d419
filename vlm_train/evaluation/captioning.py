"""How well pictures are captioned in words: BLEU-4 and CIDEr against all captions of each sample.

Both are those of pycocoevalcap, the evaluation of COCO (Chen et al. 2015, arXiv 1504.00325): BLEU of the whole set with
the length of the closest caption (Papineni et al. 2002), and CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726), whose
document frequencies are those of the whole set. Times 100. COCO cuts texts into words by a program in Java; `words`
does without it.

Two controls stand beside them. `shuffled_images`: the caption that the model wrote of the next picture. `blind_prior`:
the caption of the set that most of the others are like, the same for every picture (a picture whose own it is gets the
next best). A model that does not beat both has not looked.

Ranks exchange texts and score all of them, in the order of the split: any number of ranks gives the same result.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider_scorer import CiderScorer

from vlm_train.distributed import collectives
from vlm_train.errors import ConfigError, DataError
from vlm_train.evaluation.answering import Answerer
from vlm_train.evaluation.base import check_counts, counted
from vlm_train.evaluation.questions import Answer
from vlm_train.log import get_logger
from vlm_train.types import Batch

LOG = get_logger(__name__)

_LONGEST = 4  # words of an n-gram, in both scores
_NUM_EXAMPLES = 5
_NUM_TYPICAL = 16  # captions among which one is found that is not a picture's own
_WORD = re.compile(r"[^\W_]+(?:[.,:/'-][^\W_]+)*")
_ENDING = re.compile(r"(?<=can)not$|n't$|'(?:s|m|d|re|ve|ll)$")
_APOSTROPHES = re.compile(r"[\u2018\u2019]")


class Captioned(NamedTuple):
    """A sample: what the model wrote (None where it could not be asked) and what people did."""

    key: str
    said: str | None
    captions: Sequence[str]


class Captions:
    """The captions that a model writes, beside those of the samples.

    Args:
        prompt: what it is asked; where `data.template` is plain the picture alone is.
        max_images: of the first samples so many are scored; None takes all.
        max_new_tokens: a caption that has not ended by then is cut off.

    Raises:
        ConfigError: a prompt that is no text, or a number below 1; of images below 2.
    """

    name, asks = "captions", Answerer

    def __init__(
        self, *, prompt: str = "Describe the picture.", max_images: int | None = None, max_new_tokens: int = 64
    ) -> None:
        if not isinstance(prompt, str):
            raise ConfigError("the prompt of captions is no text", got=prompt, allowed="a text",
                              remedy='prompt: "Describe the picture."')  # fmt: skip
        if max_images is not None and (not isinstance(max_images, int) or max_images < 2):
            raise ConfigError("max_images of captions cannot be this", got=max_images,
                              allowed="2 or more, or null for all", remedy="max_images: null")  # fmt: skip
        check_counts("max_new_tokens", [max_new_tokens])
        self.prompt, self.max_images, self.max_new_tokens = prompt, max_images, max_new_tokens

    def run(self, embedder: Answer, batches: Iterator[Batch]) -> dict[str, Any]:
        """Scores, times 100. Collective: every rank brings its share, in equally many batches.

        Returns:
            `cider`, `bleu_4`; the controls `shuffled_images` and `blind_prior` of both; `num_images`, `num_captions`
            that people wrote; `num_unanswerable` pictures that the model could not be asked about, whose caption is
            empty; `examples` [{key, caption, predicted}].

        Raises:
            DataError: fewer than two pictures.
        """
        mine = [row for batch in batches for row in self._written(embedder, batch)]
        rows = [Captioned(*row) for part in collectives.gather_objects(mine) for row in part][: self.max_images]
        if len(rows) < 2:
            raise DataError(
                "Captions are scored by how rare their words are in the set, which needs pictures",
                got=f"{len(rows)} samples with a picture",
                allowed="2 or more",
                remedy="check data.val.shards",
            )
        refused = [row.key for row in rows if row.said is None]
        if refused and collectives.rank() == 0:
            LOG.warning(
                "%d pictures cannot be asked about and have no caption; the first is %s", len(refused), refused[0]
            )
        captions = [[words(text) for text in row.captions] for row in rows]
        said = [words(row.said or "") for row in rows]
        return {
            **scores(said, captions),
            "shuffled_images": scores([*said[1:], said[0]], captions),
            "blind_prior": scores(_most_typical(captions), captions),
            "num_images": len(rows),
            "num_captions": sum(len(row.captions) for row in rows),
            "num_unanswerable": len(refused),
            "examples": [
                {"key": row.key, "caption": row.captions[0], "predicted": row.said} for row in rows[:_NUM_EXAMPLES]
            ],
        }

    def _written(self, answerer: Answer, batch: Batch) -> list[Captioned]:
        """Of the samples of a batch that have a picture."""
        chosen = (counted(batch) & (batch["num_images"].cpu() > 0)).tolist()
        prompts = [[self.prompt] if is_asked else [] for is_asked in chosen]
        replies = answerer.answers(batch, prompts, max_new_tokens=self.max_new_tokens)
        return [
            Captioned(key, None if isinstance(reply[0], DataError) else reply[0], captions)
            for key, captions, reply in zip(batch["keys"], batch["all_captions"], replies, strict=True)
            if reply
        ]


def words(text: str) -> str:
    """A caption as the scores read it: words in lower case with a space between them, without marks. Endings with an
    apostrophe are words of their own (`isn't` is `is n't`); a word with a hyphen or a number is one.

    As COCO's program has it for 4,771 of 4,847 texts without brackets, of which that makes words (captions of scenes,
    names of emoji, sentences of documentation); the others hold abbreviations (`etc.`) or signs (`C++`, `-1`)."""
    found = []
    for word in _WORD.findall(_APOSTROPHES.sub("'", text.lower())):
        ending = _ENDING.search(word)
        found += [word] if ending is None else [word[: ending.start()], ending[0]]
    return " ".join(part for part in found if part)


def scores(said: Sequence[str], captions: Sequence[Sequence[str]]) -> dict[str, float]:
    """`cider` and `bleu_4`, times 100, of a caption for each picture against all of its own; both as `words` gives
    them. 0 where no picture has a caption with a word in it, of which the library makes an error."""
    if not any(text for own in captions for text in own):
        return {"cider": 0.0, "bleu_4": 0.0}
    cider, bleu = CiderScorer(n=_LONGEST), BleuScorer(n=_LONGEST)
    for text, own in zip(said, captions, strict=True):
        cider += (text, own)
        bleu += (text, own)
    of_all, _ = cider.compute_score()
    by_length, _ = bleu.compute_score(option="closest")
    return {"cider": round(100 * float(of_all), 10), "bleu_4": round(100 * float(by_length[-1]), 10)}


def _most_typical(captions: Sequence[Sequence[str]]) -> list[str]:
    """For each picture the caption that most others are like, its own left out."""
    best = _typical(captions)
    return [next((text for text in best if text not in own), "") for own in captions]


def _typical(captions: Sequence[Sequence[str]]) -> list[str]:
    """The captions whose n-grams, weighted by how rare they are as CIDEr does, lie nearest to those of all."""
    grams = {text: _grams(text) for own in captions for text in own}
    found_in = Counter(gram for own in captions for gram in {gram for text in own for gram in grams[text]})
    rare = {gram: math.log(len(captions) / num) for gram, num in found_in.items()}
    vectors = {text: _unit(counts, rare) for text, counts in grams.items()}
    mean: defaultdict[str, float] = defaultdict(float)
    for own in captions:
        for gram, weight in (item for text in own for item in vectors[text].items()):
            mean[gram] += weight / len(own)
    nearness = {text: sum(weight * mean[gram] for gram, weight in vector.items()) for text, vector in vectors.items()}
    return sorted(nearness, key=lambda text: (-nearness[text], text))[:_NUM_TYPICAL]


def _grams(text: str) -> Counter[str]:
    parts = text.split()
    return Counter(
        " ".join(parts[start : start + length])
        for length in range(1, _LONGEST + 1)
        for start in range(len(parts) - length + 1)
    )


def _unit(counts: Mapping[str, int], rare: Mapping[str, float]) -> dict[str, float]:
    """Weights whose squares are 1 together; all 0 where every n-gram is in every sample."""
    weights = {gram: num * rare[gram] for gram, num in counts.items()}
    norm = math.sqrt(sum(weight**2 for weight in weights.values()))
    return {gram: weight / norm if norm else 0.0 for gram, weight in weights.items()}
