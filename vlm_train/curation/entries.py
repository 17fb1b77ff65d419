"""Which entries of a long list stand in captions, as MetaCLIP matches them (Xu et al., "Demystifying CLIP data", 2023,
arXiv 2309.16671): as a substring that begins and ends at white space, where , . ; : ? ! and ` are words of their own.

Two things differ from its published code: case and compatibility forms are folded on both sides, and runs of white
space are one.

The words of the entries are a tree (a node is the words from the root on); a caption walks it from each of its words at
once. Steps are looked up as (node, word) in a sorted array, so the match is exact, and 500,000 entries take 30 MB.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlm_train.errors import ConfigError

_WORD_BY_ITSELF = re.compile("([,.;:?!`])")
_UNKNOWN = -1

Matches = tuple[NDArray[np.int64], NDArray[np.int64]]
"""(number of the caption [M], number of the entry [M]): each pair once, in this order."""


def words_of(text: str) -> list[str]:
    """As entries and captions are matched."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return _WORD_BY_ITSELF.sub(r" \1 ", folded).split()


@dataclass(frozen=True, slots=True, eq=False)
class Entries:
    """E entries, each once, in the order of their texts.

    `texts`: words with a space between; `hashes` uint64 [E]: of the texts, so that an entry has the same one in any
    list; `vocabulary`: word -> number; `steps` int64 [S], ascending: parent * len(vocabulary) + word; `nodes` [S]:
    where each step leads; `entry_at`: node -> entry, -1 for none.
    """

    texts: tuple[str, ...]
    hashes: NDArray[np.uint64]
    vocabulary: dict[str, int]
    steps: NDArray[np.int64]
    nodes: NDArray[np.int64]
    entry_at: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def fingerprint(self) -> str:
        """A hash of all of them."""
        return hashlib.sha256("\n".join(self.texts).encode()).hexdigest()

    @staticmethod
    def of(texts: Sequence[str]) -> Entries:
        """Of texts in any order and spelling; those of the same words are one.

        Raises:
            ConfigError: there is none.
        """
        every = sorted({" ".join(words_of(text)) for text in texts} - {""})
        if not every:
            raise ConfigError("there are no entries to balance by", got="an empty list", allowed="one entry a line",
                              remedy="put the words and names of your domain into the file")  # fmt: skip
        vocabulary: dict[str, int] = {}
        rows = [[vocabulary.setdefault(word, len(vocabulary)) for word in text.split(" ")] for text in every]
        steps: dict[int, int] = {}
        ends = [_grow(steps, row, len(vocabulary)) for row in rows]
        entry_at = np.full(len(steps) + 1, -1)
        entry_at[ends] = np.arange(len(every))
        codes = np.fromiter(steps, np.int64, len(steps))
        order = np.argsort(codes)
        nodes = np.fromiter(steps.values(), np.int64, len(steps))[order]
        digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in every)
        hashes = np.frombuffer(digests, "<u8").astype(np.uint64)
        return Entries(tuple(every), hashes, vocabulary, codes[order], nodes, entry_at)

    def match(self, captions: Sequence[str]) -> Matches:
        """Which entries stand in which captions [n]."""
        words = [[self.vocabulary.get(word, _UNKNOWN) for word in words_of(caption)] for caption in captions]
        lengths = np.array([len(row) for row in words], np.int64)
        flat = np.array([number for row in words for number in row], np.int64)
        caption = np.repeat(np.arange(len(words)), lengths)
        end = np.cumsum(lengths)[caption] if len(caption) else caption
        place, node = np.arange(len(flat)), np.zeros(len(flat), np.int64)
        found = [np.empty(0, np.int64)]
        while len(place):
            place, node = self._step(flat, place, node)
            is_end = self.entry_at[node] >= 0
            found.append(caption[place[is_end]] * len(self) + self.entry_at[node[is_end]])
            goes_on = place + 1 < end[place]
            place, node = place[goes_on] + 1, node[goes_on]
        pairs = np.unique(np.concatenate(found))
        return pairs // len(self), pairs % len(self)

    def _step(
        self, flat: NDArray[np.int64], place: NDArray[np.int64], node: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The places from whose node the word there leads on, and where to."""
        code = np.where(flat[place] < 0, -1, node * len(self.vocabulary) + flat[place])
        at = np.minimum(np.searchsorted(self.steps, code), len(self.steps) - 1)
        goes = self.steps[at] == code
        return place[goes], self.nodes[at[goes]]


def _grow(steps: dict[int, int], row: Sequence[int], num_words: int) -> int:
    """Adds the steps of an entry; returns the node at its end. The root is 0."""
    node = 0
    for word in row:
        node = steps.setdefault(node * num_words + word, len(steps) + 1)
    return node
