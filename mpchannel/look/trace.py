"""``python -m mpchannel trace FILE``: what a trace says, as a table and as a picture. (Perfetto shows more of it.)"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from typing import Any, Final

from .._trace import connected, events_of
from ..demo.table import print_table

_LOOKS: Final = {  # colour, edge, height
    "receive": ("#d5dde5", "white", 0.5),
    "dispatch": ("#e08a1e", "white", 0.36),
    "post": ("#2a6fbb", "#2a6fbb", 0.36),
}
_MARKS: Final = {"transfer": "D", "close": "x", "closed by the other end": "X", "channel": "|"}
_ARROWS: Final = 2_000  # more of them only make a black picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Tell what a trace (mpchannel.trace, or MPCHANNEL_TRACE) says: messages and how long they waited, by the ends "
        "they were posted at. The file itself can be opened in Perfetto."
    )
    parser.add_argument("file", metavar="FILE", help="the trace; or its .part, of a program that was killed")
    parser.add_argument("--picture", metavar="FILE", help="draw it into a .png, .svg or .pdf file (needs matplotlib)")


def run(options: argparse.Namespace) -> int:
    """Returns the exit code: 0, or 1 if there is no such trace or picture."""
    try:
        events = read(options.file)
        print_table(*table(events))
        print("waited: from the post until the message was taken. run: the listener's longest run")
        if options.picture:
            draw(events, options.picture)
            print(f"picture: {options.picture}")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError:
        print("error: --picture needs matplotlib: pip install 'mpchannel[plot]'", file=sys.stderr)
        return 1
    return 0


def read(path: str) -> list[dict[str, Any]]:
    """The events of a trace. Raises ``OSError``, or ``ValueError`` for what is none."""
    with open(path) as file:
        if file.read(1) == "[":
            file.seek(0)
            return connected(events_of(file))
        file.seek(0)
        try:
            events: list[dict[str, Any]] = json.load(file)["traceEvents"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a trace: {error}") from None
        return events


def table(events: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Heads and lines: one for each end that posted, in the order of their first messages."""
    posted: dict[str, list[dict[str, Any]]] = defaultdict(list)
    taken: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["name"] == "post":
            posted[event["args"]["port"]].append(event)
        elif event["name"] in ("receive", "dispatch") and "waited" in event["args"]:
            taken[_other(event["args"]["port"])].append(event)
    lines = []
    for name, posts in posted.items():
        waited = sorted(float(each["args"]["waited"].split()[0]) for each in taken[name])
        runs = [each["dur"] for each in taken[name] if each["name"] == "dispatch"]
        lines.append(
            [
                name,
                ", ".join(sorted({str(each["pid"]) for each in posts})),
                f"{len(posts):,}",
                f"{len(waited):,}",
                f"{sum(each['args']['bytes'] for each in posts):,}",
                _time(statistics.median(waited) if waited else None),
                _time(waited[-1] if waited else None),
                _time(max(runs, default=None)),
            ]
        )
    return ("posted at", "by process", "posted", "taken", "bytes", "waited", "longest", "run"), lines


def _other(name: str) -> str:
    channel, _, side = name.rpartition("/")
    return f"{channel}/{3 - int(side)}"


def _time(microseconds: float | None) -> str:
    if microseconds is None:
        return "-"
    return f"{microseconds:,.0f} us" if microseconds < 10_000 else f"{microseconds / 1000:,.1f} ms"


def draw(events: list[dict[str, Any]], path: str) -> None:
    """A timeline for each thread, with an arrow for each message. Raises ``ModuleNotFoundError`` without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = {("process", each["pid"]): each["args"]["name"] for each in events if each["name"] == "process_name"}
    names |= {("thread", each["tid"]): each["args"]["name"] for each in events if each["name"] == "thread_name"}
    timed = [each for each in events if "ts" in each]
    if not timed:
        raise ValueError("there is nothing in this trace")
    zero = min(each["ts"] for each in timed)
    rows: dict[tuple[int, int], int] = {}
    for each in timed:
        rows.setdefault((each["pid"], each["tid"]), 0)
    rows = {row: place for place, row in enumerate(sorted(rows))}

    def spot(event: dict[str, Any]) -> tuple[float, float]:
        return (event["ts"] - zero) / 1000, rows[event["pid"], event["tid"]]

    figure = Figure(figsize=(11, 1.4 + 0.85 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for kind, (colour, edge, height) in _LOOKS.items():
        for row, place in rows.items():
            spans = [
                ((each["ts"] - zero) / 1000, each["dur"] / 1000)
                for each in timed
                if each["name"] == kind and (each["pid"], each["tid"]) == row
            ]
            axes.broken_barh(spans, (place - height / 2, height), facecolors=colour, edgecolors=edge, linewidth=0.6)
    begins = {each["id"]: spot(each) for each in timed if each["ph"] == "s"}
    lines = [(begins[each["id"]], spot(each)) for each in timed if each["ph"] == "f"][:_ARROWS]
    axes.add_collection(LineCollection(lines, colors="#333333", linewidths=0.6, alpha=0.6, zorder=3))
    handles: list[Any] = [Patch(color=colour, label=kind) for kind, (colour, _, _) in _LOOKS.items()]
    for kind, mark in _MARKS.items():
        spots = [spot(each) for each in timed if each["name"] == kind and each["ph"] == "i"]
        if spots:
            x, y = zip(*spots, strict=True)
            handles.append(axes.scatter(x, y, marker=mark, s=34, color="#b3261e", zorder=4, label=kind))
    labels = [f"{names.get(('process', pid), pid)}\n{names.get(('thread', tid), tid)}" for pid, tid in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("milliseconds")
    axes.margins(x=0.01)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
