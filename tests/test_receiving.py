"""Receiving by hand: ``receive``, ``recv``, iteration, ``poll``, ``wait``, and ``Connection``'s own interface."""

from __future__ import annotations

import asyncio
import errno
import multiprocessing
import pickle
import queue
import select
import selectors
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import BufferTooShort
from typing import Any

import numpy as np
import pytest

import mpchannel
from mpchannel import MessageError, MessageEvent, PortClosedError, PortDetachedError

from . import children

Port = mpchannel.MessagePort[Any, Any]
Ends = tuple[Port, Port]

MIB = 1 << 20
HANG = 30  # seconds; whoever waits that long is stuck


class Bad:
    """A message that cannot be loaded."""

    def __reduce__(self) -> Any:
        return int, ("no number",)


@contextmanager
def running(*functions: Callable[[], object]) -> Iterator[list[BaseException]]:
    """The functions in threads of their own, which have ended when the block is left; what they raised."""

    def run(fn: Callable[[], object]) -> None:
        try:
            fn()
        except BaseException as error:  # noqa: BLE001 - for the test to look at
            errors.append(error)

    errors: list[BaseException] = []
    threads = [threading.Thread(target=run, args=(fn,)) for fn in functions]
    for thread in threads:
        thread.start()
    yield errors
    for thread in threads:
        thread.join(HANG)
        assert not thread.is_alive()


# receive and recv


@pytest.mark.row("H22")
def test_receive_gives_an_event_and_recv_the_message_itself(ends: Ends) -> None:
    ends[0].post_message({"a": 1})
    ends[0].post_message({"b": 2})
    event = ends[1].receive(HANG)
    assert isinstance(event, MessageEvent)
    assert (event.type, event.target, event.data, event.ports) == ("message", ends[1], {"a": 1}, ())
    assert ends[1].recv(HANG) == {"b": 2}


def test_receiving_works_on_a_port_that_was_never_started(ends: Ends) -> None:
    ends[0].post_message("x")
    assert ends[1].recv(HANG) == "x"
    assert not ends[1].started


def test_receiving_waits_for_a_message_that_comes_later(ends: Ends) -> None:
    for receive in (ends[1].recv, lambda: ends[1].receive().data, lambda: next(ends[1])):
        waiter = children.Waiter(receive).blocks()
        ends[0].post_message("late")
        assert waiter.result() == "late"


def test_receiving_waits_for_every_one_of_many_messages_that_come_later(ends: Ends) -> None:
    def answer() -> None:
        for message in ends[0]:
            ends[0].post_message(message + 1)

    with running(answer):
        for number in range(100):
            ends[1].post_message(number)
            assert ends[1].recv(HANG) == number + 1
        ends[1].close()


@pytest.mark.parametrize("timeout", [0, 0.0, 0.001, 0.02, -1])
def test_a_receive_without_a_message_says_when_its_time_is_over(channel: Ends, timeout: float) -> None:
    for receive in (channel[1].receive, channel[1].recv):
        with pytest.raises(TimeoutError):
            receive(timeout)
    channel[0].post_message("x")
    assert channel[1].recv(HANG) == "x"


@pytest.mark.parametrize("timeout", [0, 0.001, 0.02, -1])
def test_a_message_that_is_there_is_received_whatever_the_timeout(channel: Ends, timeout: float) -> None:
    for message in ("small", bytes(300_000)):
        channel[0].post_message(message)
        assert channel[1].recv(timeout) == message


def test_a_timeout_is_not_shorter_than_asked_for(channel: Ends) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        channel[1].receive(0.05)
    assert time.monotonic() - began >= 0.05


def test_a_timeout_that_ran_out_loses_nothing(ends: Ends) -> None:
    def post() -> None:
        for number in range(300):
            ends[0].post_message((number, bytes(number % 5 * 60_000)))
        ends[0].close()

    got, timeouts = [], 0
    with running(post):
        while True:
            try:
                got.append(ends[1].recv(0.0001)[0])
            except TimeoutError:
                timeouts += 1
            except PortClosedError:
                break
    assert got == list(range(300))


# Iteration


def test_iterating_gives_the_messages_until_the_channel_closes(ends: Ends) -> None:
    for message in (1, None, "three"):
        ends[0].post_message(message)
    ends[0].close()
    assert list(ends[1]) == [1, None, "three"]
    assert list(ends[1]) == []


