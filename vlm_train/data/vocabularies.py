"""Vocabularies as others keep them, opened as tokenizers of transformers.

CLIP's own file is a list of merges (`bpe_simple_vocab_16e6.txt.gz`, which open_clip ships); everything else is what
`AutoTokenizer` reads. What a library does to a text before its tokenizer sees it becomes part of the tokenizer, so that
one saved file holds both.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any, get_args

from tokenizers import Regex, normalizers, pre_tokenizers

from vlm_train.errors import DataError
from vlm_train.types import Cleaning

_NUM_MERGES = 49152 - 256 - 2  # the file goes on, but CLIP's vocabulary ends there
_END_OF_WORD = "</w>"
_SPACES = [normalizers.Replace(Regex(r"[\s\x1c-\x1f]+"), " "), normalizers.Strip()]  # what Python calls spaces
_PUNCTUATION = Regex(r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^`{|}~]""")
CLEANING = {
    "whitespace": _SPACES,
    "lower": [*_SPACES, normalizers.Lowercase()],
    "canonicalize": [
        normalizers.Replace("_", " "),
        normalizers.Replace(_PUNCTUATION, ""),
        normalizers.Lowercase(),
        *_SPACES,
    ],
}


def open_vocabulary(location: str, clean: Cleaning | None) -> Any:
    """The tokenizer of transformers at a folder, a hub name or a file of CLIP's merges.

    Args:
        location: as `resolve_asset` gives it.
        clean: what is done to a text first; None leaves that to the tokenizer.

    Raises:
        OSError, ValueError: nothing there that can be read.
        DataError: an unknown `clean`, or one for a tokenizer that is not of the `tokenizers` library.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if location.endswith(".txt.gz"):
        tokenizer = clip_vocabulary(Path(location))
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
        except ImportError:  # a class for sentencepiece, which is not installed: its tokenizer.json can do without
            tokenizer = PreTrainedTokenizerFast.from_pretrained(location)
    if clean is None:
        return tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if clean not in CLEANING or backend is None:
        raise DataError("a tokenizer cannot clean its texts this way", got=f"clean={clean}, {type(tokenizer).__name__}",
                        allowed=f"{', '.join(get_args(Cleaning))}, for a tokenizer with a tokenizer.json")  # fmt: skip
    own = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([*CLEANING[clean], *own])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        split_special_tokens=tokenizer.split_special_tokens,
        **tokenizer.special_tokens_map,
    )


def clip_vocabulary(path: Path) -> Any:
    """CLIP's tokenizer from its file of merges: first the 256 bytes, alone and at the end of a word, then a token for
    each merge, then the two special tokens. Raises DataError."""
    from transformers import CLIPTokenizer

    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1 : _NUM_MERGES + 1]
        merges = [(left, right) for left, right in (line.split() for line in lines)]
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} is no list of merges", got=error, allowed="bpe_simple_vocab_16e6.txt.gz") from error
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # by code point, which is CLIP's order of the bytes
    tokens = [*letters, *(letter + _END_OF_WORD for letter in letters), *(left + right for left, right in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges)  # type: ignore[arg-type]  # it hands them on, and BPE wants pairs
