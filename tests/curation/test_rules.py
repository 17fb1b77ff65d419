"""Rules on a sample alone: each against a plain reading of it, limits and their order, forms, languages, what stays."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Any

import _pairs
import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.curation import rules as module
from vlm_train.curation import texts
from vlm_train.curation.rules import DATACOMP_BASIC, CaptionRules, ImageRules
from vlm_train.data.indexing import open_manifest
from vlm_train.data.writer import DatasetWriter
from vlm_train.errors import ConfigError, DataError

SPOKEN = ["a", "cat", "Cat", "on", "the", "mat", "!!!!", "12", "猫", "naïve", "www.x.org", "ok", "IMG_0042.jpg"]
CAPTIONS = st.lists(st.lists(st.sampled_from(SPOKEN), min_size=1, max_size=6).map(" ".join), min_size=1, max_size=12)
FORMS: list[tuple[str, str]] = [
    ("IMG_1234.jpg", "file_name"), ("my nice dog.PNG", "file_name"), ("DSC01234 (2)", "file_name"),
    ("P1010042", "file_name"), ("photo 12", "file_name"), ("a dog in photo 12", ""), ("image of a dog.", ""),
    ("2019-05-03", "date"), ("2019-05-03 10:11:12", "date"), ("May 3, 2019", "date"), ("3rd of May 2019", ""),
    ("3 may 2019", "date"), ("12/31/99", "date"), ("marching 2019", ""), ("https://a.org/b?c=d", "url"),
    ("see https://a.org", ""), ("www.a.org", "url"), ("12 345", "number"), ("#1", "number"), ("...", ""), ("P5", ""),
    ("b2b", ""), ("一月", ""),
]  # fmt: skip


def in_words(rules: CaptionRules, caption: str) -> tuple[str, float] | None:
    """What the docstring of the rules says, a rule after the other."""
    words = caption.split()
    letters = [letter for letter in caption if not letter.isspace()]
    share = sum(unicodedata.category(letter)[0] in "LM" for letter in letters) / len(letters)
    distinct = len({word.casefold() for word in words})
    longest = max(len(found[0]) for word in words for found in re.finditer(r"(.)\1*", word))
    measures: list[tuple[str, float]] = [
        ("chars", len(caption)), ("words", len(words)), ("letters", share), ("repeats", 1 - distinct / len(words)),
        ("run", longest),
    ]  # fmt: skip
    for name, measure in measures:
        low, high = getattr(rules, f"min_{name}", None), getattr(rules, f"max_{name}", None)
        if low is not None and measure < low:
            return f"min_{name}", measure
        if high is not None and measure > high:
            return f"max_{name}", measure
    for form in rules.forms:
        if texts.form_of(caption) == form:
            return form, -1.0
    for number, pattern in enumerate(rules.patterns):
        if re.search(pattern, caption):
            return "patterns", number
    return None


@st.composite
def caption_rules(draw: st.DrawFn) -> CaptionRules:
    whole = {name: draw(st.none() | st.integers(low, high)) for name, low, high in [
        ("min_chars", 1, 9), ("max_chars", 9, 30), ("min_words", 1, 2), ("max_words", 3, 5), ("max_run", 1, 4)
    ]}  # fmt: skip
    shares = {name: draw(st.none() | st.sampled_from([0.0, 0.25, 0.5, 1.0])) for name in ("min_letters", "max_repeats")}
    lists: dict[str, Any] = {
        "forms": draw(st.lists(st.sampled_from(texts.FORMS), unique=True, max_size=2)),
        "patterns": draw(st.lists(st.sampled_from([r"\bcat\b", "(?i)CAT", r"^a ", "t$"]), max_size=2)),
    }
    given = {**whole, **shares, **lists}
    if all(value is None or value == [] for value in given.values()):
        given["min_words"] = 2
    return CaptionRules(**given)


@settings(max_examples=25, deadline=None)
@given(captions=CAPTIONS, rules=caption_rules(), seed=st.integers(0, 99), size=st.integers(1, 6))
def test_captions_go_by_the_first_rule_they_break(
    captions: list[str], rules: CaptionRules, seed: int, size: int
) -> None:
    order = np.random.default_rng(seed).permutation(len(captions)).tolist()
    found = _pairs.run(rules, captions, order=order, max_samples=size)
    expected = {number: told for number, caption in enumerate(captions) if (told := in_words(rules, caption))}
    assert {number: rule for number, (rule, _, _) in found.items()} == {n: rule for n, (rule, _) in expected.items()}
    for number, (rule, value) in expected.items():
        assert found[number][2] == pytest.approx(value) if rule not in texts.FORMS else np.isnan(found[number][2])


def test_a_limit_is_kept_and_only_what_is_among_is_looked_at() -> None:
    captions = ["one", "one two", "one two three"]
    assert set(_pairs.run(CaptionRules(min_words=2), captions)) == {0}
    assert set(_pairs.run(CaptionRules(max_words=2), captions)) == {2}
    assert set(_pairs.run(CaptionRules(min_words=3), captions, among=[1, 2])) == {1}


@pytest.mark.parametrize(("caption", "form"), FORMS)
def test_forms(caption: str, form: str) -> None:
    assert texts.form_of(caption) == form
    assert texts.form_of(f" {caption}\n".upper()) == form


def test_a_long_caption_does_not_stall() -> None:
    for caption in ("1" * 60_000 + "a", "a " * 30_000, "x." * 30_000, "img 1" + "-" * 60_000 + "!"):
        assert texts.form_of(caption) == ""


def test_only_the_first_caption_counts(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "data", parameters={}) as writer:
        for key, first, others in [("0", b"two words", b'["one"]'), ("1", b"one", b'["two words"]')]:
            writer.add("train", key, {"png": _pairs.PICTURE, "txt": first, "json": b'{"captions": %s}' % others})
        writer.finish(num_errors=0, facts={})
    manifest = open_manifest(str(tmp_path / "data" / "train"))
    found = CaptionRules(min_words=2).find(manifest, np.ones(2, bool), _pairs.work(tmp_path))
    assert found.rows.tolist() == [1]
    assert manifest.table(["caption"])["caption"].to_pylist() == ["two words", "one"]


def test_languages() -> None:
    captions = [
        "a black dog runs over the green grass",
        "ein schwarzer Hund läuft über das grüne Gras",
        "黑狗跑过绿草地",
    ]
    assert set(_pairs.run(CaptionRules(languages=["en"]), captions)) == {1, 2}
    found = _pairs.run(CaptionRules(languages=["de", "zh"]), captions)
    assert {number: rule for number, (rule, _, _) in found.items()} == {0: "languages"} and 0 < found[0][2] <= 1


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise texts.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(texts.importlib.metadata, "version", missing)
    with pytest.raises(ConfigError, match="vlm-train\\[curation\\]"):
        CaptionRules(languages=["en"]).settings(_pairs.work(Path()))
    assert CaptionRules(min_words=2).settings(_pairs.work(Path()))["min_words"] == 2


def test_pictures(tmp_path: Path) -> None:
    sides = [(10, 10), (40, 10), (10, 41), (200, 200), (9, 9)]
    with DatasetWriter(tmp_path / "data", parameters={}) as writer:
        for number, (width, height) in enumerate(sides):
            writer.add("train", str(number), {"png": _pairs.png(width, height), "txt": b"x"})
        talk = b'{"conversations": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}'
        writer.add("train", "5", {"json": talk})
        writer.finish(num_errors=0, facts={})
    manifest, work = open_manifest(str(tmp_path / "data" / "train")), _pairs.work(tmp_path)

    def dropped(**limits: float) -> dict[int, tuple[str, int, float]]:
        return _pairs.told(manifest, ImageRules(**limits).find(manifest, np.ones(6, bool), work))  # type: ignore[arg-type]

    assert dropped(min_side=10) == {4: ("min_side", -1, 9)}
    assert dropped(max_side=41) == {3: ("max_side", -1, 200)}
    assert dropped(max_aspect=4) == {2: ("max_aspect", -1, 4.1)}
    assert dropped(min_pixels=100, max_pixels=410) == {4: ("min_pixels", -1, 81), 3: ("max_pixels", -1, 40_000)}
    assert dropped(min_side=10, min_pixels=101) == {4: ("min_side", -1, 9), 0: ("min_pixels", -1, 100)}
    facts = ImageRules(min_side=1).find(manifest, np.ones(6, bool), work).facts
    assert facts == {"num_without_picture": 1}


def test_the_preset_is_datacomps() -> None:
    """Its words: more than two words, more than five characters; of a side 200, of an aspect 3."""
    limits = {**DATACOMP_BASIC["captions"], "languages": ()}
    captions = ["ab cd", "a b c", "ab c d", "a b cd"]
    assert set(_pairs.run(CaptionRules(**limits), captions)) == {0, 1}
    assert DATACOMP_BASIC["images"] == {"min_side": 200, "max_aspect": 3.0}


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (CaptionRules(), "without a limit"),
        (ImageRules(), "without a limit"),
        (CaptionRules(min_words=3, max_words=2), "nothing could stay"),
        (ImageRules(min_side=0), "min_side"),
        (ImageRules(max_aspect=0.5), "max_aspect"),
        (CaptionRules(min_letters=2), "min_letters"),
        (CaptionRules(min_words="3"), "min_words"),  # type: ignore[arg-type]
        (CaptionRules(min_words=True), "min_words"),
        (CaptionRules(forms=["urls"]), "url"),
        (CaptionRules(languages=["eng"]), "en"),
        (CaptionRules(patterns=["("]), "regular expression"),
    ],
)
def test_what_cannot_be_meant_is_refused(rules: CaptionRules | ImageRules, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        rules.settings(_pairs.work(Path()))


@pytest.mark.parametrize(
    ("text", "words"),
    [("a red  box", ["a", "red", "box"]), ("红色的盒子", list("红色的盒子")), ("猫cat 猫", ["猫", "cat", "猫"]),
     ("ネコ on a mat", ["ネ", "コ", "on", "a", "mat"]), ("빨간 상자", ["빨간", "상자"])],
)  # fmt: skip
def test_words_of_scripts_without_white_space(text: str, words: list[str]) -> None:
    assert texts.words_in(text) == words


def test_a_pattern_that_tries_ever_more_ways_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_SECONDS", 0.2)
    assert module._first_found([regex.compile(r"(a+)+$")], "a" * 10) == 0
    with pytest.raises(DataError, match=r"\(a\+\)\+"):
        module._first_found([regex.compile(r"(a|aa)+$")], "a" * 60 + "b")
