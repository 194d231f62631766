"""How much is done for a message, counted: system calls, calls of functions, memory, threads. No time is measured.

The ceilings are what it takes today, and may only come down. Counts do not depend on how busy the machine is; the few
hundredths are for what is done once in a while (an overflow file looks at the receiver, memory grows).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from . import work

ROOT = Path(__file__).parent.parent


class Ceiling(NamedTuple):
    """Per message, or whatever else the piece of work does."""

    system: float
    python: float
    c: float
    kept: float = 0.25  # memory blocks: what a cache takes in once, divided by the times


CEILINGS = {
    "small": Ceiling(2, 5.1, 13.1),
    "1 KiB": Ceiling(2, 5.1, 13.1),
    "64 KiB": Ceiling(2.02, 16.1, 27.1, kept=0.5),
    "1 MiB": Ceiling(20.1, 65.1, 90.1, kept=2),
    "small, 500 ports open": Ceiling(2, 5.1, 13.1),
    "post, 1,000 behind": Ceiling(1.03, 5.2, 10.2),
    "post, 50,000 behind": Ceiling(1.03, 5.2, 10.2),
    "take, 20,000 behind": Ceiling(0.01, 2.2, 8.2),
    "wait for one of 100": Ceiling(4.02, 114.1, 424.1, kept=1),
    "listener on a loop": Ceiling(2.04, 8.4, 19.5),
    "create and close": Ceiling(16.05, 74.1, 52.1, kept=1),
    "hand over, use, close": Ceiling(25.1, 200.1, 199.1, kept=4),
    "move a buffer": Ceiling(17.1, 93.1, 108.1, kept=4),
}


def run(*command: str) -> Any:
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_there_is_a_ceiling_for_each_piece_of_work() -> None:
    assert CEILINGS.keys() == work.PIECES.keys()


@pytest.mark.parametrize("piece", CEILINGS)
def test_calls_of_functions_do_not_get_more(piece: str) -> None:
    figures = run(sys.executable, "-m", "tests.work", "calls", piece)
    ceiling = CEILINGS[piece]
    assert 0 < figures["Python calls"] <= ceiling.python
    assert 0 < figures["C calls"] <= ceiling.c
    assert figures["blocks kept"] <= ceiling.kept
    assert figures["threads"] == 1


def strace() -> str | None:
    """``strace``, if it is there and may trace (a container may forbid it)."""
    found = shutil.which("strace")
    return found if found and subprocess.run([found, "-qq", "true"], capture_output=True).returncode == 0 else None


@pytest.mark.parametrize("piece", CEILINGS)
def test_system_calls_do_not_get_more(piece: str, tmp_path: Path) -> None:
    tracer = strace()
    if tracer is None:
        pytest.skip("strace is not installed, or may not trace here")
    trace = tmp_path / "trace.txt"
    run(tracer, "-f", "-qq", "-o", str(trace), sys.executable, "-m", "tests.work", "strace", piece)
    _, _, counted = trace.read_text().partition(work.MARK + "begins")
    counted, mark, _ = counted.partition(work.MARK + "ends")
    assert mark
    calls = Counter(re.findall(r"^\d+ +(\w+)\(", counted, re.MULTILINE))
    del calls["access"]  # the mark's own
    each = calls.total() / work.PIECES[piece][1]
    assert each <= CEILINGS[piece].system, dict(calls)


def test_an_idle_port_is_one_descriptor_some_memory_and_no_thread() -> None:
    figures = run(sys.executable, "-m", "tests.work", "idle", "400")
    assert figures["descriptors"] == 1
    assert figures["threads"] == 1
    assert 0 < figures["bytes"] <= 2400
    assert 0 < figures["blocks"] <= 28
