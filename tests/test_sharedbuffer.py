"""``SharedBuffer``: memory that is shared by posting it, and moves if it is listed."""

from __future__ import annotations

import copy
import errno
import hashlib
import os
import pickle
import resource
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mpchannel
from mpchannel import BufferInUseError, DataCloneError, MessageChannel, SharedBuffer

from . import buffer_children as children

MIB = 1 << 20


@contextmanager
def served(context: Any, target: Any = children.serve, *args: Any) -> Iterator[Any]:
    mine, theirs = MessageChannel()
    process = context.Process(target=target, args=(theirs, *args))
    process.start()
    with mine:
        yield mine
    process.join()


def digest(thing: Any) -> str:
    return hashlib.sha256(thing).hexdigest()


# By itself


def test_it_is_zeroed_memory_with_the_buffer_protocol() -> None:
    with SharedBuffer(10_000) as buffer:
        assert len(buffer) == buffer.nbytes == 10_000
        assert bytes(buffer) == bytes(10_000)
        buffer[0] = 7
        buffer[1:4] = b"abc"
        assert buffer[0] == 7
        assert buffer[-1] == 0
        part = buffer[1:4]
        assert isinstance(part, memoryview)
        assert part == b"abc"
        part[0] = ord("x")
        assert bytes(buffer[:5]) == b"\x07xbc\x00"
        assert list(buffer[:2]) == [7, ord("x")]
        with pytest.raises(IndexError):
            buffer[10_000]
        assert repr(buffer) == "<SharedBuffer of 10,000 bytes>"
        assert not buffer.readonly
        assert not buffer.detached
        part.release()
    assert buffer.closed
    assert repr(buffer) == "<SharedBuffer, closed>"
    with pytest.raises(ValueError, match="closed"):
        buffer[0]


def test_arrays_are_views_of_it() -> None:
    with SharedBuffer(800) as buffer:
        array = buffer.asarray("float64", (10, 10))
        array[:] = np.arange(100).reshape(10, 10)
        assert buffer.asarray("float64")[99] == 99
        assert buffer.asarray().shape == (800,)
        assert buffer.asarray("int32", (5,)).shape == (5,)
        with pytest.raises(ValueError, match="small"):
            buffer.asarray("float64", (101,))
        with pytest.raises(BufferError):
            buffer.close()
        assert array[9, 9] == 99
        del array


@pytest.mark.parametrize(
    "thing",
    [b"some bytes", bytearray(3), np.arange(12.0).reshape(3, 4), np.arange(12)[::2], memoryview(b"abcdef")[::-1]],
)
def test_from_buffer_copies_what_is_there(thing: Any) -> None:
    with SharedBuffer.from_buffer(thing) as buffer:
        assert bytes(buffer) == memoryview(thing).tobytes()


def test_what_is_no_size_is_refused() -> None:
    for size, error in ((0, ValueError), (-1, ValueError), ("x", TypeError), (1.5, TypeError)):
        with pytest.raises(error, match="nbytes"):
            SharedBuffer(size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no bytes"):
        SharedBuffer.from_buffer(b"")
    for size in (1 << 45, 1 << 62, 1 << 70):
        with pytest.raises((MemoryError, OverflowError)):
            SharedBuffer(size)


def test_it_is_neither_copied_nor_pickled_nor_resized() -> None:
    with SharedBuffer(10) as buffer:
        for use in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="is not copied: post_message shares it"):
                use(buffer)
        with pytest.raises(TypeError, match="one size"):
            buffer.resize(20)
        with pytest.raises(OSError, match="not permitted"):
            os.ftruncate(buffer._memory.fileno(), 5)  # sealed: nobody's memory can end
        with pytest.raises(OSError, match="not permitted"):
            os.ftruncate(buffer._memory.fileno(), 50)


# Sharing and moving


def test_posting_shares_it(context: Any) -> None:
    with served(context) as port, SharedBuffer(MIB) as buffer:
        buffer[:3] = b"abc"
        port.post_message(("write", buffer))
        assert port.recv(20) == (MIB, False, digest(b"abc" + bytes(MIB - 3)))
        assert port.recv(20) == "written"
        assert buffer[0] == 255
        assert not buffer.detached
        view = buffer[:]  # views are no obstacle to sharing
        port.send(["write", buffer])  # by Connection's name as well
        assert port.recv(20)[0] == MIB
        assert port.recv(20) == "written"
        view.release()


