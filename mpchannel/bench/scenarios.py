"""What is measured of channels and of ``multiprocessing.Pipe``, and what is aimed at.

A scenario is one function, run by two processes, and one line in ``SCENARIOS``: *near* takes the time, *far* is at the
other end. The only thing that it may know of what it measures is what ``Kind`` says.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Final, NamedTuple

from ..channel import MessageChannel
from ..context import get_context
from ..demo.children import Children
from ..sharedbuffer import SharedBuffer
from .figures import HIGHER, LOWER, BenchError, has_numpy

_FOR_EVER: Final = 0.5  # seconds; what has not come by then does not come


Answer = Callable[[Any, Any], None]
"""What a server does with a message: it is given the end it came to, and the message."""


class Kind(NamedTuple):
    """What is measured: how to get a pair of ends, what its methods are called, and how one serves many ends."""

    name: str
    pair: Callable[[], Any]
    send: str
    hand_over: Callable[[Any, Any], None] | None = None
    serve: Callable[[Sequence[Any], Connection, Answer], None] | None = None
    """Answer what comes to any of the ends, until the connection has something."""
    serve_on_loop: Callable[[Any, Answer], None] | None = None
    """Have the asyncio loop that runs answer what comes to an end."""


def _send_connection(through: Any, end: Any) -> None:
    through.send(end)
    end.close()  # multiprocessing has made itself a copy for the receiver


def _serve_connections(ends: Sequence[Any], stop: Connection, answer: Answer) -> None:
    while True:
        for end in multiprocessing.connection.wait([*ends, stop]):
            if end is stop:
                return
            connection: Any = end
            answer(connection, connection.recv())


def _read_connection(end: Any, answer: Answer) -> None:
    asyncio.get_running_loop().add_reader(end.fileno(), lambda: answer(end, end.recv()))


def _transfer_port(through: Any, port: Any) -> None:
    through.post_message(port, transfer=[port])


def _listen(port: Any, answer: Answer) -> None:
    port.onmessage = lambda event: answer(port, event.data)


def _serve_ports(ports: Sequence[Any], stop: Connection, answer: Answer) -> None:
    for port in ports:
        _listen(port, answer)
    stop.poll(None)


PIPE = Kind("Pipe", multiprocessing.Pipe, "send", _send_connection, _serve_connections, _read_connection)
OURS = Kind("mpchannel", MessageChannel, "post_message", _transfer_port, _serve_ports, _listen)
KINDS = (PIPE, OURS)


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


Figure = float | dict[str, float] | None
Run = Callable[[Side], Figure]
"""One run, in one of the processes. *near* returns the figure in the scenario's unit: one number, or the ``p50`` and
``p99`` of many; ``{"stuck_after": messages}`` if the next send would wait for a receiver that does not read yet, and
``{"never": seconds}`` for what had not come after so many. *far* returns ``None``."""


def percentiles(seconds: Sequence[float], unit: float = 1e6) -> Figure:
    """Of durations: in microseconds, or whatever *unit* of them makes a second."""
    ordered = sorted(seconds)
    return {
        "p50": statistics.median(ordered) * unit,
        "p99": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] * unit,
    }


def pin() -> None:
    """Only one core from now on: the same for both processes."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def many_files() -> int:
    """As many open files as are allowed from now on."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


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
            pin()
        warm_up = side.times // 10 + 1
        send, recv = side.send, side.recv
        if not side.near:
            for _ in range(warm_up + side.times):
                send(recv())
            return None
        message = make()
        clock, took = time.perf_counter, []
        for _ in range(warm_up):
            send(message)
            recv()
        for _ in range(side.times):
            start = clock()
            send(message)
            recv()
            took.append(clock() - start)
        return percentiles(took)

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
                return {"stuck_after": count}
        posted = time.perf_counter() - start
        if is_pipe:
            os.set_blocking(side.end.fileno(), True)
        side.signal.send("read")
        recv()
        return side.times / (time.perf_counter() - start if drained else posted)

    return run


def hand_over(replies: int) -> Run:
    """Microseconds to make a pair, hand one end to the other process, get so many messages from there and see it close.
    Both processes on one core.
    """

    def run(side: Side) -> Figure:
        assert side.kind.hand_over is not None
        pin()
        warm_up = 5
        if not side.near:
            for _ in range(warm_up + side.times):
                end = side.recv()
                send = getattr(end, side.kind.send)
                for number in range(replies):
                    send(number)
                end.close()
            return None
        took = []
        for number in range(warm_up + side.times):
            start = time.perf_counter()
            ours, theirs = side.kind.pair()
            side.kind.hand_over(side.end, theirs)
            try:
                while True:
                    ours.recv()
            except EOFError:
                ours.close()
            if number >= warm_up:
                took.append(time.perf_counter() - start)
        return percentiles(took)

    return run


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


def _stop(side: Side) -> None:
    """Have *far* stop serving before the ends close, which it does not expect."""
    side.signal.send("stop")
    side.signal.poll(None)  # it closes that when it ends


def many_ends(count: int, flood: bool) -> Run:
    """*count* pairs between the two processes. Round trips per second, on one of them after the other; or messages per
    second, all of them at once in turn.
    """

    def run(side: Side) -> Figure:
        assert side.kind.serve is not None
        assert side.kind.hand_over is not None
        many_files()
        if not side.near:
            left = side.times

            def count_down(end: Any, message: Any) -> None:
                nonlocal left
                left -= 1
                if not left:
                    side.send("all received")

            def echo(end: Any, message: Any) -> None:
                getattr(end, side.kind.send)(message)

            ends = [side.recv() for _ in range(count)]
            side.send("ready")
            side.kind.serve(ends, side.signal, count_down if flood else echo)
            return None
        ends = []
        for _ in range(count):
            ours, theirs = side.kind.pair()
            side.kind.hand_over(side.end, theirs)
            ends.append((getattr(ours, side.kind.send), ours.recv))
        side.recv()
        message = small_dict()
        start = time.perf_counter()
        for number in range(side.times):
            send, recv = ends[number * 7 % count]
            send(message)
            if not flood:
                recv()
        if flood:
            side.recv()
        seconds = time.perf_counter() - start
        _stop(side)
        return side.times / seconds

    return run


def echo_of_listener(in_flight: int, on_loop: bool) -> Run:
    """Messages per second there and back, *in_flight* of them under way. A Pipe's other end is always read by an
    asyncio loop; a port's listener is on the delivery thread, or on such a loop.
    """

    def run(side: Side) -> Figure:
        def echo(end: Any, message: Any) -> None:
            getattr(end, side.kind.send)(message)

        async def serve() -> None:
            assert side.kind.serve_on_loop is not None
            side.kind.serve_on_loop(side.end, echo)
            loop = asyncio.get_running_loop()
            stop = loop.create_future()
            loop.add_reader(side.signal.fileno(), stop.cancel)
            side.signal.send("ready")
            with suppress(asyncio.CancelledError):
                await stop

        if not side.near:
            if on_loop or side.kind is PIPE:
                asyncio.run(serve())
            else:
                assert side.kind.serve is not None
                side.signal.send("ready")
                side.kind.serve([side.end], side.signal, echo)
            return None
        send, recv = side.send, side.recv
        side.signal.recv()
        message = small_dict()
        for _ in range(in_flight):
            send(message)
        warm_up = side.times // 10 + 1
        for number in range(-warm_up, side.times):
            if number == 0:
                start = time.perf_counter()
            recv()
            send(message)
        seconds = time.perf_counter() - start
        for _ in range(in_flight):
            recv()
        _stop(side)
        return side.times / seconds

    return run


def _hold(end: Any, send: str) -> None:
    getattr(end, send)("ready")
    signal.pause()


def killed(bystander: bool) -> Run:
    """Milliseconds from the SIGKILL of the process at the other end until it is known here. *bystander*: another one,
    forked meanwhile, lives on, with copies of what it inherited.
    """

    def run(side: Side) -> Figure:
        if not side.near:
            return None
        context, took = get_context("fork"), []
        for _ in range(side.times):
            ours, theirs = side.kind.pair()
            with Children() as children:
                if bystander:
                    other = context.Process(target=signal.pause)
                    children.start(other)
                victim = context.Process(target=_hold, args=(theirs, side.kind.send))
                children.start(victim)
                theirs.close()  # nothing, where it has moved
                ours.recv()
                start = time.perf_counter()
                os.kill(victim.pid or 0, signal.SIGKILL)
                noticed = ours.poll(_FOR_EVER)
                took.append(time.perf_counter() - start)
                if bystander:
                    other.kill()
                if not noticed:
                    return {"never": _FOR_EVER}
                try:
                    ours.recv()
                except EOFError:
                    ours.close()
        return percentiles(took, 1e3)

    return run


def importing(side: Side) -> Figure:
    """Milliseconds that ``import mpchannel`` takes beyond ``import multiprocessing`` and its usual modules."""
    if not side.near:
        return None
    took = []
    for _ in range(side.times):
        ran = subprocess.run((sys.executable, "-c", _IMPORT), capture_output=True, text=True, check=True)
        took.append(float(ran.stdout))
    return percentiles(took, 1e3)


_IMPORT: Final = """
import sys, time
import multiprocessing.connection, multiprocessing.context, multiprocessing.process, multiprocessing.reduction
start = time.perf_counter()
import mpchannel
print(time.perf_counter() - start)
if {"numpy", "asyncio", "cloudpickle"} & set(sys.modules):
    sys.exit("import mpchannel has imported too much")
