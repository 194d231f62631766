"""What is no longer referred to goes away, and what is still needed stays."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mpchannel import MessageChannel, MessagePort

from .children import Port, let_deliver

FULL = 1000
"""Small messages that are more than a socket holds (about 280): the rest is in an overflow file."""

Heard = queue.SimpleQueue[Any]


class Owner:
    """Something that refers to itself and to a port."""

    def __init__(self, port: Port | None = None) -> None:
        self.port = port
        self.me = self

    def hear(self, event: Any) -> None:
        pass


def drop(port: Port) -> None:
    """The caller's is the last reference to the port, and passes it in."""
    del port


def drop_in_a_cycle(port: Port) -> None:
    Owner(port)


def drop_with_a_listener_that_refers_to_it(port: Port) -> None:
    port.on("message", lambda event: port.post_message(event.data))
    port.onclose = Owner(port).hear


def collect() -> None:
    """Collect what can be; the delivery thread holds no port in its hands meanwhile."""
    let_deliver()
    gc.collect()


DROPS: dict[str, Callable[[Port], None]] = {
    "bare": drop,
    "in a cycle": drop_in_a_cycle,
    "in a cycle with its listeners": drop_with_a_listener_that_refers_to_it,
}
dropping = pytest.mark.parametrize("let_go", DROPS.values(), ids=DROPS.keys())


def half_dropped(let_go: Callable[[Port], None]) -> tuple[Port, weakref.ref[Port]]:
    """A port whose other end nobody refers to; and a weak reference to that one."""
    channel = MessageChannel[Any, Any]()
    kept = channel.port1
    gone = weakref.ref(channel.port2)
    let_go(channel.port2)
    del channel
    collect()
    return kept, gone


@pytest.mark.row("W50", "E08")
@dropping
def test_a_port_nobody_refers_to_is_collected_and_its_peer_sees_close(let_go: Callable[[Port], None]) -> None:
    kept, gone = half_dropped(let_go)
    assert gone() is None
    event = kept.wait_closed(10)
    assert event is not None
    assert (event.reason, event.was_clean, event.pid) == ("collected", True, os.getpid())


@pytest.mark.row("W50", "E08")
@dropping
def test_a_listener_hears_that_the_other_end_was_collected(let_go: Callable[[Port], None]) -> None:
    channel = MessageChannel[Any, Any]()
    kept = channel.port1
    heard: Heard = queue.SimpleQueue()
    kept.onclose = heard.put
    kept.start()
    let_go(channel.port2)
    del channel
    collect()
    assert heard.get(timeout=10).reason == "collected"
    let_deliver()
    assert heard.empty()


@pytest.mark.row("E08")
def test_only_one_end_ever_had_a_name() -> None:
    port2 = MessageChannel[Any, Any]().port2
    heard: Heard = queue.SimpleQueue()
    port2.onclose = heard.put
    port2.start()
    collect()
    assert heard.get(timeout=10).reason == "collected"


def test_both_ends_in_one_cycle_are_collected() -> None:
    one, other = MessageChannel[Any, Any]()
    gone = [weakref.ref(one), weakref.ref(other)]
    owner = Owner(one)
    owner.me = other  # type: ignore[assignment]
    other.on("close", owner.hear)
    del one, other, owner
    collect()
    assert [each() for each in gone] == [None, None]


@dropping
@pytest.mark.parametrize("count", [3, FULL])
def test_messages_of_a_port_that_is_collected_arrive_before_the_close(
    let_go: Callable[[Port], None], count: int
) -> None:
    channel = MessageChannel[Any, Any]()
    kept = channel.port1
    for number in range(count):
        channel.port2.post_message(number)
        kept.post_message("never read")
    let_go(channel.port2)
    del channel
    collect()
    assert list(kept) == list(range(count))
    event = kept.wait_closed(10)
    assert event is not None
    assert event.reason == "collected"


def test_a_port_says_that_it_is_collected_though_the_memory_of_its_overflow_file_went_first() -> None:
    """Of what is garbage together, anything may be finalised first."""
    near, far = MessageChannel[Any, Any]()
    for number in range(2000):
        near.post_message(number)
    near._link._outbox.memory.__del__()
    del near
    gc.collect()
    assert [far.recv(10) for _ in range(2000)] == list(range(2000))
    event = far.wait_closed(10)
    assert event is not None
    assert event.reason == "collected"


