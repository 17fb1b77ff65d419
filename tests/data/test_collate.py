import json

import numpy as np
import pytest
import torch
from data_fixtures import SPEC, ByteTokenizer, encoded, pixels, train_encoder
from torch.utils.data import DataLoader

from vlm_train.data import places
from vlm_train.data.collate import SampleEncoder
from vlm_train.data.decode import SampleError, open_image, sample_uid
from vlm_train.data.rendering import render
from vlm_train.data.transforms import EvalTransform, TrainTransform, keyed_generator
from vlm_train.imaging import recolour
from vlm_train.types import RawSample


def raw_of(seed=0, *, caption="a dog", **metadata):
    parts = {"jpg": encoded(pixels(seed)), "json": json.dumps(metadata).encode()}
    parts |= {} if caption is None else {"txt": caption.encode()}
    return RawSample(uid=sample_uid(parts), key=f"k{seed}", shard="a.tar", parts=parts)


def eval_encoder(**options):
    return SampleEncoder(transform=EvalTransform(spec=SPEC), tokenizer=ByteTokenizer(**options))


def batch_of(encoder, raws, *, evaluation=False, **key):
    draft = encoder.draft(len(raws))
    for row, raw in enumerate(raws):
        draft.put(row, raw, **key)
    return draft.batch(weights=[1.0] * len(raws), evaluation=evaluation)


def picture_of(raw, plan_of=EvalTransform(spec=SPEC)):  # noqa: B008
    """The square of a record, by decoder and transform alone."""
    image = open_image(raw.parts["jpg"])
    plan = plan_of.plan(image.width, image.height, keyed_generator(0, 0, raw.uid, "image"))
    return render(image.decode(), plan)


def test_shapes_and_types():
    raws = [raw_of(i, caption="x" * (4 + i), label=i) for i in range(3)]
    draft = eval_encoder().draft(4)
    for row in (2, 0, 1):  # in any order
        draft.put(row, raws[row])
    batch = draft.batch(weights=[1, 1, 1, 0])
    assert batch["images"].shape == (4, 3, 16, 16) and batch["images"].dtype == torch.uint8
    assert batch["images"].is_contiguous(memory_format=torch.channels_last)  # how decoders write and GPUs like to read
    for row in range(3):
        assert np.array_equal(batch["images"][row].permute(1, 2, 0).numpy(), picture_of(raws[row]))
    assert not np.array_equal(picture_of(raws[0]), picture_of(raws[1]))
    assert batch["text_ids"].dtype == torch.int64 and batch["text_mask"].dtype == torch.bool
    assert batch["weights"].tolist() == [1, 1, 1, 0] and batch["weights"].dtype == torch.float32
    assert batch["labels"].tolist() == [0, 1, 2, -1]
    assert batch["uids"].shape == (4, 2) and batch["uids"].dtype == torch.int64
    assert batch["uids"][2].numpy().tobytes() == raws[2].uid and not batch["uids"][3].any()
    assert batch["keys"] == ["k0", "k1", "k2", ""] and batch["captions"] == ["xxxx", "xxxxx", "xxxxxx", ""]
    assert not {"metadata", "all_captions", "finish"} & set(batch)


def test_blank_rows_are_zero_whatever_lay_in_memory(monkeypatch):
    """The room is not cleared beforehand, so here it is full of rubbish."""
    monkeypatch.setattr(places, "_room", lambda shape: torch.full(shape, 201, dtype=torch.uint8))
    draft = eval_encoder().draft(3)
    assert (draft._places._pixels == 201).all()
    draft.put(1, raw_of(1))
    batch = draft.batch(weights=[0, 1, 0], evaluation=True)
    assert not batch["images"][[0, 2]].any() and batch["images"][1].any()
    assert not batch["uids"][[0, 2]].any() and batch["labels"].tolist() == [-1] * 3
    assert batch["all_captions"] == [[], ["a dog"], []] and batch["metadata"] == [{}] * 3
    empty = ByteTokenizer()([""])[0][0, :8]
    assert torch.equal(batch["text_ids"][0], empty) and torch.equal(batch["text_ids"][2], empty)


