"""Overrides to one resolved, checked config. Hydra composes once, here; every rank loads the result.

What Hydra reports about a misspelt key or choice is turned into one message with the nearest name and the file that
defines it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlm_train.cli.paths import conf_dir, groups
from vlm_train.errors import ConfigError, nearest
from vlm_train.locations import scrubbed
from vlm_train.schema import Config, check, flatten


def compose_config(words: Sequence[str], *, checked: bool = True) -> DictConfig:
    """The config that these command-line words describe. Raises ConfigError."""
    given, extra = _split_config_dir(words)
    overrides = [_readable(word) for word in given]
    search = [f"hydra.searchpath=[file://{extra}]"] if extra else []
    try:
        config = _compose([*search, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error, overrides, search) from error
    if checked:
        check(config)
    return config


def _compose(overrides: list[str]) -> DictConfig:
    OmegaConf.register_new_resolver("prior_logit", lambda num: -math.log(max(num - 1, 1)), replace=True)
    ConfigStore.instance().store(name="base_config", node=Config)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        full = compose("train", overrides=overrides, return_hydra_config=True)
    choice = full.hydra.runtime.choices.get("experiment")
    config = OmegaConf.masked_copy(full, [str(key) for key in full if key != "hydra"])
    if config.run.experiment is None:
        config.run.experiment = choice or "default"
    OmegaConf.resolve(config)
    for key in map(str, config):  # `+key=value` can add to the root, where nothing would ever read it
        if key not in Config.__dataclass_fields__:
            raise ConfigError(f"no such key: {key}", got=f"+{key}", allowed=", ".join(Config.__dataclass_fields__))
    return config


def _readable(word: str) -> str:
    """The word as Hydra's grammar reads it: a text that the grammar cannot read, like a brace pattern, is quoted."""
    key, separator, value = word.partition("=")
    if not separator and not word.startswith("~"):
        raise ConfigError("not an override", got=word, allowed="group=choice or key=value", remedy=f"{word}=...")
    try:
        OverridesParser.create().parse_override(word)
        return word
    except HydraException:
        if value.startswith(("[", "'", '"')):
            raise ConfigError(
                "an override cannot be parsed",
                got=scrubbed(word),
                allowed="key=value; lists and texts as 'key=[1,2]', 'key=\"a, b\"', 'key=[\"https://a/b?c=d\"]'",
            ) from None
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'{key}="{escaped}"'


def _split_config_dir(words: Sequence[str]) -> tuple[list[str], str | None]:
    """Takes `--config-dir DIR` or `--config-dir=DIR` out of the words."""
    rest: list[str] = []
    found: str | None = None
    pending = iter(words)
    for word in pending:
        if word == "--config-dir":
            found = next(pending, None)
        elif word.startswith("--config-dir="):
            found = word.partition("=")[2]
        else:
            rest.append(word)
    if found is not None and not Path(found).is_dir():
        raise ConfigError(
            "--config-dir is no folder", got=found, allowed="a folder that holds group folders like conf/"
        )
    return rest, str(Path(found).resolve()) if found else None


def _explain(error: Exception, overrides: list[str], search: list[str]) -> ConfigError:
    if isinstance(error, MissingConfigException) or "Could not find" in str(error):
        return _explain_choice(error)
    if "Ambiguous value" in str(error):
        word = str(error).splitlines()[0].partition("'")[2].rstrip("'")
        return ConfigError(
            "a comma outside quotes is ambiguous", got=word, allowed="'key=[a,b]' for a list, 'key=\"a,b\"' for a text"
        )
    key = _key_of(error)
    if key is None:
        return ConfigError(f"the config does not compose: {_first_line(error)}", remedy="vlm-train configs list")
    if _is_unknown_key(error):
        return _explain_key(key, search + [word for word in overrides if _is_group(word)])
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    return ConfigError(
        f"{key} cannot take this value: {_first_line(cause)}", remedy=f"vlm-train configs search {key.split('.')[-1]}"
    )


def _explain_choice(error: Exception) -> ConfigError:
    name = str(getattr(error, "missing_cfg_file", None) or _first_line(error))
    group, _, choice = name.rpartition("/")
    known = list(getattr(error, "options", None) or groups().get(group, []))
    close = nearest(choice, known)
    return ConfigError(
        f"no such choice in the group {group!r}" if group else f"no such config: {name}",
        got=choice,
        allowed=", ".join(known) or ", ".join(groups()),
        remedy=f"{group}={close[0]} (defined in conf/{group}/{close[0]}.yaml)" if close else "vlm-train configs list",
    )


def _explain_key(key: str, group_overrides: list[str]) -> ConfigError:
    try:
        config: Any = OmegaConf.to_container(_compose(group_overrides), resolve=False)
        known = list(flatten(config))
        parents = {name.rsplit(".", depth)[0] for name in known for depth in range(1, name.count(".") + 1)}
        close = nearest(key, [*known, *parents, *groups()])
    except (HydraException, OmegaConfBaseException):
        close = []
    remedy = (
        f"{close[0]}=... (defined in {defining_file(close[0])})"
        if close
        else f"vlm-train configs search {key.split('.')[-1]}"
    )
    return ConfigError(f"no such key: {key}", got=key, allowed=", ".join(close) or None, remedy=remedy)


def defining_file(key: str) -> str:
    """Which config file gives `key` its value, relative to the config folder; the schema if none does."""
    first, _, last = key.partition(".")
    leaf = re.compile(rf"(^|[\s{{,]){re.escape((last or first).rsplit('.', 1)[-1])}\s*:", re.MULTILINE)
    for path in [*sorted((conf_dir() / first).glob("*.yaml")), conf_dir() / "train.yaml"]:
        if path.is_file() and leaf.search(path.read_text()):
            return f"conf/{path.relative_to(conf_dir())}"
    return "vlm_train/schema.py"


def _is_group(word: str) -> bool:
    return word.partition("=")[0].lstrip("+~") in groups()


def _key_of(error: Exception) -> str | None:
    text = f"{error}\n{error.__cause__ or ''}"
    for pattern in (
        r"full_key: ([\w.]+)",
        r"[Cc]ould not override '([\w.]+)'",
        r"Key '([\w.]+)'",
        r"override '([\w.]+)'",
    ):
        found = re.search(pattern, text)
        if found:
            return found.group(1)
    return None


def _is_unknown_key(error: Exception) -> bool:
    text = f"{error}\n{error.__cause__ or ''}"
    return "not in" in text or "is not in struct" in text or "No match in the defaults list" in text


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
