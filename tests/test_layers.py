"""The order of the packages: no file imports one that stands above its own, and no files import in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1] / "src"
# Lowest first. A file may import what stands on its own line, or below it.
ORDER = (
    ("_version", "errors"),
    ("_lazy", "_files", "_words", "_threads", "support"),
    ("data", "models"),
    ("text",),
    ("stats",),
    ("decision",),
    ("policies",),
    ("telemetry",),
    ("patching",),
    ("calibration",),
    ("settings",),
    ("integration",),
    ("training",),
    ("evaluation",),
    ("engines",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def files() -> dict[str, Path]:
    """Module name -> file, of the package."""
    found = {}
    for path in sorted((ROOT / "bh_routing").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """(module, line) of every import of the package's own files, inside functions too, but for type checking."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checking = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for statement in branch.body
        for node in ast.walk(statement)
    }
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if id(node) in checking:
            continue
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            # `from . import x` imports the file x where there is one, else a name of the package itself.
            modules = [m if m in known else base for m in names]
        else:
            continue
        yield from ((module, node.lineno) for module in modules if module in known and module != name)


def level(module: str) -> int:
    top = module.split(".")[1]
    assert top in LEVEL, (
        f"{top} has no place in the order of the packages; give it one in tests/test_layers.py"
    )
    return LEVEL[top]


def test_nothing_imports_what_stands_above_it():
    known = files()
    wrong = {
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for name, path in known.items()
        if name != "bh_routing"
        for module, line in imported(name, path, known)
        if module == "bh_routing" or level(module) > level(name)
    }
    assert not wrong, "\n".join(["imports of what stands above:", *sorted(wrong)])


def test_no_circle_between_files():
    known = files()
    graph = {name: sorted({m for m, _ in imported(name, path, known)}) for name, path in known.items()}
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for other in graph[name]:
                walk(other, (*path, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def test_every_package_has_a_place():
    assert {name.split(".")[1] for name in files() if name != "bh_routing"} == LEVEL.keys()


def test_long_files_give_their_reason():
    """A line of the docstring, ``Over 350 lines: ...``, where a file is longer than a reader takes in at once."""
    silent = [
        str(path.relative_to(ROOT))
        for path in files().values()
        if len(path.read_text(encoding="utf-8").splitlines()) > 350
        and not re.search(r"^Over 350 lines: \S", ast.get_docstring(ast.parse(path.read_bytes())) or "", re.M)
    ]
    assert not silent, f"over 350 lines without a reason in their docstrings: {', '.join(silent)}"
