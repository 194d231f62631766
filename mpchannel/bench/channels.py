"""Channels and ``multiprocessing.Pipe``, measured side by side in one run.

Everything is measured in rounds. In each round each scenario runs with each kind, one right after the other, in an
order that is rotated from round to round, so that what else the machine does hits all. Each run has two fresh
processes: *near* takes the time, *far* is at the other end.

A scenario is one function, run by both processes, and one line in ``SCENARIOS``. The only thing that it may know of
the kinds is what ``Kind`` says.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, Final, NamedTuple

from ..context import get_context
from ..demo.children import Children
from ..demo.progress import ProgressLine
from ..demo.table import print_table
from . import ends, talk
from .figures import HIGHER, LOWER, PEERS, BenchError, fixed_work, print_surroundings, result_of, significant
from .goals import count_met, judge, shown_goal, spread, typical
from .kinds import FAILED, KINDS, MISSES, Group, Kind, Missed, Run, Side


class Scenario(NamedTuple):
    name: str  # may tell the {times} and the {size}
    unit: str
    better: str
    group: Group
    run: Run
    times: int  # repetitions in one run, at scale 1
    size: int = 0  # how many there are of what makes it hard; fewer only below a scale of 0.2
    pinned: bool = False  # both processes to one core

    def scaled(self, scale: float) -> Scenario:
        times = max(1, round(self.times * scale))
        size = max(min(1, self.size), round(self.size * min(1.0, scale * 5)))
        return self._replace(name=self.name.format(times=times, size=size), times=times, size=size)


SCENARIOS: Final = (
    Scenario("round trip, small dict", "us", LOWER, Group.TALK, talk.round_trip, 4_000),
    Scenario("round trip, one core", "us", LOWER, Group.TALK, talk.round_trip, 4_000, pinned=True),
    Scenario("one way, small dict", "1/s", HIGHER, Group.TALK, talk.one_way(talk.small_dict), 100_000),
    Scenario("one way, 1 KiB", "1/s", HIGHER, Group.TALK, talk.one_way(talk.bytes_of(1 << 10)), 100_000),
    Scenario("one way, 64 KiB", "1/s", HIGHER, Group.TALK, talk.one_way(talk.bytes_of(64 << 10)), 20_000),
    Scenario("one way, 1 MiB", "1/s", HIGHER, Group.TALK, talk.one_way(talk.bytes_of(1 << 20)), 1_000),
    Scenario("100 MiB array, summed", "1/s", HIGHER, Group.ARRAYS, talk.used(), 10),
    Scenario("100 MiB array, first one", "1/s", HIGHER, Group.ARRAYS, talk.used(first_only=True), 1),
    Scenario("move 1 GiB SharedBuffer", "us", LOWER, Group.MOVE, talk.move_buffer, 100),
    Scenario("burst of {times:,}, posted", "1/s", HIGHER, Group.BURST, talk.burst(read=False), 100_000),
    Scenario("burst of {times:,}, and read", "1/s", HIGHER, Group.BURST, talk.burst(read=True), 100_000),
    Scenario("post, none queued", "us", LOWER, Group.POST, talk.post_with_queued, 2_000),
    Scenario("post, {size:,} queued", "us", LOWER, Group.POST, talk.post_with_queued, 2_000, 100_000),
    Scenario("hand over", "1/s", HIGHER, Group.HAND_OVER, ends.hand_over, 300),
    Scenario("hand over, one core", "1/s", HIGHER, Group.HAND_OVER, ends.hand_over, 500, pinned=True),
    Scenario("reply streams, one core", "1/s", HIGHER, Group.HAND_OVER, ends.reply_streams, 500, pinned=True),
    Scenario("create and close", "us", LOWER, Group.CREATE, ends.create_and_close, 2_000),
    Scenario("{size:,} ends, one at a time", "1/s", HIGHER, Group.MANY, ends.one_at_a_time(), 1_000, 1_000),
    Scenario("{size:,} ends, with wait()", "1/s", HIGHER, Group.WAIT, ends.one_at_a_time(by_wait=True), 300, 1_000),
    Scenario("{size:,} ends, flood", "1/s", HIGHER, Group.MANY, ends.flood, 50, 1_000),
    Scenario("echo, 1 in flight", "1/s", HIGHER, Group.EVENTS, talk.echo(1), 5_000),
    Scenario("echo, 64 in flight", "1/s", HIGHER, Group.EVENTS, talk.echo(64), 30_000),
    Scenario("listener, no other port", "us", LOWER, Group.PORTS, talk.one_of_many_ports, 2_000, pinned=True),
    Scenario(
        "listener, {size:,} other ports", "us", LOWER, Group.PORTS, talk.one_of_many_ports, 2_000, 100, pinned=True
    ),
    Scenario(
        "listener, {size:,} other ports", "us", LOWER, Group.PORTS, talk.one_of_many_ports, 2_000, 10_000, pinned=True
    ),
    Scenario("SIGKILL noticed", "ms", LOWER, Group.DEATH, ends.killed(), 10),
    Scenario("SIGKILL, with a bystander", "ms", LOWER, Group.DEATH, ends.killed(bystander=True), 10),
    Scenario("memory of an idle end", "bytes", LOWER, Group.MEMORY, ends.memory, 1, 2_000),
    Scenario("descriptors of an end", "1", LOWER, Group.MEMORY, ends.descriptors, 1, 200),
    Scenario("import", "ms", LOWER, Group.IMPORT, ends.import_time, 10),
)


# Running them


def run_side(place: int, scale: float, kind: Kind, end: Any, signal: Any, near: bool) -> Any:
    """What both processes do. The scenario is named by its place in the table, which every process has."""
    scenario = SCENARIOS[place].scaled(scale)
    try:
        return scenario.run(Side(near, kind, end, signal, scenario.times, scenario.size))
    except Missed as missed:
        return dict([missed.args])


def _take_part(
    place: int, scale: float, kind: Kind, end: Any, signal: Any, near: bool, result: Connection | None
) -> None:
    if SCENARIOS[place].pinned:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    opened = kind.open(end, near)
    if kind.start_far is not None:
        if not near:
            return
        signal = kind.start_far(opened, place, scale)
    outcome = run_side(place, scale, kind, opened, signal, near)
    if result is not None:
        result.send(outcome)
    opened.close()


def run_once(place: int, kind: Kind, scale: float) -> Any:
    """One run of one scenario, in two fresh processes: ``Measured``, or one of ``MISSES``: ``{"stuck_after": 278}``."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ends = kind.pair()
    signals = multiprocessing.Pipe()
    result, for_result = multiprocessing.Pipe(duplex=False)
    with Children() as children:
        for near, end, signal in zip((True, False), ends, signals, strict=True):
            put = for_result if near else None
            children.start(context.Process(target=_take_part, args=(place, scale, kind, end, signal, near, put)))
            end.close()
            signal.close()
        for_result.close()
        return result_of(result)


