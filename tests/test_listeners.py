"""Listeners: when a port delivers, to whom, in which order, and what happens to a listener that raises."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import pytest

import mpchannel
from mpchannel import MessageError, MessageErrorEvent, MessageEvent

from . import children

Port = mpchannel.MessagePort[Any, Any]
Ends = tuple[Port, Port]

HANG = 30  # seconds; whoever waits that long is stuck


class Heard:
    """A listener, and what it heard: ``next`` waits for it."""

    def __init__(self, note: Callable[[Any], Any] = lambda event: event.data) -> None:
        self._note = note
        self._queue: SimpleQueue[Any] = SimpleQueue()

    def __call__(self, event: Any) -> None:
        self._queue.put(self._note(event))

    def next(self) -> Any:
        return self._queue.get(timeout=HANG)

    @property
    def nothing(self) -> bool:
        return self._queue.empty()


class Fence:
    """``fence()`` returns when the delivery thread has been through everything that was there before."""

    def __init__(self, ends: Ends) -> None:
        self._end, other = ends
        self._heard = Heard()
        other.onmessage = self._heard

    def __call__(self) -> None:
        for number in range(2):  # the first may have been part of a round that had begun before
            self._end.post_message(number)
            assert self._heard.next() == number


@pytest.fixture
def fence() -> Iterator[Fence]:
    with mpchannel.MessageChannel() as channel:
        yield Fence((channel.port1, channel.port2))


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> SimpleQueue[Any]:
    """What ``threading.excepthook`` is told."""
    told: SimpleQueue[Any] = SimpleQueue()
    monkeypatch.setattr(threading, "excepthook", told.put)
    return told


class Bad:
    """A message that cannot be loaded."""

    def __reduce__(self) -> Any:
        return int, ("no number",)


class RaisesWhenSet:
    """A message whose state cannot be set."""

    def __init__(self) -> None:
        self.state = 1

    def __setstate__(self, state: Any) -> None:
        raise RuntimeError("not with me")


class Awkward(Exception):
    """Pickles, as many exceptions with a constructor of their own, to what cannot be loaded."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


class Exits:
    """A message whose loading raises what is no ``Exception``."""

    def __reduce__(self) -> Any:
        return sys.exit, (3,)


# Starting


@pytest.mark.row("W01")
def test_a_message_from_before_anybody_listened_is_delivered_once(ends: Ends, fence: Fence) -> None:
    heard = Heard()
    ends[0].post_message(1)
    ends[1].onmessage = heard
    ends[1].start()
    assert heard.next() == 1
    fence()
    assert heard.nothing


@pytest.mark.row("W02", "H16")
def test_assigning_onmessage_starts_the_port(ends: Ends) -> None:
    heard = Heard()
    ends[0].post_message("queued")
    assert not ends[1].started
    ends[1].onmessage = heard
    assert ends[1].started
    assert heard.next() == "queued"


@pytest.mark.row("W04", "E46")
@pytest.mark.parametrize("style", ["on", "once", "add_event_listener"])
@pytest.mark.parametrize("first", ["listener", "message"])
def test_listening_alone_delivers_nothing(channel: Ends, fence: Fence, style: str, first: str) -> None:
    heard = Heard()
    if first == "message":
        channel[0].post_message("kept")
    getattr(channel[1], style)("message", heard)
    if first == "listener":
        channel[0].post_message("kept")
    fence()
    assert heard.nothing
    assert not channel[1].started
    channel[1].start()
    assert heard.next() == "kept"


@pytest.mark.row("W04")
def test_handlers_of_other_events_do_not_start_the_port(channel: Ends, fence: Fence) -> None:
    heard = Heard()
    channel[1].on("message", heard)
    channel[1].onclose = channel[1].onmessageerror = heard
    channel[0].post_message("kept")
    fence()
    assert not channel[1].started
    assert heard.nothing
    assert channel[1].recv(HANG) == "kept"


@pytest.mark.row("H15", "E29")
def test_starting_twice_is_starting_once(ends: Ends, fence: Fence) -> None:
    heard = Heard()
    ends[1].on("message", heard)
    ends[1].start()
    ends[1].start()
    ends[0].post_message(1)
    assert heard.next() == 1
    ends[1].start()
    ends[0].post_message(2)
    assert heard.next() == 2
    fence()
    assert heard.nothing


