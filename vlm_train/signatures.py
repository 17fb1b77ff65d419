"""Constructor signatures read from source files, so that a config is checked without importing torch.

YAML keys equal keyword parameters throughout this package; a key that its constructor does not know, or a required one
that is missing, is therefore an error that can be found in milliseconds.
"""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_train.errors import ConfigError, nearest

PACKAGE = Path(__file__).resolve().parent
# Arguments that build.py passes at run time; they never stand in YAML.
RUNTIME_ARGUMENTS = {"spec", "texts"}
SCALARS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def check_targets(node: Any, where: str = "") -> None:
    """Compares the keys of every `_target_` node below `node` with the constructor it names. Raises ConfigError."""
    if isinstance(node, list):
        for index, item in enumerate(node):
            check_targets(item, f"{where}[{index}]")
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        _check_target(node, where)
    for key, value in node.items():
        check_targets(value, f"{where}.{key}" if where else str(key))


def _check_target(node: dict[str, Any], where: str) -> None:
    target = str(node["_target_"])
    if not target.startswith("vlm_train."):
        raise ConfigError(f"{where}._target_ names code outside vlm_train", got=target, allowed="vlm_train.*",
                          remedy="wrap it in a small class of this package, so that its keys are checked")  # fmt: skip
    parameters = signature_of(target)
    allowed = {parameter.name for parameter in parameters}
    # the tokenizer is a sibling that the model group carries because both must agree; build.py takes it out
    given = {key for key in node if not key.startswith("_")} - ({"tokenizer"} if where == "model" else set())
    for key in sorted(given - allowed):
        close = nearest(key, allowed)
        raise ConfigError(f"{where} has no key {key!r} (it is built by {target})", got=key,
                          allowed=", ".join(sorted(allowed)) or "no keys",
                          remedy=f"{where}.{close[0]}=..." if close else None)  # fmt: skip
    for parameter in parameters:
        if parameter.name in given:
            _check_scalar(f"{where}.{parameter.name}", node[parameter.name], parameter.annotation)
        elif parameter.required:
            raise ConfigError(f"{where}.{parameter.name} has no value ({target} needs it)",
                              allowed="a value", remedy=f"add {where}.{parameter.name}=...")  # fmt: skip


def _check_scalar(key: str, value: object, annotation: str) -> None:
    """Refuses a word where a number is wanted; annotations that are no plain scalar are left to the constructor."""
    names = [part.strip() for part in annotation.split("|")]
    optional = "None" in names
    kinds = [SCALARS.get(name) for name in names if name != "None"]
    if (value is None and optional) or not kinds or None in kinds:
        return
    types = tuple(kind for group in kinds if group for kind in group)
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise ConfigError(f"{key} cannot take this value", got=repr(value), allowed=annotation)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One keyword of a constructor; `annotation` as its source text."""

    name: str
    annotation: str
    required: bool


@functools.cache
def signature_of(target: str) -> tuple[Parameter, ...]:
    """The keywords of a class or function of this package, read from source without importing it."""
    parts = target.split(".")[1:]
    for split in range(len(parts) - 1, 0, -1):
        path = PACKAGE.joinpath(*parts[:split]).with_suffix(".py")
        if path.is_file():
            found = [item for item in _signature_in(path, parts[split:], target) if item.name not in RUNTIME_ARGUMENTS]
            return tuple(found)
    raise ConfigError("_target_ names no module of this package", got=target, allowed="vlm_train.<module>.<Class>")


def _signature_in(path: Path, names: list[str], target: str) -> list[Parameter]:
    body = ast.parse(path.read_text()).body
    found: ast.ClassDef | ast.FunctionDef | None = None
    for name in names:
        known = {item.name: item for item in body if isinstance(item, ast.ClassDef | ast.FunctionDef)}
        if name not in known:
            raise ConfigError(f"_target_ names nothing in {path.relative_to(PACKAGE.parent)}", got=target,
                              allowed=", ".join(sorted(known)))  # fmt: skip
        found = known[name]
        body = found.body
    return _class_signature(found, path, target) if isinstance(found, ast.ClassDef) else _function_signature(found)


def _class_signature(node: ast.ClassDef, path: Path, target: str) -> list[Parameter]:
    inits = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
    if inits:
        return _function_signature(inits[0])
    if node.bases and isinstance(node.bases[0], ast.Name):  # the constructor of a base class in the same file
        return _signature_in(path, [node.bases[0].id], target)
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)]
    return [Parameter(ast.unparse(item.target), ast.unparse(item.annotation), item.value is None) for item in fields]


def _function_signature(node: ast.FunctionDef | None) -> list[Parameter]:
    assert node is not None
    positional = [arg for arg in node.args.args if arg.arg not in ("self", "cls")]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(node.args.defaults)) + list(node.args.defaults)
    pairs = [*zip(positional, defaults, strict=True), *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
    return [
        Parameter(arg.arg, ast.unparse(arg.annotation) if arg.annotation else "", default is None)
        for arg, default in pairs
    ]
