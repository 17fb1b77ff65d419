"""What a selection and a walk share on disk: a folder about the rows of a manifest, with `provenance.json` that tells
which manifest, beside a file of content."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from vlm_train.errors import DataError

Part = TypeVar("Part")
NAME = "provenance.json"


def text_of(facts: dict[str, Any]) -> bytes:
    """provenance.json of these facts."""
    return (json.dumps(facts, indent=1, sort_keys=True) + "\n").encode()


def load(source: Path, *, what: str, contents: str, version: int, make: Callable[[dict[str, Any]], Part]) -> Part:
    """What `make` makes of the facts.

    Args:
        source: the folder.
        what: selection or walk, for messages.
        contents: what lies beside provenance.json, for messages.
        version: the newest version of the format that is known.
        make: may raise whatever it likes of a damaged folder.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        facts: dict[str, Any] = json.loads((source / NAME).read_text())
        if facts["version"] > version:
            raise ValueError(f"version {facts['version']} of the format, this release knows {version}")
        return make(facts)
    except Exception as error:  # readers of JSON and of arrays raise whatever they like on damaged bytes
        raise DataError(
            f"{what} `{source}` cannot be read",
            got=f"{type(error).__name__}: {error}",
            allowed=f"a directory with {NAME} and {contents}",
            remedy=f"make the {what} again",
        ) from None


def check_manifest(source: Path, *, what: str, found: str | None, manifest: str) -> None:
    """Refuses rows of another manifest than that of fingerprint `manifest`; None fits any. Raises DataError."""
    if found not in (None, manifest):
        raise DataError(
            f"{what} `{source}` was made for other data",
            got=f"manifest {found}",
            allowed=f"manifest {manifest}",
            remedy="give the shards it was made for, or make it again on these",
        )
