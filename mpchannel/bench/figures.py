"""Where figures were measured, how they come from the process that took them, and how they are shown."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import time
from multiprocessing.connection import Connection
from typing import Any, Final

PATIENCE: Final = 60.0  # seconds that one run may take
LOWER, HIGHER = "lower", "higher"
PEERS: Final = {"zmq": "pyzmq", "faster_fifo": "faster-fifo", "execnet": "execnet"}
"""Libraries that ``benchmarks`` can measure as well: the module, and what to install."""


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
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "rounds": rounds,
        "scale": scale,
        "numpy": has_numpy(),
        "peers": {
            project: importlib.metadata.version(project)
            for module, project in PEERS.items()
            if importlib.util.find_spec(module) is not None
        },
    }


def _processor() -> str:
    with open("/proc/cpuinfo") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.machine()


def fixed_work() -> float:
    """Milliseconds that a loop takes which is always the same: how much else the machine has to do."""
    start = time.perf_counter()
    for _ in range(200_000):
        pass
    return (time.perf_counter() - start) * 1e3


def print_surroundings(about: dict[str, Any]) -> None:
    print(f"{about['python']}, {about['system']}, cores: {about['cores']}, rounds: {about['rounds']}")


def significant(figure: float) -> str:
    """Three digits that count."""
    return f"{figure:,.0f}" if figure >= 99.95 else f"{figure:#.3g}"
