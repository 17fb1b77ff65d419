"""Bytes to pixels, caption and metadata: the only place that trusts nothing about a file.

JPEGs go through libjpeg-turbo, which can decode at 1/2, 1/4 or 1/8 of the size for a part of the cost (DCT scaling: the
inverse transform is done on fewer coefficients); the smallest of these that still covers what the transform needs is
taken. A binary PPM is pixels already and is not even copied. Everything else, and CMYK JPEGs, goes through Pillow,
limited to formats that need no helper program. The result is always what a viewer shows: EXIF orientation applied,
transparency on white, first frame, 8 bits.

A sample that cannot be used raises `SampleError` whose `reason` is one stable word, so that counts of reasons mean
something over months. libjpeg warnings are errors here: a JPEG that stops half-way decodes to a half grey picture.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import unicodedata
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from vlm_train.data.exif import orientation_of, upright
from vlm_train.data.modalities.members import modality_members
from vlm_train.data.turns import first_answer
from vlm_train.errors import DataError

MAX_PIXELS = 1 << 26  # 8,192 x 8,192: above it a small file can ask for gigabytes
MAX_SCANS = 256  # a progressive JPEG has about ten; thousands of empty ones keep a decoder busy for minutes
MAX_CAPTION_CHARS = 4096  # several times the longest context of any text tower; the rest could never be seen

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_IMAGE_PART = re.compile(r"(?:([0-9]{1,18})\.)?(?:jpg|jpeg|png|webp|gif|bmp|ppm)")
_PPM_HEADER = re.compile(rb"P6\n(\d{1,9}) (\d{1,9})\n255\n")
_JPEG = b"\xff\xd8"
_BASELINE = (0xC0, 0xC1)  # start of a sequential frame: where its one scan has all components, there is no other


class SampleError(DataError):
    """One sample that cannot be used. `reason` is a stable word, `detail` says what was seen."""

    @property
    def reason(self) -> str:
        """One of no_image, no_caption, image_unknown, image_truncated, image_corrupt, image_too_large, caption_utf8,
        metadata_json, metadata_captions, metadata_regions, depth_corrupt, depth_too_large, audio_corrupt,
        audio_too_large, motion_corrupt, motion_too_large, sample_too_large, shard_changed, bad_pointer; of a dialogue
        dialogue_roles, dialogue_text, dialogue_too_long, dialogue_no_label, dialogue_image_cut, dialogue_many_images,
        dialogue_image_count; in a conversion also several_images, part_not_text, part_not_writable."""
        return self.what

    @property
    def detail(self) -> str:
        """What was seen, for a person."""
        return "" if self.got is None else str(self.got)


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image whose header has been read. `width`, `height`: pixels as displayed, after EXIF orientation."""

    width: int
    height: int
    orientation: int
    data: bytes
    pillow: Image.Image | None = None  # decodes it; without one `data` is a JPEG or, with `raw_start`, a PPM
    raw_start: int = 0  # where the pixels of a PPM begin

    def decode(self, *, min_width: int = 0, min_height: int = 0, fast: bool = False) -> np.ndarray:
        """Pixels uint8 [H, W, 3] RGB; they may be a read-only view of `data`.

        A JPEG may come back at 1/2, 1/4 or 1/8 of its size, never below `min_width` x `min_height`; 0 asks for all.
        `fast` lets libjpeg-turbo use its quicker inverse transform and chroma upsampling: a quarter of the time for an
        error far below the JPEG's own (at 224 pixels, quality 85-90: 3.07 grey levels rms from the picture before
        compression, 3.31 with it). For training, where the crop is random anyway; never for evaluation.

        Raises:
            SampleError: image_truncated or image_corrupt.
        """
        if self.raw_start:
            return _raw(self.data, self.raw_start, self.width, self.height)
        try:
            if self.pillow is not None:
                if self.data[:2] == _JPEG:  # for its errors alone: Pillow fills what is missing with grey
                    simplejpeg.decode_jpeg(self.data, colorspace="CMYK", min_height=1, min_width=1, min_factor=8)
                with _quiet_pillow():
                    return upright(_rgb(self.pillow), self.orientation)
            factor = next((f for f in (8, 4, 2) if self.width >= f * min_width and self.height >= f * min_height), 1)
            factor = factor if min_width > 0 and min_height > 0 else 1
            width, height = -(-self.width // factor), -(-self.height // factor)
            if self.orientation > 4:
                width, height = height, width
            size = {"min_height": height, "min_width": width, "min_factor": factor}
            pixels = simplejpeg.decode_jpeg(self.data, fastdct=fast, fastupsample=fast, **size)
            return upright(pixels, self.orientation)
        except Exception as error:  # decoders raise whatever they like on hostile bytes; each is one bad sample
            truncated = re.search("truncated|premature", str(error), re.IGNORECASE)
            raise SampleError("image_truncated" if truncated else "image_corrupt", got=error) from None


def open_image(data: bytes) -> EncodedImage:
    """Reads the header of an image and applies the pixel cap; decodes nothing.

    Raises:
        SampleError: image_unknown, image_too_large, or image_corrupt for a JPEG of more than `MAX_SCANS` scans.
    """
    if data[:2] == b"P6":
        return _open_ppm(data)
    pillow = None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace in ("CMYK", "YCCK"):
            raise ValueError("four-colour JPEGs are Pillow's")
    except ValueError:
        pillow = _open_pillow(data)
        width, height = pillow.size
    exif = _jpeg_exif(data) if pillow is None or data[:2] == _JPEG else pillow.info.get("exif")
    _check_size(width, height)
    orientation = orientation_of(exif)
    width, height = (height, width) if orientation > 4 else (width, height)
    return EncodedImage(width, height, orientation, data, pillow)


def image_parts(parts: Mapping[str, bytes]) -> list[str]:
    """Names of a sample's image parts in order: `jpg` before `0.jpg` before `1.jpg`. Empty when it has none."""
    found = [(int(match[1] or -1), name) for name in parts if (match := _IMAGE_PART.fullmatch(name))]
    return [name for _, name in sorted(found)]


def first_image(parts: Mapping[str, bytes]) -> bytes:
    """The bytes of the sample's first image.

    Raises:
        SampleError: no_image.
    """
    names = image_parts(parts)
    if not names:
        raise SampleError("no_image", got=f"parts {sorted(parts)}")
    return parts[names[0]]


def decode_metadata(parts: Mapping[str, bytes]) -> dict[str, Any]:
    """The content of KEY.json, {} when there is none.

    Raises:
        SampleError: metadata_json when it is not a JSON object in UTF-8. NaN is taken: img2dataset writes it.
    """
    if "json" not in parts:
        return {}
    try:
        content = json.loads(parts["json"].decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SampleError("metadata_json", got=error) from None
    if not isinstance(content, dict):
        raise SampleError("metadata_json", got=f"a {type(content).__name__}", allowed="a JSON object")
    return content


def decode_captions(parts: Mapping[str, bytes], metadata: Mapping[str, Any]) -> list[str]:
    """Every caption of a sample, KEY.txt first, then `captions` and `caption` of KEY.json, or the first answer of a
    dialogue without these; no repeats, at least one.

    A byte order mark, NUL bytes and outer white space go; a caption is cut at `MAX_CAPTION_CHARS` characters.

    Raises:
        SampleError: caption_utf8, metadata_captions or no_caption.
    """
    listed = metadata.get("captions")
    listed = [] if listed is None else listed
    if not isinstance(listed, list) or not all(isinstance(caption, str) for caption in listed):
        raise SampleError("metadata_captions", got=str(listed)[:80], allowed="a list of strings")
    single = metadata.get("caption")
    found = [*listed, single] if isinstance(single, str) else listed
    found = found if found or "txt" in parts else first_answer(metadata)
    try:
        "".join(found).encode("utf-8")  # JSON can spell half a surrogate pair, which no tokenizer takes
        found = [parts["txt"].decode("utf-8-sig"), *found] if "txt" in parts else found
    except UnicodeError as error:
        raise SampleError("caption_utf8", got=error) from None
    cleaned = [caption.replace("\0", "").strip()[:MAX_CAPTION_CHARS] for caption in found]
    captions = list(dict.fromkeys(caption for caption in cleaned if caption))
    if not captions:
        raise SampleError("no_caption", got=f"parts {sorted(parts)}")
    return captions


def decode_label(metadata: Mapping[str, Any]) -> int | None:
    """`label` of KEY.json where it is an integer of 64 bits, else None."""
    label = metadata.get("label")
    if not isinstance(label, int) or isinstance(label, bool):
        return None
    return label if -(1 << 63) <= label < 1 << 63 else None


def sample_uid(parts: Mapping[str, bytes]) -> bytes:
    """16 bytes that name the content, so they survive resharding and convict a changed shard; see `sample_hashes`."""
    return sample_hashes(parts)[0]


def sample_hashes(parts: Mapping[str, bytes]) -> tuple[bytes, int]:
    """(uid, 64-bit hash of the images) of a sample.

    The uid is the first 128 bits of sha256 over the images in order, KEY.txt, KEY.json and the members of modalities
    that are there, each behind its role (one letter) and its length (8 bytes), so that no byte can go over from one
    part to the next unnoticed. That is all that is ever read of a sample.
    """
    digest = hashlib.sha256()
    for name in image_parts(parts):
        digest.update(b"i" + len(parts[name]).to_bytes(8, "little"))
        digest.update(parts[name])
    images = digest.digest()
    for role, name in ((b"t", "txt"), (b"m", "json"), *modality_members(parts)):
        if name in parts:
            digest.update(role + len(parts[name]).to_bytes(8, "little") + parts[name])
    return digest.digest()[:16], int.from_bytes(images[:8], "little")


def caption_hash(caption: str) -> int:
    """64-bit hash of a caption that ignores case, compatibility forms and runs of white space."""
    normal = " ".join(unicodedata.normalize("NFKC", caption).casefold().split())
    return int.from_bytes(hashlib.sha256(normal.encode()).digest()[:8], "little")


def _jpeg_exif(data: bytes) -> bytes | None:
    """The EXIF segment of a JPEG's header. Walks from marker to marker: searching the bytes takes ten times as long.

    Raises:
        SampleError: image_corrupt, more than `MAX_SCANS` scans.
    """
    exif, num_components, start = None, 0, 2
    while start + 10 <= len(data) and data[start] == 0xFF:
        marker, stop = data[start + 1], start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        if marker in _BASELINE:
            num_components = data[start + 9]
        elif marker == 0xE1 and exif is None and data.startswith(b"Exif\0\0", start + 4):
            exif = data[start + 4 : stop]
        elif marker == 0xDA and data[start + 4] == num_components:
            return exif  # everything is in one scan
        elif marker == 0xDA:
            break
        start = stop
    if (num_scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise SampleError("image_corrupt", got=f"{num_scans} scans", allowed=f"{MAX_SCANS} scans")
    return exif


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise SampleError("image_too_large", got=f"{width} x {height} pixels", allowed=f"{MAX_PIXELS} pixels")


def _open_ppm(data: bytes) -> EncodedImage:
    header = _PPM_HEADER.match(data)
    if header is None or not int(header[1]) * int(header[2]):
        raise SampleError("image_unknown", got=f"a PPM that begins with {data[:24]!r}")
    width, height = int(header[1]), int(header[2])
    _check_size(width, height)
    return EncodedImage(width, height, 1, data, raw_start=header.end())


def _raw(data: bytes, start: int, width: int, height: int) -> np.ndarray:
    if len(data) - start != width * height * 3:
        reason = "image_truncated" if len(data) - start < width * height * 3 else "image_corrupt"
        raise SampleError(reason, got=f"{len(data) - start} bytes", allowed=f"{width} x {height} x 3 bytes")
    return np.frombuffer(data, np.uint8, offset=start).reshape(height, width, 3)


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Pillow warns of sizes, for which our own limit is lower, and of metadata that it cannot read and nobody needs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        yield


def _open_pillow(data: bytes) -> Image.Image:
    try:
        with _quiet_pillow():
            return Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise SampleError("image_too_large", got=error) from None
    except Exception as error:
        raise SampleError("image_unknown", got=error) from None


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit grey: the high byte, as libpng's strip-16 does
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image.convert("RGB"))
