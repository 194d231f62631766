"""Forks of every kind: a child holds what it was given, and nothing that it only inherited."""

from __future__ import annotations

import functools
import gc
import os
import random
import signal
import threading
import time
import weakref
from typing import Any, Self

import pytest

import mpchannel
from mpchannel import _kernel

from . import children

in_raw_child = children.in_raw_child


class LivingChild:
    """A child of ``os.fork`` that lives until ``end()``."""

    def __init__(self) -> None:
        out, self.into = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            signal.alarm(100)  # it must not outlive the tests, whatever happens to them
            os.read(out, 1)
            os._exit(0)
        os.close(out)

    def end(self) -> None:
        os.write(self.into, b"!")
        os.close(self.into)
        assert os.waitpid(self.pid, 0) == (self.pid, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


# What a raw fork inherits


def test_a_port_that_a_raw_fork_inherited_is_detached_there_and_says_why(channel: tuple[Any, Any]) -> None:
    port1, port2 = channel
    port2.post_message("for the parent")

    def look() -> list[Any]:
        found: list[Any] = [port1.detached, port1.closed]
        for use in (port1.recv, functools.partial(port1.post_message, "from the child")):
            try:
                found.append(use())
            except mpchannel.PortDetachedError as error:
                found.append(str(error))
        port1.close()
        port1.start()
        return found

    detached, closed, *texts = in_raw_child(look)
    assert (detached, closed) == (True, False)
    assert all(f"left with process {os.getpid()}" in text and "args=(port,)" in text for text in texts), texts
    assert port1.recv(5) == "for the parent"
    port1.post_message("still open")
    assert port2.recv(5) == "still open"


def test_a_raw_child_holds_no_socket_of_its_parents_channels() -> None:
    without = in_raw_child(children.open_sockets)
    port1, port2 = mpchannel.MessageChannel()
    port1.onclose = print  # watched by the delivery thread
    kept, moved = mpchannel.MessageChannel()
    for number in range(2000):
        port2.post_message(number)
    port2.post_message("a port", [moved])
    assert port1.recv(5) == 0  # the reader has the overflow file and its lane open
    assert in_raw_child(children.open_sockets) == without
    assert [port1.recv(5) for _ in range(1999)] == list(range(1, 2000))
    port1.receive(5).ports[0].close()
    assert kept.wait_closed(5).reason == "closed"
    port1.close()
    port2.close()


@pytest.mark.parametrize("collect", [False, True], ids=("closed", "collected"))
def test_a_close_reaches_the_other_end_while_a_raw_child_lives(collect: bool) -> None:
    port1, port2 = mpchannel.MessageChannel()
    with LivingChild():
        if collect:
            del port1
        else:
            port1.close()
        assert port2.wait_closed(5).reason == ("collected" if collect else "closed")


@pytest.mark.parametrize("how", ["_exit", "exit"])
def test_the_end_of_a_raw_child_closes_nothing_of_its_parents(how: str) -> None:
    result = children.run_script(
        f"""
        import os, sys, mpchannel
        a, b = mpchannel.MessageChannel()
        for number in range(2000):
            a.post_message(number)
        if os.fork() == 0:
            if {how!r} == "_exit":
                os._exit(0)
            sys.exit(0)  # with everything that runs at exit
        assert os.wait()[1] == 0
        assert [b.recv(5) for _ in range(2000)] == list(range(2000))
        b.post_message("still open")
        assert a.recv(5) == "still open"
        """
    )
    assert (result.returncode, result.stderr) == (0, ""), result.stderr


def test_a_raw_child_may_have_channels_and_listeners_of_its_own(channel: tuple[Any, Any]) -> None:
    port1, port2 = channel
    heard = threading.Event()
    port2.onmessage = lambda event: heard.set()  # so that the parent has a delivery thread
    port1.post_message("start")
    assert heard.wait(5)

    def use() -> list[Any]:
        mine, other = mpchannel.MessageChannel()
        got: list[Any] = []
        done = threading.Event()
        other.onmessage = lambda event: got.append(event.data)
        other.onclose = lambda event: (got.append(event.reason), done.set())
        mine.post_message("a message")
        mine.close()
        return [done.wait(10), got]

    assert in_raw_child(use) == [True, ["a message", "closed"]]


def test_a_listener_of_the_parent_does_not_run_in_a_raw_child(channel: tuple[Any, Any]) -> None:
    port1, port2 = channel
    mine = os.getpid()
    heard: list[int] = []
    done = threading.Event()

    def listen(event: Any) -> None:
        heard.append(os.getpid())
        if event.data == "last":
            done.set()

    port2.onmessage = listen
    for _ in range(20):
        port1.post_message("from the parent")
        with LivingChild():
            port1.post_message("while the child lives")
    port1.post_message("last")
    assert done.wait(5)
    assert heard == [mine] * 41


def test_a_raw_child_of_a_raw_child_is_no_holder_either() -> None:
    without = in_raw_child(children.open_sockets)
    port1, port2 = mpchannel.MessageChannel()

    def fork_again() -> Any:
        return in_raw_child(lambda: (port1.detached, children.open_sockets()))

    assert in_raw_child(fork_again) == (True, without)
    port1.post_message("untouched")
    assert port2.recv(5) == "untouched"
    port1.close()
    port2.close()


# What a process of multiprocessing inherits


def test_a_port_that_was_inherited_but_not_given_is_detached_in_the_child(channel: tuple[Any, Any]) -> None:
    port1, port2 = channel
    gate, theirs = mpchannel.MessageChannel()
    forgotten = list(channel)
    context = mpchannel.get_context("fork")

    class Target:  # holds them where nobody looks
        def __call__(self, given: Any) -> None:
            children.use_only_what_was_given(given, inherited())

    def inherited() -> list[Any]:
        return [port for port in (ref() for ref in references) if port is not None]

    references = [weakref.ref(port) for port in forgotten]
    with children.running(context.Process(target=Target(), args=(theirs,))):
        for _ in range(2):
            assert f"left with process {os.getpid()}" in gate.recv(20)
        # The child lives, and has no part in the channel:
        port1.close()
        assert port2.wait_closed(5).reason == "closed"
        gate.post_message("that is all")
    gate.close()


def test_all_three_of_given_kept_and_forgotten_ports_work_as_they_should() -> None:
    context = mpchannel.get_context("fork")
    to_child, given = mpchannel.MessageChannel()
    kept1, kept2 = mpchannel.MessageChannel()
    with children.running(context.Process(target=children.echo, args=(given,))):
        kept1.post_message("in the parent")
        to_child.post_message("to the child")
        assert kept2.recv(5) == "in the parent"
        assert to_child.recv(20) == "to the child"
        kept1.close()
        assert kept2.wait_closed(5).reason == "closed"
        assert given.detached
        to_child.close()


# Forks of a busy program


class Busy:
    """Threads that post, receive, listen, transfer and create without end, and check what they get."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.failures: list[BaseException] = []
        self.rounds = dict.fromkeys(("stream", "transfer", "overflow", "listen"), 0)
        self.threads = [threading.Thread(target=self.run, args=(name,)) for name in self.rounds]

    def run(self, name: str) -> None:
        try:
            while not self.stop.is_set():
                getattr(self, name)()
                self.rounds[name] += 1
        except BaseException as error:  # noqa: BLE001  # raised again in the main thread
            self.failures.append(error)

    def stream(self) -> None:
        near, far = mpchannel.MessageChannel()
        for number in range(100):
            near.post_message(number)
            assert far.recv(20) == number
        near.close()
        assert far.wait_closed(20).reason == "closed"

    def transfer(self) -> None:
        near, far = mpchannel.MessageChannel()
        for number in range(10):
            mine, moving = mpchannel.MessageChannel()
            near.post_message(number, [moving])
            (arrived,) = far.receive(20).ports
            mine.post_message(number)
            mine.close()
            assert list(arrived) == [number]
        far.close()
        assert near.wait_closed(20).reason == "closed"

    def overflow(self) -> None:
        near, far = mpchannel.MessageChannel()
        mine, moving = mpchannel.MessageChannel()
        for number in range(500):
            near.post_message(number)
        near.post_message(bytes(200_000), [moving])
        near.close()
        assert [far.recv(20) for _ in range(500)] == list(range(500))
        assert len(far.receive(20).ports) == 1
        assert mine.wait_closed(20).reason == "collected"
        assert far.wait_closed(20).reason == "closed"

    def listen(self) -> None:
        near, far = mpchannel.MessageChannel()
        heard: list[Any] = []
        closed = threading.Event()
        far.onmessage = lambda event: heard.append(event.data)
        far.onclose = lambda event: (heard.append(event.reason), closed.set())
        for number in range(20):
            near.post_message(number)
        near.close()
        assert closed.wait(20)
        assert heard == [*range(20), "closed"]

    def __enter__(self) -> Self:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self.threads)
        if self.failures:
            raise self.failures[0]
        assert min(self.rounds.values()) > 0, self.rounds


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # they are this test's threads
def test_100_raw_forks_of_a_busy_program_end_cleanly_and_no_close_is_missed() -> None:
    with Busy() as busy:
        alive: list[LivingChild] = []
        for _ in range(100):
            alive.append(LivingChild())
            if len(alive) > 5:
                alive.pop(0).end()
            assert not busy.failures
        for child in alive:
            child.end()


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_raw_fork_at_any_moment_of_a_busy_program_inherits_no_end_of_a_channel() -> None:
    without = in_raw_child(children.open_descriptors)
    with Busy():
        for _ in range(300):
            assert in_raw_child(children.open_descriptors) == without, "descriptors that nobody closed in the child"


class ForksWhenCollected:
    """In a cycle with what is given; its finaliser says what a child holds that is forked in the midst of all this."""

    def __init__(self, said: list[Any], *others: object) -> None:
        self.said = said
        self.cycle = [self, *others]

    def __del__(self) -> None:
        self.said.append(in_raw_child(children.open_descriptors))


@pytest.mark.parametrize("make", [_kernel.socket_pair, _kernel.Bell, _kernel.Memory.create, mpchannel.MessageChannel])
def test_a_fork_in_the_midst_of_a_garbage_collection_inherits_nothing_of_what_is_collected(make: Any) -> None:
    said: list[Any] = []
    without = in_raw_child(children.open_descriptors)
    ForksWhenCollected(said, make())  # the collector clears weak references to all of it before it finalises any of it
    gc.collect()
    assert said == [without]


def test_descriptors_that_somebody_closed_behind_our_back_stop_nothing() -> None:
    bell = _kernel.Bell()
    os.close(bell.fileno())
    del bell
    other = threading.Thread(target=mpchannel.MessageChannel, daemon=True)
    other.start()  # it would wait for ever, if this one still held what forks wait for
    other.join(20)
    assert not other.is_alive()


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_processes_forked_by_a_busy_program_answer_on_the_ports_they_were_given() -> None:
    context = mpchannel.get_context("fork")
    with Busy():
        for number in range(25):
            ours, theirs = mpchannel.MessageChannel()
            with children.running(context.Process(target=children.echo, args=(theirs,))):
                ours.post_message(number)
                assert ours.recv(20) == number
                ours.close()


def test_a_fork_while_another_thread_waits_in_receive_leaves_it_waiting(channel: tuple[Any, Any]) -> None:
    port1, port2 = channel
    got: list[Any] = []

    def wait() -> None:
        got.append(port2.receive().data)
        try:
            port2.receive()
        except mpchannel.PortClosedError as error:
            got.append(error.reason)

    thread = threading.Thread(target=wait)
    thread.start()
    for _ in range(10):
        assert in_raw_child(lambda: port2.detached) is True
    port1.post_message("after the forks")
    with LivingChild():
        port1.close()
        thread.join(5)
    assert got == ["after the forks", "closed"]


def test_a_fork_while_another_thread_is_in_the_middle_of_a_large_post_keeps_it_whole(channel: tuple[Any, Any]) -> None:
    port1, port2 = channel
    blob = random.randbytes(1 << 20)
    done = threading.Event()

    def post() -> None:
        for number in range(60):
            port1.post_message((number, blob))
        done.set()

    thread = threading.Thread(target=post)
    thread.start()
    while not done.is_set():
        in_raw_child(lambda: None)
    thread.join()
    for number in range(60):
        assert port2.recv(5) == (number, blob)


# Forks from and beside listeners


def test_a_listener_may_fork_and_delivery_goes_on_in_the_parent_only(channel: tuple[Any, Any]) -> None:
    port1, port2 = channel
    heard: list[Any] = []
    done = threading.Event()

    def listen(event: Any) -> None:
        heard.append((event.data, in_raw_child(lambda: port2.detached)))
        if event.data == 4:
            done.set()

    port2.onmessage = listen
    for number in range(5):
        port1.post_message(number)
    assert done.wait(20)
    assert heard == [(number, True) for number in range(5)]


def test_a_listener_may_start_a_process_with_a_port(channel: tuple[Any, Any]) -> None:
    port1, port2 = channel
    context = mpchannel.get_context("fork")
    answers: list[Any] = []
    done = threading.Event()

    def listen(event: Any) -> None:
        ours, theirs = mpchannel.MessageChannel()
        with children.running(context.Process(target=children.echo, args=(theirs,))):
            ours.post_message(event.data)
            answers.append(ours.recv(20))
            ours.close()
        if event.data == 2:
            done.set()

    port2.onmessage = listen
    for number in range(3):
        port1.post_message(number)
    assert done.wait(30)
    assert answers == [0, 1, 2]


def test_a_fork_does_not_wait_for_ever_for_a_listener_that_is_running(channel: tuple[Any, Any]) -> None:
    port1, port2 = channel
    running, may_end, ended = threading.Event(), threading.Event(), threading.Event()
    heard: list[Any] = []

    def listen(event: Any) -> None:
        heard.append(event.data)
        if event.data == "long":
            running.set()
            may_end.wait(60)
        else:
            ended.set()

    port2.onmessage = listen
    port1.post_message("long")
    assert running.wait(5)
    began = time.monotonic()
    assert in_raw_child(lambda: "forked") == "forked"
    assert time.monotonic() - began < 10
    port1.post_message("next")
    may_end.set()
    assert ended.wait(5)
    assert heard == ["long", "next"]


def test_messages_that_come_during_a_fork_are_heard_after_it(channel: tuple[Any, Any]) -> None:
    port1, port2 = channel
    heard: list[int] = []
    done = threading.Event()

    def listen(event: Any) -> None:
        heard.append(event.data)
        if event.data == 5000:
            done.set()

    port2.onmessage = listen
    posted = 0
    while posted < 5000:
        for _ in range(100):
            port1.post_message(posted)
            posted += 1
        in_raw_child(lambda: None)
    port1.post_message(posted)
    assert done.wait(20)
    assert heard == list(range(5001))


# No warnings, no threads


QUIET = """
import os, sys, threading, warnings
import mpchannel
a, b = mpchannel.MessageChannel()
heard = []
both = threading.Semaphore(0)
b.onmessage = lambda event: (heard.append(event.data), both.release())
a.post_message("before")
both.acquire(timeout=10)
"""


def test_a_raw_fork_beside_the_delivery_thread_warns_of_nothing() -> None:
    result = children.run_script(
        QUIET
        + """
for number in range(20):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    a.post_message(number)
    assert both.acquire(timeout=10), "delivery did not go on after the fork"
assert heard == ["before", *range(20)], heard
""",
        "-W",
        "always",
    )
    assert (result.returncode, result.stderr) == (0, ""), result.stderr


def test_starting_processes_beside_the_delivery_thread_warns_of_nothing() -> None:
    result = children.run_script(
        QUIET
        + """
for module in ("mpchannel", "multiprocessing"):
    context = __import__(module).get_context("fork")
    for number in range(10):
        ours, theirs = mpchannel.MessageChannel()
        process = context.Process(target=theirs.post_message, args=(number,))
        process.start()
        assert ours.recv(20) == number
        process.join()
        assert process.exitcode == 0
        a.post_message(number)
        assert both.acquire(timeout=10), "delivery did not go on after the fork"
""",
        "-W",
        "always",
    )
    assert (result.returncode, result.stderr) == (0, ""), result.stderr


def test_importing_posting_and_receiving_start_no_thread() -> None:
    result = children.run_script(
        """
        import os, threading
        def threads():
            return threading.active_count(), len(os.listdir("/proc/self/task"))
        import mpchannel
        assert threads() == (1, 1), "import"
        a, b = mpchannel.MessageChannel()
        for number in range(2000):
            a.post_message(number)
        c, d = mpchannel.MessageChannel()
        a.post_message(bytes(1 << 20), [d])
        assert [b.recv() for _ in range(2000)] == list(range(2000))
        (d,) = b.receive().ports
        d.onmessage, d.onclose = None, None
        b.on("message", print)  # does not start the port
        b.off("message", print)
        assert b.poll(0.01) is False
        context = mpchannel.get_context("fork")
        process = context.Process(target=d.post_message, args=("from the child",))
        process.start()
        assert c.recv(20) == "from the child"
        process.join()
        c.wait_closed(20)
        a.close()
        assert threads() == (1, 1), threading.enumerate()
        """
    )
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
