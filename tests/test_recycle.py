"""Memory of large messages that is used again: only when nobody has it any more, and not kept for long."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import mpchannel
from mpchannel import MessageChannel, _recycle
from mpchannel._kernel import Memory
from mpchannel._recycle import give_back

from . import buffer_children as children

SIZE = 1 << 20


def array(number: int, size: int = SIZE) -> Any:
    return np.full(size // 8, number, np.int64)


@pytest.fixture(autouse=True)
def _wanted_before() -> Iterator[None]:
    """As if messages of every size had been posted a moment ago."""
    give_back(all_of_it=True)
    _recycle._wanted.update(dict.fromkeys(range(64), time.monotonic() + 60))
    yield
    give_back(all_of_it=True)
    _recycle._wanted.clear()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time memory is allocated."""
    found: list[int] = []
    create = Memory.create

    def counting(**options: Any) -> Memory:
        found.append(len(found))
        return create(**options)

    monkeypatch.setattr(Memory, "create", counting)
    return found


def descriptors() -> int:
    return sum("memfd:mpchannel" in os.readlink(f"/proc/self/fd/{each}") for each in open_numbers())


def open_numbers() -> list[str]:
    numbers = os.listdir("/proc/self/fd")
    return [each for each in numbers if os.path.lexists(f"/proc/self/fd/{each}")]


