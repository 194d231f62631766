"""How far it got, while it runs: one line that is drawn anew on a terminal, now and then a line anywhere else."""

from __future__ import annotations

import shutil
import sys
import time


class ProgressLine:
    """``show(text)`` as often as you like; ``clear()`` before anything else is printed."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._pause = 0.1 if self._live else 2.0  # seconds between two drawings
        self._due = 0.0

    @property
    def due(self) -> bool:
        """Whether ``show`` would draw now."""
        return time.monotonic() >= self._due

    def show(self, text: str) -> None:
        if not self.due:
            return
        self._due = time.monotonic() + self._pause
        text = "".join(each if each.isprintable() else "?" for each in text)
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._write("\r" + text[:width].ljust(width))
        else:
            self._write(text + "\n")

    def clear(self) -> None:
        self._due = 0.0
        if self._live:
            self._write("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r")

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