@pytest.mark.row("E29")
def test_starting_a_closed_or_detached_port_does_nothing(channel: Ends) -> None:
    with mpchannel.MessageChannel() as moved:
        channel[0].post_message("x", [moved.port1])
        moved.port1.start()
        assert not moved.port1.started
        channel[1].receive(HANG).ports[0].close()
    channel[0].close()
    channel[0].start()
    assert not channel[0].started
    assert channel[0].closed


def test_starting_one_end_does_not_start_the_other(ends: Ends, fence: Fence) -> None:
    heard = Heard()
    ends[1].on("message", heard)
    ends[0].start()
    ends[0].post_message("kept")
    fence()
    assert not ends[1].started
    assert heard.nothing


@pytest.mark.row("X06")
def test_a_port_may_be_started_before_it_has_a_listener(ends: Ends) -> None:
    heard = Heard()
    ends[1].start()
    ends[1].on("message", heard)
    ends[0].post_message("x")
    assert heard.next() == "x"


@pytest.mark.row("N04")
def test_a_listener_that_comes_late_gets_what_was_posted_before(ends: Ends, fence: Fence) -> None:
    heard = Heard()
    ends[1].start()
    ends[0].post_message("early")
    fence()
    ends[1].on("message", heard)
    assert heard.next() == "early"


@pytest.mark.row("X28")
@pytest.mark.parametrize("handler", ["before", "after"])
def test_a_handler_works_the_same_set_before_or_after_posting(ends: Ends, handler: str) -> None:
    heard = Heard()
    if handler == "before":
        ends[1].onmessage = heard
    for number in range(3):
        ends[0].post_message(number)
    if handler == "after":
        ends[1].onmessage = heard
    assert [heard.next() for _ in range(3)] == [0, 1, 2]


@pytest.mark.row("X28", "W06")
def test_a_closed_port_delivers_nothing_in_either_direction(ends: Ends, fence: Fence) -> None:
    heard = Heard()
    ends[0].onmessage = ends[1].onmessage = heard
    ends[1].close()
    ends[0].post_message(1)
    ends[1].post_message(2)
    fence()
    assert heard.nothing


# The event


@pytest.mark.row("W21", "W23", "W36", "E46")
def test_a_listener_gets_an_event_with_type_target_data_and_ports(ends: Ends) -> None:
    heard = Heard(lambda event: event)
    ends[1].onmessage = heard
    ends[0].post_message({"a": 1})
    event = heard.next()
    assert isinstance(event, MessageEvent)
    assert event.type == "message"
    assert event.target is ends[1]
    assert event.data == {"a": 1}
    assert event.ports == ()
    assert "{'a': 1}" in repr(event)


@pytest.mark.row("N57")
def test_both_styles_get_the_very_same_event(channel: Ends) -> None:
    heard = Heard(lambda event: event)
    other = Heard(lambda event: event)
    channel[1].on("message", heard)
    channel[1].add_event_listener("message", other)
    channel[1].start()
    channel[0].post_message("x")
    assert heard.next() is other.next()


@pytest.mark.row("W22", "H06")
def test_the_ports_of_an_event_cannot_be_added_to(channel: Ends) -> None:
    heard = Heard(lambda event: event.ports)
    channel[1].onmessage = heard
    with mpchannel.MessageChannel() as inner:
        channel[0].post_message("x", [inner.port1])
        ports = heard.next()
        assert type(ports) is tuple
        assert len(ports) == 1
        ports[0].close()


@pytest.mark.row("N03", "N44")
def test_both_ends_may_listen_and_answer(ends: Ends) -> None:
    heard = Heard(lambda event: (event.data, event.target, event.ports))
    ends[0].onmessage = heard
    ends[1].onmessage = lambda event: ends[1].post_message(2 * event.data)
    ends[0].post_message(2)
    assert heard.next() == (4, ends[0], ())


def test_listeners_of_a_thread_without_a_loop_run_on_one_thread_one_at_a_time(channel: Ends) -> None:
    def listen(event: Any) -> None:
        assert busy.acquire(blocking=False)
        heard(threading.current_thread())
        busy.release()

    busy = threading.Lock()
    heard = Heard(lambda thread: thread)
    with mpchannel.MessageChannel() as other:
        for port in (*channel, other.port1, other.port2):
            port.onmessage = listen
        for _ in range(50):
            for port in (*channel, other.port1, other.port2):
                port.post_message("x")
        threads = {heard.next() for _ in range(200)}
    assert len(threads) == 1
    assert threading.current_thread() not in threads


# The table


