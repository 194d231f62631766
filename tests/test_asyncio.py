"""Ports on asyncio loops: coroutines that receive, listeners that run on the loop; cancelling, which loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import random
import selectors
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from queue import SimpleQueue
from typing import Any

import pytest

import mpchannel
from mpchannel import CloseEvent, MessageError, MessageEvent, PortClosedError, PortDetachedError

Port = mpchannel.MessagePort[Any, Any]
Ends = tuple[Port, Port]

MIB = 1 << 20
HANG = 30  # seconds; whoever waits that long is stuck


class CountingSelector(selectors.DefaultSelector):
    """Counts how often a loop was woken for something."""

    woken = 0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(timeout)
        self.woken += bool(ready)
        return ready


class WatchedLoop(asyncio.SelectorEventLoop):
    """A loop that knows its readers and who changed them, and how often it was woken."""

    def __init__(self) -> None:
        self.selector = CountingSelector()
        self.readers: set[int] = set()
        self.thread = threading.current_thread()
        self.strangers: list[threading.Thread] = []
        super().__init__(self.selector)

    def add_reader(self, fd: Any, callback: Any, *args: Any) -> Any:
        self._changed()
        self.readers.add(fd if isinstance(fd, int) else fd.fileno())
        return super().add_reader(fd, callback, *args)

    def remove_reader(self, fd: Any) -> Any:
        self._changed()
        self.readers.discard(fd if isinstance(fd, int) else fd.fileno())
        return super().remove_reader(fd)

    def _changed(self) -> None:
        if threading.current_thread() is not self.thread:
            self.strangers.append(threading.current_thread())  # a loop's readers are for its own thread only


def run(main: Coroutine[Any, Any, Any], *, debug: bool = False) -> Any:
    """``asyncio.run`` on a watched loop, for no longer than it may take."""

    async def within() -> Any:
        async with asyncio.timeout(HANG):
            result = await main
        assert the_loop().strangers == []
        return result

    with asyncio.Runner(loop_factory=WatchedLoop, debug=debug) as runner:
        return runner.run(within())


def the_loop() -> WatchedLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, WatchedLoop)
    return loop


async def turns(count: int = 10) -> None:
    """Let the loop go round."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], Any]) -> None:
    """For what another thread tells the loop."""
    while not condition():
        await asyncio.sleep(0.001)


class Heard:
    """A listener on a loop, and what it heard: ``await heard.next()``."""

    def __init__(self, note: Callable[[Any], Any] = lambda event: event.data) -> None:
        self._note = note
        self._queue: asyncio.Queue[Any] = asyncio.Queue()

    def __call__(self, event: Any) -> None:
        self._queue.put_nowait(self._note(event))

    async def next(self) -> Any:
        return await self._queue.get()

    @property
    def nothing(self) -> bool:
        return self._queue.empty()


class Bad:
    """A message that cannot be loaded."""

    def __reduce__(self) -> Any:
        return int, ("no number",)


