import json

import numpy as np
import pytest
import torch
from data_fixtures import SPEC, ByteTokenizer, encoded, pixels, train_encoder

from vlm_train.data.collate import SampleEncoder
from vlm_train.data.decode import SampleError, sample_uid
from vlm_train.data.transforms import EvalTransform
from vlm_train.types import RawSample


def raw_of(seed=0, *, caption="a dog", **metadata):
    parts = {"jpg": encoded(pixels(seed)), "json": json.dumps(metadata).encode()}
    parts |= {} if caption is None else {"txt": caption.encode()}
    return RawSample(uid=sample_uid(parts), key=f"k{seed}", shard="a.tar", parts=parts)


def eval_encoder(**options):
    return SampleEncoder(transform=EvalTransform(spec=SPEC), tokenizer=ByteTokenizer(**options))


def test_shapes_and_types():
    encoder = eval_encoder()
    samples = [encoder.encode(raw_of(i, caption="x" * (4 + i), label=i)) for i in range(3)]
    batch = encoder.collate([*samples, encoder.blank()], weights=[1, 1, 1, 0])
    assert batch["images"].shape == (4, 3, 16, 16) and batch["images"].dtype == torch.uint8
    assert batch["images"].is_contiguous()
    assert np.array_equal(batch["images"][1].permute(1, 2, 0).numpy(), samples[1].image)
    assert batch["text_ids"].dtype == torch.int64 and batch["text_mask"].dtype == torch.bool
    assert batch["weights"].tolist() == [1, 1, 1, 0] and batch["labels"].tolist() == [0, 1, 2, -1]
    assert batch["uids"].shape == (4, 2) and batch["uids"].dtype == torch.int64
    assert batch["uids"][2].numpy().tobytes() == samples[2].uid and not batch["uids"][3].any()
    assert batch["keys"] == ["k0", "k1", "k2", ""] and batch["captions"][0] == "xxxx"
    assert "metadata" not in batch and "all_captions" not in batch


@pytest.mark.parametrize(("length", "wanted"), [(1, 8), (6, 8), (7, 16), (36, 40), (50, 40)])
def test_text_is_as_long_as_the_longest_rounded_up_to_eight(length, wanted):
    encoder = eval_encoder()
    batch = encoder.collate([encoder.encode(raw_of(caption="x" * length))], weights=[1])
    assert batch["text_ids"].shape == batch["text_mask"].shape == (1, wanted)
    full = ByteTokenizer()(["x" * length])[0]
    assert torch.equal(batch["text_ids"], full[:, :wanted]) and not full[:, wanted:].any()


def test_a_tower_that_reads_a_fixed_place_gets_full_length():
    encoder = eval_encoder(pad_to_max=True)
    assert encoder.collate([encoder.encode(raw_of())], weights=[1])["text_ids"].shape == (1, 40)


def test_training_draws_one_caption_and_evaluation_keeps_all():
    captions = ["one", "two", "three"]
    raw, encoder = raw_of(caption=None, captions=captions), train_encoder()
    drawn = [encoder.encode(raw, seed=3, epoch=epoch).caption for epoch in range(60)]
    assert set(drawn) == set(captions)
    assert drawn == [encoder.encode(raw, seed=3, epoch=epoch).caption for epoch in range(60)]
    assert min(drawn.count(caption) for caption in captions) >= 10  # 20 expected, standard deviation 3.7
    sample = eval_encoder().encode(raw)
    batch = eval_encoder().collate([sample], weights=[1], evaluation=True)
    assert batch["captions"] == ["one"] and batch["all_captions"] == [captions]
    assert batch["metadata"] == [{"captions": captions}]


def test_a_text_file_beside_listed_captions_comes_first():
    encoder = eval_encoder()
    sample = encoder.encode(raw_of(caption="zero", captions=["one", "zero"]))
    assert encoder.collate([sample], weights=[1], evaluation=True)["all_captions"] == [["zero", "one"]]


def test_pixels_depend_on_seed_epoch_and_uid_alone():
    encoder, raw = train_encoder(), raw_of()
    image = encoder.encode(raw, seed=1, epoch=2).image
    assert np.array_equal(image, train_encoder().encode(raw, seed=1, epoch=2).image)
    assert not np.array_equal(image, encoder.encode(raw, seed=1, epoch=3).image)
    assert not np.array_equal(image, encoder.encode(raw, seed=2, epoch=2).image)


def test_labels_are_integers_or_absent():
    encoder = eval_encoder()
    samples = [encoder.encode(raw_of(label=label)) for label in (7, True, "7", None, 1.0)]
    assert encoder.collate(samples, weights=[1] * 5)["labels"].tolist() == [7, -1, -1, -1, -1]


def test_a_sample_without_an_image_says_so():
    raw = raw_of()
    del raw.parts["jpg"]
    with pytest.raises(SampleError) as caught:
        eval_encoder().encode(raw)
    assert caught.value.reason == "no_image"
