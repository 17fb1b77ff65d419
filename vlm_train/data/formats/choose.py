"""Which format a shard has: its name says it, and a folder is a table of files."""

from __future__ import annotations

import os
from functools import cache
from typing import Literal

from vlm_train.data.files import Stat
from vlm_train.data.formats.base import Format
from vlm_train.data.storage import open_file
from vlm_train.locations import is_remote, name_of

Kind = Literal["tar", "beton", "table"]


def kind_of(location: str) -> Kind:
    """What is neither .beton nor a folder is taken for a tar, which its bytes must confirm."""
    if name_of(location).lower().endswith(".beton"):
        return "beton"
    return "table" if not is_remote(location) and os.path.isdir(location) else "tar"


@cache
def format_of(location: str) -> Format:
    """The format of a shard."""
    kind = kind_of(location)
    if kind == "beton":
        from vlm_train.data.formats.beton import BetonFormat

        return BetonFormat()
    if kind == "table":
        from vlm_train.data.formats.table import TableFormat

        return TableFormat(location)
    from vlm_train.data.formats.tar import TarFormat

    return TarFormat()


def stat_of(location: str) -> Stat:
    """Size and version of a shard: what tells whether it must be indexed again.

    Raises:
        OSError: it cannot be had.
    """
    if kind_of(location) == "table":
        from vlm_train.data.formats.table import TableFormat

        return TableFormat(location).stat()
    return open_file(location).stat()
