"""Versions: of Python, of what the project asks for, and of releases that nobody may have."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vlm_train.doctor.findings import GREEN, RED, YELLOW, Finding

OLDEST_PYTHON = (3, 11)
BANNED = {
    ("lightning", "2.6.2"): "malware that reads credentials (GHSA-w37p-236h-pfx3)",
    ("lightning", "2.6.3"): "malware that reads credentials (GHSA-w37p-236h-pfx3)",
    ("pytorch-lightning", "2.6.2"): "malware that reads credentials (GHSA-w37p-236h-pfx3)",
    ("pytorch-lightning", "2.6.3"): "malware that reads credentials (GHSA-w37p-236h-pfx3)",
}
"""(package, version) -> why it was withdrawn."""

_CLASHING = ("opencv-python", "opencv-python-headless")


def versions() -> Iterator[Finding]:
    """Of Python and of all packages."""
    names = ((each.metadata["Name"], each.version) for each in metadata.distributions())
    installed: dict[str, str] = {canonicalize_name(name): version for name, version in names if name}
    yield of_python(sys.version_info[:2])
    yield from banned(installed)
    yield from required(metadata.requires("vlm-train") or [], installed)
    if all(name in installed for name in _CLASHING):
        yield Finding("opencv", RED, "opencv-python and opencv-python-headless write over each other's files",
                      f"pip uninstall {' '.join(_CLASHING)}; pip install opencv-python-headless")  # fmt: skip


def of_python(version: tuple[int, ...]) -> Finding:
    """Of the interpreter."""
    seen = f"Python {platform.python_version()}"
    if version < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return Finding("python", RED, seen, f"an environment of Python {oldest} or newer")
    return Finding("python", GREEN, seen)


def banned(installed: Mapping[str, str]) -> Iterator[Finding]:
    """Releases that were withdrawn."""
    for (name, version), why in BANNED.items():
        if installed.get(name) == version:
            yield Finding("banned", RED, f"{name} {version}: {why}",
                          f"pip uninstall {name}, change every password and key this machine knows, then install the "
                          "locked packages")  # fmt: skip


def required(requirements: list[str], installed: Mapping[str, str]) -> Iterator[Finding]:
    """What the project asks for, without its extras."""
    wanted = [Requirement(text) for text in requirements]
    wanted = [each for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    bad = 0
    for each in wanted:
        version = installed.get(canonicalize_name(each.name))
        if version is None or not each.specifier.contains(version, prereleases=True):
            bad += 1
            told = f"{each.name} {version or 'is missing'}; asked for: {each.specifier or 'any'}"
            light = RED if version is None else YELLOW
            yield Finding("packages", light, told, f"pip install '{each.name}{each.specifier}'")
    if not bad:
        names = ("torch", "lightning", "transformers", "timm")
        told = ", ".join(f"{name} {installed[name]}" for name in names if name in installed)
        yield Finding("packages", GREEN, f"all {len(wanted)} in their ranges; {told}")