@dropping
def test_a_port_that_was_used_is_collected(let_go: Callable[[Port], None]) -> None:
    channel = MessageChannel[Any, Any]()
    kept = channel.port1
    kept.post_message(bytes(1_000_000))
    assert len(channel.port2.recv(10)) == 1_000_000
    channel.port2.post_message("hi")
    assert kept.recv(10) == "hi"
    assert not kept.poll(0)
    let_go(channel.port2)
    del channel
    collect()
    event = kept.wait_closed(10)
    assert event is not None
    assert event.reason == "collected"


# What is kept alive


@pytest.mark.row("E23", "H13")
def test_a_started_port_with_a_message_listener_and_an_open_peer_is_kept_alive() -> None:
    heard: Heard = queue.SimpleQueue()

    def only_port1() -> Port:
        port1, port2 = MessageChannel[Any, Any]()
        port2.onmessage = heard.put
        return port1

    port1 = only_port1()
    collect()
    port1.post_message("hi")
    assert heard.get(timeout=10).data == "hi"
    assert not port1.closed
    port1.close()


@pytest.mark.row("E23", "H13")
def test_a_port_that_is_kept_alive_is_released_after_the_close() -> None:
    heard: Heard = queue.SimpleQueue()
    port1, port2 = MessageChannel[Any, Any]()
    port2.onmessage = heard.put
    port2.onclose = heard.put
    gone = weakref.ref(port2)
    del port2
    collect()
    assert gone() is not None
    port1.close()
    assert heard.get(timeout=10).reason == "closed"
    collect()
    assert gone() is None


@pytest.mark.row("H13")
def test_a_port_that_is_kept_alive_is_released_after_its_own_close() -> None:
    port1, port2 = MessageChannel[Any, Any]()
    port2.onmessage = lambda event: event.target.close()
    gone = weakref.ref(port2)
    del port2
    port1.post_message("close yourself")
    event = port1.wait_closed(10)
    assert event is not None
    assert event.reason == "closed"
    collect()
    assert gone() is None


def test_a_port_whose_last_message_listener_goes_is_no_longer_kept_alive() -> None:
    kept, given = MessageChannel[Any, Any]()
    given.onmessage = print
    given.on("message", abs)
    given.onmessage = None
    given.off("message", abs)
    let_deliver()
    gone = weakref.ref(given)
    del given
    collect()
    assert gone() is None
    event = kept.wait_closed(10)
    assert event is not None
    assert event.reason == "collected"


def test_a_port_whose_once_listener_had_its_message_is_no_longer_kept_alive() -> None:
    heard: Heard = queue.SimpleQueue()
    kept, given = MessageChannel[Any, Any]()
    given.once("message", lambda event: heard.put(event.data))
    given.start()
    gone = weakref.ref(given)
    del given
    kept.post_message("the one message")
    assert heard.get(timeout=10) == "the one message"
    event = kept.wait_closed(10)
    assert event is not None
    assert event.reason == "collected"
    assert gone() is None


@pytest.mark.row("H13")
@pytest.mark.parametrize("started", [False, True], ids=["not started", "started"])
@pytest.mark.parametrize("type", ["close", "messageerror"])
def test_a_port_without_a_message_listener_is_not_kept_alive(started: bool, type: str) -> None:
    kept, given = MessageChannel[Any, Any]()
    given.on(type, print)
    if started:
        given.start()
    gone = weakref.ref(given)
    del given
    collect()
    assert gone() is None
    event = kept.wait_closed(10)
    assert event is not None
    assert event.reason == "collected"


@pytest.mark.row("H13")
def test_a_listener_does_not_keep_a_port_alive_that_was_never_started() -> None:
    kept, given = MessageChannel[Any, Any]()
    given.on("message", print)
    gone = weakref.ref(given)
    del given
    collect()
    assert gone() is None
    event = kept.wait_closed(10)
    assert event is not None
    assert event.reason == "collected"


def test_a_port_that_moved_away_is_released_with_its_listeners() -> None:
    near, far = MessageChannel[Any, Any]()
    kept, given = MessageChannel[Any, Any]()
    owner = Owner(given)
    given.onmessage = owner.hear
    gone = [weakref.ref(given), weakref.ref(owner)]
    near.post_message(None, transfer=[given])
    del given, owner
    collect()
    assert [each() for each in gone] == [None, None]
    assert far.receive(10).ports[0].post_message("still open")
    assert kept.recv(10) == "still open"