def test_listing_moves_it(context: Any) -> None:
    with served(context) as port:
        buffer = SharedBuffer(MIB)
        buffer[:3] = b"abc"
        assert port.post_message(("back", buffer), transfer=[buffer])
        assert buffer.detached
        assert buffer.closed
        assert "posted through" in repr(buffer)
        assert port.recv(20) == (MIB, False, digest(b"abc" + bytes(MIB - 3)))
        event = port.receive(20)
        assert event.ports == ()
        assert bytes(event.data[:3]) == b"abc"
        event.data.close()
        for transfer in ([buffer], ()):
            with pytest.raises(DataCloneError, match="was posted through"):
                port.post_message(("back", buffer), transfer)


def test_one_buffer_is_one_object_at_the_receiver() -> None:
    near, far = MessageChannel()
    with near, far, SharedBuffer(10) as one, SharedBuffer(10) as other:
        near.post_message([one, {"again": one}, other])
        first, again, second = far.recv(20)
        assert first is again["again"]
        assert first is not second
        near.post_message([one, one, other], [one])
        first, again, second = far.recv(20)
        assert first is again
        assert one.detached
        assert not other.detached


def test_live_views_keep_it_from_moving_and_nothing_happens() -> None:
    near, far = MessageChannel()
    one, two = MessageChannel()
    with near, far, one, two, SharedBuffer(100) as buffer:
        for view in (buffer[2:4], memoryview(buffer), buffer.asarray()):
            with pytest.raises(BufferInUseError, match=r"transfer\[1\] is .*views of it are alive") as caught:
                near.post_message([one, buffer], [one, buffer])
            assert isinstance(caught.value, BufferError)
            assert isinstance(caught.value, DataCloneError)
            assert not one.detached
            assert not buffer.detached
            buffer[0] = 1
            assert not far.poll()
            del view, caught
        near.post_message(buffer, [buffer])
        with far.recv(20) as arrived:
            assert arrived[0] == 1


def test_bad_transfers_change_nothing() -> None:
    near, far = MessageChannel()
    with near, far, SharedBuffer(100) as buffer:
        with pytest.raises(DataCloneError, match="listed twice"):
            near.post_message(None, [buffer, buffer])
        with pytest.raises(DataCloneError, match="generator"):
            near.post_message([buffer, (each for each in "ab")], [buffer])
        assert not buffer.detached
        gone = SharedBuffer(10)
        gone.close()
        for transfer in ([gone], ()):
            with pytest.raises(DataCloneError, match="a closed SharedBuffer"):
                near.post_message(gone, transfer)
        far.close()
        assert near.wait_closed(20) is not None
        assert near.post_message(buffer, [buffer]) is False
        assert buffer.detached  # moved, to nobody


def test_read_only_is_enforced_by_the_kernel(context: Any) -> None:
    buffer = SharedBuffer(MIB)
    with buffer, buffer.toreadonly() as reading:
        assert reading.readonly
        assert "read-only" in repr(reading)
        with pytest.raises(TypeError):
            reading[0] = 1
        with pytest.raises((ValueError, TypeError)):
            reading.asarray()[0] = 1
        buffer[0] = 9
        assert reading[0] == 9
        with served(context) as port:
            port.post_message(("write", reading))
            assert port.recv(20) == (MIB, True, digest(b"\x09" + bytes(MIB - 1)))
            assert "read" in port.recv(20)  # mmap's "can't modify a readonly memory map."
        with served(context, children.reopen) as port:
            port.post_message(reading)
            assert port.recv(20) == errno.EBADF
        assert buffer[0] == 9


def test_buffers_are_shared_through_processes_pipes_and_pools(context: Any) -> None:
    near, far = MessageChannel()
    with near, SharedBuffer(100) as buffer:
        process = context.Process(target=children.in_process, args=(buffer, far))
        process.start()
        assert near.recv(20) == 100
        process.join()
        assert buffer[0] == 42
        one, other = mpchannel.Pipe()
        with one, other:
            one.send(buffer)
            other.recv()[0] = 43
        assert buffer[0] == 43
        with mpchannel.WorkerPool(1, context=context) as pool:
            result = pool.options(retries=1).submit(children.add_one, buffer).result(20)
            assert (buffer[0], result[0]) == (44, 44)
            result.close()


