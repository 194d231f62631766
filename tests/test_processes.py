"""Ports that move into other processes."""

from __future__ import annotations

import functools
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import mpchannel
from mpchannel import DataCloneError, MessageChannel, PortDetachedError

from . import children
from .children import ENDS, Port, Waiter, let_deliver, running

FULL = 1000
"""Small messages that are more than a socket holds (about 280): the rest is in an overflow file."""

Heard = queue.SimpleQueue[Any]
FAMILIES = {"mpchannel": mpchannel.get_context, "stdlib": multiprocessing.get_context}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def any_context(family: str, start_method: str) -> Any:
    """mpchannel's context and the stdlib's own, of each start method."""
    return FAMILIES[family](start_method)


@pytest.fixture(params=FAMILIES)
def fork_context(request: pytest.FixtureRequest) -> Any:
    return FAMILIES[request.param]("fork")


@pytest.fixture(params=[(family, method) for family in FAMILIES for method in ("spawn", "forkserver")], ids="-".join)
def pickling_context(request: pytest.FixtureRequest) -> Any:
    """Contexts whose processes are pickled."""
    family, method = request.param
    return FAMILIES[family](method)


def talk(one: Port, other: Port) -> None:
    assert one.post_message("there")
    assert other.recv(10) == "there"
    assert other.post_message("back")
    assert one.recv(10) == "back"


@pytest.mark.row("E04", "W46", "E41")
def test_a_port_given_to_a_process_answers_and_messages_from_before_its_start_arrive(context: Any) -> None:
    ours, theirs = mpchannel.MessageChannel()
    ours.post_message("posted before the start")
    process = context.Process(target=children.echo, args=(theirs,))
    process.start()
    ours.post_message("posted after the start")
    assert [ours.recv(20), ours.recv(20)] == ["posted before the start", "posted after the start"]
    ours.close()
    process.join(20)
    assert process.exitcode == 0


@pytest.mark.row("N41")
def test_the_parents_port_is_detached_when_start_returned(context: Any) -> None:
    ours, theirs = mpchannel.MessageChannel()
    process = context.Process(target=children.echo, args=(theirs,), name="the-echo")
    process.start()
    assert theirs.detached
    with pytest.raises(
        mpchannel.PortDetachedError, match=rf"given to 'the-echo', pid {process.pid}, at .*{os.path.basename(__file__)}"
    ):
        theirs.post_message("too late")
    ours.close()
    process.join(20)


# Where in a process a port may be


CARRIERS: dict[str, Callable[[Port], dict[str, Any]]] = {
    "argument": lambda port: {"target": children.answer, "args": (port,)},
    "keyword argument": lambda port: {"target": children.answer, "kwargs": {"port": port}},
    "dict in a list": lambda port: {"target": children.answer_in, "args": ([{"port": port}],)},
    "dataclass in a tuple": lambda port: {"target": children.answer_in, "args": ((children.Luggage(port),),)},
    "partial": lambda port: {"target": functools.partial(children.answer, port)},
    "bound method": lambda port: {"target": children.Luggage(port).answer},
}


@pytest.mark.row("N41", "N44")
@pytest.mark.parametrize("carrier", CARRIERS.values(), ids=CARRIERS.keys())
def test_a_port_moves_with_what_it_is_in(any_context: Any, carrier: Callable[[Port], dict[str, Any]]) -> None:
    ours, theirs = MessageChannel()
    with running(any_context.Process(**carrier(theirs))):
        assert theirs.detached
        ours.post_message("question")
        assert ours.recv(20) == ("answer", "question")


def test_a_port_moves_as_an_attribute_of_a_process_subclass(family: str, start_method: str) -> None:
    ours, theirs = MessageChannel()
    with running(children.TALKERS[family, start_method](theirs)):
        assert theirs.detached
        ours.post_message("question")
        assert ours.recv(20) == ("answer", "question")


