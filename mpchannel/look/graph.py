"""Who talks to whom, as a drawing (SVG): a box for each process, a line for what connects two of them."""

from __future__ import annotations

import html
import math
from collections import defaultdict
from typing import Final

from .processes import Look, waiting_for

_BOX: Final = 190, 62  # pixels
_STYLE: Final = (
    "text{font-family:system-ui,sans-serif;font-size:12px;fill:#1c2733}"
    ".name{font-weight:600}.small{font-size:10.5px;fill:#51606f}"
    "rect{fill:#f3f6f9;stroke:#8795a3}rect.stuck{fill:#fdecea;stroke:#b3261e}rect.stopped{fill:#fff6dd;stroke:#b98900}"
    "line{stroke:#51606f;stroke-width:1.4}line.behind{stroke:#b3261e;stroke-width:2.6}"
    ".label{fill:#ffffff;stroke:none}"
)


def svg(now: Look) -> str:
    """The drawing."""
    width, height = _BOX
    count = len(now.processes)
    radius = 0 if count == 1 else max(150, count * (width + 50) / (2 * math.pi))
    lines: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)  # (pid, pid) -> unread at each
    inside: dict[int, int] = defaultdict(int)
    open_ended: dict[int, int] = defaultdict(int)
    for end, other in now.channels():
        here = {pid for pid, _ in end.holders}
        there = {pid for pid, _ in other.holders} if other is not None else set()
        for one in here:
            if other is None:
                open_ended[one] += 1
            for two in there:
                if one == two:
                    inside[one] += 1
                else:
                    unread = end.unread, other.unread if other is not None else 0
                    lines[min(one, two), max(one, two)].append(unread if one < two else unread[::-1])
    centre = radius * 1.35 + width / 2 + 20, radius + height / 2 + 20
    spots = {}
    for place, process in enumerate(now.processes):
        angle = 2 * math.pi * place / count - math.pi / 2
        spots[process.pid] = centre[0] + 1.35 * radius * math.cos(angle), centre[1] + radius * math.sin(angle)
    hints = [f"! {hint}" for hint in now.hints]
    size = 2 * centre[0], 2 * centre[1] + 18 * len(hints)
    waiting = waiting_for(now)
    box = f'viewBox="0 0 {size[0]:.0f} {size[1]:.0f}" width="{size[0]:.0f}" height="{size[1]:.0f}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {box}><style>{_STYLE}</style>']
    labels = []
    for (one, two), channels in sorted(lines.items()):
        (x1, y1), (x2, y2) = spots[one], spots[two]
        at_one, at_two = (sum(unread) for unread in zip(*channels, strict=True))
        kind = ' class="behind"' if at_one or at_two else ""
        parts.append(f'<line x1="{x1:.0f}" y1="{y1:.0f}" x2="{x2:.0f}" y2="{y2:.0f}"{kind}/>')
        words = [f"{len(channels)} channel{'s' if len(channels) > 1 else ''}"]
        words += [f"{unread:,} B wait for {pid}" for unread, pid in ((at_one, one), (at_two, two)) if unread]
        middle = (x1 + x2) / 2, (y1 + y2) / 2
        wide = max(map(len, words)) * 6.2 + 8
        top = middle[1] - 8 * len(words)
        labels.append(
            f'<rect class="label" x="{middle[0] - wide / 2:.0f}" y="{top:.0f}" width="{wide:.0f}" '
            f'height="{16 * len(words)}"/>'
        )
        labels += [_text("small", middle[0], top + 12 + 15 * place, word) for place, word in enumerate(words)]
    parts += labels
    for process in now.processes:
        x, y = spots[process.pid]
        kind = "stopped" if process.state == "T" else "stuck" if _is_named(process.pid, now.hints, waiting) else ""
        more = [f"{process.memory / 2**20:,.0f} MiB", f"{process.cpu:.1f} s CPU"]
        more += [f"{inside[process.pid]} inside"] if inside[process.pid] else []
        more += [f"{open_ended[process.pid]} to elsewhere"] if open_ended[process.pid] else []
        corner = f'x="{x - width / 2:.0f}" y="{y - height / 2:.0f}"'
        parts.append(f'<rect class="{kind}" rx="8" {corner} width="{width}" height="{height}"/>')
        parts.append(_text("name", x, y - 10, process.name[:26]))
        parts.append(_text("", x, y + 6, f"pid {process.pid}, {process.words}"))
        parts.append(_text("small", x, y + 22, ", ".join(more)))
    parts += [
        f'<text x="20" y="{2 * centre[1] + 18 * place:.0f}">{html.escape(hint)}</text>'
        for place, hint in enumerate(hints)
    ]
    return "\n".join([*parts, "</svg>\n"])


def _text(kind: str, x: float, y: float, text: str) -> str:
    return f'<text class="{kind}" text-anchor="middle" x="{x:.0f}" y="{y:.0f}">{html.escape(text)}</text>'


def _is_named(pid: int, hints: list[str], waiting: dict[int, set[int]]) -> bool:
    return pid in waiting and any(f"{pid} (" in hint and "wait" in hint for hint in hints)


def page(now: Look) -> str:
    """An HTML page with the drawing."""
    title = f"process {now.processes[0].pid} and its descendants"
    return f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>\n{svg(now)}</html>\n'
