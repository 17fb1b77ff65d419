"""CLIP's vocabulary from its own file gives the ids of open_clip and of transformers, whatever a caption holds."""

from __future__ import annotations

import functools
import gzip
import json
import pickle
import shutil
from importlib.util import find_spec
from pathlib import Path

import open_clip.tokenizer
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer, CLIPTokenizer

from vlm_train.assets import resolve_asset
from vlm_train.data.tokenizer import BytePairTokenizer, HuggingFaceTokenizer, load_tokenizer
from vlm_train.data.vocabularies import CLEANING, clip_vocabulary
from vlm_train.errors import ConfigError, DataError

LENGTH = 77
CLIP = "package:open-clip-torch"
FUZZ = [
    "",
    " \n\t ",
    "a photo of a cat",
    "It's  they'RE   3.14\u00a01,000 #hash_tag",
    "👋🏽 👨‍👩‍👧‍👦 🇫🇷",
    "日本語 한국어 العربية हिन्दी עברית",
    "Straße ǅ naïve café",
    "x" * 400,
    "word " * 200,
    "a\u200bb",
]


# left out: what only Python calls spaces, and code points without a character, where each library's Unicode decides
CHARACTERS = st.characters(exclude_characters="\x1c\x1d\x1e\x1f", exclude_categories=("Cs", "Cn"))


@pytest.fixture(scope="module")
def ours() -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(path=CLIP, context_length=LENGTH)


@pytest.fixture(scope="module")
def of_open_clip() -> open_clip.tokenizer.SimpleTokenizer:
    return open_clip.tokenizer.SimpleTokenizer()


@pytest.fixture(scope="module")
def of_transformers() -> CLIPTokenizer:
    """Its class with vocabulary and merges in the order of open_clip's code."""
    with gzip.open(resolve_asset(CLIP), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1:48895]
    letters = list(open_clip.tokenizer.bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(line.replace(" ", "") for line in lines)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)}, merges=[tuple(line.split()) for line in lines]
    )


def real(ids: Tensor, mask: Tensor) -> Tensor:
    """ids with open_clip's padding."""
    return ids.where(mask, 0)


def is_left_alone(text: str) -> bool:
    """Whether open_clip's mending of mojibake, entities and odd characters, which a tokenizer cannot do, changes it."""
    return open_clip.tokenizer.basic_clean(text) == text.strip()


@settings(deadline=None, max_examples=300)
@given(text=st.text(CHARACTERS, max_size=120))
def test_ids_are_those_of_open_clip_and_transformers(
    ours: HuggingFaceTokenizer,
    of_open_clip: open_clip.tokenizer.SimpleTokenizer,
    of_transformers: CLIPTokenizer,
    text: str,
) -> None:
    ids, mask = ours([text])
    theirs = of_transformers(text, truncation=True, max_length=LENGTH)["input_ids"]
    assert ids[mask].tolist() == theirs
    if is_left_alone(text):
        assert torch.equal(real(ids, mask), of_open_clip([text]))


for text in FUZZ:
    test_ids_are_those_of_open_clip_and_transformers = example(text=text)(
        test_ids_are_those_of_open_clip_and_transformers
    )


def test_the_vocabulary_and_its_ends(ours: HuggingFaceTokenizer) -> None:
    spec = ours.spec
    assert (spec.vocab_size, spec.bos_id, spec.eos_id) == (49408, 49406, 49407)
    ids, mask = ours(["a cat", "word " * 200])
    assert ids[0, :4].tolist() == [49406, 320, 2368, 49407] and mask.sum(dim=1).tolist() == [4, LENGTH]
    assert ids[1, -1] == 49407 and ours.decode(ids[0].tolist()) == "a cat"


def test_it_is_saved_and_travels_to_workers(ours: HuggingFaceTokenizer, tmp_path: Path) -> None:
    ours.save(str(tmp_path))
    ids, _ = ours(FUZZ)
    for again in (load_tokenizer(str(tmp_path)), pickle.loads(pickle.dumps(ours))):
        assert again.spec == ours.spec and torch.equal(again(FUZZ)[0], ids)
    in_transformers = AutoTokenizer.from_pretrained(tmp_path)
    found = in_transformers(FUZZ, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    assert torch.equal(found["input_ids"], ids)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer that by itself neither joins spaces nor lowers letters."""
    folder = str(tmp_path_factory.mktemp("plain"))
    tokenizer = BytePairTokenizer.train(["a red square, two dogs"], vocab_size=270)
    tokenizer._tokenizer.normalizer = None  # type: ignore[assignment]
    tokenizer.save(folder)
    return folder


@functools.cache
def opened(path: str, clean: str | None) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(path=path, context_length=80, clean=clean)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=100)
@given(text=st.text(alphabet=st.characters(min_codepoint=9, max_codepoint=126), max_size=60))
@example(text="  A_b--C!  [d]\\e\n{f} ")
@pytest.mark.parametrize("clean", sorted(CLEANING))
def test_cleaning_is_that_of_open_clip(plain: str, clean: str, text: str) -> None:
    alone, tokenizer = opened(plain, None), opened(plain, clean)
    if is_left_alone(text):
        expected = open_clip.tokenizer.get_clean_fn(clean)(text)
        assert torch.equal(tokenizer([text])[0], alone([expected])[0])


def test_cleaning_is_saved_with_the_tokenizer(plain: str, tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(path=plain, context_length=20, clean="canonicalize")
    tokenizer.save(str(tmp_path))
    assert torch.equal(load_tokenizer(str(tmp_path))(["Two_dogs!"])[0], tokenizer(["two dogs"])[0])
    assert not torch.equal(
        HuggingFaceTokenizer(path=plain, context_length=20)(["Two_dogs!"])[0], tokenizer(["two dogs"])[0]
    )


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_a_tokenizer_of_a_class_for_sentencepiece_can_do_without(plain: str, tmp_path: Path) -> None:
    """As folders of SigLIP keep it: tokenizer.json beside the model of sentencepiece."""
    shutil.copytree(plain, tmp_path / "siglip")
    path = tmp_path / "siglip" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "SiglipTokenizer"}))
    found = HuggingFaceTokenizer(path=str(tmp_path / "siglip"), context_length=20)
    assert torch.equal(found(["two dogs"])[0], HuggingFaceTokenizer(path=plain, context_length=20)(["two dogs"])[0])


def test_a_model_may_have_more_rows_than_tokens_but_not_fewer(plain: str, tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(path=plain, context_length=20, vocab_size=512)
    tokenizer.save(str(tmp_path))
    assert load_tokenizer(str(tmp_path)).spec.vocab_size == 512
    with pytest.raises(ConfigError, match="more tokens than the model has rows"):
        HuggingFaceTokenizer(path=plain, context_length=20, vocab_size=200)


def test_what_is_no_list_of_merges_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.txt.gz"
    path.write_bytes(b"not gzip")
    with pytest.raises(DataError, match="no list of merges"):
        clip_vocabulary(path)
    with gzip.open(path, "wt") as file:
        file.write("#version\none two three\n")
    with pytest.raises(DataError, match="no list of merges"):
        HuggingFaceTokenizer(path=str(path), context_length=20)
