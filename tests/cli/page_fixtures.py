"""Data whose words want to run in a page, and what a browser would make of one."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from vlm_train.data.writer import DatasetWriter

HOSTILE = '</p><script>alert(1)</script><img src=https://evil.example/x.png onerror="x"> \' " & @import url(//evil)'


class Requests(HTMLParser):
    """What a browser would fetch or run, and tags that are not closed in order."""

    EMPTY = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []
        self.images = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.images += tag == "img"
        for key in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
            if key in given and not (given[key] or "").startswith("data:image/jpeg;base64,"):
                self.found.append(f"{tag} {key}")
        self.found += [f"{tag} {key}" for key in given if key.startswith("on")]
        self.found += [tag] if tag in ("script", "link", "iframe", "object", "embed", "base", "form") else []
        self.found += [key for key in (given.get("style") or "", "") if "url(" in key]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"] and re.search(r"url\(|@import|http", data):
            self.found.append("style")


def looked_at(document: str) -> Requests:
    parser = Requests()
    parser.feed(document)
    assert parser.open == []
    return parser


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def smooth(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    small = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def write(folder: Path, contents: list[bytes], caption: str = HOSTILE) -> Path:
    with DatasetWriter(folder, parameters={}, max_samples=10) as writer:
        for number, content in enumerate(contents):
            writer.add("train", f"o'{number:03d} <b>&", {"png": content, "txt": f"{number} {caption}".encode()})
        writer.finish(num_errors=0, facts={})
    return folder / "train"
