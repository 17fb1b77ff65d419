"""Our `.beton` files against the real ffcv: each reads what the other writes, and its loader follows our order."""

import json
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import simplejpeg
import torch
from data_fixtures import SPEC, ByteTokenizer, encoded, pixels
from test_beton import come_back, parts_of, read, write

from vlm_train.data import decode
from vlm_train.data.collate import SampleEncoder
from vlm_train.data.selection import Selection
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.steps import Ingredient, StreamSpec, TrainSteps
from vlm_train.data.storage import LocalFile
from vlm_train.data.transforms import EvalTransform, TrainTransform
from vlm_train.errors import DataError

pytest.importorskip("ffcv", reason="ffcv is not installed: scripts/environment.sh, install_ffcv")

from ffcv.fields import JSONField
from ffcv.fields.decoders import SimpleRGBImageDecoder
from ffcv.loader import Loader
from ffcv.pipeline.operation import Operation

from vlm_train.data.ffcv_loader import FfcvLoader, StreamOrder

TOLERANCE = 16  # grey levels: FFCV takes libjpeg-turbo's quick transform, we the exact one; 14 in 300 random JPEGs
TWO_BUILDS = 1  # grey levels between two builds of libjpeg-turbo that both take the quick one; 0 in the same 300
NUM, G, NUM_STEPS = 23, 7, 9  # 7 divides neither 23 nor by 2 or 3; nine steps cross two epochs


@pytest.fixture(autouse=True)
def _nothing_hangs():
    """FFCV waits for ever for a worker that has failed."""

    def fail(number, frame):
        raise TimeoutError("two minutes")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def raw(seed):
    return {"ppm": b"P6\n24 20\n255\n" + pixels(seed).tobytes()}


def sample(seed, *, image=None):
    parts = parts_of(seed)
    parts["json"] = json.dumps({"captions": [f"{seed} again", "ещё"], "label": seed % 3}).encode()
    if image is not None:
        del parts["jpg"]
    return f"k{seed}", {**(image or {}), **parts}


def near(image, parts):
    """Whether pixels of FFCV are those of our reader: exactly where they are stored, else as near as its decoder is."""
    data = decode.first_image(parts)
    if "ppm" in parts:
        return np.array_equal(image, decode.open_image(data).decode())
    quick = simplejpeg.decode_jpeg(data, fastdct=True)
    exact = decode.open_image(data).decode()
    return far(image, quick) <= TWO_BUILDS and far(image, exact) <= TOLERANCE


def far(one, other):
    return int(np.abs(np.asarray(one).astype(int) - other).max())


# Ours to theirs.


@pytest.mark.parametrize("os_cache", [True, False])
def test_ffcv_reads_our_files(tmp_path, os_cache):
    samples = [sample(seed, image=raw(seed) if seed % 2 else None) for seed in range(NUM)]
    file = write(tmp_path / "a.beton", samples, page_size=1 << 21)
    loader = Loader(file.location, batch_size=5, num_workers=1, os_cache=os_cache, drop_last=False)
    found = []
    for images, texts, labels in loader:
        found += zip(images.numpy().copy(), JSONField.unpack(texts), labels.flatten().tolist(), strict=True)
    assert len(found) == NUM
    for (key, parts), (image, text, label) in zip(samples, found, strict=True):
        assert (text["key"], text["txt"], text["json"]) == (key, parts["txt"].decode(), parts["json"].decode())
        assert label == json.loads(parts["json"])["label"]
        assert near(image, parts)
    assert not any(near(found[seed][0], samples[seed + 1][1]) for seed in range(NUM - 1))  # the twin: its neighbour


# Theirs to ours. Its writer runs in a process of its own, for it never ends once a worker has raised.

