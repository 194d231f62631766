"""Many threads on the same ports: nothing lost, doubled, torn, stuck or mistaken for something else."""

from __future__ import annotations

import gc
import os
import random
import socket
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pytest

import mpchannel

from . import children


class Team:
    """Threads whose exceptions are the test's."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        self.failures: list[BaseException] = []

    def add(self, fn: Callable[..., Any], *arguments: Any) -> None:
        def run() -> None:
            try:
                fn(*arguments)
            except BaseException as error:  # noqa: BLE001  # raised again by join()
                self.failures.append(error)

        self.threads.append(threading.Thread(target=run, daemon=True))
        self.threads[-1].start()

    def join(self, seconds: float = 30) -> None:
        for thread in self.threads:
            thread.join(seconds)
        if self.failures:
            raise self.failures[0]
        assert not [thread for thread in self.threads if thread.is_alive()], "a thread is stuck"


def rest(port: Any, timeout: float = 20) -> list[Any]:
    found = []
    while True:
        try:
            found.append(port.recv(timeout))
        except mpchannel.PortClosedError:
            return found


def in_order(messages: Sequence[tuple[int, int]], threads: int, count: int) -> bool:
    """Whether the (thread, number) pairs are those of all threads, each thread's in its order."""
    return all([n for t, n in messages if t == thread] == list(range(count)) for thread in range(threads)) and (
        len(messages) == threads * count
    )


# Posting and receiving at once


@pytest.mark.parametrize("reading", ["while they post", "afterwards"])
def test_8_threads_post_messages_of_10_bytes_to_1_mb_and_every_one_arrives_whole(
    ends: tuple[Any, Any], reading: str
) -> None:
    near, far = ends
    count = 40

    def post(thread: int) -> None:
        dice = random.Random(thread)
        for number in range(count):
            body = dice.randbytes(int(10 ** dice.uniform(1, 6)))
            assert near.post_message((thread, number, body, zlib.crc32(body)))

    team = Team()
    for thread in range(8):
        team.add(post, thread)
    if reading == "afterwards":
        team.join()
    got = []
    for _ in range(8 * count):
        thread, number, body, checksum = far.recv(20)
        assert zlib.crc32(body) == checksum
        got.append((thread, number))
    team.join()
    assert in_order(got, 8, count)


def test_8_threads_posting_small_messages_through_many_overflows_keep_their_own_order(
    channel: tuple[Any, Any],
) -> None:
    near, far = channel
    team = Team()
    for thread in range(8):
        team.add(lambda thread: [near.post_message((thread, number)) for number in range(5000)], thread)
    assert in_order([far.recv(20) for _ in range(40_000)], 8, 5000)
    team.join()


def test_4_threads_in_receive_get_distinct_messages_and_all_of_them(ends: tuple[Any, Any]) -> None:
    near, far = ends
    got: list[list[int]] = [[] for _ in range(4)]
    team = Team()
    for mine in got:
        team.add(lambda mine: mine.extend(rest(far)), mine)
    for number in range(20_000):
        near.post_message(number)
    near.close()
    team.join()
    assert sorted(number for mine in got for number in mine) == list(range(20_000))
    assert all(mine == sorted(mine) for mine in got)


def test_threads_that_receive_ports_and_large_bodies_get_each_once(channel: tuple[Any, Any]) -> None:
    near, far = channel
    got: list[int] = []

    def receive() -> None:
        while True:
            try:
                event = far.receive(20)
            except mpchannel.PortClosedError:
                return
            number, body = event.data
            assert body == bytes([number % 256]) * len(body)
            assert len(event.ports) == number % 2
            for port in event.ports:
                assert port.recv(20) == number
                port.close()
            got.append(number)

    team = Team()
    for _ in range(4):
        team.add(receive)
    dice = random.Random(0)
    for number in range(600):
        ports = []
        if number % 2:
            mine, moving = mpchannel.MessageChannel()
            mine.post_message(number)
            mine.close()
            ports = [moving]
        near.post_message((number, bytes([number % 256]) * dice.choice((1, 1000, 200_000))), ports)
    near.close()
    team.join()
    assert sorted(got) == list(range(600))


