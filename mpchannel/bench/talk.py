"""Scenarios of messages: there and back, one way, large ones, a burst that nobody reads yet, listeners."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..sharedbuffer import SharedBuffer
from .figures import BenchError, has_numpy
from .kinds import STUCK, Kind, Measured, Missed, Run, Side, times_of

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


def round_trip(side: Side) -> Measured | None:
    """Microseconds for a small message there and back."""
    warm_up = side.times // 10 + 1
    send, recv = side.send, side.recv
    if not side.near:
        for _ in range(warm_up + side.times):
            send(recv())
        return None
    message = small_dict()
    return times_of(lambda: (send(message), recv()), side.times, warm_up)


def one_way(make: Callable[[], Any]) -> Run:
    """Messages per second, from the first send until the receiver has confirmed the last one."""

    def run(side: Side) -> Measured | None:
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
        return Measured(side.times / seconds)

    return run


def used(first_only: bool = False) -> Run:
    """Arrays per second that are received and used, never more than two ahead of the receiver, until the last one was.
    *first_only*: of the first one alone, which nothing was made ready for.
    """

    def run(side: Side) -> Measured | None:
        send, recv = side.send, side.recv
        warm_up, count = (0, 1) if first_only else (3, side.times)
        if not side.near:
            use_all_of(array_100_mib())  # so that all that this needs is loaded
            send("ready")
            for _ in range(warm_up + count):
                message = recv()
                use_all_of(message)
                send("used")
                del message
            return None
        message = array_100_mib()
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
        return Measured(count / seconds)

    return run


def move_buffer(side: Side) -> Measured | None:
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

    def there_and_back() -> None:
        nonlocal buffer
        first = buffer[0]
        side.end.post_message(buffer, transfer=[buffer])
        buffer = side.recv()
        if buffer[0] != (first + 1) % 256:
            raise BenchError("the buffer came back without the change")

    there_and_back_us = times_of(there_and_back, side.times, warm_up)
    return Measured(there_and_back_us.figure / 2)


@contextmanager
def never_waiting(kind: Kind, end: Any) -> Iterator[None]:
    """A send that would wait for a receiver that does not read raises ``BlockingIOError`` instead."""
    descriptor = kind.blocks_at(end)
    if descriptor is not None:
        os.set_blocking(descriptor, False)
    try:
        yield
    finally:
        if descriptor is not None:
            os.set_blocking(descriptor, True)


def post_many(send: Callable[[Any], object], count: int) -> None:
    """Send a small message *count* times. ``Missed`` where it would wait for the receiver for ever."""
    message = small_dict()
    for number in range(count):
        try:
            send(message)
        except BlockingIOError:
            raise Missed(STUCK, number) from None


def burst(read: bool) -> Run:
    """Messages per second, all posted before the first is read: the posting alone, or until they were *read*."""

    def run(side: Side) -> Measured | None:
        send, recv = side.send, side.recv
        if not side.near:
            send(recv())
            if side.signal.recv() == "read":
                for _ in range(side.times):
                    recv()
                send("all received")
            return None
        send(small_dict())  # to warm up
        recv()
        with never_waiting(side.kind, side.end):
            start = time.perf_counter()
            try:
                post_many(send, side.times)
            except Missed:
                side.signal.send("do not read")
                raise
            posted = time.perf_counter() - start
        side.signal.send("read")
        recv()
        return Measured(side.times / (time.perf_counter() - start if read else posted))

    return run


def echo(in_flight: int) -> Run:
    """Messages per second to an echo, *in_flight* at a time; both sides are called for each message."""

    def run(side: Side) -> Measured | None:
        send = side.send
        if not side.near:

            def answer(_: Any, message: Any) -> bool:
                send(message)
                return message is None

            side.kind.react(side.end, answer)
            return None
        warm_up = side.times // 10 + in_flight
        total = warm_up + side.times
        sent, received = in_flight, 0
        start = end = 0.0

        def came_back(_: Any, message: Any) -> bool:
            nonlocal sent, received, start, end
            if message is None:
                return True
            received += 1
            if received == warm_up:
                start = time.perf_counter()
            if sent < total:
                sent += 1
                send(message)
            elif received == total:
                end = time.perf_counter()
                send(None)
            return False

        for _ in range(in_flight):
            send(small_dict())
        side.kind.react(side.end, came_back)
        return Measured(side.times / (end - start))

    return run


def post_with_queued(side: Side) -> Measured | None:
    """Microseconds of one post, with ``size`` messages queued already. Both ends are in one process."""
    if not side.near:
        return None
    ours, theirs = side.kind.pair()
    send = side.send_of(ours)
    message = small_dict()
    with never_waiting(side.kind, ours):
        post_many(send, side.size)
        if side.size:
            measured = times_of(lambda: send(message), side.times, 0)
        else:
            measured = times_of(lambda: send(message), side.times, 100, after=theirs.recv)
    ours.close()
    theirs.close()
    return measured


def _not_called(event: Any) -> None:
    raise BenchError(f"a message came where none was posted: {event}")


def one_of_many_ports(side: Side) -> Measured | None:
    """Microseconds for a small message there and back, if the other process has ``size`` ports with a listener."""
    warm_up = side.times // 10 + 1
    if side.near:
        send, recv = side.send, side.recv
        recv()
        message = small_dict()
        measured = times_of(lambda: (send(message), recv()), side.times, warm_up)
        send(None)
        return measured
    others = [end for _ in range(side.size // 2) for end in side.kind.pair()]
    for each in others:
        each.onmessage = _not_called
    side.send("ready")

    def answer(_: Any, message: Any) -> bool:
        side.send(message)
        return message is None

    side.kind.react(side.end, answer)
    for each in others:
        each.close()
    return None
