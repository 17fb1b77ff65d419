"""The report counts what the chain did, in any order of shards, and does not believe a folder that is not whole."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from vlm_train.curation import report_measures
from vlm_train.curation.chain import Found, Work, run_chain
from vlm_train.curation.columns import Columns, add_columns
from vlm_train.curation.engines import Local
from vlm_train.curation.report import NUM_CLUSTERS, NUM_MEMBERS, NUM_STRIP, Report, examine, examples, histograms
from vlm_train.curation.report_fate import read_fate
from vlm_train.data.indexing import open_manifest
from vlm_train.data.selection import Selection
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.writer import DatasetWriter
from vlm_train.errors import ConfigError, DataError

NUM, PER_SHARD = 90, 30
WIDTHS = np.random.default_rng(0).integers(8, 40, NUM)


@dataclass(frozen=True, kw_only=True)
class Drop:
    """A step that drops the samples with these keys: key -> (rule, key of the one for which it goes or None, value)."""

    dropped: dict[int, tuple[str, int | None, float]]
    limits: dict[str, Any]
    facts: dict[str, Any]

    def settings(self, work: Work) -> dict[str, Any]:
        return {**self.limits, "dropped": sorted(self.dropped)}

    def find(self, manifest, among, work: Work) -> Found:
        keys = [int(key) for key in manifest.table(["key"])["key"].to_pylist()]
        row_of = {key: row for row, key in enumerate(keys)}
        told = [(row_of[key], *rest) for key, rest in self.dropped.items() if among[row_of[key]]]
        likes = [-1 if like is None else row_of[like] for _, _, like, _ in told]
        rules = np.array([rule for _, rule, _, _ in told], np.str_)
        values = np.array([value for *_, value in told], np.float64)
        rows = np.array([row for row, *_ in told], np.int64)
        return Found(rows, rules, np.array(likes, np.int64), values, self.facts)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of many widths in three shards."""
    folder = tmp_path_factory.mktemp("report")
    with DatasetWriter(folder / "all", parameters={}, max_samples=PER_SHARD) as writer:
        for number, width in enumerate(WIDTHS.tolist()):
            pixels = np.random.default_rng(number).integers(0, 256, (16, width, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            writer.add("train", f"{number:03d}", {"png": file.getvalue(), "txt": f"sample {number}".encode()})
        writer.finish(num_errors=0, facts={})
    return folder / "all" / "train"


def steps() -> dict[str, Drop]:
    """Copies of a few, of which one goes itself by the second step, and all that is narrow."""
    copies = {key: ("near" if key % 2 else "exact", key % 4, key / 10) for key in range(4, 60)}
    narrow = {key: ("min_width", None, float(WIDTHS[key])) for key in range(60, NUM) if WIDTHS[key] < 20}
    return {
        "copies": Drop(dropped=copies, limits={"near": 5}, facts={}),
        "rules": Drop(dropped={3: ("odd", None, np.nan), **narrow}, limits={"min_width": 20},
                      facts={"scores": {"low": -1, "high": 1, "counts": [0, 2, 5, 0]}}),
    }  # fmt: skip


def work_in(folder: Path) -> Work:
    return Work(
        engine=Local(num_workers=1), num_threads=1, models=None, ticking=lambda noun: lambda done, num: None,
        folder=folder,
    )  # fmt: skip


def made(shards: Any, folder: Path, chain: dict[str, Any], among: Selection | None = None) -> Report:
    run_chain(open_manifest(shards), chain, work=work_in(folder), among=among)
    return examine(folder, ShardSource(shards=shards))


def test_it_counts_what_the_chain_did(data: Path, tmp_path: Path) -> None:
    report = made(str(data), tmp_path / "x", steps())
    fate, chain = report.fate, steps()
    expected = Counter(("copies", rule) for rule, _, _ in chain["copies"].dropped.values())
    expected.update(("rules", rule) for rule, _, _ in chain["rules"].dropped.values())
    assert {(rule.step, rule.name): rule.num_dropped for rule in fate.rules} == expected
    assert {rule.name: rule.limit for rule in fate.rules} == {"near": 5, "exact": None, "min_width": 20, "odd": None}
    assert fate.num_begun() == NUM and fate.is_kept.sum() == NUM - sum(expected.values())
    assert report.chains == {("copies", "rules"): sum(like == 3 for _, like, _ in chain["copies"].dropped.values())}
    assert [(cluster.size, len(cluster.members)) for cluster in report.clusters] == [(14, NUM_MEMBERS)] * 4
    assert sorted(cluster.row for cluster in report.clusters) == [0, 1, 2, 3]
    assert [cluster.rule is not None for cluster in sorted(report.clusters, key=lambda each: each.row)] == [
        False, False, False, True,
    ]  # fmt: skip
    for cluster in report.clusters:
        assert [each.like for each in cluster.members] == [cluster.row] * NUM_MEMBERS
        assert [each.value for each in cluster.members] == sorted(each.value for each in cluster.members)
    assert [(name, size) for name, size, _ in report.shards] == [
        ("00001.tar", 30),
        ("00000.tar", 30),
        ("00002.tar", 30),
    ]
    assert sum(dropped for *_, dropped in report.shards) == sum(expected.values())
    (scores,) = report.facts
    assert (scores.edges, scores.counts) == ([-0.5, 0.0, 0.5], [2, 5])


def test_a_strip_shows_both_ends_and_borders_the_kept_ones_next_to_them(data: Path, tmp_path: Path) -> None:
    report = made(str(data), tmp_path / "x", steps())
    for seen in report.seen:
        rows = report.fate.dropped_by(report.fate.rules.index(seen.rule))
        values = report.fate.value[rows]
        assert {each.row for each in seen.strip} <= set(rows.tolist())
        assert len({each.row for each in seen.strip}) == len(seen.strip) == min(NUM_STRIP, len(rows))
        if seen.values is not None:
            assert (seen.strip[0].value, seen.strip[-1].value) == (values.min(), values.max())
            assert sum(seen.values.counts) == len(rows)
    (narrow,) = [seen for seen in report.seen if seen.rule.name == "min_width"]
    assert narrow.borders is not None and narrow.borders.measure == "width"
    kept = [(row, float(WIDTHS[row])) for row in np.flatnonzero(report.fate.is_kept)]
    highest = max(each.value for each in narrow.strip)
    above = sorted(value for _, value in kept if value > highest)
    assert [value for _, value in narrow.borders.above] == above[: len(narrow.borders.above)] and above
    assert set(narrow.borders.above) <= set(kept)
    assert [seen.borders for seen in report.seen if seen.rule.name in ("near", "odd")] == [None, None]


def test_kept_and_dropped_are_compared_by_every_number_and_flag(data: Path, tmp_path: Path) -> None:
    kinds = {"is_even": pa.bool_(), "third": pa.string(), "text": pa.string(), "score": pa.float64()}
    flagged = Columns(tuple(pa.field(name, kind) for name, kind in kinds.items()), "1", flags_of)
    manifest = open_manifest(str(data))
    add_columns(manifest, flagged, engine=Local(num_workers=1))
    report = made(str(data), tmp_path / "x", steps())
    gone = report.fate.rule >= 0
    by_name = {each.name: each for each in report.measures.comparisons}
    assert {"longer side", "width x height", "score"} <= set(by_name)
    for name, values in {"width x height": WIDTHS * 16, "score": np.arange(NUM) / 7}.items():
        each = by_name[name]
        assert each.kept.tolist() == np.histogram(values[~gone], each.edges)[0].tolist()
        assert each.dropped.tolist() == np.histogram(values[gone], each.edges)[0].tolist()
        assert each.kept.sum() + each.dropped.sum() == NUM
        assert each.kept.tolist() != np.histogram(values[gone], each.edges)[0].tolist()  # the twin
    flags, rows = report.measures.flags, np.arange(NUM)
    has = np.stack([rows % 2 == 0, rows % 3 == 0])
    assert [flag.name for flag in flags.flags] == ["is_even", "third: <yes>"]
    assert flags.together.tolist() == [[45, 15], [15, 30]]
    assert flags.dropped.tolist() == (has & gone).sum(axis=1).tolist()


def flags_of(parts: Any) -> dict[str, Any]:
    number = int(parts["txt"].split()[1])
    third = "<yes>" if number % 3 == 0 else None if number % 3 == 1 else ""
    return {"is_even": number % 2 == 0, "third": third, "text": f"{number}" * 90, "score": number / 7}


def test_the_order_of_shards_changes_nothing_that_is_shown(data: Path, tmp_path: Path) -> None:
    forward, backward = sorted(map(str, data.glob("*.tar"))), sorted(map(str, data.glob("*.tar")), reverse=True)
    shown = [by_uid(made(shards, tmp_path / str(number), steps()), shards)
             for number, shards in enumerate((forward, backward))]  # fmt: skip
    assert shown[0] == shown[1]
    other = steps()
    other["copies"] = replace(other["copies"], dropped={**other["copies"].dropped, 4: ("exact", 0, 9.0)})
    assert by_uid(made(forward, tmp_path / "other", other), forward) != shown[0]  # the twin: it is not blind


def by_uid(report: Report, shards: list[str]) -> Any:
    uids = open_manifest(shards).uids()
    name = {row: uids[row].tobytes() for row in range(len(uids))}
    clusters = [(name[each.row], each.size, [name[shown.row] for shown in each.members]) for each in report.clusters]
    strips = [
        (seen.rule, [name[shown.row] for shown in seen.strip],
         seen.borders and [[name[row] for row, _ in side] for side in (seen.borders.below, seen.borders.above)])
        for seen in report.seen
    ]  # fmt: skip
    return clusters, strips, report.chains


def test_a_selection_to_begin_with_is_neither_kept_nor_dropped_where_it_has_not(data: Path, tmp_path: Path) -> None:
    among = Selection.from_mask(np.arange(NUM) < 60, manifest=open_manifest(str(data)).fingerprint)
    report = made(str(data), tmp_path / "x", steps(), among)
    assert report.fate.num_begun() == 60 and report.fate.is_kept[60:].sum() == 0
    assert (report.fate.rule[60:] == -1).all()
    for each in report.measures.comparisons:
        assert each.kept.sum() + each.dropped.sum() == 60


@pytest.mark.parametrize("dropped", [{}, dict.fromkeys(range(NUM), ("all", None, np.nan))])
def test_nothing_dropped_and_nothing_kept(data: Path, tmp_path: Path, dropped: dict) -> None:
    report = made(str(data), tmp_path / "x", {"s": Drop(dropped=dropped, limits={}, facts={})})
    assert report.fate.is_kept.sum() == NUM - len(dropped) and report.clusters == [] and report.chains == {}
    assert len(report.seen) == bool(dropped)
    assert all(each.dropped.sum() == len(dropped) for each in report.measures.comparisons)


def test_many_clusters_are_cut_to_the_largest(data: Path, tmp_path: Path) -> None:
    copies = {key: ("near", key // 3 if key < 60 else 0, 1.0) for key in range(30, NUM)}
    report = made(str(data), tmp_path / "x", {"s": Drop(dropped=copies, limits={}, facts={})})
    sizes = sorted(Counter(like for _, like, _ in copies.values()).values(), reverse=True)
    assert [each.size for each in report.clusters] == sizes[:NUM_CLUSTERS] and len(sizes) == NUM_CLUSTERS + 1


def test_a_folder_that_is_not_whole_is_not_believed(data: Path, tmp_path: Path) -> None:
    manifest = open_manifest(str(data))
    made(str(data), tmp_path / "x", steps())
    path, facts = tmp_path / "x" / "steps" / "copies.parquet", tmp_path / "x" / "provenance.json"
    whole, told = path.read_bytes(), json.loads(facts.read_text())
    made(str(data), tmp_path / "y", {"copies": Drop(dropped={5: ("near", 1, 0.0)}, limits={}, facts={})})
    other = (tmp_path / "y" / "steps" / "copies.parquet").read_bytes()
    for content in (None, b"", whole[: len(whole) // 2], other):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match="finished chain"):
            read_fate(tmp_path / "x", manifest)
    path.write_bytes(whole)
    for steps_told in (3, [{}], [{**told["steps"][0], "settings": None}], "x"):
        facts.write_text(json.dumps({**told, "steps": steps_told}))
        with pytest.raises(DataError, match="finished chain"):
            read_fate(tmp_path / "x", manifest)
    facts.write_text(json.dumps(told))
    assert read_fate(tmp_path / "x", manifest).num_begun() == NUM


def test_a_selection_without_steps_says_what_would_have_some(data: Path, tmp_path: Path) -> None:
    manifest = open_manifest(str(data))
    Selection.from_mask(np.arange(NUM) < 5, manifest=manifest.fingerprint, provenance={"where": "x"}).save(tmp_path)
    with pytest.raises(ConfigError, match="tells of no steps") as raised:
        read_fate(tmp_path, manifest)
    assert "dedup" in str(raised.value)


def test_samples_that_cannot_be_read_are_shown_as_such(data: Path) -> None:
    source = ShardSource(shards=str(data))
    shard = Path(source.manifest.shards[0])
    whole = shard.read_bytes()
    try:
        shard.write_bytes(bytes(len(whole)))
        found = list(examples(source, [0, NUM - 1]))
    finally:
        shard.write_bytes(whole)
    assert found[0].pixels is None and found[0].reason == "shard_changed"
    assert found[1].pixels is not None and found[1].caption == f"sample {NUM - 1}"


def test_histograms_are_found_in_facts_and_nothing_else_is_taken_for_one() -> None:
    facts = {
        "a": {"edges": [0, 1, 2], "counts": [3, 4]},
        "b": {"deep": {"low": 0, "high": 1, "counts": [0] * 100 + [1] * 100}},
        "c": {"edges": [0, 1], "counts": [3, 4]},
        "d": {"counts": {"x": 3}},
        "e": [1, 2],
        "f": {"counts": [1, 2]},
        "g": {"low": 0, "high": 1, "counts": [0, 0]},
    }
    found = {each.name: each for each in histograms("s", facts)}
    assert set(found) == {"s: a", "s: b: deep", "s: g"}
    assert (found["s: b: deep"].edges[0], found["s: b: deep"].edges[-1]) == (0.5, 1.0)
    assert len(found["s: b: deep"].counts) == 50 and sum(found["s: b: deep"].counts) == 100


def test_a_column_that_some_parts_lack_is_missing_there() -> None:
    table = pa.table({"width": pa.array([4, 0], pa.int32()), "height": pa.array([2, 0], pa.int32())})
    values = report_measures.measured(table, ["width", "height", "score"])
    assert np.isnan(values["score"]).all() and values["longer / shorter side"][0] == 2
    assert np.isnan(values["shorter side"][1])
