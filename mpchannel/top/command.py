"""The options of ``python -m mpchannel top``, its tables, and the live view."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from . import graph
from .snapshot import Channel, Process, Snapshot, Watch

_PROCESS_HEADS = ("pid", "process", "state", "age", "cpu", "fds", "waits for")
_CHANNEL_HEADS = ("channel", "ends", "waits ->", "grows", "<- waits", "grows")
_STATES = {"R": "running", "S": "sleeping", "D": "in a call", "T": "stopped", "t": "traced", "Z": "ended"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Look at a process and its children from outside: who holds which end of which channel, what waits in them, "
        "and who waits for whom. They are not disturbed; it works on processes that are stopped or stuck."
    )
    parser.add_argument("pid", metavar="PID", type=int, help="the process at the top of the tree")
    parser.add_argument("--once", action="store_true", help="look once, print, and end")
    parser.add_argument("--json", action="store_true", help="print as JSON: one line for each look")
    parser.add_argument("--graph", metavar="FILE", help="draw the topology into FILE (.svg or .html), and end")
    parser.add_argument("--interval", metavar="S", type=float, default=1.0, help="seconds between looks (default: 1)")


def run(options: argparse.Namespace) -> int:
    """Returns the exit code: 0, or 1 if there is nothing to look at, or nobody may."""
    if not 0.05 <= options.interval <= 3600:
        return _fail("--interval must be between 0.05 and 3600 seconds")
    if options.graph and not options.graph.endswith((".svg", ".html")):
        return _fail("--graph needs a file that ends in .svg or .html")
    live = not (options.once or options.json or options.graph)
    if live:
        try:
            import rich.live  # noqa: F401
        except ImportError:
            return _fail(
                "the live view needs rich: pip install 'mpchannel[top]'; --once, --json and --graph work without it"
            )
    try:
        watch = Watch(options.pid)
        now = watch.look()
        if options.graph:
            with open(options.graph, "w", encoding="utf-8") as file:
                file.write(graph.page(now) if options.graph.endswith(".html") else graph.svg(now))
        if options.once:
            time.sleep(min(options.interval, 0.2))  # a second look, for rates
            now = watch.look()
        if options.json:
            _print_json(watch, now, options)
        elif options.once:
            print(as_text(now))
        elif live:
            _live(watch, now, options.interval)
    except BrokenPipeError:
        raise  # nobody reads what we print
    except OSError as error:  # ended, not allowed, or the kernel tells nothing
        return _fail(str(error))
    return 0


def _fail(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 1


def _print_json(watch: Watch, now: Snapshot, options: argparse.Namespace) -> None:
    while True:
        print(json.dumps(now.as_data()), flush=True)
        if options.once or options.graph:
            return
        time.sleep(options.interval)
        try:
            now = watch.look()
        except ProcessLookupError:
            return  # it has ended: so does this


# Tables


def _process_row(process: Process) -> tuple[str, ...]:
    cpu = "" if process.cpu_percent is None else f"{process.cpu_percent:.0f}%"
    state = _STATES.get(process.state, process.state)
    waits = ", ".join(map(str, process.waits_for))
    return str(process.pid), process.name, state, _age(process.age), cpu, str(process.descriptors), waits


def _channel_row(channel: Channel) -> tuple[str, ...]:
    ends = " -- ".join(_holders(each) for each in channel.holders)
    to_first, to_second = channel.queues
    cells = [graph.count(to_second) or "-", _rate(to_second.rate), graph.count(to_first) or "-", _rate(to_first.rate)]
    return f"{channel.inodes[0]}-{channel.inodes[1]}", ends, *cells


def _holders(holders: list[tuple[int, int]]) -> str:
    return "+".join(f"{pid}:{number}" for pid, number in holders) or "on its way"


def _rate(rate: float | None) -> str:
    return "" if not rate else f"{'+' if rate > 0 else '-'}{graph.amount(abs(rate))}/s"


def _age(seconds: float) -> str:
    return (
        f"{seconds:.1f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.0f} h"
    )


def rows(now: Snapshot) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Of the table of processes, and of that of channels: the fullest first. Lifelines of workers are left out."""
    shown = sorted(
        (each for each in now.channels if not each.lifeline),
        key=lambda each: (-sum(queue.total for queue in each.queues), each.inodes),
    )
    return [_process_row(each) for each in now.processes.values()], [_channel_row(each) for each in shown]


def as_text(now: Snapshot) -> str:
    processes, channels = rows(now)
    lines = [*_table(_PROCESS_HEADS, processes), "", *_table(_CHANNEL_HEADS, channels)]
    lines += [
        f"overflow file of {process.pid}: {graph.amount(file['bytes'])}"
        for process in now.processes.values()
        for file in process.files
    ]
    return "\n".join([*lines, *(["", *(f"! {hint}" for hint in now.hints)] if now.hints else [])])


def _table(heads: tuple[str, ...], body: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(line[place]) for line in (heads, *body)) for place in range(len(heads))]
    rule = tuple("-" * width for width in widths)
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (heads, rule, *body)
    ]


# The live view


def view(now: Snapshot) -> Any:
    """What rich shows of a look."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    processes, channels = rows(now)
    tables = []
    for title, heads, body in (("processes", _PROCESS_HEADS, processes), ("channels", _CHANNEL_HEADS, channels)):
        table = Table(title=title, title_justify="left", expand=True, header_style="bold")
        for head in heads:
            table.add_column(head, no_wrap=head != "process")
        for row in body:
            busy = heads is _CHANNEL_HEADS and (row[2], row[4]) != ("-", "-")
            stopped = heads is _PROCESS_HEADS and row[2] == "stopped"
            table.add_row(*map(Text, row), style="red" if stopped else "yellow" if busy else None)
        tables.append(table)
    return Group(*tables, *(Text(f"! {hint}", style="bold red") for hint in now.hints))


def _live(watch: Watch, now: Snapshot, interval: float) -> None:
    from rich.live import Live

    with Live(view(now), auto_refresh=False) as screen:
        while True:
            time.sleep(interval)
            try:
                now = watch.look()
            except ProcessLookupError:
                return  # it has ended: its last look stays
            screen.update(view(now), refresh=True)
