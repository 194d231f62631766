"""Signals: an exception of a handler may come at any line, and a handler may use the very port it interrupted."""

from __future__ import annotations

import gc
import os
import random
import signal
import socket
import sys
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest

import mpchannel

from . import children


class Alarm(Exception):
    pass


@pytest.fixture
def alarm() -> Iterator[Callable[..., Any]]:
    """Sets an alarm: after 50 ms the function is called in the main thread."""
    assert threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGINT)

    def set_alarm(fn: Callable[[], Any], again: float = 0) -> None:
        signal.signal(signal.SIGALRM, lambda *_: fn())
        signal.setitimer(signal.ITIMER_REAL, 0.05, again)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield set_alarm
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before[0])
    signal.signal(signal.SIGINT, before[1])


def raise_alarm() -> None:
    raise Alarm


def raise_timeout() -> None:
    raise TimeoutError("the alarm's")


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


INTERRUPTS = pytest.mark.parametrize(
    ("come", "error"),
    [(press_ctrl_c, KeyboardInterrupt), (raise_timeout, TimeoutError), (raise_alarm, Alarm)],
    ids=("Ctrl-C", "TimeoutError", "own exception"),
)

WAYS = pytest.mark.parametrize("way", ["receive", "recv", "recv_bytes", "__next__", "poll", "wait_closed"])


@contextmanager
def child(target: Any, *arguments: Any, start_method: str = "fork") -> Iterator[tuple[Any, Any]]:
    """A process with a port and one for results; our ends of both."""
    near, far = mpchannel.MessageChannel()
    results, theirs = mpchannel.MessageChannel()
    context = mpchannel.get_context(start_method)
    with children.running(context.Process(target=target, args=(far, theirs, *arguments))):
        yield near, results
    results.close()
    near.close()


# Waiting


@INTERRUPTS
@WAYS
def test_an_interrupted_wait_raises_the_handlers_own_exception_and_the_port_goes_on(
    ends: tuple[Any, Any], alarm: Any, way: str, come: Any, error: type[BaseException]
) -> None:
    near, far = ends
    wait = (lambda: far.poll(None)) if way == "poll" else getattr(far, way)
    alarm(come)
    with pytest.raises(error) as raised:
        wait()
    assert type(raised.value) is error
    for number in range(3):
        near.post_message(number)
    assert [far.recv(5) for _ in range(3)] == [0, 1, 2]
    far.post_message("the other way")
    assert near.recv(5) == "the other way"
    assert not far.closed


@INTERRUPTS
def test_an_interrupted_wait_after_a_busy_time_raises_too(
    channel: tuple[Any, Any], alarm: Any, come: Any, error: type[BaseException]
) -> None:
    near, far = channel
    for number in range(2000):
        near.post_message(number)
    assert [far.recv(5) for _ in range(2000)] == list(range(2000))
    alarm(come)
    with pytest.raises(error):
        far.recv()
    near.post_message("next")
    assert far.recv(5) == "next"


