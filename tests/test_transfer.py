"""Ports that move: transfer lists, what travels with a port, and what is left where it was."""

from __future__ import annotations

import asyncio
import collections
import copy
import gc
import itertools
import pickle
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

import mpchannel
from mpchannel import DataCloneError, MessageChannel, MessagePort, PortClosedError, PortDetachedError

from . import children
from .children import Port, Waiter, let_deliver, running

FULL = 1000
"""Small messages that are more than a socket holds (about 280): the rest is in an overflow file."""

Ends = tuple[Port, Port]


def moved(port: Port) -> Port:
    """*port* after one hop over a channel of its own, within this process."""
    near, far = MessageChannel()
    near.post_message(None, transfer=[port])
    (arrived,) = far.receive(10).ports
    near.close()
    far.close()
    return arrived  # type: ignore[no-any-return]


def queued_at(port: Port) -> list[Any]:
    """Every message that waits at *port* now."""
    return [event.data for event in iter(lambda: mpchannel.receive_message_on_port(port), None)]


def nothing_came(port: Port) -> bool:
    """Whether neither a message nor the close of the channel waits at *port*."""
    return not port.poll() and not port.closed


def works(end: Port, other: Port) -> bool:
    """Whether messages go both ways between the two."""
    return bool(
        end.post_message("there")
        and other.recv(10) == "there"
        and other.post_message("back")
        and end.recv(10) == "back"
    )


def talk(one: Port, other: Port) -> None:
    assert works(one, other)


# What arrives


@pytest.mark.row("W18", "N53", "H22")
def test_a_transferred_port_arrives_as_a_new_object_connected_to_the_old_peer(ends: Ends) -> None:
    base, receiver = ends
    kept, given = MessageChannel()
    base.post_message("hi", transfer=[given])
    event = receiver.receive(10)
    (arrived,) = event.ports
    assert (event.data, type(arrived)) == ("hi", MessagePort)
    assert arrived is not given
    talk(kept, arrived)
    arrived.close()
    assert kept.wait_closed(10).reason == "closed"


@pytest.mark.row("H06")
def test_event_ports_are_in_the_order_of_the_list(ends: Ends) -> None:
    base, receiver = ends
    channels = [MessageChannel() for _ in range(5)]
    base.post_message(None, transfer=[each.port2 for each in channels])
    arrived = receiver.receive(10).ports
    for number, (each, port) in enumerate(zip(channels, arrived, strict=True)):
        each.port1.post_message(number)
        assert port.recv(10) == number


@pytest.mark.row("W22")
def test_event_ports_is_a_tuple_that_nobody_can_append_to(ends: Ends) -> None:
    ends[0].post_message(None, transfer=[MessageChannel().port2])
    ports = ends[1].receive(10).ports
    assert (type(ports), len(ports)) == (tuple, 1)


@pytest.mark.row("W51", "N08", "H06")
def test_a_port_in_the_message_and_in_the_list_is_the_one_in_event_ports_at_every_reference(ends: Ends) -> None:
    kept, given = MessageChannel()
    ends[0].post_message({"port": given, "again": [given, (given,)]}, transfer=[given])
    event = ends[1].receive(10)
    (arrived,) = event.ports
    assert all(each is arrived for each in (event.data["port"], event.data["again"][0], event.data["again"][1][0]))
    talk(kept, arrived)


@pytest.mark.row("H06")
def test_ports_in_the_message_keep_the_order_of_the_list_not_that_of_the_message(ends: Ends) -> None:
    (_kept1, first), (_kept2, second) = MessageChannel(), MessageChannel()
    ends[0].post_message([second, first], transfer=[first, second])
    event = ends[1].receive(10)
    assert event.data[0] is event.ports[1]
    assert event.data[1] is event.ports[0]


@pytest.mark.row("W22", "H06")
def test_a_listener_gets_the_ports_with_the_event(ends: Ends) -> None:
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
    ends[1].onmessage = heard.put
    kept, given = MessageChannel()
    ends[0].post_message("hi", transfer=[given])
    event = heard.get(timeout=10)
    assert event.target is ends[1]
    talk(kept, *event.ports)


@pytest.mark.row("E52", "X16")
def test_the_ports_of_an_event_can_be_the_next_transfer_list(ends: Ends) -> None:
    kept, given = MessageChannel()
    near, far = MessageChannel()
    ends[0].post_message("first hop", transfer=[given])
    near.post_message("second hop", transfer=ends[1].receive(10).ports)
    talk(kept, *far.receive(10).ports)


@pytest.mark.parametrize("count", [252, 253, 254, 300])
@pytest.mark.parametrize("size", [10, 1_000_000], ids=["small", "large"])
def test_one_message_carries_more_ports_than_one_packet_of_the_kernel(count: int, size: int) -> None:
    near, far = MessageChannel()
    channels = [MessageChannel() for _ in range(count)]
    near.post_message(bytes(size), transfer=[each.port2 for each in channels])
    event = far.receive(10)
    assert len(event.data) == size
    for number, (each, port) in enumerate(zip(channels, event.ports, strict=True)):
        each.port1.post_message(number)
        assert port.recv(10) == number


def test_a_large_message_brings_its_ports(ends: Ends) -> None:
    kept, given = MessageChannel()
    ends[0].post_message([bytes(3_000_000), given], transfer=[given])
    data, port = ends[1].receive(10).data
    assert len(data) == 3_000_000
    talk(kept, port)


# The shape of the list


def none() -> None:
    return None


@pytest.mark.row("W36", "E02", "N06")
@pytest.mark.parametrize("empty", [none, tuple, list, set, dict, lambda: iter(())])
def test_an_empty_list_means_no_ports(channel: Ends, empty: Callable[[], Any]) -> None:
    channel[0].post_message("hi", transfer=empty())
    event = channel[1].receive(10)
    assert (event.data, event.ports) == ("hi", ())


