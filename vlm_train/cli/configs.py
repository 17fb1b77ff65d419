"""`vlm-train configs list|show|keys|search`: what can be chosen, what a choice says, and where a key lives."""

from __future__ import annotations

from vlm_train.cli.paths import conf_dir, groups, headline
from vlm_train.errors import ConfigError, nearest
from vlm_train.locations import scrubbed

USAGE = """usage: vlm-train configs list                      every group with its choices and what they are for
       vlm-train configs show GROUP/CHOICE        the file itself
       vlm-train configs show [group=choice ...]  the composed config
       vlm-train configs keys                     every key of the composed config with its value
       vlm-train configs search WORD              keys and choices that contain WORD, and their files"""


def main(words: list[str]) -> int:
    """Runs the verb."""
    if not words or any(word in ("-h", "--help") for word in words):
        print(USAGE)
        return 0
    actions = {"list": _list, "show": _show, "keys": _keys, "search": _search}
    if words[0] not in actions:
        close = nearest(words[0], actions)
        raise ConfigError("vlm-train configs does not know this action", got=words[0], allowed=", ".join(actions),
                          remedy=f"vlm-train configs {close[0] if close else '--help'}")  # fmt: skip
    actions[words[0]](words[1:])
    return 0


def _list(words: list[str]) -> None:
    if words:
        raise ConfigError("vlm-train configs list takes no words", got=" ".join(words), allowed="no words",
                          remedy=f"vlm-train configs search {words[0]}")  # fmt: skip
    for group, choices in groups().items():
        print(group)
        for choice in choices:
            print(f"  {choice:20} {headline(conf_dir() / group / f'{choice}.yaml')}")


def _show(words: list[str]) -> None:
    if len(words) == 1 and "/" in words[0] and "=" not in words[0]:
        known = [f"{group}/{choice}" for group, choices in groups().items() for choice in choices]
        if words[0] not in known:
            close = nearest(words[0], known)
            raise ConfigError(
                "no such config file",
                got=words[0],
                allowed="GROUP/CHOICE",
                remedy=f"vlm-train configs show {close[0]}" if close else "vlm-train configs list",
            )
        print((conf_dir() / f"{words[0]}.yaml").read_text(), end="")
        return
    from omegaconf import OmegaConf

    from vlm_train.cli.compose import compose_config

    print(scrubbed(OmegaConf.to_yaml(compose_config(words, checked=False))), end="")


def _keys(words: list[str]) -> None:
    for key, value in _flat(words).items():
        print(scrubbed(f"{key} = {value}"))


def _search(words: list[str]) -> None:
    if not words:
        raise ConfigError("vlm-train configs search needs a word", got="no word", allowed="a part of a key or choice",
                          remedy="vlm-train configs search lr")  # fmt: skip
    from vlm_train.cli.compose import defining_file

    word, hits = words[0].lower(), 0
    for group, choices in groups().items():
        for choice in choices:
            if word in f"{group}={choice}".lower() or word in headline(conf_dir() / group / f"{choice}.yaml").lower():
                print(f"{group}={choice}  {headline(conf_dir() / group / f'{choice}.yaml')}")
                hits += 1
    for key, value in _flat(words[1:]).items():
        if word in key.lower():
            print(scrubbed(f"{key}={value}  ({defining_file(key)})"))
            hits += 1
    if not hits:
        print(f"nothing contains {words[0]!r}; closest: {', '.join(nearest(words[0], _flat([]))) or 'none'}")


def _flat(words: list[str]) -> dict[str, object]:
    from omegaconf import OmegaConf

    from vlm_train.cli.compose import compose_config
    from vlm_train.schema import flatten

    return flatten(OmegaConf.to_container(compose_config(words, checked=False)))
