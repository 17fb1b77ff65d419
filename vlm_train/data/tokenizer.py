"""Text to ids: a byte-pair tokenizer of our own, trained on the captions at hand, and any tokenizer of Hugging Face.

Ours is byte-level BPE (every text can be encoded, nothing is unknown) over lower-cased, space-collapsed NFC text; the
padding, beginning and end tokens take the last three ids in this order, so that the end token has the highest id and
pooling "at the highest id" (CLIP) and "at the end token" agree. A caption that spells out a special token is encoded as
the plain characters it consists of. Both kinds are saved as files that `transformers.AutoTokenizer` reads to the same
ids, with `text_spec.json` beside them, which `load_tokenizer` needs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Batches are encoded inside loader workers, which already take every core; threads of a forked library would lock up.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from vlm_train.assets import resolve_asset
from vlm_train.data.vocabularies import open_vocabulary
from vlm_train.data.writer import write_atomically
from vlm_train.errors import ConfigError, DataError
from vlm_train.types import Cleaning, TextSpec, Tokenizer

SPEC_FILE = "text_spec.json"
PAD, BOS, EOS = "<|pad|>", "<|startoftext|>", "<|endoftext|>"
NUM_SPECIAL = 3
SMALLEST_CONTEXT = 3


class BytePairTokenizer:
    """Our tokenizer; make one with `train` or `load_tokenizer`.

    Args:
        definition: the content of a `tokenizer.json`.
        context_length: T; longer texts are cut so that the end token stays.
        pad_to_max: the tower reads a fixed position (SigLIP), so batches must not be trimmed.

    Raises:
        DataError: `definition` is damaged or was not made by `train`.
        ConfigError: `context_length` below 3.
    """

    def __init__(self, *, definition: str, context_length: int, pad_to_max: bool = False) -> None:
        self._definition = definition
        self._tokenizer, (pad_id, bos_id, eos_id) = _parsed(definition)
        self._tokenizer.encode_special_tokens = True  # not kept in the file; transformers: split_special_tokens
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(_checked_length(context_length))
        self.spec = TextSpec(
            vocab_size=self._tokenizer.get_vocab_size(),
            context_length=context_length,
            pad_id=pad_id,
            bos_id=bos_id,
            eos_id=eos_id,
            pad_to_max=pad_to_max,
        )

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        *,
        vocab_size: int = 8192,
        context_length: int = 32,
        pad_to_max: bool = False,
        special_tokens: Sequence[str] = (),
    ) -> BytePairTokenizer:
        """Learns the merges from `texts`; the same texts in any order give the same tokenizer. `special_tokens`:
        those of a chat template, which no text spells. `spec.vocab_size` is what was reached.

        Raises:
            ConfigError: `vocab_size` below 259 (the bytes and three special tokens) or `context_length` below 3.
        """
        special = [*special_tokens, PAD, BOS, EOS]
        if vocab_size < 256 + len(special):
            raise ConfigError("the vocabulary is too small", got=vocab_size, allowed=f"at least {256 + len(special)}")
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence(
            [
                normalizers.NFC(),
                normalizers.Lowercase(),
                normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
                normalizers.Strip(),
            ]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet, num = sorted(pre_tokenizers.ByteLevel.alphabet()), vocab_size - len(special)
        trainer = trainers.BpeTrainer(vocab_size=num, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.add_special_tokens(special)
        ends = [(token, tokenizer.token_to_id(token)) for token in (BOS, EOS)]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=ends)
        return cls(definition=tokenizer.to_str(), context_length=context_length, pad_to_max=pad_to_max)

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids [B, T] int64 and mask [B, T] bool, True on real tokens; T = context_length."""
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]
        return _padded(rows, self.spec)

    def decode(self, ids: Sequence[int]) -> str:
        """The normalised text up to the first end token."""
        return self._tokenizer.decode(_up_to_end(ids, self.spec.eos_id), skip_special_tokens=True).strip()

    @property
    def inner(self) -> tokenizers.Tokenizer:
        """What does the work, for `data.pieces`."""
        return self._tokenizer

    def save(self, directory: str) -> None:
        """Writes `tokenizer.json`, `tokenizer_config.json` and `text_spec.json`."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.spec.context_length,
            "pad_token": PAD,
            "bos_token": BOS,
            "eos_token": EOS,
            "padding_side": "right",
            "truncation_side": "right",
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
        }
        Path(directory).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(directory) / "tokenizer.json", self._tokenizer.to_str(pretty=True))
        write_atomically(Path(directory) / "tokenizer_config.json", json.dumps(config, indent=1))
        _save_spec("byte_pair", self.spec, directory)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "definition": self._definition,
            "context_length": self.spec.context_length,
            "pad_to_max": self.spec.pad_to_max,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class HuggingFaceTokenizer:
    """Any tokenizer that `transformers.AutoTokenizer` loads, with the conventions of a text tower.

    A sequence ends with the tokenizer's end token (`eos`, or `sep` for BERT) whether or not the tokenizer puts it there
    itself, and keeps it when it is cut. Padding is on the right with the tokenizer's padding id, or its end id where it
    has none (GPT-2). Code that comes with a tokenizer is not run.

    Args:
        path: a local directory, a name on the hub, or `package:NAME` (see assets.py); `package:open-clip-torch` is the
            vocabulary of CLIP.
        context_length: T.
        pad_to_max: the tower reads a fixed position (SigLIP), so batches must not be trimmed.
        vocab_size: rows of the token table, where a model has more than the tokenizer has tokens.
        clean: what is done to a text first, as open_clip does before a tokenizer of Hugging Face.

    Raises:
        DataError: the tokenizer cannot be found, or has no end token.
        ConfigError: `vocab_size` below the number of tokens.
    """

    def __init__(
        self,
        *,
        path: str,
        context_length: int,
        pad_to_max: bool = False,
        vocab_size: int | None = None,
        clean: Cleaning | None = None,
    ) -> None:
        try:
            tokenizer = open_vocabulary(resolve_asset(path), clean)
        except (OSError, ValueError, ImportError) as error:
            raise DataError(
                f"the tokenizer `{path}` cannot be loaded",
                got=str(error).splitlines()[0],
                allowed="a directory with tokenizer.json or a vocabulary, or a name on the Hugging Face hub",
                remedy="check the path; without a network, pass a local directory",
            ) from error
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        tokenizer.model_max_length = _checked_length(context_length)
        tail = tokenizer("a")["input_ids"]
        eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
        if tokenizer.sep_token_id == tail[-1]:  # BERT-like: an unused `eos` may be declared beside the real end
            eos, bos = tokenizer.sep_token_id, tokenizer.cls_token_id
        if eos is None:
            raise DataError(
                f"the tokenizer `{path}` has no end token", allowed="a tokenizer with eos_token or sep_token"
            )
        if vocab_size is not None and vocab_size < len(tokenizer):
            raise ConfigError(
                f"the tokenizer `{path}` has more tokens than the model has rows for", got=len(tokenizer),
                allowed=f"at most {vocab_size}", remedy="use the tokenizer that the model was trained with",
            )  # fmt: skip
        self._tokenizer, self._appends_end = tokenizer, tail[-1] != eos
        self.spec = TextSpec(
            vocab_size=len(tokenizer) if vocab_size is None else vocab_size,
            context_length=context_length,
            pad_id=eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            bos_id=bos if tail[0] == bos else None,
            eos_id=eos,
            pad_to_max=pad_to_max,
        )

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids [B, T] int64 and mask [B, T] bool, True on real tokens; T = context_length."""
        if not texts:
            return _padded([], self.spec)
        room = self.spec.context_length - self._appends_end
        rows: list[list[int]] = self._tokenizer(list(texts), truncation=True, max_length=room)["input_ids"]
        return _padded([[*row, self.spec.eos_id] for row in rows] if self._appends_end else rows, self.spec)

    def decode(self, ids: Sequence[int]) -> str:
        """The text up to the first end token, without special tokens."""
        text = self._tokenizer.decode(_up_to_end(ids, self.spec.eos_id), skip_special_tokens=True)
        return str(text).strip()

    @property
    def inner(self) -> Any:
        """What does the work, for `data.pieces`."""
        return self._tokenizer

    def save(self, directory: str) -> None:
        """Writes the files of `save_pretrained` and `text_spec.json`."""
        self._tokenizer.save_pretrained(directory)
        _save_spec("hugging_face", self.spec, directory)


