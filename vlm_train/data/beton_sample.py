"""The field `sample` of the `.beton` files that we write: which image part it was, and every other part of a sample."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vlm_train.data import decode
from vlm_train.data.decode import SampleError
from vlm_train.data.modalities.members import modality_members

_SAMPLE = {"key", "image", "txt", "json", "other"}


def pack(key: str, image: str, parts: Mapping[str, bytes]) -> bytes:
    """The `sample` field of our files: {key, image: name of the image part, txt, json, other: {name: text}}. Every part
    is there as its own text, verbatim, KEY.json too: so the bytes come back as they were.

    Raises:
        SampleError: several_images, or part_not_text for a part that is no UTF-8.
    """
    others = {name: content for name, content in parts.items() if name != image}
    if more := decode.image_parts(others):
        raise SampleError("several_images", got=[image, *more], allowed="one image to a sample of a .beton")
    try:
        texts = {name: content.decode("utf-8") for name, content in others.items()}
    except UnicodeDecodeError as error:
        held = [name for _, name in modality_members(others)]
        raise SampleError("part_not_text", got=held or error, allowed="an image, and texts in UTF-8") from None
    sample: dict[str, Any] = {
        "key": key,
        "image": image,
        **{name: texts.pop(name) for name in ("txt", "json") if name in texts},
    }
    return json.dumps(sample | ({"other": texts} if texts else {}), ensure_ascii=False).encode() + b"\0"


def unpack(content: Any) -> tuple[str, str, dict[str, bytes]] | None:
    """(key, name of the image part, the other parts) of a `sample` field of ours; None for any other JSON."""
    if not isinstance(content, dict) or not {"key", "image"} <= set(content) <= _SAMPLE:
        return None
    other, key, image = content.get("other", {}), content["key"], content["image"]
    texts = {name: content[name] for name in ("txt", "json") if name in content}
    texts |= other if isinstance(other, dict) else {"other": None}
    if not all(isinstance(text, str) for text in [key, image, *texts.values()]):
        return None
    return key, image, {name: text.encode() for name, text in texts.items()}