@pytest.mark.parametrize(
    ("part", "content", "reason"),
    [
        ("jpg", None, "no_image"),
        ("jpg", b"", "image_unknown"),
        ("jpg", encoded(pixels(0, 200, 160))[:-900], "image_truncated"),
        ("txt", b"\xff", "caption_utf8"),
        ("txt", b" ", "no_caption"),
        ("json", b"{", "metadata_json"),
    ],
)
def test_a_bad_sample_says_why_and_leaves_the_row_as_it_was(part, content, reason):
    raw, good = raw_of(), raw_of(1)
    raw.parts.pop(part)
    raw.parts |= {} if content is None else {part: content}
    draft = train_encoder().draft(2)
    draft.put(1, good, seed=1, visit=2)
    for row in (0, 1):
        with pytest.raises(SampleError) as caught:
            draft.put(row, raw, seed=1, visit=2)
        assert caught.value.reason == reason
    batch = draft.batch(weights=[0, 1])
    alone = batch_of(train_encoder(), [good], seed=1, visit=2)
    assert torch.equal(batch["images"][1:], alone["images"]) and batch["keys"] == ["", "k1"]
    assert not batch["images"][0].any() and not batch["uids"][0].any()


@pytest.mark.parametrize(("length", "wanted"), [(1, 8), (6, 8), (7, 16), (36, 40), (50, 40)])
def test_text_is_as_long_as_the_longest_rounded_up_to_eight(length, wanted):
    batch = batch_of(eval_encoder(), [raw_of(caption="x" * length), raw_of(caption="x")])
    assert batch["text_ids"].shape == batch["text_mask"].shape == (2, wanted)
    full = ByteTokenizer()(["x" * length, "x"])[0]
    assert torch.equal(batch["text_ids"], full[:, :wanted]) and not full[:, wanted:].any()


def test_a_tower_that_reads_a_fixed_place_gets_full_length():
    assert batch_of(eval_encoder(pad_to_max=True), [raw_of()])["text_ids"].shape == (1, 40)


def test_training_draws_one_caption_and_evaluation_keeps_all():
    captions = ["one", "two", "three"]
    raw, encoder = raw_of(caption=None, captions=captions), train_encoder()

    def draw():
        return [batch_of(encoder, [raw], seed=3, visit=visit)["captions"][0] for visit in range(60)]

    drawn = draw()
    assert set(drawn) == set(captions) and drawn == draw()
    assert min(drawn.count(caption) for caption in captions) >= 10  # 20 expected, standard deviation 3.7
    batch = batch_of(eval_encoder(), [raw], evaluation=True)
    assert batch["captions"] == ["one"] and batch["all_captions"] == [captions]
    assert batch["metadata"] == [{"captions": captions}]


def test_a_text_file_beside_listed_captions_comes_first():
    raw = raw_of(caption="zero", captions=["one", "zero"])
    assert batch_of(eval_encoder(), [raw], evaluation=True)["all_captions"] == [["zero", "one"]]


@pytest.mark.parametrize("later", [False, True])
def test_pixels_depend_on_seed_visit_and_uid_alone(later):
    def shown(seed, visit, raw=raw_of()):  # noqa: B008
        encoder = train_encoder()
        encoder.colours_later = later
        return batch_of(encoder, [raw], seed=seed, visit=visit)["images"]

    image = shown(1, 2)
    assert torch.equal(image, shown(1, 2))
    assert not torch.equal(image, shown(1, 3)) and not torch.equal(image, shown(2, 2))
    other = raw_of()
    other.uid = bytes(16)
    assert not torch.equal(image, shown(1, 2, other))


def test_a_row_does_not_depend_on_its_batch_or_on_threads():
    raws, visits = [raw_of(i) for i in range(12)], range(100, 112)

    def rows(size):
        found = []
        for start in range(0, 12, size):
            draft = train_encoder().draft(size)
            for row in reversed(range(size)):
                draft.put(row, raws[start + row], seed=7, visit=visits[start + row])
            found.append(draft.batch(weights=[1.0] * size)["images"])
        return torch.cat(found)

    whole, before = rows(12), torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            assert all(torch.equal(whole, rows(size)) for size in (1, 3, 4, 12))
    finally:
        torch.set_num_threads(before)
    assert not torch.equal(whole, whole.flip(0))


def test_colours_left_to_the_trainer_are_the_same_colours():
    raws = [raw_of(i) for i in range(6)]
    now, later = train_encoder(), train_encoder()
    later.colours_later = True
    here, there = (batch_of(encoder, raws, seed=7, visit=3) for encoder in (now, later))
    assert "finish" not in here and there["finish"].shape == (6, 3) and there["finish"].dtype == torch.float32
    assert not torch.equal(here["images"], there["images"])
    assert torch.equal(here["images"], recolour(there["images"], there["finish"]))
    assert not torch.equal(here["images"], recolour(there["images"], there["finish"].flip(0)))
    blank = later.draft(2).batch(weights=[0, 0])
    assert not recolour(blank["images"], blank["finish"]).any()