def test_iterating_can_be_left_and_taken_up_again(channel: Ends) -> None:
    for number in range(5):
        channel[0].post_message(number)
    channel[0].close()
    for message in channel[1]:
        if message == 2:
            break
    assert list(channel[1]) == [3, 4]


def test_iterating_a_port_closed_here_ends_at_once(channel: Ends) -> None:
    channel[1].close()
    assert list(channel[1]) == []


# The end


@pytest.mark.row("N49", "N54", "W09")
def test_what_was_posted_before_the_close_is_received_and_then_the_end(ends: Ends) -> None:
    ends[0].post_message("last")
    ends[0].close()
    assert not ends[1].closed
    assert ends[1].recv(HANG) == "last"
    with pytest.raises(PortClosedError) as caught:
        ends[1].receive(HANG)
    assert caught.value.reason == "closed"
    assert ends[1].closed


def test_the_end_is_an_eof_error_and_comes_each_time(channel: Ends) -> None:
    channel[0].close()
    for receive in (channel[1].receive, channel[1].recv, channel[1].recv_bytes, channel[1].receive):
        with pytest.raises(EOFError):
            receive()


@pytest.mark.row("X20")
def test_a_port_closed_here_gives_nothing_any_more(ends: Ends) -> None:
    ends[0].post_message("dropped")
    ends[1].close()
    with pytest.raises(PortClosedError, match="by its own holder") as caught:
        ends[1].receive(HANG)
    assert caught.value.reason is None
    assert mpchannel.receive_message_on_port(ends[1]) is None


@pytest.mark.row("H19")
def test_a_detached_port_does_not_receive_and_says_where_it_went(channel: Ends) -> None:
    ours, theirs = mpchannel.MessageChannel()
    channel[0].post_message("x", [theirs])
    for receive in (
        theirs.receive,
        theirs.recv,
        theirs.recv_bytes,
        theirs.poll,
        theirs.fileno,
        theirs.wait_closed,
        lambda: next(theirs),
        lambda: theirs.recv_bytes_into(bytearray(1)),
        lambda: mpchannel.receive_message_on_port(theirs),
        lambda: mpchannel.wait([theirs], HANG),
    ):
        with pytest.raises(PortDetachedError, match=r"posted through .* at .*test_receiving\.py:\d+"):
            receive()
    channel[1].receive(HANG).ports[0].close()
    ours.close()


# Without waiting


@pytest.mark.row("N22")
def test_receive_message_on_port_gives_the_oldest_message_or_nothing(ends: Ends) -> None:
    assert mpchannel.receive_message_on_port(ends[1]) is None
    for message in (1, 2, 3):
        ends[0].post_message(message)
    events = [mpchannel.receive_message_on_port(ends[1]) for _ in range(4)]
    assert [event and event.data for event in events] == [1, 2, 3, None]
    assert events[3] is None


@pytest.mark.row("N22")
def test_receive_message_on_port_tells_none_from_nothing(channel: Ends) -> None:
    channel[0].post_message(None)
    event = mpchannel.receive_message_on_port(channel[1])
    assert event is not None
    assert event.data is None


def test_receive_message_on_port_gives_large_messages_and_those_that_piled_up(channel: Ends) -> None:
    for number in range(3000):
        channel[0].post_message((number, b"x" * 500))
    channel[0].post_message(bytes(3 * MIB))
    for number in range(3000):
        event = mpchannel.receive_message_on_port(channel[1])
        assert event is not None
        assert event.data[0] == number
    event = mpchannel.receive_message_on_port(channel[1])
    assert event is not None
    assert len(event.data) == 3 * MIB
    assert mpchannel.receive_message_on_port(channel[1]) is None


def test_receive_message_on_port_gives_nothing_on_a_channel_that_is_over(ends: Ends) -> None:
    ends[0].post_message("last")
    ends[0].close()
    event = mpchannel.receive_message_on_port(ends[1])
    assert event is not None
    assert event.data == "last"
    assert mpchannel.receive_message_on_port(ends[1]) is None
    assert mpchannel.receive_message_on_port(ends[1]) is None
    assert ends[1].closed


@pytest.mark.row("N24")
def test_receive_message_on_port_takes_nothing_but_ports(channel: Ends) -> None:
    others: tuple[Any, ...] = (None, 1, "port", object(), channel)
    for other in others:
        with pytest.raises(TypeError, match="MessagePort"):
            mpchannel.receive_message_on_port(other)


# A message goes to one place


