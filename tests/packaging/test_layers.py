"""The packages of cats_ext import one way, from the command line down to the ops, and no import goes in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "cats_ext"
# From the ground up; a package imports from lower floors only, and from itself. docs/architecture.md draws them.
FLOORS = (
    {"native", "_version", "_progress", "_outputs", "parallel"},
    {"rows"},
    {"ops", "thresholds", "_inputs"},
    {"data", "env", "functional", "patching"},
    {"quantization"},
    {"decode", "evaluation", "integrations"},
    {"calibration"},
    {"finetune", "__init__"},
    {"cli"},
    {"__main__"},
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
MODULES = {
    ".".join(("cats_ext", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def package_of(module: str) -> str:
    """The folder or file directly in ``cats_ext`` that ``module`` belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


def imports_of(module: str) -> Iterator[str]:
    """Modules of cats_ext that ``module`` names in an import, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "cats_ext")
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "cats_ext":
            for alias in node.names:  # a module, or a name in one
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


IMPORTS = {module: {found for found in imports_of(module) if found in MODULES} for module in MODULES}


def test_every_package_has_a_floor():
    assert {package_of(module) for module in MODULES} == FLOOR_OF.keys()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module):
    own = package_of(module)
    for other in IMPORTS[module]:
        package = package_of(other)
        # The command line is a program on top of the library: it may name cats_ext itself.
        assert package == own or FLOOR_OF[package] < FLOOR_OF[own], f"{module} imports {other}, which is not below it"


def test_no_circle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " imports ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in IMPORTS[module] - {module}:
                visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_relative_imports_are_not_used():
    for module, path in MODULES.items():
        assert not any(isinstance(n, ast.ImportFrom) and n.level for n in ast.walk(ast.parse(path.read_text()))), module


def test_files_and_folders_stay_small():
    """Eight files beside the folders, without the marker py.typed, ten in a folder, 400 lines in a file."""
    for folder in [ROOT, *(path for path in ROOT.rglob("*") if path.is_dir() and path.name != "__pycache__")]:
        files = [path for path in folder.iterdir() if path.is_file() and path.suffix not in (".so", ".typed")]
        assert len(files) <= (8 if folder == ROOT else 10), f"{folder.relative_to(ROOT.parent)}: {len(files)} files"
    for path in MODULES.values():
        lines = len(path.read_text().splitlines())
        assert lines <= 400, f"{path.relative_to(ROOT.parent)}: {lines} lines"
