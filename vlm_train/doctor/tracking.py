"""Weights & Biases: whether rows would arrive."""

from __future__ import annotations

import netrc
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlparse

from vlm_train.doctor.findings import GREEN, RED, Finding

_HOST = "https://api.wandb.ai"


def wandb(name: str, mode: str, environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """`name`, `mode`: of the config's logger; WANDB_MODE changes nothing of them."""
    if name != "wandb" or mode == "offline":
        yield Finding("wandb", GREEN, "not asked for" if name != "wandb" else f"{mode}: rows stay in the run's folder")
    elif has_key(environment):
        yield Finding("wandb", GREEN, "online, a key is there")
    else:
        yield Finding("wandb", RED, "online, and nobody is logged in",
                      "wandb login, WANDB_API_KEY in the environment, or logger.mode=offline")  # fmt: skip


def has_key(environment: Mapping[str, str]) -> bool:
    """Whether the environment or ~/.netrc has a key for the server."""
    if environment.get("WANDB_API_KEY"):
        return True
    host = urlparse(environment.get("WANDB_BASE_URL") or _HOST).hostname or ""
    path = environment.get("NETRC") or Path(environment.get("HOME", "~")).expanduser() / ".netrc"
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
