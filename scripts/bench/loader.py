"""How many pictures a second two cores give: our loader against webdataset, FFCV and torch's own, on the same bytes.

    python scripts/bench/loader.py                 3,000 pictures, 5 rounds of every pipeline in turn, about 6 minutes
    python scripts/bench/loader.py --full          11 rounds of twice the length
    python scripts/bench/loader.py --scale 0.9 1   open_clip's crop in place of torchvision's usual 0.35..1

The pictures are made up (smooth fields of a photograph's spectrum, edges, sensor noise), JPEGs of quality 85-90 with
sides of 256-512 pixels, 20-60 kB. A tar, a .beton and loose files hold the very same JPEG bytes. Every pipeline crops
at random to 224 (area share `--scale`, aspect 3/4..4/3), mirrors half of the pictures and gives batches of 128, with
two worker processes or threads: uint8 from ours and FFCV, normalised floats from the other two, as each is made. Nobody
turns text to ids. Ours also checks every sample against its sha256, which no other does.

A rate is that of the steady state: the clock starts after eight batches and stops while the pipeline is still working.
One element of each page of a batch is read, as a copy to a device would. Ratios are medians of the ratios of a round.
"""

from __future__ import annotations

import argparse
import io
import itertools
import re
import statistics
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Generator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import torch
from PIL import Image
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "proof"))
from _table import Row, report

from vlm_train.data.collate import SampleEncoder
from vlm_train.data.pipeline import TrainLoader
from vlm_train.data.selection import Selection
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.steps import Ingredient, StreamSpec, TrainSteps
from vlm_train.data.transforms import TrainTransform
from vlm_train.types import CLIP_MEAN, CLIP_STD, ImageSpec, TextSpec

SIZE, BATCH, NUM_WORKERS, WARM_UP, SHARD = 224, 128, 2, 8, 500
Stream = Generator[torch.Tensor, None, None]


def main() -> int:
    options = arguments()
    rounds, num_batches = (11, 60) if options.full else (5, 30)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder, options.samples)
        rates = race(folder, tuple(options.scale), rounds, num_batches)
        print(f"\nscale {options.scale[0]}..{options.scale[1]}, {NUM_WORKERS} workers, {rounds} rounds, samples/s")
        for name, found in rates.items():
            print(f"{name:<16} {statistics.median(found):>7.0f}   {min(found):>6.0f} .. {max(found):.0f}")
        rows = speed_rows(rates) + volume_rows(folder)
    return report(rows, options.json)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    parser.add_argument("--full", action="store_true", help="the long form")
    parser.add_argument("--scale", type=float, nargs=2, default=(0.35, 1.0), metavar=("LOW", "HIGH"))
    parser.add_argument("--samples", type=int, default=3000, help="pictures in the data set")
    return parser.parse_args()


def race(folder: Path, scale: tuple[float, float], rounds: int, num_batches: int) -> dict[str, list[float]]:
    """Samples a second of each pipeline, one figure a round. Each has a process to itself (threads of one library and
    forks of another do not go together), which waits while the others run."""
    context = get_context("spawn")
    children = {}
    for name in PIPELINES:
        here, there = context.Pipe()
        child = context.Process(target=serve, args=(there, name, folder, scale))
        child.start()
        there.close()
        children[name] = here, child
        here.recv()  # it has compiled and indexed what it needs
    rates: dict[str, list[float]] = {name: [] for name in children}
    for _ in range(rounds):
        for name, (pipe, child) in children.items():
            pipe.send(num_batches)
            rates[name].append(pipe.recv())
            settle(child.pid)
    for pipe, child in children.values():
        pipe.close()
        child.join()
    return rates


def settle(pid: int | None) -> None:
    """Waits until a pipeline that was measured has filled its queues, so that it takes nothing from the next one."""
    used = -1.0
    while (now := cpu_seconds(pid)) > used + 0.02:
        used = now
        time.sleep(0.3)


def cpu_seconds(pid: int | None) -> float:
    process = psutil.Process(pid)
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def serve(pipe: Connection, name: str, folder: Path, scale: tuple[float, float]) -> None:
    """Measures one pipeline whenever it is asked to."""
    warnings.filterwarnings("ignore")
    stream = PIPELINES[name](folder, scale)
    pipe.send(len(next(stream)))
    try:
        while True:
            num_batches = pipe.recv()
            for images in itertools.islice(stream, WARM_UP):
                touch(images)
            begin, num_samples = time.perf_counter(), 0
            for images in itertools.islice(stream, num_batches):
                touch(images)
                num_samples += len(images)
            pipe.send(num_samples / (time.perf_counter() - begin))
    except EOFError:
        stream.close()