def test_a_port_moves_in_a_closure_into_a_forked_process(fork_context: Any) -> None:
    ours, theirs = MessageChannel()

    def target() -> None:
        children.answer(theirs)

    with running(fork_context.Process(target=target)):
        assert theirs.detached
        ours.post_message("question")
        assert ours.recv(20) == ("answer", "question")


@pytest.mark.parametrize("shape", ["lambda", "default"])
def test_a_port_moves_in_a_lambda_into_a_forked_process(fork_context: Any, shape: str) -> None:
    ours, theirs = MessageChannel()
    target = {
        "lambda": lambda: children.answer_in([theirs]),
        "default": lambda port=theirs: children.answer(port),
    }[shape]
    with running(fork_context.Process(target=target)):
        assert theirs.detached
        ours.post_message("question")
        assert ours.recv(20) == ("answer", "question")


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_port_moves_in_a_closure_into_a_spawned_process(method: str) -> None:
    ours, theirs = MessageChannel()

    def target() -> None:
        children.answer(theirs)

    process = mpchannel.get_context(method).Process(target=target)
    process.start()
    assert theirs.detached
    ours.post_message("question")
    assert ours.recv(20) == ("answer", "question")
    process.join(20)


@pytest.mark.row("N41", "X18")
def test_several_ports_move_at_once_and_do_not_mix(any_context: Any) -> None:
    channels = [MessageChannel() for _ in range(5)]
    with running(
        any_context.Process(target=children.answer_each_with_its_place, args=[each.port2 for each in channels])
    ) as process:
        for place, each in enumerate(channels):
            each.port1.post_message(f"message {place}")
            assert each.port1.recv(20) == (place, f"message {place}", process.pid)


@pytest.mark.row("X18")
def test_processes_with_a_port_each_answer_for_themselves(context: Any) -> None:
    channels = [MessageChannel() for _ in range(2)]
    processes = [context.Process(target=children.answer_each_with_its_place, args=(each.port2,)) for each in channels]
    with running(processes[0]), running(processes[1]):
        for process, each in zip(processes, channels, strict=True):
            each.port1.post_message(process.name)
            assert each.port1.recv(20) == (0, process.name, process.pid)


def test_both_ends_of_a_channel_move_into_one_process(any_context: Any) -> None:
    one, other = MessageChannel()
    report, to_report = MessageChannel()
    one.post_message("from before")
    one.close()
    with running(any_context.Process(target=children.say_started_and_report_all, args=(other, to_report))):
        assert [report.recv(20), report.recv(20)] == ["started", ["from before"]]


def test_the_default_process_moves_ports() -> None:
    ours, theirs = MessageChannel()
    with running(mpchannel.Process(target=children.answer, args=(theirs,))):
        assert theirs.detached
        ours.post_message("question")
        assert ours.recv(20) == ("answer", "question")


@pytest.mark.row("H07")
def test_a_port_arrives_in_a_process_as_new_and_its_old_listeners_are_gone(any_context: Any) -> None:
    kept, given = MessageChannel()
    report, to_report = MessageChannel()
    heard: Heard = queue.SimpleQueue()
    given.onmessage = lambda event: heard.put(event.data)
    given.onclose = heard.put
    kept.post_message("for the parent")
    assert heard.get(timeout=10) == "for the parent"
    with running(any_context.Process(target=children.report_state, args=(given, to_report))):
        kept.post_message("for the child")
        kept.close()
        assert report.recv(20) == (False, False, None, None, ["for the child"])
    let_deliver()
    assert heard.empty()


