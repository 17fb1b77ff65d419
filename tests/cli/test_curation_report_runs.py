"""`vlm-train data report` as a user runs it: one file that asks for nothing, of bounded size, for whatever data."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from page_fixtures import encoded, looked_at, smooth, write

from vlm_train.cli import curation_page
from vlm_train.cli.curation_page import MAX_BYTES, Pictures
from vlm_train.cli.main import main
from vlm_train.data.stats import Example


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of which some are there twice: as they are, smaller, and with 16 bits of grey."""
    pictures = [smooth(number) for number in range(15)]
    grey = np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 20
    contents = [
        encoded(each) for each in [*pictures, *pictures[:6], *[smooth(n, 40, 30) for n in range(6)], grey, grey]
    ]
    return write(tmp_path_factory.mktemp("data") / "all", contents)


@pytest.fixture(scope="module")
def selection(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "o'ne <b>&"
    assert main(["data", "dedup", str(data), "--out", str(out), "--num-workers", "1"]) == 0
    return out


def test_the_page_stands_alone_and_says_what_was_done(
    data: Path, selection: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    assert main(["data", "report", str(selection), str(data), "--out", str(out)]) == 0
    told, document = capsys.readouterr().out, out.read_text()
    parser = looked_at(document)
    assert parser.found == [] and parser.images > 20
    assert looked_at('<p><img src="https://x.y/z.png" onerror="f()"></p><script></script>').found == [
        "img src", "img onerror", "script",
    ]  # fmt: skip
    for expected in ("copies: exact", "copies: near", "Largest clusters", "Kept against dropped", "radius",
                     "provenance.json", "&lt;script&gt;alert(1)", "o&#x27;ne &lt;b&gt;&amp;",
                     "vlm-train data report"):  # fmt: skip
        assert expected in document, expected
    assert "cannot be read" not in told and str(out) in told and len(document.encode()) <= MAX_BYTES
    again = tmp_path / "again"
    again.mkdir()
    os.chdir(again)
    assert main(["data", "report", str(selection), str(data)]) == 0
    assert (again / "report.html").read_text().replace("--out report.html", f"--out {out}") == document


def test_a_shard_that_changed_under_its_index_leaves_the_page_whole(
    data: Path, selection: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = min(data.glob("*.tar"))
    content, stat = shard.read_bytes(), shard.stat()
    try:
        shard.write_bytes(bytes(len(content)))
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert main(["data", "report", str(selection), str(data), "--out", str(tmp_path / "x.html")]) == 0
    finally:
        shard.write_bytes(content)
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    told, document = capsys.readouterr().out, (tmp_path / "x.html").read_text()
    assert "cannot be read; the page says which" in told and "shard_changed" in document
    parser = looked_at(document)
    assert parser.found == [] and parser.images > 5


def test_one_sample_and_nothing_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = write(tmp_path / "one", [encoded(smooth(0))])
    assert main(["data", "dedup", str(shards), "--out", str(tmp_path / "x"), "--num-workers", "1"]) == 0
    assert main(["data", "report", str(tmp_path / "x"), str(shards), "--out", str(tmp_path / "x.html")]) == 0
    document = (tmp_path / "x.html").read_text()
    assert "1 of 1 samples are kept" in capsys.readouterr().out
    assert looked_at(document).found == [] and "Dropped nothing: copies" in document


def test_everything_but_one_dropped_and_pictures_that_do_not_decode(tmp_path: Path) -> None:
    shards = write(tmp_path / "same", [encoded(smooth(0))[:-60]] * 12)
    assert main(["data", "dedup", str(shards), "--out", str(tmp_path / "x"), "--num-workers", "1"]) == 0
    assert main(["data", "report", str(tmp_path / "x"), str(shards), "--out", str(tmp_path / "x.html")]) == 0
    document = (tmp_path / "x.html").read_text()
    parser = looked_at(document)
    assert parser.images == 0 and parser.found == [] and "image_truncated" in document
    assert "11 went for one sample" in document


def test_a_page_stops_at_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (120, 120, 3), dtype=np.uint8)
    pictures = Pictures({0: Example("0.tar", "k", "c" * 5000, 120, 120, noise)})
    shown = [pictures.one(0, "kept", "kept") for _ in range(900)]
    assert sum(map(len, shown)) < MAX_BYTES - 500_000 and shown[0].count("<img") == 1
    assert "the page is full" in shown[-1] and "<img" not in shown[-1]
    monkeypatch.setattr(curation_page, "MAX_PICTURES", 10**9)
    free = Pictures(pictures.examples)
    assert sum(len(free.one(0, "kept", "kept")) for _ in range(900)) > MAX_BYTES  # the twin: nothing stops it


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{selected}", "{data}"], "tells of no steps"),
        (["{nowhere}", "{data}"], "cannot be read"),
        (["{selection}"], "wrong number of words"),
        (["{selection}", "{data}", "--calibration", "{nowhere}"], "calibration"),
        (["{selection}", "{data}", "--out", "{shard}"], "overwrite a shard"),
        (["{selection}", "{shard}"], "made for other data"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    data: Path, selection: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    selected = tmp_path / "selected"
    assert main(["data", "select", str(data), "--where", "width > 50", "--out", str(selected)]) == 0
    places = {"selected": selected, "nowhere": tmp_path / "nowhere", "data": data, "selection": selection,
              "shard": min(data.glob("*.tar"))}  # fmt: skip
    content = places["shard"].read_bytes()
    given = [word.format_map(places) for word in words]
    given += [] if "--out" in given else ["--out", str(tmp_path / "x.html")]
    assert main(["data", "report", *given]) == 2
    told = capsys.readouterr().err
    assert said in told and "remedy" in told
    assert not (tmp_path / "x.html").exists() and places["shard"].read_bytes() == content
