from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_train.cli.arguments import parse
from vlm_train.cli.options import (
    Kind,
    Option,
    arguments,
    count,
    local,
    new_place,
    out_file,
    out_folder,
    plain,
    sentence,
    share,
    whole,
)
from vlm_train.cli.tables import describe, table
from vlm_train.errors import ConfigError

KEYS = {"run": "RUN", "text": "TEXT", "top": "N"}


def test_keys_values_and_overrides_are_told_apart() -> None:
    found = parse(["run=a=b", "text=x", "text=y", "optim.lr=1"], KEYS, verb="v", repeatable=("text",), rest=True)
    assert found.required("run", example="run=R") == "a=b"
    assert found.all("text", example="text=T") == ["x", "y"] and found.overrides == ["optim.lr=1"]
    assert found.optional("top") is None and found.optional("top", count(), 8) == 8


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run=a", "run=b"], "given twice"),
        (["runs=a"], "run=..."),
        (["text="], "has no value"),
        (["help"], "does not know"),
    ],
)
def test_mistakes_are_named(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(words, KEYS, verb="v")


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5", "1_0", " 1", "\u0663", "9" * 5000, "1e3", "nan"])
def test_a_count_is_a_count(text: str) -> None:
    with pytest.raises(ConfigError, match="top= is no count"):
        parse([f"top={text}"], KEYS, verb="v").optional("top", count(), 8)


@settings(deadline=None)
@given(text=st.one_of(st.text(max_size=6), st.floats().map(str), st.integers().map(str)))
def test_a_number_is_in_its_range_or_refused_with_it(text: str) -> None:
    kinds = {
        whole(-5, 5): (lambda value: type(value) is int and -5 <= value <= 5, "-5 to 5"),
        share(zero=True, one=True): (lambda value: 0 <= value <= 1, "from 0 up to 1"),
        share(zero=False, one=True): (lambda value: 0 < value <= 1, "above 0 up to 1"),
        share(zero=True, one=False): (lambda value: 0 <= value < 1, "from 0 to below 1"),
    }
    for kind, (holds, allowed) in kinds.items():
        try:
            assert holds(kind("--x", text))
        except ConfigError as error:
            assert "--x" in error.what and allowed in str(error.allowed) and error.remedy


def test_the_ends_of_a_share_count_as_told() -> None:
    assert share(zero=True, one=True)("--x", "0") == 0 and share(zero=True, one=True)("--x", "1") == 1
    for kind, text in ((share(zero=False, one=True), "0"), (share(zero=True, one=False), "1")):
        with pytest.raises(ConfigError):
            kind("--x", text)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a", "--n"], "--n has no value"),
        (["a", "--n="], "--n has no value"),
        (["a", "--n", "--word", "x"], "--n has no value"),
        (["a", "--n", "1", "--n=2"], "--n is given twice"),
        (["a", "--m", "1"], "no such option"),
        (["a", "-n", "1"], "no such option"),
        ([], "wrong number of words"),
        (["a", "b"], "wrong number of words"),
        (["a", "--word", " "], "--word is empty"),
        (["a", "--said", "\udcff"], "--said is no UTF-8"),
        (["a", "--said", " "], "--said is empty"),
    ],
)
def test_words_that_make_no_sense_are_named(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        arguments(
            words, {"A": plain}, {"--n": Option(whole(0), 7), "--word": Option(plain), "--said": Option(sentence)}
        )
    assert None not in (caught.value.got, caught.value.allowed, caught.value.remedy)


def test_words_and_options_are_told_apart() -> None:
    known = {"--n": Option(whole(-9), 7), "--word": Option(plain)}
    assert arguments(["a", "--n", "-3"], {"A": plain}, known) == (["a"], {"--n": -3, "--word": None})
    assert arguments(["--word=--x", "a", "b"], {"A": plain}, known, many=True) == (
        ["a", "b"],
        {"--n": 7, "--word": "--x"},
    )


@pytest.mark.parametrize("text", ["https://h/x", "s3:/b/x", "a\0b", ""])
@pytest.mark.parametrize("kind", [local, out_file, out_folder, new_place])
def test_a_place_is_a_path_on_a_local_disk(kind: Kind, text: str) -> None:
    with pytest.raises(ConfigError, match="OUT"):
        kind("OUT", text)


def test_places_to_write_are_looked_at_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "full").mkdir(parents=True)
    (tmp_path / "link").symlink_to("nowhere")
    good = {out_file: ["new", "file", "folder/new"], out_folder: ["new", "folder", "a/b/c"], new_place: ["new", "a/b"]}
    bad = {
        out_file: ["folder", ".", "nowhere/x", "file/x", "n" * 300, "link"],
        out_folder: ["file", "file/x", "n" * 300, "link", "link/x"],
        new_place: ["file", "folder", "file/x", "n" * 300, "link"],
    }
    for kind, texts in good.items():
        assert [str(kind("--out", text)) for text in texts] == texts
    for kind, texts in bad.items():
        for text in texts:
            with pytest.raises(ConfigError, match=r"--out (cannot be written|is in use)"):
                kind("--out", text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]


def test_what_is_missing_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="needs text="):
        parse([], KEYS, verb="v").all("text", example='text="a red car"')


def test_columns_line_up() -> None:
    assert table(["name", "n"], [["a", "1"], ["longer", "200"]], indent="") == [
        "name      n",
        "a         1",
        "longer  200",
    ]


def test_a_result_is_printed_with_its_controls() -> None:
    result = {"step": 1200, "text_to_image": {"R@1": 12.345}, "chance_text_to_image": {"R@1": 0.24}, "num_pairs": 4000,
              "interval_95": {"text_to_image": {"R@1": [10.0, 15.0]}}}  # fmt: skip
    assert describe("retrieval", result) == [
        "  retrieval          score  chance    95% interval",
        "  text to image R@1  12.35    0.24  10.00 to 15.00",
        "  4,000 pairs, step 1,200",
    ]
