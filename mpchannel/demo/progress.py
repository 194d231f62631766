"""How far it got, while it runs: lines that are drawn anew on a terminal, now and then a line anywhere else."""

from __future__ import annotations

import os
import shutil
import sys
import time

BAR = 20  # characters


class ProgressLine:
    """``show(text)`` as often as you like, or several texts, each for a line of its own, of which only a terminal shows
    all, and other places the last; ``clear()`` before anything else is printed, or ``tell(text)``.
    """

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._pause = 0.1 if self._live else 2.0  # seconds between two drawings
        self._due = 0.0
        self._height = 1  # lines drawn since it was clear

    @property
    def due(self) -> bool:
        """Whether ``show`` would draw now."""
        return time.monotonic() >= self._due

    def show(self, *texts: str) -> None:
        if not self.due:
            return
        self._due = time.monotonic() + self._pause
        lines = ["".join(each if each.isprintable() else "?" for each in text) for text in texts]
        if self._live:
            self._draw(lines[-max(1, shutil.get_terminal_size().lines - 1) :])
        else:
            self._write(lines[-1] + "\n")

    def clear(self) -> None:
        self._due = 0.0
        if self._live:
            self._draw([])
            self._write(self._top())
            self._height = 1

    def tell(self, text: str) -> None:
        """Print *text* above."""
        self.clear()
        self._write(text + "\n")

    def _draw(self, lines: list[str]) -> None:
        top = self._top()
        self._height = max(self._height, len(lines))
        width = shutil.get_terminal_size().columns - 1
        lines = lines + [""] * (self._height - len(lines))
        self._write(top + "\n".join(line[:width].ljust(width) for line in lines))

    def _top(self) -> str:
        return f"\x1b[{self._height - 1}A\r" if self._height > 1 else "\r"

    def _write(self, text: str) -> None:
        # Past the buffer: another thread may fork meanwhile. A buffer that is in use then stays locked in the child, or
        # what it holds is written there as well.
        sys.stdout.flush()
        rest = text.encode(sys.stdout.encoding, sys.stdout.errors or "strict")
        while rest:
            rest = rest[os.write(sys.stdout.fileno(), rest) :]


def bar(done: float, total: float) -> str:
    share = min(1.0, done / total) if total else 1.0
    full = int(share * BAR)
    return f"[{'#' * full}{'.' * (BAR - full)}] {share:4.0%}"