def script(text: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a program of its own."""
    return subprocess.run(
        [sys.executable, "-W", "error", *options, "-c", "if True:\n" + text],
        capture_output=True,
        text=True,
        timeout=HANG,
    )


# Receiving


def test_areceive_gives_an_event_and_arecv_the_message_itself(ends: Ends) -> None:
    async def main() -> None:
        ends[0].post_message({"a": 1})
        ends[0].post_message(None)
        event = await ends[1].areceive()
        assert isinstance(event, MessageEvent)
        assert (event.type, event.target, event.data, event.ports) == ("message", ends[1], {"a": 1}, ())
        assert await ends[1].arecv() is None

    run(main())


def test_a_coroutine_waits_for_a_message_that_comes_later(ends: Ends) -> None:
    async def main() -> None:
        waiting = asyncio.ensure_future(ends[1].arecv())
        await turns()
        assert not waiting.done()
        ends[0].post_message("late")
        assert await waiting == "late"

    run(main())


def test_a_coroutine_waits_for_a_message_from_another_thread(ends: Ends) -> None:
    async def main() -> None:
        waiting = asyncio.ensure_future(ends[1].arecv())
        await turns()
        threading.Thread(target=ends[0].post_message, args=("x",)).start()
        assert await waiting == "x"

    run(main(), debug=True)


def test_async_for_gives_the_messages_until_the_channel_closes(ends: Ends) -> None:
    async def main() -> None:
        for message in (1, None, "three"):
            ends[0].post_message(message)
        ends[0].close()
        assert [message async for message in ends[1]] == [1, None, "three"]
        assert [message async for message in ends[1]] == []

    run(main())


def test_many_messages_of_all_sizes_arrive_in_order(ends: Ends) -> None:
    sizes = [10, 200_000, 0, 70_000, 3 * MIB, 500] * 5 + [500] * 2000

    def post() -> None:
        for number, size in enumerate(sizes):
            ends[0].post_message((number, bytes(size)))
        ends[0].close()

    async def main() -> None:
        poster = threading.Thread(target=post)
        poster.start()
        got = [(number, len(body)) async for number, body in ends[1]]
        assert got == list(enumerate(sizes))
        poster.join()

    run(main())


def test_the_end_is_an_eof_error(ends: Ends) -> None:
    async def main() -> None:
        waiting = asyncio.ensure_future(ends[1].areceive())
        await turns()
        ends[0].close()
        with pytest.raises(PortClosedError) as caught:
            await waiting
        assert caught.value.reason == "closed"
        with pytest.raises(EOFError):
            await ends[1].arecv()
        assert ends[1].closed

    run(main())


@pytest.mark.parametrize("thread", ["same", "other"])
def test_closing_the_port_wakes_whoever_is_receiving(ends: Ends, thread: str) -> None:
    async def main() -> None:
        waiting = [asyncio.ensure_future(ends[1].areceive()), asyncio.ensure_future(ends[1].arecv())]
        await turns()
        if thread == "same":
            ends[1].close()
        else:
            await asyncio.to_thread(ends[1].close)
        for each in waiting:
            with pytest.raises(PortClosedError, match="by its own holder"):
                await each

    run(main(), debug=True)


@pytest.mark.parametrize("thread", ["same", "other"])
def test_moving_the_port_wakes_whoever_is_receiving_and_loses_nothing(channel: Ends, thread: str) -> None:
    async def main() -> None:
        ours, theirs = mpchannel.MessageChannel()
        waiting = [asyncio.ensure_future(theirs.areceive()), asyncio.ensure_future(theirs.await_closed())]
        await turns()
        if thread == "same":
            channel[0].post_message("x", [theirs])
        else:
            await asyncio.to_thread(channel[0].post_message, "x", [theirs])
        for each in waiting:
            with pytest.raises(PortDetachedError):
                await each
        ours.post_message("for the new holder")
        with ours, (await channel[1].areceive()).ports[0] as arrived:
            assert await arrived.arecv() == "for the new holder"

    run(main(), debug=True)


@pytest.mark.row("W34")
def test_a_message_that_cannot_be_loaded_raises_and_the_next_one_is_fine(channel: Ends) -> None:
    async def main() -> None:
        for receive in (channel[1].areceive, channel[1].arecv, channel[1].__anext__):
            channel[0].post_message(Bad())
            channel[0].post_message("after")
            with pytest.raises(MessageError):
                await receive()
            assert await channel[1].arecv() == "after"

    run(main())


def test_several_coroutines_may_receive_on_one_port_and_each_message_goes_to_one(channel: Ends) -> None:
    async def main() -> None:
        async def receive() -> None:
            async for message in channel[1]:
                got.append(message)
                await asyncio.sleep(0)

        got: list[int] = []
        receivers = [asyncio.ensure_future(receive()) for _ in range(5)]
        await turns()
        for number in range(1000):
            channel[0].post_message(number)
            if number % 10 == 0:
                await asyncio.sleep(0)
        channel[0].close()
        await asyncio.gather(*receivers)
        assert got == list(range(1000))

    run(main())


def test_a_message_goes_either_to_a_listener_or_to_a_coroutine(channel: Ends) -> None:
    async def main() -> None:
        async def receive() -> None:
            async for message in channel[1]:
                got.append(message)

        got: list[int] = []
        channel[1].onmessage = lambda event: got.append(event.data)
        receivers = [asyncio.ensure_future(receive()) for _ in range(3)]
        for number in range(500):
            channel[0].post_message(number)
            if number % 7 == 0:
                await asyncio.sleep(0)
        channel[0].close()
        await asyncio.gather(*receivers)
        assert sorted(got) == list(range(500))

    run(main())


def test_several_loops_in_several_threads_may_receive_on_ports_of_their_own() -> None:
    async def converse(name: int) -> None:
        with mpchannel.MessageChannel() as channel:

            async def echo() -> None:
                async for message in channel.port2:
                    channel.port2.post_message(message)

            echoing = asyncio.ensure_future(echo())
            for number in range(200):
                channel.port1.post_message((name, number))
                assert await channel.port1.arecv() == (name, number)
            channel.port1.close()
            await echoing
            done.put(name)

    done: SimpleQueue[int] = SimpleQueue()
    threads = [threading.Thread(target=lambda name=name: run(converse(name))) for name in range(4)]
    for thread in threads:
        thread.start()
    assert {done.get(timeout=HANG) for _ in threads} == {0, 1, 2, 3}
    for thread in threads:
        thread.join()


def test_several_loops_in_several_threads_may_receive_on_one_port(channel: Ends) -> None:
    async def receive() -> None:
        async for message in channel[1]:
            got.put(message)
        got.put("end")

    got: SimpleQueue[Any] = SimpleQueue()
    threads = [threading.Thread(target=lambda: run(receive())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(1500):
        channel[0].post_message(number)
    channel[0].close()
    messages = [got.get(timeout=HANG) for _ in range(1500 + 3)]
    for thread in threads:
        thread.join()
    assert sorted(message for message in messages if message != "end") == list(range(1500))


def test_a_port_can_be_used_on_one_loop_after_another(channel: Ends) -> None:
    async def converse(number: int) -> None:
        waiting = asyncio.ensure_future(channel[1].arecv())
        await turns()
        channel[0].post_message(number)
        assert await waiting == number

    for number in range(3):
        run(converse(number))
    channel[0].post_message("by hand")
    assert channel[1].recv(HANG) == "by hand"


# Cancelling


@pytest.mark.parametrize("arrives", ["before", "while waiting", "with the cancelling", "after"])
def test_cancelling_at_any_turn_of_the_loop_loses_no_message(channel: Ends, arrives: str) -> None:
    async def main() -> None:
        got, posted = [], 0
        for _ in range(40):  # so that the call that lets the others in is among them
            for when in range(6):
                if arrives == "before":
                    channel[0].post_message(posted)
                receiving = asyncio.ensure_future(channel[1].arecv())
                if arrives == "while waiting":
                    await turns(max(0, when - 2))
                    channel[0].post_message(posted)
                    await turns(min(2, when))
                else:
                    await turns(when)
                if arrives == "with the cancelling":
                    channel[0].post_message(posted)
                receiving.cancel()
                if arrives == "after":
                    channel[0].post_message(posted)
                with contextlib.suppress(asyncio.CancelledError):
                    got.append(await receiving)
                if len(got) == posted:
                    got.append(await channel[1].arecv())
                posted += 1
        assert got == list(range(posted))
        assert mpchannel.receive_message_on_port(channel[1]) is None

    run(main())


@pytest.mark.parametrize("how", ["wait_for", "timeout"])
def test_a_timeout_that_races_with_arrivals_loses_no_message(channel: Ends, how: str) -> None:
    def post() -> None:
        for number in range(1000):
            channel[0].post_message((number, bytes(300_000) if number % 100 == 0 else b""))
            if number % 3 == 0:
                idle.wait(random.uniform(0, 0.0005))
        channel[0].close()

    async def receive(seconds: float) -> Any:
        if how == "wait_for":
            return await asyncio.wait_for(channel[1].arecv(), seconds)
        async with asyncio.timeout(seconds):
            return await channel[1].arecv()

    async def main() -> None:
        got, timeouts = [], 0
        poster.start()
        while True:
            try:
                got.append((await receive(random.uniform(0, 0.001)))[0])
            except TimeoutError:
                timeouts += 1
            except PortClosedError:
                break
        assert got == list(range(1000))
        assert timeouts

    idle = threading.Event()  # never set: a pause that differs each time
    poster = threading.Thread(target=post)
    run(main())
    poster.join()


def test_cancelling_one_of_several_receivers_loses_no_message(channel: Ends) -> None:
    async def main() -> None:
        got = []
        for number in range(100):
            receivers = [asyncio.ensure_future(channel[1].arecv()) for _ in range(3)]
            await turns(2)
            channel[0].post_message(number)
            await turns(number % 3)
            receivers[number % 3].cancel()
            await asyncio.wait(receivers, return_when=asyncio.FIRST_COMPLETED)
            await turns(3)
            for each in receivers:
                each.cancel()
            results = await asyncio.gather(*receivers, return_exceptions=True)
            got += [each for each in results if isinstance(each, int)]
            assert got == list(range(number + 1))

    run(main())


def test_cancelling_an_async_for_loses_no_message(channel: Ends) -> None:
    async def main() -> None:
        async def receive() -> None:
            async for message in channel[1]:
                got.append(message)

        got: list[int] = []
        for number in range(200):
            receiving = asyncio.ensure_future(receive())
            await turns(number % 4)
            channel[0].post_message(number)
            await turns(number % 3)
            receiving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await receiving
        channel[0].close()
        await receive()
        assert got == list(range(200))

    run(main())


def test_a_cancelled_receive_leaves_no_reader_behind(channel: Ends) -> None:
    async def main() -> None:
        before = set(the_loop().readers)
        receiving = asyncio.ensure_future(channel[1].arecv())
        closing = asyncio.ensure_future(channel[1].await_closed())
        await turns()
        assert the_loop().readers == before | {channel[1].fileno()}
        for each in (receiving, closing):
            each.cancel()
            with pytest.raises(asyncio.CancelledError):
                await each
        assert the_loop().readers == before

    run(main())


def test_cancelling_adrain_and_await_closed_harms_nothing(channel: Ends) -> None:
    async def main() -> None:
        channel[0].post_message("unread")
        for when in range(5):
            waiting = [asyncio.ensure_future(channel[0].adrain()), asyncio.ensure_future(channel[1].await_closed())]
            await turns(when)
            for each in waiting:
                each.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await each
        closing = asyncio.ensure_future(channel[1].await_closed())
        draining = asyncio.ensure_future(channel[0].adrain())
        assert await channel[1].arecv() == "unread"
        await draining
        channel[0].close()
        assert isinstance(await closing, CloseEvent)

    run(main())


# adrain and await_closed


def test_adrain_returns_when_everything_was_taken(channel: Ends) -> None:
    async def main() -> None:
        await channel[0].adrain()
        for number in range(500):
            channel[0].post_message((number, bytes(5000)))
        draining = asyncio.ensure_future(channel[0].adrain())
        for _ in range(500):
            assert not draining.done()
            await channel[1].arecv()
        await draining
        assert channel[0].buffered_amount == 0

    run(main())


@pytest.mark.parametrize("closed", ["here", "there"])
def test_adrain_does_not_wait_for_a_channel_that_is_over(channel: Ends, closed: str) -> None:
    async def main() -> None:
        channel[0].post_message(bytes(1000))
        draining = asyncio.ensure_future(channel[0].adrain())
        await turns()
        (channel[0] if closed == "here" else channel[1]).close()
        await draining

    run(main())


def test_await_closed_gives_the_close_event_behind_the_messages(ends: Ends) -> None:
    async def main() -> None:
        closing = asyncio.ensure_future(ends[1].await_closed())
        ends[0].post_message("last")
        ends[0].close()
        await turns()
        assert not closing.done()
        assert await ends[1].arecv() == "last"
        event = await closing
        assert isinstance(event, CloseEvent)
        assert (event.type, event.target, event.reason, event.was_clean) == ("close", ends[1], "closed", True)
        assert isinstance(await ends[1].await_closed(), CloseEvent)

    run(main())


@pytest.mark.parametrize("thread", ["same", "other"])
def test_await_closed_gives_none_when_the_port_is_closed_here(channel: Ends, thread: str) -> None:
    async def main() -> None:
        closing = asyncio.ensure_future(channel[1].await_closed())
        await turns()
        if thread == "same":
            channel[1].close()
        else:
            await asyncio.to_thread(channel[1].close)
        assert await closing is None
        assert await channel[1].await_closed() is None

    run(main(), debug=True)


def test_await_closed_waits_for_a_port_whose_listeners_run_elsewhere(channel: Ends) -> None:
    channel[1].onmessage = lambda event: None

    async def main() -> None:
        closing = asyncio.ensure_future(channel[1].await_closed())
        await turns()
        channel[0].post_message("last")
        channel[0].close()
        assert isinstance(await closing, CloseEvent)

    run(main(), debug=True)


def test_await_closed_goes_on_when_the_loop_of_another_one_that_waits_has_ended(channel: Ends) -> None:
    async def wait_a_little() -> None:
        waiting = asyncio.ensure_future(channel[1].await_closed())
        await turns()
        first.set()
        await until(second.is_set)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting

    async def wait() -> None:
        await until(first.is_set)
        waiting = asyncio.ensure_future(channel[1].await_closed())
        await turns()
        second.set()
        await asyncio.to_thread(other.join)
        channel[0].close()
        assert isinstance(await waiting, CloseEvent)

    first, second = threading.Event(), threading.Event()
    other = threading.Thread(target=lambda: run(wait_a_little()))
    other.start()
    try:
        run(wait())
    finally:
        second.set()
        other.join()


def test_leaving_an_async_with_block_closes(ends: Ends) -> None:
    async def main() -> None:
        async with ends[0] as port:
            assert port is ends[0]
            port.post_message("last")
        assert ends[0].closed
        assert [message async for message in ends[1]] == ["last"]

    run(main())


# Listeners


@pytest.mark.row("W01", "W02")
def test_listeners_of_a_port_started_on_a_loop_run_on_it(ends: Ends) -> None:
    async def main() -> None:
        heard = Heard(lambda event: (event.data, asyncio.get_running_loop(), threading.get_ident()))
        ends[1].onmessage = heard
        ends[0].post_message("x")
        assert heard.nothing
        assert await heard.next() == ("x", the_loop(), threading.get_ident())

    run(main())


@pytest.mark.parametrize("added", ["before", "in another thread"])
def test_where_listeners_run_is_settled_by_who_starts_the_port(channel: Ends, added: str) -> None:
    async def main() -> None:
        heard = Heard(lambda event: threading.get_ident())
        if added == "before":
            channel[1].on("message", heard)
        else:
            await asyncio.to_thread(channel[1].on, "message", heard)
        channel[1].start()
        channel[0].post_message("x")
        assert await heard.next() == threading.get_ident()

    run(main())


def test_listeners_of_a_port_started_outside_a_loop_do_not_run_on_it(channel: Ends) -> None:
    channel[1].start()

    async def main() -> None:
        ran_in: SimpleQueue[int] = SimpleQueue()
        channel[1].onmessage = lambda event: ran_in.put(threading.get_ident())
        channel[0].post_message("x")
        assert ran_in.get(timeout=HANG) != threading.get_ident()

    run(main())


def test_listeners_of_several_loops_run_each_on_its_own() -> None:
    async def converse() -> None:
        with mpchannel.MessageChannel() as channel:
            heard = Heard(lambda event: (event.data, threading.get_ident()))
            channel.port2.onmessage = heard
            for number in range(50):
                channel.port1.post_message(number)
                assert await heard.next() == (number, threading.get_ident())
        done.put(True)

    done: SimpleQueue[bool] = SimpleQueue()
    threads = [threading.Thread(target=lambda: run(converse())) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert all(done.get(timeout=HANG) for _ in threads)
    for thread in threads:
        thread.join()


def test_coroutine_listeners_run_on_the_loop(channel: Ends) -> None:
    async def main() -> None:
        async def listen(event: Any) -> None:
            await asyncio.sleep(0)
            await queue.put(event.data)

        queue: asyncio.Queue[Any] = asyncio.Queue()
        channel[1].onmessage = listen
        for number in range(10):
            channel[0].post_message(number)
        assert [await queue.get() for _ in range(10)] == list(range(10))

    run(main())


def test_coroutine_listeners_of_the_close_event_run_too(channel: Ends) -> None:
    async def main() -> None:
        async def listen(event: Any) -> None:
            await asyncio.sleep(0)
            closed.set_result(event)

        closed: asyncio.Future[Any] = the_loop().create_future()
        channel[1].onclose = listen
        channel[0].close()
        assert (await closed).reason == "closed"

    run(main())


@pytest.mark.row("W59")
@pytest.mark.parametrize("kind", ["function", "coroutine"])
def test_a_listener_that_raises_is_reported_to_the_loop_and_delivery_goes_on(ends: Ends, kind: str) -> None:
    async def main() -> None:
        def fail(event: Any) -> None:
            raise ValueError(event.data)

        async def fail_later(event: Any) -> None:
            await asyncio.sleep(0)
            raise ValueError(event.data)

        reported: asyncio.Queue[Any] = asyncio.Queue()
        the_loop().set_exception_handler(lambda loop, context: reported.put_nowait(context))
        heard = Heard()
        ends[1].on("message", fail if kind == "function" else fail_later)
        ends[1].on("message", heard)
        ends[1].start()
        for number in range(3):
            ends[0].post_message(number)
        assert [await heard.next() for _ in range(3)] == [0, 1, 2]
        for number in range(3):
            context = await reported.get()
            assert isinstance(context["exception"], ValueError)
            assert context["exception"].args == (number,)
            assert "fail" in context["message"]

    run(main())


@pytest.mark.row("W34")
def test_a_message_that_cannot_be_loaded_is_a_messageerror_on_the_loop(channel: Ends) -> None:
    async def main() -> None:
        heard = Heard(lambda event: event.type)
        channel[1].onmessageerror = heard
        channel[1].onmessage = heard
        for message in (1, Bad(), 2):
            channel[0].post_message(message)
        assert [await heard.next() for _ in range(3)] == ["message", "messageerror", "message"]

    run(main())


@pytest.mark.row("W34")
def test_what_cannot_be_loaded_is_reported_to_the_loop_if_nobody_listens_for_that(channel: Ends) -> None:
    async def main() -> None:
        reported: asyncio.Future[Any] = the_loop().create_future()
        the_loop().set_exception_handler(lambda loop, context: reported.set_result(type(context["exception"])))
        heard = Heard()
        channel[1].onmessage = heard
        channel[0].post_message(Bad())
        channel[0].post_message("after")
        assert await heard.next() == "after"
        assert await reported is MessageError

    run(main())


@pytest.mark.row("N05", "X29", "N52")
def test_messages_wait_while_nobody_listens(ends: Ends) -> None:
    async def main() -> None:
        first, second = Heard(), Heard()
        ends[1].once("message", first)
        ends[1].start()
        for number in range(4):
            ends[0].post_message(number)
        assert await first.next() == 0
        await turns()
        assert first.nothing
        ends[1].on("message", second)
        assert [await second.next() for _ in range(3)] == [1, 2, 3]

    run(main())


@pytest.mark.row("N26")
def test_one_once_after_the_other_gets_every_message_before_the_close(ends: Ends) -> None:
    async def next_message(port: Port) -> Any:
        got: asyncio.Future[Any] = the_loop().create_future()
        port.once("message", got.set_result)
        port.start()
        return (await got).data

    async def main() -> None:
        for _ in range(300):
            with mpchannel.MessageChannel() as channel:
                channel.port1.post_message("first")
                channel.port1.post_message("last")
                channel.port1.close()
                assert await next_message(channel.port2) == "first"
                assert await next_message(channel.port2) == "last"
                assert isinstance(await channel.port2.await_closed(), CloseEvent)

    run(main())


def test_ping_pong_on_a_loop_does_not_grow_the_stack(channel: Ends) -> None:
    async def main() -> None:
        def pong(event: Any) -> None:
            frame, depth = sys._getframe(), 0
            while frame.f_back is not None:
                frame, depth = frame.f_back, depth + 1
            depths.add(depth)
            if event.data < 3000:
                event.target.post_message(event.data + 1)
            else:
                over.set_result(None)

        depths: set[int] = set()
        over: asyncio.Future[None] = the_loop().create_future()
        channel[0].onmessage = channel[1].onmessage = pong
        channel[0].post_message(0)
        await over
        assert len(depths) == 1

    run(main())


def test_a_listener_may_be_added_and_a_port_posted_to_from_any_thread(channel: Ends) -> None:
    async def main() -> None:
        heard = Heard()
        await asyncio.to_thread(channel[1].on, "message", heard)
        channel[1].start()
        await asyncio.to_thread(channel[0].post_message, "x")
        assert await heard.next() == "x"
        await asyncio.to_thread(channel[1].off, "message", heard)
        channel[0].post_message("kept")
        await turns()
        assert heard.nothing
        await asyncio.to_thread(channel[1].on, "message", heard)
        assert await heard.next() == "kept"
        await asyncio.to_thread(channel[1].close)
        await until(lambda: not the_loop().readers)

    run(main(), debug=True)


# The loop stays usable


def test_a_port_that_always_has_a_message_for_a_listener_does_not_starve_the_loop(channel: Ends) -> None:
    async def main() -> None:
        def again(event: Any) -> None:
            nonlocal count
            count += 1
            channel[0].post_message("x")

        count = 0
        channel[1].onmessage = again
        channel[0].post_message("x")
        for _ in range(50):
            before = count
            while count == before:
                await asyncio.sleep(0)

    run(main())


def test_a_port_that_always_has_a_message_for_a_coroutine_does_not_starve_the_loop(channel: Ends) -> None:
    async def main() -> None:
        async def receive() -> None:
            while True:
                channel[0].post_message("x")
                await channel[1].arecv()

        receiving = asyncio.ensure_future(receive())
        for _ in range(20):
            await asyncio.sleep(0.0001)
        receiving.cancel()

    run(main())


def test_a_closed_port_leaves_the_loops_readers(channel: Ends) -> None:
    async def main() -> None:
        heard = Heard(lambda event: event.type)
        channel[1].onclose = heard
        channel[1].onmessage = heard
        assert channel[1].fileno() in the_loop().readers
        channel[0].close()
        assert await heard.next() == "close"
        assert the_loop().readers == set()

    run(main())


@pytest.mark.parametrize("thread", ["same", "other"])
def test_a_port_closed_here_leaves_the_loops_readers(channel: Ends, thread: str) -> None:
    async def main() -> None:
        channel[1].onmessage = print
        assert the_loop().readers
        if thread == "same":
            channel[1].close()
        else:
            await asyncio.to_thread(channel[1].close)
        await until(lambda: not the_loop().readers)

    run(main(), debug=True)


def test_a_moved_port_leaves_the_loops_readers(channel: Ends) -> None:
    async def main() -> None:
        ours, theirs = mpchannel.MessageChannel()
        theirs.onmessage = print
        assert the_loop().readers
        channel[0].post_message("x", [theirs])
        assert the_loop().readers == set()
        ours.close()
        channel[1].receive(HANG).ports[0].close()

    run(main())


@pytest.mark.parametrize("what", ["unread message", "unread message and close", "nothing to do"])
def test_an_idle_loop_is_not_kept_busy(channel: Ends, what: str) -> None:
    async def main() -> None:
        closed = Heard(lambda event: event.type)
        channel[1].onclose = closed
        channel[1].start()
        if what != "nothing to do":
            channel[0].post_message("unread")
        if what == "unread message and close":
            channel[0].close()
        await turns()
        before = the_loop().selector.woken
        await asyncio.sleep(0.05)
        assert the_loop().selector.woken - before <= 3
        assert closed.nothing
        if what != "nothing to do":
            assert await channel[1].arecv() == "unread"
        channel[0].close()
        assert await closed.next() == "close"

    run(main())


def test_a_closed_channel_does_not_keep_the_loop_busy(channel: Ends) -> None:
    async def main() -> None:
        channel[1].onmessage = print
        channel[0].close()
        assert isinstance(await channel[1].await_closed(), CloseEvent)
        with pytest.raises(EOFError):
            await channel[1].arecv()
        before = the_loop().selector.woken
        await asyncio.sleep(0.05)
        assert the_loop().selector.woken - before <= 3

    run(main())


@pytest.mark.parametrize("thread", ["same", "other"])
def test_a_new_port_may_get_the_descriptor_number_of_an_old_one(thread: str) -> None:
    async def main() -> None:
        numbers = set()
        for number in range(100):
            with mpchannel.MessageChannel() as channel:
                numbers.add(channel.port2.fileno())
                heard = Heard()
                if number % 2:
                    channel.port2.onmessage = heard
                    channel.port1.post_message(number)
                    assert await heard.next() == number
                else:
                    waiting = asyncio.ensure_future(channel.port2.arecv())
                    await turns(2)
                    channel.port1.post_message(number)
                    assert await waiting == number
                if thread == "other":
                    await asyncio.to_thread(channel.port2.close)
        assert len(numbers) < 100

    run(main(), debug=thread == "other")


# Loops that have ended


def test_a_port_whose_loop_has_ended_can_be_started_on_another_one(channel: Ends) -> None:
    async def main(number: int) -> None:
        heard = Heard()
        channel[1].onmessage = heard
        channel[1].start()
        channel[0].post_message(number)
        assert await heard.next() == number

    for number in range(3):
        run(main(number))


def test_a_listener_added_on_a_new_loop_is_heard_when_the_old_one_has_ended(channel: Ends) -> None:
    async def first() -> None:
        channel[1].start()
        channel[1].once("message", heard.append)
        channel[0].post_message(1)
        await until(lambda: heard)
        channel[1].on("message", heard.append)

    async def second() -> None:
        later = Heard()
        channel[1].on("message", later)
        channel[0].post_message(2)
        assert await later.next() == 2

    heard: list[Any] = []
    run(first())
    run(second())


def test_a_port_closed_after_its_loop_has_ended_lets_go_of_its_descriptor(channel: Ends) -> None:
    # The guard around each test would find the descriptor.
    async def main() -> None:
        heard = Heard()
        channel[1].onmessage = heard
        channel[0].post_message("x")
        await heard.next()
        loops.append(the_loop())

    loops: list[Any] = []
    run(main())
    channel[1].close()
    assert loops[0].is_closed()


def test_wait_closed_returns_though_the_loop_that_watched_the_port_has_ended(channel: Ends) -> None:
    async def main() -> None:
        channel[1].onmessage = print
        channel[1].onclose = heard.put

    heard: SimpleQueue[Any] = SimpleQueue()
    run(main())
    channel[0].close()
    assert isinstance(channel[1].wait_closed(HANG), CloseEvent)
    assert heard.get(timeout=HANG).type == "close"


def test_a_close_listener_added_when_channel_and_loop_are_over_still_runs(channel: Ends) -> None:
    async def main() -> None:
        channel[1].onmessage = print
        channel[0].close()
        assert isinstance(await channel[1].await_closed(), CloseEvent)

    heard: SimpleQueue[Any] = SimpleQueue()
    run(main())
    channel[1].onclose = heard.put
    assert heard.get(timeout=HANG).type == "close"


# Programs


def test_receiving_on_a_loop_starts_no_thread() -> None:
    done = script("""
        import asyncio, threading, mpchannel
        async def main():
            one, other = mpchannel.MessageChannel()
            other.onmessage = lambda event: other.post_message(event.data + 1)
            one.post_message(1)
            assert await one.arecv() == 2
            one.onmessage = print
            closing = asyncio.ensure_future(other.await_closed())
            await one.adrain()
            one.close()
            await closing
            assert threading.enumerate() == [threading.main_thread()], threading.enumerate()
        asyncio.run(main())
    """)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("left", ["listening", "receiving", "closed", "never used"])
def test_a_program_that_leaves_ports_open_ends(left: str) -> None:
    done = script(f"""
        import asyncio, mpchannel
        ports = mpchannel.MessageChannel()
        async def main():
            one, other = ports
            if "{left}" == "listening":
                one.onmessage = other.onmessage = print
                one.onclose = print
                one.post_message("x")
            elif "{left}" == "receiving":
                global task
                task = asyncio.ensure_future(one.areceive())
                await asyncio.sleep(0)
            elif "{left}" == "closed":
                one.close()
                await other.await_closed()
        asyncio.run(main())
        print("over")
    """)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("over\n")


def test_asyncio_is_not_imported_by_those_who_do_not_use_it() -> None:
    done = script("""
        import sys, threading, mpchannel
        heard = threading.Event()
        with mpchannel.MessageChannel() as channel:
            channel.port2.onmessage = lambda event: heard.set()
            channel.port1.post_message("x")
            assert heard.wait(10)
            channel.port2.onmessage = None
            channel.port1.post_message("y")
            assert channel.port2.recv(10) == "y"
        print("asyncio" in sys.modules)
    """)
    assert (done.stdout, done.stderr) == ("False\n", "")
