"""Which engine a verb of curation works with: `--engine local|ray|slurm`, and what belongs to each."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vlm_train.cli.options import Option, choice, count, plain
from vlm_train.errors import ConfigError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from vlm_train.curation.engines import Engine

_MOST_WORKERS = 1024
_SLURM_KEYS = ("partition", "account", "qos", "constraint", "time", "mem", "cpus", "gres")
_CALLS = ".vlm-train-slurm"  # nobody else's: what is in it is removed
_UNFINISHED = re.compile(r"\..+\.[0-9]+\.tmp")  # as `write_whole` calls it
_BELONGS = {"--ray-address": "ray", "--slurm": "slurm"}


def _pairs(name: str, text: str) -> dict[str, str]:
    """Values by keys of `partition=cpu,time=60`. A word without = goes on with the value before it, as the second of
    `gres=gpu:1,shard:2` does."""
    found: dict[str, str] = {}
    key = ""
    for word in text.split(","):
        before, separator, value = word.partition("=")
        if separator:
            key = before.strip()
        if not key or (separator and key in found):
            raise ConfigError(f"{name} is no list of values", got=text, allowed="KEY=VALUE,KEY=VALUE, each key once",
                              remedy=f"{name} partition=cpu,time=60")  # fmt: skip
        found[key] = value if separator else f"{found[key]},{word}"
    return _checked(name, found)


def _checked(name: str, values: Mapping[str, Any]) -> dict[str, str]:
    """Values for sbatch as texts. Raises ConfigError for a key that is none, and for no value."""
    texts = {str(key): "" if value is None else str(value).strip() for key, value in values.items()}
    for key, text in texts.items():
        if key not in _SLURM_KEYS:
            close = nearest(key, _SLURM_KEYS)
            raise ConfigError(f"{name} has no such key", got=key, allowed=", ".join(_SLURM_KEYS),
                              remedy=f"{name} {(close or _SLURM_KEYS)[0]}=...")  # fmt: skip
        if not text or (key == "cpus" and not (text.isdecimal() and 0 < int(text) <= _MOST_WORKERS)):
            raise ConfigError(f"{name} cannot take this value of {key}", got=repr(text),
                              allowed="a count" if key == "cpus" else "what sbatch takes",
                              remedy=f"leave out {key}, or give it a value")  # fmt: skip
    return texts


OPTIONS = {
    "--engine": Option(choice("local", "ray", "slurm"), "local"),
    "--num-workers": Option(count(_MOST_WORKERS)),
    "--ray-address": Option(plain),
    "--slurm": Option(_pairs),
}
"""What all verbs that work with an engine take."""


def options_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `OPTIONS` in a config: {engine: NAME, num_workers: N, ray: {address: ...}, slurm: {KEY: VALUE}}.
    Any of them may be left out or null.

    Raises:
        ConfigError: a value that an option could not have, or a key that is none.
    """
    ray = {key: value for key, value in (values.get("ray") or {}).items() if value is not None}
    if unknown := sorted(set(ray) - {"address"}):
        raise ConfigError("ray has no such key", got=unknown[0], allowed="address", remedy="ray: {address: HOST:PORT}")
    slurm = {key: value for key, value in (values.get("slurm") or {}).items() if value is not None}
    if not isinstance(slurm.get("time", ""), str):  # YAML reads 1:00:00 as 3600, which SLURM takes for minutes
        raise ConfigError("slurm.time is no text", got=slurm["time"], allowed="HH:MM:SS in quotes",
                          remedy="time: '01:00:00'")  # fmt: skip
    given = {
        "--engine": values.get("engine"),
        "--num-workers": values.get("num_workers"),
        "--ray-address": ray.get("address"),
    }
    read = {
        name: OPTIONS[name].default if value is None else OPTIONS[name].kind(name, str(value))
        for name, value in given.items()
    }
    return {**read, "--slurm": _checked("slurm", slurm) or None}


@contextmanager
def opened(options: Mapping[str, Any], out: Path) -> Iterator[Engine]:
    """The engine that options of `OPTIONS` mean, for work whose files go to `out`.

    What killed commands left behind in `out` is ended and removed: arrays of SLURM before, unfinished files after.

    Raises:
        ConfigError: an option of another engine.
    """
    from vlm_train.curation import on_slurm
    from vlm_train.curation.engines import Local
    from vlm_train.curation.on_ray import Ray

    name, num_workers = options["--engine"], options["--num-workers"]
    for option, engine in _BELONGS.items():
        if options[option] is not None and name != engine:
            raise ConfigError(f"{option} is about engine {engine}", got=f"{option} with engine {name}",
                              allowed=f"--engine {engine} beside it",
                              remedy=f"--engine {engine}, or leave out {option}")  # fmt: skip
    on_slurm.end_left(out / _CALLS)
    if name == "slurm":
        others = dict(options["--slurm"] or {})
        cpus, gres = int(others.pop("cpus", 1)), others.pop("gres", None)
        yield on_slurm.Slurm(folder=out / _CALLS, num_workers=num_workers, cpus=cpus, gres=gres, options=others)
    elif name == "ray":
        ray = Ray(address=options["--ray-address"], num_workers=num_workers)
        try:
            yield ray
        finally:
            ray.close()
    else:
        yield Local(num_workers=num_workers)
    for folder in (out, out / "steps", *out.glob("embeddings/*")):
        for left in folder.glob(".*.tmp"):
            if _UNFINISHED.fullmatch(left.name):
                left.unlink()