def test_ctrl_c_wakes_a_receive_with_a_timeout_before_it_is_over(channel: tuple[Any, Any], alarm: Any) -> None:
    alarm(press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        channel[0].receive(3600)


def test_a_handler_that_raises_nothing_lets_the_wait_go_on(channel: tuple[Any, Any], alarm: Any) -> None:
    _, far = channel
    calls: list[None] = []
    alarm(lambda: calls.append(None), again=0.001)
    with pytest.raises(TimeoutError, match=r"no message came in 0\.15 s"):
        far.receive(0.15)
    assert len(calls) > 5


def test_a_process_interrupted_in_receive_catches_it_and_goes_on(context: Any) -> None:
    ours, theirs = mpchannel.MessageChannel()
    with children.running(context.Process(target=children.wait_for_an_interrupt, args=(theirs,))) as process:
        assert ours.recv(20) == "waiting"
        os.kill(process.pid, signal.SIGINT)
        assert ours.recv(20) == "interrupted"
        ours.post_message("a message")
        assert ours.recv(20) == ["after", "a message"]


# Storms


@pytest.mark.parametrize("way", ["recv", "receive"])
def test_a_storm_of_interrupts_on_a_receive_loop_loses_and_doubles_nothing(way: str) -> None:
    with child(children.receive_in_a_storm, way) as (near, results):
        for number in range(40_000):
            near.post_message(number)
        near.close()
        got, errors, reason, interrupted = results.recv(30)
    assert errors == []
    if way == "receive":
        got = [number for number, _ in got]
    missing, doubled = set(range(40_000)) - set(got), len(got) - len(set(got))
    assert (len(missing), doubled) == (0, 0), f"lost {sorted(missing)[:10]}"
    assert got == list(range(40_000))
    assert reason == "closed"
    assert interrupted > 5


@pytest.mark.parametrize("kind", ["send_bytes", "out of band", "large"])
def test_a_storm_of_interrupts_loses_and_doubles_no_message_of_another_kind(kind: str) -> None:
    count = 1500
    with child(children.receive_in_a_storm, "recv_bytes" if kind == "send_bytes" else "recv") as (near, results):
        for number in range(count):
            if kind == "send_bytes":
                near.send_bytes(number.to_bytes(4, "little"))
            else:
                near.post_message((number, bytearray((70_000, 200_000)[kind == "large"])))
        near.close()
        got, errors, reason, interrupted = results.recv(30)
    assert errors == []
    numbers = [int.from_bytes(each, "little") if kind == "send_bytes" else each[0] for each in got]
    missing, doubled = set(range(count)) - set(numbers), len(numbers) - len(set(numbers))
    assert (len(missing), doubled) == (0, 0), f"lost {sorted(missing)[:10]}"
    assert numbers == list(range(count))
    assert reason == "closed"
    assert interrupted > 5


def test_a_storm_of_interrupts_on_messages_with_ports_loses_no_port_silently() -> None:
    count = 2000
    kept = {}
    with child(children.receive_ports_in_a_storm) as (near, results):
        for number in range(count):
            if number % 3 == 0:
                kept[number], moving = mpchannel.MessageChannel()
                near.post_message(number, [moving])
            else:
                near.post_message(number)
        near.close()
        got, errors, reason, _ = results.recv(30)
        assert errors == []
        assert reason == "closed"
        numbers = [number for number, _ in got]
        assert numbers == sorted(set(numbers))
        assert all(ports == (number % 3 == 0) for number, ports in got)
        # Interrupted in the very loading of one that carries ports, the message may be gone; its port is closed then.
        for number in range(count):
            if number % 3:
                assert number in set(numbers), f"lost {number}, which carries no port"
            elif number in set(numbers):
                assert kept[number].recv(5) == number
            else:
                assert kept[number].wait_closed(5) is not None
        results.post_message("that is all")
    for port in kept.values():
        port.close()


@pytest.mark.parametrize("read", ["at once", "afterwards"])
@pytest.mark.parametrize("sizes", [(1,), (1, 100, 5000, 100_000, 200_000)], ids=("small", "all sizes"))
def test_a_storm_of_interrupts_on_a_posting_loop_doubles_and_corrupts_nothing(
    sizes: tuple[int, ...], read: str
) -> None:
    count = 40_000 if sizes == (1,) else 2000
    with child(children.post_in_a_storm, count, sizes) as (near, results):
        if read == "afterwards":
            uncertain, errors, interrupted = results.recv(30)
        got = []
        reason = None
        while reason is None:
            try:
                number, body, checksum = near.recv(30)
            except mpchannel.PortClosedError as error:
                reason = error.reason
            else:
                assert zlib.crc32(body) == checksum, "corrupted"
                got.append(number)
        if read == "at once":
            uncertain, errors, interrupted = results.recv(30)
    assert errors == []
    assert reason == "closed"
    assert got == sorted(set(got)), "doubled, or out of order"
    lost = set(range(count)) - set(got) - set(uncertain)
    assert not lost, "post_message returned, and the message did not come"
    assert interrupted > 5


def test_an_interrupt_behind_any_call_of_a_post_leaves_the_socket_no_more_room_than_it_had() -> None:
    # Else more messages would fit from then on, and nothing at all when they have filled that as well.
    def room(port: Any) -> int:
        with socket.socket(fileno=os.dup(port.fileno())) as sock:
            return sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)

    def post_interrupted(port: Any, behind: int) -> bool:
        left = [behind]

        def profile(frame: FrameType, event: str, _: Any) -> None:
            if event in ("call", "c_return") and frame.f_code.co_filename.startswith(children._PACKAGE):
                left[0] -= 1
                if not left[0]:
                    raise Alarm

        sys.setprofile(profile)
        try:
            port.post_message("one more")
        except Alarm:
            pass
        finally:
            sys.setprofile(None)
        return left[0] <= 0

    near, far = mpchannel.MessageChannel()
    fitting = 0
    while not near._link._outbox:
        near.post_message("one more")
        fitting += 1
    usual = room(near)
    interrupted, behind = True, 0
    while interrupted:
        behind += 1
        near, far = mpchannel.MessageChannel()
        for _ in range(fitting - 1):
            near.post_message("one more")
        interrupted = post_interrupted(near, behind)
        assert room(near) == usual, f"behind call {behind}"
        near.close()
        far.close()
    assert behind > 50


