"""Where figures were measured, how they come from the process that took them, and how they are shown."""

from __future__ import annotations

import importlib.util
import os
import platform
from multiprocessing.connection import Connection
from typing import Any, Final

PATIENCE: Final = 60.0  # seconds that one run may take
LOWER, HIGHER = "lower", "higher"


class BenchError(Exception):
    """A run failed: its processes have said why on stderr."""


def has_numpy() -> bool:
    return importlib.util.find_spec("numpy") is not None


def result_of(run: Connection) -> Any:
    """What a run's process has sent."""
    with run:
        try:
            if not run.poll(PATIENCE):
                raise BenchError(f"no result within {PATIENCE:.0f} s")
            return run.recv()
        except EOFError:
            raise BenchError("it ended without a result") from None


def surroundings(rounds: int, scale: float) -> dict[str, Any]:
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()}",
        "cores": len(os.sched_getaffinity(0)),
        "rounds": rounds,
        "scale": scale,
        "numpy": has_numpy(),
    }


def print_surroundings(about: dict[str, Any]) -> None:
    print(f"{about['python']}, {about['system']}, cores: {about['cores']}, rounds: {about['rounds']}")


def significant(figure: float) -> str:
    """Three digits that count."""
    return f"{figure:,.0f}" if figure >= 99.95 else f"{figure:#.3g}"
