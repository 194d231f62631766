"""Pieces of work that are counted instead of timed: ``python -m tests.work calls|strace PIECE`` does one of them.

A count does not depend on what else the machine does, so ``test_work`` can hold it against a ceiling. All of it is one
process that holds both ends: who waits for whom, and how often somebody looks, would be chance. ``strace`` marks the
counted part for ``strace`` by two system calls that nothing else makes; ``calls`` counts calls of Python functions and
of C functions itself, and what is left over.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import mpchannel

MARK: Final = "/counted-part-"
MESSAGE: Final = {"id": 4711, "method": "search", "path": "/usr/share/doc", "limit": 12.5}
WARM_UP: Final = 20

Piece = Callable[["Counter"], None]
PIECES: dict[str, tuple[Piece, int]] = {}


class Counter:
    """``with counter.counting():`` around what is to be counted."""

    def __init__(self, times: int, traced: bool) -> None:
        self.times, self.traced = times, traced
        self.figures: dict[str, float] = {}

    @contextmanager
    def counting(self) -> Iterator[None]:
        gc.collect()
        gc.disable()
        if self.traced:
            os.access(MARK + "begins", os.F_OK)
            yield
            os.access(MARK + "ends", os.F_OK)
            return
        counts = {"call": 0, "c_call": 0}

        def count(frame: Any, event: str, argument: Any) -> None:
            if event in counts:
                counts[event] += 1

        blocks = sys.getallocatedblocks()
        sys.setprofile(count)
        yield
        sys.setprofile(None)
        kept = sys.getallocatedblocks() - blocks
        self.figures = {
            "Python calls": counts["call"] / self.times,
            "C calls": counts["c_call"] / self.times,
            "blocks kept": kept / self.times,
            "threads": len(os.listdir("/proc/self/task")),
        }


def piece(name: str, times: int) -> Callable[[Piece], Piece]:
    def note(function: Piece) -> Piece:
        PIECES[name] = function, times
        return function

    return note


def there(counter: Counter, make: Callable[[], Any]) -> None:
    """Post, and take, one message after the other."""
    port1, port2 = mpchannel.MessageChannel()
    message = make()
    post, recv = port1.post_message, port2.recv
    for _ in range(WARM_UP):
        post(message)
        recv()
    with counter.counting():
        for _ in range(counter.times):
            post(message)
            recv()


@piece("small", 1000)
def _small(counter: Counter) -> None:
    there(counter, lambda: MESSAGE)


@piece("1 KiB", 1000)
def _kib(counter: Counter) -> None:
    there(counter, lambda: os.urandom(1 << 10))


@piece("64 KiB", 200)
def _64_kib(counter: Counter) -> None:
    there(counter, lambda: os.urandom(64 << 10))


@piece("1 MiB", 100)
def _mib(counter: Counter) -> None:
    there(counter, lambda: os.urandom(1 << 20))


@piece("small, 500 ports open", 1000)
def _small_among_many(counter: Counter) -> None:
    others = [mpchannel.MessageChannel() for _ in range(250)]
    there(counter, lambda: MESSAGE)
    assert len(others) == 250


def behind(counter: Counter, ahead: int) -> tuple[Any, Any]:
    """A channel in which *ahead* messages wait."""
    port1, port2 = mpchannel.MessageChannel()
    for _ in range(ahead):
        port1.post_message(MESSAGE)
    return port1, port2


@piece("post, 1,000 behind", 2000)
def _post_behind(counter: Counter) -> None:
    port1, port2 = behind(counter, 1000)
    with counter.counting():
        for _ in range(counter.times):
            port1.post_message(MESSAGE)
    assert port2.recv() == MESSAGE


@piece("post, 50,000 behind", 2000)
def _post_far_behind(counter: Counter) -> None:
    port1, port2 = behind(counter, 50_000)
    with counter.counting():
        for _ in range(counter.times):
            port1.post_message(MESSAGE)
    assert port2.recv() == MESSAGE


@piece("take, 20,000 behind", 10_000)
def _take_behind(counter: Counter) -> None:
    port1, port2 = behind(counter, 20_000)
    for _ in range(5000):
        port2.recv()
    with counter.counting():
        for _ in range(counter.times):
            port2.recv()
    assert port1.buffered_amount


@piece("wait for one of 100", 200)
def _wait(counter: Counter) -> None:
    pairs = [mpchannel.MessageChannel() for _ in range(100)]
    near, far = [pair.port1 for pair in pairs], [pair.port2 for pair in pairs]
    for port in near[:WARM_UP]:
        port.post_message(MESSAGE)
        (ready,) = mpchannel.wait(far)
        ready.recv()
    with counter.counting():
        for number in range(counter.times):
            near[number % 100].post_message(MESSAGE)
            (ready,) = mpchannel.wait(far)
            ready.recv()


@piece("listener on a loop", 1000)
def _listener(counter: Counter) -> None:
    async def main() -> None:
        port1, port2 = mpchannel.MessageChannel()
        left = counter.times + WARM_UP
        done = asyncio.get_running_loop().create_future()
        warm = asyncio.get_running_loop().create_future()

        def again(event: Any) -> None:
            nonlocal left
            left -= 1
            if left == counter.times:
                warm.set_result(None)
            elif left:
                port1.post_message(MESSAGE)
            else:
                done.set_result(None)

        port2.onmessage = again
        port1.post_message(MESSAGE)
        await warm
        with counter.counting():
            port1.post_message(MESSAGE)
            await done
        port1.close()

    asyncio.run(main())


@piece("create and close", 200)
def _create(counter: Counter) -> None:
    def once() -> None:
        port1, port2 = mpchannel.MessageChannel()
        port1.close()
        port2.close()

    for _ in range(WARM_UP):
        once()
    with counter.counting():
        for _ in range(counter.times):
            once()


@piece("hand over, use, close", 200)
def _hand_over(counter: Counter) -> None:
    port1, port2 = mpchannel.MessageChannel()

    def once() -> None:
        ours, theirs = mpchannel.MessageChannel()
        port1.post_message(theirs, [theirs])
        arrived = port2.recv()
        arrived.post_message("hello")
        ours.recv()
        arrived.close()
        assert not ours.poll() or ours.wait_closed(0) is not None

    for _ in range(WARM_UP):
        once()
    with counter.counting():
        for _ in range(counter.times):
            once()


@piece("move a buffer", 200)
def _move(counter: Counter) -> None:
    port1, port2 = mpchannel.MessageChannel()
    buffer = mpchannel.SharedBuffer(1 << 20)
    for _ in range(WARM_UP):
        port1.post_message(buffer, [buffer])
        buffer = port2.recv()
    with counter.counting():
        for _ in range(counter.times):
            port1.post_message(buffer, [buffer])
            buffer = port2.recv()


def idle_ports(count: int) -> dict[str, float]:
    """What an idle port takes: bytes and memory blocks of Python, descriptors; and threads in all."""
    mpchannel.MessageChannel()
    gc.collect()
    tracemalloc.start()
    blocks, descriptors = sys.getallocatedblocks(), len(os.listdir("/proc/self/fd"))
    ports = [port for _ in range(count // 2) for port in mpchannel.MessageChannel()]
    figures = {
        "bytes": tracemalloc.get_traced_memory()[0] / count,
        "blocks": (sys.getallocatedblocks() - blocks) / count,
        "descriptors": (len(os.listdir("/proc/self/fd")) - descriptors) / count,
        "threads": threading.active_count(),
    }
    assert len(ports) == count
    return figures


def main() -> None:
    how, name = sys.argv[1:]
    if how == "idle":
        print(json.dumps(idle_ports(int(name))))
        return
    work, times = PIECES[name]
    counter = Counter(times, traced=how == "strace")
    work(counter)
    print(json.dumps(counter.figures))


if __name__ == "__main__":
    main()