@pytest.mark.row("W27", "W26", "E17")
def test_an_overflowing_queue_with_ports_in_it_moves_into_a_process(any_context: Any) -> None:
    kept, given = MessageChannel()
    report, to_report = MessageChannel()
    nested = {}
    for number in range(FULL):
        if number % 50:
            kept.post_message(number)
        else:
            nested[number], inner = MessageChannel()
            kept.post_message(number, transfer=[inner])
    read = [given.recv(10) for _ in range(FULL // 3)]
    with running(any_context.Process(target=children.say_started_and_report_all, args=(given, to_report))):
        assert report.recv(20) == "started"
        kept.post_message("last")
        kept.close()
        assert read + report.recv(20) == [*range(FULL), "last"]
    # Nobody in the child kept the ports that came along.
    for each in nested.values():
        event = each.wait_closed(20)
        assert event is not None
        assert event.reason == "collected"


@pytest.mark.row("W27", "W26", "E16", "E17")
def test_an_overflowing_queue_with_ports_in_it_is_posted_to_a_process(context: Any) -> None:
    ours, theirs = MessageChannel()
    kept, given = MessageChannel()
    nested = {}
    for number in range(FULL):
        if number % 50:
            kept.post_message(number)
        else:
            nested[number], inner = MessageChannel()
            kept.post_message(number, transfer=[inner])
    with running(context.Process(target=children.report_queue_of_received_port, args=(theirs,))):
        ours.post_message(None, transfer=[given])
        kept.close()
        assert ours.recv(20) == list(range(FULL))
        assert {number: each.recv(20) for number, each in nested.items()} == {number: number for number in nested}


@pytest.mark.row("W25", "W27")
def test_what_a_process_posts_comes_after_what_was_posted_before_it_was_given_the_port(any_context: Any) -> None:
    kept, given = MessageChannel()
    for number in range(FULL):
        given.post_message(("parent", number))
    with running(any_context.Process(target=children.post_pid_many_times, args=(given, FULL))) as process:
        pass
    assert list(kept) == [*(("parent", number) for number in range(FULL)), *[process.pid] * FULL]


# Ports posted to processes


@pytest.mark.row("E01", "N14", "E04")
def test_a_port_posted_to_a_process_answers_its_peer(context: Any) -> None:
    ours, theirs = MessageChannel()
    with running(context.Process(target=children.report_pid_of_received_port, args=(theirs,))) as process:
        kept, given = MessageChannel()
        ours.post_message({"port": given}, transfer=[given])
        assert kept.recv(20) == process.pid
        event = kept.wait_closed(20)
        assert event is not None
        assert (event.reason, event.pid) == ("closed", process.pid)


@pytest.mark.row("E06")
def test_a_port_is_forwarded_through_a_process_to_another(context: Any) -> None:
    source, theirs = MessageChannel()
    onward, last = MessageChannel()
    broker = context.Process(target=children.forward, args=(theirs, onward))
    receiver = context.Process(target=children.report_pid_of_received_port, args=(last,))
    with running(broker), running(receiver):
        kept, given = MessageChannel()
        source.post_message(None, transfer=[given])
        assert kept.recv(20) == receiver.pid
        source.close()


@pytest.mark.row("W12", "X18")
def test_two_processes_talk_directly_while_the_parent_does_nothing(any_context: Any) -> None:
    near, far = MessageChannel()
    report, to_report = MessageChannel()
    go, gate = MessageChannel()
    with (
        running(any_context.Process(target=children.ping, args=(near, to_report, gate, 100))),
        running(any_context.Process(target=children.echo, args=(far,))),
    ):
        del near, far
        go.post_message("go")
        assert report.recv(20) == list(range(100))


@pytest.mark.row("W12", "W27")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_two_processes_talk_directly_after_the_one_that_introduced_them_is_gone(method: str) -> None:
    near, far = MessageChannel()
    report, to_report = MessageChannel()
    go, gate = MessageChannel()
    life, to_live = MessageChannel()
    introducer = mpchannel.get_context(method).Process(
        target=children.introduce_and_leave, args=(method, to_live, near, far, to_report, gate, 100)
    )
    with running(introducer):
        event = life.wait_closed(20)
        assert event is not None
        assert (event.reason, event.pid) == ("died", introducer.pid)
        go.post_message("go")
        assert report.recv(20) == list(range(100))
        event = report.wait_closed(20)
        assert event is not None
        assert event.reason == "exited"


@pytest.mark.row("E07")
def test_the_close_right_after_a_port_was_given_to_a_process_reaches_it(context: Any) -> None:
    kept, given = MessageChannel()
    report, to_report = MessageChannel()
    with running(context.Process(target=children.report_close, args=(given, to_report))):
        kept.close()
        assert [report.recv(20), report.recv(20)] == ["started", [("close", "closed", os.getpid())]]


@pytest.mark.row("E47")
def test_a_reply_stream_is_its_items_in_order_and_then_one_close(context: Any) -> None:
    ours, theirs = MessageChannel()
    with running(context.Process(target=children.answer_requests, args=(theirs,))):
        for count in (0, 1, FULL):
            replies, reply = MessageChannel()
            heard: Heard = queue.SimpleQueue()
            replies.onclose = heard.put
            replies.onmessage = lambda event, heard=heard: heard.put(event.data)
            ours.post_message(count, transfer=[reply])
            assert [heard.get(timeout=20) for _ in range(count)] == list(range(count))
            assert heard.get(timeout=20).reason == "closed"
            let_deliver()
            assert heard.empty()
        ours.close()


# A process that does not start


@pytest.mark.row("N41", "H17")
def test_a_start_that_cannot_be_pickled_detaches_nothing(pickling_context: Any) -> None:
    kept, given = MessageChannel()
    kept.post_message("queued before")
    process = pickling_context.Process(target=children.ignore, args=(given, threading.Lock()))
    with pytest.raises(TypeError, match="lock"):
        process.start()
    assert not given.detached
    assert given.recv(10) == "queued before"
    talk(kept, given)


def test_after_a_start_that_could_not_be_pickled_the_port_can_be_given_again(pickling_context: Any) -> None:
    ours, theirs = MessageChannel()
    with pytest.raises(TypeError, match="lock"):
        pickling_context.Process(target=children.answer, args=(theirs, threading.Lock())).start()
    with running(pickling_context.Process(target=children.answer, args=(theirs,))):
        ours.post_message("question")
        assert ours.recv(20) == ("answer", "question")


def test_after_a_start_that_could_not_be_pickled_the_port_can_be_posted(pickling_context: Any) -> None:
    kept, given = MessageChannel()
    with pytest.raises(TypeError, match="lock"):
        pickling_context.Process(target=children.ignore, args=(given, threading.Lock())).start()
    near, far = MessageChannel()
    near.post_message(None, transfer=[given])
    talk(kept, *far.receive(10).ports)


def test_after_a_start_that_could_not_be_pickled_listeners_go_on(pickling_context: Any) -> None:
    kept, given = MessageChannel()
    heard: Heard = queue.SimpleQueue()
    given.onmessage = lambda event: heard.put(event.data)
    with pytest.raises(TypeError, match="lock"):
        pickling_context.Process(target=children.ignore, args=(given, threading.Lock())).start()
    kept.post_message("still there")
    assert heard.get(timeout=10) == "still there"


def test_listeners_go_on_while_the_error_of_a_failed_start_is_kept(pickling_context: Any) -> None:
    # Its traceback refers to all that took part in the start.
    kept, given = MessageChannel()
    heard: Heard = queue.SimpleQueue()
    given.onmessage = lambda event: heard.put(event.data)
    with pytest.raises(TypeError) as caught:
        pickling_context.Process(target=children.ignore, args=(given, threading.Lock())).start()
    kept.post_message("still there")
    assert heard.get(timeout=10) == "still there"
    assert "lock" in str(caught.value)


def test_another_thread_receives_while_the_error_of_a_failed_start_is_kept(pickling_context: Any) -> None:
    kept, given = MessageChannel()
    waiter = Waiter(lambda: given.recv(10)).blocks()
    with pytest.raises(TypeError) as caught:
        pickling_context.Process(target=children.ignore, args=(given, threading.Lock())).start()
    kept.post_message("still there")
    assert waiter.result() == "still there"
    assert "lock" in str(caught.value)


@pytest.mark.row("W11", "W52")
@pytest.mark.parametrize("gone", ["closed", "detached"])
def test_a_port_that_is_gone_among_the_arguments_makes_start_raise(context: Any, gone: str) -> None:
    kept, given = MessageChannel()
    peer, bad = MessageChannel()
    near, far = MessageChannel()
    if gone == "closed":
        bad.close()
    else:
        near.post_message(None, transfer=[bad])
    process = context.Process(target=children.ignore, args=(given, bad))
    with pytest.raises(DataCloneError, match="is a closed port" if gone == "closed" else "is a port that was posted"):
        process.start()
    assert process.pid is None
    assert not given.detached
    talk(kept, given)
    for port in (peer, near, far):
        port.close()


@pytest.mark.row("W11", "W52")
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_port_that_is_closed_makes_the_start_of_a_stdlib_process_raise(method: str) -> None:
    kept, given = MessageChannel()
    bad = MessageChannel().port1
    bad.close()
    process = multiprocessing.get_context(method).Process(  # type: ignore[attr-defined]
        target=children.ignore, args=(given, bad)
    )
    with pytest.raises(DataCloneError, match="is a closed port"):
        process.start()
    talk(kept, given)


def test_a_process_that_was_never_started_gives_its_ports_back(any_context: Any) -> None:
    kept, given = MessageChannel()
    any_context.Process(target=children.ignore, args=(given,))
    talk(kept, given)


# Threads that use a port while it is given away


def test_a_thread_that_receives_wakes_when_the_port_is_given_to_a_process(any_context: Any) -> None:
    kept, given = MessageChannel()
    waiter = Waiter(given.recv).blocks()
    with running(any_context.Process(target=children.answer, args=(given,))):
        assert isinstance(waiter.result(), PortDetachedError)
        kept.post_message("question")
        assert kept.recv(20) == ("answer", "question")


def test_nothing_is_lost_or_doubled_when_a_port_is_given_away_under_a_reading_thread(any_context: Any) -> None:
    count = 3 * FULL
    kept, given = MessageChannel()
    report, to_report = MessageChannel()
    read: list[int] = []
    first = threading.Event()

    def take() -> None:
        while True:
            read.append(given.recv())
            first.set()

    reader = Waiter(take)
    poster = Waiter(lambda: [kept.post_message(number) for number in range(count)])
    assert first.wait(10)
    process = any_context.Process(target=children.say_started_and_report_all, args=(given, to_report))
    with running(process):
        assert isinstance(reader.result(), PortDetachedError)
        assert all(poster.result())
        kept.close()
        assert report.recv(20) == "started"
        assert read + report.recv(20) == list(range(count))


def test_nothing_is_lost_or_doubled_when_a_started_port_is_given_away(any_context: Any) -> None:
    count = 3 * FULL
    kept, given = MessageChannel()
    report, to_report = MessageChannel()
    read: list[int] = []
    first = threading.Event()

    def take(event: Any) -> None:
        read.append(event.data)
        first.set()

    given.onmessage = take
    poster = Waiter(lambda: [kept.post_message(number) for number in range(count)])
    assert first.wait(10)
    process = any_context.Process(target=children.say_started_and_report_all, args=(given, to_report))
    with running(process):
        let_deliver()
        assert all(poster.result())
        kept.close()
        assert report.recv(20) == "started"
        assert read + report.recv(20) == list(range(count))


def test_a_started_port_that_was_given_away_leaves_no_copy_of_itself_behind(any_context: Any) -> None:
    # A copy of its descriptor in this process would hide the death of its holder.
    kept, given = MessageChannel()
    heard: Heard = queue.SimpleQueue()
    given.onmessage = heard.put
    kept.post_message("for the parent")
    assert heard.get(timeout=10).data == "for the parent"
    process = any_context.Process(target=children.end_when_told, args=(given, "SIGKILL"))
    with running(process, ends_with=-signal.SIGKILL):
        assert kept.recv(20) == "ready"
        kept.post_message("end now")
        event = kept.wait_closed(20)
        assert event is not None
        assert event.reason == "died"


# Processes that do nothing with their ports


@pytest.mark.row("X36")
def test_a_process_that_ignores_its_port_ends_in_order(any_context: Any) -> None:
    ours, theirs = MessageChannel()
    for number in range(10):
        ours.post_message(number)
    with running(any_context.Process(target=children.ignore, args=(theirs,))) as process:
        for number in range(10):
            ours.post_message(number)
        event = ours.wait_closed(20)
        assert event is not None
        assert (event.reason, event.pid) == ("exited", process.pid)


@pytest.mark.row("X36")
def test_ports_in_messages_that_a_process_never_looked_at_close(context: Any) -> None:
    ours, theirs = MessageChannel()
    kept, given = MessageChannel()
    ours.post_message(None, transfer=[given])
    with running(context.Process(target=children.ignore, args=(theirs,))):
        event = kept.wait_closed(20)
        assert event is not None
        assert event.reason == "undeliverable"


# Ports that a forked child was not given


@contextmanager
def forked_sibling(context: Any) -> Iterator[Port]:
    """The port of a forked process that echoes, and inherits all that is open now."""
    ours, theirs = MessageChannel()
    with running(context.Process(target=children.echo, args=(theirs,))):
        ours.post_message("alive")
        assert ours.recv(20) == "alive"
        yield ours
        ours.post_message("still alive")
        assert ours.recv(20) == "still alive"
        ours.close()


def test_the_death_of_a_holder_is_seen_although_a_forked_sibling_lives(fork_context: Any, context: Any) -> None:
    kept, given = MessageChannel()
    with forked_sibling(fork_context):
        process = context.Process(target=children.end_when_told, args=(given, "SIGKILL"))
        with running(process, ends_with=-signal.SIGKILL):
            assert kept.recv(20) == "ready"
            kept.post_message("end now")
            event = kept.wait_closed(20)
            assert event is not None
            assert (event.reason, event.pid) == ("died", process.pid)


def test_a_port_in_flight_at_a_fork_is_no_different(fork_context: Any) -> None:
    kept, given = MessageChannel()
    near, far = MessageChannel()
    for number in range(FULL):
        near.post_message(number)
    near.post_message("the port", transfer=[given])
    process = fork_context.Process(target=children.report_queue_of_received_port, args=(far,))
    with forked_sibling(fork_context):
        del far
        with running(process, ends_with=None):
            process.kill()
            event = kept.wait_closed(20)
            assert event is not None
            assert event.reason in ("died", "undeliverable")


def test_the_death_of_a_parent_is_seen_although_its_forked_child_lives(fork_context: Any) -> None:
    kept, given = MessageChannel()
    life, to_live = MessageChannel()
    parent = fork_context.Process(target=children.fork_and_wait, args=(given, to_live))
    with running(parent, ends_with=-signal.SIGKILL):
        assert kept.recv(20) == "started"
        life.post_message("alive")
        assert life.recv(20) == "alive"
        parent.kill()
        event = kept.wait_closed(20)
        assert event is not None
        assert (event.reason, event.pid) == ("died", parent.pid)
        life.post_message("still alive")
        assert life.recv(20) == "still alive"
        life.close()


def test_using_a_port_that_a_forked_child_was_not_given_raises_port_detached_error(
    fork_context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer, kept = MessageChannel()
    monkeypatch.setattr(children, "kept", kept)
    report, to_report = MessageChannel()
    peer.post_message("for the parent")
    with running(fork_context.Process(target=children.use_kept, args=(to_report,))):
        found = {name: (kind, text) for name, kind, text in (report.recv(20) for _ in range(4))}
        assert report.recv(20) == ("state", False, True)
        report.post_message("end")
    for name in ("post_message", "receive", "poll"):
        kind, text = found[name]
        assert kind == "PortDetachedError"
        assert f"left with process {os.getpid()}, which forked this one (pass it in args=(port,) instead)" in text
    kind, text = found["transfer"]
    assert kind == "DataCloneError"
    assert f"left with process {os.getpid()}" in text


def test_what_a_forked_child_does_with_a_port_it_was_not_given_does_not_touch_the_channel(
    fork_context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer, kept = MessageChannel()
    monkeypatch.setattr(children, "kept", kept)
    report, to_report = MessageChannel()
    peer.post_message("for the parent")
    with running(fork_context.Process(target=children.use_kept, args=(to_report,))):
        for _ in range(5):
            report.recv(20)
        assert kept.recv(10) == "for the parent"
        talk(peer, kept)
        report.post_message("end")
    talk(peer, kept)
    assert not peer.poll()


def test_a_listener_of_the_parent_goes_on_after_a_fork_and_does_not_run_in_the_child(fork_context: Any) -> None:
    heard: Heard = queue.SimpleQueue()
    peer, kept = MessageChannel()
    kept.onmessage = lambda event: heard.put((event.data, os.getpid()))
    with forked_sibling(fork_context):
        peer.post_message("hi")
        assert heard.get(timeout=10) == ("hi", os.getpid())


def run(script: str) -> str:
    """Output of a script, which must end in order and without a word on stderr."""
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


@pytest.mark.parametrize("package", ["mpchannel", "multiprocessing"])
def test_nothing_warns_when_a_process_with_a_delivery_thread_forks(package: str) -> None:
    output = run(
        f"""
        import queue, mpchannel, {package} as package

        def child(port):
            heard = queue.SimpleQueue()
            port.onmessage = lambda event: heard.put(event.data)
            port.post_message(heard.get() + 1)

        heard = queue.SimpleQueue()
        port1, port2 = mpchannel.MessageChannel()
        port2.onmessage = lambda event: heard.put(event.data)
        for number in range(20):
            port1.post_message(number)
            assert heard.get() == number
            ours, theirs = mpchannel.MessageChannel()
            process = package.get_context("fork").Process(target=child, args=(theirs,))
            process.start()
            ours.post_message(number)
            assert ours.recv(20) == number + 1
            process.join()
            assert process.exitcode == 0
        print("end")
        """
    )
    assert output == "end\n"


# The last words of a process


@pytest.mark.parametrize("how", ["return", "_exit", "SIGKILL"])
@pytest.mark.parametrize(("size", "count"), [(10, 3), (10, FULL), (100_000, 4), (200_000, 4), (5_000_000, 2)])
def test_what_a_forked_process_posted_right_before_its_end_arrives(size: int, count: int, how: str) -> None:
    context = mpchannel.get_context("fork")
    for round in range(8):
        ours, theirs = MessageChannel()
        with running(
            context.Process(target=children.post_many_and_end, args=(theirs, size, count, how)), ends_with=ENDS[how]
        ) as process:
            if round % 2:
                process.join(20)
            received = list(ours)
        assert [(int.from_bytes(each[:4], "little"), len(each)) for each in received] == [
            (number, size) for number in range(count)
        ]


@pytest.mark.parametrize("how", ["return", "_exit"])
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_what_a_spawned_process_posted_right_before_its_end_arrives(method: str, how: str) -> None:
    context = mpchannel.get_context(method)
    for size, count in [(10, FULL), (5_000_000, 2)]:
        ours, theirs = MessageChannel()
        process = context.Process(target=children.post_many_and_end, args=(theirs, size, count, how))
        with running(process, ends_with=ENDS[how]):
            received = list(ours)
        assert [(int.from_bytes(each[:4], "little"), len(each)) for each in received] == [
            (number, size) for number in range(count)
        ]