def test_on_once_and_off_return_the_port(channel: Ends) -> None:
    fn = Heard()
    assert channel[0].on("message", fn) is channel[0]
    assert channel[0].once("close", fn) is channel[0]
    assert channel[0].off("message", fn) is channel[0]


@pytest.mark.row("N56")
@pytest.mark.parametrize("add", ["on", "once", "add_event_listener"])
@pytest.mark.parametrize("remove", ["off", "remove_event_listener"])
def test_both_styles_share_one_table(channel: Ends, fence: Fence, add: str, remove: str) -> None:
    gone, stays = Heard(), Heard()
    getattr(channel[1], add)("message", gone)
    channel[1].on("message", stays)
    getattr(channel[1], remove)("message", gone)
    channel[1].start()
    channel[0].post_message("x")
    assert stays.next() == "x"
    fence()
    assert gone.nothing


def test_a_bound_method_can_be_removed(channel: Ends, fence: Fence) -> None:
    class Listener:
        heard = Heard()

        def listen(self, event: Any) -> None:
            self.heard(event)

    listener = Listener()
    stays = Heard()
    channel[1].on("message", listener.listen)
    channel[1].on("message", stays)
    channel[1].off("message", listener.listen)
    channel[1].start()
    channel[0].post_message("x")
    assert stays.next() == "x"
    fence()
    assert listener.heard.nothing


def test_removing_what_was_never_added_does_nothing(channel: Ends) -> None:
    heard = Heard()
    channel[1].onmessage = heard
    channel[1].off("message", print)
    channel[1].remove_event_listener("close", print)
    channel[0].post_message("x")
    assert heard.next() == "x"


def test_a_listener_of_one_type_is_not_removed_with_another(channel: Ends) -> None:
    heard = Heard()
    channel[1].on("message", heard)
    channel[1].on("close", heard)
    channel[1].off("close", heard)
    channel[1].start()
    channel[0].post_message("x")
    assert heard.next() == "x"


@pytest.mark.row("N58")
def test_a_listener_added_several_times_is_called_once(channel: Ends, fence: Fence) -> None:
    heard = Heard()
    for add in (channel[1].on, channel[1].add_event_listener, channel[1].once, channel[1].on):
        add("message", heard)
    channel[1].start()
    channel[0].post_message("x")
    assert heard.next() == "x"
    fence()
    assert heard.nothing


def test_a_listener_added_several_times_is_gone_when_removed_once(channel: Ends, fence: Fence) -> None:
    heard = Heard()
    channel[1].on("message", heard)
    channel[1].on("message", heard)
    channel[1].off("message", heard)
    channel[1].start()
    channel[0].post_message("kept")
    fence()
    assert heard.nothing


@pytest.mark.parametrize("first", ["on", "once"])
def test_the_options_of_the_first_registration_win(channel: Ends, fence: Fence, first: str) -> None:
    heard, always = Heard(), Heard()
    for name in (first, "once" if first == "on" else "on"):
        getattr(channel[1], name)("message", heard)
    channel[1].on("message", always)
    channel[1].start()
    for number in range(3):
        channel[0].post_message(number)
        assert always.next() == number
    fence()
    calls = 0
    while not heard.nothing:
        assert heard.next() == calls
        calls += 1
    assert calls == (3 if first == "on" else 1)


def test_the_web_spelling_has_once_as_an_option(channel: Ends, fence: Fence) -> None:
    heard, always = Heard(), Heard()
    channel[1].add_event_listener("message", heard, once=True)
    channel[1].on("message", always)
    channel[1].start()
    for number in range(2):
        channel[0].post_message(number)
        assert always.next() == number
    assert heard.next() == 0
    assert heard.nothing


@pytest.mark.row("W61")
@pytest.mark.parametrize("add", ["on", "once", "add_event_listener"])
def test_a_listener_that_cannot_be_called_is_a_type_error(channel: Ends, add: str) -> None:
    not_callable: tuple[Any, ...] = ("name", 5, [], object())
    for fn in not_callable:
        with pytest.raises(TypeError, match="callable"):
            getattr(channel[1], add)("message", fn)


@pytest.mark.row("N45", "W61")
@pytest.mark.parametrize("name", ["onmessage", "onmessageerror", "onclose"])
def test_a_handler_that_cannot_be_called_is_a_type_error_and_changes_nothing(channel: Ends, name: str) -> None:
    for before in (None, print):
        if before is not None:
            setattr(channel[1], name, before)
        started = channel[1].started
        with pytest.raises(TypeError, match="callable"):
            setattr(channel[1], name, "print")
        assert getattr(channel[1], name) is before
        assert channel[1].started is started


