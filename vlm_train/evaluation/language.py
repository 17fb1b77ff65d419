"""How likely a sentence is, without any picture: a model of word pairs, counted in the captions of the training split.

The control of every test that asks which of two sentences is true of a picture: where this model answers better than
by chance, the sentences alone give the answer away (SugarCrepe, arXiv 2306.14610). The probability of a word is that
after the word before it, mixed with that of the word alone, mixed with an equal share for every word and one more that
was never seen (interpolation of Jelinek and Mercer, 1980, with fixed weights).
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable

_WORD = re.compile(r"\w+|[^\w\s]")
_END = ""  # begins and ends a sentence; no word is empty
_PAIR, _SINGLE = 0.7, 0.25  # the rest goes to words never seen


class WordPairs:
    """Log-likelihood of sentences.

    Args:
        captions: what is counted.
    """

    def __init__(self, captions: Iterable[str]) -> None:
        self._pairs: Counter[tuple[str, str]] = Counter()
        for caption in captions:
            self._pairs.update(_pairs(caption))
        self._before: Counter[str] = Counter()
        self._words: Counter[str] = Counter()
        for (before, word), count in self._pairs.items():
            self._before[before] += count
            self._words[word] += count
        self._num_words = sum(self._words.values())

    def score(self, sentence: str) -> float:
        """Natural logarithm of the probability."""
        return math.fsum(math.log(self._probability(before, word)) for before, word in _pairs(sentence))

    def _probability(self, before: str, word: str) -> float:
        pair = self._pairs[before, word] / max(1, self._before[before])
        single = self._words[word] / max(1, self._num_words)
        return _PAIR * pair + _SINGLE * single + (1 - _PAIR - _SINGLE) / (len(self._words) + 1)


def _pairs(sentence: str) -> list[tuple[str, str]]:
    words = [_END, *_WORD.findall(sentence.lower()), _END]
    return list(itertools.pairwise(words))
