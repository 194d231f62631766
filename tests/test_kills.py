"""Killed holders: the other end always gets its close, at once, and everything that was posted."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import mpchannel

from . import children

AT_ONCE = 5.0  # seconds: a second on an idle machine, and room for a busy one
HUGE = 256 << 20


@pytest.fixture
def close_of(record_property: Callable[[str, object], None]) -> Callable[..., Any]:
    """Kill a process and give the close event of a port whose other end it held; it must come at once."""

    def kill(process: Any, port: Any) -> Any:
        began = time.monotonic()
        os.kill(process.pid, signal.SIGKILL)
        event = port.wait_closed(AT_ONCE)
        record_property("seconds from SIGKILL to close", time.monotonic() - began)
        assert event.reason == "died"
        assert not event.was_clean
        return event

    return kill


@contextmanager
def holder(context: Any, target: Any = children.hold, *arguments: Any) -> Iterator[tuple[Any, Any]]:
    """A process that holds a port and said "ready" on it, and our end."""
    ours, theirs = mpchannel.MessageChannel()
    with children.running(context.Process(target=target, args=(theirs, *arguments)), -9) as process:
        try:
            assert ours.recv(20) == "ready"
            yield process, ours
        finally:
            process.kill()
            ours.close()


# Whoever else is alive


@pytest.mark.row("W48")
def test_the_close_of_a_killed_idle_process_says_who_died_and_how(context: Any, close_of: Any) -> None:
    with holder(context) as (process, ours):
        event = close_of(process, ours)
        assert event.pid == process.pid
        assert event.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("waiting", ["receive", "listener", "iteration"])
def test_a_kill_ends_every_way_of_waiting(context: Any, waiting: str) -> None:
    with holder(context) as (process, ours):
        ended = threading.Event()
        if waiting == "listener":
            ours.onclose = lambda event: ended.set()
        else:

            def wait() -> None:
                try:
                    if waiting == "receive":
                        ours.receive()
                    else:
                        assert list(ours) == []
                        ended.set()
                except mpchannel.PortClosedError:
                    ended.set()

            threading.Thread(target=wait, daemon=True).start()
        os.kill(process.pid, signal.SIGKILL)
        assert ended.wait(AT_ONCE)


def test_forked_siblings_from_before_and_after_do_not_delay_the_close(close_of: Any) -> None:
    context = mpchannel.get_context("fork")
    with (
        holder(context) as (older, to_older),
        holder(context) as (process, ours),
        holder(context) as (younger, to_younger),
    ):
        close_of(process, ours)
        for sibling, port in ((older, to_older), (younger, to_younger)):
            assert sibling.is_alive()
            assert not port.poll()


def test_siblings_of_every_start_method_do_not_delay_the_close(context: Any, close_of: Any) -> None:
    with (
        holder(mpchannel.get_context("fork")) as (_, first),
        holder(context) as (process, ours),
        holder(mpchannel.get_context("fork")) as (_, last),
    ):
        close_of(process, ours)
        assert not first.poll()
        assert not last.poll()


def test_a_raw_fork_of_the_other_holder_does_not_delay_the_close(context: Any, close_of: Any) -> None:
    with holder(context) as (process, ours):
        out, into = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(into)
            os.read(out, 1)  # until the parent is done
            os._exit(0)
        try:
            os.close(out)
            close_of(process, ours)
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the forked child was to live on"
        finally:
            os.close(into)
        assert os.waitpid(pid, 0) == (pid, 0)


def test_a_raw_fork_of_the_killed_holder_does_not_delay_the_close(context: Any, close_of: Any) -> None:
    near, far = context.Pipe()
    with far, near, holder(context, children.hold_with_forked_child, far) as (process, ours):
        orphan = ours.recv(20)
        far.close()
        close_of(process, ours)
        near.send("are you alive?")
        assert near.poll(20)
        assert near.recv() == orphan


def test_an_unrelated_subprocess_of_the_killed_holder_does_not_delay_the_close(context: Any, close_of: Any) -> None:
    near, far = context.Pipe()
    with far, near, holder(context, children.hold_with_subprocess, far) as (process, ours):
        far.close()
        close_of(process, ours)
        near.send_bytes(b"are you alive?")
        assert near.poll(20)
        assert near.recv_bytes() == b"are you alive?"


def test_a_grandchild_that_was_given_nothing_does_not_delay_the_close(context: Any, close_of: Any) -> None:
    near, far = context.Pipe()
    with far, near, holder(context, children.hold_with_grandchild, far) as (process, ours):
        far.close()
        close_of(process, ours)
        near.send("are you alive?")
        assert near.poll(20)
        assert near.recv() == "yes"


# Whatever the killed one was doing


def test_a_process_killed_with_a_port_just_received_closes_that_port_too(context: Any, close_of: Any) -> None:
    with holder(context, children.hold_received) as (process, ours):
        kept, moved = mpchannel.MessageChannel()
        ours.post_message("take this", [moved])
        assert ours.recv(20) == "received"
        assert close_of(process, kept).exitcode == -signal.SIGKILL
        assert ours.wait_closed(AT_ONCE).reason == "died"


@pytest.mark.row("X36")
def test_a_process_killed_with_a_port_in_its_unread_queue_closes_that_port(context: Any) -> None:
    with holder(context) as (process, ours):
        kept = []
        for number in range(1000):
            if number % 100 == 99:  # by the socket, and by the overflow
                mine, moved = mpchannel.MessageChannel()
                ours.post_message(number, [moved])
                kept.append(mine)
            else:
                ours.post_message(number)
        os.kill(process.pid, signal.SIGKILL)
        for mine in kept:
            assert mine.wait_closed(AT_ONCE).reason in ("died", "undeliverable")


def test_a_process_killed_in_the_middle_of_writing_a_huge_message_sends_nothing_of_it(
    context: Any, close_of: Any
) -> None:
    for _ in range(5):
        with holder(context, children.post_huge_when_told, HUGE) as (process, ours):
            ours.post_message("go on")
            until = time.monotonic() + 20
            while children.anonymous_bytes_of(process.pid) < 10 << 20:
                assert time.monotonic() < until
            os.kill(process.pid, signal.SIGKILL)
            assert ours.poll(AT_ONCE)
            found = list(ours)
            if not found:
                assert ours.wait_closed(AT_ONCE).reason == "died"
                return
            assert [len(each) for each in found] == [HUGE]  # it was quicker than our kill: once more
    pytest.fail("no message was interrupted")


def test_a_process_killed_while_it_floods_leaves_whole_messages_in_order(context: Any, close_of: Any) -> None:
    for taken in (0, 100):
        ours, theirs = mpchannel.MessageChannel()
        with children.running(context.Process(target=children.flood_with_checksums, args=(theirs,)), -9) as process:
            for number in range(taken):
                assert ours.recv(20)[0] == number
            while ours.poll(20) and children.anonymous_bytes_of(process.pid) < 1 << 20:
                pass  # until there is an overflow file
            os.kill(process.pid, signal.SIGKILL)
            number = taken
            for which, body, checksum in ours:
                assert (which, zlib.crc32(body)) == (number, checksum)
                number += 1
            assert ours.wait_closed(AT_ONCE).reason == "died"
            assert number > taken


def test_a_killed_receiver_of_an_overflow_gives_its_memory_back(context: Any, close_of: Any) -> None:
    with holder(context) as (process, ours):
        for _ in range(1000):
            ours.post_message(bytes(10_000))
        assert ours.buffered_amount > 5 << 20
        close_of(process, ours)
        ours.drain(5)
        assert ours.buffered_amount == 0
        assert not ours.post_message("too late")
        assert children.anonymous_bytes_of(os.getpid()) == 0


# What was posted


def test_what_was_posted_survives_a_sigkill_right_behind_the_post(start_method: str) -> None:
    context = mpchannel.get_context(start_method)
    repetitions = 200 if start_method == "fork" else 16
    seed = random.randrange(1 << 32)
    dice = random.Random(seed)
    for first in range(0, repetitions, 8):
        started = []
        for number in range(first, first + 8):
            kind = dice.choice(("small", "large", "many", "port", "huge body in overflow"))
            ours, theirs = mpchannel.MessageChannel()
            process = context.Process(target=children.post_and_be_killed, args=(theirs, kind, number))
            process.start()
            started.append((kind, number, ours, process))
        for kind, number, ours, process in started:
            where = f"seed {seed}, {kind}"
            if kind in ("many", "huge body in overflow"):
                assert [ours.recv(20) for _ in range(1000)] == list(range(1000)), where
            event = ours.receive(20)
            if kind == "port":
                assert event.ports[0].recv(20) == number, where
                assert event.ports[0].wait_closed(AT_ONCE).reason == "died", where
            else:
                expected = {"large": 300_000, "huge body in overflow": 3 << 20}.get(kind, 10)
                assert event.data == (number, bytes(expected)), where
            assert ours.wait_closed(AT_ONCE).reason == "died", where
            process.join(20)
            assert process.exitcode == -9, where


# Stopped, not dead


@contextmanager
def stopped(process: Any) -> Iterator[None]:
    """SIGSTOP, and SIGCONT behind the block."""
    os.kill(process.pid, signal.SIGSTOP)
    until = time.monotonic() + 20
    while state_of(process.pid) != "T":
        assert time.monotonic() < until
    try:
        yield
    finally:
        if process.is_alive():
            os.kill(process.pid, signal.SIGCONT)


def state_of(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0]


@pytest.mark.row("W42")
def test_a_stopped_process_gives_no_close_event_and_answers_when_it_goes_on(context: Any) -> None:
    ours, theirs = mpchannel.MessageChannel()
    with children.running(context.Process(target=children.echo, args=(theirs,))) as process:
        ours.post_message("before")
        assert ours.recv(20) == "before"
        with stopped(process):
            ours.post_message("while it is stopped")
            with pytest.raises(TimeoutError):
                ours.wait_closed(0.3)
            assert not ours.poll()
            assert ours.post_message("and another")
        assert [ours.recv(20), ours.recv(20)] == ["while it is stopped", "and another"]
        ours.close()


def test_posting_to_a_stopped_process_never_waits_and_everything_arrives_when_it_goes_on(
    context: Any, start_method: str
) -> None:
    with holder(context, children.count_and_sum) as (process, ours):
        blob = random.randbytes(32 << 20)
        blobs = 32 if start_method == "fork" else 3  # 1 GiB takes its time
        with stopped(process):
            for number in range(100_000):
                ours.post_message(number)
            for _ in range(blobs):
                ours.post_message(blob)
            assert ours.buffered_amount > blobs * len(blob)
        ours.post_message("that is all")
        count, in_order, checksums = ours.recv(60)
        assert (count, in_order) == (100_000, True)
        assert checksums == [zlib.crc32(blob)] * blobs
        assert ours.buffered_amount == 0
        os.kill(process.pid, signal.SIGKILL)


def test_a_stopped_process_that_is_killed_gives_its_close_at_once_and_the_memory_back(
    context: Any, close_of: Any
) -> None:
    with holder(context) as (process, ours), stopped(process):
        for number in range(100_000):
            ours.post_message(number)
        ours.post_message(bytes(64 << 20))
        close_of(process, ours)
        ours.drain(5)
        assert children.anonymous_bytes_of(os.getpid()) == 0
