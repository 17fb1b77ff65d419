"""Fingerprints: pHash has the bits of ImageHash, copies are near, and the quality tells flat pictures."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from vlm_train.curation import fingerprints
from vlm_train.curation.fingerprints import Fingerprint, fingerprint, of_pixels
from vlm_train.data.decode import SampleError

# of the package ImageHash 4.3.2, of `mosaic`
IMAGEHASH = {
    (0, 60, 50): "a3d2b2c9b20dacf2",
    (1, 300, 250): "b8e30d5623e93d16",
    (2, 90, 400): "a712b2d8f62370dc",
    (3, 12, 10): "b8f692f6965c80a3",
}


def mosaic(seed: int, height: int, width: int) -> np.ndarray:
    tiles = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return np.kron(tiles, np.ones((height // 6, width // 5, 1), np.uint8))


def smooth(seed: int, height: int, width: int) -> np.ndarray:
    """As few edges as photographs have."""
    tiles = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8))
    return np.asarray(tiles.resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def bits(left: int, right: int) -> int:
    return (left ^ right).bit_count()


def view_bits(left: Fingerprint, right: Fingerprint) -> int:
    """Bits in which the codes of the whole differ."""
    return bits(int.from_bytes(left.views[:32], "big"), int.from_bytes(right.views[:32], "big"))


def levels(left: Fingerprint, right: Fingerprint) -> int:
    """The largest difference of the thumbnails."""
    one, two = (np.frombuffer(each.thumbnail, np.uint8).astype(int) for each in (left, right))
    return int(np.abs(one - two).max())


def test_phash_has_the_bits_of_imagehash(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {at: f"{of_pixels(mosaic(*at)).phash:016x}" for at in IMAGEHASH}
    assert found == IMAGEHASH
    # the twin: without the lowest frequency, the constant
    monkeypatch.setattr(fingerprints, "_LOW_HASH", fingerprints._frequencies(32, 1, 9))
    assert {at: f"{of_pixels(mosaic(*at)).phash:016x}" for at in IMAGEHASH} != IMAGEHASH


@pytest.mark.parametrize("seed", range(5))
def test_copies_are_near_and_others_are_not(seed: int) -> None:
    pixels = smooth(seed, 300, 400)
    one = fingerprint({"png": encoded(pixels)})
    smaller = np.asarray(Image.fromarray(pixels).resize((260, 200), Image.Resampling.BICUBIC))
    copies = [
        fingerprint({"jpg": encoded(pixels, "JPEG", quality=40)}),
        fingerprint({"webp": encoded(smaller, "WEBP", quality=80)}),
    ]
    for copy in copies:  # measured: up to 2, 2 and 2
        assert bits(one.phash, copy.phash) <= 4 and view_bits(one, copy) <= 10 and levels(one, copy) <= 16
    other = fingerprint({"png": encoded(smooth(seed + 50, 300, 400))})  # measured: from 32, 113 and 129 on
    assert bits(one.phash, other.phash) >= 16 and view_bits(one, other) >= 60 and levels(one, other) >= 60


def test_a_shrunk_jpeg_moves_few_bits() -> None:
    """A JPEG of 1,200 pixels is decoded at a quarter; the picture itself is not."""
    for seed in range(5):
        pixels = smooth(seed, 1200, 1200)
        found = fingerprint({"jpg": encoded(pixels, "JPEG", quality=95)})
        assert bits(found.phash, of_pixels(pixels).phash) <= 4


def test_quality_is_low_of_flat_pictures() -> None:
    flat = np.full((200, 200, 3), 90, np.uint8)
    assert (
        of_pixels(flat).quality == 0
        and of_pixels(flat + np.arange(200, dtype=np.uint8)[:, None, None] // 4).quality < 50
    )
    assert of_pixels(mosaic(0, 300, 300)).quality == 100
    assert of_pixels(flat).thumbnail == bytes([90]) * 1024 + bytes([128]) * 512
    assert not any(of_pixels(flat).views)  # nothing to be compared by


def test_what_is_seen_is_hashed() -> None:
    pixels = mosaic(4, 240, 300)
    turned = encoded(np.rot90(pixels), "JPEG", quality=95, exif=exif_of(6))
    assert bits(fingerprint({"jpg": turned}).phash, of_pixels(pixels).phash) <= 4
    assert bits(of_pixels(np.ascontiguousarray(np.rot90(pixels))).phash, of_pixels(pixels).phash) > 12  # the twin
    first = fingerprint({"0.png": encoded(pixels), "1.png": encoded(mosaic(5, 60, 60))})
    assert first == of_pixels(pixels)
    for parts in ({"txt": b"a"}, {"jpg": encoded(pixels, "JPEG")[:-300]}):
        with pytest.raises(SampleError):
            fingerprint(parts)


def exif_of(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()