@pytest.mark.leaves("what multiprocessing sends through queues stays with the resource sharer's thread")
def test_buffers_go_through_the_standard_librarys_pools(context: Any) -> None:
    with SharedBuffer(100) as buffer, context.Pool(1) as pool:
        result = pool.apply(children.add_one, (buffer,))
        assert (buffer[0], result[0]) == (1, 1)
        result.close()


def test_a_port_moves_on_with_buffers_unread() -> None:
    near, far = MessageChannel()
    one, other = MessageChannel()
    with near, one, other:
        for number in range(300):  # more than the socket holds
            buffer = SharedBuffer(4096)
            buffer[0] = number % 256
            near.post_message((number, buffer), [buffer])
        one.post_message(far, [far])
        with other.recv(20) as moved:
            for number in range(300):
                place, buffer = moved.recv(20)
                assert (place, buffer[0]) == (number, number % 256)
                buffer.close()


# Memory


def held() -> int:
    """Bytes in the anonymous memory that this process has descriptors of."""
    files = {os.readlink(path): path for path in Path("/proc/self/fd").iterdir() if os.path.exists(path)}
    return sum(os.stat(path).st_blocks * 512 for name, path in files.items() if name.startswith("/memfd:"))


@pytest.mark.timeout(300)
def test_a_thousand_moves_leave_memory_flat(memory_to_itself: None) -> None:
    mine, theirs = MessageChannel()
    process = mpchannel.get_context("fork").Process(target=children.fill_and_move, args=(theirs, 1000, 64 * MIB))
    process.start()
    seen = []
    with mine:
        for number in range(1000):
            with mine.recv(60) as buffer:
                assert (buffer[0], buffer[64 * MIB - 1]) == (number % 256, number % 256)
            seen.append(children.meminfo("Shmem"))
            mine.post_message("next")
    process.join()
    # Others use this machine as well, for a while; what leaks here would stay.
    assert min(seen[500:]) - min(seen[:500]) < 512 * MIB


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["return", "kill"])
def test_nothing_is_left_whoever_ends(context: Any, how: str, memory_to_itself: None) -> None:
    size = 512 * MIB
    before = children.meminfo("Shmem")
    with served(context, children.hold, how) as port:
        buffer = SharedBuffer(size)
        assert held() >= size
        port.post_message(buffer, [buffer])
        assert port.recv(20) == size
        port.post_message("end")
        assert port.wait_closed(20) is not None
    children.wait_for_shmem_below(before + size // 2)


@pytest.mark.timeout(300)
def test_nothing_is_left_of_what_nobody_received(memory_to_itself: None) -> None:
    before = children.meminfo("Shmem")
    near, far = MessageChannel()
    buffer = SharedBuffer(512 * MIB)
    near.post_message(buffer, [buffer])
    near.close()
    far.close()
    children.wait_for_shmem_below(before + 256 * MIB)


def test_it_has_no_name_and_needs_no_tracker() -> None:
    script = """
        import os, sys, mpchannel
        before = set(os.listdir("/dev/shm"))
        buffer = mpchannel.SharedBuffer(1 << 20)
        assert set(os.listdir("/dev/shm")) == before
        assert "multiprocessing.resource_tracker" not in sys.modules or \\
            sys.modules["multiprocessing.resource_tracker"]._resource_tracker._pid is None
        assert "numpy" not in sys.modules
        os._exit(0)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


@pytest.mark.parametrize("room", [1, 2])
def test_limits_are_told_and_nothing_is_left(room: int) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    top = max(map(int, os.listdir("/proc/self/fd")))
    fillers = [os.dup(0)]
    while fillers[-1] < top:  # so that none below the limit is free
        fillers.append(os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(fillers) + room, limits[1]))
    buffers = []
    try:
        with pytest.raises(OSError, match="descriptors open and may have"):
            buffers += [SharedBuffer(10) for _ in range(10)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for number in fillers:
            os.close(number)
    assert not buffers
    SharedBuffer(10).close()