"""


def memory_of_end(side: Side) -> Figure:
    """KiB of a process's memory for each end of a pair that is not used."""
    if not side.near:
        return None
    pairs = [side.kind.pair() for _ in range(10)]
    count = min(1_000, many_files() // 2 - 100)
    before = _resident()
    pairs += [side.kind.pair() for _ in range(count)]
    return (_resident() - before) / (2 * count) / 1024


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def among(others: int) -> Run:
    """Microseconds to send and receive a message, in one process that has *others* open beside."""

    def run(side: Side) -> Figure:
        if not side.near:
            return None
        held = [side.kind.pair() for _ in range(min(others, many_files() - 100) // 2)]
        (one, other), message = side.kind.pair(), small_dict()
        send, recv = getattr(one, side.kind.send), other.recv
        for number in range(side.times // 10 + side.times):
            if number == side.times // 10:
                start = time.perf_counter()
            send(message)
            recv()
        seconds = time.perf_counter() - start
        del held
        return seconds / side.times * 1e6

    return run


def post_behind(queued: int) -> Run:
    """Microseconds to post a message behind so many."""

    def run(side: Side) -> Figure:
        if not side.near:
            return None
        (one, _other), message = side.kind.pair(), small_dict()
        send = getattr(one, side.kind.send)
        for _ in range(queued):
            send(message)
        start = time.perf_counter()
        for _ in range(side.times):
            send(message)
        return (time.perf_counter() - start) / side.times * 1e6

    return run


class Goal(NamedTuple):
    """What is aimed at, in at most or at least so many times Pipe's figure, or as a figure (*absolute*)."""

    limit: float
    absolute: bool = False


class Scenario(NamedTuple):
    name: str  # may tell the {times}
    unit: str
    better: str
    times: int  # repetitions in one run, at scale 1
    run: Run
    goal: Goal | None = None
    pipe_can: bool = True
    peers_can: bool = False


SCENARIOS = (
    Scenario("round trip, small dict", "us", LOWER, 4_000, round_trip(small_dict), Goal(0.22), peers_can=True),
    Scenario(
        "round trip, both on one core",
        "us",
        LOWER,
        4_000,
        round_trip(small_dict, pinned=True),
        Goal(0.6),
        peers_can=True,
    ),
    Scenario("one way, small dict", "msg/s", HIGHER, 100_000, one_way(small_dict), Goal(2.2), peers_can=True),
    Scenario("one way, 1 KiB", "msg/s", HIGHER, 100_000, one_way(bytes_of(1 << 10)), Goal(2.2), peers_can=True),
    Scenario("one way, 64 KiB", "msg/s", HIGHER, 20_000, one_way(bytes_of(64 << 10)), Goal(1.8), peers_can=True),
    Scenario("one way, 1 MiB", "msg/s", HIGHER, 1_000, one_way(bytes_of(1 << 20)), Goal(4), peers_can=True),
    Scenario("100 MiB array, summed", "msg/s", HIGHER, 20, used(array_100_mib), Goal(10)),
    Scenario("100 MiB array, the first one", "msg/s", HIGHER, 1, used(array_100_mib, first_only=True), Goal(4.5)),
    Scenario("move a SharedBuffer of 1 GiB", "us", LOWER, 100, move_buffer, Goal(200, absolute=True), pipe_can=False),
    Scenario("burst of {times:,}, posted", "msg/s", HIGHER, 100_000, burst(drained=False), Goal(400e3, absolute=True)),
    Scenario("burst of {times:,}, and read", "msg/s", HIGHER, 100_000, burst(drained=True), Goal(250e3, absolute=True)),
    Scenario("hand over, use, close (1 core)", "us", LOWER, 300, hand_over(1), Goal(1 / 7)),
    Scenario("reply stream of 10 (1 core)", "us", LOWER, 300, hand_over(10), Goal(1 / 5)),
    Scenario("create and close", "us", LOWER, 2_000, create_and_close, Goal(1.2)),
    Scenario("1,000 ends, round trips in turn", "msg/s", HIGHER, 2_000, many_ends(1_000, flood=False), Goal(55)),
    Scenario("1,000 ends, flood", "msg/s", HIGHER, 100_000, many_ends(1_000, flood=True), Goal(2)),
    Scenario("SIGKILL noticed", "ms", LOWER, 20, killed(bystander=False), Goal(1.2)),
    Scenario("SIGKILL noticed, a fork lives on", "ms", LOWER, 20, killed(bystander=True)),
    Scenario("listener echo, 1 in flight", "msg/s", HIGHER, 4_000, echo_of_listener(1, on_loop=False), Goal(3)),
    Scenario("listener echo, 64 in flight", "msg/s", HIGHER, 40_000, echo_of_listener(64, on_loop=False), Goal(5)),
    Scenario("asyncio echo, 1 in flight", "msg/s", HIGHER, 4_000, echo_of_listener(1, on_loop=True)),
    Scenario("asyncio echo, 64 in flight", "msg/s", HIGHER, 40_000, echo_of_listener(64, on_loop=True)),
    Scenario("import", "ms", LOWER, 5, importing, Goal(15, absolute=True), pipe_can=False),
    Scenario("memory of an idle end", "KiB", LOWER, 1, memory_of_end),
    Scenario("message, nothing else open", "us", LOWER, 20_000, among(0)),
    Scenario("message, 100 ends open", "us", LOWER, 20_000, among(100)),
    Scenario("message, 10,000 ends open", "us", LOWER, 20_000, among(10_000)),
    Scenario("post, nothing queued", "us", LOWER, 200, post_behind(0)),
    Scenario("post, 100,000 queued", "us", LOWER, 20_000, post_behind(100_000), pipe_can=False),
)