def test_a_message_goes_either_to_a_listener_or_to_receive(ends: Ends) -> None:
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
    received: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def receive() -> None:
        for message in ends[1]:
            received.put(message)

    def look() -> None:
        while not ends[1].closed:
            event = mpchannel.receive_message_on_port(ends[1])
            if event is not None:
                received.put(event.data)

    ends[1].on("message", lambda event: heard.put(event.data))
    ends[1].start()
    with running(receive, look) as errors:
        for number in range(3000):
            ends[0].post_message(number)
        ends[0].close()
        assert ends[1].wait_closed(HANG) is not None
    assert errors == []
    # The listener may be at its last message still.
    got = [heard.get(timeout=HANG) for _ in range(3000 - received.qsize())]
    got += [received.get_nowait() for _ in range(received.qsize())]
    assert sorted(got) == list(range(3000))
    assert heard.empty()


def test_what_a_started_port_without_a_listener_holds_can_be_received(channel: Ends) -> None:
    channel[1].start()
    channel[0].post_message("x")
    assert channel[1].recv(HANG) == "x"


def test_receive_and_once_listeners_may_take_turns(channel: Ends) -> None:
    for number in range(40):
        channel[0].post_message(number)
    channel[1].start()
    for number in range(0, 40, 2):
        heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
        channel[1].once("message", heard.put)
        assert heard.get(timeout=HANG).data == number
        assert channel[1].recv(HANG) == number + 1


# Messages that cannot be loaded


@pytest.mark.row("W34")
def test_a_message_that_cannot_be_loaded_raises_and_the_next_one_is_fine(ends: Ends) -> None:
    for receive in (ends[1].receive, ends[1].recv, lambda: mpchannel.receive_message_on_port(ends[1])):
        ends[0].post_message("before")
        ends[0].post_message(Bad())
        ends[0].post_message("after")
        assert ends[1].recv(HANG) == "before"
        with pytest.raises(MessageError, match="no number") as caught:
            receive()
        assert isinstance(caught.value.__cause__, ValueError)
        assert ends[1].recv(HANG) == "after"


def test_a_message_error_has_the_packed_message(channel: Ends) -> None:
    channel[0].post_message(Bad())
    with pytest.raises(MessageError) as caught:
        channel[1].receive(HANG)
    with pytest.raises(ValueError, match="no number"):
        pickle.loads(caught.value.packet)


@pytest.mark.parametrize("size", [100, 200_000, 3 * MIB])
def test_a_large_message_that_cannot_be_loaded_harms_nothing_either(channel: Ends, size: int) -> None:
    for _ in range(3):
        channel[0].post_message([np.zeros(size, "u1"), Bad()])
        channel[0].post_message("after")
        with pytest.raises(MessageError):
            channel[1].receive(HANG)
        assert channel[1].recv(HANG) == "after"


@pytest.mark.row("H18")
def test_the_ports_of_a_message_that_cannot_be_loaded_are_closed(channel: Ends) -> None:
    ours, theirs = mpchannel.MessageChannel()
    channel[0].post_message([theirs, Bad()], [theirs])
    with pytest.raises(MessageError):
        channel[1].receive(HANG)
    closed = ours.wait_closed(HANG)
    assert closed is not None
    assert closed.reason == "undeliverable"


def test_iterating_goes_on_after_a_message_that_cannot_be_loaded(channel: Ends) -> None:
    for message in (1, Bad(), 2):
        channel[0].post_message(message)
    channel[0].close()
    assert next(channel[1]) == 1
    with pytest.raises(MessageError):
        next(channel[1])
    assert list(channel[1]) == [2]


# poll, fileno, wait


def test_poll_tells_whether_a_message_is_there(ends: Ends) -> None:
    assert ends[1].poll() is False
    ends[0].post_message("x")
    assert ends[1].poll() is True
    assert ends[1].poll(HANG) is True
    assert ends[1].recv(HANG) == "x"
    assert ends[1].poll(0.001) is False
    assert ends[1].poll(-1) is False


def test_poll_waits_until_a_message_comes(channel: Ends) -> None:
    waiter = children.Waiter(lambda: channel[1].poll(None)).blocks()
    channel[0].post_message("x")
    assert waiter.result() is True
    assert channel[1].recv(HANG) == "x"


def test_poll_is_true_when_the_channel_is_over_for_receive_would_not_wait(ends: Ends) -> None:
    ends[0].close()
    assert ends[1].poll() is True
    with pytest.raises(EOFError):
        ends[1].recv()
    assert ends[1].poll() is True


