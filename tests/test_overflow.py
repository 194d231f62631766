"""The overflow file: nothing is lost, doubled or out of order when far more is posted than a socket holds."""

from __future__ import annotations

import gc
import multiprocessing.connection
import os
import pickle
import random
import resource
import select
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import mpchannel

from . import children

MUCH = 2000  # small messages: some seven times what a socket holds
HUGE = 256 << 20


def drained(port: Any) -> list[Any]:
    """All that is there, without waiting."""
    found = []
    while (event := mpchannel.receive_message_on_port(port)) is not None:
        found.append(event.data)
    return found


def rest(port: Any, timeout: float = 20) -> tuple[list[Any], str | None]:
    """All that comes until the channel closes, and why it closed."""
    found = []
    while True:
        try:
            found.append(port.recv(timeout))
        except mpchannel.PortClosedError as error:
            return found, error.reason


def anonymous_files(pid: int | str = "self") -> dict[str, int]:
    """The anonymous memory that a process holds descriptors of: path -> bytes occupied."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{name}"
        try:
            if "memfd:" in os.readlink(path):
                found[path] = os.stat(path).st_blocks * 512
        except OSError:
            continue  # closed meanwhile
    return found


def readable_now(port: Any) -> bool:
    poller = select.poll()
    poller.register(port, select.POLLIN)
    return bool(poller.poll(0))


@pytest.fixture
def many_files() -> Iterator[None]:
    """Room for thousands of descriptors in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 5000:
        pytest.skip(f"needs 5000 open files; the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 5000), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Order


@pytest.mark.row("H03")
def test_a_burst_of_100_000_messages_before_any_read_arrives_in_order(ends: tuple[Any, Any]) -> None:
    near, far = ends
    for number in range(100_000):
        near.post_message(number)
    assert [far.recv(5) for _ in range(100_000)] == list(range(100_000))


@pytest.mark.row("H03", "N49")
def test_a_burst_of_a_process_that_has_ended_arrives_in_order_and_then_the_close(context: Any) -> None:
    ours, theirs = mpchannel.MessageChannel()
    with children.running(context.Process(target=children.post_and_return, args=(theirs, *range(20_000)))) as process:
        process.join(20)  # before anything was read: what is posted is not held by the one who posted it
        assert rest(ours) == (list(range(20_000)), "exited")


def test_both_sides_may_flood_each_other_before_either_reads(channel: tuple[Any, Any]) -> None:
    port1, port2 = channel
    for number in range(MUCH):
        port1.post_message(number)
        port2.post_message(-number)
    assert drained(port1) == [-number for number in range(MUCH)]
    assert drained(port2) == list(range(MUCH))


def test_files_that_open_and_end_again_and_again_keep_the_exact_order(channel: tuple[Any, Any]) -> None:
    near, far = channel
    seed = random.randrange(1 << 32)
    dice = random.Random(seed)
    posted = taken = 0
    files: set[int] = set()
    while taken < posted or posted < 200_000:
        for _ in range(dice.choice((1, 10, 300, 1500)) if posted < 200_000 else 0):
            near.post_message(posted)
            posted += 1
        for _ in range(dice.choice((1, 10, 300, 1500, posted - taken))):
            if taken == posted:
                break
            assert far.recv(5) == taken, f"seed {seed}"
            taken += 1
        files |= {os.stat(path).st_ino for path in anonymous_files()}
    assert mpchannel.receive_message_on_port(far) is None
    assert len(files) > 30, "this must have opened many files"


def test_a_reader_that_keeps_up_only_at_times_gets_the_exact_order_from_another_process(context: Any) -> None:
    ours, theirs = mpchannel.MessageChannel()
    with children.running(context.Process(target=children.post_in_bursts, args=(theirs, 50_000))):
        assert rest(ours) == (list(range(50_000)), "exited")


def test_a_listener_gets_a_burst_in_order(channel: tuple[Any, Any]) -> None:
    near, far = channel
    heard: list[int] = []
    done = threading.Event()

    def listen(event: Any) -> None:
        heard.append(event.data)
        if len(heard) == 20_000:
            done.set()

    for number in range(10_000):
        near.post_message(number)
    far.onmessage = listen
    for number in range(10_000, 20_000):
        near.post_message(number)
    assert done.wait(20)
    assert heard == list(range(20_000))


# What messages hold


@pytest.mark.row("H03")
def test_large_messages_keep_their_place_in_the_overflow(ends: tuple[Any, Any]) -> None:
    near, far = ends
    sizes = [1, 100, 16_000, 70_000, 160_000, 165_000, 213_000, 1 << 20, 5 << 20, 2] * 4
    for number in range(MUCH):
        near.post_message(number)
    for number, size in enumerate(sizes):
        near.post_message(bytes([number]) * size)
        near.post_message(size)
    assert [far.recv(5) for _ in range(MUCH)] == list(range(MUCH))
    for number, size in enumerate(sizes):
        assert far.recv(5) == bytes([number]) * size
        assert far.recv(5) == size


@pytest.mark.row("H03")
def test_32_mib_to_a_port_that_nobody_reads_do_not_wait_and_arrive(channel: tuple[Any, Any]) -> None:
    near, far = channel
    blob = random.randbytes(1 << 20)
    for number in range(32):
        near.post_message((number, blob))
    assert [far.recv(5) == (number, blob) for number in range(32)] == [True] * 32


def test_out_of_band_buffers_come_through_the_overflow(channel: tuple[Any, Any]) -> None:
    near, far = channel
    for number in range(MUCH):
        near.post_message(number)
    blobs = [bytearray(random.randbytes(size)) for size in (10, 70_000, 3 << 20)]
    near.post_message([pickle.PickleBuffer(blob) for blob in blobs])
    assert [far.recv(5) for _ in range(MUCH)] == list(range(MUCH))
    assert [bytes(each) for each in far.recv(5)] == [bytes(blob) for blob in blobs]


def test_bytes_of_send_bytes_come_through_the_overflow(channel: tuple[Any, Any]) -> None:
    near, far = channel
    posted = [b"", b"\x80", b"\x01", b"x" * 100, b"y" * 200_000] * 400
    for each in posted:
        near.send_bytes(each)
    assert [far.recv_bytes() for _ in posted] == posted


def test_a_message_that_cannot_be_loaded_does_not_disturb_the_overflow(channel: tuple[Any, Any]) -> None:
    near, far = channel
    for number in range(MUCH):
        near.post_message(number if number % 500 else children.FailsToLoad())
    for number in range(MUCH):
        if number % 500:
            assert far.recv(5) == number
        else:
            with pytest.raises(mpchannel.MessageError):
                far.recv(5)


# Ports in the overflow


def test_ports_posted_into_the_overflow_arrive_at_their_places_and_work(ends: tuple[Any, Any]) -> None:
    near, far = ends
    kept = []
    for number in range(MUCH):
        if number % 100:
            near.post_message(number)
        else:
            mine, moving = mpchannel.MessageChannel()
            mine.post_message(("before", number))
            near.post_message(number, [moving])
            kept.append(mine)
    for number in range(MUCH):
        event = far.receive(5)
        assert event.data == number
        assert len(event.ports) == (number % 100 == 0)
        for arrived in event.ports:
            assert arrived.recv(5) == ("before", number)
            arrived.post_message(("after", number))
            assert kept[number // 100].recv(5) == ("after", number)
            arrived.close()
    for mine in kept:
        mine.close()


@pytest.mark.parametrize("between", [0, 3], ids=("alone", "among data"))
def test_1000_messages_with_ports_for_a_port_that_nobody_reads_arrive_and_work(
    channel: tuple[Any, Any], many_files: None, between: int
) -> None:
    near, far = channel
    kept = []
    for number in range(1000):
        mine, moving = mpchannel.MessageChannel()
        near.post_message(number, [moving])
        for _ in range(between):
            near.post_message("data")
        kept.append(mine)
    arrived = []
    for number in range(1000):
        event = far.receive(5)
        assert event.data == number
        arrived += event.ports
        assert [far.recv(5) for _ in range(between)] == ["data"] * between
    assert len(arrived) == 1000
    for number, port in enumerate(arrived):
        kept[number].post_message(number)
        assert port.recv(5) == number
        port.post_message(-number)
        assert kept[number].recv(5) == -number
    for port in (*kept, *arrived):
        port.close()


def test_many_ports_in_one_message_come_through_the_overflow(channel: tuple[Any, Any], many_files: None) -> None:
    near, far = channel
    for number in range(MUCH):
        near.post_message(number)
    pairs = [mpchannel.MessageChannel() for _ in range(600)]
    near.post_message("ports", [pair.port2 for pair in pairs])
    assert [far.recv(5) for _ in range(MUCH)] == list(range(MUCH))
    ports = far.receive(5).ports
    for number, (pair, port) in enumerate(zip(pairs, ports, strict=True)):
        pair.port1.post_message(number)
        assert port.recv(5) == number
        pair.port1.close()
        port.close()


def test_a_port_whose_own_inbox_overflows_travels_through_an_overflow(channel: tuple[Any, Any]) -> None:
    near, far = channel
    mine, moving = mpchannel.MessageChannel()
    for number in range(MUCH):
        mine.post_message(number)
        near.post_message(number)
    near.post_message("the port", [moving])
    mine.post_message("posted in flight")
    mine.close()
    assert [far.recv(5) for _ in range(MUCH)] == list(range(MUCH))
    (arrived,) = far.receive(5).ports
    assert rest(arrived) == ([*range(MUCH), "posted in flight"], "closed")


# Moving in the middle of it


class Hops:
    """A channel for moving ports within this process."""

    def __init__(self) -> None:
        self.near, self.far = mpchannel.MessageChannel()

    def __call__(self, port: Any) -> Any:
        self.near.post_message(None, [port])
        return self.far.receive(5).ports[0]

    def close(self) -> None:
        self.near.close()
        self.far.close()


@pytest.fixture
def hop() -> Iterator[Hops]:
    hops = Hops()
    yield hops
    hops.close()


@pytest.mark.row("W26", "H07")
def test_the_receiving_end_moves_again_and_again_in_the_middle_of_an_overflow(hop: Hops) -> None:
    near, far = mpchannel.MessageChannel()
    posted = 0
    taken = []
    for _ in range(30):
        for _ in range(500):
            near.post_message(posted)
            posted += 1
        far = hop(far)
        taken += [far.recv(5) for _ in range(170)]
        far = hop(far)
        far = hop(far)
    near.close()
    taken += rest(far)[0]
    assert taken == list(range(posted))


@pytest.mark.row("W25")
def test_the_sending_end_moves_again_and_again_in_the_middle_of_an_overflow(hop: Hops) -> None:
    near, far = mpchannel.MessageChannel()
    posted = 0
    for _ in range(30):
        for _ in range(500):
            near.post_message(posted)
            posted += 1
        near = hop(near)
    near.close()
    assert rest(far) == (list(range(posted)), "closed")


@pytest.mark.row("W25", "W26")
def test_both_ends_move_at_random_moments_of_many_overflows(hop: Hops) -> None:
    seed = random.randrange(1 << 32)
    dice = random.Random(seed)
    ends: list[Any] = list(mpchannel.MessageChannel())
    posted, taken = [0, 0], [0, 0]
    for _ in range(600):
        side = dice.randrange(2)
        action = dice.random()
        if action < 0.4:
            for _ in range(dice.choice((1, 40, 400))):
                size = dice.choice((1, 1, 1, 3000, 170_000)) if dice.random() < 0.05 else 1
                ends[side].post_message((posted[side], bytes(size)))
                posted[side] += 1
        elif action < 0.7:
            for _ in range(dice.choice((1, 40, 500))):
                if taken[side] == posted[not side]:
                    break
                assert ends[side].recv(5)[0] == taken[side], f"seed {seed}"
                taken[side] += 1
        else:
            ends[side] = hop(ends[side])
    for side in (0, 1):
        left = [number for number, _ in drained(ends[side])]
        assert left == list(range(taken[side], posted[not side])), f"seed {seed}"
    for end in ends:
        end.close()


@pytest.mark.row("W26", "W27", "E16")
def test_an_overflowing_port_moves_from_process_to_process(context: Any) -> None:
    near, far = mpchannel.MessageChannel()
    taken = []
    for number in range(5000):
        near.post_message(number)
    for hop in range(3):
        results, theirs = mpchannel.MessageChannel()
        with children.running(context.Process(target=children.take_and_give_back, args=(theirs, far, 700))):
            near.post_message(5000 + hop)
            event = results.receive(20)
            taken += event.data
            (far,) = event.ports
        results.close()
    near.close()
    taken += rest(far)[0]
    assert taken == list(range(5003))


# Closing in the middle of it


@pytest.mark.row("W09", "N49")
def test_a_sender_that_closes_during_the_overflow_loses_nothing(ends: tuple[Any, Any]) -> None:
    near, far = ends
    for number in range(5000):
        near.post_message(number)
    near.close()
    assert rest(far) == (list(range(5000)), "closed")


def test_a_receiver_that_closes_during_the_overflow_stops_the_sender(ends: tuple[Any, Any]) -> None:
    near, far = ends
    for number in range(5000):
        near.post_message(number)
    assert far.recv(5) == 0
    far.close()
    accepted = 0
    while near.post_message("too late"):
        accepted += 1
        assert accepted < 1000, "posting to a dead reader must stop"
    near.drain(5)
    assert near.buffered_amount == 0
    assert near.wait_closed(5).reason == "closed"


@pytest.mark.parametrize("taken", [0, 1, 600])
def test_ports_in_the_overflow_of_a_port_that_is_closed_unread_get_their_close(taken: int) -> None:
    near, far = mpchannel.MessageChannel()
    kept = []
    for number in range(MUCH):
        if number % 50 == 49:
            mine, moving = mpchannel.MessageChannel()
            near.post_message(number, [moving])
            kept.append(mine)
        else:
            near.post_message(number)
    arrived = [port for _ in range(taken) for port in far.receive(5).ports]
    far.close()
    assert [mine.wait_closed(5).reason for mine in kept[len(arrived) :]] == ["undeliverable"] * (40 - len(arrived))
    for mine, port in zip(kept, arrived, strict=False):
        assert not mine.poll()
        port.close()
        mine.close()
    near.close()


def test_a_close_of_another_thread_during_the_overflow_ends_a_flood() -> None:
    for _ in range(20):
        near, far = mpchannel.MessageChannel()
        flooding = threading.Event()
        failures: list[BaseException] = []

        def flood(port: Any = near, flooding: Any = flooding, failures: Any = failures) -> None:
            try:
                for number in range(200_000):
                    if not port.post_message(number):
                        return
                    if number == MUCH:
                        flooding.set()
                raise AssertionError("the flood was not stopped")
            except BaseException as error:  # noqa: BLE001  # looked at below
                failures.append(error)

        thread = threading.Thread(target=flood)
        thread.start()
        assert flooding.wait(20)
        near.close()
        thread.join(20)
        assert not failures
        found, reason = rest(far)
        assert reason == "closed"
        assert found == list(range(len(found)))
        assert len(found) > MUCH


# Memory


def test_memory_is_given_back_while_the_overflow_is_read(channel: tuple[Any, Any]) -> None:
    near, far = channel
    for number in range(1000):
        near.post_message((number, bytes(64 * 1024)))
    files = anonymous_files()
    assert sum(files.values()) > 50 << 20
    for number in range(750):
        assert far.recv(5)[0] == number
    path = max(files, key=lambda path: files[path])  # the sender's descriptor of it
    assert os.stat(path).st_blocks * 512 < 25 << 20
    assert near.buffered_amount < 25 << 20


def test_nothing_is_held_any_more_when_all_was_taken(channel: tuple[Any, Any]) -> None:
    near, far = channel
    gc.collect()  # what other tests left
    before = len(os.listdir("/proc/self/fd"))
    for round in range(10):
        for number in range(MUCH):
            near.post_message((round, number, bytes(5000)))
        assert near.buffered_amount > 5 << 20
        for number in range(MUCH):
            assert far.recv(5)[:2] == (round, number)
        assert near.buffered_amount == 0
    near.post_message("the sender notices when it posts again that the file is done")
    assert far.recv(5)
    gc.collect()
    assert anonymous_files() == {}
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("count", [1, 100, 1000, 5000])
def test_buffered_amount_is_zero_if_and_only_if_all_was_taken(ends: tuple[Any, Any], count: int) -> None:
    near, far = ends
    assert near.buffered_amount == 0
    for number in range(count):
        near.post_message(number)
        assert near.buffered_amount > 0
    for number in range(count):
        assert near.buffered_amount > 0, f"{count - number} messages were not taken"
        far.recv(5)
    assert near.buffered_amount == 0
    assert far.buffered_amount == 0


@pytest.mark.parametrize("before", [0, MUCH], ids=("by the socket", "by the overflow"))
@pytest.mark.parametrize("kind", ["large", "ports", "bad"])
def test_buffered_amount_is_zero_if_and_only_if_all_of_every_kind_was_taken(
    channel: tuple[Any, Any], kind: str, before: int
) -> None:
    near, far = channel
    for number in range(before):
        near.post_message(number)
    kept = []
    for _ in range(5):
        if kind == "ports":
            mine, moving = mpchannel.MessageChannel()
            kept.append(mine)
            near.post_message(kind, [moving])
        else:
            near.post_message(bytes(3 << 20) if kind == "large" else children.FailsToLoad())
    for _ in range(before + 5):
        assert near.buffered_amount > 0
        if kind == "large" and before == 0:
            assert near.buffered_amount > 3 << 20
        try:
            far.recv(5)
        except mpchannel.MessageError:
            assert kind == "bad"
    assert near.buffered_amount == 0
    for mine in kept:
        mine.close()


def test_drain_returns_when_the_last_message_of_an_overflow_was_taken(channel: tuple[Any, Any]) -> None:
    near, far = channel
    for number in range(MUCH):
        near.post_message(number)
    with pytest.raises(TimeoutError):
        near.drain(0.01)
    reader = threading.Thread(target=drained, args=(far,))
    reader.start()
    near.drain(20)
    reader.join()
    assert mpchannel.receive_message_on_port(far) is None


# Readiness


def by_poll(port: Any) -> bool:
    return bool(port.poll())


def by_connection_wait(port: Any) -> bool:
    return multiprocessing.connection.wait([port], 0) == [port]


def by_our_wait(port: Any) -> bool:
    return mpchannel.wait([port], 0) == [port]


@pytest.mark.parametrize("is_ready", [by_poll, readable_now, by_connection_wait, by_our_wait])
def test_a_port_is_ready_throughout_the_overflow_and_not_behind_it(
    ends: tuple[Any, Any], is_ready: Callable[[Any], bool]
) -> None:
    near, far = ends
    for _ in range(2):
        assert not is_ready(far)
        for number in range(MUCH):
            near.post_message(number)
        for number in range(MUCH):
            assert is_ready(far)
            assert far.recv(5) == number
        assert not is_ready(far)


@pytest.mark.parametrize("is_ready", [by_poll, readable_now, by_connection_wait, by_our_wait])
def test_a_port_with_a_port_or_large_body_waiting_is_ready_and_not_behind_it(
    channel: tuple[Any, Any], is_ready: Callable[[Any], bool]
) -> None:
    near, far = channel
    mine, moving = mpchannel.MessageChannel()
    near.post_message(bytes(1 << 20))
    near.post_message("a port", [moving])
    assert is_ready(far)
    assert len(far.recv(5)) == 1 << 20
    assert is_ready(far)
    assert far.receive(5).data == "a port"
    assert not is_ready(far)
    mine.close()


# A sender that dies in the middle


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"


@pytest.fixture
def huge_poster(context: Any) -> Callable[..., Any]:
    """Starts a process that posts *count* numbers and, when told at the gate, 256 MiB in one message."""

    @contextmanager
    def start(count: int) -> Iterator[tuple[Any, Any, Any]]:
        ours, theirs = mpchannel.MessageChannel()
        gate, far_gate = mpchannel.MessageChannel()
        arguments = (far_gate, theirs, count, HUGE)
        with children.running(context.Process(target=children.post_small_then_huge, args=arguments), -9) as process:
            assert gate.recv(20) == "posted the numbers"
            yield process, ours, gate
        gate.close()
        ours.close()

    return start


def test_the_torn_record_of_a_killed_sender_is_dropped_and_all_before_it_arrives(huge_poster: Any) -> None:
    for _ in range(5):
        with huge_poster(MUCH) as (process, ours, gate):
            taken = []
            while not anonymous_files():  # until we are in the overflow: what comes next goes there too
                taken.append(ours.recv(20))
            (path,) = anonymous_files()
            gate.post_message("go on")
            wait_until(lambda path=path: os.stat(path).st_size > 10 << 20)
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            torn = os.stat(path).st_size < HUGE
            found, reason = rest(ours)
            assert reason == "died"
            if torn:
                assert taken + found == list(range(MUCH))
                return
            assert len(found.pop()) == HUGE  # it was quicker than our kill: once more
            assert taken + found == list(range(MUCH))
    pytest.fail("no record was torn")


def test_a_torn_message_beside_the_overflow_is_dropped_too(huge_poster: Any) -> None:
    for _ in range(5):
        with huge_poster(3) as (process, ours, gate):
            assert [ours.recv(20) for _ in range(3)] == [0, 1, 2]
            gate.post_message("go on")
            wait_until(lambda process=process: any(size > 10 << 20 for size in anonymous_files(process.pid).values()))
            os.kill(process.pid, signal.SIGKILL)
            found, reason = rest(ours)
            assert reason == "died"
            if not found:
                return
            assert len(found.pop()) == HUGE
            assert not found
    pytest.fail("no message was torn")


def test_a_large_record_that_is_still_being_written_is_waited_for(huge_poster: Any) -> None:
    with huge_poster(MUCH) as (_, ours, gate):
        taken = []
        while not anonymous_files():
            taken.append(ours.recv(20))
        gate.post_message("go on")
        taken += [ours.recv(20) for _ in range(MUCH - len(taken))]
        assert taken == list(range(MUCH))
        huge = ours.recv(20)
        assert len(huge) == HUGE
        assert zlib.crc32(huge) == zlib.crc32(bytes(HUGE))
        gate.post_message("enough")
        assert rest(ours) == ([], "died")
