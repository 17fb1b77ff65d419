"""Shards with the captions of a table: these change and nothing else, samples without one are left out and counted, and
a run does not go on with another table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import mixture_loader, write_dataset
from recaption_toys import Parrot, caption

from vlm_train.data import building
from vlm_train.data.decode import SampleError, decode_captions, decode_metadata
from vlm_train.data.recaption_table import CaptionTable
from vlm_train.data.selection import Selection
from vlm_train.data.sources.recaptioned import RecaptionedSource
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.steps import Ingredient, StreamSpec
from vlm_train.errors import CheckpointError, DataError

EMPTIED, UNKNOWN = (1, 30), (4,)
SPEC = StreamSpec(seed=5, global_batch=11, num_steps=6, shuffle_window=2, epoch_end="wrap")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("recaptioned"))


@pytest.fixture(scope="module")
def source(shards: Path) -> ShardSource:
    return ShardSource(shards=str(shards))


def write(path: Path, source: ShardSource, word: str = "new") -> Path:
    """A table as anybody may write it: of most samples, and of others of which nobody has heard."""
    rows = [row for row in range(len(source)) if row not in UNKNOWN]
    uids = [source.manifest.uids()[row].tobytes() for row in rows]
    captions = [[] if row in EMPTIED else [f"{word} {row}", f"{word} {row} again"] for row in rows]
    uids, captions = [*reversed(uids), bytes(16)], [*reversed(captions), ["of nobody"]]
    pq.write_table(pa.table({"uid": uids, "captions": captions, "more": captions}), path)
    return path


def with_table(source: ShardSource, table: Path, selection: Selection | None = None) -> Ingredient:
    found = RecaptionedSource(source, table)
    narrowed = found.narrowed(selection or Selection.all(len(source)))
    return Ingredient(source=found, selection=narrowed, captions=found.captions_fingerprint)


def everything(sample) -> dict:
    told = decode_metadata(sample.parts)
    rest = {name: value for name, value in told.items() if name not in ("caption", "captions")}
    images = {name: part for name, part in sample.parts.items() if name not in ("txt", "json")}
    return {"uid": sample.uid, "key": sample.key, "shard": sample.shard, "metadata": rest, "images": images}


def test_the_join_changes_exactly_the_captions(source: ShardSource, tmp_path: Path) -> None:
    found = RecaptionedSource(source, write(tmp_path / "table.parquet", source))
    rows = np.array([33, 0, 12, 7, 7])
    for row, old, new in zip(rows.tolist(), source.read(rows), found.read(rows), strict=True):
        assert everything(old) == everything(new)
        assert decode_captions(old.parts, decode_metadata(old.parts)) == [f"picture {row}"]
        assert decode_captions(new.parts, decode_metadata(new.parts)) == [f"new {row}", f"new {row} again"]
    without = found.read(np.array([*EMPTIED, *UNKNOWN]))
    assert [each.reason for each in without if isinstance(each, SampleError)] == ["no_caption"] * 3
    assert found.fingerprint == source.fingerprint and len(found) == len(source)
    assert found.tally().startswith("33 of 36 samples have captions in ")
    assert "2 were left with none that was good enough and 1 are not in it" in found.tally()


def test_training_draws_the_new_captions_and_never_meets_a_sample_without(source: ShardSource, tmp_path: Path) -> None:
    table, without = write(tmp_path / "table.parquet", source), {*EMPTIED, *UNKNOWN}
    mask = np.isin(np.arange(36), sorted(without), invert=True)
    old = list(mixture_loader([Ingredient(source=source, selection=Selection.from_mask(mask))]))
    new = list(mixture_loader([with_table(source, table)]))
    for before, after in zip(old, new, strict=True):
        assert before["keys"] == after["keys"] and not after["errors"]
        for name in ("images", "uids", "labels", "weights"):
            assert before[name].equal(after[name])  # the crops are keyed by the uid, which stays
        numbers = [caption.removeprefix("picture ") for caption in before["captions"]]
        texts = [[f"new {number}", f"new {number} again"] for number in numbers]
        assert all(caption in some for caption, some in zip(after["captions"], texts, strict=True))
    drawn = [caption for batch in new for caption in batch["captions"]]
    assert 10 < sum(caption.endswith("again") for caption in drawn) < len(drawn) - 10
    plain = [
        key
        for batch in mixture_loader([Ingredient(source=source, selection=Selection.all(36))])
        for key in batch["keys"]
    ]
    assert set(plain) > {key for batch in new for key in batch["keys"]}  # the twin: without a table they come


def test_a_selection_is_narrowed_whatever_its_kind(source: ShardSource, tmp_path: Path) -> None:
    table, chosen = write(tmp_path / "table.parquet", source), [0, 1, 4, 9]
    weights = np.zeros(36)
    weights[chosen] = [2.0, 3.0, 1.0, 0.5]
    narrowed = with_table(source, table, Selection.from_weights(weights, manifest=source.fingerprint)).selection
    assert narrowed.kept(0, 36).tolist() == [0, 9] and len(narrowed) == 2 and narrowed.manifest == source.fingerprint
    mask = np.isin(np.arange(36), chosen)
    assert with_table(source, table, Selection.from_mask(mask)).selection.kept(0, 36).tolist() == [0, 9]
    nothing = Selection.from_mask(np.isin(np.arange(36), [1, 4]))
    with pytest.raises(DataError, match="leaves nothing to train on") as told:
        with_table(source, table, nothing)
    assert "--min-score" in str(told.value.remedy)


def test_a_run_does_not_go_on_with_another_table(source: ShardSource, tmp_path: Path) -> None:
    first = mixture_loader([with_table(source, write(tmp_path / "a.parquet", source))])
    state = first.state_dict()
    mixture_loader([with_table(source, write(tmp_path / "same.parquet", source))]).load_state_dict(state)
    other = with_table(source, write(tmp_path / "b.parquet", source, "other"))
    plain = Ingredient(source=source, selection=with_table(source, tmp_path / "a.parquet").selection)
    for changed in (other, plain):
        with pytest.raises(CheckpointError, match="`captions` differs"):
            mixture_loader([changed]).load_state_dict(state)
    assert len(json.dumps(state)) < 1024
    older = {name: value for name, value in mixture_loader([plain]).state_dict().items() if name != "captions"}
    mixture_loader([plain]).load_state_dict(older)  # of before there were tables


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"uid": [b"x" * 16], "captions": [["a"]]}, "was made for other samples"),
        ({"uid": [b"x" * 16] * 2, "captions": [["a"], ["b"]]}, "two rows of one uid"),
        ({"uid": [b"x" * 16], "texts": [["a"]]}, "cannot be read"),
        ({"uid": [None], "captions": [["a"]]}, "a row without a uid"),
        ({"uid": [b"short"], "captions": [["a"]]}, "cannot be read"),
        ({"uid": [b"x" * 16], "captions": ["a"]}, "cannot be read"),
    ],
)
def test_what_is_no_table_of_these_samples_is_refused(
    source: ShardSource, tmp_path: Path, columns: dict, said: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "table.parquet")
    with pytest.raises(DataError, match=said) as told:
        RecaptionedSource(source, tmp_path / "table.parquet")
    assert told.value.got is not None and told.value.allowed and "vlm-train data recaption" in str(told.value.remedy)


def test_a_folder_that_is_missing_or_damaged_is_refused(shards: Path, source: ShardSource, tmp_path: Path) -> None:
    table = caption(shards, tmp_path / "table", captioner=Parrot()).directory
    assert RecaptionedSource(source, table).has_captions.all()
    part = table / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-1] + b"\0")
    for where in (table, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="cannot be read"):
            RecaptionedSource(source, where)


def test_the_fingerprint_is_of_the_content(shards: Path, tmp_path: Path) -> None:
    one, same, other = (
        CaptionTable.load(caption(shards, tmp_path / name, captioner=Parrot(), seed=seed).directory)
        for name, seed in (("one", 0), ("same", 0), ("other", 1))
    )
    assert one.fingerprint == same.fingerprint != other.fingerprint
    uids = np.random.default_rng(0).integers(0, 256, (50, 16), dtype=np.uint8)
    uids[::2, 8:] = 0  # zeros at the end count too
    table = CaptionTable(uids.view("S16").reshape(-1), pa.array([[str(row)] for row in range(50)]), "")
    assert table.places(uids[::-1]).tolist() == list(range(49, -1, -1))
    assert table.captions(7) == ["7"] and (table.places(uids ^ 1) == -1).all()


def data_of(shards: object, **more: object) -> dict:
    return {"train": {"shards": shards}, "streaming": False, "cache_gb": 1.0, "retry_seconds": 1.0, **more}


def test_the_config_names_a_table_for_the_only_source_or_for_each(
    shards: Path, source: ShardSource, tmp_path: Path, lines_of
) -> None:
    table, lines = write(tmp_path / "table.parquet", source), lines_of(building.log)
    building.check_train(data_of(str(shards), captions=str(table)), SPEC)
    assert len(lines) == 1 and lines[0].startswith("33 of 36 samples have captions in")
    mixture = {"a": {"shards": str(shards), "captions": str(table)}, "b": {"shards": str(shards)}}
    building.check_train(data_of(mixture), SPEC)
    assert len(lines) == 2
    single = building.train_captions(data_of(str(shards), captions=str(table)))
    assert sorted(single) == sorted(f"new {row}{end}" for row in range(36) for end in ("", " again")
                                    if row not in (*EMPTIED, *UNKNOWN))  # fmt: skip
    assert single.skipped == {"no_caption": 3}
    assert len(list(building.train_captions(data_of(mixture)))) == 66 + 36
    building.check_train(data_of(str(shards)), SPEC)
    assert len(lines) == 2