def test_an_unknown_type_is_a_value_error_that_names_the_known_ones(channel: Ends) -> None:
    for call in (channel[1].on, channel[1].once, channel[1].off, channel[1].add_event_listener):
        with pytest.raises(ValueError, match="'message', 'messageerror', 'close'"):
            call("messages", print)


# The handlers


@pytest.mark.row("W33", "W43")
def test_there_is_no_handler_until_one_is_set(channel: Ends) -> None:
    for name in ("onmessage", "onmessageerror", "onclose"):
        assert getattr(channel[0], name) is None
        setattr(channel[0], name, print)
        assert getattr(channel[0], name) is print
        setattr(channel[0], name, None)
        assert getattr(channel[0], name) is None


@pytest.mark.row("W60")
def test_of_two_handlers_only_the_last_one_runs(channel: Ends, fence: Fence) -> None:
    first, last = Heard(), Heard()
    channel[1].onmessage = first
    channel[1].onmessage = last
    channel[0].post_message("x")
    assert last.next() == "x"
    fence()
    assert first.nothing


@pytest.mark.row("W60")
def test_a_handler_set_to_none_does_not_run(channel: Ends, fence: Fence) -> None:
    handler, listener = Heard(), Heard()
    channel[1].onmessage = handler
    channel[1].on("message", listener)
    channel[1].onmessage = None
    channel[0].post_message("x")
    assert listener.next() == "x"
    fence()
    assert handler.nothing


@pytest.mark.row("W60")
def test_the_handler_and_the_listeners_all_run(channel: Ends) -> None:
    heard = [Heard(), Heard(), Heard()]
    channel[1].on("message", heard[0])
    channel[1].onmessage = heard[1]
    channel[1].add_event_listener("message", heard[2])
    channel[0].post_message("x")
    assert [each.next() for each in heard] == ["x", "x", "x"]


def test_one_callable_may_be_both_handler_and_listener(channel: Ends) -> None:
    heard = Heard()
    channel[1].onmessage = heard
    channel[1].on("message", heard)
    channel[0].post_message("x")
    assert [heard.next(), heard.next()] == ["x", "x"]


def test_removing_a_listener_leaves_a_handler_that_is_the_same_callable(channel: Ends, fence: Fence) -> None:
    heard = Heard()
    channel[1].onmessage = heard
    channel[1].on("message", heard)
    channel[1].off("message", heard)
    channel[0].post_message("x")
    assert heard.next() == "x"
    fence()
    assert heard.nothing
    assert channel[1].onmessage is heard


class Calls:
    """Listeners with names; ``order(n)`` gives the names of the next n calls."""

    def __init__(self) -> None:
        self._heard = Heard(lambda name: name)
        self._made: dict[str, Callable[[Any], None]] = {}

    def __getitem__(self, name: str) -> Callable[[Any], None]:
        return self._made.setdefault(name, lambda event: self._heard(name))

    def order(self, count: int) -> str:
        return "".join(self._heard.next() for _ in range(count))


@pytest.mark.row("W62")
def test_listeners_run_in_the_order_they_were_added_with_the_handler_among_them(channel: Ends) -> None:
    calls = Calls()
    channel[1].on("message", calls["a"])
    channel[1].once("message", calls["b"])
    channel[1].onmessage = calls["h"]
    channel[0].post_message("x")
    assert calls.order(3) == "abh"
    channel[1].add_event_listener("message", calls["c"])
    channel[0].post_message("x")
    assert calls.order(3) == "ahc"


@pytest.mark.row("W62")
def test_a_handler_that_is_replaced_keeps_its_place(channel: Ends) -> None:
    calls = Calls()
    channel[1].on("message", calls["a"])
    channel[1].onmessage = calls["h"]
    channel[1].on("message", calls["b"])
    channel[1].onmessage = calls["i"]
    channel[0].post_message("x")
    assert calls.order(3) == "aib"


@pytest.mark.row("W62")
def test_a_handler_that_is_cleared_and_set_again_moves_to_the_end(channel: Ends) -> None:
    calls = Calls()
    channel[1].on("message", calls["a"])
    channel[1].onmessage = calls["h"]
    channel[1].on("message", calls["b"])
    channel[1].onmessage = None
    channel[1].onmessage = calls["h"]
    channel[0].post_message("x")
    assert calls.order(3) == "abh"


# Changes while an event is being dispatched