def test_an_interrupt_behind_any_call_of_a_finaliser_keeps_the_goodbye(monkeypatch: pytest.MonkeyPatch) -> None:
    unraisable: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda details: unraisable.append(type(details.exc_value)))

    def collect_interrupted(ports: list[Any], behind: int) -> bool:
        left = [behind]

        def profile(frame: FrameType, event: str, _: Any) -> None:
            if event in ("call", "c_return") and frame.f_code.co_filename.startswith(children._PACKAGE):
                left[0] -= 1
                if not left[0]:
                    raise Alarm

        sys.setprofile(profile)
        try:
            ports.clear()
        finally:
            sys.setprofile(None)
        return left[0] <= 0

    interrupted, behind = True, 1  # not in the very first line: then nothing of the finaliser is done
    while interrupted:
        behind += 1
        near, far = mpchannel.MessageChannel()
        ports = [near]
        del near
        interrupted = collect_interrupted(ports, behind)
        closed = far.wait_closed(10)
        assert closed is not None
        assert closed.reason == "collected", f"behind call {behind}"
    assert behind > 10
    assert unraisable == [Alarm] * (behind - 2)


def test_a_storm_of_interrupts_on_moving_ports_moves_each_or_leaves_it() -> None:
    count = 1500
    with child(children.move_ports_in_a_storm, count) as (near, results):
        stayed, errors, interrupted = results.recv(30)
        got = []
        while True:
            try:
                event = near.receive(30)
            except mpchannel.PortClosedError as error:
                assert error.reason == "closed"  # noqa: PT017
                break
            got.append(event.data)
            (port,) = event.ports
            assert port.wait_closed(5).reason == "closed"
    assert errors == []
    assert (stayed, got) == ([], list(range(count)))
    assert interrupted > 5


# Exceptions inside the user's own code


@INTERRUPTS
def test_an_alarm_while_a_message_is_loaded_passes_as_itself_and_the_message_stays(
    channel: tuple[Any, Any], alarm: Any, come: Any, error: type[BaseException]
) -> None:
    near, far = channel
    near.post_message(children.PausesWhile("loading", "first"))
    near.post_message("second")
    children.PAUSES.append(True)
    alarm(come)
    with pytest.raises(error) as raised:
        far.receive(5)
    assert type(raised.value) is error
    assert [far.recv(5), far.recv(5)] == ["first", "second"]


@INTERRUPTS
def test_an_alarm_while_a_large_message_is_loaded_passes_as_itself_and_the_message_stays(
    channel: tuple[Any, Any], alarm: Any, come: Any, error: type[BaseException]
) -> None:
    near, far = channel
    blob = random.randbytes(1 << 20)
    near.post_message(children.PausesWhile("loading", blob))
    children.PAUSES.append(True)
    alarm(come)
    with pytest.raises(error) as raised:
        far.receive(5)
    assert type(raised.value) is error
    assert far.recv(5) == blob


