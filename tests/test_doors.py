"""Ports that move without a transfer list: ``port.send`` and multiprocessing's own doors."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest

import mpchannel
from mpchannel import DataCloneError, MessageChannel, PortDetachedError

from . import children
from .children import Port, running

Ends = tuple[Port, Port]
FAMILIES = {"mpchannel": mpchannel.get_context, "stdlib": multiprocessing.get_context}
sharing = pytest.mark.leaves("resource sharer")


@pytest.fixture(params=[(family, method) for family in FAMILIES for method in ("fork", "spawn")], ids="-".join)
def pool_context(request: pytest.FixtureRequest) -> Any:
    family, method = request.param
    return FAMILIES[family](method)


def talk(one: Port, other: Port) -> None:
    assert one.post_message("there")
    assert other.recv(20) == "there"
    assert other.post_message("back")
    assert one.recv(20) == "back"


def closed_port() -> Port:
    port = MessageChannel().port1
    port.close()
    return port


def detached_port() -> Port:
    port = MessageChannel().port1
    near, _far = MessageChannel()
    near.post_message(None, transfer=[port])
    return port


def nothing_came(port: Port) -> bool:
    return not port.poll() and not port.closed


# port.send


@pytest.mark.row("E50")
def test_send_moves_the_ports_it_finds(ends: Ends) -> None:
    kept, given = MessageChannel()
    kept.post_message("queued before")
    ends[0].send({"port": given})
    assert given.detached
    arrived = ends[1].recv(10)["port"]
    assert arrived is not given
    assert arrived.recv(10) == "queued before"
    talk(kept, arrived)


@dataclass
class Luggage:
    port: Port
    label: str


SHAPES: dict[str, tuple[Callable[[Port], Any], Callable[[Any], Port]]] = {
    "bare": (lambda port: port, lambda found: found),
    "list": (lambda port: [1, port], lambda found: found[1]),
    "nested": (lambda port: {"a": ({"b": [port]},)}, lambda found: found["a"][0]["b"][0]),
    "dataclass": (lambda port: Luggage(port, "x"), lambda found: found.port),
    "closure": (lambda port: lambda: port, lambda found: found()),
    "bound method": (lambda port: port.post_message, lambda found: found.__self__),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("door", ["send", "post_message"])
def test_a_port_is_found_wherever_it_is_in_the_message(
    channel: Ends, shape: tuple[Callable[[Port], Any], Callable[[Any], Port]], door: str
) -> None:
    wrap, unwrap = shape
    kept, given = MessageChannel()
    if door == "send":
        channel[0].send(wrap(given))
    else:
        channel[0].post_message(wrap(given), transfer=[given])
    event = channel[1].receive(10)
    assert unwrap(event.data) is event.ports[0]
    talk(kept, *event.ports)


def test_a_port_that_is_sent_twice_in_one_message_is_one_port(ends: Ends) -> None:
    kept, given = MessageChannel()
    ends[0].send([given, {"again": given}])
    event = ends[1].receive(10)
    assert event.data[0] is event.data[1]["again"] is event.ports[0]
    assert len(event.ports) == 1
    talk(kept, event.data[0])


def test_event_ports_has_the_sent_ports_in_the_order_of_the_message(ends: Ends) -> None:
    channels = [MessageChannel() for _ in range(4)]
    ends[0].send([each.port2 for each in channels])
    event = ends[1].receive(10)
    assert list(event.ports) == event.data
    for each, port in zip(channels, event.ports, strict=True):
        talk(each.port1, port)


def test_send_without_ports_moves_none(ends: Ends) -> None:
    ends[0].send({"no": "ports"})
    event = ends[1].receive(10)
    assert (event.data, event.ports) == ({"no": "ports"}, ())


def test_send_says_where_a_port_went(ends: Ends) -> None:
    _kept, given = MessageChannel()
    ends[0].send(given)
    with pytest.raises(PortDetachedError, match=rf"sent through .* at {__file__}:\d+"):
        given.post_message("too late")


@pytest.mark.row("W19")
def test_a_port_cannot_be_sent_through_itself(ends: Ends) -> None:
    kept, given = MessageChannel()
    with pytest.raises(DataCloneError, match="cannot be sent through itself"):
        ends[0].send([given, ends[0]])
    talk(kept, given)
    talk(*ends)


@pytest.mark.parametrize("bad", [closed_port, detached_port, threading.Lock], ids=["closed", "detached", "lock"])
def test_a_send_that_raises_moves_nothing(ends: Ends, bad: Callable[[], Any]) -> None:
    kept, given = MessageChannel()
    with pytest.raises(DataCloneError):
        ends[0].send([given, bad()])
    assert not given.detached
    assert nothing_came(ends[1])
    talk(kept, given)


@pytest.mark.row("N19")
def test_sending_ones_own_peer_is_doomed(ends: Ends) -> None:
    with pytest.warns(RuntimeWarning, match="posts its own other end") as caught, pytest.raises(BrokenPipeError):
        ends[0].send([ends[1]])
    assert caught[0].filename == __file__
    assert ends[1].detached
    event = ends[0].wait_closed(10)
    assert event is not None
    assert event.reason == "undeliverable"


def test_send_moves_a_port_into_another_process(context: Any) -> None:
    ours, theirs = MessageChannel()
    with running(context.Process(target=children.report_pid_of_received_port, args=(theirs,))) as process:
        kept, given = MessageChannel()
        ours.send([given])
        assert kept.recv(20) == process.pid


# multiprocessing's pickler


@sharing
def test_multiprocessings_pickler_moves_ports() -> None:
    kept, given = MessageChannel()
    kept.post_message("queued before")
    data = ForkingPickler.dumps([given])
    assert given.detached
    with pytest.raises(PortDetachedError, match=rf"sent by multiprocessing's pickler at {__file__}:\d+"):
        given.post_message("too late")
    kept.post_message("in flight")
    (arrived,) = ForkingPickler.loads(data)
    assert [arrived.recv(10), arrived.recv(10)] == ["queued before", "in flight"]
    talk(kept, arrived)


@pytest.mark.parametrize("bad", [closed_port, detached_port], ids=["closed", "detached"])
def test_multiprocessings_pickler_refuses_ports_that_are_gone(bad: Callable[[], Port]) -> None:
    with pytest.raises(DataCloneError, match="the message is a"):
        ForkingPickler.dumps([bad()])


# Connections


@pytest.fixture
def pipe() -> Iterator[tuple[Any, Any]]:
    one, other = multiprocessing.Pipe()
    with one, other:
        yield one, other


@sharing
def test_a_port_moves_through_a_connection(pipe: tuple[Any, Any]) -> None:
    kept, given = MessageChannel()
    for number in range(1000):
        kept.post_message(number)
    assert given.recv(10) == 0
    pipe[0].send({"port": given})
    assert given.detached
    arrived = pipe[1].recv()["port"]
    assert [arrived.recv(10) for _ in range(999)] == list(range(1, 1000))
    talk(kept, arrived)


@sharing
def test_a_port_moves_through_a_connection_into_another_process(context: Any, pipe: tuple[Any, Any]) -> None:
    kept, given = MessageChannel()
    with running(context.Process(target=children.post_pid_on_ports_from, args=(pipe[1].recv, 1))) as process:
        pipe[0].send(given)
        assert kept.recv(20) == process.pid
        event = kept.wait_closed(20)
        assert event is not None
        assert event.was_clean


@sharing
def test_a_port_moves_through_a_connection_out_of_another_process(context: Any, pipe: tuple[Any, Any]) -> None:
    gate, gatekeeper = MessageChannel()
    with running(context.Process(target=children.put_port_that_says_pid, args=(pipe[1].send, gate))) as process:
        arrived = pipe[0].recv()
        assert arrived.recv(20) == process.pid
        gatekeeper.post_message("leave")
        event = arrived.wait_closed(20)
        assert event is not None
        assert (event.was_clean, event.pid) == (True, process.pid)


def test_a_port_that_was_never_fetched_ends_with_its_sender(context: Any, pipe: tuple[Any, Any]) -> None:
    kept, given = MessageChannel()
    with running(context.Process(target=children.send_and_leave, args=(pipe[1], given))):
        event = kept.wait_closed(20)
        assert event is not None
        assert not event.was_clean


@pytest.mark.parametrize("bad", [closed_port, detached_port], ids=["closed", "detached"])
def test_a_connection_refuses_ports_that_are_gone(pipe: tuple[Any, Any], bad: Callable[[], Port]) -> None:
    with pytest.raises(DataCloneError):
        pipe[0].send(bad())
    assert not pipe[1].poll()


# Queues


@sharing
@pytest.mark.parametrize("kind", ["Queue", "JoinableQueue", "SimpleQueue"])
def test_a_port_moves_through_a_queue(kind: str) -> None:
    kept, given = MessageChannel()
    kept.post_message("queued before")
    channel = getattr(multiprocessing, kind)()
    channel.put([given])
    (arrived,) = channel.get()
    assert given.detached
    assert arrived.recv(10) == "queued before"
    talk(kept, arrived)
    channel.close()


@sharing
@pytest.mark.parametrize("kind", ["Queue", "SimpleQueue"])
def test_a_port_moves_through_a_queue_into_another_process(context: Any, kind: str) -> None:
    channels = [MessageChannel() for _ in range(3)]
    waiting = getattr(context, kind)()
    process = context.Process(target=children.post_pid_on_ports_from, args=(waiting.get, len(channels)))
    with running(process):
        for each in channels:
            waiting.put(each.port2)
        assert [each.port1.recv(20) for each in channels] == [process.pid] * 3
    waiting.close()


@sharing
@pytest.mark.parametrize("kind", ["Queue", "SimpleQueue"])
def test_a_port_moves_through_a_queue_out_of_another_process(context: Any, kind: str) -> None:
    gate, gatekeeper = MessageChannel()
    results = getattr(context, kind)()
    with running(context.Process(target=children.put_port_that_says_pid, args=(results.put, gate))) as process:
        arrived = results.get()
        assert arrived.recv(20) == process.pid
        gatekeeper.post_message("leave")
        assert arrived.wait_closed(20)
    results.close()


# Pools


@sharing
def test_a_pool_moves_ports_in_arguments(pool_context: Any) -> None:
    channels = [MessageChannel() for _ in range(4)]
    with pool_context.Pool(2) as pool:
        pids = pool.map(children.post_pid, [each.port2 for each in channels])
        assert [each.port1.recv(20) for each in channels] == pids
        assert os.getpid() not in pids
        assert all(each.port2.detached for each in channels)
        pool.close()
        pool.join()


@sharing
def test_a_pool_moves_ports_in_results(pool_context: Any) -> None:
    with pool_context.Pool(1) as pool:
        found = [pool.apply(children.make_echoing_port, (label,)) for label in "ab"]
        for each in found:
            each["port"].post_message("hi")
        assert [each["port"].recv(20) for each in found] == [("a", "hi"), ("b", "hi")]
        pool.close()
        pool.join()
    for each in found:
        event = each["port"].wait_closed(20)
        assert event is not None
        assert event.reason == "exited"


@sharing
@pytest.mark.parametrize("bad", [closed_port, detached_port], ids=["closed", "detached"])
def test_a_pool_refuses_ports_that_are_gone_and_goes_on(bad: Callable[[], Port]) -> None:
    with mpchannel.get_context("fork").Pool(1) as pool:
        with pytest.raises(DataCloneError):
            pool.apply(children.post_pid, (bad(),))
        kept, given = MessageChannel()
        assert pool.apply(children.post_pid, (given,)) == kept.recv(20)
        pool.close()
        pool.join()


@sharing
def test_an_executor_moves_ports_in_arguments(pool_context: Any) -> None:
    channels = [MessageChannel() for _ in range(4)]
    with ProcessPoolExecutor(2, mp_context=pool_context) as executor:
        futures = [executor.submit(children.post_pid, each.port2) for each in channels]
        assert [each.port1.recv(20) for each in channels] == [future.result(20) for future in futures]
    assert all(each.port2.detached for each in channels)


@sharing
def test_an_executor_moves_ports_in_results(pool_context: Any) -> None:
    with ProcessPoolExecutor(1, mp_context=pool_context) as executor:
        found = executor.submit(children.make_echoing_port, "a").result(20)
        found["port"].post_message("hi")
        assert found["port"].recv(20) == ("a", "hi")
    event = found["port"].wait_closed(20)
    assert event is not None
    assert event.reason == "exited"


@sharing
@pytest.mark.parametrize("bad", [closed_port, detached_port], ids=["closed", "detached"])
def test_the_future_of_a_port_that_is_gone_tells_and_the_executor_goes_on(bad: Callable[[], Port]) -> None:
    with ProcessPoolExecutor(1, mp_context=mpchannel.get_context("fork")) as executor:
        with pytest.raises(DataCloneError):
            executor.submit(children.post_pid, bad()).result(20)
        kept, given = MessageChannel()
        assert executor.submit(children.post_pid, given).result(20) == kept.recv(20)