def load_tokenizer(directory: str, *, context_length: int | None = None) -> Tokenizer:
    """The tokenizer that `save` wrote, with its own context length unless another is given.

    Raises:
        DataError: `directory` lacks its files or they are damaged.
    """
    try:
        document = json.loads((Path(directory) / SPEC_FILE).read_text("utf-8"))
        kind, pad_to_max = document["kind"], document["pad_to_max"]
        length = document["context_length"] if context_length is None else context_length
        if kind == "hugging_face":
            vocab_size = document["vocab_size"]
            return HuggingFaceTokenizer(
                path=directory, context_length=length, pad_to_max=pad_to_max, vocab_size=vocab_size
            )
        definition = (Path(directory) / "tokenizer.json").read_text("utf-8")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{directory} holds no tokenizer of ours",
            got=f"{type(error).__name__}: {error}",
            allowed=f"a directory with {SPEC_FILE} and tokenizer.json",
            remedy="for a tokenizer from elsewhere, use HuggingFaceTokenizer with its path",
        ) from error
    return BytePairTokenizer(definition=definition, context_length=length, pad_to_max=pad_to_max)


def _parsed(definition: str) -> tuple[tokenizers.Tokenizer, list[int]]:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # the library raises nothing narrower
        raise DataError("a tokenizer.json cannot be read", got=error, remedy="train the tokenizer again") from error
    ids = [tokenizer.token_to_id(token) for token in (PAD, BOS, EOS)]
    known = [number for number in ids if number is not None]
    if len(known) < NUM_SPECIAL:
        raise DataError("this tokenizer.json is not of our making", remedy="use HuggingFaceTokenizer with its path")
    return tokenizer, known


def _checked_length(context_length: int) -> int:
    if context_length < SMALLEST_CONTEXT:
        raise ConfigError("the context is too short", got=context_length, allowed=f"at least {SMALLEST_CONTEXT} tokens")
    return context_length


def _save_spec(kind: str, spec: TextSpec, directory: str) -> None:
    write_atomically(Path(directory) / SPEC_FILE, json.dumps({"kind": kind, **asdict(spec)}, indent=1))


def _padded(rows: Sequence[Sequence[int]], spec: TextSpec) -> tuple[Tensor, Tensor]:
    ids = np.full((len(rows), spec.context_length), spec.pad_id, dtype=np.int64)
    mask = np.zeros(ids.shape, dtype=bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = True
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _up_to_end(ids: Sequence[int], eos_id: int) -> list[int]:
    """The ids before the end token that closes them; a leading one (a tokenizer may begin with it) is no end."""
    ids = [int(number) for number in ids]
    start = next((place for place, number in enumerate(ids) if number != eos_id), len(ids))
    return ids[: ids.index(eos_id, start)] if eos_id in ids[start:] else ids