@INTERRUPTS
def test_an_alarm_while_a_message_is_pickled_passes_as_itself_and_nothing_is_sent_or_detached(
    channel: tuple[Any, Any], alarm: Any, come: Any, error: type[BaseException]
) -> None:
    near, far = channel
    mine, moving = mpchannel.MessageChannel()
    message = children.PausesWhile("pickling", "text")
    for transfer in ((), [moving]):
        children.PAUSES.append(True)
        alarm(come)
        with pytest.raises(error) as raised:
            near.post_message(message, transfer)
        assert type(raised.value) is error
    assert not far.poll()
    assert not moving.detached
    near.post_message(message, [moving])
    event = far.receive(5)
    assert event.data == "text"
    event.ports[0].close()
    mine.close()


def test_an_alarm_while_a_message_with_a_port_is_loaded_closes_the_port_or_keeps_the_message(
    channel: tuple[Any, Any], alarm: Any
) -> None:
    near, far = channel
    mine, moving = mpchannel.MessageChannel()
    near.post_message(children.PausesWhile("loading", "text"), [moving])
    near.post_message("next")
    children.PAUSES.append(True)
    alarm(raise_alarm)
    with pytest.raises(Alarm):
        far.receive(5)
    event = far.receive(5)
    if event.data == "text":
        event.ports[0].close()
        assert far.recv(5) == "next"
    else:
        assert event.data == "next"
    assert mine.wait_closed(5) is not None


# Handlers that use the port they interrupted


def test_a_handler_may_post_on_the_port_that_waits(ends: tuple[Any, Any], alarm: Any) -> None:
    near, far = ends
    echoing = threading.Thread(target=lambda: near.post_message(["echo", near.recv(20)]))
    echoing.start()
    alarm(lambda: far.post_message("from the handler"))
    assert far.recv(20) == ["echo", "from the handler"]
    echoing.join()


def test_a_handler_may_post_to_the_port_that_waits(ends: tuple[Any, Any], alarm: Any) -> None:
    near, far = ends
    alarm(lambda: near.post_message("from the handler"))
    assert far.recv(20) == "from the handler"


def test_a_handler_may_close_the_port_that_waits(ends: tuple[Any, Any], alarm: Any) -> None:
    near, far = ends
    alarm(far.close)
    with pytest.raises(mpchannel.PortClosedError, match="its own holder"):
        far.recv(20)
    assert near.wait_closed(5).reason == "closed"


def test_a_handler_may_move_the_port_that_waits(channel: tuple[Any, Any], alarm: Any) -> None:
    near, far = channel
    mine, moving = mpchannel.MessageChannel()
    alarm(lambda: near.post_message("moving", [moving]))
    with pytest.raises(mpchannel.PortDetachedError):
        moving.recv(20)
    (arrived,) = far.receive(5).ports
    mine.post_message("to the new holder")
    assert arrived.recv(5) == "to the new holder"
    arrived.close()
    mine.close()


def test_a_handler_may_receive_from_the_port_that_waits(ends: tuple[Any, Any], alarm: Any) -> None:
    near, far = ends
    by_handler = []

    def handle() -> None:
        near.post_message("for the handler")
        by_handler.append(far.recv(5))
        near.post_message("for the one that waits")

    alarm(handle)
    assert far.recv(20) == "for the one that waits"
    assert by_handler == ["for the handler"]


def test_a_handler_that_posts_on_the_port_it_interrupts_in_posting_disturbs_no_message() -> None:
    with child(children.post_from_a_handler_too, 40_000) as (near, results):
        by_handler = results.recv(30)
        got: dict[str, list[int]] = {"main": [], "handler": []}
        while True:
            try:
                who, number, body = near.recv(20)
            except mpchannel.PortClosedError:
                break
            assert len(body) == number % (3000 if who == "main" else 5000)
            got[who].append(number)
    assert got["main"] == list(range(40_000))
    assert got["handler"] == list(range(by_handler))
    assert by_handler > 5