def test_poll_tells_the_truth_while_messages_pile_up_and_are_taken(channel: Ends) -> None:
    for number in range(2000):
        channel[0].post_message((number, b"x" * 500))
    for number in range(2000):
        assert channel[1].poll()
        assert channel[1].recv(HANG)[0] == number
    assert not channel[1].poll()


def test_the_descriptor_is_readable_when_a_message_is_there_or_the_channel_is_over(ends: Ends) -> None:
    def readable() -> bool:
        return bool(select.select([ends[1]], [], [], 0)[0])

    assert not readable()
    for message in ("x", bytes(3 * MIB)):
        ends[0].post_message(message)
        assert readable()
        ends[1].recv(HANG)
        assert not readable()
    for _ in range(1000):
        ends[0].post_message(b"x" * 500)
    for _ in range(1000):
        assert readable()
        ends[1].recv(HANG)
    assert not readable()
    ends[0].close()
    assert readable()


def test_a_closed_port_has_no_descriptor(channel: Ends) -> None:
    channel[0].close()
    for port in channel:
        with pytest.raises(EOFError):
            port.recv()
        with pytest.raises(OSError) as caught:
            port.fileno()
        assert caught.value.errno == errno.EBADF


def test_a_port_can_be_selected_on(channel: Ends) -> None:
    with selectors.DefaultSelector() as selector:
        selector.register(channel[1], selectors.EVENT_READ, "data")
        assert selector.select(0) == []
        channel[0].post_message("x")
        assert [key.data for key, _ in selector.select(HANG)] == ["data"]
        assert channel[1].recv(HANG) == "x"
        selector.unregister(channel[1])


def test_a_port_can_be_a_reader_of_a_loop(channel: Ends) -> None:
    async def main() -> list[Any]:
        loop = asyncio.get_running_loop()
        got: list[Any] = []
        three = asyncio.Event()

        def read() -> None:
            got.append(channel[1].recv(0))
            if len(got) == 3:
                three.set()

        loop.add_reader(channel[1], read)
        for number in range(3):
            channel[0].post_message(number)
        async with asyncio.timeout(HANG):
            await three.wait()
        loop.remove_reader(channel[1])
        return got

    assert asyncio.run(main()) == [0, 1, 2]


def test_wait_gives_the_ports_that_are_ready_in_the_order_asked() -> None:
    channels = [mpchannel.MessageChannel() for _ in range(4)]
    ports = [channel.port2 for channel in channels]
    assert mpchannel.wait(ports, 0) == []
    assert mpchannel.wait(iter(ports), 0.001) == []
    channels[2].port1.post_message("x")
    assert mpchannel.wait(ports, HANG) == [ports[2]]
    channels[0].port1.close()
    assert mpchannel.wait(ports) == [ports[0], ports[2]]
    ports[3].close()
    assert mpchannel.wait(ports, HANG) == [ports[0], ports[2], ports[3]]
    for channel in channels:
        channel.port1.close()
        channel.port2.close()


def test_wait_wakes_when_a_message_comes(channel: Ends) -> None:
    with mpchannel.MessageChannel() as other, running(lambda: channel[0].post_message("x")):
        assert mpchannel.wait([other.port1, channel[1]], HANG) == [channel[1]]


def test_wait_names_what_it_cannot_wait_for(channel: Ends) -> None:
    with pytest.raises(KeyError, match="listed twice"):
        mpchannel.wait([channel[0], channel[1], channel[0]])
    with pytest.raises(ValueError, match="Invalid file object: 'a port'"):
        mpchannel.wait([channel[0], "a port"])
    with pytest.raises(ValueError, match="Invalid file descriptor: -5"):
        mpchannel.wait([channel[0], -5])
    channel[0].post_message("x")
    assert mpchannel.wait([channel[1]], HANG) == [channel[1]]


def test_wait_takes_ports_connections_and_sentinels_together(context: Any) -> None:
    ours, theirs = mpchannel.MessageChannel()
    process = context.Process(target=children.echo, args=(theirs,))
    process.start()
    one, other = multiprocessing.Pipe()
    everything = [process.sentinel, ours, one]
    with one, other:
        other.send("x")
        assert mpchannel.wait(everything, HANG) == [one]
        assert one.recv() == "x"
        ours.post_message("x")
        assert mpchannel.wait(everything, HANG) == [ours]
        assert ours.recv(HANG) == "x"
        assert mpchannel.wait(everything, 0) == []
        ours.close()
        assert ours in mpchannel.wait(everything, HANG)  # the process may have ended by then
        assert mpchannel.wait([process.sentinel, one], HANG) == [process.sentinel]
    process.join(HANG)
    assert process.exitcode == 0


