"""Channels and ``multiprocessing.Pipe``, measured side by side in one run.

Everything is measured in rounds. In each round each scenario runs with a Pipe and with a channel, one right after the
other, in alternating order, so that what else the machine does hits both. Each run has two fresh processes: *near*
takes the time, *far* is at the other end.

A scenario is one function, run by both processes, and one line in ``SCENARIOS``. The only thing that it may know of
the two kinds is what ``Kind`` says.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from ..channel import MessageChannel
from ..context import get_context
from ..demo.children import Children
from ..demo.progress import ProgressLine
from ..demo.table import print_table
from ..sharedbuffer import SharedBuffer
from .figures import HIGHER, LOWER, BenchError, has_numpy, print_surroundings, result_of, significant


class Kind(NamedTuple):
    """What is measured: how to get a pair of ends, and what its methods are called."""

    name: str
    pair: Callable[[], Any]
    send: str
    hand_over: Callable[[Any, Any], None]


def _send_connection(through: Any, end: Any) -> None:
    through.send(end)
    end.close()  # multiprocessing has made itself a copy for the receiver


def _transfer_port(through: Any, port: Any) -> None:
    through.post_message(port, transfer=[port])


KINDS = (
    Kind("Pipe", multiprocessing.Pipe, "send", _send_connection),
    Kind("mpchannel", MessageChannel, "post_message", _transfer_port),
)


@dataclass
class Side:
    """What a scenario's function is given, in each of the two processes."""

    near: bool
    kind: Kind
    end: Any
    signal: Connection  # between the two processes, the same for both kinds
    times: int
    send: Callable[[Any], object] = field(init=False)
    recv: Callable[[], Any] = field(init=False)

    def __post_init__(self) -> None:
        self.send = getattr(self.end, self.kind.send)
        self.recv = self.end.recv


Figure = float | None
Run = Callable[[Side], Figure]
"""One run, in one of the processes. *near* returns the figure in the scenario's unit, *far* ``None``."""


class StuckError(Exception):
    """The next send would wait for the receiver, for ever: it does not read yet. Its argument: messages sent so far."""


# Messages


def small_dict() -> Any:
    return {"id": 4711, "method": "search", "path": "/usr/share/doc", "limit": 12.5}


def bytes_of(size: int) -> Callable[[], Any]:
    return lambda: os.urandom(size)