@pytest.mark.parametrize("large", [False, True], ids=("small", "ports and large bodies"))
def test_a_handler_that_receives_from_the_port_it_interrupts_in_receiving_takes_each_message_once(large: bool) -> None:
    count = 1000 if large else 40_000
    with child(children.receive_in_a_handler_too) as (near, results):
        for number in range(count):
            if large and number % 3 == 0:
                near.post_message((number, bytes(200_000)))
            elif large and number % 3 == 1:
                near.post_message((number, b""), [mpchannel.MessageChannel().port2])
            else:
                near.post_message(number)
        near.close()
        got, by_handler, errors, reason = results.recv(30)
    assert errors == []
    numbers = [message if isinstance(message, int) else message[0] for message in got + by_handler]
    missing, doubled = set(range(count)) - set(numbers), len(numbers) - len(set(numbers))
    assert (len(missing), doubled) == (0, 0)
    assert reason == "closed"


@pytest.mark.parametrize("what", ["post", "receive"])
def test_a_handler_that_closes_the_port_it_interrupts_ends_what_it_interrupted_in_order(what: str) -> None:
    context = mpchannel.get_context("fork")
    results, theirs = mpchannel.MessageChannel()
    with children.running(context.Process(target=children.close_in_a_handler, args=(theirs, 300, what))):
        endings = results.recv(30)
    assert endings == ({"refused": 300} if what == "post" else {"closed, None": 300})
    results.close()


# What an exception holds


@contextmanager
def no_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def uncollected_frames() -> list[str]:
    """Names of functions whose frames only the garbage collector can free."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        return [each.f_code.co_name for each in gc.garbage if isinstance(each, FrameType)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


@INTERRUPTS
def test_a_handlers_exception_comes_out_of_a_receive_without_a_cause_and_without_a_cycle(
    ends: tuple[Any, Any], alarm: Any, come: Any, error: type[BaseException]
) -> None:
    near, far = ends
    alarm(come)
    cause: Any = "it was not raised"
    with no_collections():
        try:
            far.recv()
        except error as raised:
            cause = raised.__cause__
        assert cause is None
        assert uncollected_frames() == []
    near.post_message(1)
    assert far.recv(5) == 1


@pytest.mark.parametrize("take", ["receive", "recv"])
def test_a_message_that_cannot_be_loaded_leaves_its_ports_to_nobody(ends: tuple[Any, Any], take: str) -> None:
    near, far = ends
    kept, moving = mpchannel.MessageChannel()
    near.post_message([children.FailsToLoad(), moving], [moving])
    with no_collections():
        with pytest.raises(mpchannel.MessageError):
            getattr(far, take)(5)
        closed = kept.wait_closed(5)
    assert closed is not None
    assert closed.reason == "undeliverable"


def test_a_message_that_cannot_be_posted_is_not_held_by_anybody(ends: tuple[Any, Any]) -> None:
    near, _ = ends

    class Thing:
        pass

    thing = Thing()
    gone = weakref.ref(thing)
    message = [thing, threading.Lock()]
    del thing
    with no_collections():
        with pytest.raises(mpchannel.DataCloneError):
            near.post_message(message)
        del message
        assert gone() is None


@pytest.mark.parametrize("size", [1, 200_000])
def test_a_timeout_error_of_a_handler_comes_out_of_a_post_as_it_is(
    ends: tuple[Any, Any], alarm: Any, size: int
) -> None:
    near, far = ends
    message = bytes(size)

    def post_for_ever() -> None:
        while True:
            near.post_message(message)
            while near.buffered_amount > 10_000_000:
                far.recv()

    alarm(raise_timeout)
    with pytest.raises(TimeoutError, match="the alarm's") as raised:
        post_for_ever()
    assert type(raised.value) is TimeoutError
    assert raised.value.__cause__ is None


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_port_that_has_an_interrupted_message_with_ports_is_not_given_to_a_process(method: str) -> None:
    inner, moving = mpchannel.MessageChannel()
    near, far = mpchannel.MessageChannel()
    near.post_message("a port", [moving])
    hand: list[Any] = []
    assert far._link.take(hand) is not None
    far._link.dropped += (hand,)  # as whoever was interrupted does
    far._link.slow = True
    far._link.recover()
    process = mpchannel.get_context(method).Process(target=children.echo, args=(far,))
    with pytest.raises(mpchannel.DataCloneError, match="receive it first"):
        process.start()
    (arrived,) = far.receive(10).ports
    arrived.post_message("here")
    assert inner.recv(10) == "here"
    for port in (inner, arrived, near, far):
        port.close()
