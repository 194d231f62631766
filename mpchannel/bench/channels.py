"""The scenarios in rounds, side by side in one run, and the table of what came out.

In each round each scenario runs with each kind, one right after the other, each round beginning with another one, so
that what else the machine does hits all of them. Each run has two fresh processes.
"""

from __future__ import annotations

import importlib
import multiprocessing
import statistics
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from ..context import get_context
from ..demo.children import Children
from ..demo.progress import ProgressLine
from ..demo.table import print_table
from .figures import LOWER, BenchError, print_surroundings, result_of, significant
from .scenarios import KINDS, OURS, PIPE, SCENARIOS, Kind, Scenario, Side


def _take_part(
    module: str, place: int, kind: int, near: bool, times: int, end: Any, signal: Connection, result: Connection | None
) -> None:
    """What both processes do. Scenarios and kinds are named by their place in their tables, which every process has."""
    which: Kind = importlib.import_module(module).KINDS[kind]
    outcome = SCENARIOS[place].run(Side(near, which, end, signal, times))
    if result is not None:
        result.send(outcome)


def run_once(place: int, kind: int, times: int, module: str = __name__) -> Any:
    """One run of one scenario, in two fresh processes: a ``Figure``. *kind*: the place in the ``KINDS`` of *module*."""
    context = get_context("forkserver")
    context.set_forkserver_preload([module])
    ends = importlib.import_module(module).KINDS[kind].pair()
    signals = multiprocessing.Pipe()
    result, for_result = multiprocessing.Pipe(duplex=False)
    with Children() as children:
        for near, end, signal in zip((True, False), ends, signals, strict=True):
            put = for_result if near else None
            children.start(
                context.Process(target=_take_part, args=(module, place, kind, near, times, end, signal, put))
            )
            end.close()
            signal.close()
        for_result.close()
        return result_of(result)


def can(kind: Kind, scenario: Scenario) -> bool:
    """Whether the scenario is for this kind."""
    return kind is OURS or (scenario.pipe_can if kind is PIPE else scenario.peers_can)


def chosen(only: str) -> list[int]:
    """The places of the scenarios with *only* in their name. Raises ``BenchError`` if there is none."""
    places = [place for place, scenario in enumerate(SCENARIOS) if only in scenario.name]
    if not places:
        raise BenchError(f"no scenario has {only!r} in its name")
    return places


def measure(
    rounds: int, scale: float, only: str = "", kinds: Sequence[Kind] = KINDS, module: str = __name__
) -> list[dict[str, Any]]:
    """All scenarios with *only* in their name, in all rounds: one dict for each, with a list of figures per kind."""
    line = ProgressLine()
    rows: list[dict[str, Any]] = []
    places = chosen(only)
    for place in places:
        scenario = SCENARIOS[place]
        times = max(1, round(scenario.times * scale))
        row: dict[str, Any] = {
            "scenario": scenario.name.format(times=times),
            "unit": scenario.unit,
            "better": scenario.better,
            "times": times,
            "figures": {kind.name: [] for kind in kinds if can(kind, scenario)},
        }
        if scenario.goal is not None:
            row["goal"] = {"limit": scenario.goal.limit, "of": "figure" if scenario.goal.absolute else "ratio"}
        rows.append(row)
    for number in range(rounds):
        order = [(number + place) % len(kinds) for place in range(len(kinds))]
        for place, row in zip(places, rows, strict=True):
            for kind in order:
                name = kinds[kind].name
                if name not in row["figures"]:
                    continue
                line.show(f"round {number + 1} of {rounds}: {row['scenario']}, {name}")
                try:
                    row["figures"][name].append(run_once(place, kind, row["times"], module))
                except BenchError as error:
                    line.clear()
                    raise BenchError(f"{row['scenario']}, {name}: {error}") from None
    line.clear()
    return rows


# What came out