def measure(rounds: int, scale: float, kinds: Sequence[Kind] = KINDS) -> tuple[list[dict[str, Any]], list[float]]:
    """All scenarios in all rounds: one dict per scenario, with a list of figures per kind (and one of the 99th
    percentiles, where it is about times); and how long the same work took in each round.
    """
    line = ProgressLine()
    rows: list[dict[str, Any]] = [
        {
            "key": scenario.name,
            "scenario": scaled.name,
            "unit": scaled.unit,
            "better": scaled.better,
            "times": scaled.times,
            "pinned": scaled.pinned,
            "figures": {kind.name: [] for kind in kinds if scaled.group in kind.groups},
            "p99": {},
        }
        for scenario, scaled in ((scenario, scenario.scaled(scale)) for scenario in SCENARIOS)
    ]
    work = []
    for number in range(rounds):
        work.append(fixed_work())
        first = number % len(kinds)
        for place, row in enumerate(rows):
            for kind in (*kinds[first:], *kinds[:first]):
                if SCENARIOS[place].group not in kind.groups:
                    continue
                line.show(f"round {number + 1} of {rounds}: {row['scenario']}, {kind.name}")
                try:
                    outcome = run_once(place, kind, scale)
                except BenchError as error:
                    line.clear()
                    if kind in KINDS:
                        raise BenchError(f"{row['scenario']}, {kind.name}: {error}") from None
                    outcome = {FAILED: str(error)}  # others' faults do not spoil the rest
                _enter(row, kind.name, outcome)
    line.clear()
    for row in rows:
        row["noise"] = {name: spread(figures) for name, figures in row["figures"].items()}
    judge(rows)
    return rows, work