def touch(images: torch.Tensor) -> None:
    """Reads one element of every page."""
    flat = images.permute(0, 2, 3, 1).reshape(-1) if images.stride(1) == 1 else images.reshape(-1)
    flat[:: 4096 // images.element_size()].sum()


def speed_rows(rates: dict[str, list[float]]) -> list[Row]:
    rows = []
    for ours, theirs, bar in (
        ("ours-tar", "webdataset", 2.0),
        ("ours-beton", "ffcv", 1.0),
        ("ours-tar", "torch-files", 1.0),
        ("ours-tar-70%", "ours-tar", 0.98),
    ):
        if ours in rates and theirs in rates:
            ratio = statistics.median(mine / other for mine, other in zip(rates[ours], rates[theirs], strict=True))
            rows.append(Row(claim=f"samples/s, {ours} / {theirs}", value=ratio, bar=bar, sense=">="))
    return rows


def volume_rows(folder: Path) -> list[Row]:
    """Bytes read against bytes of the samples, where one in ten is kept."""
    source = ShardSource(shards=str(folder / "tar"))
    rows = np.flatnonzero(kept(len(source), 0.1))
    before = bytes_read()
    for start in range(0, len(rows), BATCH):
        source.read(rows[start : start + BATCH])
    wanted = int(source.manifest.entries(rows)["length"].sum())
    value = (bytes_read() - before) / wanted
    return [Row(claim="bytes read / bytes of samples, 10 % kept", value=value, bar=1.2, sense="<=")]


def bytes_read() -> int:
    """What this process asked the kernel for so far, by the kernel's own count."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])  # type: ignore[index]


def kept(num_rows: int, share: float) -> np.ndarray:
    return np.random.default_rng(0).random(num_rows) < share


# The data set


def photograph(number: int) -> tuple[int, int, bytes]:
    """(width, height, JPEG) of picture `number`, a function of it alone."""
    rng = np.random.default_rng(number)
    width, height = (int(side) for side in rng.integers(256, 513, 2))
    image = np.full((height, width, 3), 128, np.float32)
    for cells in (4, 8, 16, 32, 64, 128):
        shape = (max(2, height * cells // 256 + 1), max(2, width * cells // 256 + 1))
        field = 0.85 * rng.standard_normal((*shape, 1)) + 0.35 * rng.standard_normal((*shape, 3))
        field = cv2.resize(field.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
        image += field * np.float32(150 / cells**0.72)
    for _ in range(int(rng.integers(4, 13))):
        outline = (rng.random((int(rng.integers(3, 7)), 2)) * (width, height)).astype(np.int32)
        mask = np.zeros((height, width), np.uint8)
        cv2.fillConvexPoly(mask, cv2.convexHull(outline), 255, lineType=cv2.LINE_AA)
        cover = (mask * np.float32(rng.uniform(0.4, 1) / 255))[..., None]
        image += ((image - 128) * 0.5 + rng.uniform(0, 255, 3).astype(np.float32) - image) * cover
    image += rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(3, 8))
    buffer = io.BytesIO()
    picture = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    picture.save(buffer, "JPEG", quality=int(rng.integers(85, 91)))
    return width, height, buffer.getvalue()


def make_data(folder: Path, num_samples: int) -> None:
    """The same pictures as tars, as one .beton and as files."""
    with get_context("fork").Pool(NUM_WORKERS) as pool:
        pictures = pool.map(photograph, range(num_samples), chunksize=50)
    mean = statistics.mean(len(jpeg) for _, _, jpeg in pictures)
    print(f"{num_samples} JPEGs of {mean / 1000:.1f} kB on average")
    (folder / "tar").mkdir()
    (folder / "files" / "all").mkdir(parents=True)
    for start in range(0, num_samples, SHARD):
        with tarfile.open(folder / "tar" / f"{start // SHARD:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(start, min(start + SHARD, num_samples)):
                for suffix, content in (("jpg", pictures[number][2]), ("txt", f"picture {number}".encode())):
                    info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    for number, (_, _, jpeg) in enumerate(pictures):
        (folder / "files" / "all" / f"{number:06d}.jpg").write_bytes(jpeg)
    write_beton(folder / "data.beton", pictures)


def write_beton(path: Path, pictures: list[tuple[int, int, bytes]]) -> None:
    """By FFCV's own writer, told to take the JPEG bytes as they are."""
    from ffcv.fields import BytesField, RGBImageField
    from ffcv.writer import DatasetWriter

    def as_it_is(destination: Any, picture: tuple[int, int, bytes], malloc: Callable[[int], Any]) -> None:
        width, height, jpeg = picture
        destination["mode"], destination["width"], destination["height"] = 0, width, height
        destination["data_ptr"], storage = malloc(len(jpeg))
        storage[:] = np.frombuffer(jpeg, np.uint8)

    image = RGBImageField(write_mode="jpg")
    image.encode = as_it_is
    captions = [np.frombuffer(f"picture {number}".encode(), np.uint8) for number in range(len(pictures))]
    writer = DatasetWriter(str(path), {"image": image, "caption": BytesField()}, num_workers=1)
    writer.from_indexed_dataset(list(zip(pictures, captions, strict=True)))


# The pipelines: each is an endless stream of batches of images


class NoText:
    """Every text is two ids: no pipeline here works on text."""

    spec = TextSpec(vocab_size=2, context_length=2, pad_id=2, bos_id=0, eos_id=1)

    def __call__(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.tensor([0, 1]).repeat(len(texts), 1)
        return ids, ids < 2


def ours(shards: str, scale: tuple[float, float], share: float = 1.0) -> Stream:
    source = ShardSource(shards=shards)
    selection = Selection.all(len(source)) if share == 1 else Selection.from_mask(kept(len(source), share))
    transform = TrainTransform(spec=ImageSpec(size=SIZE), scale=scale, flip=0.5)
    encoder = SampleEncoder(transform=transform, tokenizer=NoText())
    spec = StreamSpec(seed=0, global_batch=BATCH, num_steps=10**6, epoch_end="wrap")
    steps = TrainSteps([Ingredient(source=source, selection=selection)], spec, encoder, 0, 1)
    loader = TrainLoader(steps=steps, num_workers=NUM_WORKERS)
    for batch in loader:
        yield batch["images"]


def torchvision_transform(scale: tuple[float, float]) -> transforms.Compose:
    """open_clip's training transform, with a mirror."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=scale, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.Lambda(rgb),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )


def rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def webdataset(folder: Path, scale: tuple[float, float]) -> Stream:
    """As open_clip builds it."""
    import webdataset as wds

    steps = [
        wds.ResampledShards(sorted(str(path) for path in (folder / "tar").glob("*.tar"))),
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.shuffle(1000, initial=500),
        wds.decode("pilrgb"),
        wds.rename(image="jpg", text="txt"),
        wds.map_dict(image=torchvision_transform(scale)),
        wds.to_tuple("image", "text"),
        wds.batched(BATCH, partial=False),
    ]
    loader = wds.WebLoader(wds.DataPipeline(*steps), batch_size=None, shuffle=False, num_workers=NUM_WORKERS)
    for images, _ in loader:
        yield images


def torch_files(folder: Path, scale: tuple[float, float]) -> Stream:
    from torchvision.datasets import ImageFolder

    data = ImageFolder(str(folder / "files"), torchvision_transform(scale))
    sampler = torch.utils.data.RandomSampler(data, replacement=True, num_samples=10**6)
    loader = torch.utils.data.DataLoader(data, BATCH, sampler=sampler, num_workers=NUM_WORKERS)
    for images, _ in loader:
        yield images


def ffcv(folder: Path, scale: tuple[float, float]) -> Stream:
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    crop = RandomResizedCropRGBImageDecoder((SIZE, SIZE), scale=scale)
    operations = [crop, RandomHorizontalFlip(), ToTensor(), ToTorchImage()]
    loader = Loader(
        str(folder / "data.beton"),
        batch_size=BATCH,
        num_workers=NUM_WORKERS,
        os_cache=True,
        order=OrderOption.RANDOM,
        drop_last=True,
        pipelines={"image": operations, "caption": None},
    )
    while True:
        for (images,) in loader:
            yield images


PIPELINES: dict[str, Callable[[Path, tuple[float, float]], Stream]] = {  # what is compared stands together
    "webdataset": webdataset,
    "ours-tar": lambda folder, scale: ours(str(folder / "tar"), scale),
    "ours-tar-70%": lambda folder, scale: ours(str(folder / "tar"), scale, share=0.7),
    "ours-beton": lambda folder, scale: ours(str(folder / "data.beton"), scale),
    "ffcv": ffcv,
    "torch-files": torch_files,
}

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.exit(main())