def typical(figures: Sequence[Any], key: str = "p50") -> Any:
    """The median of the rounds, of each round's *key* if it has several; what says that it was stuck, or never came;
    ``None`` if there is no such thing.
    """
    others = [each for each in figures if not _is_number(each)]
    if others:
        return min(others, key=lambda each: tuple(each.values()))
    numbers = [each[key] if isinstance(each, dict) else each for each in figures]
    return statistics.median(numbers) if numbers else None


def _is_number(figure: Any) -> bool:
    return not isinstance(figure, dict) or "p50" in figure


def noise(figures: Sequence[Any]) -> float | None:
    """The middle half of the rounds, as a part of their median."""
    numbers = [each["p50"] if isinstance(each, dict) else each for each in figures if _is_number(each)]
    if len(numbers) < max(2, len(figures)):
        return None
    low, middle, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return float((high - low) / middle)


def ratio(row: dict[str, Any], name: str = OURS.name) -> float | None:
    """The median of the kind of that name, divided by Pipe's."""
    pipe, other = (typical(row["figures"].get(kind, ())) for kind in (PIPE.name, name))
    return other / pipe if isinstance(pipe, float) and isinstance(other, float) else None


def met(row: dict[str, Any]) -> bool | None:
    """Whether the row's goal was reached; ``None`` if it has none, or nothing to compare with."""
    goal = row.get("goal")
    if goal is None:
        return None
    figure = typical(row["figures"][OURS.name]) if goal["of"] == "figure" else ratio(row)
    if not isinstance(figure, float):
        return None
    return bool(figure <= goal["limit"] if row["better"] == LOWER else figure >= goal["limit"])


def goal_of(row: dict[str, Any]) -> str:
    goal = row.get("goal")
    if goal is None:
        return "-"
    sign = "<=" if row["better"] == LOWER else ">="
    limit = goal["limit"]
    if goal["of"] == "ratio":
        return f"{sign} {limit:.3g}x"
    return f"{sign} {limit / 1000:g}k" if limit >= 10_000 else f"{sign} {limit:g}"


def shown(figure: Any) -> str:
    if figure is None:
        return "-"
    if isinstance(figure, dict):
        return "never" if "never" in figure else f"stuck at {figure['stuck_after']:,}"
    return significant(figure)


def print_about(about: dict[str, Any]) -> None:
    print_surroundings(about)
    print("each run in two fresh processes, free to use every core unless it says otherwise")
    print(f"100 MiB array: {'NumPy float64' if about['numpy'] else 'a bytearray (NumPy is not installed)'}")
    print()


HEADS = ("medians", "unit", *(kind.name for kind in KINDS), "ratio", "goal", "met", "p99", "noise", "better")


def lines(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The table's lines, under ``HEADS``."""
    table = []
    for row in rows:
        ours = row["figures"][OURS.name]
        compared, spread, reached = ratio(row), noise(ours), met(row)
        table.append(
            [
                row["scenario"],
                row["unit"],
                *(shown(typical(row["figures"].get(kind.name, ()))) for kind in KINDS),
                "-" if compared is None else f"{significant(compared)}x",
                goal_of(row),
                {True: "yes", False: "no", None: "-"}[reached],
                shown(typical(ours, "p99") if any(isinstance(each, dict) and "p99" in each for each in ours) else None),
                "-" if spread is None else f"{spread:.0%}",
                row["better"],
            ]
        )
    return table


def print_figures(rows: Sequence[dict[str, Any]]) -> None:
    """The medians, how they compare, and which goals are met."""
    print_table(HEADS, lines(rows))
    print("ratio: mpchannel's median divided by Pipe's. goal: of the ratio (x), or of the figure.")
    print("p99, noise: of mpchannel; within a run, and the middle half of the rounds by their")
    print("median. better: whether a lower or a higher figure, and so ratio, is the better one.")
    print("stuck: messages until the next send would have waited for a receiver that has not")
    print("begun to read. move: until its new holder has read the first byte. never: not within")
    print("half a second. 1,000 ends: read with multiprocessing.connection.wait, and by listeners.")
