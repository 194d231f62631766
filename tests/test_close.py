"""How channels end: the close event, its reasons, and what a closed port still does."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mpchannel
from mpchannel import CloseEvent, DataCloneError, MessageChannel, PortClosedError, _link
from mpchannel._kernel import crossing

from . import children
from .children import ENDS, Port, Waiter, let_deliver, running

FULL = 1000
"""Small messages that are more than a socket holds (about 280): the rest is in an overflow file."""

Ends = tuple[Port, Port]
Heard = queue.SimpleQueue[Any]


def add_by_attribute(port: Port, fn: Callable[[Any], object]) -> None:
    port.onclose = fn


LISTENING: dict[str, Callable[[Port, Callable[[Any], object]], object]] = {
    "onclose": add_by_attribute,
    "on": lambda port, fn: port.on("close", fn),
    "once": lambda port, fn: port.once("close", fn),
    "add_event_listener": lambda port, fn: port.add_event_listener("close", fn),
}
listening = pytest.mark.parametrize("listen", LISTENING.values(), ids=LISTENING.keys())


# The event


@pytest.mark.row("W43", "W44", "H11")
@listening
def test_a_close_listener_hears_that_the_other_end_was_closed(
    ends: Ends, listen: Callable[[Port, Callable[[Any], object]], object]
) -> None:
    heard: Heard = queue.SimpleQueue()
    listen(ends[1], heard.put)
    ends[0].close()
    event = heard.get(timeout=10)
    assert isinstance(event, CloseEvent)
    assert (event.type, event.target) == ("close", ends[1])


@pytest.mark.row("W43")
def test_onclose_is_none_until_it_is_set(ends: Ends) -> None:
    assert ends[0].onclose is None
    ends[0].onclose = print
    assert ends[0].onclose is print
    ends[0].onclose = None
    assert ends[0].onclose is None


def test_close_of_a_port_in_the_same_process_is_clean_and_names_this_process(ends: Ends) -> None:
    ends[0].close()
    event = ends[1].wait_closed(10)
    assert event is not None
    assert (event.reason, event.was_clean, event.pid, event.exitcode) == ("closed", True, os.getpid(), None)


@pytest.mark.row("W44")
def test_close_fires_when_both_ends_were_started(ends: Ends) -> None:
    heard: Heard = queue.SimpleQueue()
    ends[0].onmessage = ends[1].onmessage = print
    ends[1].onclose = heard.put
    ends[0].close()
    assert heard.get(timeout=10).reason == "closed"


@pytest.mark.row("W45")
def test_close_does_not_fire_at_the_end_that_was_closed(ends: Ends) -> None:
    heard: Heard = queue.SimpleQueue()
    for port in ends:
        port.start()
    ends[0].onclose = heard.put
    ends[0].close()
    assert ends[1].wait_closed(10)
    ends[1].close()
    let_deliver()
    assert heard.empty()


@pytest.mark.row("N13")
def test_close_reaches_a_port_that_was_never_started(ends: Ends) -> None:
    heard: Heard = queue.SimpleQueue()
    ends[1].onclose = heard.put
    ends[0].close()
    assert heard.get(timeout=10).reason == "closed"
    assert not ends[1].started


@pytest.mark.row("N49", "N54")
def test_close_waits_behind_the_messages_of_a_port_that_was_never_started(ends: Ends) -> None:
    heard: Heard = queue.SimpleQueue()
    ends[1].onclose = heard.put
    ends[0].post_message("unread")
    ends[0].close()
    let_deliver()
    assert heard.empty()
    assert not ends[1].closed
    assert ends[1].recv(10) == "unread"
    assert heard.get(timeout=10).reason == "closed"


@pytest.mark.row("N49", "N54")
def test_close_waits_behind_the_messages_of_a_started_port_that_nobody_listens_to(ends: Ends) -> None:
    heard: Heard = queue.SimpleQueue()
    ends[1].onclose = heard.put
    ends[1].start()
    ends[0].post_message("unread")
    ends[0].close()
    let_deliver()
    assert heard.empty()
    ends[1].onmessage = heard.put
    assert [heard.get(timeout=10).type for _ in range(2)] == ["message", "close"]


@pytest.mark.row("N49", "W09", "N54")
@pytest.mark.parametrize("count", [0, 1, 3, FULL])
def test_close_comes_after_the_last_message(ends: Ends, count: int) -> None:
    heard: Heard = queue.SimpleQueue()
    ends[1].onmessage = lambda event: heard.put(event.data)
    ends[1].onclose = lambda event: heard.put(event.reason)
    for number in range(count):
        ends[0].post_message(number)
    ends[0].close()
    assert [heard.get(timeout=10) for _ in range(count + 1)] == [*range(count), "closed"]


@pytest.mark.row("N49", "N54")
def test_close_comes_after_the_last_message_however_full_the_socket_is() -> None:
    for count in range(265, 295):
        near, far = MessageChannel()
        for number in range(count):
            near.post_message(number)
        near.close()
        assert [far.recv(10) for _ in range(count)] == list(range(count))
        event = far.wait_closed(10)
        assert event is not None
        assert event.reason == "closed"


@pytest.mark.row("N49")
@pytest.mark.parametrize("size", [100_000, 5_000_000])
def test_close_comes_after_large_messages(ends: Ends, size: int) -> None:
    for number in range(4):
        ends[0].post_message(bytes([number]) * size)
    ends[0].close()
    assert [(message[0], len(message)) for message in ends[1]] == [(number, size) for number in range(4)]


@pytest.mark.row("N49")
@pytest.mark.parametrize("count", [3, FULL])
def test_messages_posted_before_close_arrive_although_the_closer_had_unread_ones(ends: Ends, count: int) -> None:
    for number in range(count):
        ends[0].post_message(number)
        ends[1].post_message("never read")
    ends[0].close()
    assert list(ends[1]) == list(range(count))
    event = ends[1].wait_closed(10)
    assert event is not None
    assert event.reason == "closed"


@pytest.mark.parametrize("what", ["port", "port after a poll", "overflowed"])
def test_a_death_between_the_look_at_a_packet_and_its_taking_loses_nothing(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = MessageChannel()
    told, for_told = MessageChannel()
    count = FULL if what == "overflowed" else 1
    near.post_message("never read")  # the kernel tells of that: the connection is reset
    process = mpchannel.get_context("fork").Process(target=children.post_and_stay, args=(far, for_told, what, count))
    resets: list[ConnectionResetError] = []

    def late(sock: Any) -> Any:
        process.kill()
        process.join()
        try:
            yield from taking_off(sock)
        except ConnectionResetError as error:
            resets.append(error)
            raise

    with running(process, None), near, told:
        assert told.recv(20) == "posted"
        taking_off = _link.taking_off
        monkeypatch.setattr(_link, "taking_off", late)
        if what == "port after a poll":
            assert near.poll()
        for _ in range(count):
            near.recv(20)
        with pytest.raises(PortClosedError):
            near.recv(20)
        assert len(resets) == 1
        event = near.wait_closed(10)
        assert event is not None
        assert event.reason == "died"


@pytest.mark.parametrize("what", ["small", "port"])
def test_an_end_between_the_look_at_a_packet_and_its_taking_loses_nothing_of_a_connection(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = mpchannel.Pipe()
    near.send("unread")
    far.send("small" if what == "small" else MessageChannel().port1)
    take = near._end._recv_into

    def early(*request: Any) -> int:
        size = take(*request)
        far.close()
        return size

    with near:
        monkeypatch.setattr(near._end, "_recv_into", early)
        assert (near.recv() == "small") is (what == "small")
        with pytest.raises(EOFError):
            near.recv()


def test_all_listeners_hear_of_the_close_in_order(ends: Ends) -> None:
    heard: Heard = queue.SimpleQueue()
    ends[1].on("close", lambda event: heard.put("first"))
    ends[1].onclose = lambda event: heard.put("second")
    ends[1].once("close", lambda event: heard.put("third"))
    ends[0].close()
    assert [heard.get(timeout=10) for _ in range(3)] == ["first", "second", "third"]


def test_a_close_listener_that_was_removed_does_not_run(ends: Ends) -> None:
    heard: Heard = queue.SimpleQueue()
    ends[1].on("close", heard.put).off("close", heard.put)
    ends[1].onclose = heard.put
    ends[1].onclose = None
    ends[0].close()
    let_deliver()
    assert heard.empty()
    assert ends[1].wait_closed(10)


@pytest.mark.parametrize("end", ["close", "collection"])
def test_no_listener_runs_inside_the_call_that_ends_the_channel(end: str) -> None:
    # It would deadlock with a lock that the caller holds.
    near, far = MessageChannel()
    lock = threading.Lock()
    heard: Heard = queue.SimpleQueue()

    def locked(event: Any) -> None:
        with lock:
            heard.put(threading.current_thread())

    far.onclose = locked
    with lock:
        if end == "close":
            near.close()
        del near
        gc.collect()
        assert heard.empty()
    assert heard.get(timeout=10) is not threading.current_thread()


# Once


@pytest.mark.row("X33")
def test_an_end_that_is_closed_and_then_collected_is_one_close(ends: Ends) -> None:
    near, far = MessageChannel()
    heard: Heard = queue.SimpleQueue()
    far.onclose = heard.put
    near.close()
    near.close()
    del near
    gc.collect()
    assert heard.get(timeout=10).reason == "closed"
    let_deliver()
    assert heard.empty()


@pytest.mark.row("X33")
def test_a_peer_that_closes_is_collected_and_exits_is_one_close(context: Any) -> None:
    ours, theirs = MessageChannel()
    heard: Heard = queue.SimpleQueue()
    ours.onclose = heard.put
    ours.onmessage = heard.put
    with running(context.Process(target=children.close_collect_and_return, args=(theirs,))):
        assert heard.get(timeout=20).reason == "closed"
    let_deliver()
    assert heard.empty()


def test_a_close_that_many_threads_see_is_one_event() -> None:
    for _ in range(30):
        near, far = MessageChannel()
        heard: list[Any] = []
        far.onclose = heard.append
        started = threading.Barrier(5)

        def wait(port: Port, started: threading.Barrier = started) -> None:
            started.wait(10)
            port.recv(10)

        waiters = [Waiter(lambda port=far, wait=wait: wait(port)) for _ in range(4)]
        started.wait(10)
        near.close()
        assert all(isinstance(each.result(), PortClosedError) for each in waiters)
        let_deliver()
        assert [event.reason for event in heard] == ["closed"]


@pytest.mark.row("E29")
def test_closing_twice_does_nothing_more(ends: Ends) -> None:
    heard: Heard = queue.SimpleQueue()
    ends[1].onclose = heard.put
    ends[0].close()
    assert heard.get(timeout=10)
    ends[0].close()
    ends[1].close()
    ends[1].close()
    let_deliver()
    assert heard.empty()
    assert ends[0].closed
    assert ends[1].closed


def test_closing_both_ends_at_the_very_moment_is_harmless() -> None:
    for _ in range(100):
        heard: list[tuple[int, Any]] = []
        channel = tuple(MessageChannel())
        barrier = threading.Barrier(2)

        def close(port: Port, barrier: threading.Barrier = barrier) -> None:
            barrier.wait(10)
            port.close()

        for number, port in enumerate(channel):
            port.onclose = lambda event, number=number, heard=heard: heard.append((number, event.reason))
        closers = [Waiter(lambda port=port, close=close: close(port)) for port in channel]
        assert [each.result() for each in closers] == [None, None]
        let_deliver()
        assert heard in ([], [(0, "closed")], [(1, "closed")])


def test_a_close_listener_that_raises_keeps_no_other_from_its_event(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: Heard = queue.SimpleQueue()
    monkeypatch.setattr(threading, "excepthook", reported.put)
    heard: Heard = queue.SimpleQueue()

    def fail(event: Any) -> None:
        raise LookupError("a listener that fails")

    ends[1].on("close", fail)
    ends[1].on("close", heard.put)
    ends[0].close()
    assert heard.get(timeout=10).reason == "closed"
    assert reported.get(timeout=10).exc_type is LookupError


# Late listeners


@listening
def test_a_close_listener_added_after_the_close_still_runs_once(
    ends: Ends, listen: Callable[[Port, Callable[[Any], object]], object]
) -> None:
    ends[0].close()
    assert ends[1].wait_closed(10)
    heard: Heard = queue.SimpleQueue()
    listen(ends[1], heard.put)
    event = heard.get(timeout=10)
    assert (event.type, event.target, event.reason) == ("close", ends[1], "closed")
    let_deliver()
    assert heard.empty()


def test_a_late_close_listener_does_not_make_the_others_run_again(ends: Ends) -> None:
    early: Heard = queue.SimpleQueue()
    late: Heard = queue.SimpleQueue()
    ends[1].on("close", early.put)
    ends[0].close()
    assert early.get(timeout=10)
    ends[1].on("close", late.put)
    assert late.get(timeout=10)
    let_deliver()
    assert early.empty()


def test_a_late_close_listener_does_not_run_inside_its_registration(ends: Ends) -> None:
    ends[0].close()
    assert ends[1].wait_closed(10)
    lock = threading.Lock()
    heard: Heard = queue.SimpleQueue()

    def locked(event: Any) -> None:
        with lock:
            heard.put(event)

    with lock:
        ends[1].on("close", locked)
    assert heard.get(timeout=10)


def test_a_close_listener_added_in_a_close_listener_runs(ends: Ends) -> None:
    heard: Heard = queue.SimpleQueue()
    ends[1].onclose = lambda event: event.target.on("close", heard.put)
    ends[0].close()
    assert heard.get(timeout=10).reason == "closed"


def test_a_late_close_listener_on_a_loop_runs_on_that_loop(ends: Ends) -> None:
    async def main() -> None:
        ends[0].close()
        assert await ends[1].await_closed()
        heard: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        ends[1].on("close", lambda event: heard.set_result(threading.get_ident()))
        assert await asyncio.wait_for(heard, 10) == threading.get_ident()

    asyncio.run(main())


@listening
def test_a_close_listener_added_after_ones_own_close_never_runs(
    ends: Ends, listen: Callable[[Port, Callable[[Any], object]], object]
) -> None:
    ends[1].close()
    heard: Heard = queue.SimpleQueue()
    listen(ends[1], heard.put)
    let_deliver()
    assert heard.empty()


# A closed port


@pytest.mark.row("E29")
def test_close_takes_effect_at_once(ends: Ends) -> None:
    ends[0].close()
    assert ends[0].closed
    assert not ends[0].detached


@pytest.mark.row("W07", "E18", "N28", "X28")
def test_posting_on_a_port_one_closed_is_silent_and_nothing_arrives(ends: Ends) -> None:
    ends[0].close()
    assert ends[0].post_message("too late") is False
    assert list(ends[1]) == []


@pytest.mark.row("W06", "E19", "X28")
def test_posting_to_an_end_that_closed_is_silent_and_its_listeners_do_not_run(ends: Ends) -> None:
    heard: Heard = queue.SimpleQueue()
    ends[1].onmessage = heard.put
    ends[1].close()
    assert ends[0].post_message("nobody there") is False
    let_deliver()
    assert heard.empty()


@pytest.mark.row("W06", "E19", "X28")
def test_a_listener_added_after_ones_own_close_hears_nothing(ends: Ends) -> None:
    ends[1].close()
    heard: Heard = queue.SimpleQueue()
    ends[0].post_message("nobody there")
    ends[1].onmessage = heard.put
    let_deliver()
    assert heard.empty()
    assert not ends[1].started


@pytest.mark.row("X21", "E19")
def test_post_message_tells_whether_the_channel_was_open(ends: Ends) -> None:
    assert ends[0].post_message("open") is True
    ends[1].close()
    for message in ("small", bytes(1_000_000)):
        assert ends[0].post_message(message) is False


@pytest.mark.row("E19", "N49")
def test_posting_to_an_end_that_closed_is_silent_while_its_last_messages_are_unread(ends: Ends) -> None:
    ends[1].post_message("last words")
    ends[1].close()
    assert ends[0].post_message("nobody there") is False
    assert ends[0].recv(10) == "last words"


@pytest.mark.row("E19")
def test_posting_to_a_process_that_died_is_silent(context: Any) -> None:
    ours, theirs = MessageChannel()
    with running(context.Process(target=children.end_when_told, args=(theirs, "SIGKILL")), ends_with=-9):
        assert ours.recv(20) == "ready"
        ours.post_message("end now")
        assert ours.wait_closed(20)
        assert ours.post_message("nobody there") is False


@pytest.mark.row("W11")
def test_the_peer_of_a_closed_port_can_still_be_transferred(ends: Ends) -> None:
    kept, given = MessageChannel()
    kept.close()
    ends[0].post_message(None, transfer=[given])
    (arrived,) = ends[1].receive(10).ports
    event = arrived.wait_closed(10)
    assert event is not None
    assert event.reason == "closed"


@pytest.mark.row("W11")
def test_a_closed_port_cannot_be_transferred(ends: Ends) -> None:
    closed, peer = MessageChannel()
    closed.close()
    with pytest.raises(DataCloneError, match=r"transfer\[0\] is a closed port"):
        ends[0].post_message(None, transfer=[closed])
    assert peer.wait_closed(10)
    with pytest.raises(DataCloneError, match=r"transfer\[0\] is a closed port"):
        ends[0].post_message(None, transfer=[peer])


def test_listeners_come_and_go_on_a_closed_port_without_error(ends: Ends) -> None:
    ends[0].on("message", print)
    ends[0].close()
    for port in ends:
        port.start()
        port.on("message", print).once("close", print).off("close", print).off("message", print)
        port.add_event_listener("messageerror", print)
        port.remove_event_listener("messageerror", print)
        port.onmessage = print
        port.onmessage = port.onclose = port.onmessageerror = None
        assert port.wait_closed(10) is None or port is ends[1]


@pytest.mark.row("X20")
def test_what_is_queued_is_dropped_by_ones_own_close(ends: Ends) -> None:
    for _ in range(3):
        ends[0].post_message("queued")
    ends[1].close()
    assert mpchannel.receive_message_on_port(ends[1]) is None
    with pytest.raises(PortClosedError) as caught:
        ends[1].receive(10)
    assert caught.value.reason is None


@pytest.mark.row("W10")
def test_closing_in_the_first_handler_drops_the_second_message(ends: Ends) -> None:
    heard: list[Any] = []

    def close(event: Any) -> None:
        heard.append(event.data)
        event.target.close()

    for message in ("first", "second", "third"):
        ends[0].post_message(message)
    ends[1].onmessage = close
    event = ends[0].wait_closed(10)
    assert event is not None
    assert event.reason == "closed"
    let_deliver()
    assert heard == ["first"]


@pytest.mark.row("W10")
def test_the_listeners_of_one_message_all_run_although_the_first_closes(ends: Ends) -> None:
    heard: Heard = queue.SimpleQueue()
    ends[1].on("message", lambda event: event.target.close())
    ends[1].on("message", heard.put)
    ends[1].start()
    ends[0].post_message("first")
    assert heard.get(timeout=10).data == "first"


@pytest.mark.row("X23")
def test_in_its_close_listener_a_port_is_closed_already(ends: Ends) -> None:
    heard: Heard = queue.SimpleQueue()
    near, far = MessageChannel()  # closed below, for the listener lives as long as the fixture's port

    def look(event: Any) -> None:
        port = event.target
        heard.put(port.closed)
        heard.put(port.post_message("too late"))
        try:
            near.post_message(None, transfer=[port])
        except DataCloneError as error:
            heard.put(type(error))
        port.close()
        heard.put(port.wait_closed(0).reason)

    ends[1].onclose = look
    ends[0].close()
    assert [heard.get(timeout=10) for _ in range(4)] == [True, False, DataCloneError, "closed"]
    assert not far.poll()
    near.close()
    far.close()


def test_a_port_is_open_until_its_last_message_was_taken(ends: Ends) -> None:
    ends[0].post_message("unread")
    ends[0].close()
    assert not ends[1].closed
    assert ends[1].recv(10) == "unread"
    with pytest.raises(PortClosedError):
        ends[1].recv(10)
    assert ends[1].closed


def test_receiving_on_a_closed_channel_says_why_it_closed(ends: Ends) -> None:
    ends[0].close()
    with pytest.raises(PortClosedError, match=rf"the other end \(process {os.getpid()}\) was closed") as caught:
        ends[1].recv(10)
    assert caught.value.reason == "closed"
    assert isinstance(caught.value, EOFError)


@pytest.mark.row("H14")
def test_leaving_a_with_block_closes_the_port(ends: Ends) -> None:
    with ends[0] as port:
        assert port is ends[0]
        port.post_message("inside")
    assert list(ends[1]) == ["inside"]


@pytest.mark.row("H14")
def test_leaving_an_async_with_block_closes_the_port(ends: Ends) -> None:
    async def main() -> list[Any]:
        async with ends[0] as port:
            port.post_message("inside")
        return [message async for message in ends[1]]

    assert asyncio.run(main()) == ["inside"]


@pytest.mark.row("H14")
def test_leaving_a_with_block_of_a_channel_closes_both_ends() -> None:
    with MessageChannel() as channel:
        port1, port2 = channel
    assert port1.closed
    assert port2.closed


# Waiting for the close


def test_wait_closed_returns_the_event(ends: Ends) -> None:
    waiter = Waiter(lambda: ends[1].wait_closed(20)).blocks()
    ends[0].close()
    event = waiter.result()
    assert isinstance(event, CloseEvent)
    assert (event.target, event.reason) == (ends[1], "closed")


def test_wait_closed_returns_at_once_when_the_channel_is_closed_already(ends: Ends) -> None:
    ends[0].close()
    for _ in range(2):
        event = ends[1].wait_closed(0)
        assert event is not None
        assert event.reason == "closed"


def test_wait_closed_returns_none_after_ones_own_close(ends: Ends) -> None:
    ends[1].close()
    assert ends[1].wait_closed() is None


def test_wait_closed_waits_behind_unread_messages(ends: Ends) -> None:
    ends[0].post_message("unread")
    ends[0].close()
    with pytest.raises(TimeoutError):
        ends[1].wait_closed(0)
    waiter = Waiter(lambda: ends[1].wait_closed(20)).blocks()
    assert ends[1].recv(10) == "unread"
    assert waiter.result().reason == "closed"


def test_wait_closed_waits_until_the_listener_had_every_message(ends: Ends) -> None:
    heard: list[int] = []
    ends[1].onmessage = lambda event: heard.append(event.data)
    for number in range(FULL):
        ends[0].post_message(number)
    ends[0].close()
    assert ends[1].wait_closed(20)
    assert heard == list(range(FULL))


@pytest.mark.parametrize("seconds", [0, 0.01])
@pytest.mark.parametrize("started", [False, True], ids=["not started", "started"])
def test_wait_closed_gives_up_after_its_timeout_and_the_port_goes_on(ends: Ends, seconds: float, started: bool) -> None:
    heard: Heard = queue.SimpleQueue()
    if started:
        ends[1].onmessage = heard.put
    with pytest.raises(TimeoutError):
        ends[1].wait_closed(seconds)
    ends[0].post_message("still open")
    assert (heard.get(timeout=10) if started else ends[1].receive(10)).data == "still open"


def test_every_thread_that_waits_for_the_close_gets_the_event(ends: Ends) -> None:
    waiters = [Waiter(lambda: ends[1].wait_closed(20)).blocks() for _ in range(4)]
    ends[0].close()
    assert [each.result().reason for each in waiters] == ["closed"] * 4


def test_wait_closed_on_the_thread_that_delivers_is_a_runtime_error(ends: Ends) -> None:
    heard: Heard = queue.SimpleQueue()

    def wait(event: Any) -> None:
        try:
            event.target.wait_closed(10)
        except RuntimeError as error:
            heard.put(str(error))

    ends[1].onmessage = wait
    ends[0].post_message("hi")
    assert "would wait for itself" in heard.get(timeout=10)


def test_await_closed_returns_the_event(ends: Ends) -> None:
    async def main() -> Any:
        task = asyncio.ensure_future(ends[1].await_closed())
        await asyncio.sleep(0)
        ends[0].close()
        return await asyncio.wait_for(task, 10)

    assert asyncio.run(main()).reason == "closed"


def test_await_closed_returns_at_once_when_the_channel_is_closed_already(ends: Ends) -> None:
    ends[0].close()
    assert ends[1].wait_closed(10)
    event = asyncio.run(asyncio.wait_for(ends[1].await_closed(), 10))
    assert event is not None
    assert event.reason == "closed"


def test_await_closed_returns_none_after_ones_own_close(ends: Ends) -> None:
    ends[1].close()
    assert asyncio.run(asyncio.wait_for(ends[1].await_closed(), 10)) is None


def test_await_closed_wakes_with_none_at_ones_own_close(ends: Ends) -> None:
    async def main() -> Any:
        task = asyncio.ensure_future(ends[1].await_closed())
        await asyncio.sleep(0)
        ends[1].close()
        return await asyncio.wait_for(task, 10)

    assert asyncio.run(main()) is None


def test_await_closed_waits_behind_unread_messages(ends: Ends) -> None:
    async def main() -> Any:
        ends[0].post_message("unread")
        ends[0].close()
        task = asyncio.ensure_future(ends[1].await_closed())
        done, _ = await asyncio.wait([task], timeout=0.05)
        assert not done
        assert await ends[1].arecv() == "unread"
        return await asyncio.wait_for(task, 10)

    assert asyncio.run(main()).reason == "closed"


def test_await_closed_that_timed_out_leaves_the_port_as_it_was(ends: Ends) -> None:
    async def main() -> Any:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(ends[1].await_closed(), 0.01)
        ends[0].post_message("still open")
        assert await ends[1].arecv() == "still open"
        ends[0].close()
        return await asyncio.wait_for(ends[1].await_closed(), 10)

    assert asyncio.run(main()).reason == "closed"


def test_tasks_and_threads_may_wait_for_the_same_close(ends: Ends) -> None:
    async def main() -> list[Any]:
        tasks = [asyncio.ensure_future(ends[1].await_closed()) for _ in range(3)]
        await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        thread = loop.run_in_executor(None, ends[1].wait_closed, 20)
        ends[0].close()
        return [*await asyncio.wait_for(asyncio.gather(*tasks), 10), await asyncio.wait_for(thread, 10)]

    assert [event.reason for event in asyncio.run(main())] == ["closed"] * 4


# Who waits on a port that is closed


WAITS: dict[str, Callable[[Port], object]] = {
    "receive": lambda port: port.receive(),
    "receive with a timeout": lambda port: port.receive(60),
    "recv": lambda port: port.recv(),
    "recv_bytes": lambda port: port.recv_bytes(),
    "iteration": list,
    "poll": lambda port: port.poll(None),
    "wait_closed": lambda port: port.wait_closed(),
}
waiting = pytest.mark.parametrize("wait", WAITS.items(), ids=WAITS.keys())


@waiting
def test_ones_own_close_wakes_every_thread_that_waits(
    channel: Ends, wait: tuple[str, Callable[[Port], object]]
) -> None:
    name, call = wait
    waiters = [Waiter(lambda: call(channel[1])).blocks() for _ in range(3)]
    channel[1].close()
    for each in waiters:
        outcome = each.result()
        if name in ("iteration", "poll", "wait_closed"):
            assert outcome == {"iteration": [], "poll": True, "wait_closed": None}[name]
        else:
            assert isinstance(outcome, PortClosedError)
            assert outcome.reason is None


@waiting
def test_the_close_of_the_other_end_wakes_every_thread_that_waits(
    channel: Ends, wait: tuple[str, Callable[[Port], object]]
) -> None:
    name, call = wait
    waiters = [Waiter(lambda: call(channel[1])).blocks() for _ in range(3)]
    channel[0].close()
    for each in waiters:
        outcome = each.result()
        if name in ("iteration", "poll"):
            assert outcome == {"iteration": [], "poll": True}[name]
        else:
            assert outcome.reason == "closed"
            assert isinstance(outcome, CloseEvent if name == "wait_closed" else PortClosedError)


@pytest.mark.parametrize("which", [0, 1], ids=["the other end", "this end"])
def test_a_close_wakes_a_task_that_waits(ends: Ends, which: int) -> None:
    async def main() -> None:
        task = asyncio.ensure_future(ends[1].areceive())
        await asyncio.sleep(0)
        ends[which].close()
        with pytest.raises(PortClosedError):
            await asyncio.wait_for(task, 10)

    asyncio.run(main())


def test_a_close_in_a_thread_wakes_a_task_that_waits(ends: Ends) -> None:
    async def main() -> None:
        task = asyncio.ensure_future(ends[1].areceive())
        await asyncio.sleep(0)
        assert await asyncio.get_running_loop().run_in_executor(None, ends[1].close) is None
        with pytest.raises(PortClosedError):
            await asyncio.wait_for(task, 10)

    asyncio.run(main())


# Processes that end


def expected(how: str) -> tuple[str, bool]:
    """Reason and cleanness."""
    return ("exited", True) if how in ("return", "sys.exit", "raise") else ("died", False)


@pytest.mark.row("W48", "H11")
@pytest.mark.parametrize("how", ENDS)
def test_the_end_of_a_process_is_told_with_reason_process_and_exit_code(context: Any, how: str) -> None:
    ours, theirs = MessageChannel()
    heard: Heard = queue.SimpleQueue()
    with running(context.Process(target=children.end_when_told, args=(theirs, how)), ends_with=ENDS[how]) as process:
        assert ours.recv(20) == "ready"
        ours.onclose = heard.put
        ours.post_message("end now")
        event = heard.get(timeout=20)
        assert (event.reason, event.was_clean) == expected(how)
        assert (event.pid, event.exitcode) == (process.pid, ENDS[how])
    let_deliver()
    assert heard.empty()


@pytest.mark.row("W48", "H11")
@pytest.mark.parametrize("how", ENDS)
def test_the_end_of_a_process_of_the_stdlib_is_told_as_well(start_method: str, how: str) -> None:
    context = multiprocessing.get_context(start_method)
    ours, theirs = MessageChannel()
    process = context.Process(target=children.end_when_told, args=(theirs, how))  # type: ignore[attr-defined]
    with running(process, ends_with=ENDS[how]):
        assert ours.recv(20) == "ready"
        ours.post_message("end now")
        event = ours.wait_closed(20)
        assert event is not None
        assert (event.reason, event.was_clean) == expected(how)
        assert (event.pid, event.exitcode) == (process.pid, ENDS[how])


@pytest.mark.parametrize("stop", ["terminate", "kill"])
def test_a_process_that_is_stopped_while_it_receives_has_died(context: Any, stop: str) -> None:
    ours, theirs = MessageChannel()
    process = context.Process(target=children.end_when_told, args=(theirs, "return"))
    with running(process, ends_with=None):
        assert ours.recv(20) == "ready"
        getattr(process, stop)()
        event = ours.wait_closed(20)
        assert event is not None
        assert (event.reason, event.was_clean, event.pid) == ("died", False, process.pid)
        assert event.exitcode == {"terminate": -signal.SIGTERM, "kill": -signal.SIGKILL}[stop]


def test_the_exit_code_takes_nothing_from_whoever_joins_the_process(context: Any) -> None:
    ours, theirs = MessageChannel()
    process = context.Process(target=children.end_when_told, args=(theirs, "sys.exit"))
    process.start()
    assert ours.recv(20) == "ready"
    ours.post_message("end now")
    event = ours.wait_closed(20)
    assert event is not None
    assert event.exitcode == 3
    process.join(20)
    assert (process.exitcode, event.exitcode) == (3, 3)


@pytest.mark.parametrize("how", ["sys.exit", "SIGKILL"])
def test_the_exit_code_is_known_after_the_process_was_joined(context: Any, how: str) -> None:
    ours, theirs = MessageChannel()
    process = context.Process(target=children.end_when_told, args=(theirs, how))
    with running(process, ends_with=ENDS[how]):
        assert ours.recv(20) == "ready"
        ours.post_message("end now")
    event = ours.wait_closed(20)
    assert event is not None
    assert (event.pid, event.exitcode) == (process.pid, ENDS[how])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_port_given_to_a_grandchild_names_the_grandchild_which_is_no_child_of_ours(method: str) -> None:
    kept, given = MessageChannel()
    broker = mpchannel.get_context(method).Process(target=children.lend_to_grandchild, args=(method, given))
    with running(broker):
        grandchild = kept.recv(20)
        assert grandchild not in (broker.pid, os.getpid())
        os.kill(grandchild, signal.SIGKILL)
        event = kept.wait_closed(20)
        assert event is not None
        assert (event.reason, event.pid, event.exitcode) == ("died", grandchild, None)


@pytest.mark.row("W46")
def test_close_fires_in_another_process(context: Any) -> None:
    kept, given = MessageChannel()
    report, to_report = MessageChannel()
    with running(context.Process(target=children.report_close, args=(given, to_report))):
        assert report.recv(20) == "started"
        kept.close()
        assert report.recv(20) == [("close", "closed", os.getpid())]


def test_a_port_that_is_collected_in_another_process_is_told(context: Any) -> None:
    gate, gatekeeper = MessageChannel()
    with running(context.Process(target=children.drop_and_wait, args=(gate,))) as process:
        kept, given = MessageChannel()
        gatekeeper.post_message(None, transfer=[given])
        event = kept.wait_closed(20)
        assert event is not None
        assert (event.reason, event.was_clean, event.pid) == ("collected", True, process.pid)
        gatekeeper.post_message("end now")


@pytest.mark.row("N26", "N49")
def test_a_listener_for_one_message_at_a_time_misses_none_before_the_close(context: Any) -> None:
    ours, theirs = MessageChannel()
    with running(context.Process(target=children.post_first_last_and_close, args=(theirs,))):
        for _ in range(300):
            kept, given = MessageChannel()
            heard: Heard = queue.SimpleQueue()
            closed: Heard = queue.SimpleQueue()
            kept.start()
            kept.onclose = closed.put
            ours.post_message(None, transfer=[given])
            messages = []
            for _ in range(2):
                kept.once("message", heard.put)
                messages.append(heard.get(timeout=20).data)
            assert messages == ["first", "last"]
            assert closed.get(timeout=20).reason == "closed"
        ours.close()


def test_the_goodbye_of_a_process_comes_after_its_last_thread(context: Any) -> None:
    ours, theirs = MessageChannel()
    with running(context.Process(target=children.leave_a_thread_posting, args=(theirs, FULL))):
        assert ours.recv(20) == "returning"
        ours.post_message("go on")
        assert list(ours) == list(range(FULL))
        event = ours.wait_closed(20)
        assert event is not None
        assert event.reason == "exited"


# The end of the interpreter


def run(script: str) -> str:
    """Output of a script, which must end in order, at once and without a word on stderr."""
    home = str(Path(mpchannel.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": home},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.row("W15")
def test_channels_can_be_made_and_used_while_the_interpreter_ends() -> None:
    output = run(
        """
        import atexit

        def use(when):
            port1, port2 = mpchannel.MessageChannel()
            port1.onmessage = port2.onmessage = port2.onclose = print
            port1.post_message(1), port2.post_message(2)
            port1.close()
            print(when)

        atexit.register(use, "after the goodbye")
        import mpchannel
        atexit.register(use, "before the goodbye")
        port1, port2 = mpchannel.MessageChannel()
        port1.start()

        class Late:
            def __del__(self):
                port1.post_message(1), port2.post_message(2)
                port1.close()

        late = Late()
        """
    )
    assert "before the goodbye" in output
    assert "after the goodbye" in output


@pytest.mark.row("W16")
def test_no_listener_runs_once_the_interpreter_has_said_goodbye() -> None:
    output = run(
        """
        import atexit, threading

        def last():
            port1.post_message("too late")
            # A listener would have had its turn by then.
            threading.Event().wait(0.05)
            print("end")

        atexit.register(last)
        import mpchannel
        port1, port2 = mpchannel.MessageChannel()
        port2.onmessage = print
        """
    )
    assert output == "end\n"


def test_ports_in_every_state_at_the_end_of_the_interpreter_cause_no_hang_and_no_word() -> None:
    output = run(
        """
        import mpchannel
        keep = []
        for _ in range(3):
            port1, port2 = mpchannel.MessageChannel()
            keep += [port1, port2]
            for number in range(1000):
                port1.post_message(number)
            port3, port4 = mpchannel.MessageChannel()
            port2.post_message(None, transfer=[port3])
            keep += [port3, port4]
        port1.onmessage = lambda event: None
        port2.onclose = print
        cycle = [mpchannel.MessageChannel()]
        cycle.append(cycle)
        print("end")
        """
    )
    assert output == "end\n"


def test_daemon_threads_that_wait_on_ports_at_the_end_of_the_interpreter_cause_no_hang_and_no_word() -> None:
    output = run(
        """
        import atexit, threading
        atexit.register(threading.Event().wait, 0.1)  # after the goodbye: time for the threads to say something
        import mpchannel
        port1, port2 = mpchannel.MessageChannel()
        for port in (port1, port2):
            for wait in (port.receive, port.recv, port.wait_closed):
                threading.Thread(target=wait, daemon=True).start()
        threading.Event().wait(0.1)  # they have gone to sleep
        print("end")
        """
    )
    assert output == "end\n"


@pytest.mark.parametrize("make", [mpchannel.MessageChannel, mpchannel.Pipe])
def test_a_finaliser_that_closes_while_a_descriptor_is_made_does_not_wait_for_whoever_waits_for_that(make: Any) -> None:
    """The collector may run a user's ``__del__`` anywhere, also where this thread holds the lock that is taken last."""
    near, far = make()
    end = near._link if make is mpchannel.MessageChannel else near._end
    holds, waits = threading.Event(), threading.Event()

    def post() -> None:
        with end.sending:
            holds.set()
            assert waits.wait(10)
            with crossing:  # as a large message does
                pass

    poster = threading.Thread(target=post)
    poster.start()
    assert holds.wait(10)
    with crossing:
        waits.set()
        near.close()  # as the finaliser would
    poster.join(10)
    assert not poster.is_alive()
    with pytest.raises(EOFError):
        far.recv()
    far.close()