def test_receive_buffers_of_many_ports_and_threads_are_never_mixed_up() -> None:
    def talk(name: int) -> None:
        near, far = mpchannel.MessageChannel()
        for number in range(1500):
            message = (name, number, bytes([name]) * (number % 300))
            near.post_message(message)
            assert far.recv(20) == message
        near.close()
        far.close()

    team = Team()
    for name in range(6):
        team.add(talk, name)
    team.join()


def test_a_listener_and_threads_in_receive_share_the_messages(channel: tuple[Any, Any]) -> None:
    near, far = channel
    heard: list[int] = []
    got: list[int] = []
    closed = threading.Event()
    team = Team()
    for _ in range(2):
        team.add(lambda: got.extend(rest(far)))
    far.onclose = lambda event: closed.set()
    far.onmessage = lambda event: heard.append(event.data)
    for number in range(10_000):
        near.post_message(number)
    near.close()
    assert closed.wait(20)
    team.join()
    assert sorted(heard + got) == list(range(10_000))
    assert heard == sorted(heard)


# Waking


def all_ways_of_waiting(port: Any) -> dict[str, Callable[[], Any]]:
    return {
        "receive": port.receive,
        "receive with a timeout": lambda: port.receive(60),
        "recv": port.recv,
        "recv_bytes": port.recv_bytes,
        "iteration": lambda: list(port),
        "poll": lambda: port.poll(60),
        "wait_closed": lambda: port.wait_closed(60),
        "wait": lambda: mpchannel.wait([port], 60),
    }


@contextmanager
def all_waiting(port: Any) -> Iterator[dict[str, Any]]:
    """A thread for each way of waiting; how each one ended is in the dictionary behind the block."""
    ended: dict[str, Any] = {}
    team = Team()
    ready = threading.Semaphore(0)

    def wait(name: str, way: Callable[[], Any]) -> None:
        ready.release()
        try:
            ended[name] = way()
        except Exception as error:  # noqa: BLE001  # the test looks at it
            ended[name] = error

    ways = all_ways_of_waiting(port)
    for name, way in ways.items():
        team.add(wait, name, way)
    for _ in ways:
        ready.acquire()
    yield ended
    team.join(10)


def test_close_from_another_thread_wakes_every_way_of_waiting(ends: tuple[Any, Any]) -> None:
    port, _ = ends
    with all_waiting(port) as ended:
        port.close()
    for name in ("receive", "receive with a timeout", "recv", "recv_bytes"):
        assert type(ended[name]) is mpchannel.PortClosedError, name
        assert ended[name].reason is None
    assert ended["iteration"] == []
    assert ended["poll"] is True
    assert ended["wait_closed"] is None


def test_a_close_of_the_other_side_wakes_every_way_of_waiting(ends: tuple[Any, Any]) -> None:
    port, other = ends
    with all_waiting(port) as ended:
        other.close()
    for name in ("receive", "receive with a timeout", "recv", "recv_bytes"):
        assert type(ended[name]) is mpchannel.PortClosedError, name
        assert ended[name].reason == "closed"
    assert ended["iteration"] == []
    assert ended["poll"] is True
    assert ended["wait_closed"].reason == "closed"
    assert ended["wait"] == [port]


def test_a_transfer_wakes_every_way_of_waiting(ends: tuple[Any, Any]) -> None:
    port, other = ends
    near, far = mpchannel.MessageChannel()
    with all_waiting(port) as ended:
        near.post_message("moving", [port])
    for name in ("receive", "receive with a timeout", "recv", "recv_bytes", "iteration", "poll", "wait_closed"):
        assert type(ended[name]) is mpchannel.PortDetachedError, (name, ended[name])
    (arrived,) = far.receive(5).ports
    other.post_message("to the new holder")
    assert arrived.recv(5) == "to the new holder"
    for each in (arrived, near, far):
        each.close()


