"""Tables for the terminal: the first column flush left, the others flush right, nothing but ASCII."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

GAP = "  "
NARROWEST = 8  # characters of the first column, which gives way when the terminal is narrow


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]], total: Sequence[str] | None = None) -> None:
    """Print *rows* under *heads*, and *total* below a rule. Each row has a text for each head."""
    lines = [heads, *rows, *([total] if total else [])]
    widths = [max(len(line[place]) for line in lines) for place in range(len(heads))]
    excess = sum(widths) + len(GAP) * (len(widths) - 1) - shutil.get_terminal_size().columns
    if excess > 0:
        widths[0] = max(NARROWEST, widths[0] - excess)
    rule = GAP.join("-" * width for width in widths)
    print(_line(heads, widths))
    print(rule)
    for row in rows:
        print(_line(row, widths))
    if total:
        print(rule)
        print(_line(total, widths))


def _line(texts: Sequence[str], widths: Sequence[int]) -> str:
    first = shorten(texts[0], widths[0]).ljust(widths[0])
    return GAP.join([first, *(text.rjust(width) for text, width in zip(texts[1:], widths[1:], strict=True))]).rstrip()


def shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
