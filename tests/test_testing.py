"""``mpchannel.testing``: leaks are found, peers are killed, messages delayed; and channels without sockets."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mpchannel
from mpchannel import DataCloneError, MessageChannel, PortClosedError, PortDetachedError, receive_message_on_port
from mpchannel.testing import DelayedChannel, FakeChannel, FakePort, deliver, kill_peer, no_leaks

from . import children
from .children import running

# Leaks


def test_a_port_that_is_left_is_named() -> None:
    with pytest.raises(AssertionError, match=r"left behind: port <MessagePort .*open") as caught, no_leaks(patience=0):
        port, other = MessageChannel()
    assert str(caught.value).count("port <") == 2
    port.close()
    other.close()


def test_a_process_that_is_left_is_named(context: Any) -> None:
    near, far = MessageChannel()
    process = context.Process(target=children.echo_until_eof, args=(far,), name="lazybones")
    with pytest.raises(AssertionError, match=r"process \d+ lazybones"), no_leaks(patience=0):
        process.start()
    near.close()
    process.join()
    process.close()


def test_a_descriptor_that_is_left_is_named() -> None:
    with pytest.raises(AssertionError, match=r"^left behind: descriptor \d+ -> /dev/null$"), no_leaks(patience=0):
        number = os.open(os.devnull, os.O_RDONLY)
    os.close(number)


def test_what_ends_in_time_is_no_leak(context: Any) -> None:
    with no_leaks():
        near, far = MessageChannel()
        process = context.Process(target=children.echo_until_eof, args=(far,))
        process.start()
        near.close()  # nobody joins the process
        del near, far, process


def test_what_was_there_before_is_no_leak(channel: Any) -> None:
    with no_leaks(patience=0):
        channel[0].post_message("x")


def test_an_exception_of_the_block_comes_out() -> None:
    kept: list[Any] = []
    with pytest.raises(IndexError, match="pop"), no_leaks(patience=0):
        kept.pop(len(kept) if kept.extend(MessageChannel()) is None else 0)
    for port in kept:
        port.close()


SUITE = """
import os, pytest, mpchannel
pytestmark = pytest.mark.usefixtures("no_leaks")
kept = []

def test_clean():
    with mpchannel.MessageChannel() as (one, other):
        one.post_message(1)
        assert other.recv(5) == 1

def test_leaky():
    kept.append(mpchannel.MessageChannel())

def test_clean_again():
    pass