@pytest.mark.row("W36", "E02")
def test_without_a_list_the_ports_are_an_empty_tuple(ends: Ends) -> None:
    ends[0].post_message("hi")
    assert ends[1].receive(10).ports == ()


@pytest.mark.row("W13", "N06", "E52")
@pytest.mark.parametrize("shape", [list, tuple, set, iter, dict.fromkeys, collections.deque])
def test_any_iterable_of_ports_is_a_list(channel: Ends, shape: Callable[[Any], Iterable[Port]]) -> None:
    kept, given = MessageChannel()
    channel[0].post_message("hi", transfer=shape([given]))
    talk(kept, *channel[1].receive(10).ports)


@pytest.mark.row("W13")
def test_the_list_may_be_the_second_positional_argument(ends: Ends) -> None:
    kept, given = MessageChannel()
    ends[0].post_message("hi", [given])
    talk(kept, *ends[1].receive(10).ports)


@pytest.mark.row("N06")
def test_a_generator_is_consumed_once(ends: Ends) -> None:
    channels = [MessageChannel() for _ in range(3)]
    given: list[int] = []

    def generate() -> Iterator[Port]:
        for number, each in enumerate(channels):
            given.append(number)
            yield each.port2

    ends[0].post_message("hi", transfer=generate())
    assert given == [0, 1, 2]
    assert len(ends[1].receive(10).ports) == 3


def test_an_exception_of_the_iterable_is_the_callers_and_nothing_moved(ends: Ends) -> None:
    kept, given = MessageChannel()

    def generate() -> Iterator[Port]:
        yield given
        raise LookupError("no more ports")

    with pytest.raises(LookupError, match="no more ports"):
        ends[0].post_message("hi", transfer=generate())
    talk(kept, given)
    assert nothing_came(ends[1])


@pytest.mark.row("W35", "N06")
@pytest.mark.parametrize("wrong", [0, 1, 2.5, False, True, "X", "", b"x", bytearray(b"x"), ..., len], ids=repr)
def test_a_transfer_that_is_no_iterable_of_ports_is_a_type_error(channel: Ends, wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"transfer must be an iterable of ports, not {type(wrong).__name__}") as caught:
        channel[0].post_message("hi", transfer=wrong)
    assert not isinstance(caught.value, DataCloneError)
    assert nothing_came(channel[1])
    talk(*channel)


@pytest.mark.row("W35", "N06")
def test_a_single_port_as_the_list_is_a_type_error_that_says_what_to_write(ends: Ends) -> None:
    kept, given = MessageChannel()
    with pytest.raises(TypeError, match=r"for one port write transfer=\["):
        ends[0].post_message("hi", transfer=given)  # type: ignore[arg-type]
    talk(kept, given)
    assert nothing_came(ends[1])


# Bad entries


def closed_port() -> Port:
    port = MessageChannel().port1
    port.close()
    return port


def detached_port() -> Port:
    port = MessageChannel().port1
    moved(port).close()
    return port


BAD_ENTRIES: dict[str, Callable[[], Any]] = {
    "None": none,
    "str": lambda: "port",
    "number": lambda: 7,
    "bytes": lambda: b"x",
    "bytearray": lambda: bytearray(b"x"),
    "dict": dict,
    "object": object,
    "list": lambda: [MessageChannel().port1],
    "channel": MessageChannel,
    "closed port": closed_port,
    "detached port": detached_port,
}
bad_entry = pytest.mark.parametrize("bad", BAD_ENTRIES.values(), ids=BAD_ENTRIES.keys())


@pytest.mark.row("W53", "E03", "E14", "E20", "E22", "W11", "W52", "X04", "H01")
@bad_entry
def test_a_bad_entry_is_a_data_clone_error_that_names_its_place(channel: Ends, bad: Callable[[], Any]) -> None:
    _kept, given = MessageChannel()
    with pytest.raises(DataCloneError, match=r"^transfer\[1\] is ") as caught:
        channel[0].post_message("hi", transfer=[given, bad()])
    assert isinstance(caught.value, TypeError)


@pytest.mark.row("N15", "X04", "H17")
@bad_entry
def test_a_bad_entry_leaves_all_others_as_they_were(ends: Ends, bad: Callable[[], Any]) -> None:
    channels = [MessageChannel() for _ in range(3)]
    before, between, after = (each.port2 for each in channels)
    with pytest.raises(DataCloneError):
        ends[0].post_message("hi", transfer=[before, between, bad(), after])
    assert nothing_came(ends[1])
    for each in channels:
        assert nothing_came(each.port1)
        talk(*each)
    talk(*ends)


@pytest.mark.row("W19", "H01")
def test_a_port_cannot_be_sent_through_itself(ends: Ends) -> None:
    _kept, given = MessageChannel()
    with pytest.raises(DataCloneError, match=r"transfer\[1\] .* cannot be sent through itself"):
        ends[0].post_message("hi", transfer=[given, ends[0]])
    assert not given.detached
    talk(*ends)


@pytest.mark.row("W31", "N17")
def test_a_port_listed_twice_is_a_data_clone_error_and_the_receiver_sees_nothing(ends: Ends) -> None:
    kept, given = MessageChannel()
    with pytest.raises(DataCloneError, match=r"transfer\[1\] is listed twice"):
        ends[0].post_message("hi", transfer=[given, given])
    assert nothing_came(ends[1])
    talk(kept, given)


@pytest.mark.row("N42")
def test_a_port_in_the_message_that_is_not_listed_is_a_data_clone_error_with_its_path(ends: Ends) -> None:
    kept, given = MessageChannel()
    with pytest.raises(DataCloneError, match=r"message\['jobs'\]\[1\]: .*not in the transfer list"):
        ends[0].post_message({"jobs": [0, given]})
    assert nothing_came(ends[1])
    talk(kept, given)
    talk(*ends)


