"""Scenarios of ends: making them, handing them over, many of them, the end of a process, memory, importing."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from ..context import get_context
from .figures import BenchError
from .kinds import LOADS, NEEDS, NEVER, Kind, Measured, Missed, Run, Side, median_and_p99, serve_waiting, times_of
from .talk import small_dict

_NEVER: Final = 1.0  # seconds, of what takes milliseconds
_AT_A_TIME: Final = 100  # ends that are on their way: each is a descriptor in flight, which are limited
_HEAVY: Final = ("numpy", "asyncio", "cloudpickle")


def room_for(descriptors: int) -> None:
    """``Missed`` if the system does not allow this process that many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = descriptors + 100
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise Missed(NEEDS, needed)
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def hand_over(side: Side) -> Measured | None:
    """How often per second it can make a pair, hand one end over, get a message from there and see it close."""
    return _streams(side, lambda end: side.send_of(end)("hello"))


def reply_streams(side: Side) -> Measured | None:
    """How often per second it can make a pair, hand one end over, get ten messages from there and see it close."""
    message = small_dict()

    def reply(end: Any) -> None:
        send = side.send_of(end)
        for _ in range(10):
            send(message)

    return _streams(side, reply)


def _streams(side: Side, reply: Callable[[Any], object]) -> Measured | None:
    warm_up = 5
    if not side.near:
        for _ in range(warm_up + side.times):
            end = side.recv()
            reply(end)
            end.close()
        return None
    start = 0.0
    for number in range(warm_up + side.times):
        if number == warm_up:
            start = time.perf_counter()
        ours, theirs = side.kind.pair()
        side.kind.hand_over(side.end, theirs)
        try:
            while True:
                ours.recv()
        except EOFError:
            ours.close()
    return Measured(side.times / (time.perf_counter() - start))


def create_and_close(side: Side) -> Measured | None:
    """Microseconds to make a pair and close both ends, in one process."""
    if not side.near:
        return None
    pair = side.kind.pair

    def once() -> None:
        one, other = pair()
        one.close()
        other.close()

    return times_of(once, side.times, 5)


# Many ends


def _many(side: Side) -> Sequence[Any]:
    """``size`` ends in each of the two processes, of which each is connected with one of the other."""
    room_for(2 * side.size)
    if not side.near:
        ends = []
        for number in range(side.size):
            ends.append(side.recv())
            if number % _AT_A_TIME == _AT_A_TIME - 1:
                side.send("go on")
        return ends
    ends = []
    for number in range(side.size):
        ours, theirs = side.kind.pair()
        ends.append(ours)
        side.kind.hand_over(side.end, theirs)
        if number % _AT_A_TIME == _AT_A_TIME - 1:
            side.recv()
    return ends


def _finish(side: Side) -> None:
    """Keeps the ends until the other process has left them: their end would be one more message there."""
    side.send("over")
    side.signal.recv()


def one_at_a_time(by_wait: bool = False) -> Run:
    """Round trips per second, each on any one of ``size`` ends, which the other process waits for all together.
    *by_wait*: with the kind's ``wait`` rather than with the best that it has.
    """

    def run(side: Side) -> Measured | None:
        ends = _many(side)
        if not side.near:

            def answer(end: Any, message: Any) -> None:
                side.send_of(end)(message)

            side.send("ready")
            if by_wait:
                serve_waiting(side.kind.wait, side.end, ends, answer)
            else:
                side.kind.serve(side.end, ends, answer)
            side.signal.send("over")
            return None
        message = small_dict()
        chance = random.Random(1)
        pairs = [(side.send_of(end), end.recv) for end in ends]
        side.recv()
        start = 0.0
        warm_up = side.times // 10 + 1
        for number in range(warm_up + side.times):
            if number == warm_up:
                start = time.perf_counter()
            send, recv = chance.choice(pairs)
            send(message)
            recv()
        measured = Measured(side.times / (time.perf_counter() - start))
        _finish(side)
        return measured

    return run