def test_a_listener_added_during_a_dispatch_hears_the_next_event_first(channel: Ends, fence: Fence) -> None:
    late = Heard()
    heard = Heard()

    def add(event: Any) -> None:
        channel[1].on("message", late)
        heard(event)

    channel[1].onmessage = add
    channel[0].post_message(1)
    assert heard.next() == 1
    fence()
    assert late.nothing
    channel[0].post_message(2)
    assert late.next() == 2


def test_a_listener_removed_by_an_earlier_one_is_not_called_any_more(channel: Ends, fence: Fence) -> None:
    gone, stays = Heard(), Heard()
    channel[1].on("message", lambda event: channel[1].off("message", gone))
    channel[1].on("message", gone)
    channel[1].on("message", stays)
    channel[1].start()
    channel[0].post_message("x")
    assert stays.next() == "x"
    fence()
    assert gone.nothing


def test_a_handler_cleared_by_an_earlier_listener_is_not_called_any_more(channel: Ends, fence: Fence) -> None:
    def clear(event: Any) -> None:
        channel[1].onmessage = None

    gone, stays = Heard(), Heard()
    channel[1].on("message", clear)
    channel[1].onmessage = gone
    channel[1].on("message", stays)
    channel[0].post_message("x")
    assert stays.next() == "x"
    fence()
    assert gone.nothing


def test_a_listener_that_removes_itself_is_not_called_again(channel: Ends, fence: Fence) -> None:
    heard, stays = Heard(), Heard()

    def once(event: Any) -> None:
        channel[1].off("message", once)
        heard(event)

    channel[1].on("message", once)
    channel[1].on("message", stays)
    channel[1].start()
    for number in range(3):
        channel[0].post_message(number)
        assert stays.next() == number
    assert heard.next() == 0
    assert heard.nothing


def test_a_once_listener_is_removed_before_it_is_called(channel: Ends, fence: Fence) -> None:
    heard = Heard()

    def again(event: Any) -> None:
        channel[1].once("message", again)  # would be a duplicate if it was still there
        heard(event)

    channel[1].once("message", again)
    channel[1].start()
    for number in range(5):
        channel[0].post_message(number)
    assert [heard.next() for _ in range(5)] == list(range(5))


def test_a_once_listener_that_raises_is_not_called_again(
    channel: Ends, fence: Fence, reported: SimpleQueue[Any]
) -> None:
    def fail(event: Any) -> None:
        raise ValueError(event.data)

    stays = Heard()
    channel[1].once("message", fail)
    channel[1].on("message", stays)
    channel[1].start()
    for number in range(3):
        channel[0].post_message(number)
    assert [stays.next() for _ in range(3)] == [0, 1, 2]
    assert reported.get(timeout=HANG).exc_value.args == (0,)
    assert reported.empty()


def test_a_removal_by_another_thread_during_a_dispatch_comes_too_late_for_that_message_only(
    channel: Ends, fence: Fence
) -> None:
    def wait(event: Any) -> None:
        begun.set()
        assert go_on.wait(HANG)

    begun, go_on = threading.Event(), threading.Event()
    gone, stays = Heard(), Heard()
    channel[1].on("message", wait)
    channel[1].on("message", gone)
    channel[1].on("message", stays)
    channel[1].start()
    channel[0].post_message(1)
    assert begun.wait(HANG)
    channel[1].off("message", gone)
    go_on.set()
    assert gone.next() == 1
    channel[0].post_message(2)
    assert [stays.next(), stays.next()] == [1, 2]
    assert gone.nothing


# Nobody listens: nothing is lost


@pytest.mark.row("N05", "X29", "N52")
@pytest.mark.parametrize("how", ["off", "onmessage = None", "once"])
def test_messages_wait_when_the_last_listener_went(channel: Ends, fence: Fence, how: str) -> None:
    first, second = Heard(), Heard()
    if how == "off":
        channel[1].on("message", first)
    elif how == "once":
        channel[1].once("message", first)
    else:
        channel[1].onmessage = first
    channel[1].start()
    channel[0].post_message(0)
    assert first.next() == 0
    if how == "off":
        channel[1].off("message", first)
    elif how == "onmessage = None":
        channel[1].onmessage = None
    for number in (1, 2, 3):
        channel[0].post_message(number)
    fence()
    assert first.nothing
    channel[1].on("message", second)
    assert [second.next() for _ in range(3)] == [1, 2, 3]
    assert first.nothing