WRITE = """
import sys, json
import numpy as np
sys.path.insert(0, sys.argv[1])
from data_fixtures import pixels
from ffcv.fields import BytesField, IntField, JSONField, RGBImageField, FloatField, NDArrayField
from ffcv.writer import DatasetWriter

NUM = 230
class Data:
    def __init__(self, text): self.text = text
    def __len__(self): return NUM
    def __getitem__(self, seed):
        text = f"картинка {seed}" if seed % 7 else ""
        value = np.frombuffer(text.encode(), np.uint8) if self.text == "bytes" else {"caption": text, "n": int(seed)}
        return float(seed), value, pixels(seed), np.full((3,), seed, np.float32), int(seed) % 5

for text, field in (("bytes", BytesField), ("json", JSONField)):
    for mode in ("raw", "jpg", "smart", "proportion"):
        for workers in (1, 3):
            image = RGBImageField(write_mode=mode, smart_threshold=1 if workers == 1 else 10**6)
            array = NDArrayField(np.dtype("float32"), (3,))
            fields = {"score": FloatField(), "caption": field(), "image": image, "vector": array, "label": IntField()}
            path = f"{sys.argv[2]}/{text}-{mode}-{workers}.beton"
            writer = DatasetWriter(path, fields, num_workers=workers, page_size=1 << 21)
            writer.from_indexed_dataset(Data(text), chunksize=10)
"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("theirs")
    command = [sys.executable, "-c", WRITE, str(request.path.parent), str(folder)]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    return folder


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("mode", ["raw", "jpg", "smart", "proportion"])
@pytest.mark.parametrize("text", ["bytes", "json"])
def test_we_read_files_by_ffcv(theirs, text, mode, workers):
    file = LocalFile(str(theirs / f"{text}-{mode}-{workers}.beton"))
    index, found = read(file)
    empty = [seed for seed in range(230) if not seed % 7]
    assert [(error["key"], error["reason"]) for error in index.errors] == [
        (f"{seed:08d}", "no_caption") for seed in empty
    ]
    modes = set()
    for seed, (key, parts) in zip([seed for seed in range(230) if seed % 7], found, strict=True):
        metadata = decode.decode_metadata(parts)
        assert (key, metadata["label"]) == (f"{seed:08d}", seed % 5)
        assert decode.decode_captions(parts, metadata) == [f"картинка {seed}"]
        image = decode.open_image(decode.first_image(parts)).decode()
        assert far(image, pixels(seed)) <= (0 if "ppm" in parts else 60)  # quality 90, half the colour resolution
        modes.add("raw" if "ppm" in parts else "jpg")
    expected = {"raw": {"raw"}, "jpg": {"jpg"}, "smart": {"jpg" if workers == 1 else "raw"}}
    assert modes == expected.get(mode, {"raw", "jpg"})


@pytest.mark.parametrize("mode", ["jpg", "proportion"])
def test_pixels_are_those_that_ffcv_reads(theirs, mode):
    file = LocalFile(str(theirs / f"json-{mode}-3.beton"))
    index, found = read(file)
    loader = Loader(file.location, batch_size=10, num_workers=1, pipelines={"vector": None, "caption": None})
    shown = np.concatenate([images.numpy().copy() for _, images, _ in loader])
    numbers = index.entries()["number"]
    for number, (_, parts) in zip(numbers.tolist(), found, strict=True):
        assert near(shown[number], parts)


def test_a_file_of_ffcv_comes_back_from_ours(theirs, tmp_path):
    _, found = read(LocalFile(str(theirs / "bytes-proportion-3.beton")))
    assert come_back(found, read(write(tmp_path / "a.beton", found))[1])


# Its loader, our order.


def steps_of(path, *, rank=0, world_size=1, transform=None, **changes):
    source = ShardSource(shards=str(path))
    mask = np.arange(len(source)) % 5 != 2
    spec = StreamSpec(**{"seed": 3, "global_batch": G, "num_steps": NUM_STEPS, "epoch_end": "wrap"} | changes)
    encoder = SampleEncoder(transform=transform or TrainTransform(spec=SPEC), tokenizer=ByteTokenizer())
    ingredients = [Ingredient(source=source, selection=Selection.from_mask(mask))]
    return TrainSteps(ingredients, spec, encoder, rank, world_size)


@pytest.fixture
def beton(tmp_path):
    write(tmp_path / "a.beton", [sample(seed, image=raw(seed) if seed % 2 else None) for seed in range(NUM)])
    return tmp_path / "a.beton"


def numbers_of(order):
    return np.concatenate([order.sample_order(epoch) for epoch in range(order.num_segments)]).tolist()


@pytest.mark.parametrize("first_step", [0, 4])
@pytest.mark.parametrize("segment_steps", [1, 2, 1000])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_the_order_is_that_of_our_batches(beton, world_size, segment_steps, first_step):
    for rank in range(world_size):
        steps = steps_of(beton, rank=rank, world_size=world_size)
        order = StreamOrder(steps, steps.sources[0], first_step=first_step, segment_steps=segment_steps)
        keys = [key for step in range(first_step, NUM_STEPS) for key in steps.batch(step)["keys"]]
        assert [f"k{number}" for number in numbers_of(order)] == keys
        assert max(map(len, map(order.segment, range(order.num_segments)))) <= segment_steps
    other = StreamOrder(steps, steps.sources[0], first_step=first_step + 1, segment_steps=segment_steps)
    assert [f"k{number}" for number in numbers_of(other)] != keys[: len(numbers_of(other))]


def same(ours, theirs):
    """Whether two batches hold the same samples and texts."""
    lists = all(ours[name] == theirs[name] for name in ("keys", "captions", "step", "errors"))
    names = ("uids", "labels", "text_ids", "text_mask", "weights")
    tensors = all(torch.equal(ours[name], theirs[name]) for name in names)
    return lists and tensors and ours["images"].shape == theirs["images"].shape


@pytest.mark.parametrize(
    ("rank", "world_size", "first_step", "os_cache"),
    [(0, 1, 0, True), (0, 2, 3, True), (1, 2, 3, False), (2, 3, 5, True)],
)
def test_batches_are_ours_with_pixels_of_ffcv(beton, rank, world_size, first_step, os_cache):
    steps = steps_of(beton, rank=rank, world_size=world_size)
    loader = FfcvLoader(
        steps, first_step=first_step, segment_steps=2, os_cache=os_cache, operations=[SimpleRGBImageDecoder()]
    )
    found = list(loader)
    assert len(found) == len(loader) == NUM_STEPS - first_step
    for batch in found:
        for key, image in zip(batch["keys"], batch["images"], strict=True):
            assert near(image.permute(1, 2, 0).numpy(), sample_of(key))
    found = [{**batch, "images": batch["images"][..., :16, :16]} for batch in found]
    expected = [steps.batch(step) for step in range(first_step, NUM_STEPS)]
    assert all(map(same, expected, found))
    assert not any(map(same, expected, found[1:]))
    assert [batch["step"] for batch in loader] == list(range(first_step, NUM_STEPS))  # and once more


def sample_of(key):
    seed = int(key[1:])
    return sample(seed, image=raw(seed) if seed % 2 else None)[1]


def test_crop_and_mirror_are_taken_from_the_transform(tmp_path):
    image = np.zeros((20, 24, 3), np.uint8)
    image[:, 12:] = 250
    plain = {"ppm": b"P6\n24 20\n255\n" + image.tobytes(), "txt": b"a"}
    write(tmp_path / "a.beton", [("a", plain)] * 8)
    sides = {}
    for flip in (0.0, 1.0):
        transform = TrainTransform(spec=SPEC, scale=(1.0, 1.0), ratio=(1.2, 1.2), flip=flip)
        batch = next(iter(FfcvLoader(steps_of(tmp_path / "a.beton", transform=transform))))
        assert batch["images"].shape == (G, 3, 16, 16)
        sides[flip] = batch["images"][..., :4].float().mean().item(), batch["images"][..., -4:].float().mean().item()
    assert sides[0.0] == sides[1.0][::-1] == (0, 250)


def test_leaving_early_leaves_no_thread_behind(beton):
    before = threading.active_count()
    for batch in FfcvLoader(steps_of(beton, num_steps=1000)):
        assert batch["step"] == 0
        break
    assert threading.active_count() == before


class Broken(Operation):
    """Fails when it runs, in ffcv's thread."""

    def declare_state_and_memory(self, previous_state):
        from dataclasses import replace

        return replace(previous_state, jit_mode=False), None

    def generate_code(self):
        def fail(images, destination):
            raise ValueError("on purpose")

        return fail


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_in_the_thread_of_ffcv_is_an_error_here(beton):
    with pytest.raises(DataError, match="ended with an error"):
        list(FfcvLoader(steps_of(beton), operations=[SimpleRGBImageDecoder(), Broken()]))


def test_nothing_is_left_of_a_finished_run(beton):
    assert list(FfcvLoader(steps_of(beton), first_step=NUM_STEPS)) == []


def test_what_ffcv_cannot_read_is_refused(beton, tmp_path):
    with pytest.raises(DataError, match="pad_zero_weight"):
        FfcvLoader(steps_of(beton, epoch_end="pad_zero_weight"))
    with pytest.raises(DataError, match="counterpart in ffcv"):
        FfcvLoader(steps_of(beton, transform=EvalTransform(spec=SPEC)))
    write(tmp_path / "b.beton", [("k", {"jpg": encoded(pixels(77)), "txt": b"a"})])
    with pytest.raises(DataError, match="2 shards"):
        FfcvLoader(steps_of(tmp_path))