def _enter(row: dict[str, Any], name: str, outcome: Any) -> None:
    if isinstance(outcome, dict):
        row["figures"][name].append(outcome)
        return
    figure, p99 = outcome
    row["figures"][name].append(figure)
    if p99 is not None:
        row["p99"].setdefault(name, []).append(p99)


# Showing them


def print_about(about: dict[str, Any]) -> None:
    print_surroundings(about)
    print("each run in two fresh processes, free to use every core unless it says otherwise")
    print(f"100 MiB array: {'NumPy float64' if about['numpy'] else 'a bytearray (NumPy is not installed)'}")
    for word, projects in (
        ("found", [f"{name} {version}" for name, version in about["peers"].items()]),
        ("missing", [name for name in PEERS.values() if name not in about["peers"]]),
    ):
        print(f"peers {word}: {', '.join(projects) or 'none'}")
    print("(a clone's `python -m benchmarks` measures them as well)")
    print()


def print_figures(rows: Sequence[dict[str, Any]], work: Sequence[float]) -> None:
    """The medians, how they compare, and what they were to reach; and how far they can be trusted."""
    names = [kind.name for kind in KINDS]
    table = []
    for row in rows:
        medians = [shown(typical(row["figures"].get(name, ()))) for name in names]
        table.append([row["scenario"], row["unit"], *medians, _ratio(row), *shown_goal(row)])
    print_table(("medians", "unit", *names, "ratio", "goal", "met"), table)
    print(count_met(rows))
    print()
    table = []
    for row in rows:
        p99 = [shown(typical(row["p99"].get(name, ()))) for name in names]
        noise = [shown_part(row["noise"].get(name)) for name in names]
        table.append([row["scenario"], row["unit"], *p99, *noise])
    print_table(("99th percentile; noise", "unit", *names, *(f"+- {name}" for name in names)), table)
    print(LEGEND)
    print(
        f"the same loop took {min(work):.1f} / {statistics.median(work):.1f} / {max(work):.1f} ms (least, median, most)"
    )


LEGEND: Final = """\
ratio: mpchannel's median divided by Pipe's, or by what the goal is about: for
the SIGKILL with a bystander, Pipe's without one; for ports and queues, ours
without them. goal: of the ratio, or if there is none, of the figure. stuck:
messages until the next send would have waited for a receiver that has not
begun to read. never: not in 1 s. bystander: a process that was forked while
both ends were open. import: beyond multiprocessing's, in a fresh interpreter.
1/s of ends: round trips, or messages. move: until its new holder has read the
first byte. noise (+-): the middle half of the rounds' figures, from its lower
to its upper end, as a part of the median"""


def _ratio(row: dict[str, Any]) -> str:
    return "-" if row["ratio"] is None else significant(row["ratio"])


def shown(figure: Any) -> str:
    """What ``typical`` gave."""
    if figure is None:
        return "-"
    if isinstance(figure, dict):
        ((way, value),) = figure.items()
        return MISSES[way].format(value)
    return significant(figure)


def shown_part(part: float | None) -> str:
    return "-" if part is None else f"{part:.0%}"
