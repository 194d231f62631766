"""``python -m mpchannel top PID``: the ends that a program's processes hold, and what waits in them, from outside."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..demo.table import print_table
from .graph import page, svg
from .processes import End, Look, LookError, look_at

PROCESSES = ("pid", "parent", "process", "state", "age", "CPU", "memory", "in overflow", "ends", "waits for")
CHANNELS = ("end", "held by", "unread", "end", "held by", "unread", "grows", "unread for")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Show a process and its descendants live: which process holds which end of a channel, how much waits in it, "
        "and who waits for whom. From outside: it works on processes that are stuck, and costs them nothing. Only the "
        "same user can look."
    )
    parser.add_argument("pid", metavar="PID", type=int, help="the process at the top")
    parser.add_argument("--once", action="store_true", help="print it once, instead of live (which needs rich)")
    parser.add_argument("--json", action="store_true", help="print it once, as JSON")
    parser.add_argument("--graph", metavar="FILE", help="draw who talks to whom into a .svg or .html file")
    parser.add_argument(
        "--interval", metavar="S", type=float, default=1.0, help="seconds between two looks (default: 1)"
    )


def run(options: argparse.Namespace) -> int:
    """Returns the exit code: 0, or 1 if there is nothing to be seen, or not the means to show it."""
    try:
        if not 0.05 <= options.interval <= 3600:
            raise LookError("--interval must be between 0.05 and 3600 seconds")
        if options.graph and not options.graph.endswith((".svg", ".html")):
            raise LookError("--graph draws into a file whose name ends with .svg or .html")
        history = History()
        now = history.look(options.pid)
        if options.graph:
            Path(options.graph).write_text(page(now) if options.graph.endswith(".html") else svg(now))
            print(f"drawn: {options.graph}", file=sys.stderr)
        if options.json:
            print(json.dumps(now.plain(), indent=1))
        elif options.once:
            time.sleep(options.interval)  # so that there are two looks, and rates between them
            print_look(history.look(options.pid), history)
        elif not options.graph:
            return live(options.pid, options.interval, history)
    except (LookError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


class History:
    """What is known from several looks: how fast something grows, and for how long it has not been empty."""

    def __init__(self) -> None:
        self.before: Look | None = None
        self.now: Look | None = None
        self._since: dict[int, float] = {}  # by inode of an end: when something unread was first seen

    def look(self, pid: int) -> Look:
        self.before, self.now = self.now, look_at(pid)
        unread = {end.inode for end in self.now.ends if end.unread}
        self._since = {inode: self._since.get(inode, self.now.when) for inode in unread}
        return self.now

    def growth(self, inodes: Sequence[int]) -> float | None:
        """Bytes per second by which what waits in these ends became more since the last look."""
        if self.before is None or self.now is None:
            return None
        then = {end.inode: end.unread + end.overflow for end in self.before.ends}
        today = {end.inode: end.unread + end.overflow for end in self.now.ends}
        if not all(inode in then and inode in today for inode in inodes):
            return None
        more = sum(today[inode] - then[inode] for inode in inodes)
        return more / (self.now.when - self.before.when)

    def cpu(self, pid: int) -> float | None:
        """The part of one core that a process used since the last look."""
        if self.before is None or self.now is None:
            return None
        then, today = ({each.pid: each.cpu for each in look.processes} for look in (self.before, self.now))
        if pid not in then or pid not in today:
            return None
        return (today[pid] - then[pid]) / (self.now.when - self.before.when)

    def unread_for(self, inodes: Sequence[int]) -> float | None:
        """Seconds for which there has been something unread in one of these, as far as was seen."""
        since = [self._since[inode] for inode in inodes if inode in self._since]
        return None if not since or self.now is None else self.now.when - min(since)


def process_lines(now: Look, history: History) -> list[list[str]]:
    lines = []
    for process in now.processes:
        held = sum(any(pid == process.pid for pid, _ in end.holders) for end in now.ends)
        waits = sorted({thread.waits or "nothing" for thread in process.threads})
        cpu = history.cpu(process.pid)
        lines.append(
            [
                str(process.pid),
                str(process.parent),
                process.name,
                process.words,
                duration(process.age),
                "-" if cpu is None else f"{cpu:.0%}",
                f"{process.memory / 2**20:,.0f} MiB",
                size(process.overflow),
                f"{held:,}",
                ", ".join(waits),
            ]
        )
    return lines


def channel_lines(now: Look, history: History, most: int | None = None) -> list[list[str]]:
    """The channels, those with most unread first. *most*: no more of them."""
    channels = sorted(
        now.channels(),
        key=lambda each: (-sum(end.unread + end.overflow for end in each if end), each[0].holders, each[0].inode),
    )
    lines = []
    for end, other in channels[:most]:
        inodes = [end.inode] if other is None else [end.inode, other.inode]
        growth, since = history.growth(inodes), history.unread_for(inodes)
        lines.append(
            [
                str(end.inode),
                holders(end.holders),
                unread(end),
                *(
                    [str(end.peer or "gone"), "another program" if end.peer else "-", "-"]
                    if other is None
                    else [str(other.inode), holders(other.holders), unread(other)]
                ),
                "-" if growth is None else f"{growth:+,.0f} B/s",
                "-" if since is None else duration(since),
            ]
        )
    return lines


def unread(end: End) -> str:
    return f"{end.unread:,} + {size(end.overflow)}" if end.overflow else f"{end.unread:,}"


def holders(held: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{pid} fd {number}" for pid, number in held)


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def print_look(now: Look, history: History) -> None:
    print_table(PROCESSES, process_lines(now, history))
    print()
    lines = channel_lines(now, history)
    if lines:
        print_table(CHANNELS, lines)
    else:
        print("no channels")
    for hint in now.hints:
        print(f"! {hint}")


def live(pid: int, interval: float, history: History) -> int:
    """Show it until the process is gone, or Ctrl-C."""
    try:
        from rich.console import Group
        from rich.live import Live
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError:
        raise LookError("the live view needs rich: pip install 'mpchannel[top]'; or use --once") from None

    def shown(now: Look) -> Any:
        tables = []
        room = max(5, os.get_terminal_size().lines - len(now.processes) - 9) if sys.stdout.isatty() else 40
        for heads, lines in (
            (PROCESSES, process_lines(now, history)),
            (CHANNELS, channel_lines(now, history, room)),
        ):
            table = Table(expand=True, header_style="bold")
            for head in heads:
                table.add_column(head, justify="left" if head in ("process", "held by", "waits for") else "right")
            for line in lines:
                table.add_row(*line, style="red" if line[-1].endswith(("min", "h")) and heads is CHANNELS else None)
            tables.append(table)
        return Group(*tables, *(Text(f"! {hint}", style="bold red") for hint in now.hints))

    with Live(shown(history.look(pid)), refresh_per_second=8, screen=sys.stdout.isatty()) as view:
        try:
            while True:
                time.sleep(interval)
                now = history.look(pid)
                view.update(shown(now))
                if now.processes[0].state == "Z":
                    break
        except KeyboardInterrupt:
            return 0
        except LookError:
            pass  # it is gone
    print(f"process {pid} has ended")
    return 0
