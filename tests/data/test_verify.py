"""Whatever is wrong with shards is found, by name, by the mode that promises to find it."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import members_of, write_dataset, write_tar
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta

from vlm_train.data import verify as verify_module
from vlm_train.data.formats.base import ENTRY
from vlm_train.data.selection import Selection
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.verify import highest_rate, verify
from vlm_train.errors import DataError


def found(verdict):
    return [(problem.shard, problem.key, problem.reason) for problem in verdict.problems]


def test_whole_shards_have_no_problem(tmp_path):
    write_dataset(tmp_path, (4, 3))
    for mode in ("fast", "full", "sample"):
        verdict = verify(str(tmp_path), mode=mode, share=1.0, num_workers=1)
        assert not verdict.problems and verdict.num_samples == 7
        assert verdict.num_checked == (0 if mode == "fast" else 7)


def test_full_finds_each_picture_that_does_not_decode(tmp_path):
    write_dataset(tmp_path, (4, 3), bad=(1, 5))
    assert found(verify(str(tmp_path))) == []  # fast reads no sample
    seen = []
    verdict = verify(str(tmp_path), mode="full", num_workers=2, progress=lambda *done: seen.append(done))
    assert found(verdict) == [("00000.tar", "000001", "image_truncated"), ("00001.tar", "010005", "image_truncated")]
    assert verdict.by_reason() == {"image_truncated": 2} and seen[-1] == (7, 7)


def test_what_indexing_left_out_is_listed_in_every_mode(tmp_path):
    write_tar(tmp_path / "a.tar", [*members_of("a", 0), *members_of("b", 1, caption=b"\xff"), *members_of("a", 2)])
    for mode in ("fast", "full"):
        verdict = verify(str(tmp_path), mode=mode, num_workers=1)
        assert sorted(found(verdict)) == [("a.tar", "a", "duplicate_key"), ("a.tar", "b", "caption_utf8")]
        assert verdict.num_left_out == 2


def test_a_changed_manifest_is_found_by_fast(tmp_path):
    write_dataset(tmp_path, (4, 3))
    manifest = ShardSource(shards=str(tmp_path)).manifest
    part = manifest.parts[1]
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    index = tmp_path / "_manifest" / "index.bin"
    records = bytearray(index.read_bytes())
    records[32 * 2 + 3] ^= 1  # a bit of the uid of row 2
    index.write_bytes(records)
    assert found(verify(str(tmp_path))) == [("00000.tar", "", "index_changed"), ("00001.tar", "", "part_changed")]
    full = verify(str(tmp_path), mode="full", num_workers=1)
    assert ("00000.tar", "000002", "shard_changed") in found(full)


@pytest.mark.parametrize("name", ["uid", "offset", "length", "number"])
def test_a_flipped_bit_of_the_index_is_found_by_fast_wherever_it_is(tmp_path, name):
    write_dataset(tmp_path, (4, 3))
    verify(str(tmp_path))
    index = np.memmap(tmp_path / "_manifest" / "index.bin", ENTRY, mode="r+")
    raw = index[name].copy()
    raw.view(np.uint8).reshape(7, -1)[5, -1] ^= 0x80
    index[name] = raw
    index.flush()
    (problem,) = verify(str(tmp_path)).problems
    assert (problem.shard, problem.key, problem.reason) == ("00001.tar", "", "index_changed")
    assert "index.bin" in problem.detail and "remove it" in problem.detail
    full = found(verify(str(tmp_path), mode="full", num_workers=1))
    assert ("00001.tar", "", "index_changed") in full and len(full) == 1 + (name != "number")
    (tmp_path / "_manifest" / "index.bin").unlink()
    assert found(verify(str(tmp_path), mode="full", num_workers=1)) == []


def test_captions_that_changed_behind_the_manifests_back_are_found_by_full(tmp_path):
    path = write_tar(tmp_path / "a.tar", [m for seed in range(3) for m in members_of(f"k{seed}", seed)])
    verify(str(tmp_path))
    facts = path.stat()
    path.write_bytes(path.read_bytes().replace(b'"caption": "picture 1"', b'"caption": "picture 7"'))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert found(verify(str(tmp_path), mode="full", num_workers=1)) == [("a.tar", "k1", "shard_changed")]


def test_a_shard_that_is_replaced_while_it_is_verified_is_a_problem(tmp_path, monkeypatch):
    write_dataset(tmp_path, (4, 3))
    whole = verify_module._chunks

    def chunks(*args):
        yield from whole(*args)
        write_tar(tmp_path / "00000.tar", members_of("new", 50))

    monkeypatch.setattr(verify_module, "_chunks", chunks)
    assert set(found(verify(str(tmp_path), mode="full", num_workers=1))) == {("00000.tar", "", "shard_changed")}


def test_a_share_is_drawn_by_hash_and_bounds_the_rate(tmp_path):
    write_dataset(tmp_path, (60,), bad=range(0, 60, 10))
    first, again = (verify(str(tmp_path), mode="sample", share=0.5, num_workers=1) for _ in range(2))
    other = verify(str(tmp_path), mode="sample", share=0.5, seed=1, num_workers=1)
    assert 15 < first.num_checked < 45
    assert (first.num_checked, found(first)) == (again.num_checked, found(again))
    assert (first.num_checked, found(first)) != (other.num_checked, found(other))
    assert first.highest_rate > 0.1  # the rate there is


@given(num=st.integers(1, 3000), share=st.floats(0, 1))
def test_the_bound_is_the_exact_one(num, share):
    bad = int(num * share)
    wanted = 1.0 if bad == num else beta.ppf(0.95, bad + 1, num - bad)
    assert highest_rate(bad, num) == pytest.approx(wanted, rel=1e-6)


def test_columns_of_other_tools_are_no_problem_and_a_damaged_one_is(tmp_path):
    write_dataset(tmp_path, (4,))
    part = ShardSource(shards=str(tmp_path)).manifest.parts[0]
    table = pq.read_table(part)
    pq.write_table(table.append_column("score", pa.array([0.1, 0.2, 0.3, 0.4])), part)
    assert found(verify(str(tmp_path))) == []
    pq.write_table(table.slice(0, 3).append_column("score", pa.array([0.1, 0.2, 0.3])), part)
    assert found(verify(str(tmp_path))) == [("00000.tar", "", "part_changed")]


def test_a_damaged_selection_is_refused(tmp_path):
    write_dataset(tmp_path / "data", (4,))
    manifest = ShardSource(shards=str(tmp_path / "data")).fingerprint
    weights = Selection.from_weights(np.array([0.5, 1, 2, 0]), manifest=manifest)
    weights.save(tmp_path / "weights")
    assert verify(str(tmp_path / "data"), selection=tmp_path / "weights").problems == []
    units = np.load(tmp_path / "weights" / "weights.npy")
    units[[0, 1]] = units[[1, 0]]  # the sums that a load compares stay what they were
    np.save(tmp_path / "weights" / "weights.npy", units)
    Selection.load(tmp_path / "weights", manifest)
    with pytest.raises(DataError, match="damaged"):
        verify(str(tmp_path / "data"), selection=tmp_path / "weights")