@pytest.mark.row("X29")
def test_a_once_listener_takes_one_message_of_many(channel: Ends, fence: Fence) -> None:
    heard = Heard()
    for number in range(200):
        channel[0].post_message(number)
    channel[1].once("message", heard)
    channel[1].start()
    assert heard.next() == 0
    fence()
    assert heard.nothing
    assert [channel[1].recv(HANG) for _ in range(199)] == list(range(1, 200))


@pytest.mark.row("N52")
def test_a_message_listener_may_come_and_go_between_all_messages(channel: Ends) -> None:
    for number in range(300):
        channel[0].post_message(number)
    for number in range(300):
        heard = Heard()
        channel[1].once("message", heard)
        channel[1].start()
        assert heard.next() == number


@pytest.mark.row("N49")
def test_a_paused_port_takes_nothing_while_only_other_events_have_listeners(channel: Ends, fence: Fence) -> None:
    closed = Heard(lambda event: event.type)
    channel[1].onclose = channel[1].onmessageerror = closed
    channel[1].start()
    channel[0].post_message("kept")
    channel[0].close()
    fence()
    assert closed.nothing  # it waits behind the message
    assert channel[1].recv(HANG) == "kept"
    assert closed.next() == "close"


@pytest.mark.row("N26", "N49")
def test_one_once_after_the_other_gets_the_first_and_the_last_message_before_the_close(context: Any) -> None:
    def next_message(port: Port) -> Any:
        heard = Heard()
        port.once("message", heard)
        port.start()
        return heard.next()

    ours, theirs = mpchannel.MessageChannel()
    process = context.Process(target=children.post_first_and_last_on_each_port, args=(theirs,))
    process.start()
    for _ in range(300):
        port, its_port = mpchannel.MessageChannel()
        closed = threading.Event()
        port.onclose = lambda event, closed=closed: closed.set()
        ours.post_message(None, [its_port])
        assert next_message(port) == "first"
        assert next_message(port) == "last"
        assert closed.wait(HANG)
    ours.close()
    process.join(HANG)
    assert process.exitcode == 0


# Listeners that raise


@pytest.mark.row("W59")
def test_a_listener_that_raises_is_reported_and_the_others_still_run(ends: Ends, reported: SimpleQueue[Any]) -> None:
    def fail(event: Any) -> None:
        raise ValueError("on purpose")

    before, after = Heard(), Heard()
    for fn in (before, fail, after):
        ends[1].on("message", fn)
    ends[1].start()
    ends[0].post_message("x")
    assert [before.next(), after.next()] == ["x", "x"]
    told = reported.get(timeout=HANG)
    assert told.exc_type is ValueError
    assert str(told.exc_value) == "on purpose"
    assert told.exc_traceback is not None
    assert told.thread is not threading.current_thread()


@pytest.mark.row("W59")
@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_delivery_goes_on_after_a_listener_raised(
    channel: Ends, reported: SimpleQueue[Any], error: type[BaseException]
) -> None:
    def fail(event: Any) -> None:
        raise error(event.data)

    heard = Heard()
    channel[1].on("message", fail)
    channel[1].on("message", heard)
    channel[1].start()
    for number in range(5):
        channel[0].post_message(number)
    assert [heard.next() for _ in range(5)] == list(range(5))
    assert [reported.get(timeout=HANG).exc_value.args for _ in range(5)] == [(number,) for number in range(5)]