@pytest.mark.row("N42")
def test_listing_one_port_does_not_excuse_another_in_the_message(ends: Ends) -> None:
    (kept1, listed), (kept2, forgotten) = MessageChannel(), MessageChannel()
    with pytest.raises(DataCloneError, match=r"message\[1\]: .*not in the transfer list"):
        ends[0].post_message([listed, forgotten], transfer=[listed])
    assert nothing_came(ends[1])
    talk(kept1, listed)
    talk(kept2, forgotten)


@pytest.mark.row("W20", "H17")
def test_a_message_that_cannot_be_pickled_detaches_nothing(ends: Ends) -> None:
    kept, given = MessageChannel()
    with pytest.raises(DataCloneError, match=r"message\['lock'\]"):
        ends[0].post_message({"port": given, "lock": threading.Lock()}, transfer=[given])
    assert nothing_came(ends[1])
    talk(kept, given)
    talk(*ends)


@pytest.mark.row("X12", "X04")
def test_after_many_failed_posts_a_proper_transfer_works(ends: Ends) -> None:
    kept, given = MessageChannel()
    kept.post_message("queued before")
    attempts: list[tuple[Any, list[Any]]] = [
        ("hi", [given, None]),
        ("hi", [given, 5]),
        ("hi", [given, given]),
        ("hi", [given, ends[0]]),
        ("hi", [given, closed_port()]),
        ("hi", [given, detached_port()]),
        (threading.Lock(), [given]),
        (MessageChannel().port1, [given]),
    ]
    for message, transfer in attempts:
        with pytest.raises(DataCloneError):
            ends[0].post_message(message, transfer=transfer)
    ends[0].post_message("at last", transfer=[given])
    event = ends[1].receive(10)
    assert event.data == "at last"
    assert event.ports[0].recv(10) == "queued before"
    talk(kept, event.ports[0])
    assert nothing_came(ends[1])


class Acts:
    """Does something when it is pickled."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act

    def __reduce__(self) -> Any:
        self.act()
        return (str, ("acted",))


@pytest.mark.row("H17", "H01")
@pytest.mark.parametrize("bad", [none, list, closed_port], ids=["None", "list", "closed port"])
def test_the_list_is_checked_before_the_message_is_pickled(ends: Ends, bad: Callable[[], Any]) -> None:
    acted: list[int] = []
    with pytest.raises(DataCloneError):
        ends[0].post_message(Acts(lambda: acted.append(1)), transfer=[bad()])
    assert acted == []


@pytest.mark.row("H17")
@pytest.mark.parametrize("end", [MessagePort.close, moved], ids=["closed", "moved"])
def test_a_port_that_goes_while_the_message_is_pickled_is_found_and_nothing_moves(
    ends: Ends, end: Callable[[Port], Any]
) -> None:
    kept, given = MessageChannel()
    _, leaving = MessageChannel()
    gone: list[Any] = []
    with pytest.raises(DataCloneError, match=r"transfer\[1\]"):
        ends[0].post_message(Acts(lambda: gone.append(end(leaving))), transfer=[given, leaving])
    assert nothing_came(ends[1])
    talk(kept, given)


def test_posting_again_while_a_message_is_pickled_is_two_messages(ends: Ends) -> None:
    (kept1, given1), (kept2, given2) = MessageChannel(), MessageChannel()
    inner = Acts(lambda: ends[0].post_message("inner", transfer=[given2]))
    ends[0].post_message(["outer", inner, given1], transfer=[given1])
    first, second = ends[1].receive(10), ends[1].receive(10)
    assert first.data == "inner"
    assert second.data == ["outer", "acted", second.ports[0]]
    talk(kept2, *first.ports)
    talk(kept1, *second.ports)


@pytest.mark.row("H01")
@pytest.mark.parametrize("gone", ["poster", "peer"])
@bad_entry
def test_a_bad_entry_is_told_even_on_a_channel_that_is_closed(channel: Ends, gone: str, bad: Callable[[], Any]) -> None:
    channel[gone == "peer"].close()
    kept, given = MessageChannel()
    with pytest.raises(DataCloneError):
        channel[0].post_message("hi", transfer=[given, bad()])
    talk(kept, given)


@pytest.mark.row("H01", "W20")
@pytest.mark.parametrize("gone", ["poster", "peer"])
def test_a_message_that_cannot_be_pickled_is_told_even_on_a_channel_that_is_closed(ends: Ends, gone: str) -> None:
    ends[gone == "peer"].close()
    kept, given = MessageChannel()
    with pytest.raises(DataCloneError):
        ends[0].post_message(threading.Lock(), transfer=[given])
    talk(kept, given)


@pytest.mark.row("H01", "W35")
@pytest.mark.parametrize("gone", ["poster", "peer"])
def test_a_wrong_transfer_is_told_even_on_a_channel_that_is_closed(ends: Ends, gone: str) -> None:
    ends[gone == "peer"].close()
    with pytest.raises(TypeError, match="iterable of ports"):
        ends[0].post_message("hi", transfer=5)  # type: ignore[arg-type]


def test_a_post_above_the_limit_of_the_port_moves_nothing(ends: Ends) -> None:
    kept, given = MessageChannel()
    ends[0].max_buffered = 1000
    with pytest.raises(mpchannel.BufferFull):
        ends[0].post_message(bytes(2000), transfer=[given])
    assert nothing_came(ends[1])
    talk(kept, given)


# The old object


@pytest.mark.row("H19", "W52", "N41")
def test_every_listed_port_is_detached_when_post_message_returns(ends: Ends) -> None:
    channels = [MessageChannel() for _ in range(3)]
    assert ends[0].post_message(None, transfer=[each.port2 for each in channels]) is True
    assert [each.port2.detached for each in channels] == [True] * 3
    assert [each.port1.detached for each in channels] == [False] * 3


@pytest.mark.row("W28")
def test_a_stale_post_raises_and_the_peer_sees_only_what_the_holders_posted(ends: Ends) -> None:
    kept, given = MessageChannel()
    given.post_message("PING")
    ends[0].post_message(None, transfer=[given])
    with pytest.raises(PortDetachedError):
        given.post_message("PONG")
    (arrived,) = ends[1].receive(10).ports
    arrived.post_message("TRANSFERRED")
    arrived.close()
    assert list(kept) == ["PING", "TRANSFERRED"]


async def _areceive(port: Port) -> Any:
    return await port.areceive()


USES: dict[str, Callable[[Port], object]] = {
    "post_message": lambda port: port.post_message("x"),
    "post_message with ports": lambda port: port.post_message("x", transfer=[MessageChannel().port1]),
    "large post_message": lambda port: port.post_message(bytes(1_000_000)),
    "receive": lambda port: port.receive(10),
    "recv": lambda port: port.recv(10),
    "recv without waiting": lambda port: port.recv(0),
    "iteration": next,
    "receive_message_on_port": mpchannel.receive_message_on_port,
    "areceive": lambda port: asyncio.run(_areceive(port)),
    "poll": lambda port: port.poll(),
    "fileno": lambda port: port.fileno(),
    "wait": lambda port: mpchannel.wait([port], 0),
    "wait_closed": lambda port: port.wait_closed(10),
    "send": lambda port: port.send("x"),
    "send_bytes": lambda port: port.send_bytes(b"x"),
    "recv_bytes": lambda port: port.recv_bytes(),
}


@pytest.mark.row("W28", "W52")
@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_using_a_detached_port_raises_port_detached_error(use: Callable[[Port], object]) -> None:
    port = detached_port()
    with pytest.raises(PortDetachedError):
        use(port)


@pytest.mark.row("W28")
def test_the_error_of_a_detached_port_says_when_and_where_it_went(ends: Ends) -> None:
    _kept, given = MessageChannel()
    before = time.strftime("%H:%M:%S", time.localtime(time.time()))  # localtime() alone reads a coarser clock
    ends[0].post_message(None, transfer=[given])
    after = time.strftime("%H:%M:%S", time.localtime(time.time()))
    with pytest.raises(PortDetachedError) as caught:
        given.post_message("x")
    text = str(caught.value)
    line = test_the_error_of_a_detached_port_says_when_and_where_it_went.__code__.co_firstlineno + 4
    assert f"posted through {repr(ends[0]).partition(',')[0]}> at" in text
    assert f"at {__file__}:{line} " in text
    assert before in text or after in text
    assert "s ago" in text


@pytest.mark.row("W52", "E22")
def test_listing_a_detached_port_says_when_and_where_it_went(ends: Ends) -> None:
    _kept, given = MessageChannel()
    ends[0].post_message(None, transfer=[given])
    with pytest.raises(DataCloneError, match=rf"transfer\[0\] is a port that was posted through .* at {__file__}:\d+"):
        ends[0].post_message(None, transfer=[given])


@pytest.mark.row("E29")
def test_start_close_and_listeners_do_nothing_on_a_detached_port(ends: Ends) -> None:
    kept, given = MessageChannel()
    ends[0].post_message(None, transfer=[given])
    heard: list[Any] = []
    given.start()
    given.onmessage = heard.append
    given.onclose = given.onmessageerror = heard.append
    given.on("message", heard.append).once("close", heard.append)
    given.add_event_listener("message", print)
    given.remove_event_listener("message", print)
    given.off("message", heard.append)
    given.close()
    given.close()
    assert given.detached
    assert not given.closed
    (arrived,) = ends[1].receive(10).ports
    talk(kept, arrived)
    kept.close()
    assert arrived.wait_closed(10).reason == "closed"
    let_deliver()
    assert heard == []


@pytest.mark.row("E29")
def test_closing_the_old_object_does_not_close_the_channel_that_moved(ends: Ends) -> None:
    kept, given = MessageChannel()
    ends[0].post_message(None, transfer=[given])
    with given:
        pass
    given.close()
    (arrived,) = ends[1].receive(10).ports
    talk(kept, arrived)


def test_collecting_the_old_object_does_not_close_the_channel_that_moved(ends: Ends) -> None:
    kept, given = MessageChannel()
    ends[0].post_message(None, transfer=[given])
    del given
    gc.collect()
    (arrived,) = ends[1].receive(10).ports
    talk(kept, arrived)


@pytest.mark.row("H07")
def test_old_listeners_never_run_again(ends: Ends) -> None:
    kept, given = MessageChannel()
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
    given.onmessage = heard.put
    given.onclose = heard.put
    kept.post_message("before")
    assert heard.get(timeout=10).data == "before"
    ends[0].post_message(None, transfer=[given])
    kept.post_message("after")
    (arrived,) = ends[1].receive(10).ports
    assert arrived.recv(10) == "after"
    kept.close()
    assert arrived.wait_closed(10)
    let_deliver()
    assert heard.empty()


@pytest.mark.row("H07", "X16")
def test_once_a_listener_moved_the_port_the_listeners_after_it_do_not_run(ends: Ends) -> None:
    kept, given = MessageChannel()
    heard: list[Any] = []
    given.on("message", lambda event: ends[0].post_message(None, transfer=[event.target]))
    given.on("message", heard.append)
    given.start()
    kept.post_message("the first listener takes it away")
    (arrived,) = ends[1].receive(10).ports
    let_deliver()
    assert heard == []
    talk(kept, arrived)


@pytest.mark.row("H07")
def test_a_received_port_is_not_started_and_has_no_handlers(ends: Ends) -> None:
    kept, given = MessageChannel()
    given.onmessage = given.onclose = given.onmessageerror = print
    ends[0].post_message(None, transfer=[given])
    (arrived,) = ends[1].receive(10).ports
    assert not arrived.started
    assert [arrived.onmessage, arrived.onclose, arrived.onmessageerror] == [None, None, None]
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
    arrived.on("message", heard.put)
    kept.post_message("waits for start")
    let_deliver()
    assert heard.empty()
    arrived.start()
    assert heard.get(timeout=10).data == "waits for start"


def test_the_limit_of_a_port_does_not_travel(ends: Ends) -> None:
    _kept, given = MessageChannel()
    given.max_buffered = 10
    ends[0].post_message(None, transfer=[given])
    assert ends[1].receive(10).ports[0].max_buffered is None


def test_plain_pickle_refuses_a_port_and_says_what_to_do(ends: Ends) -> None:
    with pytest.raises(TypeError, match=r"moves, it is never copied: list it in post_message\(.*transfer=.*Process"):
        pickle.dumps(ends[0])
    talk(*ends)


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
@pytest.mark.parametrize("nested", [False, True], ids=["bare", "nested"])
def test_copies_of_a_port_are_refused_with_what_to_do(
    channel: Ends, copier: Callable[[Any], Any], nested: bool
) -> None:
    if nested and copier is copy.copy:
        assert copier([channel[0]])[0] is channel[0]
        return
    with pytest.raises(TypeError, match=r"moves, it is never copied"):
        copier({"port": channel[0]} if nested else channel[0])
    talk(*channel)


# What travels with a port


@pytest.mark.row("W26", "E16", "H05")
def test_messages_from_before_the_transfer_and_in_flight_arrive_in_order_and_once(ends: Ends) -> None:
    kept, given = MessageChannel()
    kept.post_message("before")
    ends[0].post_message(None, transfer=[given])
    kept.post_message("in flight")
    (arrived,) = ends[1].receive(10).ports
    kept.post_message("after")
    kept.close()
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
    arrived.onmessage = lambda event: heard.put(event.data)
    arrived.onclose = lambda event: heard.put(event.reason)
    assert [heard.get(timeout=10) for _ in range(4)] == ["before", "in flight", "after", "closed"]


@pytest.mark.row("W26", "E17")
def test_a_queue_that_overflows_moves_whole(ends: Ends) -> None:
    kept, given = MessageChannel()
    for number in range(FULL):
        kept.post_message(number)
    ends[0].post_message(None, transfer=[given])
    for number in range(FULL, 2 * FULL):
        kept.post_message(number)
    (arrived,) = ends[1].receive(10).ports
    assert queued_at(arrived) == list(range(2 * FULL))


@pytest.mark.row("W25", "W27")
def test_messages_of_successive_holders_reach_the_peer_in_hop_order(ends: Ends) -> None:
    kept, given = ends
    given.post_message("First")
    second = moved(given)
    second.post_message("Second")
    second.post_message("Third")
    third = moved(second)
    third.post_message("Fourth")
    third.close()
    assert list(kept) == ["First", "Second", "Third", "Fourth"]


@pytest.mark.row("W25")
def test_hop_order_holds_while_the_peers_queue_overflows(ends: Ends) -> None:
    kept, holder = ends
    numbers = itertools.count()
    for _ in range(5):
        for number in itertools.islice(numbers, FULL):
            holder.post_message(number)
        holder = moved(holder)
    assert queued_at(kept) == list(range(5 * FULL))


@pytest.mark.row("E07", "N54")
def test_a_pending_close_moves_with_the_port_behind_its_messages(ends: Ends) -> None:
    kept, given = MessageChannel()
    kept.post_message("last words")
    kept.close()
    ends[0].post_message(None, transfer=[given])
    (arrived,) = ends[1].receive(10).ports
    assert arrived.recv(10) == "last words"
    assert arrived.wait_closed(10).reason == "closed"


@pytest.mark.row("E07")
def test_a_close_right_after_the_transfer_reaches_the_new_holder(ends: Ends) -> None:
    kept, given = MessageChannel()
    ends[0].post_message(None, transfer=[given])
    kept.close()
    (arrived,) = ends[1].receive(10).ports
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
    arrived.onclose = heard.put
    arrived.start()
    assert heard.get(timeout=10).reason == "closed"


@pytest.mark.parametrize("hops", [1, 2, 7])
@pytest.mark.parametrize("queued", [4, FULL, 3 * FULL])
def test_a_port_bounces_with_a_partly_read_queue(ends: Ends, hops: int, queued: int) -> None:
    kept, holder = ends
    for number in range(queued):
        kept.post_message(number)
    read = []
    for _ in range(hops):
        read += [holder.recv(10) for _ in range(queued // (hops + 1))]
        holder = moved(holder)
        kept.post_message(queued)
        queued += 1
    assert read + queued_at(holder) == list(range(queued))
    talk(kept, holder)


def test_a_port_bounces_while_another_thread_posts_to_it(ends: Ends) -> None:
    kept, holder = ends
    count = 4000

    def post() -> None:
        for number in range(count):
            kept.post_message(number)

    poster = threading.Thread(target=post)
    poster.start()
    read: list[int] = []
    hops = 0
    while len(read) < count:
        # Reading nothing in every other hop lets the queue overflow now and then.
        read += [holder.recv(10) for _ in range(min(hops % 2 * 97, count - len(read)))]
        holder = moved(holder)
        hops += 1
    poster.join()
    assert read == list(range(count))
    assert hops > 40


def test_a_port_bounces_between_two_overflowing_channels(ends: Ends) -> None:
    kept, traveller = MessageChannel()
    there, here = ends
    for number in range(FULL):
        kept.post_message(number)
        there.post_message(number)
        here.post_message(number)
    read = []
    for _ in range(3):
        for sender, receiver in ((there, here), (here, there)):
            read += [traveller.recv(10) for _ in range(100)]
            sender.post_message("the port", transfer=[traveller])
            for number in range(FULL):
                sender.post_message(number)
            events = iter(lambda receiver=receiver: receiver.receive(10), None)
            (traveller,) = next(event.ports for event in events if event.ports)  # type: ignore[misc]
    assert read + queued_at(traveller) == list(range(FULL))


def test_both_ends_may_be_in_flight_at_once(ends: Ends) -> None:
    one, other = MessageChannel()
    one.post_message("from one")
    other.post_message("from other")
    ends[0].post_message(None, transfer=[one])
    ends[1].post_message(None, transfer=[other])
    (other,), (one,) = ends[0].receive(10).ports, ends[1].receive(10).ports
    assert [one.recv(10), other.recv(10)] == ["from other", "from one"]
    talk(one, other)


def test_both_ends_may_travel_in_one_message(ends: Ends) -> None:
    one, other = MessageChannel()
    for number in range(FULL):
        one.post_message(number)
    ends[0].post_message([one, other], transfer=[one, other])
    one, other = ends[1].receive(10).data
    assert queued_at(other) == list(range(FULL))
    talk(one, other)


def test_a_port_may_be_posted_into_a_channel_whose_other_end_is_in_flight(ends: Ends) -> None:
    kept, traveller = MessageChannel()
    near, far = MessageChannel()
    ends[0].post_message(None, transfer=[far])
    near.post_message("inner", transfer=[traveller])
    (far,) = ends[1].receive(10).ports
    talk(kept, *far.receive(10).ports)


@pytest.mark.row("E17")
def test_a_port_nested_in_queued_messages_arrives_with_its_queue(ends: Ends) -> None:
    port1, port2 = MessageChannel()
    port3, port4 = MessageChannel()
    port1.post_message("port4", transfer=[port4])
    port3.post_message("data")
    ends[0].post_message("port2", transfer=[port2])
    (port2,) = ends[1].receive(10).ports
    (port4,) = port2.receive(10).ports
    assert port4.recv(10) == "data"
    talk(port3, port4)


def test_ports_nested_many_levels_deep_all_arrive(ends: Ends) -> None:
    depth = 30
    kept, packed = MessageChannel()
    kept.post_message("innermost")
    for level in range(depth):
        near, far = MessageChannel()
        near.post_message(level, transfer=[packed])
        near.close()
        packed = far
    ends[0].post_message(None, transfer=[packed])
    (port,) = ends[1].receive(10).ports
    for level in reversed(range(depth)):
        event = port.receive(10)
        assert event.data == level
        (port,) = event.ports
    assert port.recv(10) == "innermost"
    talk(kept, port)


def test_ports_in_the_overflowing_part_of_a_queue_move_with_it(ends: Ends) -> None:
    near, far = MessageChannel()
    kept = {}
    for number in range(FULL):
        if number % 20:
            near.post_message(number)
        else:
            kept[number], given = MessageChannel()
            kept[number].post_message(number)
            near.post_message(number, transfer=[given])
    for _ in range(FULL // 2):
        far.receive(10)
    ends[0].post_message(None, transfer=[far])
    (far,) = ends[1].receive(10).ports
    for number in range(FULL // 2, FULL):
        event = far.receive(10)
        assert event.data == number
        if number % 20 == 0:
            assert event.ports[0].recv(10) == number
            talk(kept[number], *event.ports)


@pytest.mark.row("X16")
def test_a_port_can_be_moved_in_its_own_handler(ends: Ends) -> None:
    kept, given = MessageChannel()
    heard: list[Any] = []

    def hand_on(event: Any) -> None:
        heard.append(event.data)
        ends[0].post_message("from the handler", transfer=[event.target])

    for number in range(FULL):
        kept.post_message(number)
    given.onmessage = hand_on
    (arrived,) = ends[1].receive(10).ports
    assert queued_at(arrived) == list(range(1, FULL))
    let_deliver()
    assert heard == [0]
    talk(kept, arrived)


@pytest.mark.row("X16")
def test_a_port_can_be_handed_round_a_ring_from_its_own_handlers() -> None:
    kept, traveller = MessageChannel()
    ring = [MessageChannel() for _ in range(4)]
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def station(number: int) -> Callable[[Any], None]:
        def arrived(event: Any) -> None:
            def say_and_hand_on(inner: Any) -> None:
                heard.put((number, inner.data))
                ring[(number + 1) % len(ring)].port1.post_message(None, transfer=[inner.target])

            event.ports[0].onmessage = say_and_hand_on

        return arrived

    for number, each in enumerate(ring):
        each.port2.onmessage = station(number)
    ring[0].port1.post_message(None, transfer=[traveller])
    for number in range(40):
        kept.post_message(number)
    assert [heard.get(timeout=10) for _ in range(40)] == [(number % 4, number) for number in range(40)]
    for each in ring:
        each.port2.close()
        each.port1.close()
    kept.close()


@pytest.mark.row("W27", "W26", "E16", "E01")
def test_a_queue_crosses_into_another_process_and_back(context: Any) -> None:
    ours, theirs = MessageChannel()
    with running(context.Process(target=children.send_back_ports, args=(theirs,))):
        kept, traveller = MessageChannel()
        read = []
        for lap in range(4):
            for number in range(FULL):
                kept.post_message((lap, number))
            read += [traveller.recv(10) for _ in range(FULL // 2)]
            ours.post_message("there and back", transfer=[traveller])
            event = ours.receive(20)
            assert event.data == "there and back"
            (traveller,) = event.ports
        read += queued_at(traveller)
        assert read == [(lap, number) for lap in range(4) for number in range(FULL)]
        talk(kept, traveller)
        ours.close()


@pytest.mark.row("W27", "W25")
def test_hop_order_holds_across_processes(context: Any) -> None:
    ours, theirs = MessageChannel()
    kept, traveller = MessageChannel()
    with running(context.Process(target=children.post_on_ports_and_send_them_back, args=(theirs,))):
        for number in range(0, 60, 2):
            traveller.post_message(number)
            ours.post_message(number + 1, transfer=[traveller])
            (traveller,) = ours.receive(20).ports
        traveller.close()
        assert list(kept) == list(range(60))
        ours.close()


# The peer of the port that posts


@pytest.mark.row("N19")
def test_posting_ones_own_peer_warns_and_loses_the_message(ends: Ends) -> None:
    poster, peer = ends
    with pytest.warns(RuntimeWarning, match="posts its own other end: the message is lost") as caught:
        assert poster.post_message("doomed", transfer=[peer]) is False
    assert caught[0].filename == __file__


@pytest.mark.row("N19")
def test_a_doomed_post_detaches_all_that_is_listed(ends: Ends) -> None:
    poster, peer = ends
    kept, given = MessageChannel()
    with pytest.warns(RuntimeWarning):
        poster.post_message("doomed", transfer=[given, peer])
    assert given.detached
    assert peer.detached
    assert kept.wait_closed(10).reason == "undeliverable"


@pytest.mark.row("N19")
def test_after_a_doomed_post_the_poster_sees_close_and_posts_silently(ends: Ends) -> None:
    poster, peer = ends
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
    poster.onclose = heard.put
    with pytest.warns(RuntimeWarning):
        poster.post_message("doomed", transfer=[peer])
    assert heard.get(timeout=10).reason == "undeliverable"
    assert poster.post_message("later") is False
    let_deliver()
    assert heard.empty()


@pytest.mark.row("N19")
def test_what_was_queued_before_a_doomed_post_still_comes_before_the_close(ends: Ends) -> None:
    poster, peer = ends
    peer.post_message("early")
    with pytest.warns(RuntimeWarning):
        poster.post_message("doomed", transfer=[peer])
    assert poster.recv(10) == "early"
    assert poster.wait_closed(10).reason == "undeliverable"


@pytest.mark.row("N19")
def test_a_doomed_post_whose_warning_is_an_error_changes_nothing(ends: Ends) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning):
            ends[0].post_message("doomed", transfer=[ends[1]])
    talk(*ends)


def test_posting_ones_own_peer_that_came_back_from_a_journey_is_doomed_too(ends: Ends) -> None:
    peer = moved(ends[1])
    with pytest.warns(RuntimeWarning, match="posts its own other end"):
        ends[0].post_message("doomed", transfer=[peer])
    assert ends[0].wait_closed(10).reason == "undeliverable"


# Ports that cannot be delivered


@pytest.mark.row("X10")
def test_posting_a_port_to_a_closed_peer_detaches_it_and_its_peer_sees_close(ends: Ends) -> None:
    ends[1].close()
    kept, given = MessageChannel()
    assert ends[0].post_message("hi", transfer=[given]) is False
    assert given.detached
    event = kept.wait_closed(10)
    assert (event.reason, event.was_clean) == ("undeliverable", False)


@pytest.mark.row("X10")
def test_posting_a_port_on_a_port_one_closed_oneself_detaches_it_and_its_peer_sees_close(ends: Ends) -> None:
    ends[0].close()
    kept, given = MessageChannel()
    assert ends[0].post_message("hi", transfer=[given]) is False
    assert given.detached
    assert kept.wait_closed(10).reason == "undeliverable"


def test_messages_posted_before_an_end_was_lost_are_delivered_before_its_close(ends: Ends) -> None:
    ends[1].close()
    kept, given = MessageChannel()
    for number in range(FULL):
        given.post_message(number)
    ends[0].post_message("hi", transfer=[given])
    assert [kept.recv(10) for _ in range(FULL)] == list(range(FULL))
    assert kept.wait_closed(10).reason == "undeliverable"


@pytest.mark.parametrize("overflowing", [False, True], ids=["in the socket", "in the overflow file"])
@pytest.mark.parametrize("loss", ["close", "collection"])
@pytest.mark.parametrize("read", [0, 2], ids=["unread", "partly read"])
def test_ports_in_unread_messages_close_with_the_port_that_held_them(overflowing: bool, loss: str, read: int) -> None:
    near, far = MessageChannel()
    for number in range(FULL if overflowing else 3):
        near.post_message(number)
    channels = [MessageChannel() for _ in range(3)]
    for each in channels:
        near.post_message("unread", transfer=[each.port2])
    for _ in range(read * FULL // 3 if overflowing else read):
        far.receive(10)
    if loss == "close":
        far.close()
    del far
    gc.collect()
    for each in channels:
        assert each.port1.wait_closed(10).reason == "undeliverable"


def test_ports_nested_in_unread_messages_close_too() -> None:
    kept, innermost = MessageChannel()
    packed = innermost
    for _ in range(10):
        near, far = MessageChannel()
        near.post_message(None, transfer=[packed])
        near.close()
        packed = far
    packed.close()
    assert kept.wait_closed(10).reason == "undeliverable"


def test_a_port_in_flight_to_a_port_in_flight_closes_when_that_one_is_lost(ends: Ends) -> None:
    kept, given = MessageChannel()
    near, far = MessageChannel()
    near.post_message(None, transfer=[given])
    ends[0].post_message(None, transfer=[far])
    ends[1].close()
    assert kept.wait_closed(10).reason == "undeliverable"
    assert near.wait_closed(10).reason == "undeliverable"


class Unloadable:
    def __reduce__(self) -> Any:
        return (int, ("not a number",))


@pytest.mark.row("H18", "W34")
def test_ports_of_a_message_that_cannot_be_loaded_are_closed_as_undeliverable(ends: Ends) -> None:
    kept, given = MessageChannel()
    ends[0].post_message([given, Unloadable()], transfer=[given])
    ends[0].post_message("next")
    with pytest.raises(mpchannel.MessageError):
        ends[1].receive(10)
    assert kept.wait_closed(10).reason == "undeliverable"
    assert ends[1].recv(10) == "next"


@pytest.mark.row("H18", "W34")
def test_the_messageerror_event_of_a_message_with_ports_has_none(ends: Ends) -> None:
    kept, given = MessageChannel()
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
    ends[1].onmessageerror = heard.put
    ends[1].onmessage = heard.put
    ends[0].post_message([given, Unloadable()], transfer=[given])
    event = heard.get(timeout=10)
    assert (event.type, event.data, event.ports) == ("messageerror", None, ())
    assert kept.wait_closed(10).reason == "undeliverable"


@pytest.mark.parametrize("how", ["return", "_exit", "SIGKILL"])
def test_ports_on_their_way_to_a_process_that_ends_are_closed(context: Any, how: str) -> None:
    ours, theirs = MessageChannel()
    go, gate = MessageChannel()
    with running(context.Process(target=children.end_when_told, args=(gate, how, theirs)), ends_with=None):
        assert go.recv(20) == "ready"
        kept, given = MessageChannel()
        assert ours.post_message("never read", transfer=[given]) is True
        go.post_message("end now")
        assert kept.wait_closed(20).reason in ("undeliverable", "died")
        assert ours.wait_closed(20).reason == ("exited" if how == "return" else "died")


# Threads and tasks that wait on a port that moves


WAITS: dict[str, Callable[[Port], object]] = {
    "receive": lambda port: port.receive(),
    "receive with a timeout": lambda port: port.receive(60),
    "recv": lambda port: port.recv(),
    "iteration": next,
    "poll": lambda port: port.poll(None),
    "wait_closed": lambda port: port.wait_closed(),
    "recv_bytes": lambda port: port.recv_bytes(),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS.keys())
def test_a_thread_that_waits_wakes_with_port_detached_error(channel: Ends, wait: Callable[[Port], object]) -> None:
    kept, given = MessageChannel()
    waiter = Waiter(lambda: wait(given)).blocks()
    channel[0].post_message(None, transfer=[given])
    assert isinstance(waiter.result(), PortDetachedError)
    (arrived,) = channel[1].receive(10).ports
    talk(kept, arrived)


@pytest.mark.parametrize(
    "coroutine", [MessagePort.areceive, MessagePort.await_closed], ids=["areceive", "await_closed"]
)
def test_a_task_that_waits_wakes_with_port_detached_error(ends: Ends, coroutine: Callable[[Port], Any]) -> None:
    kept, given = MessageChannel()

    async def main() -> None:
        task = asyncio.ensure_future(coroutine(given))
        await asyncio.sleep(0)
        ends[0].post_message(None, transfer=[given])
        with pytest.raises(PortDetachedError):
            await asyncio.wait_for(task, 10)

    asyncio.run(main())
    (arrived,) = ends[1].receive(10).ports
    talk(kept, arrived)


def test_nothing_is_lost_or_doubled_when_a_port_moves_away_from_a_reading_thread(ends: Ends) -> None:
    for _ in range(30):
        kept, given = MessageChannel()
        read: list[int] = []
        first = threading.Event()

        def take(port: Port = given, read: list[int] = read, first: threading.Event = first) -> None:
            while True:
                read.append(port.recv())
                first.set()

        reader = Waiter(take)
        for number in range(200):
            kept.post_message(number)
        assert first.wait(10)
        ends[0].post_message(None, transfer=[given])
        for number in range(200, 210):
            kept.post_message(number)
        assert isinstance(reader.result(), PortDetachedError)
        (arrived,) = ends[1].receive(10).ports
        assert read + queued_at(arrived) == list(range(210))


def test_nothing_is_lost_or_doubled_when_a_started_port_moves(ends: Ends) -> None:
    for _ in range(30):
        kept, given = MessageChannel()
        read: list[int] = []
        first = threading.Event()

        def take(event: Any, read: list[int] = read, first: threading.Event = first) -> None:
            read.append(event.data)
            first.set()

        given.onmessage = take
        for number in range(200):
            kept.post_message(number)
        assert first.wait(10)
        ends[0].post_message(None, transfer=[given])
        let_deliver()
        (arrived,) = ends[1].receive(10).ports
        assert read + queued_at(arrived) == list(range(200))


def test_threads_that_move_the_same_port_at_once_move_it_once() -> None:
    for _ in range(30):
        kept, given = MessageChannel()
        ways = [MessageChannel() for _ in range(4)]
        barrier = threading.Barrier(len(ways))

        def move(way: MessageChannel[Any, Any], port: Port = given, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait(10)
            return way.port1.post_message(None, transfer=[port])

        outcomes = [each.result() for each in [Waiter(lambda way=way: move(way)) for way in ways]]
        assert outcomes.count(True) == 1
        assert all(isinstance(each, DataCloneError) for each in outcomes if each is not True)
        (arrived,) = ways[outcomes.index(True)].port2.receive(10).ports
        assert all(not way.port2.poll() for way, outcome in zip(ways, outcomes, strict=True) if outcome is not True)
        talk(kept, arrived)


def test_ports_that_post_each_other_at_once_do_not_deadlock() -> None:
    for _ in range(30):
        one, other = MessageChannel(), MessageChannel()
        barrier = threading.Barrier(2)

        def post(port: Port, moving: Port, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait(10)
            return port.post_message(None, transfer=[moving])

        first = Waiter(lambda one=one, other=other: post(one.port1, other.port1))
        second = Waiter(lambda one=one, other=other: post(other.port1, one.port1))
        outcomes = [first.result(), second.result()]
        # Whoever comes second finds himself moved away already.
        assert outcomes.count(True) == 1
        assert all(each is True or isinstance(each, (PortDetachedError, DataCloneError)) for each in outcomes)


def test_a_port_whose_other_end_closes_at_the_very_moment_is_delivered_or_refused(ends: Ends) -> None:
    for _ in range(100):
        kept, given = MessageChannel()
        barrier = threading.Barrier(2)

        def close(port: Port = kept, barrier: threading.Barrier = barrier) -> None:
            barrier.wait(10)
            port.close()

        closer = Waiter(close)
        barrier.wait(10)
        ends[0].post_message(None, transfer=[given])
        closer.result()
        (arrived,) = ends[1].receive(10).ports
        with pytest.raises(PortClosedError):
            arrived.recv(10)