# Moving a port that is in use


def test_a_transfer_of_a_port_that_threads_receive_from_loses_nothing(channel: tuple[Any, Any]) -> None:
    near, far = channel
    for _ in range(40):
        mine, moving = mpchannel.MessageChannel()
        got: list[int] = []

        def receive(port: Any = moving, got: list[int] = got) -> None:
            with suppress(mpchannel.PortDetachedError):
                while True:
                    got.append(port.recv(20))

        team = Team()
        team.add(receive)
        team.add(receive)
        for number in range(400):
            mine.post_message(number)
        near.post_message(None, [moving])
        mine.close()
        team.join()
        (arrived,) = far.receive(5).ports
        assert sorted(got) + rest(arrived) == list(range(400))


def test_a_transfer_of_a_port_that_threads_post_to_loses_nothing_that_was_accepted(channel: tuple[Any, Any]) -> None:
    near, far = channel
    for _ in range(40):
        other, moving = mpchannel.MessageChannel()
        accepted: list[list[tuple[int, int]]] = [[], []]
        many = threading.Semaphore(0)

        def post(thread: int, port: Any = moving, accepted: Any = accepted, many: Any = many) -> None:
            with suppress(mpchannel.PortDetachedError):
                for number in range(100_000):
                    assert port.post_message((thread, number))
                    accepted[thread].append((thread, number))
                    if number == 300:
                        many.release()

        team = Team()
        team.add(post, 0)
        team.add(post, 1)
        many.acquire()
        near.post_message(None, [moving])
        team.join()
        (arrived,) = far.receive(5).ports
        arrived.post_message("the new holder's")
        arrived.close()
        *got, last = rest(other)
        assert last == "the new holder's"
        for thread in (0, 1):
            assert [each for each in got if each[0] == thread] == accepted[thread]


def test_a_transfer_of_a_port_with_a_listener_loses_nothing(channel: tuple[Any, Any]) -> None:
    near, far = channel
    for _ in range(40):
        mine, moving = mpchannel.MessageChannel()
        heard: list[int] = []
        some = threading.Event()
        moving.onmessage = lambda event, heard=heard, some=some: (heard.append(event.data), some.set())
        for number in range(400):
            mine.post_message(number)
        assert some.wait(20)
        near.post_message(None, [moving])
        mine.close()
        (arrived,) = far.receive(5).ports
        left = rest(arrived)
        children.let_deliver()
        assert heard + left == list(range(400))


def test_a_port_given_to_a_process_while_a_thread_reads_it_has_each_message_read_once(context: Any) -> None:
    mine, moving = mpchannel.MessageChannel()
    results, theirs = mpchannel.MessageChannel()
    got: list[int] = []

    def receive() -> None:
        with suppress(mpchannel.PortDetachedError):
            while True:
                got.append(moving.recv(60))

    team = Team()
    team.add(receive)
    team.add(lambda: [mine.post_message(number) for number in range(5000)])
    with children.running(context.Process(target=children.report_all, args=(moving, theirs))):
        team.join()
        mine.close()
        assert got + results.recv(20) == list(range(5000))
    results.close()


def test_two_threads_that_send_two_ports_through_each_other_do_not_deadlock() -> None:
    for _ in range(100):
        p1, p2 = mpchannel.MessageChannel()
        q1, q2 = mpchannel.MessageChannel()
        moved: list[Any] = []
        together = threading.Barrier(2)

        def move(through: Any, port: Any, moved: list[Any] = moved, together: Any = together) -> None:
            together.wait(20)
            with suppress(mpchannel.PortDetachedError, mpchannel.DataCloneError):
                moved.append(through.post_message("moving", [port]))

        team = Team()
        team.add(move, p1, q1)
        team.add(move, q1, p1)
        team.join()
        assert moved in ([True], [False], [True, True])
        for port in (p1, p2, q1, q2):
            port.close()


