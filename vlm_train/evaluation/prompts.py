"""The names of classes, and the sentences into which a name is put before it is embedded. `{}` stands for the name.

`simple` is the set of seven that CLIP's authors chose greedily from their eighty for ImageNet (openai/CLIP,
notebooks/Prompt_Engineering_for_ImageNet.ipynb); `generic` and `plain` make no assumption about the pictures. Any other
set, the eighty included, is given as a list in the config, as a file, or in the `templates` of a classes file. `{c}` is
taken for `{}`, so that the lists that are about (written as Python's f-strings) can be used as they are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_train.errors import ConfigError, nearest

TEMPLATE_SETS: dict[str, tuple[str, ...]] = {
    "plain": ("{}",),
    "generic": (
        "{}",
        "a picture of {}.",
        "an image of {}.",
        "a drawing of {}.",
        "a photo of {}.",
        "a picture that shows {}.",
    ),
    "simple": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
}


def resolve_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """The sentences of a named set, of a file (JSON list, or a sentence a line), or the given ones, checked.

    Raises:
        ConfigError: unknown name, a file that cannot be used, no sentence, or one that does not hold `{}` once.
    """
    if isinstance(templates, str) and templates in TEMPLATE_SETS:
        return TEMPLATE_SETS[templates]
    if isinstance(templates, str) and not _is_path(templates):
        close = nearest(templates, TEMPLATE_SETS)
        raise ConfigError(
            "Unknown set of prompt templates",
            got=templates,
            allowed=", ".join(sorted(TEMPLATE_SETS)) + ", a list of sentences, or a file of them (.txt or .json)",
            remedy=f"did you mean {close[0]}?" if close else None,
        )
    found = _texts(_read(templates), templates, "templates") if isinstance(templates, str) else list(templates)
    sentences = [sentence.replace("{c}", "{}") for sentence in found]
    unusable = [sentence for sentence in sentences if sentence.count("{}") != 1]
    if unusable or not sentences:
        raise ConfigError(
            "A prompt template must hold the placeholder {} once",
            got=unusable[:3] or "no templates",
            allowed='sentences such as "a photo of a {}."',
        )
    return tuple(sentences)


def read_classes(path: str) -> tuple[list[str], list[str] | None]:
    """The names in a file, in the order of the labels, and the templates that it brings along, if any.

    JSON: {"classes": [...], "templates": [...]}, or a list of names. Any other file: a name a line.

    Raises:
        ConfigError: a file that cannot be read, or holds something else.
    """
    document = _read(path)
    if not isinstance(document, dict):
        return _texts(document, path, "classes"), None
    templates = document.get("templates")
    names = _texts(document.get("classes"), path, "classes")
    return names, None if templates is None else _texts(templates, path, "templates")


def _is_path(text: str) -> bool:
    return "/" in text or text.endswith((".txt", ".json"))


def _read(path: str) -> Any:
    """The document of a .json file, the lines of any other that are not empty."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
        return (
            json.loads(text) if path.endswith(".json") else [line.strip() for line in text.splitlines() if line.strip()]
        )
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} cannot be read", got=error, allowed="a .json file, or text with one entry a line",
            remedy="give an existing file, or a list",
        ) from error  # fmt: skip


def _texts(value: Any, path: str, what: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ConfigError(
            f"{path} does not hold {what}",
            got=str(value)[:80],
            allowed='{"classes": ["cat", "dog"], "templates": ["a photo of a {}."]}, or a list of texts',
        )
    return value


def fill(template: str, class_name: str) -> str:
    """The sentence about one class. Not `str.format`: a class name may hold braces."""
    return template.replace("{}", class_name)
