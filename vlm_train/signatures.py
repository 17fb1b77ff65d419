"""Constructor signatures read from source files, so that a config is checked without importing torch.

YAML keys equal keyword parameters throughout this package; a key that its constructor does not know, or a required one
that is missing, is therefore an error that can be found in milliseconds.
"""

from __future__ import annotations

import ast
import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_train.checks.values import said
from vlm_train.errors import ConfigError, nearest

PACKAGE = Path(__file__).resolve().parent
# Arguments that build.py or a model passes at run time; they never stand in YAML, unless they have a default.
RUNTIME_ARGUMENTS = {"spec", "texts", "in_dim", "out_dim", "num_patches"}
_MANY = 2**31 - 1  # each int of a part is a count
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
    try:
        parameters = signature_of(target)
    except ConfigError as error:
        raise ConfigError(f"{where}.{error.what}", got=error.got, allowed=error.allowed,
                          remedy="vlm-train configs list tells the choices that are there") from None  # fmt: skip
    allowed = {parameter.name for parameter in parameters}
    # the tokenizer is a sibling that the model group carries because both must agree; build.py takes it out
    given = {str(key) for key in node if not str(key).startswith("_")} - ({"tokenizer"} if where == "model" else set())
    for key in sorted(given - allowed):
        close = nearest(key, allowed)
        raise ConfigError(f"{where} has no key {key!r} (it is built by {target})", got=key,
                          allowed=", ".join(sorted(allowed)) or "no keys",
                          remedy=f"{where}.{close[0]}=..." if close else f"leave it out: ~{where}.{key}")  # fmt: skip
    for parameter in parameters:
        if parameter.name in given:
            _check_value(f"{where}.{parameter.name}", node[parameter.name], parameter.annotation)
        elif parameter.required:
            raise ConfigError(f"{where}.{parameter.name} has no value ({target} needs it)",
                              got=", ".join(sorted(given)) or "no keys", allowed="a value",
                              remedy=f"add {where}.{parameter.name}=...")  # fmt: skip


def _check_value(key: str, value: object, annotation: str) -> None:
    """Refuses what no part of an annotation allows; where one part is a class, that is left to the constructor."""
    fits = [_fits(value, name) for name in re.split(r"\s*\|\s*(?![^\[]*\])", annotation)]
    if None in fits or any(fits):
        return
    is_count = isinstance(value, int) and not isinstance(value, bool) and "int" in annotation
    raise ConfigError(f"{key} cannot take this value", got=said(value),
                      allowed=f"{annotation}, from 0 to {_MANY}" if is_count else annotation,
                      remedy=f"vlm-train configs search {key.rpartition('.')[2]}")  # fmt: skip


def _fits(value: object, name: str) -> bool | None:
    """Whether a value is what one part of an annotation names; None for what only the constructor knows."""
    kind, _, inside = name.removesuffix("]").partition("[")
    if kind == "None" or value is None:
        return kind == "None" and value is None
    if kind in SCALARS:
        is_one = isinstance(value, SCALARS[kind]) and isinstance(value, bool) == (kind == "bool")
        return is_one and not (kind == "int" and isinstance(value, int) and not 0 <= value <= _MANY)
    if kind == "Literal":
        return value in ast.literal_eval(f"[{inside}]")
    if kind in ("Sequence", "list", "tuple"):
        length = inside.count(",") + 1 if kind == "tuple" else None
        return isinstance(value, list) and length in (None, len(value))
    return isinstance(value, dict) if kind in ("Mapping", "dict") else None


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
            found = _signature_in(path, parts[split:], target)
            return tuple(item for item in found if not (item.required and item.name in RUNTIME_ARGUMENTS))
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
