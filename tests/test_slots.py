"""Packets of middling size through shared memory: as those through the socket, whoever holds the ends."""

from __future__ import annotations

import itertools
import os
import pickle
import random
import resource
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import mpchannel
from mpchannel import MessageChannel, MessageError, _slots
from mpchannel._kernel import SEND_NOW, Memory, send_with
from mpchannel._slots import COUNT, ROOM, SLOT, Slots
from mpchannel._wire import HEADS_UP_PACKET

from . import buffer_children, children
from .buffer_children import middling

pytestmark = pytest.mark.skipif(not _slots._ORDERED, reason="slots are for processors of type x86-64")

Ends = tuple[Any, Any]


@pytest.fixture(autouse=True)
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The sizes of all packets that this process has put into slots."""
    sizes: list[int] = []
    fill = Slots.fill

    def counting(slots: Slots, slot: int, parts: Any, size: int) -> bytes:
        sizes.append(size)
        return fill(slots, slot, parts, size)

    monkeypatch.setattr(Slots, "fill", counting)
    return sizes


def begin(port: Any, other: Any) -> None:
    """Until there are slots."""
    for number in itertools.count():
        port.post_message(middling(number))
        assert other.recv() == middling(number)
        if port._link._slots is not None:
            return


def test_a_stream_goes_through_slots(channel: Ends, used: list[int]) -> None:
    one, other = channel
    for number in range(50):
        one.post_message(middling(number))
        assert other.recv(20) == middling(number)
    assert len(used) > 40
    assert not used_slots(one)


def used_slots(port: Any) -> int:
    slots = port._link._slots
    return sum(slots._room[slot] for slot in range(COUNT))


def test_what_happens_now_and_then_takes_no_memory(channel: Ends, used: list[int]) -> None:
    one, other = channel
    for number in range(3):
        one.post_message(middling(number))
        assert other.recv(20) == middling(number)
    assert one._link._slots is None
    assert not used


def test_all_sizes_and_kinds_keep_their_order_among_each_other(channel: Ends, used: list[int]) -> None:
    one, other = channel
    dice = random.Random(7)
    for _ in range(20):
        posted: list[Any] = []
        for _ in range(dice.randrange(1, 12)):
            size = dice.choice((10, 1_000, 45_000, 50_000, 65_536, 100_000, 159_000, 163_000, 170_000, 300_000))
            posted.append(dice.choice((bytes, bytearray, np.zeros, lambda size: [str(size)] * (size // 9)))(size))
            one.post_message(posted[-1])
            if dice.random() < 0.2:
                mine, theirs = MessageChannel()
                one.post_message(theirs, [theirs])
                posted.append(mine)
        for message in posted:
            got = other.recv(20)
            if isinstance(message, np.ndarray):
                assert np.array_equal(got, message)
                got[-1] = 1  # its own, and writable
            elif isinstance(message, mpchannel.MessagePort):
                got.post_message("here")
                assert message.recv(20) == "here"
                got.close()
                message.close()
            else:
                assert got == message
    assert len(used) > 10
    assert max(used) <= ROOM


def test_both_directions_at_once(channel: Ends, used: list[int]) -> None:
    one, other = channel
    for number in range(30):
        one.post_message(middling(number))
        other.post_message(middling(-number % 1000))
        assert other.recv(20) == middling(number)
        assert one.recv(20) == middling(-number % 1000)
    assert one._link._slots is not other._link._slots


def test_when_all_are_taken_the_socket_and_the_overflow_file_follow(channel: Ends, used: list[int]) -> None:
    one, other = channel
    begin(one, other)
    used.clear()
    for number in range(100):
        one.post_message(middling(number))
    assert len(used) == COUNT
    assert one.buffered_amount >= 100 * 65_536
    for number in range(100):
        assert other.recv(20) == middling(number)
    assert one.buffered_amount == 0
    assert not used_slots(one)
    one.post_message(middling(1))
    assert other.recv(20) == middling(1)
    one.drain(20)


def test_what_arrived_is_not_touched_by_what_comes_later(channel: Ends, used: list[int]) -> None:
    one, other = channel
    begin(one, other)
    got = []
    for number in range(3 * COUNT):
        one.post_message(np.full(8_000, number))
        got.append(other.recv(20))
    assert [int(each[0]) for each in got] == list(range(3 * COUNT))
    assert all((each == each[0]).all() for each in got)


def test_a_slot_for_which_the_socket_has_no_room_is_free_again(channel: Ends) -> None:
    one, other = channel
    begin(one, other)
    sock, small = one._link._socket(), pickle.dumps("small")
    count = 0
    try:
        while True:
            sock.send(small, SEND_NOW)
            count += 1
    except BlockingIOError:
        assert count > 100
    one.post_message(middling(7))
    assert not used_slots(one)
    assert [other.recv(20) for _ in range(count)] == ["small"] * count
    assert other.recv(20) == middling(7)


def test_between_a_heads_up_and_its_packet_one_loses_no_port(channel: Ends) -> None:
    one, other = channel
    begin(one, other)
    one._link._socket().send(HEADS_UP_PACKET)  # as another thread does, a moment before it posts a port
    one._link._owes = True
    one.post_message(middling(1))
    mine, theirs = MessageChannel()
    with mine:
        one.post_message("port", [theirs])
        assert other.recv(20) == middling(1)
        event = other.receive(20)
        assert event.data == "port"
        event.ports[0].post_message("here")
        assert mine.recv(20) == "here"


# Whoever holds the ends


def test_another_process_takes_them(context: Any, used: list[int]) -> None:
    mine, theirs = MessageChannel()
    count = 300
    arguments = theirs, range(count), 64 * 1024
    with mine, children.running(context.Process(target=buffer_children.expect_middling, args=arguments)):
        for number in range(count):
            mine.post_message(middling(number))
        assert mine.recv(20) == count
        assert used


@pytest.mark.parametrize("before", [0, 10])
def test_a_receiving_end_moves_on_with_unread_ones(before: int, used: list[int]) -> None:
    one, other = MessageChannel()
    near, far = MessageChannel()
    with one, near, far:
        begin(one, other)
        for round_ in range(3):
            numbers = [1000 * round_ + number for number in range(COUNT - 1)]
            for number in numbers[:before]:
                one.post_message(middling(number))
            near.post_message(None, [other])
            (other,) = far.receive(20).ports
            for number in numbers[before:]:
                one.post_message(middling(number))
            one.post_message("small")
            assert [other.recv(20) for _ in numbers] == [middling(number) for number in numbers]
            assert other.recv(20) == "small"
            assert other._link._slab is not None
            assert not other._link.slow  # small ones cost one call again
            assert not used_slots(one)
        other.close()


def test_a_receiving_end_moves_through_processes_with_unread_ones(context: Any) -> None:
    one, other = MessageChannel()
    mine, theirs = MessageChannel()
    with one, mine:
        begin(one, other)
        for number in range(10):
            one.post_message(middling(number))
        assert other.recv(20) == middling(0)
        with children.running(context.Process(target=buffer_children.pass_on, args=(theirs,))):
            mine.post_message(other, [other])
            for number in range(10, 20):
                one.post_message(middling(number))
            (other,) = mine.receive(20).ports
            assert mine.recv(20) is True
        for number in range(20, 30):
            one.post_message(middling(number))
        for number in range(1, 30):
            assert other.recv(20) == middling(number)
        other.close()


def test_a_receiving_end_is_given_to_a_process_with_unread_ones(context: Any) -> None:
    one, other = MessageChannel()
    with one:
        begin(one, other)
        for number in range(5):
            one.post_message(middling(number))
        assert other.recv(20) == middling(0)
        arguments = other, range(1, 40), 64 * 1024
        with children.running(context.Process(target=buffer_children.expect_middling, args=arguments)):
            for number in range(5, 40):
                one.post_message(middling(number))
            assert one.recv(20) == 39


def test_a_receiving_end_that_was_given_to_a_process_moves_on_from_there(context: Any) -> None:
    one, other = MessageChannel()
    mine, theirs = MessageChannel()
    with one, mine:
        begin(one, other)
        for number in range(4):
            one.post_message(middling(number))
        assert other.recv(20) == middling(0)
        with children.running(context.Process(target=buffer_children.give_back, args=(other, theirs, 1))):
            (other,) = mine.receive(20).ports
            mine.post_message("end")
        with other:
            for number in range(4, 10):
                one.post_message(middling(number))
            assert [other.recv(20) for _ in range(2, 10)] == [middling(number) for number in range(2, 10)]


def test_a_sending_end_moves_on_with_unread_ones(context: Any) -> None:
    one, other = MessageChannel()
    mine, theirs = MessageChannel()
    with other, mine:
        begin(one, other)
        for number in range(4):
            one.post_message(middling(number))
        with children.running(context.Process(target=buffer_children.post_through, args=(theirs, range(4, 20)))):
            mine.post_message(one, [one])
            (one,) = mine.receive(20).ports
            mine.post_message("end")
        with one:
            for number in range(20):
                assert other.recv(20) == middling(number)
            begin(one, other)  # slots of this process again


@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_a_kill_ends_the_channel_and_leaves_nothing(who: str, context: Any) -> None:
    mine, theirs = MessageChannel()
    if who == "sender":
        arguments: Any = (theirs, range(12), 64 * 1024)
        process = context.Process(target=buffer_children.post_middling, args=arguments)
    else:
        process = context.Process(target=buffer_children.expect_middling, args=(theirs, range(10**9), 64 * 1024))
    with mine, children.running(process, -signal.SIGKILL):
        if who == "receiver":
            for number in range(50):
                mine.post_message(middling(number))
            process.kill()
            assert mine.wait_closed(20).reason == "died"
            assert not mine.post_message(middling(0))
        else:
            assert mine.recv(20) == middling(0)
            time.sleep(0.01)  # any moment
            process.kill()
            rest = list(mine)  # what was posted before is not lost
            expected: list[Any] = [*map(middling, range(1, 12)), "all posted"]
            assert rest == expected[: len(rest)]


def test_a_forked_child_that_was_not_given_the_port_does_no_harm(channel: Ends) -> None:
    one, other = channel
    begin(one, other)
    one.post_message(middling(1))
    with children.running(mpchannel.get_context("fork").Process(target=os.getpid)):
        pass
    one.post_message(middling(2))
    assert [other.recv(20), other.recv(20)] == [middling(1), middling(2)]


# Interrupted, and by many


class Alarm(Exception):
    pass


@pytest.mark.parametrize("interrupted", ["post", "recv"])
def test_an_exception_of_a_signal_handler_loses_and_tears_nothing(interrupted: str, channel: Ends) -> None:
    one, other = channel
    begin(one, other)
    armed: list[bool] = []

    def handler(*_: object) -> None:
        if armed:  # it may come late, when the timer is stopped already
            armed.clear()
            raise Alarm

    previous = signal.signal(signal.SIGALRM, handler)
    dice, came = random.Random(1), 0
    try:
        for number in range(1500):
            posted = False
            try:
                if interrupted == "post":
                    armed.append(True)
                    signal.setitimer(signal.ITIMER_REAL, dice.uniform(1e-6, 40e-6))
                    one.post_message(middling(number))
                    posted = True
                    armed.clear()
                    signal.setitimer(signal.ITIMER_REAL, 0)
                else:
                    one.post_message(middling(number))
                    armed.append(True)
                    signal.setitimer(signal.ITIMER_REAL, dice.uniform(1e-6, 40e-6))
                    got = other.recv(20)
                    armed.clear()
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    assert got == middling(number)
                    continue
            except Alarm:
                came += 1
            found = []
            while other.poll():
                found.append(other.recv())
            assert found in ([middling(number)], [] if not posted else None)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert came > 10
    for number in range(2 * COUNT):  # also if some slots were lost
        one.post_message(middling(number))
    assert [other.recv(20) for _ in range(2 * COUNT)] == [middling(number) for number in range(2 * COUNT)]


def test_a_handler_may_move_the_port_away_while_it_receives(channel: Ends) -> None:
    one, other = channel
    begin(one, other)
    near, far = MessageChannel()

    def receive_and_move(*arguments: Any) -> int:
        size: int = receive(*arguments)
        near.post_message(None, [other])  # as a signal handler that comes right behind the call
        return size

    receive, other._link._recv_into = other._link._recv_into, receive_and_move
    one.post_message(middling(1))
    one.post_message(middling(2))
    assert other.recv(20) == middling(1)
    with far.receive(20).ports[0] as moved:
        assert moved.recv(20) == middling(2)
    near.close()
    far.close()


def all_there(port: Any) -> Iterator[Any]:
    while (event := mpchannel.receive_message_on_port(port)) is not None:
        yield event.data


def test_others_take_the_place_of_slots_that_are_lost(channel: Ends, used: list[int]) -> None:
    one, other = channel
    begin(one, other)
    lost = one._link._slots
    while lost.claim() is not None:
        pass
    for number in range(10):
        used.clear()
        one.post_message(middling(number))
        assert other.recv(20) == middling(number)
    assert used
    assert one._link._slots is not lost
    assert other._link._slab.inode == one._link._slots.inode


def test_a_handler_that_posts_and_receives_meanwhile_mixes_nothing_up(channel: Ends) -> None:
    one, other = channel
    begin(one, other)
    numbers = itertools.count(1_000_000)
    inside: list[bytes] = []

    def handler(*_: object) -> None:
        one.post_message(middling(next(numbers)))
        inside.extend(all_there(other))

    previous = signal.signal(signal.SIGALRM, handler)
    got = []
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0007)
        for number in range(2000):
            one.post_message(middling(number))
            got.extend(all_there(other))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    got.extend(all_there(other))
    assert next(numbers) > 1_000_010
    everything = [int.from_bytes(each[:8], "little") for each in (*got, *inside)]
    assert all(each == middling(int.from_bytes(each[:8], "little")) for each in (*got, *inside))
    assert sorted(everything) == [*range(2000), *range(1_000_000, 1_000_000 + len(everything) - 2000)]


def test_threads_that_post_at_once_mix_nothing_up(channel: Ends, used: list[int]) -> None:
    one, other = channel
    begin(one, other)
    each_posts, threads = 300, 4

    def post(first: int) -> None:
        for number in range(first, first + each_posts):
            one.post_message(middling(number))

    posting = [threading.Thread(target=post, args=(10_000 * place,)) for place in range(threads)]
    for thread in posting:
        thread.start()
    got = [other.recv(20) for _ in range(threads * each_posts)]
    for thread in posting:
        thread.join()
    numbers = [int.from_bytes(each[:8], "little") for each in got]
    assert all(each == middling(number) for each, number in zip(got, numbers, strict=True))
    for place in range(threads):
        mine = [number for number in numbers if number // 10_000 == place]
        assert mine == list(range(10_000 * place, 10_000 * place + each_posts))
    assert used
    assert not used_slots(one)


# Limits


def test_who_may_map_no_more_reads_all_the_same(channel: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_slots, "_full", lambda known: known is _slots._receivers)
    one, other = channel
    begin(one, other)
    for number in range(20):
        one.post_message(middling(number))
        assert other.recv(20) == middling(number)
        one.post_message(number)
        assert other.recv(20) == number
    assert other._link._slab._room is None
    assert not used_slots(one)


def test_who_may_have_no_more_goes_on_through_the_socket(channel: Ends, used: list[int]) -> None:
    one, other = channel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_slots, "_full", lambda known: True)
        for number in range(20):
            one.post_message(middling(number))
            assert other.recv(20) == middling(number)
    assert not used


def test_on_other_processors_there_are_none(channel: Ends, used: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_slots, "_ORDERED", False)
    one, other = channel
    for number in range(20):
        one.post_message(middling(number))
        assert other.recv(20) == middling(number)
    assert not used


def test_without_a_descriptor_left_it_is_read_all_the_same(channel: Ends) -> None:
    one, other = channel
    for number in range(3):
        one.post_message(middling(number))
        other.recv(20)
    one.post_message(middling(3))  # the first through a slot
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, limits[1]))
    filling: list[int] = []
    try:
        with pytest.raises(OSError, match="Too many open files"):
            filling.extend(map(os.dup, itertools.repeat(0)))
        with pytest.raises(OSError, match="descriptors"):
            other.recv(20)
    finally:
        for number in filling:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert other.recv(20) == middling(3)


def test_a_channel_that_is_closed_gives_the_memory_back() -> None:
    before = len(_slots._senders), len(_slots._receivers)
    for _ in range(100):
        one, other = MessageChannel()
        begin(one, other)
        one.post_message(middling(1))
        one.close()
        other.close()
    assert (len(_slots._senders), len(_slots._receivers)) == before


# What another process could send


@pytest.mark.parametrize("what", ["no slot", "no room", "other memory", "no memory", "no descriptor", "cut"])
def test_a_packet_that_lies_is_a_message_that_does_not_load(what: str, channel: Ends) -> None:
    one, other = channel
    begin(one, other)
    slots = one._link._slots
    numbers: tuple[int, ...] = (slots.memory.fileno(),)
    small, pipe = Memory.create(), os.pipe()
    small.write([b"x" * 100])
    packet = _slots.HEAD.pack(SLOT, True, 0, slots.inode, 100)
    if what == "no slot":
        packet = _slots.HEAD.pack(SLOT, True, COUNT, slots.inode, 100)
    elif what == "no room":
        packet = _slots.HEAD.pack(SLOT, True, 0, slots.inode, ROOM + 1)
    elif what == "other memory":
        packet, numbers = _slots.HEAD.pack(SLOT, True, 0, small.inode, 100), (small.fileno(),)
    elif what == "no memory":
        packet, numbers = _slots.HEAD.pack(SLOT, True, 0, 1, 100), (pipe[0],)
    elif what == "no descriptor":
        packet, numbers = _slots.HEAD.pack(SLOT, True, 0, 1, 100), ()
    else:
        packet = packet[:5]
    sock = one._link._socket()
    for announced in (True, False):
        if announced:
            sock.send(HEADS_UP_PACKET)
            packet = packet[:1] + b"\x01" + packet[2:]
        else:
            packet = packet[:1] + b"\x00" + packet[2:]
        send_with(sock, (packet,), numbers)
        with pytest.raises(MessageError):
            other.recv(20)
        one.post_message(middling(5))
        assert other.recv(20) == middling(5)
    os.close(pipe[0])
    os.close(pipe[1])
