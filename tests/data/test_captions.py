"""Caption reading: every caption in order, bad ones counted, pictures not touched."""

from __future__ import annotations

import json
from pathlib import Path

from data_fixtures import encoded, pixels

from vlm_train.data.captions import CaptionStream, every_sample
from vlm_train.data.decode import SampleError
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.writer import ShardWriter
from vlm_train.types import RawSample


def source_of(directory: Path, samples: list[dict[str, bytes]], max_samples: int = 3) -> ShardSource:
    writer = ShardWriter(directory, max_samples=max_samples)
    for index, parts in enumerate(samples):
        writer.write(f"{index:04d}", {"jpg": encoded(pixels(index)), **parts})
    writer.close()
    return ShardSource(shards=str(directory))


def captions_of(source: ShardSource, max_samples: int = 100, **options: bool) -> CaptionStream:
    return CaptionStream(lambda: every_sample(source, max_samples), **options)


def test_captions_of_text_and_json_in_order(tmp_path):
    samples = [
        {"txt": b"one"},
        {"txt": b"two", "json": json.dumps({"captions": ["two", "zwei"]}).encode()},
        {"json": json.dumps({"caption": "three"}).encode()},
        {"txt": "vier \U0001f642".encode()},
    ]
    stream = captions_of(source_of(tmp_path, samples, max_samples=2))
    assert list(stream) == ["one", "two", "zwei", "three", "vier \U0001f642"]
    assert stream.num_captions == 5
    assert not stream.skipped
    assert list(stream) == ["one", "two", "zwei", "three", "vier \U0001f642"]  # it can be read again


def test_bad_samples_are_skipped_and_counted():
    samples = [
        {"txt": b"good"},
        {"txt": b"na\xefve"},
        {"txt": b"fine", "json": b"{broken"},
        {"json": b'{"captions": ["half \\ud800 a pair"]}'},
        {"json": b"{}"},
        SampleError("unreadable", got="gone"),
        {"txt": b"also good"},
    ]
    raw = [sample if isinstance(sample, SampleError) else RawSample(b"", "k", "s", sample) for sample in samples]
    stream = CaptionStream(lambda: raw)
    assert list(stream) == ["good", "also good"]
    assert stream.skipped == {"caption_utf8": 2, "metadata_json": 1, "no_caption": 1, "unreadable": 1}


def test_of_many_samples_evenly_spaced_ones_are_read(tmp_path):
    source = source_of(tmp_path, [{"txt": f"caption {n}".encode()} for n in range(10)])
    assert list(captions_of(source, 4)) == [f"caption {n}" for n in (0, 2, 5, 7)]
    assert list(captions_of(source, 10)) == [f"caption {n}" for n in range(10)]


def test_a_shard_that_is_gone_costs_its_captions_and_is_counted(tmp_path):
    source = source_of(tmp_path, [{"txt": f"caption {n}".encode()} for n in range(5)])
    (tmp_path / "00001.tar").unlink()
    stream = captions_of(source)
    assert list(stream) == ["caption 0", "caption 1", "caption 2"]
    assert stream.skipped == {"shard_unreadable": 2}


def test_what_is_said_in_dialogues_comes_behind_the_captions_if_asked_for(tmp_path):
    ours = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>\nWhat is it?"},
            {"role": "assistant", "content": "A <image> star."}]  # fmt: skip
    llava = [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]
    samples = [
        {"txt": b"one", "json": json.dumps({"conversations": ours}).encode()},
        {"txt": b"two"},
        {"json": json.dumps({"captions": ["three", "drei"], "conversations": llava}).encode()},
    ]
    source = source_of(tmp_path, samples)
    assert list(captions_of(source)) == ["one", "two", "three", "drei"]
    stream = captions_of(source, with_dialogues=True)
    # no marker of an image is a word
    said = ["one", "system Be brief.", "user  \nWhat is it?", "assistant A   star.", "two", "three", "drei"]
    assert list(stream) == [*said, "user Sure?", "assistant Yes."]
    assert stream.num_captions == 9 and not stream.skipped


def test_a_sample_whose_dialogue_cannot_be_read_is_skipped_only_where_dialogues_are_read():
    asked = {"role": "user", "content": "What?"}
    bad = [{"conversations": turns} for turns in ([], [asked, asked], [{"role": "user", "content": 5}], "text")]
    samples = [RawSample(b"", "k", "s", {"txt": b"good", "json": json.dumps(row).encode()}) for row in bad]
    assert list(CaptionStream(lambda: samples)) == ["good"] * 4
    stream = CaptionStream(lambda: samples, with_dialogues=True)
    assert list(stream) == []
    assert stream.skipped == {"dialogue_roles": 3, "dialogue_text": 1}
