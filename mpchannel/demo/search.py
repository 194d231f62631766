"""The job of the demos: the text files of a folder, and the lines in them that match a pattern."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# Where other people's code is installed, beside the standard library's own; and what holds no text.
SKIPPED_FOLDERS = ("__pycache__", "dist-packages", "site-packages")


class Found(NamedTuple):
    """A line that matches. ``line`` counts from 1."""

    file: str
    line: int
    text: str


class Progress(NamedTuple):
    """What a search has read so far."""

    files: int
    lines: int
    bytes: int


def text_files(folder: str) -> Iterator[str]:
    """The text files below *folder*, always in the same order; hidden folders and ``SKIPPED_FOLDERS`` are left out."""
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(each for each in folders if each not in SKIPPED_FOLDERS and not each.startswith("."))
        for name in sorted(names):
            path = os.path.join(here, name)
            if is_text(path):
                yield path


def is_text(path: str) -> bool:
    """A regular file that can be read and has no zero byte near its beginning, which is how ``grep`` tells."""
    try:
        if not os.path.isfile(path):
            return False
        with open(path, "rb") as file:
            return b"\0" not in file.read(1024)
    except OSError:
        return False


def search(pattern: str, files: Iterable[str]) -> Iterator[Found | Progress]:
    """Each matching line as it is found, and after each file how much was read. Files that cannot be read are left out.

    Raises ``re.error`` for a bad *pattern*.
    """
    matches = re.compile(pattern).search
    count = lines = size = 0
    for path in files:
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                for number, text in enumerate(file, 1):
                    lines += 1
                    if matches(text):
                        yield Found(path, number, text.rstrip("\n"))
                size += os.fstat(file.fileno()).st_size
        except OSError:
            continue
        count += 1
        yield Progress(count, lines, size)