def array_100_mib() -> Any:
    """float64, or without NumPy a bytearray."""
    if not has_numpy():
        return bytearray(100 << 20)
    import numpy

    return numpy.arange((100 << 20) // 8, dtype=numpy.float64)


def use_all_of(message: Any) -> None:
    """What is mapped but was never looked at has not arrived yet."""
    if isinstance(message, bytearray):
        memoryview(message)[::4096].tobytes()
    else:
        message.sum()


# Scenarios


def round_trip(make: Callable[[], Any], pinned: bool = False) -> Run:
    """Microseconds for a message there and back."""

    def run(side: Side) -> Figure:
        if pinned:
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        warm_up = side.times // 10 + 1
        send, recv = side.send, side.recv
        if not side.near:
            for _ in range(warm_up + side.times):
                send(recv())
            return None
        message = make()
        for _ in range(warm_up):
            send(message)
            recv()
        start = time.perf_counter()
        for _ in range(side.times):
            send(message)
            recv()
        return (time.perf_counter() - start) / side.times * 1e6

    return run


def one_way(make: Callable[[], Any]) -> Run:
    """Messages per second, from the first send until the receiver has confirmed the last one."""

    def run(side: Side) -> Figure:
        send, recv = side.send, side.recv
        batches = (side.times // 10 + 1, side.times)  # the first to warm up
        if not side.near:
            for count in batches:
                for _ in range(count):
                    recv()
                send("all received")
            return None
        message = make()
        for count in batches:
            start = time.perf_counter()
            for _ in range(count):
                send(message)
            recv()
            seconds = time.perf_counter() - start
        return side.times / seconds

    return run


def used(make: Callable[[], Any], first_only: bool = False) -> Run:
    """Messages per second that are received and used, never more than two ahead of the receiver, until the last one
    was. *first_only*: of the first one alone, which nothing was made ready for.
    """

    def run(side: Side) -> Figure:
        send, recv = side.send, side.recv
        warm_up, count = (0, 1) if first_only else (3, side.times)
        if not side.near:
            use_all_of(make())  # so that all that this needs is loaded
            send("ready")
            for _ in range(warm_up + count):
                message = recv()
                use_all_of(message)
                send("used")
                del message
            return None
        message = make()
        recv()
        for batch in (warm_up, count):
            start = time.perf_counter()
            for number in range(batch):
                if number >= 2:
                    recv()
                send(message)
            for _ in range(min(2, batch)):
                recv()
            seconds = time.perf_counter() - start
        return count / seconds

    return run


def move_buffer(side: Side) -> Figure:
    """Microseconds from moving a buffer that was filled until its receiver has read its first byte."""
    warm_up = 5
    if not side.near:
        for _ in range(warm_up + side.times):
            buffer = side.recv()
            buffer[0] = (buffer[0] + 1) % 256
            side.end.post_message(buffer, transfer=[buffer])
        return None
    buffer = SharedBuffer(1 << 30)
    for start in range(0, len(buffer), 1 << 20):
        buffer[start : start + (1 << 20)] = b"\x01" * (1 << 20)
    begin = 0.0
    for number in range(warm_up + side.times):
        if number == warm_up:
            begin = time.perf_counter()
        first = buffer[0]
        side.end.post_message(buffer, transfer=[buffer])
        buffer = side.recv()
        if buffer[0] != (first + 1) % 256:
            raise BenchError("the buffer came back without the change")
    return (time.perf_counter() - begin) / (2 * side.times) * 1e6


def burst(drained: bool) -> Run:
    """Messages per second, all posted before the first is read: the posting alone, or until they were read."""

    def run(side: Side) -> Figure:
        send, recv = side.send, side.recv
        if not side.near:
            send(recv())
            if side.signal.recv() == "read":
                for _ in range(side.times):
                    recv()
                send("all received")
            return None
        message = small_dict()
        send(message)  # to warm up
        recv()
        is_pipe = isinstance(side.end, Connection)
        if is_pipe:
            os.set_blocking(side.end.fileno(), False)  # rather than be stuck for ever
        start = time.perf_counter()
        for count in range(side.times):
            try:
                send(message)
            except BlockingIOError:
                side.signal.send("do not read")
                raise StuckError(count) from None
        posted = time.perf_counter() - start
        if is_pipe:
            os.set_blocking(side.end.fileno(), True)
        side.signal.send("read")
        recv()
        return side.times / (time.perf_counter() - start if drained else posted)

    return run


def hand_over(side: Side) -> Figure:
    """Microseconds to make a pair, hand one end to the other process, get a message from there and see it close."""
    warm_up = 5
    if not side.near:
        for _ in range(warm_up + side.times):
            end = side.recv()
            getattr(end, side.kind.send)("hello")
            end.close()
        return None
    start = 0.0
    for number in range(warm_up + side.times):
        if number == warm_up:
            start = time.perf_counter()
        ours, theirs = side.kind.pair()
        side.kind.hand_over(side.end, theirs)
        ours.recv()
        try:
            ours.recv()
        except EOFError:
            ours.close()
    return (time.perf_counter() - start) / side.times * 1e6


def create_and_close(side: Side) -> Figure:
    """Microseconds to make a pair and close both ends, in one process."""
    if not side.near:
        return None
    pair = side.kind.pair
    start = 0.0
    for number in range(side.times + 5):
        if number == 5:
            start = time.perf_counter()
        one, other = pair()
        one.close()
        other.close()
    return (time.perf_counter() - start) / side.times * 1e6


class Scenario(NamedTuple):
    name: str  # may tell the {times}
    unit: str
    better: str
    times: int  # repetitions in one run, at scale 1
    run: Run
    pipe_can: bool = True


SCENARIOS = (
    Scenario("round trip, small dict", "us", LOWER, 4_000, round_trip(small_dict)),
    Scenario("round trip, both on one core", "us", LOWER, 4_000, round_trip(small_dict, pinned=True)),
    Scenario("one way, small dict", "msg/s", HIGHER, 100_000, one_way(small_dict)),
    Scenario("one way, 1 KiB", "msg/s", HIGHER, 100_000, one_way(bytes_of(1 << 10))),
    Scenario("one way, 64 KiB", "msg/s", HIGHER, 20_000, one_way(bytes_of(64 << 10))),
    Scenario("one way, 1 MiB", "msg/s", HIGHER, 1_000, one_way(bytes_of(1 << 20))),
    Scenario("100 MiB array, summed", "msg/s", HIGHER, 20, used(array_100_mib)),
    Scenario("100 MiB array, the first one", "msg/s", HIGHER, 1, used(array_100_mib, first_only=True)),
    Scenario("move a SharedBuffer of 1 GiB", "us", LOWER, 100, move_buffer, pipe_can=False),
    Scenario("burst of {times:,}, posted", "msg/s", HIGHER, 100_000, burst(drained=False)),
    Scenario("burst of {times:,}, and read", "msg/s", HIGHER, 100_000, burst(drained=True)),
    Scenario("create, hand over, use, close", "us", LOWER, 300, hand_over),
    Scenario("create and close", "us", LOWER, 2_000, create_and_close),
)


# Running them


def _take_part(
    place: int, kind: int, near: bool, times: int, end: Any, signal: Connection, result: Connection | None
) -> None:
    """What both processes do. Functions are named by their place in the tables, which every process has."""
    outcome: Any
    try:
        outcome = SCENARIOS[place].run(Side(near, KINDS[kind], end, signal, times))
    except StuckError as stuck:
        outcome = {"stuck_after": stuck.args[0]}
    if result is not None:
        result.send(outcome)


def run_once(place: int, kind: int, times: int) -> Any:
    """One run of one scenario, in two fresh processes: a figure, or ``{"stuck_after": messages}``."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ends = KINDS[kind].pair()
    signals = multiprocessing.Pipe()
    result, for_result = multiprocessing.Pipe(duplex=False)
    with Children() as children:
        for near, end, signal in zip((True, False), ends, signals, strict=True):
            put = for_result if near else None
            children.start(context.Process(target=_take_part, args=(place, kind, near, times, end, signal, put)))
            end.close()
            signal.close()
        for_result.close()
        return result_of(result)


def measure(rounds: int, scale: float) -> list[dict[str, Any]]:
    """All scenarios in all rounds: one dict per scenario, with a list of figures per kind."""
    line = ProgressLine()
    times = [max(1, round(scenario.times * scale)) for scenario in SCENARIOS]
    rows: list[dict[str, Any]] = [
        {
            "scenario": scenario.name.format(times=times[place]),
            "unit": scenario.unit,
            "better": scenario.better,
            "times": times[place],
            "figures": {kind.name: [] for kind in KINDS if scenario.pipe_can or kind is not KINDS[0]},
        }
        for place, scenario in enumerate(SCENARIOS)
    ]
    for number in range(rounds):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        for place, row in enumerate(rows):
            for kind in order:
                name = KINDS[kind].name
                if name not in row["figures"]:
                    continue
                line.show(f"round {number + 1} of {rounds}: {row['scenario']}, {name}")
                try:
                    row["figures"][name].append(run_once(place, kind, times[place]))
                except BenchError as error:
                    line.clear()
                    raise BenchError(f"{row['scenario']}, {name}: {error}") from None
    line.clear()
    return rows


# Showing them


def print_about(about: dict[str, Any]) -> None:
    print_surroundings(about)
    print("each run in two fresh processes, free to use every core unless it says otherwise")
    print(f"100 MiB array: {'NumPy float64' if about['numpy'] else 'a bytearray (NumPy is not installed)'}")
    print()


def print_figures(rows: Sequence[dict[str, Any]]) -> None:
    """The medians, and how they compare."""
    table = []
    for row in rows:
        pipe, ours = (typical(row["figures"].get(kind.name, ())) for kind in KINDS)
        ratio = significant(ours / pipe) if isinstance(pipe, float) and isinstance(ours, float) else "-"
        table.append([row["scenario"], row["unit"], shown(pipe), shown(ours), ratio, row["better"]])
    print_table(("medians", "unit", *(kind.name for kind in KINDS), "ratio", "better"), table)
    print("ratio: mpchannel's median divided by Pipe's. better: whether a lower or a")
    print("higher figure, and so ratio, is the better one. stuck: messages until the next")
    print("send would have waited for a receiver that has not begun to read. move: until")
    print("its new holder has read the first byte")


def typical(figures: Sequence[Any]) -> Any:
    """The median, or how many messages it got to before it was stuck; ``None`` if there is no such thing."""
    if not figures:
        return None
    numbers = [each for each in figures if isinstance(each, float)]
    return (
        statistics.median(numbers)
        if len(numbers) == len(figures)
        else min(each["stuck_after"] for each in figures if isinstance(each, dict))
    )


def shown(figure: Any) -> str:
    if figure is None:
        return "-"
    return significant(figure) if isinstance(figure, float) else f"stuck at {figure:,}"
