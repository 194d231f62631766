"""A look as a picture: processes on a circle, an edge between two that share channels, with what waits each way.

An SVG of its own making: no program draws it, no dependency is needed. The HTML is that SVG in a page.
"""

from __future__ import annotations

import html
import math
from collections import defaultdict
from typing import Final

from .snapshot import Channel, Process, Queue, Snapshot

_WIDE, _HIGH = 190, 58  # of a process's box
_CLEAR: Final = 130  # between boxes, for labels
_MARGIN: Final = 40
_STYLE: Final = """
svg { background: #ffffff; font-family: ui-sans-serif, system-ui, 'DejaVu Sans', sans-serif; }
.box { fill: #f3f6fb; stroke: #3b5b8c; stroke-width: 1.5; } .stopped { fill: #fdecea; stroke: #b3372b; }
.outside { stroke-dasharray: 5 4; } .name { font-size: 13px; font-weight: 600; fill: #1c2733; }
.small { font-size: 11px; fill: #52606d; } .edge { fill: none; stroke: #8796a8; stroke-width: 1.5; }
.busy { stroke: #c8641b; stroke-width: 2.5; } .wait { font-size: 11px; fill: #a34a0b; font-weight: 600; }
.hint { font-size: 12px; fill: #b3372b; } .label { paint-order: stroke; stroke: #ffffff; stroke-width: 4px; }
"""


def amount(size: float) -> str:
    """Bytes, in few letters."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def count(queue: Queue) -> str:
    """What waits, in a few words."""
    if not queue.total:
        return ""
    few = "" if queue.exact else "<="
    messages = "" if queue.file else f"{few}{queue.messages} msg, "
    return f"{messages}{amount(queue.total)}"


def svg(now: Snapshot) -> str:
    """The picture."""
    nodes = _nodes(now)
    places, width, height = _layout(list(nodes))
    lines: list[str] = []
    between: dict[tuple[int, int], list[Channel]] = defaultdict(list)
    inside: dict[int, int] = defaultdict(int)
    for channel in now.channels:
        one, other = channel.pids
        if channel.lifeline or one is None or other is None:
            continue
        if one == other:
            inside[one] += 1
        else:
            between[min(one, other), max(one, other)].append(channel)
    for (one, other), channels in between.items():
        lines += _edge(one, other, channels, places)
    for pid, process in nodes.items():
        lines += _box(pid, process, places[pid], inside[pid])
    for row, hint in enumerate(now.hints):
        lines.append(_text(_MARGIN, height + 18 * row, hint, "hint", "start"))
    height += 18 * len(now.hints)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img">'
    )
    title = f"<title>channels of process {now.root} and its children</title>"
    return "\n".join([head, title, f"<style>{_STYLE}</style>", *lines, "</svg>"]) + "\n"


def page(now: Snapshot) -> str:
    """The picture in a page."""
    title = f"Channels of process {now.root}"
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<body style="margin: 0; text-align: center">\n{svg(now)}</body>\n</html>\n'
    )


def _nodes(now: Snapshot) -> dict[int, Process | None]:
    """Processes that hold an end; ``None``: one outside the tree."""
    held = {pid for channel in now.channels if not channel.lifeline for pid in channel.pids if pid is not None}
    nodes: dict[int, Process | None] = {pid: now.processes[pid] for pid in now.processes if pid in held}
    nodes.setdefault(now.root, now.processes[now.root])
    return nodes | dict.fromkeys(sorted(held - set(now.processes)))


def _layout(pids: list[int]) -> tuple[dict[int, tuple[float, float]], float, float]:
    """Where the middle of each box is, and how large the picture."""
    if len(pids) < 3:
        step = _WIDE + _CLEAR * 1.6
        places = {pid: (_MARGIN + _WIDE / 2 + step * number, float(_MARGIN + _HIGH)) for number, pid in enumerate(pids)}
    else:
        radius_x = max(260.0, len(pids) * (_WIDE + _CLEAR) / (2 * math.pi))
        radius_y = max(170.0, len(pids) * (_HIGH + _CLEAR * 0.7) / (2 * math.pi))
        middle = _MARGIN + _WIDE / 2 + radius_x, _MARGIN + _HIGH / 2 + radius_y
        places = {}
        for number, pid in enumerate(pids):
            angle = 2 * math.pi * number / len(pids) - math.pi / 2
            places[pid] = middle[0] + radius_x * math.cos(angle), middle[1] + radius_y * math.sin(angle)
    width = max(x for x, _ in places.values()) + _WIDE / 2 + _MARGIN
    return places, max(width, 520), max(y for _, y in places.values()) + _HIGH / 2 + _MARGIN


def _edge(one: int, other: int, channels: list[Channel], places: dict[int, tuple[float, float]]) -> list[str]:
    (x1, y1), (x2, y2) = places[one], places[other]
    waiting = {one: [0, 0], other: [0, 0]}
    words: dict[int, list[str]] = {one: [], other: []}
    for channel in channels:
        for queue, to in zip(channel.queues, channel.pids, strict=True):
            assert to is not None
            waiting[to][0] += queue.total
            if queue.total:
                words[to].append(count(queue))
    busy = " busy" if waiting[one][0] or waiting[other][0] else ""
    lines = [f'<path class="edge{busy}" d="M{x1:.1f},{y1:.1f} L{x2:.1f},{y2:.1f}"/>']
    middle = (x1 + x2) / 2, (y1 + y2) / 2
    label = f"{len(channels)} channel{'s' * (len(channels) > 1)}"
    lines.append(_text(*middle, label, "small label"))
    for to, by, way in ((other, one, 1), (one, other, -1)):
        if words[to]:
            text = f"{by} → {to}: {'; '.join(words[to][:2])}{' ...' * (len(words[to]) > 2)}"
            lines.append(_text(middle[0], middle[1] + way * 16, text, "wait label"))
    return lines


def _box(pid: int, process: Process | None, at: tuple[float, float], inside: int) -> list[str]:
    x, y = at
    kind = " outside" if process is None else " stopped" if process.state in "TZ" else ""
    name = "outside" if process is None else process.name
    about = []
    if process is not None:
        about.append({"T": "stopped", "Z": "ended", "R": "running"}.get(process.state, "sleeping"))
        about.append(f"{process.age:.0f} s")
    if inside:
        about.append(f"{inside} inside")
    corner = f'x="{x - _WIDE / 2:.1f}" y="{y - _HIGH / 2:.1f}"'
    return [
        f'<rect class="box{kind}" {corner} width="{_WIDE}" height="{_HIGH}" rx="8"/>',
        _text(x, y - 5, f"{pid} {name}"[:26], "name"),
        _text(x, y + 15, ", ".join(about), "small"),
    ]


def _text(x: float, y: float, text: str, kind: str, anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'
