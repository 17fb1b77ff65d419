"""The house of docs/design.md: floors, walls and budgets, checked on the syntax tree of every file."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vlm_train"
FILES = sorted(PACKAGE.rglob("*.py"))

# Higher number = higher floor. A module may import from lower floors, and from its own floor inside the same room.
FLOORS = {
    "errors": 0, "log": 0, "types": 0, "boxes": 0, "locations": 0,
    "signatures": 1, "checks": 1, "schema": 2, "assets": 1, "imaging": 1,
    "data": 3, "models": 3, "distributed": 3,
    "objectives": 4, "evaluation": 4, "export": 4, "curation": 4,
    "engine": 5, "origins": 6, "build": 7, "doctor": 8, "plan": 8, "training": 8, "cli": 9,
}  # fmt: skip
NEVER = {("objectives", "data"), ("evaluation", "data"), ("export", "data"), ("engine", "data")}  # by protocol only
# may import each other, without cycles
LOWEST = {"errors", "log", "types", "boxes", "locations", "signatures", "checks", "schema", "assets", "imaging"}
WALLS = {
    "hydra": {"build", "schema", "cli"},
    "omegaconf": {"build", "schema", "cli"},
    "lightning": {"engine", "training"},
}
NO_TORCH = {"errors", "log", "types", "locations", "schema", "checks", "signatures", "boxes"}
TAKES_ANY = {"_attend"}  # of models/packing.py: transformers calls it with whatever a layer of its was told
MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS, MAX_NESTING = 300, 50, 10, 3


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def runtime_imports(tree: ast.AST) -> list[str]:
    """Modules that a file imports when it runs; `if TYPE_CHECKING:` blocks do not count."""
    found: list[str] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            found += runtime_imports(node)
    return found


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def floor_violations(files: dict[str, list[str]]) -> list[str]:
    """`room: imported room` for every import that does not point down; `files`: room -> imported vlm_train rooms."""
    bad = []
    for room, imported in files.items():
        for other in imported:
            if room == other or (room in LOWEST and other in LOWEST):
                continue
            if FLOORS[other] >= FLOORS[room] or (room, other) in NEVER:
                bad.append(f"{room} -> {other}")
    return bad


def imported_rooms(path: Path) -> list[str]:
    rooms = (name.split(".")[1] for name in runtime_imports(parse(path)) if name.startswith("vlm_train."))
    return [room for room in rooms if room in FLOORS]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    assert room in FLOORS, f"{room} has no floor: give it one here and in docs/design.md"
    assert floor_violations({room: imported_rooms(path)}) == []


def test_an_upward_or_sideways_import_is_noticed() -> None:
    assert floor_violations({"data": ["models"]}) == ["data -> models"]
    assert floor_violations({"objectives": ["engine"]}) == ["objectives -> engine"]
    assert floor_violations({"objectives": ["data"]}) == ["objectives -> data"]
    assert floor_violations({"engine": ["objectives", "distributed"]}) == []


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str] | None:
        if name in trail:
            return trail[trail.index(name) :]
        if name in done:
            return None
        for other in sorted(graph.get(name, ())):
            cycle = visit(other, [*trail, name])
            if cycle:
                return cycle
        done.add(name)
        return None

    return next((cycle for name in sorted(graph) if (cycle := visit(name, []))), None)


def test_no_import_cycle() -> None:
    modules = {module_of(path): path for path in FILES}
    graph = {name: {other for other in runtime_imports(parse(path)) if other in modules and other != name}
             for name, path in modules.items()}  # fmt: skip
    assert find_cycle(graph) is None
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c"]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_walls(path: Path) -> None:
    roots = {name.split(".")[0] for name in runtime_imports(parse(path))}
    for library, rooms in WALLS.items():
        assert library not in roots or room_of(path) in rooms, f"{library} is imported outside {sorted(rooms)}"
    if room_of(path) in NO_TORCH:
        assert "torch" not in roots


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_only_the_command_line_prints(path: Path) -> None:
    prints = [n for n in ast.walk(parse(path)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "print"]
    assert not prints or room_of(path) == "cli"


def nesting(node: ast.AST, depth: int = 0) -> int:
    """Deepest run of blocks inside blocks; an elif is its if, and a function inside starts anew."""
    blocks = ast.If | ast.For | ast.While | ast.With | ast.Try
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        deepest = max(deepest, nesting(child, depth + (isinstance(child, blocks) and not is_elif)))
    return deepest


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_budgets(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < MAX_FUNCTION, f"{node.name} is too long"
            assert nesting(node) <= MAX_NESTING, f"{node.name} is nested too deeply"
            num_parameters = len([a for a in node.args.args + node.args.kwonlyargs if a.arg not in ("self", "cls")])
            assert num_parameters <= MAX_PARAMETERS, f"{node.name} has {num_parameters} parameters"
            assert node.args.kwarg is None or node.name in TAKES_ANY, f"{node.name} swallows keywords"


def same_names(paths: list[Path]) -> set[str]:
    return {path.name for path in paths if path.name != "conftest.py" and [p.name for p in paths].count(path.name) > 1}


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports a test by the name of its file alone: of two, it would run one."""
    assert same_names(sorted((ROOT / "tests").rglob("*.py"))) == set()
    assert same_names([Path("a/test_x.py"), Path("b/test_x.py"), Path("b/test_y.py")]) == {"test_x.py"}  # the twin


def test_tests_mirror_the_package() -> None:
    """A test file under tests/<room>/ tests a module of that room (test_x*.py for x.py)."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        relative = path.relative_to(ROOT / "tests").parent
        if relative.parts:
            assert (PACKAGE / relative).is_dir(), f"{path} mirrors no folder of the package"


def test_objective_files_and_configs_have_the_same_names() -> None:
    """A config builds what the file of its name holds, or is a weighted sum of such objectives."""
    for path in sorted((ROOT / "conf/objective").glob("*.yaml")):
        named = r"^(?:objective:\n  )?_target_: vlm_train\.objectives\.(\w+)\."
        (file,) = re.findall(named, path.read_text(), re.MULTILINE)
        assert file in (path.stem, "weighted")