def until(condition: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def test_what_the_receiver_dropped_is_used_again(channel: Any, made: list[int]) -> None:
    near, far = channel
    for number in range(20):
        near.post_message(array(number))
        assert (far.recv() == number).all()
    assert len(made) == 1


def test_what_happens_once_leaves_nothing_behind(channel: Any, made: list[int]) -> None:
    near, far = channel
    _recycle._wanted.clear()
    before = descriptors()
    for size in (SIZE, 4 * SIZE, 16 * SIZE):
        near.post_message(array(1, size))
        assert far.recv()[0] == 1
        with mpchannel.SharedBuffer(2 * size):
            pass
        assert descriptors() == before
    for _ in range(3):
        near.post_message(array(2))
        far.recv()
    assert descriptors() > before
    assert len(made) == 3 + 3 + 1


def test_shared_buffers_are_made_of_it_and_read_as_zeros(channel: Any, made: list[int]) -> None:
    near, far = channel
    for number in range(20):
        buffer = mpchannel.SharedBuffer(SIZE + 5)
        assert buffer.asarray().max() == 0
        buffer.asarray()[:] = number + 1
        near.post_message(buffer, [buffer])
        received = far.recv()
        assert received.asarray().min() == number + 1
        assert len(received) == SIZE + 5
        del received
    assert len(made) == 1
    held = []
    for number in range(4):
        buffer = mpchannel.SharedBuffer(SIZE)
        buffer.asarray()[:] = number
        near.post_message(buffer)  # shared, and held by the receiver
        held.append(far.recv())
        del buffer
    assert [int(each.asarray().max()) for each in held] == [0, 1, 2, 3]


def test_what_the_receiver_keeps_is_not_touched(channel: Any) -> None:
    near, far = channel
    held = {}
    for number in range(60):
        near.post_message(array(number))
        received = far.recv()
        if number % 3 == 0:
            held[number] = received[5:]  # a view keeps it as well
        del received
    assert all((kept == number).all() for number, kept in held.items())


def test_what_is_queued_is_not_touched(channel: Any) -> None:
    near, far = channel
    near.post_message(array(-1))
    far.recv()  # dropped: used for the next
    for number in range(40):  # some of them in the overflow file
        near.post_message(array(number))
    assert all((far.recv() == number).all() for number in range(40))


def test_what_a_forked_child_holds_is_not_touched(channel: Any, made: list[int]) -> None:
    near, far = channel
    near.post_message(array(7))
    held = far.recv()
    mine, theirs = MessageChannel()
    process = mpchannel.get_context("fork").Process(target=children.say_sum_when_asked, args=(theirs, held))
    process.start()
    del held  # here; the child has it
    for number in range(5):
        near.post_message(array(number))
        assert (far.recv() == number).all()
    with mine:
        mine.post_message("now")
        assert mine.recv(20) == 7 * SIZE // 8
    process.join()
    assert len(made) == 2
    near.post_message(array(1))
    near.post_message(array(2))
    assert until(lambda: far.recv()[0] == 2)
    assert len(made) == 2  # the child's is free now


@pytest.mark.parametrize("how", ["return", "kill"])
def test_other_processes_give_it_back_by_dropping_it_or_by_ending(context: Any, how: str, made: list[int]) -> None:
    mine, theirs = MessageChannel()
    process = context.Process(target=children.drop_and_hold, args=(theirs, how))
    process.start()
    with mine:
        for number in range(10):  # dropped before it answers
            mine.post_message(array(number))
            assert mine.recv(20) == number * SIZE // 8
        assert len(made) == 1
        mine.post_message("hold this")
        mine.post_message(array(5))
        assert mine.recv(20) == f"held {SIZE // 8}"
        near, far = MessageChannel()
        near.post_message(array(3))
        assert len(made) == 2  # the child holds the first
        assert far.recv()[0] == 3
        mine.post_message("end")
        process.join()
        held, *_ = _recycle._kept
        assert until(lambda: held.memory.only_holder)
        near.close()


def test_shapes_and_sizes_take_turns_in_the_same_memory(channel: Any, made: list[int]) -> None:
    near, far = channel
    random = np.random.default_rng(4)
    for _ in range(40):
        sent = random.integers(0, 256, int(random.integers(SIZE, SIZE * 3 // 2)), np.uint8)
        near.post_message({"array": sent, "bytes": sent.tobytes()})
        received = far.recv()
        assert (received["array"] == sent).all()
        assert received["bytes"] == sent.tobytes()
        del received
    assert len(made) <= 4


def test_a_small_message_does_not_hold_large_memory(channel: Any) -> None:
    near, far = channel
    near.post_message(array(0, 16 * SIZE))
    far.recv()
    near.post_message(array(1))
    received = far.recv()
    assert {each.capacity >= 16 * SIZE for each in _recycle._kept} == {True, False}
    assert received[0] == 1


@pytest.mark.parametrize("how", ["recv", "listener", "asyncio"])
def test_it_is_given_back_when_it_is_not_used(channel: Any, how: str) -> None:
    near, far = channel
    before = descriptors()
    if how == "listener":
        far.onmessage = lambda event: None
        near.post_message(array(1))
        assert until(lambda: not _recycle._kept)
    elif how == "recv":
        near.post_message(array(1))
        far.recv()
        assert _recycle._kept
        with pytest.raises(TimeoutError):
            far.recv(_recycle.SECONDS + 1)
    else:

        async def wait() -> None:
            near.post_message(array(1))
            await far.arecv()
            assert _recycle._kept
            await asyncio.sleep(_recycle.SECONDS + 1)

        asyncio.run(wait())
    assert not _recycle._kept
    assert until(lambda: descriptors() == before)


def test_no_more_is_kept_than_the_bounds_say(channel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = channel
    monkeypatch.setattr(_recycle, "_most_bytes", lambda: 4 * SIZE)
    held = []
    for number in range(10):
        near.post_message(array(number))
        held.append(far.recv())
        assert sum(each.capacity for each in _recycle._kept) <= 4 * SIZE
    kept = len(_recycle._kept)
    near.post_message(array(11, 5 * SIZE))
    assert far.recv()[-1] == 11
    assert len(_recycle._kept) == kept  # too large to be kept at all
    monkeypatch.undo()
    for number in range(40):
        near.post_message(array(number, SIZE // 4))
        held.append(far.recv())
    assert len(_recycle._kept) == _recycle._MOST
    assert all((each == each[0]).all() for each in held)


def test_at_the_limit_of_descriptors_what_is_kept_goes_first(channel: Any) -> None:
    near, far = channel
    held = []
    for number in range(6):
        near.post_message(array(number))
        held.append(far.recv())
    assert len(_recycle._kept) == 6
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, open_numbers())) + 1, limits[1]))
    taken: list[int] = []
    try:
        with pytest.raises(OSError, match="Too many open files"):
            taken.extend(map(os.dup, itertools.repeat(0)))
        near.post_message(array(9))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for each in taken:
            os.close(each)
    assert (far.recv() == 9).all()
    assert [int(each[0]) for each in held] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("answer", [True, False])
def test_where_leases_tell_nothing_all_memory_is_fresh(
    channel: Any, answer: bool, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Memory, "only_holder", answer)
    near, far = channel
    for number in range(4):
        near.post_message(array(number))
        assert (far.recv() == number).all()
    assert len(made) == 4


def test_where_memory_cannot_be_opened_again_it_travels_as_it_is(
    channel: Any, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Memory, **_: Any) -> Memory:
        raise OSError(errno.ENOENT, "no /proc")

    monkeypatch.setattr(Memory, "reopened", refuse)
    near, far = channel
    for number in range(4):
        near.post_message(array(number))
        assert (far.recv() == number).all()
    assert len(made) == 4
    assert not _recycle._kept


def test_memory_that_was_sealed_by_another_holder_is_not_used_again(channel: Any) -> None:
    near, far = channel
    near.post_message(array(1))
    far.recv()
    with pytest.raises(PermissionError):
        _recycle._kept[0].memory.seal(0x0008)  # F_SEAL_WRITE; a holder's descriptor could do no more
    near.post_message(array(2))
    assert far.recv()[0] == 2


def test_a_signal_in_the_midst_of_filling_tears_nothing(channel: Any) -> None:
    near, far = channel
    big = array(1, 64 * SIZE)
    near.post_message(big)
    held = far.recv()

    class Alarm(Exception):
        pass

    armed: list[bool] = []

    def handler(*_: object) -> None:
        if armed:  # it may come late, when the timer is stopped already
            armed.clear()
            raise Alarm

    previous = signal.signal(signal.SIGALRM, handler)
    interrupted = 0
    try:
        for number in range(40):
            received = 0
            message = np.full_like(big, number)
            try:
                armed.append(True)
                signal.setitimer(signal.ITIMER_REAL, 0.0002 * (number + 1))
                near.post_message(message)
                armed.clear()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Alarm:
                interrupted += 1
            while far.poll():
                got = far.recv()
                assert (got == number).all()
                received += 1
                del got
            assert received <= 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert interrupted
    assert (held == 1).all()


def test_threads_post_at_once_and_never_into_each_others_memory(channel: Any) -> None:
    import threading

    wrong: list[Any] = []

    def talk(base: int) -> None:
        near, far = MessageChannel()
        with near, far:
            for number in range(base, base + 100):
                near.post_message(array(number, SIZE // 2))
                if not (far.recv() == number).all():
                    wrong.append(number)

    threads = [threading.Thread(target=talk, args=(1000 * each,)) for each in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong
