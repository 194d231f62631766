"""What runs in the workers of ``test_electron``. Imports nothing but the package, as ``children``.

A *role* is one side of a conversation: a function of the other side, ``far``. That is ``parent_port()`` in a worker and
the ``Worker`` in its parent, so each role can be played at either side. What it returns is what it saw.
"""

from __future__ import annotations

import gc
import os
import queue
import threading
from collections.abc import Callable
from typing import Any

import mpchannel
from mpchannel import MessageChannel

from .children import Port, let_deliver
from .workers import CannotBeLoaded, port

Heard = queue.SimpleQueue[Any]
FULL = 1000
"""Small messages that are more than a socket holds (about 280)."""
REPETITIONS = 300


def play(role: Callable[..., Any], result: Port, *args: Any) -> None:
    """Play a role in this worker, and post what it saw."""
    result.post_message(role(port(), *args))


def give_a_port(far: Any, message: Any = None) -> Port:
    """Move one end of a new channel to the other side; the end that stays."""
    mine, theirs = MessageChannel()
    far.post_message(message, [theirs])
    return mine


def take_a_port(far: Any) -> Port:
    taken: Port
    (taken,) = far.receive(20).ports
    return taken


def close_reason(of: Port) -> str:
    event = of.wait_closed(20)
    assert event is not None
    return str(event.reason)


# Ports and messages from one side to the other


def post_hi_and_a_port(far: Any) -> Any:
    with give_a_port(far, "hi") as mine:
        return mine.recv(20)


def describe_and_answer(far: Any) -> Any:
    event = far.receive(20)
    for each in event.ports:
        each.post_message("alive")
        each.close()
    return event.data, [type(each) for each in event.ports]


def post_without_a_list(far: Any) -> None:
    far.post_message("received")
    far.post_message("heard")


def ports_of_messages(far: Any) -> Any:
    received = far.receive(20)
    heard: Heard = queue.SimpleQueue()
    far.onmessage = heard.put
    by_a_listener = heard.get(timeout=20)
    far.onmessage = None
    return (received.data, received.ports), (by_a_listener.data, by_a_listener.ports)


def keep_a_doubling_end(far: Any) -> str:
    mine, theirs = MessageChannel()
    mine.onmessage = lambda event: mine.post_message(event.data * 2)
    far.post_message(None, [theirs])
    return close_reason(mine)


def start_and_post_42(far: Any) -> Any:
    heard: Heard = queue.SimpleQueue()
    with take_a_port(far) as taken:
        taken.on("message", heard.put)
        taken.start()
        taken.post_message(42)
        return heard.get(timeout=20).data


def give_a_port_in_a_dict(far: Any) -> Any:
    mine, theirs = MessageChannel()
    with mine:
        far.post_message({"port": theirs}, [theirs])
        return mine.recv(20)


def answer_on_the_port_in_the_dict(far: Any) -> Any:
    event = far.receive(20)
    with event.data["port"] as taken:
        taken.post_message("directly")
        return [each is taken for each in event.ports]


def post_pid_on_a_given_port() -> None:
    with take_a_port(port()) as taken:
        taken.post_message(os.getpid())


def relay(onward: Port) -> None:
    """Pass one message on, with the ports as they came."""
    port().once("message", lambda event: onward.post_message(event.data, transfer=event.ports))
    port().start()


def post_place_on_each(source: Port) -> None:
    event = source.receive(20)
    for place, each in enumerate(event.ports):
        each.post_message((event.data, place, os.getpid()))


def post_earlier_than_the_transfer(far: Any) -> str:
    mine, theirs = MessageChannel()
    mine.post_message("earlier")
    far.post_message(None, [theirs])
    return close_reason(mine)


def set_onmessage(far: Any) -> Any:
    heard: Heard = queue.SimpleQueue()
    with take_a_port(far) as taken:
        taken.onmessage = heard.put
        return heard.get(timeout=20).data


def nest_a_port_in_a_queue(far: Any) -> str:
    outer, moving = MessageChannel()
    inner, nested = MessageChannel()
    outer.post_message("a port", [nested])
    inner.post_message("data")
    far.post_message(None, [moving])
    return close_reason(inner)


def unwrap(far: Any) -> Any:
    with take_a_port(far) as outer, take_a_port(outer) as inner:
        return inner.recv(20)


VALUES: list[Any] = [None, 42, False, [], "hello", {"hello": "goodnight"}]


def post_values(far: Any) -> list[bool]:
    with give_a_port(far):
        return [far.post_message(each) for each in VALUES]


def take_values(far: Any) -> list[Any]:
    take_a_port(far).close()
    return [far.recv(20) for _ in VALUES]


def look_at_nothing(far: Any) -> str:
    return close_reason(take_a_port(far))


def double(far: Any) -> None:
    done = threading.Event()

    def answer(event: Any) -> None:
        far.post_message(event.data * 2)
        done.set()

    far.onmessage = answer
    assert done.wait(20)
    far.onmessage = None


def ask_for_twice_2(far: Any) -> Any:
    far.post_message(2)
    return far.recv(20)


def post_three(far: Any, gate: Port) -> None:
    for each in ("first", "second", "third"):
        far.post_message(each)
    gate.post_message("posted")


def listen_late(far: Any, gate: Port) -> list[Any]:
    gate.recv(20)
    heard: Heard = queue.SimpleQueue()
    far.onmessage = heard.put
    messages = [heard.get(timeout=20).data for _ in range(3)]
    far.onmessage = None
    return messages


def post_and_close(far: Any) -> None:
    with give_a_port(far) as mine:
        mine.post_message("queued")


def listen_and_start_later(far: Any) -> Any:
    heard: Heard = queue.SimpleQueue()
    taken = take_a_port(far)
    taken.on("message", heard.put)
    taken.on("close", heard.put)
    assert taken.poll(20)
    let_deliver()
    early = heard.qsize()
    taken.start()
    message, close = heard.get(timeout=20), heard.get(timeout=20)
    return early, (message.type, message.data, message.ports), (close.type, close.reason)


def request_streams(far: Any) -> list[Any]:
    seen = []
    for count in (0, 1, FULL):
        heard: Heard = queue.SimpleQueue()
        replies = give_a_port(far, count)
        replies.onclose = heard.put
        replies.onmessage = lambda event, heard=heard: heard.put(event.data)
        items = [heard.get(timeout=20) for _ in range(count)]
        reason = heard.get(timeout=20).reason
        let_deliver()
        seen.append((items == list(range(count)), reason, heard.qsize()))
    far.post_message("no more")
    return seen


def stream_replies(far: Any) -> None:
    while (event := far.receive(20)).ports:
        with event.ports[0] as reply:
            for number in range(event.data):
                reply.post_message(number)


def post_through_a_base(far: Any) -> Any:
    base = give_a_port(far)
    inner = give_a_port(base)
    return inner.recv(20), close_reason(inner), close_reason(base)


def answer_on_the_inner_port(far: Any) -> None:
    with take_a_port(far) as base, take_a_port(base) as inner:
        inner.post_message("through the inner channel")


def post_what_cannot_be_loaded(far: Any) -> None:
    far.post_message(CannotBeLoaded())
    far.post_message("good")


def hear_what_cannot_be_loaded(far: Any) -> Any:
    heard: Heard = queue.SimpleQueue()
    far.onmessageerror = heard.put
    far.onmessage = heard.put
    events = [heard.get(timeout=20) for _ in range(2)]
    far.onmessage = None
    return [(each.type, each.data, each.ports) for each in events]


# What is refused


def _moved() -> Port:
    gone, other = MessageChannel()
    with other:
        carrier, unread = MessageChannel()
        with carrier, unread:
            carrier.post_message(None, [gone])
    return gone


REFUSED: dict[str, tuple[Callable[[Any, Port], Any], str]] = {
    "a buffer": (lambda far, good: far.post_message("bad", [good, bytearray(3)]), "transfer[1]"),
    "a number": (lambda far, good: far.post_message("bad", [good, 3]), "transfer[1]"),
    "None": (lambda far, good: far.post_message("bad", [good, None]), "transfer[1]"),
    "a dict": (lambda far, good: far.post_message("bad", [good, {}]), "transfer[1]"),
    "a moved port": (lambda far, good: far.post_message("bad", [good, _moved()]), "transfer[1]"),
    "a port twice": (lambda far, good: far.post_message("bad", [good, good]), "transfer[1]"),
    "a generator": (lambda far, good: far.post_message((each for each in ""), [good]), "generator"),
    "an unlisted port": (lambda far, good: far.post_message({"port": good}), "'port'"),
}
"""How to post something that is refused, and what the error says."""


def post_what_is_refused_then_the_port(far: Any, what: str) -> Any:
    attempt, text = REFUSED[what]
    mine, good = MessageChannel()
    with mine:
        try:
            attempt(far, good)
        except mpchannel.DataCloneError as error:
            told = text in str(error)
            far.post_message("good", [good])
            return told, mine.recv(20)
    return "accepted"


# How one side sees the other's end


def close_at_once(far: Any) -> None:
    give_a_port(far).close()


def hear_close(far: Any) -> Any:
    heard: Heard = queue.SimpleQueue()
    taken = take_a_port(far)
    taken.onclose = heard.put
    taken.start()
    return heard.get(timeout=20).reason


def hear_one_close(far: Any) -> Any:
    """Give a port away, and tell the other side when the close came."""
    heard: Heard = queue.SimpleQueue()
    mine = give_a_port(far)
    mine.onclose = heard.put
    reason = heard.get(timeout=20).reason
    let_deliver()
    far.post_message("heard")
    return reason, heard.qsize()


def let_go(far: Any) -> None:
    take_a_port(far)
    gc.collect()
    assert far.recv(20) == "heard"  # or this worker would end


def close_with_a_listener(far: Any) -> int:
    heard: Heard = queue.SimpleQueue()
    taken = take_a_port(far)
    taken.onclose = heard.put
    taken.start()
    taken.close()
    assert far.recv(20) == "heard"
    let_deliver()
    return heard.qsize()


def close_and_post(far: Any) -> Any:
    mine = give_a_port(far)
    mine.post_message("before")
    mine.close()
    return mine.post_message("after")


def all_messages(far: Any) -> list[Any]:
    return list(take_a_port(far))


def post_to_a_closed_end(far: Any) -> Any:
    mine = give_a_port(far)
    reason = close_reason(mine)
    accepted = mine.post_message("too late")
    far.post_message("posted")
    return reason, accepted


def listen_and_close(far: Any) -> int:
    heard: Heard = queue.SimpleQueue()
    taken = take_a_port(far)
    taken.onmessage = heard.put
    taken.close()
    assert far.recv(20) == "posted"
    let_deliver()
    return heard.qsize()


def post_to_one_that_forgot(far: Any) -> None:
    with give_a_port(far) as mine:
        assert far.recv(20) == "forgotten"
        mine.post_message("still there?")


def listen_and_forget(far: Any) -> Any:
    heard: Heard = queue.SimpleQueue()
    taken = take_a_port(far)
    taken.on("message", heard.put)
    taken.start()
    del taken
    gc.collect()
    far.post_message("forgotten")
    return heard.get(timeout=20).data


def post_and_hear_one_close(far: Any) -> Any:
    heard: Heard = queue.SimpleQueue()
    mine = give_a_port(far)
    mine.post_message("once")
    mine.onclose = heard.put
    reason = heard.get(timeout=20).reason
    let_deliver()
    return reason, heard.qsize()


def start_and_close_twice(far: Any) -> Any:
    heard: Heard = queue.SimpleQueue()
    taken = take_a_port(far)
    taken.on("message", heard.put)
    taken.start()
    taken.start()
    message = heard.get(timeout=20).data
    taken.close()
    taken.close()
    taken.start()
    let_deliver()
    return message, heard.qsize()


def post_first_and_last_and_close(far: Any) -> None:
    for _ in range(REPETITIONS):
        with take_a_port(far) as taken:
            taken.post_message("first")
            taken.post_message("last")


def await_one_at_a_time(far: Any) -> int:
    """How often both messages came, and then the close."""
    count = 0
    for _ in range(REPETITIONS):
        mine = give_a_port(far)
        heard: Heard = queue.SimpleQueue()
        closed: Heard = queue.SimpleQueue()
        mine.start()
        mine.onclose = closed.put
        messages = []
        for _ in range(2):
            mine.once("message", heard.put)
            messages.append(heard.get(timeout=20).data)
        count += messages == ["first", "last"] and closed.get(timeout=20).reason == "closed"
    return count


# Several ports


def answer_each_with_its_place(*ports: Port) -> None:
    for place, each in enumerate([*ports, *(mpchannel.worker_data() or ())]):
        each.post_message((place, each.recv(20), os.getpid()))


def count_down(own: Port, other: Port) -> None:
    """Pass a number to and fro between two workers, one less each time; the one that gets 0 says so."""
    for number in other:
        if number:
            other.post_message(number - 1)
        else:
            own.post_message(os.getpid())
            other.close()


# What keeps a worker alive


def listen_until_told() -> None:
    """Echo until "clear" removes the handler and nothing else."""

    def answer(event: Any) -> None:
        if event.data == "clear":
            port().onmessage = None
        else:
            port().post_message(event.data)

    port().onmessage = answer


def assign_what_cannot_be_called() -> None:
    listen_until_told()
    try:
        port().onmessage = "not a function"  # type: ignore[assignment]
    except TypeError:
        port().post_message("refused")


def _remove_the_last_listener(target: Port) -> None:
    target.on("message", print)
    target.start()
    target.off("message", print)


def _unref(target: Port) -> None:
    target.onmessage = print
    target.unref()


def _close(target: Port) -> None:
    target.onmessage = print
    target.close()


RELEASED: dict[str, Callable[[Port], Any]] = {
    "fresh": lambda target: None,
    "started, nobody listens": lambda target: target.start(),
    "listened to, not started": lambda target: target.on("message", print),
    "its last listener removed": _remove_the_last_listener,
    "unref'd": _unref,
    "closed": _close,
}
"""What does not keep a worker alive."""


def hold_and_return(how: str, target: Port) -> None:
    RELEASED[how](target)
    _held.append(target)
    port().post_message("returning")


_held: list[Port] = []


def look_away(target: Port) -> None:
    _held.append(target)


def listen_where_told(target: Port, ref_again: bool = False) -> None:
    """Answer on *target* with whether it keeps this worker; "unref" lets the worker go."""

    def answer(event: Any) -> None:
        if event.data == "unref":
            target.unref()
        target.post_message((event.data, target.has_ref()))

    if ref_again:
        target.unref()
        target.ref()
    target.onmessage = answer
    _held.append(target)
    port().post_message("returning")


def listen_in_a_process(target: Port, wait: bool) -> None:
    """Echo by a listener in a plain process, whose main function waits for the close or returns."""
    target.onmessage = lambda event: target.post_message(event.data)
    if wait:
        target.wait_closed()


# Teardowns: each posts one thing when it is at it, and ends by itself when there is a "stop"


def sit_idle() -> None:
    def hear(event: Any) -> None:
        if event.data == "stop":
            port().close()

    port().post_message("idle")  # first, since an early "stop" closes the port
    port().onmessage = hear


def be_busy() -> None:
    port().post_message("busy")
    while not port().poll():
        pass


def have_a_worker() -> None:
    """Be idle, with a worker that is idle as well."""
    own = mpchannel.Worker(sit_idle)

    def hear(event: Any) -> None:
        own.post_message(event.data)
        port().close()

    port().onmessage = hear
    port().post_message(own.recv(20))


def flood() -> None:
    while not port().poll():
        for _ in range(100):
            port().post_message(bytes(200))
        if port().buffered_amount > 10_000_000:  # enough: memory is not what is on trial
            port().poll(None)


def end_at_once() -> None:
    port().post_message("ending")


def leave_unread() -> None:
    """End with a message that was not looked at, and leave some, with ports in them, that nobody looks at."""
    for number in range(FULL):
        port().post_message(number)
    gate = give_a_port(port())
    port().poll(None)
    gate.close()
