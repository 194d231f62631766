"""The figures of channels as a bar chart, with Matplotlib, which is loaded when a chart is drawn."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

from .figures import LOWER, BenchError, significant
from .goals import GOALS, typical
from .kinds import OURS, PIPE

ENDINGS: Final = (".png", ".svg")
_MARKERS: Final = "osD^vP*Xd<>"
_OURS_COLOUR, _OTHERS_COLOUR, _GOAL_COLOUR = "#2f6db3", "#c3c9d1", "#b3402f"


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def check(path: str) -> None:
    """``BenchError`` if a chart cannot be drawn into this file."""
    if os.path.splitext(path)[1] not in ENDINGS:
        raise BenchError(f"--chart: a chart is a {' or '.join(ENDINGS)} file, not {path}")
    if not has_matplotlib():
        raise BenchError("--chart needs Matplotlib: pip install 'mpchannel[bench]'")


def draw(about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], path: str) -> None:
    """Above, how many times as good as a Pipe; below, what a Pipe cannot do, as rates."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    compared = [row for row in rows if _times_as_good(row, OURS.name) is not None]
    alone = [row for row in rows if row["unit"] == "1/s" and row not in compared]
    peers = sorted({name for row in rows for name in row["figures"]} - {PIPE.name, OURS.name})
    height = 1.8 + 0.3 * len(compared) + 0.25 * len(alone) * (1 + len(peers) / 4)
    figure = Figure(figsize=(9, height), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(
        2, 1, height_ratios=(max(1, len(compared)), max(1, len(alone)) * (1 + len(peers) / 4))
    )
    _draw_compared(upper, compared, peers)
    _draw_alone(lower, alone)
    figure.suptitle(
        f"mpchannel and multiprocessing.Pipe, medians; rounds: {about['rounds']}\n"
        f"{about['python']}, {about['system']}, cores: {about['cores']}",
        fontsize="medium",
    )
    # Text stays text, and the same figures give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mpchannel"}):
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.endswith(".svg") else None)


def _times_as_good(row: Mapping[str, Any], name: str) -> float | None:
    """How many times as good as a Pipe, whether lower or higher is better."""
    goal = GOALS.get(row["key"])
    if goal is not None and goal.of != PIPE.name:
        return None
    ratio = row["ratio"]
    if name != OURS.name:
        theirs, pipe = typical(row["figures"].get(name, ())), typical(row["figures"].get(PIPE.name, ()))
        ratio = theirs / pipe if isinstance(theirs, float) and isinstance(pipe, float) else None
    if not ratio:
        return None
    return float(1 / ratio if row["better"] == LOWER else ratio)


def _draw_compared(axes: Any, rows: Sequence[Mapping[str, Any]], peers: Sequence[str]) -> None:
    places = range(len(rows))
    ours = [_times_as_good(row, OURS.name) or 1.0 for row in rows]
    # From 1 on: what is better than a Pipe goes to the right, what is worse to the left.
    axes.barh(places, [each - 1 for each in ours], left=1, color=_OURS_COLOUR, height=0.62, label=OURS.name)
    for marker, peer in zip(_MARKERS * len(peers), peers, strict=False):
        points = [(good, place) for place, row in enumerate(rows) if (good := _times_as_good(row, peer)) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color="#444444", markersize=4, alpha=0.8, label=peer)
    for place, row in enumerate(rows):
        goal = GOALS.get(row["key"])
        if goal is not None:
            limit = 1 / goal.limit if row["better"] == LOWER else goal.limit
            label = "goal" if not axes.get_legend_handles_labels()[1].count("goal") else None
            axes.plot([limit, limit], [place - 0.45, place + 0.45], color=_GOAL_COLOUR, linewidth=2, label=label)
        good = ours[place]
        axes.annotate(
            f"{significant(good)}x",
            (good, place),
            xytext=(4 if good >= 1 else -4, 0),
            textcoords="offset points",
            ha="left" if good >= 1 else "right",
            va="center",
            fontsize="x-small",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
        )
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.margins(x=0.1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.set_yticks(places, [row["scenario"] for row in rows], fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel("times as good as a Pipe (further right is better)", fontsize="small")
    axes.grid(axis="x", alpha=0.3)
    if rows:
        axes.legend(fontsize="x-small", loc="best")


def _draw_alone(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    names: list[str] = []
    rates, colours, goals = [], [], []
    for row in rows:
        goal = GOALS.get(row["key"])
        for name, outcomes in row["figures"].items():
            rate = typical(outcomes)
            if isinstance(rate, float) or name == PIPE.name:
                goals += [(len(names), goal.limit)] if goal is not None and name == OURS.name else []
                names.append(f"{row['scenario']}: {name}")
                rates.append(rate if isinstance(rate, float) else 0.0)
                colours.append(_OURS_COLOUR if name == OURS.name else _OTHERS_COLOUR)
    axes.barh(range(len(names)), rates, color=colours, height=0.62)
    for place, rate in enumerate(rates):
        text = f"{significant(rate)}/s" if rate else "stuck: waits for the receiver"
        axes.annotate(text, (rate, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize="x-small")
    for place, limit in goals:
        axes.plot([limit, limit], [place - 0.45, place + 0.45], color=_GOAL_COLOUR, linewidth=2)
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("messages per second, all posted before the first is read", fontsize="small")
    axes.grid(axis="x", alpha=0.3)