def test_the_news_that_the_other_end_is_held_elsewhere_now_is_no_message(channel: Ends) -> None:
    ours, theirs = mpchannel.MessageChannel()
    channel[0].post_message("x", [theirs])
    process = mpchannel.get_context("fork").Process(
        target=children.echo, args=channel[1].receive(HANG).ports, name="the echo"
    )
    process.start()
    assert mpchannel.wait([ours], 0) == []
    assert not ours.poll()
    assert mpchannel.receive_message_on_port(ours) is None
    ours.post_message("x")
    assert mpchannel.wait([ours], HANG) == [ours]
    assert ours.recv(HANG) == "x"
    assert f"process {process.pid}" in repr(ours)
    ours.close()
    process.join(HANG)


def test_the_standard_wait_takes_ports_too(channel: Ends) -> None:
    from multiprocessing.connection import wait

    assert wait([channel[1]], 0) == []
    channel[0].post_message("x")
    assert wait([channel[1]], HANG) == [channel[1]]


# Connection's own interface


def test_send_and_recv_work_as_on_a_connection(ends: Ends) -> None:
    for message in (None, {"a": [1]}, bytes(300_000)):
        assert ends[0].send(message) is None  # type: ignore[func-returns-value]
        assert ends[1].recv() == message


def test_send_moves_the_ports_it_finds(channel: Ends) -> None:
    ours, theirs = mpchannel.MessageChannel()
    channel[0].send({"reply": [theirs]})
    assert theirs.detached
    with ours, channel[1].recv()["reply"][0] as arrived:
        arrived.send("through the moved one")
        assert ours.recv() == "through the moved one"


def test_send_raises_on_what_cannot_be_sent_and_sends_nothing(channel: Ends) -> None:
    with pytest.raises(mpchannel.DataCloneError, match=r"^message\[1\]"):
        channel[0].send([1, threading.Lock()])
    assert not channel[1].poll()


def test_sending_to_a_closed_end_is_a_broken_pipe(ends: Ends) -> None:
    ends[1].close()
    with pytest.raises(BrokenPipeError):
        ends[0].send("x")
    with pytest.raises(BrokenPipeError):
        ends[0].send_bytes(b"x")


def test_sending_on_a_port_closed_here_is_an_os_error(ends: Ends) -> None:
    ends[0].close()
    with pytest.raises(OSError, match="handle is closed"):
        ends[0].send("x")
    with pytest.raises(OSError, match="handle is closed"):
        ends[0].send_bytes(b"x")


@pytest.mark.parametrize(
    "data", [b"", b"x", b"\x80\x05 like a pickle", b"\x10\x11\x02\x00", b"\0" * 10, b"ab" * 150_000, b"ab" * 2 * MIB]
)
def test_bytes_arrive_as_they_are(channel: Ends, data: bytes) -> None:
    for sent in (data, bytearray(data), memoryview(data)):
        channel[0].send_bytes(sent)
        got = channel[1].recv_bytes()
        assert type(got) is bytes
        assert got == data


def test_send_bytes_takes_any_buffer(channel: Ends) -> None:
    array = np.arange(10, dtype="i4")
    channel[0].send_bytes(array)
    assert channel[1].recv_bytes() == array.tobytes()


def test_a_part_of_a_buffer_can_be_sent(channel: Ends) -> None:
    data = b"0123456789"
    for offset, size, part in (
        (3, None, b"3456789"),
        (3, 4, b"3456"),
        (0, 0, b""),
        (10, None, b""),
        (10, 0, b""),
        (0, 10, data),
    ):
        channel[0].send_bytes(data, offset, size)
        assert channel[1].recv_bytes() == part


def test_a_part_that_is_not_in_the_buffer_is_a_value_error_and_nothing_is_sent(channel: Ends) -> None:
    one, other = multiprocessing.Pipe()
    with one, other:
        for connection in (one, channel[0]):  # the same as the standard's
            for offset, size, text in (
                (-1, None, "offset is negative"),
                (11, None, "buffer length < offset"),
                (0, -1, "size is negative"),
                (0, 11, r"buffer length < offset \+ size"),
                (5, 6, r"buffer length < offset \+ size"),
            ):
                with pytest.raises(ValueError, match=text):
                    connection.send_bytes(b"0123456789", offset, size)
    assert not channel[1].poll()


