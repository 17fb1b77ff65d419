"""Where the configs lie: beside the package in a checkout, inside it in a wheel. No Hydra import."""

from __future__ import annotations

from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


@cache
def conf_dir() -> Path:
    """The folder of config groups."""
    inside = PACKAGE / "conf"
    return inside if inside.is_dir() else PACKAGE.parent / "conf"


@cache
def slurm_dir() -> Path:
    """The folder of the template of jobs, which lies where the configs do."""
    return conf_dir().parent / "slurm"


@cache
def groups() -> dict[str, list[str]]:
    """group -> its choices, sorted."""
    return {
        folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
        for folder in sorted(conf_dir().iterdir())
        if folder.is_dir()
    }


def headline(path: Path) -> str:
    """The first comment line of a config file: what it is for."""
    for line in path.read_text().splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ").strip()
    return ""
