"""What is measured: ``Kind`` says all that a scenario may know of it, ``Side`` is what a scenario is given.

``benchmarks`` at the top level of the repository adds kinds of its own: other libraries.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import operator
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, NamedTuple

import mpchannel

OnMessage = Callable[[Any, Any], Any]
"""Called with an end and a message from it."""


class Group(Enum):
    """Scenarios that need the same of a kind."""

    TALK = "messages in both directions, one after the other"
    ARRAYS = "large arrays"
    BURST = "messages that nobody reads yet"
    POST = "messages to an end of the same process, that nobody reads yet"
    HAND_OVER = "ends that are handed to another process"
    CREATE = "pairs that are made and closed again"
    MANY = "many ends in one process"
    WAIT = "many ends, with a function like multiprocessing.connection.wait"
    DEATH = "the end of the other process"
    EVENTS = "a function that is called for each message"
    MEMORY = "memory of an end"
    MOVE = "memory that is handed over"
    PORTS = "many ends, each with a function that is called for its messages"
    IMPORT = "what importing it costs"


def _same(end: Any, near: bool) -> Any:
    return end


def _nothing(end: Any) -> None:
    return None


def _not_possible(*_: Any) -> Any:
    raise NotImplementedError


class Kind(NamedTuple):
    """How to get a pair of ends, and how to use them. Every function is one of a module, so that it can be pickled."""

    name: str
    pair: Callable[[], Any]
    """Two ends, as they are given to the two processes."""
    groups: frozenset[Group]
    """The scenarios that it takes part in."""
    send: str = "send"
    open: Callable[[Any, bool], Any] = _same
    """In the process that was given an end (*near* or not): what it uses."""
    hand_over: Callable[[Any, Any], None] = _not_possible
    """(through, end): send *end* to the process at the other end of *through*, and be rid of it here."""
    wait: Callable[[Iterable[Any]], Any] = _not_possible
    """Those of the ends that have a message, waiting for one."""
    serve: Callable[[Any, Sequence[Any], OnMessage], None] = _not_possible
    """(until, ends, on_message): the best way to wait on many ends; until *until* gets a message, which is taken."""
    react: Callable[[Any, OnMessage], None] = _not_possible
    """(end, on_message): call it for each message, until it returns true."""
    blocks_at: Callable[[Any], int | None] = _nothing
    """The descriptor that a send would wait at, if it waits when the other side does not read."""
    start_far: Callable[[Any, int, float], Any] | None = None
    """(near's end, place of the scenario, scale): for a kind that starts the other process itself, which then calls
    ``channels.run_side``. Returns the signal of near's side.
    """
    library: str | None = None
    """The module that has to be installed."""


# multiprocessing.Pipe


def _pipe() -> Any:
    return multiprocessing.Pipe()


def send_connection(through: Any, end: Any) -> None:
    through.send(end)
    end.close()  # multiprocessing has made itself a copy for the receiver


def serve_waiting(wait: Callable[[Iterable[Any]], Any], until: Any, ends: Sequence[Any], on_message: OnMessage) -> None:
    everything = [*ends, until]
    while True:
        for end in wait(everything):
            if end is until:
                until.recv()
                return
            on_message(end, end.recv())


def _serve_pipes(until: Any, ends: Sequence[Any], on_message: OnMessage) -> None:
    serve_waiting(multiprocessing.connection.wait, until, ends, on_message)


def _react_with_asyncio(end: Any, on_message: OnMessage) -> None:
    import asyncio

    async def main() -> None:
        loop = asyncio.get_running_loop()
        over = loop.create_future()

        def readable() -> None:
            if on_message(end, end.recv()):
                loop.remove_reader(end.fileno())
                over.set_result(None)

        loop.add_reader(end.fileno(), readable)
        await over

    asyncio.run(main())


# mpchannel


def _channel() -> Any:
    return mpchannel.MessageChannel()


def _transfer_port(through: Any, port: Any) -> None:
    through.post_message(port, transfer=[port])


def _serve_ports(until: Any, ends: Sequence[Any], on_message: OnMessage) -> None:
    def call(event: Any) -> None:
        on_message(event.target, event.data)

    for port in ends:
        port.onmessage = call
    until.recv()


def _react_to_port(port: Any, on_message: OnMessage) -> None:
    over = threading.Event()

    def call(event: Any) -> None:
        if on_message(port, event.data):
            over.set()

    port.onmessage = call
    over.wait()


PIPE: Final = Kind(
    "Pipe",
    _pipe,
    frozenset(Group) - {Group.MOVE, Group.PORTS, Group.IMPORT},
    hand_over=send_connection,
    wait=multiprocessing.connection.wait,
    serve=_serve_pipes,
    react=_react_with_asyncio,
    blocks_at=operator.methodcaller("fileno"),
)
OURS: Final = Kind(
    "mpchannel",
    _channel,
    frozenset(Group),
    send="post_message",
    hand_over=_transfer_port,
    wait=mpchannel.wait,
    serve=_serve_ports,
    react=_react_to_port,
)
KINDS: Final = (PIPE, OURS)


@dataclass
class Side:
    """What a scenario's function is given, in each of the two processes."""

    near: bool
    kind: Kind
    end: Any
    signal: Any  # a Connection or the like between the two processes, the same for all kinds
    times: int
    size: int
    send: Callable[[Any], object] = field(init=False)
    recv: Callable[[], Any] = field(init=False)

    def __post_init__(self) -> None:
        self.send = self.send_of(self.end)
        self.recv = self.end.recv

    def send_of(self, end: Any) -> Callable[[Any], object]:
        found: Callable[[Any], object] = getattr(end, self.kind.send)
        return found


class Measured(NamedTuple):
    """One run's figure; and for times, what 99 of 100 stayed within."""

    figure: float
    p99: float | None = None


def percentile(samples: Sequence[float], percent: int) -> float:
    """Of what is in order already: *percent* of them are not above it."""
    return samples[max(0, -(-len(samples) * percent // 100) - 1)]


def median_and_p99(seconds: Sequence[float], unit: float) -> Measured:
    """Of times in seconds, in a *unit* of which a second has that many."""
    in_order = sorted(seconds)
    return Measured(percentile(in_order, 50) * unit, percentile(in_order, 99) * unit)


def times_of(
    what: Callable[[], object], times: int, warm_up: int, after: Callable[[], object] | None = None
) -> Measured:
    """Microseconds that a call takes, *after* which something is done that does not count."""
    seconds = []
    clock = time.perf_counter
    for _ in range(warm_up + times):
        start = clock()
        what()
        seconds.append(clock() - start)
        if after is not None:
            after()
    return median_and_p99(seconds[warm_up:], 1e6)


Run = Callable[[Side], Measured | None]
"""One run, in one of the processes. *near* returns what it measured, in the scenario's unit, *far* ``None``."""


class Missed(Exception):
    """There is no figure, and why: one of the ways in ``MISSES``, and its number or word."""


STUCK, NEVER, LOADS, NEEDS, FAILED = "stuck_after", "never_within", "loads", "needs_descriptors", "failed"
MISSES: Final = {
    STUCK: "stuck {:,}",  # messages; the next send would wait for the receiver, for ever: it does not read yet
    NEVER: "never",  # seconds
    LOADS: "loads {}",  # module that it should not load
    NEEDS: "needs files",  # that may be open
    FAILED: "failed",
}
