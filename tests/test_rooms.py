"""The rooms of the package: an import goes down, never up and never round."""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "spectrim"
# From the ground up. Rooms of one line stand beside each other and do not know each other.
FLOORS = (
    ("errors", "forwards", "kernels", "linear", "public", "registration", "versions"),
    ("away", "dense", "estimate", "files", "latent", "lazy", "maths", "settings"),
    ("demo", "disk", "experts", "recipe", "trace"),
    ("anatomy", "samples"),
    ("calibrate", "checks", "storage"),
    ("checkpoint", "metrics", "mismatch"),
    ("evaluate", "plan", "serve"),
    ("bench", "compensate", "tune"),
    ("pipeline", "report", "ui"),
    ("spectrim", "demonstration"),
    ("cli", "harness"),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def name_of(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(("spectrim", *(part for part in parts if part != "__init__")))


MODULES = {name_of(path): path for path in SRC.rglob("*.py")}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "spectrim"


@cache
def imports(module: str) -> frozenset[str]:
    """All that a module imports, in functions and for types, too; submodules by their own names."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return frozenset(found - {module})


def own(module: str) -> set[str]:
    return {name for name in imports(module) if name in MODULES}


def test_every_room_has_a_floor_and_there_are_twelve_at_most():
    assert {room(module) for module in MODULES} == FLOOR.keys()
    assert len(FLOORS) <= 12


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_or_stay_inside_the_room(module):
    up = {name for name in own(module) if room(name) != room(module) and FLOOR[room(name)] >= FLOOR[room(module)]}
    assert not up


def test_no_import_goes_round_inside_a_room():
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' → '.join((*path[path.index(module) :], module))}"
        if module not in done:
            for name in own(module):
                if room(name) == room(module):
                    walk(name, (*path, module))
            done.add(module)

    for module in MODULES:
        walk(module, ())


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) == "maths"])
def test_maths_imports_torch_alone(module):
    """And what Python has, and the exceptions."""
    others = {name.split(".")[0] for name in imports(module)} - sys.stdlib_module_names - {"torch", "spectrim"}
    assert not others
    assert {room(name) for name in own(module)} <= {"maths", "errors"}


def test_no_file_is_longer_than_400_lines():
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert max(lengths.values()) <= 400, lengths
