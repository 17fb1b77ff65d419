"""Overrides to one resolved, checked config. Hydra composes once, here; every rank loads the result.

What Hydra reports about a misspelt key or choice is turned into one message with the nearest name and the file that
defines it.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlm_train.cli.overrides import is_group, not_taken_out, read, split_config_dir
from vlm_train.cli.paths import conf_dir, groups
from vlm_train.errors import ConfigError, VlmError, nearest
from vlm_train.schema import Config, check, flatten
from vlm_train.signatures import signature_of


def compose_config(words: Sequence[str], *, checked: bool = True) -> DictConfig:
    """The config that these command-line words describe. Raises ConfigError."""
    config = composed(words, _training)
    if checked:
        check(config)
    return config


def composed(words: Sequence[str], compose_root: Callable[[list[str]], DictConfig]) -> DictConfig:
    """What `compose_root` composes of command-line words. Raises ConfigError."""
    given, extra = split_config_dir(words)
    overrides = [read(word).input_line or word for word in given]
    search = [f"hydra.searchpath=[file://{extra}]"] if extra else []
    try:
        return compose_root([*search, *overrides])
    except VlmError:
        raise
    except Exception as error:  # Hydra, OmegaConf and YAML raise whatever they like on what they did not expect
        raise _explain(error, overrides, search, compose_root) from error


def _training(overrides: list[str]) -> DictConfig:
    OmegaConf.register_new_resolver("prior_logit", lambda num: -math.log(max(num - 1, 1)), replace=True)
    full = of_root("train", Config, overrides)
    choice = full.hydra.runtime.choices.get("experiment")
    config = own(full)
    if config.run.experiment is None:
        config.run.experiment = re.sub(r"\W+", "-", str(choice)).strip("-") if choice else "default"
    resolve(config)
    return config


def of_root(name: str, schema: type, overrides: list[str]) -> DictConfig:
    """conf/NAME.yaml with its groups and overrides, in the shape of a dataclass; and what Hydra says of itself."""
    ConfigStore.instance().store(name="base_config", node=schema)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose(name, overrides=overrides, return_hydra_config=True)


def own(full: DictConfig) -> DictConfig:
    """A composed config without what Hydra says of itself."""
    return OmegaConf.masked_copy(full, [str(key) for key in full if key != "hydra"])


def resolve(config: DictConfig) -> None:
    """Puts the value of another key wherever `${KEY}` stands for it. Raises ConfigError."""
    try:
        OmegaConf.resolve(config)
    except (OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(
            f"{_unresolved(config) or 'the config'} cannot be resolved: {_first_line(error)}",
            got="${...}",
            allowed="${KEY} of a key that is there",
            remedy="vlm-train configs keys",
        ) from error


def _unresolved(node: Any, where: str = "") -> str | None:
    """The first key below a node whose `${...}` has no value."""
    for name in range(len(node)) if OmegaConf.is_list(node) else list(node):
        key = f"{where}.{name}" if where else str(name)
        try:
            value = None if OmegaConf.is_missing(node, name) else node[name]
            if OmegaConf.is_interpolation(node, name):
                copy.deepcopy(node)[name] = value  # refused where it is of another type than the key's
        except (OmegaConfBaseException, RecursionError):
            return key
        is_own = OmegaConf.is_config(value) and not OmegaConf.is_interpolation(node, name)
        found = _unresolved(value, key) if is_own else None
        if found is not None:
            return found
    return None


def _explain(
    error: Exception, overrides: list[str], search: list[str], compose_root: Callable[[list[str]], DictConfig]
) -> ConfigError:
    if isinstance(error, MissingConfigException) or "Could not find" in str(error):
        return _explain_choice(error)
    deleted = [word for word in overrides if word.startswith("~")]
    if deleted and re.search(r"support deletion|Could not delete", f"{error}\n{error.__cause__ or ''}"):
        return not_taken_out(next((word for word in deleted if word.strip("~") in str(error)), deleted[0]))
    key = _key_of(error)
    if key is None:
        return ConfigError(
            f"the config does not compose: {_first_line(error)}",
            got=" ".join(overrides) or "no words",
            allowed="group=choice and key=value, and files of these",
            remedy="vlm-train configs list",
        )
    if _is_unknown_key(error):
        return _explain_key(key, search + [word for word in overrides if is_group(word)], compose_root)
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    return ConfigError(
        f"{key} cannot take this value: {_first_line(cause)}",
        got=next((word for word in reversed(overrides) if word.lstrip("+~").startswith(key)), key),
        allowed="a value of the type of this key",
        remedy=f"vlm-train configs search {key.split('.')[-1]}",
    )


def _explain_choice(error: Exception) -> ConfigError:
    name = str(getattr(error, "missing_cfg_file", None) or _first_line(error))
    group, _, choice = name.partition("/") if "/" in name else ("", "", name)
    known = list(getattr(error, "options", None) or groups().get(group, []))
    close = nearest(choice, known)
    return ConfigError(
        f"no such choice in the group {group!r}" if group else f"no such config: {name}",
        got=choice,
        allowed=", ".join(known) or ", ".join(groups()),
        remedy=f"{group}={close[0]} (defined in conf/{group}/{close[0]}.yaml)" if close else "vlm-train configs list",
    )


def _explain_key(key: str, group_overrides: list[str], compose_root: Callable[[list[str]], DictConfig]) -> ConfigError:
    try:
        config: Any = OmegaConf.to_container(compose_root(group_overrides), resolve=False)
        known = [name for name in flatten(config) if not name.endswith("._target_")]
        parents = {name.rsplit(".", depth)[0] for name in known for depth in range(1, name.count(".") + 1)}
        close = nearest(key, [*known, *parents, *groups()])
        node, _, last = key.rpartition(".")
        target = OmegaConf.select(OmegaConf.create(config), f"{node}._target_")
    except Exception:  # as above; a wrong key can be told without the nearest one
        close, target, last = [], None, ""
    if target and last in {parameter.name for parameter in signature_of(target)}:
        return ConfigError(f"the config does not have {key} yet", got=key, allowed=f"+KEY=VALUE of what {target} takes",
                          remedy=f"+{key}=...")  # fmt: skip
    remedy = (
        f"{close[0]}=... (defined in {defining_file(close[0])})"
        if close
        else f"vlm-train configs search {key.split('.')[-1]}"
    )
    return ConfigError(f"no such key: {key}", got=key, allowed=", ".join(close) or "a key of the config", remedy=remedy)


def defining_file(key: str) -> str:
    """Which config file gives `key` its value, relative to the config folder; the schema if none does."""
    first, _, last = key.partition(".")
    leaf = re.compile(rf"(^|[\s{{,]){re.escape((last or first).rsplit('.', 1)[-1])}\s*:", re.MULTILINE)
    for path in [*sorted((conf_dir() / first).glob("*.yaml")), conf_dir() / "train.yaml"]:
        if path.is_file() and leaf.search(path.read_text()):
            return f"conf/{path.relative_to(conf_dir())}"
    return "vlm_train/schema.py"


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
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