"""


def test_the_fixture_fails_a_test_that_leaks(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["mpchannel.testing"]\n')
    (tmp_path / "test_suite.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "error"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert ran.returncode == 1, ran.stdout
    assert "3 passed, 1 error" in ran.stdout
    assert "ERROR test_suite.py::test_leaky" in ran.stdout
    assert "left behind: port <MessagePort" in ran.stdout


def test_it_is_imported_without_pytest() -> None:
    code = "import sys, mpchannel.testing; print('pytest' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


# Deaths


def test_kill_peer_ends_who_holds_the_other_end(context: Any) -> None:
    near, far = MessageChannel()
    process = context.Process(target=children.echo_until_eof, args=(far,))
    process.start()
    near.post_message("there?")
    assert near.recv(20) == "there?"
    assert kill_peer(near) == process.pid
    event = near.wait_closed(20)
    assert event is not None
    assert (event.reason, event.pid, event.exitcode) == ("died", process.pid, -signal.SIGKILL)
    with pytest.raises(PortClosedError):
        kill_peer(near)
    process.join()
    process.close()


def test_kill_peer_ends_a_worker() -> None:
    worker = mpchannel.Worker(children.__name__ + ":echo_until_eof", None)
    assert kill_peer(worker) == worker.pid
    worker.join(20)
    assert worker.exitcode == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        kill_peer(worker)


def test_kill_peer_does_not_end_this_process(channel: Any) -> None:
    with pytest.raises(ValueError, match="no process to kill"):
        kill_peer(channel[0])


# Delays


@pytest.fixture
def delayed() -> Iterator[DelayedChannel]:
    with DelayedChannel() as channel:
        yield channel


def test_paused_messages_come_after_resume_in_order(delayed: DelayedChannel) -> None:
    one, other = delayed
    other.post_message("through")
    assert one.recv(10) == "through"
    delayed.pause()
    for number in range(100):
        one.post_message(number)
    one.post_message(bytes(1 << 20))
    one.drain(10)  # it is in nobody's queue: the channel holds it
    assert not other.poll()
    delayed.resume()
    assert [other.recv(10) for _ in range(100)] == list(range(100))
    assert len(other.recv(10)) == 1 << 20


def test_a_message_is_delayed(delayed: DelayedChannel) -> None:
    one, other = delayed
    delayed.delay = 0.2
    before = time.monotonic()
    one.post_message("late")
    assert other.recv(10) == "late"
    assert time.monotonic() - before >= 0.2


def test_ports_move_through_a_delayed_channel_with_what_they_hold(delayed: DelayedChannel) -> None:
    one, other = delayed
    kept, given = MessageChannel()
    kept.post_message("before")
    one.post_message({"port": given}, transfer=[given])
    event = other.receive(10)
    assert event.data["port"].recv(10) == "before"
    kept.close()
    event.ports[0].close()


def test_the_close_event_is_delayed_behind_the_messages(delayed: DelayedChannel, context: Any) -> None:
    near, far = delayed
    delayed.pause()
    with running(context.Process(target=children.post_and_be_killed, args=(far, "small", 7)), ends_with=-9) as process:
        process.join(20)
    assert not near.poll()
    delayed.resume()
    assert near.recv(10) == (7, bytes(10))
    event = near.wait_closed(10)
    assert event is not None
    assert event.reason == "died"


# Fakes


@pytest.fixture
def fake() -> Iterator[tuple[FakePort, FakePort]]:
    with FakeChannel() as (one, other):
        yield one, other


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a fake channel opened a socket")

    monkeypatch.setattr("mpchannel._kernel.socket_pair", refuse)
    monkeypatch.setattr("mpchannel._link.socket_pair", refuse)


pytest_fakes = pytest.mark.usefixtures("no_sockets")


@pytest_fakes
def test_fake_messages_are_copies_in_order(fake: Any) -> None:
    one, other = fake
    message = {"list": [1]}
    assert one.post_message(message)
    message["list"].append(2)
    assert one.post_message("second")
    assert isinstance(other, mpchannel.MessagePort)
    assert other.recv() == {"list": [1]}
    assert receive_message_on_port(other).data == "second"
    assert receive_message_on_port(other) is None
    assert one.buffered_amount == 0


@pytest_fakes
def test_fake_listeners_run_when_told_in_order_of_posting() -> None:
    seen: list[Any] = []
    with FakeChannel() as (a, b), FakeChannel() as (c, d):
        b.onmessage = lambda event: (seen.append(event.data), c.post_message(event.data * 10))[0]
        d.onmessage = lambda event: seen.append(event.data)
        a.post_message(1)
        c.post_message(2)
        a.post_message(3)
        assert not seen
        assert deliver(2) == 2
        assert seen == [1, 2]
        assert deliver() == 3
        assert seen == [1, 2, 3, 10, 30]
        assert deliver() == 0


@pytest_fakes
def test_a_fake_recv_runs_the_other_side(fake: Any) -> None:
    one, other = fake
    other.onmessage = lambda event: other.post_message(event.data + 1) and None
    one.post_message(1)
    assert one.recv() == 2
    with pytest.raises(TimeoutError, match="nobody is left"):
        one.recv()


@pytest_fakes
def test_a_fake_recv_waits_on_a_loop_without_help(fake: Any) -> None:
    one, other = fake

    async def serve() -> None:
        async for number in other:
            other.post_message(number * 2)

    async def ask() -> list[int]:
        server = asyncio.create_task(serve())
        answers = []
        for number in (1, 2):
            one.post_message(number)
            answers.append(await one.arecv())
        one.close()
        await server
        assert (await other.await_closed()).reason == "closed"
        return answers

    assert asyncio.run(ask()) == [2, 4]


@pytest_fakes
def test_fake_listeners_run_by_themselves_on_a_loop(fake: Any) -> None:
    one, other = fake

    async def main() -> Any:
        async def answer(event: Any) -> None:
            other.post_message(event.data + "!")

        other.onmessage = answer
        one.post_message("hey")
        return await one.arecv()

    assert asyncio.run(main()) == "hey!"


@pytest_fakes
def test_fake_ports_move_with_what_they_hold(fake: Any) -> None:
    one, other = fake
    kept, given = FakeChannel()
    kept.post_message("before")
    assert one.post_message({"port": given}, transfer=[given])
    assert given.detached
    with pytest.raises(PortDetachedError):
        given.post_message("too late")
    event = other.receive()
    assert event.data["port"] is event.ports[0]
    assert event.ports[0].recv() == "before"
    event.ports[0].post_message("back")
    assert kept.recv() == "back"
    kept.close()
    assert event.ports[0].wait_closed().reason == "closed"


@pytest_fakes
def test_a_fake_refuses_what_a_real_port_refuses(fake: Any) -> None:
    one, other = fake
    kept, given = FakeChannel()
    with pytest.raises(DataCloneError, match=r"message\['lock'\]: cannot pickle"):
        one.post_message({"lock": threading.Lock()}, transfer=[given])
    with pytest.raises(DataCloneError, match="not in the transfer list"):
        one.post_message([kept, given], transfer=[given])
    with pytest.raises(DataCloneError, match="through itself"):
        one.post_message(None, transfer=[one])
    assert not given.detached
    one.max_buffered = 10
    with pytest.raises(mpchannel.BufferFull):
        one.post_message("x" * 20)
    assert not other.poll()


@pytest_fakes
def test_fake_ends_are_told_behind_the_messages(fake: Any) -> None:
    one, other = fake
    events: list[Any] = []
    other.onclose = lambda event: events.append((event.reason, event.was_clean))
    one.post_message("last")
    one.close()
    assert deliver() == 0
    assert not one.post_message("no more")
    assert other.recv() == "last"
    with pytest.raises(PortClosedError):
        other.recv()
    assert events == [("closed", True)]
    assert other.closed
    assert not other.post_message("nobody")


@pytest_fakes
def test_fake_ports_that_are_lost_on_their_way_are_undeliverable(fake: Any) -> None:
    one, other = fake
    kept, given = FakeChannel()
    one.post_message(None, transfer=[given])
    other.close()
    assert kept.wait_closed().reason == "undeliverable"


@pytest_fakes
def test_a_fake_channel_pauses_and_kills() -> None:
    with FakeChannel() as channel:
        one, other = channel
        channel.pause()
        one.post_message("late")
        assert one.buffered_amount
        channel.kill(one)
        assert not other.poll()
        channel.resume()
        assert other.recv() == "late"
        event = other.wait_closed()
        assert (event.reason, event.was_clean) == ("died", False)