def flood(side: Side) -> Measured | None:
    """Messages per second to ``size`` ends in turn, ``times`` to each, until the other process has had the last one."""
    ends = _many(side)
    if not side.near:
        left = side.size * (side.times + 1)

        def count(_: Any, message: Any) -> None:
            nonlocal left
            left -= 1
            if left == side.size * side.times or left == 0:
                side.send("all received")

        side.send("ready")
        side.kind.serve(side.end, ends, count)
        side.signal.send("over")
        return None
    message = small_dict()
    sends = [side.send_of(end) for end in ends]
    side.recv()
    for rounds in (1, side.times):  # the first to warm up
        start = time.perf_counter()
        for _ in range(rounds):
            for send in sends:
                send(message)
        side.recv()
        seconds = time.perf_counter() - start
    _finish(side)
    return Measured(side.size * side.times / seconds)


# The end of a process


def _victim(kind: Kind, end: Any) -> None:
    getattr(end, kind.send)("ready")
    end.recv()


def _stand_by(until: Any, other: Any) -> None:
    """Holds what it was born with, until whoever forked it is done, or has ended."""
    other.close()
    until.poll(None)


def _too_long(*_: object) -> None:
    raise Missed(NEVER, _NEVER)


def killed(bystander: bool = False) -> Run:
    """Milliseconds from a process's SIGKILL until the other one's ``recv`` ends. *bystander*: a third process lives on,
    which was forked while both ends were here.
    """

    def run(side: Side) -> Measured | None:
        if not side.near:
            return None
        signal.signal(signal.SIGALRM, _too_long)
        get_context("forkserver").set_forkserver_preload([__name__])
        seconds = [_kill_one(side.kind, bystander) for _ in range(1 + side.times)]
        return median_and_p99(seconds[1:], 1e3)

    return run


def _kill_one(kind: Kind, with_bystander: bool) -> float:
    ours, theirs = kind.pair()
    until, other = multiprocessing.Pipe()
    bystander = multiprocessing.get_context("fork").Process(target=_stand_by, args=(until, other))
    victim = get_context("forkserver").Process(target=_victim, args=(kind, theirs))
    try:
        if with_bystander:
            bystander.start()
        victim.start()
        theirs.close()
        ours.recv()
        signal.setitimer(signal.ITIMER_REAL, _NEVER)
        start = time.perf_counter()
        victim.kill()
        try:
            ours.recv()
        except EOFError:
            return time.perf_counter() - start
        raise BenchError("the process that was killed sent something")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        ours.close()
        until.close()
        other.close()
        victim.join()
        if with_bystander:
            bystander.join()


# Memory


def memory(side: Side) -> Measured | None:
    """Bytes of resident memory of one end that nothing is done with; of ``size`` of them."""
    return _grown_by_ends(side, _resident)


def descriptors(side: Side) -> Measured | None:
    """Descriptors of one end."""
    return _grown_by_ends(side, lambda: len(os.listdir("/proc/self/fd")))


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _grown_by_ends(side: Side, look: Callable[[], int]) -> Measured | None:
    if not side.near:
        return None
    room_for(side.size)
    warm = [side.kind.pair() for _ in range(10)]
    gc.collect()
    before = look()
    ends = [side.kind.pair() for _ in range(side.size // 2)]
    gc.collect()
    grown = look() - before
    for one, other in (*warm, *ends):
        one.close()
        other.close()
    return Measured(grown / (2 * len(ends)))


# Importing

_TIME_IMPORT: Final = """
import multiprocessing, sys, time
start = time.perf_counter()
import mpchannel
print(time.perf_counter() - start, *sys.modules)
"""


def import_time(side: Side) -> Measured | None:
    """Milliseconds that ``import mpchannel`` takes in a fresh interpreter that has imported multiprocessing.
    ``Missed`` if it loads what it should not.
    """
    if not side.near:
        return None
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        # Compiled once, even if this environment keeps nothing that was compiled.
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for _ in range(1 + side.times):
            ran = subprocess.run(
                [sys.executable, "-c", _TIME_IMPORT], env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
            took, *modules = ran.stdout.split()
            for heavy in _HEAVY:
                if heavy in modules:
                    raise Missed(LOADS, heavy)
            seconds.append(float(took))
    return median_and_p99(seconds[1:], 1e3)