@pytest.mark.row("W59")
def test_a_hook_that_raises_does_not_end_delivery() -> None:
    # In a process of its own: what this is about is whether its delivery thread lives on.
    script = """if True:
        import threading, mpchannel
        def hook(args):
            raise RuntimeError("the hook")
        def listen(event):
            if event.data == "bad":
                raise ValueError("the listener")
            heard.set()
        threading.excepthook = hook
        heard = threading.Event()
        with mpchannel.MessageChannel() as channel:
            channel.port2.onmessage = listen
            channel.port1.post_message("bad")
            channel.port1.post_message("good")
            assert heard.wait(10), "delivery ended"
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    assert "the hook" in done.stderr


def test_a_coroutine_listener_without_a_loop_is_reported_with_what_to_do(
    channel: Ends, reported: SimpleQueue[Any]
) -> None:
    async def listen(event: Any) -> None:
        pass

    heard = Heard()
    channel[1].on("message", listen)
    channel[1].on("message", heard)
    channel[1].start()
    channel[0].post_message("x")
    assert heard.next() == "x"
    told = reported.get(timeout=HANG)
    assert told.exc_type is TypeError
    assert "asyncio loop" in str(told.exc_value)


# Turns


@pytest.mark.row("W01")
def test_posting_from_a_listener_runs_no_listener_inside_it(channel: Ends) -> None:
    def answer(event: Any) -> None:
        assert not inside
        inside.append(True)
        channel[0].post_message("to the other end")
        channel[1].post_message("to this very end")
        inside.clear()

    def listen(event: Any) -> None:
        heard((event.data, bool(inside)))

    inside: list[bool] = []
    heard = Heard(lambda pair: pair)
    channel[0].onmessage = listen
    channel[1].once("message", answer)
    channel[1].on("message", listen)
    channel[1].start()
    channel[0].post_message("go")
    got = {heard.next() for _ in range(3)}
    assert got == {("go", False), ("to the other end", False), ("to this very end", False)}


def test_ping_pong_between_listeners_does_not_grow_the_stack(channel: Ends) -> None:
    def depth() -> int:
        frame: Any = sys._getframe()
        count = 0
        while frame is not None:
            frame, count = frame.f_back, count + 1
        return count

    def pong(event: Any) -> None:
        depths.add(depth())
        if event.data < 5000:
            event.target.post_message(event.data + 1)
        else:
            over.set()

    depths: set[int] = set()
    over = threading.Event()
    channel[0].onmessage = channel[1].onmessage = pong
    channel[0].post_message(0)
    assert over.wait(HANG)
    assert len(depths) == 1


def test_endless_ping_pong_does_not_starve_another_channel(channel: Ends, fence: Fence) -> None:
    def pong(event: Any) -> None:
        event.target.post_message(event.data + 1)
        running.set()

    running = threading.Event()
    channel[0].onmessage = channel[1].onmessage = pong
    channel[0].post_message(0)
    assert running.wait(HANG)
    for _ in range(20):
        fence()


def test_a_port_that_always_has_a_message_does_not_starve_another_one(channel: Ends, fence: Fence) -> None:
    def again(event: Any) -> None:
        channel[0].post_message(event.data + 1)
        running.set()

    running = threading.Event()
    channel[1].onmessage = again
    for _ in range(500):
        channel[0].post_message(0)
    assert running.wait(HANG)
    for _ in range(20):
        fence()


@pytest.mark.row("W10", "X20")
def test_what_is_still_queued_when_a_listener_closes_its_port_is_dropped(ends: Ends, fence: Fence) -> None:
    def listen(event: Any) -> None:
        ends[1].close()
        heard(event)

    heard = Heard()
    for number in range(3):
        ends[0].post_message(number)
    ends[1].onmessage = listen
    assert heard.next() == 0
    fence()
    assert heard.nothing
    assert mpchannel.receive_message_on_port(ends[1]) is None


# Messages that cannot be loaded


def vanishing() -> Any:
    """An instance of a class that is no longer importable, once the message is made."""
    module = types.ModuleType("vanishing_module_of_a_test")
    module.Gone = type("Gone", (), {"__module__": module.__name__})  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    return module.Gone()  # type: ignore[attr-defined]


def post_what_cannot_be_loaded(port: Port, kind: str) -> None:
    if kind == "vanished":
        port.post_message(vanishing())
        del sys.modules["vanishing_module_of_a_test"]
    else:
        port.post_message({"forged": Bad(), "state": RaisesWhenSet(), "exception": Awkward(1, 2)}[kind])


@pytest.mark.row("W34", "N37")
@pytest.mark.parametrize("kind", ["forged", "vanished", "state", "exception"])
def test_what_cannot_be_loaded_is_a_messageerror_at_its_place(channel: Ends, fence: Fence, kind: str) -> None:
    heard = Heard(lambda event: event)
    channel[1].on("messageerror", heard)
    channel[0].post_message("before")
    post_what_cannot_be_loaded(channel[0], kind)
    channel[0].post_message("after")
    channel[1].onmessage = heard
    before, bad, after = heard.next(), heard.next(), heard.next()
    assert (before.data, after.data) == ("before", "after")
    assert isinstance(bad, MessageErrorEvent)
    assert (bad.type, bad.target, bad.data, bad.ports) == ("messageerror", channel[1], None, ())
    assert isinstance(bad.error, MessageError)
    assert bad.error.__cause__ is not None
    assert "MessageError" in repr(bad)
    fence()
    assert heard.nothing


@pytest.mark.row("W34")
def test_a_message_whose_loading_raises_no_exception_proper_is_a_messageerror_too(
    channel: Ends, reported: SimpleQueue[Any]
) -> None:
    heard = Heard(lambda event: event.type)
    channel[1].on("messageerror", heard)
    channel[1].onmessage = heard
    channel[0].post_message(Exits())
    channel[0].post_message("after")
    assert [heard.next(), heard.next()] == ["messageerror", "message"]


@pytest.mark.row("W33")
def test_the_handler_of_messageerror_is_called(ends: Ends) -> None:
    heard = Heard(lambda event: event.type)
    ends[1].onmessageerror = heard
    ends[1].onmessage = heard
    ends[0].post_message(Bad())
    assert heard.next() == "messageerror"


@pytest.mark.row("W34")
def test_what_cannot_be_loaded_is_reported_if_nobody_listens_for_that(
    channel: Ends, reported: SimpleQueue[Any]
) -> None:
    heard = Heard()
    channel[1].onmessage = heard
    channel[0].post_message(Bad())
    channel[0].post_message("after")
    assert heard.next() == "after"
    assert isinstance(reported.get(timeout=HANG).exc_value, MessageError)


def test_a_message_that_cannot_be_loaded_waits_as_others_do_until_somebody_listens_for_messages(
    channel: Ends, fence: Fence
) -> None:
    errors, heard = Heard(lambda event: event.type), Heard()
    channel[1].onmessageerror = errors
    channel[1].start()
    channel[0].post_message(Bad())
    fence()
    assert errors.nothing
    channel[1].once("message", heard)
    channel[0].post_message("after")
    assert errors.next() == "messageerror"
    assert heard.next() == "after"  # the bad one did not use up the once listener


@pytest.mark.row("H18")
def test_the_ports_of_a_message_that_cannot_be_loaded_are_closed(channel: Ends) -> None:
    heard = Heard(lambda event: event.ports)
    channel[1].onmessageerror = heard
    channel[1].onmessage = heard
    ours, theirs = mpchannel.MessageChannel()
    channel[0].post_message([theirs, Bad()], [theirs])
    assert heard.next() == ()
    closed = ours.wait_closed(HANG)
    assert closed is not None
    assert closed.reason == "undeliverable"


# The object


@pytest.mark.row("N30")
def test_a_port_says_in_which_state_it_is(channel: Ends) -> None:
    ours, theirs = mpchannel.MessageChannel()
    assert "open" in repr(ours)
    assert "started" not in repr(ours)
    ours.start()
    assert "started" in repr(ours)
    channel[0].post_message("x", [theirs])
    assert "posted through" in repr(theirs)
    assert __name__.rpartition(".")[2] in repr(theirs)
    arrived = channel[1].receive(HANG).ports[0]
    assert "open" in repr(arrived)
    ours.close()
    assert "closed" in repr(ours)
    assert arrived.wait_closed(HANG) is not None
    assert "closed, the other end was closed" in repr(arrived)


def test_the_two_ends_of_a_channel_can_be_told_to_belong_together_by_their_names(channel: Ends) -> None:
    def name(port: Port) -> str:
        return re.split(r"[/,]", repr(port))[0]

    with mpchannel.MessageChannel() as other:
        assert name(channel[0]) == name(channel[1])
        assert name(other.port1) != name(channel[0])
        assert repr(other.port1) in repr(other)


@pytest.mark.row("N46")
def test_ref_and_unref_may_be_called_in_any_state_and_do_not_touch_delivery(channel: Ends) -> None:
    heard = Heard()
    channel[1].onmessage = heard
    for call in (channel[1].unref, channel[1].unref, channel[1].ref, channel[1].ref, channel[1].unref):
        assert call() is None  # type: ignore[func-returns-value]
        channel[0].post_message("x")
        assert heard.next() == "x"
    channel[1].close()
    channel[1].ref()
    channel[1].unref()


@pytest.mark.row("N46")
def test_has_ref_tells_what_ref_and_unref_said(channel: Ends) -> None:
    assert channel[1].has_ref()
    channel[1].unref()
    assert not channel[1].has_ref()
    channel[1].ref()
    assert channel[1].has_ref()


@pytest.mark.row("N45")
@pytest.mark.parametrize("handler", ["print", "None"])
def test_a_program_with_a_listening_port_ends(handler: str) -> None:
    script = f"""if True:
        import mpchannel
        one, other = mpchannel.MessageChannel()
        one.onmessage = other.onmessage = print
        one.onmessage = {handler}
    """
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=HANG)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
