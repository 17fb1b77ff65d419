"""What the text fields of a `.beton` that somebody else wrote say: KEY.txt and KEY.json of its samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vlm_train.data import beton
from vlm_train.data.beton import Field
from vlm_train.data.decode import SampleError


def value_of(field: Field, text: bytes) -> Any:
    """What a text field says: a dict, or from a JSON field a str or list, or from a bytes field bytes.

    Raises:
        SampleError: metadata_json for a JSON field that holds something else.
    """
    text = text.rstrip(b"\0")
    if field.type == beton.BYTES and not text.startswith(b"{"):
        return text
    value: Any = None
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        if field.type == beton.BYTES:
            return text
    if not isinstance(value, (dict, list, str)):
        raise SampleError("metadata_json", got=f"field `{field.name}`: {text[:80]!r}", allowed="an object or text")
    return value


def texts_of(values: Sequence[Any], label: int | None) -> dict[str, bytes]:
    """KEY.txt and KEY.json from what the text fields say and the label field, if any.

    Raises:
        SampleError: metadata_json for an object that is nested just within what its reader takes.
        UnicodeEncodeError: a caption with half a surrogate pair.
    """
    facts, texts = dict[str, Any](), dict[str, bytes]()
    for value in values:
        if isinstance(value, dict):
            facts |= value
        elif isinstance(value, list):
            facts["captions"] = value
        else:
            texts["txt"] = value.encode() if isinstance(value, str) else value
    facts |= {"label": label} if label is not None and "label" not in facts else {}
    try:
        return texts | ({"json": json.dumps(facts).encode()} if facts else {})
    except RecursionError as error:
        raise SampleError("metadata_json", got=error) from None