def test_a_thread_that_receives_keeps_the_port_alive() -> None:
    kept, given = MessageChannel[Any, Any]()
    heard: Heard = queue.SimpleQueue()
    thread = threading.Thread(target=lambda port: heard.put(port.recv(20)), args=(given,))
    thread.start()
    del given
    collect()
    kept.post_message("hi")
    assert heard.get(timeout=10) == "hi"
    thread.join()


@pytest.mark.row("E23", "H13")
def test_a_port_that_a_loop_delivers_is_kept_alive_and_released_after_the_close() -> None:
    async def main() -> None:
        heard: asyncio.Queue[Any] = asyncio.Queue()
        port1, port2 = MessageChannel[Any, Any]()
        port2.onmessage = heard.put_nowait
        port2.onclose = heard.put_nowait
        gone = weakref.ref(port2)
        del port2
        gc.collect()
        port1.post_message("hi")
        event = await asyncio.wait_for(heard.get(), 10)
        assert event.data == "hi"
        port1.close()
        event = await asyncio.wait_for(heard.get(), 10)
        assert event.reason == "closed"
        del event
        await asyncio.sleep(0)
        gc.collect()
        assert gone() is None

    asyncio.run(main())


def test_the_end_of_a_loop_releases_the_ports_that_it_delivered() -> None:
    kept, given = MessageChannel[Any, Any]()
    gone = weakref.ref(given)

    async def main(port: Port) -> None:
        port.onmessage = print

    asyncio.run(main(given))
    del given
    collect()
    assert gone() is None
    event = kept.wait_closed(10)
    assert event is not None
    assert event.reason == "collected"


def test_a_task_that_is_cancelled_releases_the_port() -> None:
    kept, given = MessageChannel[Any, Any]()
    gone = weakref.ref(given)

    async def main() -> None:
        nonlocal given
        task = asyncio.ensure_future(given.areceive())
        del given
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        del task
        await asyncio.sleep(0)
        gc.collect()
        assert gone() is None

    asyncio.run(main())
    event = kept.wait_closed(10)
    assert event is not None
    assert event.reason == "collected"


# In flight


@pytest.mark.row("X10")
@dropping
def test_a_port_in_a_message_to_a_port_that_is_collected_closes(let_go: Callable[[Port], None]) -> None:
    kept, given = MessageChannel[Any, Any]()
    channel = MessageChannel[Any, Any]()
    near = channel.port1
    near.post_message(None, transfer=[given])
    let_go(channel.port2)
    del channel
    collect()
    event = kept.wait_closed(10)
    assert event is not None
    assert event.reason == "undeliverable"


@pytest.mark.row("X10")
def test_ports_posted_to_an_end_that_is_closed_do_not_pin_their_peers() -> None:
    near, far = MessageChannel[Any, Any]()
    far.close()
    gone = []
    for _ in range(200):
        kept, given = MessageChannel[Any, Any]()
        kept.onmessage = print  # kept alive until it closes
        gone.append(weakref.ref(kept))
        near.post_message(None, transfer=[given])
        del kept, given
    collect()
    assert [each for each in gone if each() is not None] == []


def test_an_event_that_nobody_looked_at_takes_its_ports_with_it() -> None:
    near, far = MessageChannel[Any, Any]()
    kept, given = MessageChannel[Any, Any]()
    near.post_message(None, transfer=[given])
    far.receive(10)
    collect()
    event = kept.wait_closed(10)
    assert event is not None
    assert event.reason == "collected"


# A collector that runs all the time


@contextmanager
def collecting_all_the_time() -> Iterator[None]:
    """New objects are looked at whenever one is made; a thread goes through all others again and again."""
    usual = gc.get_threshold()
    over = threading.Event()

    def collect_the_old() -> None:
        while not over.wait(0.001):
            gc.collect()

    thread = threading.Thread(target=collect_the_old)
    gc.set_threshold(1)
    thread.start()
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        over.set()
        thread.join()


def hearing(port: Port, say: Callable[[Any], object]) -> None:
    """Listen with what refers to the port."""
    owner = Owner(port)
    port.onmessage = lambda event: say(event.data if owner.port else None)
    port.onclose = lambda event: say(event.reason if owner.port else None)


