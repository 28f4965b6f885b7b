"""The package as a house: a module imports only what lies below it, and none is too long to read at once."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import airflow_provider_dify

PACKAGE = Path(airflow_provider_dify.__file__).parent

DRAWING = Path(__file__).parents[2] / "docs" / "contributing.md"
# From the ground up; a module imports its own floor and those below, never a floor above. A module that is not on the
# floor of its folder is in the drawing itself.
FLOORS: dict[int, tuple[str, ...]] = {
    int(number): tuple(rooms.split()) for number, rooms in re.findall(r"^(\d)  (.+)$", DRAWING.read_text(), re.M)
}
MODULES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))
MOST_LINES = 450
MOST_MODULES_IN_A_ROOM = 12
MOST_MODULES = 54
# To be lowered with each thing that goes: the aim is 10,600.
MOST_LINES_IN_ALL = 12_900


def floor_of(module: str) -> int:
    """Return the floor of a module such as ``api/session``: its own, or else that of its folder."""
    floors = {room: number for number, rooms in FLOORS.items() for room in rooms}
    return floors[module] if module in floors else floors[module.partition("/")[0]]


def modules_imported_by(module: str, source: str) -> Iterator[str]:
    """Iterate over our modules that a module imports anywhere: in functions and for types, too."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively, which this test does not follow"
            # What is imported may be a module itself, or a name in one.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            first, *path = name.split(".")
            if first != PACKAGE.name:
                continue
            while path and "/".join(path) not in MODULES:
                path.pop()
            yield "/".join(path) or "__init__"


def source_of(module: str) -> str:
    return (PACKAGE / f"{module}.py").read_text()


def lines_to_read(module: str) -> int:
    """Count the lines of a module without the one that names the license."""
    return len(source_of(module).removeprefix("# SPDX-License-Identifier: Apache-2.0\n").splitlines())


def test_every_module_is_on_one_floor_and_no_floor_names_a_module_that_is_gone() -> None:
    rooms = [room for rooms in FLOORS.values() for room in rooms]
    assert len(rooms) == len(set(rooms))
    assert set(rooms) <= {*MODULES, *(module.partition("/")[0] for module in MODULES)}
    assert all(floor_of(module) for module in MODULES)


def test_the_house_has_no_more_rooms_and_lines_than_a_stranger_can_read() -> None:
    modules = [module for module in MODULES if not module.endswith("/__init__")]
    rooms = Counter(module.rpartition("/")[0] for module in modules)
    assert max(rooms.values()) <= MOST_MODULES_IN_A_ROOM
    assert len(modules) <= MOST_MODULES
    assert sum(lines_to_read(module) for module in MODULES) <= MOST_LINES_IN_ALL


def test_no_more_than_five_modules_stand_outside_of_the_rooms() -> None:
    assert len([module for module in MODULES if "/" not in module]) <= 5


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_nothing_from_a_floor_above_not_even_for_types(module: str) -> None:
    imported = set(modules_imported_by(module, source_of(module)))
    assert [name for name in sorted(imported) if floor_of(name) > floor_of(module)] == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    imports = {module: set(modules_imported_by(module, source_of(module))) - {module} for module in MODULES}
    while free := {module for module, imported in imports.items() if not imported & imports.keys()}:
        imports = {module: imported for module, imported in imports.items() if module not in free}
    assert imports == {}


def test_the_client_in_api_needs_no_airflow_of_its_own() -> None:
    for module in MODULES:
        if not module.startswith("api/"):
            continue
        tree = ast.parse(source_of(module))
        for_types = {
            id(node)
            for block in ast.walk(tree)
            if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
            for node in ast.walk(block)
        }
        needed = [node for node in ast.walk(tree) if id(node) not in for_types]
        names = [alias.name for node in needed if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in needed if isinstance(node, ast.ImportFrom)]
        assert [name for name in names if name.split(".")[0] == "airflow"] == [], module


@pytest.mark.parametrize("module", MODULES)
def test_a_module_can_be_read_at_once_and_is_named_for_what_it_knows(module: str) -> None:
    assert lines_to_read(module) <= MOST_LINES
    assert module.rpartition("/")[2] not in {"utils", "util", "helpers", "helper", "common", "misc", "base"}


@pytest.mark.parametrize(
    "line",
    [
        "from airflow_provider_dify.hooks.dify import DifyHook",
        "from airflow_provider_dify.hooks import dify",
        "import airflow_provider_dify.hooks.dify",
        "if TYPE_CHECKING:\n    from airflow_provider_dify.hooks.dify import DifyHook",
        "def load():\n    import airflow_provider_dify.hooks.dify",
    ],
)
def test_an_import_is_found_wherever_it_stands(line: str) -> None:
    assert list(modules_imported_by("api/models", line)) == ["hooks/dify"]