def test_a_transform_without_colours_leaves_nothing_to_finish():
    transform = TrainTransform(spec=SPEC, flip=0.5)
    encoder = SampleEncoder(transform=transform, tokenizer=ByteTokenizer(), colours_later=True)
    assert "finish" not in batch_of(encoder, [raw_of()], visit=0)


class Batches(torch.utils.data.Dataset):
    """Two training batches, an item each, as `steps.Steps` makes them."""

    def __len__(self):
        return 2

    def __getitem__(self, step):
        return batch_of(train_encoder(), [raw_of(4 * step + i) for i in range(4)], seed=1, visit=step)


def test_a_worker_hands_over_memory_and_not_copies():
    here = [Batches()[step] for step in range(2)]
    assert not here[0]["images"].is_shared()  # in the trainer's own process there is nobody to share with
    for num_workers in (1, 2):
        loader = DataLoader(
            Batches(), batch_size=None, num_workers=num_workers, collate_fn=lambda item: item,
            multiprocessing_context="fork",
        )  # fmt: skip
        for batch, mine in zip(loader, here, strict=True):
            images = batch["images"]
            assert images.is_shared() and images.untyped_storage().nbytes() == images.numel()
            assert images.shape == (4, 3, 16, 16) and images.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(images, mine["images"]) and batch["captions"] == mine["captions"]


def test_labels_are_integers_or_absent():
    raws = [raw_of(label=label) for label in (7, True, "7", None, 1.0, 1 << 64)]
    assert batch_of(eval_encoder(), raws)["labels"].tolist() == [7, -1, -1, -1, -1, -1]


PLAIN = {"transform": EvalTransform(spec=SPEC), "tokenizer": ByteTokenizer()}


def test_hard_captions_are_drawn_from_the_samples_own_and_stand_beside_its_caption():
    negatives = ["a cat", "two dogs", "no dog at all, nowhere"]
    raws = [raw_of(0, negatives=negatives), raw_of(1, negatives=negatives[:1]), raw_of(2)]
    encoder = SampleEncoder(**PLAIN, hard_captions=2)
    batch = batch_of(encoder, raws, visit=5)
    assert batch["hard_text_ids"].shape == (3, 2, batch["text_ids"].shape[1]) == batch["hard_text_mask"].shape
    assert batch["hard_counts"].tolist() == [[True, True], [True, False], [False, False]]
    assert batch["text_mask"].shape == batch["text_ids"].shape and batch["text_mask"].any(1).all()
    again = batch_of(encoder, raws, visit=5)
    assert torch.equal(again["hard_text_ids"], batch["hard_text_ids"])
    drawn = {tuple(batch_of(encoder, raws, visit=visit)["hard_text_ids"][0].flatten().tolist()) for visit in range(40)}
    assert len(drawn) == 6  # every ordered pair of three comes up in 40 visits
    assert "hard_text_ids" not in batch_of(SampleEncoder(**PLAIN), raws)


def test_negatives_that_are_no_list_of_texts_are_an_error():
    for negatives in ("a cat", [1], {"a": "b"}):
        with pytest.raises(SampleError) as caught:
            batch_of(SampleEncoder(**PLAIN, hard_captions=1), [raw_of(negatives=negatives)])
        assert caught.value.reason == "metadata_captions"


def test_contents_tell_equal_images_and_equal_captions():
    raws = [raw_of(0, caption="a dog"), raw_of(0, caption="a cat"), raw_of(1, caption="a dog")]
    image, caption = batch_of(SampleEncoder(**PLAIN, contents=True), raws)["contents"].unbind(1)
    assert (image[0] == image[1]) and (image[0] != image[2])
    assert (caption[0] == caption[2]) and (caption[0] != caption[1])
    assert (torch.stack([image, caption]) >= 0).all()
    assert "contents" not in batch_of(SampleEncoder(**PLAIN), raws)


def test_a_draw_is_of_the_sample_at_its_place_in_the_stream_and_of_nothing_else():
    raws = [raw_of(i) for i in range(3)]
    draws = batch_of(train_encoder(), raws, seed=1, visit=2)["draws"]
    assert draws.dtype == torch.int64 and len(set(draws.tolist())) == 3 and (draws >= 0).all()
    assert torch.equal(batch_of(train_encoder(), raws[::-1], seed=1, visit=2)["draws"], draws.flip(0))
    for other in ({"seed": 2, "visit": 2}, {"seed": 1, "visit": 3}):
        assert not (batch_of(train_encoder(), raws, **other)["draws"] == draws).any()
