"""A dialogue's text to ids, each with the characters that it covers; what stands for a token is never a text's to say.

The text is encoded whole, as a tokenizer reads a rendered chat, but with a *mark*, a private character, in the place of
each special token. So ids are those of the tokenizer itself around its special tokens, a merge that crosses a border
between two turns is seen where it lies, and a text that spells a special token out is spelt in its letters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import tokenizers

from vlm_train.errors import ConfigError
from vlm_train.types import IMAGE_ID, Tokenizer

IMAGE_MARK, END_MARK = "\U00100000", "\U00100001"
"""What stands for an image, and for the tokenizer's end token whatever its string."""

_FIRST_MARK = ord(END_MARK) + 1
_PRIVATE = re.compile("[\U00100000-\U0010ffff]")
_REPLACEMENT = "\ufffd"


class Pieces:
    """Encodes texts with marks, uncut, adding nothing.

    Args:
        tokenizer: one of `data.tokenizer`; its vocabulary is copied.
        reserved: names of further tokens that no text may bring about, where the tokenizer has them: its special tokens
            none may anyway. A token that was added without being special is ordinary text otherwise.

    Raises:
        ConfigError: the tokenizer cannot tell which characters a token covers.
    """

    def __init__(self, tokenizer: Tokenizer, reserved: Iterable[str] = ()) -> None:
        inner, spec = inner_of(tokenizer), tokenizer.spec
        backend = getattr(inner, "backend_tokenizer", inner)
        if not isinstance(backend, tokenizers.Tokenizer):
            raise ConfigError(
                "dialogues need a tokenizer that tells which characters a token covers",
                got=type(inner).__name__,
                allowed="a tokenizer with a tokenizer.json",
            )
        self._backend = tokenizers.Tokenizer.from_str(backend.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.post_processor = None  # ByteLevel's would cut the spaces off the characters covered
        added = self._backend.get_added_tokens_decoder()
        self._ids = {token.content: number for number, token in added.items()}
        self._marks = {name: chr(_FIRST_MARK + place) for place, name in enumerate(self._ids)}
        # a letter may be special (some pad with "!"), and forges nothing
        special = {number for number, token in added.items() if token.special and len(token.content) > 1}
        special |= {spec.eos_id, *([] if spec.bos_id is None else [spec.bos_id])}
        unknown = self._ids.get(str(getattr(inner, "unk_token", None)))  # a letter may well be unknown
        self._closed = (special | {self._ids[name] for name in reserved if name in self._ids}) - {unknown}
        self._add_marks({token.content: token for token in added.values()}, spec.eos_id)

    def _add_marks(self, added: dict[str, tokenizers.AddedToken], end_id: int) -> None:
        marks = [tokenizers.AddedToken(mark, normalized=False) for mark in (IMAGE_MARK, END_MARK)]
        for name, mark in self._marks.items():  # a token that takes the spaces beside it away goes on doing so
            like = added[name]
            marks.append(tokenizers.AddedToken(mark, lstrip=like.lstrip, rstrip=like.rstrip, normalized=False))
        self._backend.add_tokens(marks)
        self._meaning = {self._number(IMAGE_MARK): IMAGE_ID, self._number(END_MARK): end_id}
        self._meaning |= {self._number(mark): self._ids[name] for name, mark in self._marks.items()}

    def _number(self, token: str) -> int:
        number = self._backend.token_to_id(token)
        assert number is not None, token
        return number

    def token_id(self, name: str) -> int | None:
        """The id of an added token by its string, None where the tokenizer has no such token."""
        return self._ids.get(name)

    def mark(self, name: str) -> str | None:
        """The character that stands for an added token, None where the tokenizer has no such token."""
        return self._marks.get(name)

    def __call__(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """ids, and for each the characters [start, stop) of `text` that it covers; the bytes of one letter each cover
        it. The mark of an image gives IMAGE_ID. A mark covers itself alone."""
        self._backend.encode_special_tokens = True  # pickle does not keep it
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for number, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if number in self._meaning:
                place = next(place for place in range(start, stop) if _PRIVATE.match(text[place]))
                ids.append(self._meaning[number])
                spans.append((place, place + 1))
            elif number in self._closed:
                spelt = [(one, place) for place in range(start, stop) for one in self._letter(text[place])]
                ids += [one for one, _ in spelt]
                spans += [(place, place + 1) for _, place in spelt]
            else:
                ids.append(number)
                spans.append((start, min(max(stop, start + 1), len(text))))
        return ids, spans

    def _letter(self, letter: str) -> list[int]:
        """A letter of a special token that a text spells out. Most tokenizers do not join such letters to it; one that
        does has learned it from texts that held it."""
        number = self._backend.token_to_id(letter)
        found = self._backend.encode(letter, add_special_tokens=False).ids if number is None else [number]
        return [one for one in found if one not in self._closed]


def unmarked(text: str) -> str:
    """A text without characters that could pass for a mark (those of Unicode's last private plane)."""
    return _PRIVATE.sub(_REPLACEMENT, text)


def inner_of(tokenizer: Tokenizer) -> Any:
    """The object of `tokenizers` or of `transformers` that does the work of one of `data.tokenizer`; of another
    tokenizer itself."""
    return getattr(tokenizer, "inner", tokenizer)
