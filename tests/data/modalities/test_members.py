"""Members of modalities reach a batch from tars read, streamed and converted, and the uid; .beton refuses them."""

import json

import numpy as np
import pytest
from data_fixtures import ByteTokenizer, members_of, write_tar

from vlm_train.data.collate import SampleEncoder
from vlm_train.data.convert import convert
from vlm_train.data.decode import image_parts, sample_uid
from vlm_train.data.scenes.make import Variant, make_sample
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.tape import read_shard
from vlm_train.data.transforms import EvalTransform
from vlm_train.data.verify import verify
from vlm_train.types import MODALITIES, ImageSpec, ModalitySpec

SPECS = tuple(
    ModalitySpec(name=name, shape=shape)
    for name, shape in (("depth", (1, 32, 32)), ("audio", (16, 50)), ("motion", (2, 100)))
)


def scene(number=0, modalities=("depth", "audio", "motion")):
    return make_sample(number, seed=3, size=32, variant=Variant(modalities=modalities))[1]


def test_the_uid_covers_what_is_there_and_is_the_old_one_where_nothing_is():
    parts = scene()
    bare = {name: content for name, content in parts.items() if name in ("png", "txt", "json")}
    assert bare == scene(modalities=())  # and so the bytes of datasets of before
    assert image_parts(parts) == ["png"]
    uids = {sample_uid({**bare, name: parts[name]}) for name in ("depth.png", "wav", "motion.npy")}
    assert len(uids | {sample_uid(bare), sample_uid(parts)}) == 5
    for name in ("depth.png", "wav", "motion.npy"):
        changed = {**parts, name: parts[name][:-1] + bytes([parts[name][-1] ^ 1])}
        assert sample_uid(changed) != sample_uid(parts)
    assert sample_uid({**parts, "ogg": b"never read beside a wav"}) == sample_uid(parts)
    assert sample_uid({**bare, "pose.npy": b"never read"}) == sample_uid(bare)


@pytest.fixture
def tars(tmp_path):
    """Three scenes with everything, and one photograph without."""
    members = [(f"{n:04d}.{name}", content) for n in range(3) for name, content in scene(n).items()]
    write_tar(tmp_path / "tars" / "a.tar", [*members, *members_of("photo", 1)])
    return tmp_path / "tars"


def batch_of(samples):
    encoder = SampleEncoder(
        transform=EvalTransform(spec=ImageSpec(size=32)), tokenizer=ByteTokenizer(), modalities=SPECS
    )
    draft = encoder.draft(len(samples))
    for row, sample in enumerate(samples):
        draft.put(row, sample)
    return draft.batch(weights=[1.0] * len(samples))


def test_read_streamed_and_converted_samples_give_the_same_batch(tmp_path, tars):
    source = ShardSource(shards=str(tars))
    convert(str(tars), tmp_path / "again")
    again = ShardSource(shards=str(tmp_path / "again"))
    ways = [source.read(np.arange(4)), list(read_shard(str(tars / "a.tar"), [])), again.read(np.arange(4))]
    first, *others = map(batch_of, ways)
    for other in others:
        for name in (*(spec.name for spec in SPECS), "there", "images", "uids"):
            assert np.array_equal(first[name], other[name])
    there = {name: first["there"][:, MODALITIES.index(name)].tolist() for name in MODALITIES}
    assert there == {"regions": [False] * 4, **{spec.name: [True] * 3 + [False] for spec in SPECS}}
    assert first["audio"][:3].std() > 1 and not first["audio"][3].any() and not first["motion"][3].any()


def test_beton_refuses_by_name_and_damage_is_found(tmp_path, tars):
    done = convert(str(tars), tmp_path / "a.beton")
    assert (done.num_written, done.num_errors) == (1, 3)
    rows = [json.loads(line) for line in done.errors.read_text().splitlines()]
    assert {(row["reason"], row["detail"]) for row in rows} == {("part_not_text", "['depth.png', 'wav', 'motion.npy']")}
    members = [(f"{n}.{name}", content) for n in range(4) for name, content in scene(n).items()]
    for place, (number, name) in enumerate(((1, "depth.png"), (2, "wav"), (3, "motion.npy"))):
        row = next(i for i, (member, _) in enumerate(members) if member == f"{number}.{name}")
        members[row] = (members[row][0], b"damage" + bytes([place]))
    write_tar(tmp_path / "bad" / "a.tar", members)
    found = verify(str(tmp_path / "bad"), mode="full")
    assert [(each.key, each.reason) for each in found.problems] == [
        ("1", "depth_corrupt"), ("2", "audio_corrupt"), ("3", "motion_corrupt"),
    ]  # fmt: skip