def test_ports_come_move_and_go_while_the_collector_runs_all_the_time() -> None:
    heard: Heard = queue.SimpleQueue()
    near, far = MessageChannel[Any, Any]()
    with collecting_all_the_time():
        for number in range(20):
            kept, given = MessageChannel[Any, Any]()
            given.onclose = Owner(given).hear
            hearing(kept, heard.put)
            near.post_message(given, transfer=[given])
            arrived = far.receive(10).data
            arrived.post_message(number)
            Owner(arrived)
            del kept, given, arrived
            assert [heard.get(timeout=10), heard.get(timeout=10)] == [number, "collected"]


def test_two_threads_talk_while_the_collector_runs_all_the_time() -> None:
    port1, port2 = MessageChannel[Any, Any]()
    port3, port4 = MessageChannel[Any, Any]()

    def answer() -> None:
        for message in port2:
            Owner(MessageChannel[Any, Any]().port1)
            port4.post_message([message, Owner()])

    with collecting_all_the_time():
        thread = threading.Thread(target=answer)
        thread.start()
        for number in range(50):
            Owner(MessageChannel[Any, Any]().port2)
            port1.post_message(number)
            assert port3.recv(10)[0] == number
        port1.close()
        thread.join(10)
    assert not thread.is_alive()


def test_a_loop_serves_ports_while_the_collector_runs_all_the_time() -> None:
    async def main() -> None:
        for number in range(20):
            port1, port2 = MessageChannel[Any, Any]()
            heard: asyncio.Queue[Any] = asyncio.Queue()
            hearing(port2, heard.put_nowait)
            Owner(port1)
            port1.post_message(number)
            del port1, port2
            assert await asyncio.wait_for(heard.get(), 10) == number
            assert await asyncio.wait_for(heard.get(), 10) == "collected"

    with collecting_all_the_time():
        asyncio.run(main())


# Nothing adds up


def belongings() -> tuple[int, int, int, int]:
    """Descriptors, threads, child processes, ports: when they have been the same for 20 ms, as the delivery thread may
    not be back yet from the last listener.
    """
    seen: list[tuple[int, int, int, int]] = []
    while seen[-3:] != seen[-1:] * 3 or len(seen) < 3:
        time.sleep(0.01)
        gc.collect()
        seen.append(
            (
                len(os.listdir("/proc/self/fd")),
                threading.active_count(),
                len(multiprocessing.active_children()),
                sum(isinstance(each, MessagePort) for each in gc.get_objects()),
            )
        )
    return seen[-1]


def test_a_thousand_channels_leave_nothing() -> None:
    let_deliver()
    before = belongings()
    for number in range(1000):
        port1, port2 = MessageChannel[Any, Any]()
        if number % 4 == 0:
            port1.onmessage = port2.onclose = print
        if number % 4 == 1:
            port1.close()
        if number % 4 == 2:
            Owner(port1)
        port2.post_message(number)
        if number % 4 == 3:
            assert port1.recv(10) == number
    del port1, port2
    let_deliver()
    assert belongings() == before


def test_ten_thousand_transfers_leave_nothing() -> None:
    there, here = MessageChannel[Any, Any]()
    kept, traveller = MessageChannel[Any, Any]()
    let_deliver()
    before = belongings()
    for number in range(10_000):
        kept.post_message(number)
        sender, receiver = (there, here) if number % 2 else (here, there)
        sender.post_message(None, transfer=[traveller])
        (traveller,) = receiver.receive(10).ports
        assert traveller.recv(10) == number
    assert belongings() == before


def test_transfers_that_fail_leave_nothing() -> None:
    near, far = MessageChannel[Any, Any]()
    _kept, given = MessageChannel[Any, Any]()
    before = belongings()
    for bad in (None, given, near, threading.Lock()) * 100:
        with pytest.raises(TypeError):
            near.post_message(bad if bad is not None else given, transfer=[given, bad])
    assert belongings() == before
    near.post_message(None, transfer=[given])
    assert far.receive(10).ports[0].post_message("unharmed")


def test_channels_that_overflow_leave_nothing() -> None:
    before = belongings()
    for number in range(20):
        near, far = MessageChannel[Any, Any]()
        for each in range(FULL):
            near.post_message(each, transfer=[MessageChannel[Any, Any]().port1] if each % 100 == 0 else ())
        near.post_message(bytes(1_000_000))
        for _ in range(number * FULL // 20):
            far.receive(10)
        if number % 2:
            far.close()
    del near, far
    assert belongings() == before