def test_a_listed_port_that_another_thread_closes_meanwhile_is_moved_or_refused_and_never_half(
    channel: tuple[Any, Any],
) -> None:
    near, far = channel
    outcomes = set()
    for _ in range(300):
        other, moving = mpchannel.MessageChannel()
        together = threading.Barrier(2)
        team = Team()
        team.add(lambda port=moving, together=together: (together.wait(20), port.close()))
        together.wait(20)
        try:
            near.post_message(None, [moving])
        except mpchannel.DataCloneError:
            outcomes.add("refused")
            assert moving.closed
            assert other.wait_closed(5).reason == "closed"
            assert mpchannel.receive_message_on_port(far) is None
        else:
            outcomes.add("moved")
            team.join()
            assert moving.detached
            (arrived,) = far.receive(5).ports
            other.post_message("to the new holder")
            assert arrived.recv(5) == "to the new holder"
            arrived.close()
            assert other.wait_closed(5).reason == "closed"
        team.join()
    assert "refused" in outcomes or "moved" in outcomes


# Closing a port that is in use


def test_closes_of_threads_that_post_receive_and_listen_raise_nothing_unexpected() -> None:
    for round in range(60):
        near, far = mpchannel.MessageChannel()
        running = threading.Barrier(4)

        def post(port: Any = near, running: Any = running) -> None:
            running.wait(20)
            for number in range(100_000):
                if not port.post_message((number, bytes(3000 * (number % 7 == 0)))):
                    return
            raise AssertionError("never refused")

        def receive(port: Any = far, running: Any = running) -> None:
            running.wait(20)
            assert rest(port) is not None

        team = Team()
        team.add(post)
        team.add(receive)
        team.add(receive)
        if round % 2:
            far.onmessage = lambda event: None
        running.wait(20)
        (near, far)[round % 4 // 2].close()
        team.join()
        near.close()
        far.close()


def test_both_ends_closing_at_once_is_harmless() -> None:
    for _ in range(200):
        ends = tuple(mpchannel.MessageChannel())
        together = threading.Barrier(2)
        team = Team()
        for end in ends:
            team.add(lambda port=end, together=together: (together.wait(20), port.close()))
        team.join()
        assert all(end.closed for end in ends)


def test_a_port_collected_in_a_reference_cycle_still_says_goodbye() -> None:
    for _ in range(30):
        port1, port2 = mpchannel.MessageChannel()
        cycle: list[Any] = [port1]
        cycle.append(cycle)
        reference = weakref.ref(port1)
        del port1, cycle
        gc.collect()
        assert reference() is None
        assert port2.wait_closed(5).reason == "collected"


# Starting and parking


def test_starting_a_port_while_the_delivery_thread_parks_it_leaves_no_deaf_listener() -> None:
    for _ in range(300):
        port1, port2 = mpchannel.MessageChannel()
        heard, closed = threading.Event(), threading.Event()
        port2.onclose = lambda event, closed=closed: closed.set()  # watched, for the close only
        port1.post_message("in the way of the close")  # the delivery thread finds it and stops watching
        port2.onmessage = lambda event, heard=heard: heard.set()
        assert heard.wait(5)
        port1.close()
        assert closed.wait(5)


def test_a_started_port_that_nobody_refers_to_still_hears() -> None:
    heard = threading.Semaphore(0)
    ends = []
    for _ in range(100):
        port1, port2 = mpchannel.MessageChannel()
        port2.onclose = lambda event: heard.release()
        port1.post_message("in the way of the close")
        port2.onmessage = lambda event: heard.release()
        ends.append(port1)
    del port2
    gc.collect()
    for port1 in ends:
        port1.post_message("a second message")
        port1.close()
    for _ in range(300):  # two messages and a close each
        assert heard.acquire(timeout=10)


def test_listeners_that_come_and_go_while_messages_come_hear_each_message_once(channel: tuple[Any, Any]) -> None:
    near, far = channel
    heard: list[int] = []
    done = threading.Event()

    def listen(event: Any) -> None:
        heard.append(event.data)
        if event.data == 9999:
            done.set()

    far.start()
    team = Team()
    team.add(lambda: [near.post_message(number) for number in range(10_000)])
    while not done.is_set():
        far.on("message", listen)
        far.onclose = print
        far.off("message", listen)
        far.onclose = None
        far.once("message", listen)
    team.join()
    assert heard == list(range(10_000))


def test_a_close_listener_hears_after_messages_that_a_thread_takes_by_hand() -> None:
    for _ in range(50):
        port1, port2 = mpchannel.MessageChannel()
        closed = threading.Event()
        for number in range(5):
            port1.post_message(number)
        port1.close()
        port2.onclose = lambda event, closed=closed: closed.set()
        assert [port2.recv(5) for _ in range(5)] == list(range(5))
        assert closed.wait(5)


def test_ports_that_take_the_descriptor_numbers_of_closed_ones_hear_everything() -> None:
    def talk() -> None:
        for _ in range(150):
            near, far = mpchannel.MessageChannel()
            heard = threading.Event()
            far.onclose = print
            far.onmessage = lambda event, heard=heard: heard.set()
            near.post_message("a message")
            assert heard.wait(10), "a deaf listener"
            far.close()
            near.close()

    team = Team()
    for _ in range(4):
        team.add(talk)
    team.join(60)


# Descriptor numbers


def test_no_call_ever_touches_a_descriptor_number_after_its_port_was_closed() -> None:
    stop = threading.Event()

    def use_ports() -> None:
        while not stop.is_set():
            near, far = mpchannel.MessageChannel()
            team = Team()
            team.add(lambda port=far: rest(port))
            team.add(lambda port=near: [port.post_message(bytes(1000)) for _ in range(500)])
            far.onclose = lambda event: None
            near.post_message("go")
            near.close()
            far.close()
            team.join()

    team = Team()
    for _ in range(2):
        team.add(use_ports)
    try:
        for number in range(1500):
            # They take the numbers that ports had; whoever still used these would read, write, shut or close ours.
            one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            token = str(number).encode()
            one.send(token)
            two.send(token)
            out, into = os.pipe()
            os.write(into, token)
            assert os.read(out, 100) == token
            os.close(out)
            os.close(into)
            assert (two.recv(10_000), one.recv(10_000)) == (token, token)
            one.close()
            two.close()
    finally:
        stop.set()
        team.join()


# Collections


@pytest.fixture
def collecting() -> Iterator[None]:
    """A collection at every chance."""
    before = gc.get_threshold()
    gc.set_threshold(1)
    yield
    gc.set_threshold(*before)


def test_collections_at_every_chance_disturb_nothing(collecting: None) -> None:
    def garbage() -> None:
        for end in mpchannel.MessageChannel():
            cycle = [end]
            cycle.append(cycle)  # type: ignore[arg-type]

    def talk(name: int) -> None:
        near, far = mpchannel.MessageChannel()
        heard: list[Any] = []
        closed = threading.Event()
        for number in range(60):
            garbage()
            mine, moving = mpchannel.MessageChannel()
            near.post_message((name, number), [moving])
            event = far.receive(20)
            assert event.data == (name, number)
            mine.post_message(number)
            assert event.ports[0].recv(20) == number
            del event, moving
            assert mine.wait_closed(20).reason == "collected"
        far.onmessage = lambda event: heard.append(event.data)
        far.onclose = lambda event: closed.set()
        for number in range(600):
            near.post_message(number)
        del far
        near.close()
        assert closed.wait(20)
        assert heard == list(range(600))

    team = Team()
    for name in range(3):
        team.add(talk, name)
    team.join(60)


def test_a_port_dropped_by_one_thread_while_another_receives_from_it_is_not_collected(collecting: None) -> None:
    for _ in range(20):
        near, far = mpchannel.MessageChannel()
        got: list[Any] = []
        team = Team()
        team.add(lambda port, got=got: got.append(port.recv(20)), far)
        del far
        gc.collect()
        near.post_message("still there")
        team.join()
        assert got == ["still there"]
        team.threads.clear()
        near.close()