def test_what_was_sent_as_bytes_of_a_pickle_can_be_received_as_a_message_and_the_other_way_round(
    channel: Ends,
) -> None:
    channel[0].send_bytes(pickle.dumps({"a": 1}))
    assert channel[1].recv() == {"a": 1}
    for message in ({"a": 1}, np.arange(100_000), bytes(3 * MIB)):
        channel[0].send(message)
        assert np.array_equal(pickle.loads(channel[1].recv_bytes()), message)


def test_bytes_that_are_no_pickle_are_a_message_error_for_recv(channel: Ends) -> None:
    channel[0].send_bytes(b"no pickle")
    channel[0].send("after")
    with pytest.raises(MessageError):
        channel[1].recv()
    assert channel[1].recv() == "after"


def test_bytes_keep_their_place_among_messages_even_when_they_pile_up(channel: Ends) -> None:
    for number in range(1500):
        channel[0].send_bytes(b"%d" % number)
        channel[0].post_message(number)
    for number in range(1500):
        assert channel[1].recv_bytes() == b"%d" % number
        assert channel[1].recv(HANG) == number


def test_recv_bytes_refuses_more_than_its_maximum(channel: Ends) -> None:
    channel[0].send_bytes(b"12345")
    assert channel[1].recv_bytes(5) == b"12345"
    channel[0].send_bytes(b"123456")
    with pytest.raises(OSError, match="6 bytes"):
        channel[1].recv_bytes(5)
    with pytest.raises(ValueError, match="negative maxlength"):
        channel[1].recv_bytes(-1)


def test_recv_bytes_into_fills_a_buffer_and_says_how_much_came(channel: Ends) -> None:
    buffer = bytearray(b"..........")
    channel[0].send_bytes(b"abc")
    assert channel[1].recv_bytes_into(buffer) == 3
    assert buffer == b"abc......."
    channel[0].send_bytes(b"xyz")
    assert channel[1].recv_bytes_into(buffer, 7) == 3
    assert buffer == b"abc....xyz"
    channel[0].send_bytes(b"")
    assert channel[1].recv_bytes_into(buffer, 10) == 0
    array = np.zeros(2, "i4")
    channel[0].send_bytes(np.array([7], "i4"))
    assert channel[1].recv_bytes_into(array, 4) == 4
    assert array.tolist() == [0, 7]


def test_a_buffer_that_is_too_short_is_an_error_that_has_the_message_in_it(channel: Ends) -> None:
    buffer = bytearray(5)
    for offset in (0, 3):
        channel[0].send_bytes(b"123456")
        channel[0].send_bytes(b"after")
        with pytest.raises(BufferTooShort) as caught:
            channel[1].recv_bytes_into(buffer, offset)
        assert caught.value.args == (b"123456",)
        assert buffer == bytes(5)
        assert channel[1].recv_bytes() == b"after"


def test_an_offset_outside_the_buffer_is_a_value_error_and_takes_nothing(channel: Ends) -> None:
    channel[0].send_bytes(b"x")
    with pytest.raises(ValueError, match="negative offset"):
        channel[1].recv_bytes_into(bytearray(5), -1)
    with pytest.raises(ValueError, match="offset too large"):
        channel[1].recv_bytes_into(bytearray(5), 6)
    assert channel[1].recv_bytes() == b"x"


def test_a_message_with_ports_is_not_given_as_bytes_and_its_ports_are_closed(channel: Ends) -> None:
    ours, theirs = mpchannel.MessageChannel()
    channel[0].post_message("x", [theirs])
    channel[0].send_bytes(b"after")
    with pytest.raises(MessageError, match="port"):
        channel[1].recv_bytes()
    assert channel[1].recv_bytes() == b"after"
    closed = ours.wait_closed(HANG)
    assert closed is not None
    assert closed.reason == "undeliverable"


def test_a_port_says_like_a_connection_whether_it_can_be_used(channel: Ends) -> None:
    assert (channel[0].closed, channel[0].readable, channel[0].writable) == (False, True, True)
    channel[0].close()
    assert (channel[0].closed, channel[0].readable, channel[0].writable) == (True, False, False)


def test_leaving_a_with_block_closes(ends: Ends) -> None:
    with ends[0] as port:
        assert port is ends[0]
        port.send("last")
    assert ends[0].closed
    assert list(ends[1]) == ["last"]
