"""Sentences into which a class name is put before it is embedded. `{}` stands for the name.

`simple` is the set of seven that CLIP's authors chose greedily from their eighty for ImageNet (openai/CLIP,
notebooks/Prompt_Engineering_for_ImageNet.ipynb); `generic` and `plain` make no assumption about the pictures. Any other
set, the eighty included, is given as a list in the config or in the `templates` of a classes file.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    """The sentences of a named set, or the given ones, checked.

    Raises:
        ConfigError: unknown name, empty list, or a sentence without `{}`.
    """
    if isinstance(templates, str):
        if templates not in TEMPLATE_SETS:
            close = nearest(templates, TEMPLATE_SETS)
            raise ConfigError(
                "Unknown set of prompt templates",
                got=templates,
                allowed=", ".join(sorted(TEMPLATE_SETS)) + ", or a list of sentences",
                remedy=f"did you mean {close[0]}?" if close else None,
            )
        return TEMPLATE_SETS[templates]
    unusable = [sentence for sentence in templates if sentence.count("{}") != 1]
    if unusable or not templates:
        raise ConfigError(
            "A prompt template must hold the placeholder {} once",
            got=unusable[:3] or "no templates",
            allowed='sentences such as "a photo of a {}."',
        )
    return tuple(templates)


def fill(template: str, class_name: str) -> str:
    """The sentence about one class. Not `str.format`: a class name may hold braces."""
    return template.replace("{}", class_name)
