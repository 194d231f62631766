"""The house: which room may import which, and that importing costs little."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import mpchannel

PACKAGE = Path(mpchannel.__file__).parent

# From the ground up; a room imports only from floors below its own.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "events", "_kernel", "_forward"),
    ("_overflow", "_culprit", "_recycle", "_slots", "_sockdiag", "_plain"),
    ("_wire",),
    ("_end",),
    ("_link", "_shared"),
    ("_clone", "_delivery", "_status"),
    ("_endpoint", "_failure"),
    ("port", "_answer", "_claims", "sharedbuffer"),
    ("channel",),
    ("connection", "queues", "ipc", "_window", "_stream", "_trace"),
    ("_given",),
    ("reduction",),
    ("process",),
    ("context",),
    ("sharedctypes", "pool", "managers", "worker"),
    ("_task", "remote", "_inspect"),
    ("workerpool", "testing"),
    ("__init__",),
    ("demo", "doctor"),
    ("bench", "look"),
    ("__main__",),
)
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def _rooms() -> dict[str, list[Path]]:
    rooms: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        rooms.setdefault(inside.parts[0].removesuffix(".py"), []).append(path)
    return rooms


def _imports(path: Path) -> list[tuple[str, ast.AST]]:
    """Rooms that a file imports from, each with its statement."""
    room = path.relative_to(PACKAGE).parts[0]
    found: list[tuple[str, ast.AST]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names if each.name.split(".")[0] == "mpchannel"]
            found += [([*name.split("."), "__init__"][1], node) for name in names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == 1 and not room.endswith(".py"):
                continue  # inside a room of several files
            if node.level:
                found += [(module.split(".")[0] or each.name, node) for each in node.names]
            elif module.split(".")[0] == "mpchannel":
                found += [([*module.split("."), "__init__"][1], node) for _ in node.names]
    return found


def test_every_room_has_its_floor() -> None:
    assert set(_rooms()) == set(FLOOR)


def test_imports_only_go_down() -> None:
    wrong = [
        f"{path.name} imports {target}"
        for room, paths in _rooms().items()
        for path in paths
        for target, _ in _imports(path)
        if FLOOR[target] >= FLOOR[room]
    ]
    assert not wrong


def test_no_function_imports_the_package_itself() -> None:
    wrong = []
    for paths in _rooms().values():
        for path in paths:
            mine = {node for _, node in _imports(path)}
            for function in ast.walk(ast.parse(path.read_text())):
                if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    lines = {
                        inner.lineno for inner in ast.walk(function) if isinstance(inner, (ast.Import, ast.ImportFrom))
                    }
                    wrong += [f"{path.name}:{node.lineno}" for node in mine if getattr(node, "lineno", 0) in lines]
    assert not wrong


def test_importing_loads_no_heavy_module() -> None:
    code = "import sys, mpchannel; print(sorted({'numpy', 'asyncio', 'cloudpickle'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
