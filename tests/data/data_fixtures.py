"""Small shards of every kind, and a tokenizer that needs no file."""

import io
import itertools
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from vlm_train.data.collate import SampleEncoder
from vlm_train.data.pipeline import TrainLoader
from vlm_train.data.steps import Ingredient, StreamSpec, TrainSteps
from vlm_train.data.transforms import TrainTransform
from vlm_train.types import ImageSpec, TextSpec

SPEC = ImageSpec(size=16)
G, NUM_STEPS = 11, 6  # 11 divides by none of the world sizes but 1; 28 kept samples, so six steps cross two epochs
COUNTS, BAD, DROPPED = (11, 7, 13, 5), (2, 17, 30), (0, 9, 10, 12, 18, 25, 33, 35)


def zstd(content):
    """The bytes, packed."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(content)
    return sink.getvalue().to_pybytes()


class ByteTokenizer:
    """One id a byte, between 1 and 2; 0 pads."""

    def __init__(self, *, context_length=40, pad_to_max=False):
        self.spec = TextSpec(
            vocab_size=259, context_length=context_length, pad_id=0, bos_id=1, eos_id=2, pad_to_max=pad_to_max
        )

    def __call__(self, texts):
        ids = torch.zeros(len(texts), self.spec.context_length, dtype=torch.int64)
        for row, text in enumerate(texts):
            tokens = [1, *(byte + 3 for byte in text.encode()[: self.spec.context_length - 2]), 2]
            ids[row, : len(tokens)] = torch.tensor(tokens)
        return ids, ids != 0

    def decode(self, ids):
        return bytes(token - 3 for token in ids if token > 2).decode()

    def save(self, directory):
        raise NotImplementedError


def pixels(seed, width=24, height=20):
    """A smooth picture: what JPEG is made for."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encoded(array, kind="JPEG", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, members, *, kind=tarfile.USTAR_FORMAT):
    """Members are (name, bytes) or ready TarInfos."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return path


def members_of(key, seed, *, image=None, caption=None, metadata=None):
    """jpg + txt + json of one sample, as img2dataset writes them."""
    facts = {"caption": f"picture {seed}", "label": seed % 3, "key": key} | (metadata or {})
    return [
        (f"{key}.jpg", encoded(pixels(seed)) if image is None else image),
        (f"{key}.txt", f"picture {seed}".encode() if caption is None else caption),
        (f"{key}.json", json.dumps(facts).encode()),
    ]


def write_dataset(folder: Path, counts=(11, 7, 13, 5), *, bad=()):
    """Shards of jpg + txt + json. The samples numbered in `bad` have a JPEG that stops half-way."""
    number = 0
    for shard, count in enumerate(counts):
        members = []
        for _ in range(count):
            image = encoded(pixels(number))
            image = image[:-30] if number in bad else image  # the header stays whole, so it is indexed
            members += members_of(f"{shard:02d}{number:04d}", number, image=image)
            number += 1
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


def train_encoder():
    """Augments with everything, so that equal pixels mean equal randomness."""
    transform = TrainTransform(spec=SPEC, scale=(0.3, 1.0), flip=0.5, color_jitter=0.4, grayscale=0.2)
    return SampleEncoder(transform=transform, tokenizer=ByteTokenizer())


def loader_of(source, selection, rank=0, world_size=1, workers=0, **spec):
    return mixture_loader([Ingredient(source=source, selection=selection)], rank, world_size, workers, **spec)


def mixture_loader(ingredients, rank=0, world_size=1, workers=0, **spec):
    spec = {"seed": 5, "global_batch": G, "num_steps": NUM_STEPS, "shuffle_window": 2, "epoch_end": "wrap"} | spec
    steps = TrainSteps(ingredients, StreamSpec(**spec), train_encoder(), rank, world_size)
    return TrainLoader(steps=steps, num_workers=workers)


def merged(batches):
    """The global batch of one step from its rank batches, in rank order: everything that a model could see."""
    longest = max(batch["text_ids"].shape[1] for batch in batches)

    def padded(name):
        tensors = (batch[name] for batch in batches)
        return torch.cat([torch.nn.functional.pad(t, (0, longest - t.shape[1])) for t in tensors]).tolist()

    whole = {name: torch.cat([batch[name] for batch in batches]) for name in ("images", "uids", "weights", "labels")}
    lists = {name: [x for b in batches for x in b[name]] for name in ("captions", "keys", "errors")}
    assert len({batch["step"] for batch in batches}) == 1
    facts = {"text_ids": padded("text_ids"), "text_mask": padded("text_mask"), "step": batches[0]["step"], **lists}
    return facts | {name: tensor.numpy().tobytes() for name, tensor in whole.items()}


def stream_of(loaders, num=None):
    """The merged batches of the first `num` steps."""
    return [merged(batches) for batches in itertools.islice(zip(*loaders, strict=True), num)]
