"""Words of the command line that change a config: `group=choice` and `key=value`, as Hydra's grammar reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from vlm_train.checks.values import said
from vlm_train.cli.options import taken
from vlm_train.cli.paths import groups
from vlm_train.errors import ConfigError, nearest
from vlm_train.schema import Config

_UNREADABLE = (HydraException, ValueError, RecursionError)  # numbers of thousands of digits, lists in lists in lists
_ALLOWED = "key=value; lists and texts as 'key=[1,2]', 'key=\"a, b\"', 'key=[\"a=b\",\"c, d\"]'"


def read(word: str) -> Override:
    """What a word says. A text that the grammar cannot read, like a brace pattern, is taken as it is.

    Raises:
        ConfigError: it says nothing, or what no config can take.
    """
    key, separator, value = word.partition("=")
    if not separator and not word.startswith("~"):
        raise ConfigError("not an override", got=word, allowed="group=choice or key=value", remedy=f"{word}=...")
    found = _parsed(word)
    if found is None and not value.startswith(("[", "'", '"')):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        found = _parsed(f'{key}="{escaped}"')
    if found is None:
        raise ConfigError("an override cannot be parsed", got=said(word), allowed=_ALLOWED,
                          remedy="mend the quotes and brackets, or the key")  # fmt: skip
    _check(found, word)
    return found


def alternatives(word: str) -> list[str]:
    """`KEY=A,B,C`, as Hydra's grammar reads a choice or a range, as the words KEY=A, KEY=B and KEY=C.

    Raises:
        ConfigError: it is no such word.
    """
    found = _parsed(word)
    try:
        values = [] if found is None or found.is_delete() else list(found.sweep_string_iterator())
    except HydraException:  # one value, or a sweep that cannot be counted
        values = []
    if len(set(values)) < max(len(values), 2):
        raise ConfigError("a sweep has several values, each once", got=said(word),
                          allowed="KEY=A,B,C, or KEY=range(0,5)",
                          remedy="seed=0,1,2; for one value leave out --sweep")  # fmt: skip
    words = [f"{word.partition('=')[0]}={value}" for value in values]
    for each in words:
        read(each)
    return words


def split_config_dir(words: Sequence[str]) -> tuple[list[str], str | None]:
    """Takes `--config-dir DIR` or `--config-dir=DIR` out of the words. Raises ConfigError."""
    rest, found = taken(words, "--config-dir")
    if not found:
        return rest, None
    if len(found) > 1 or not found[0] or not Path(found[0]).is_dir():
        raise ConfigError(
            "--config-dir is given twice" if len(found) > 1 else "--config-dir is no folder",
            got=" and ".join(found) or "nothing",
            allowed="one folder that holds group folders like conf/",
            remedy="--config-dir DIR",
        )
    return rest, str(Path(found[0]).resolve())


def is_group(word: str) -> bool:
    """Whether a word chooses in a group of ours."""
    return word.partition("=")[0].lstrip("+~") in groups()


def not_taken_out(word: str) -> ConfigError:
    """What is said of a `~key` that cannot be left out of a config, or is not there."""
    key = word.lstrip("~").partition("=")[0]
    return ConfigError(
        f"{key} cannot be taken out",
        got=said(word),
        allowed="~KEY of what a config added below a key: an evaluator, a stage, a source",
        remedy=f"{key}=VALUE if it is a key (vlm-train configs search {key.split('.')[-1]})",
    )


def _parsed(word: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(word)
    except _UNREADABLE:
        return None


def _check(found: Override, word: str) -> None:
    key = str(found.key_or_group)
    if not key or key.partition(".")[0].partition("/")[0] == "hydra":
        raise ConfigError(f"no such key: {key}", got=said(word), allowed="group=choice or key=value",
                          remedy="vlm-train configs keys")  # fmt: skip
    if found.is_delete():
        if key in Config.__dataclass_fields__:
            raise not_taken_out(word)
        return
    if found.is_sweep_override():
        raise ConfigError(f"{key} needs one value; a comma outside quotes is ambiguous", got=said(word),
                          allowed="'key=[a,b]' for a list, 'key=\"a,b\"' for a text",
                          remedy=f"{key}=VALUE")  # fmt: skip
    value = found.value()
    chosen = value if isinstance(value, list) else [value]
    if key in groups() and not all(isinstance(name, str) and name and "${" not in name for name in chosen):
        close = nearest(str(value), groups()[key])
        raise ConfigError(f"no such choice in the group {key!r}", got=said(word), allowed=", ".join(groups()[key]),
                          remedy=f"{key}={(close or groups()[key])[0]}")  # fmt: skip
