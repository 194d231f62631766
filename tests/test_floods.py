"""Floods: a reader that never reads, or slowly. The sender's own memory stays as it is; what is read is given back."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import mpchannel
from mpchannel._recycle import give_back

from . import children

MIB = 1 << 20
Port = mpchannel.MessagePort[Any, Any]
pytestmark = [pytest.mark.once, pytest.mark.usefixtures("memory_to_itself")]


def resident(pid: int | str = "self") -> int:
    """Bytes of memory of a process's own."""
    with open(f"/proc/{pid}/status") as file:
        sizes = {line.split(":")[0]: line.split()[1] for line in file if line.startswith("Rss")}
    return (int(sizes["RssAnon"]) + int(sizes["RssFile"])) * 1024


def anonymous() -> dict[int, int]:
    """Memory without a name that this process has descriptors of: bytes held, by inode."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{name}"
        try:
            if os.readlink(path).startswith("/memfd:mpchannel"):
                status = os.stat(path)
                found[status.st_ino] = status.st_blocks * 512
        except OSError:
            continue  # the one that lists
    return found


def shared() -> int:
    """Bytes of shared memory that the whole system holds."""
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Shmem:"))


SMALL = list(range(10))
LARGE = bytes(range(256)) * 2048  # 512 KiB


@pytest.mark.parametrize(("message", "count"), [(SMALL, 200_000), (LARGE, 200)], ids=("small", "large"))
def test_a_reader_that_never_reads_costs_the_sender_no_memory_of_its_own(message: Any, count: int) -> None:
    near, far = mpchannel.MessageChannel[Any, Any]()
    near.post_message(message)
    far.recv(5)
    gc.collect()
    before, threads, descriptors = resident(), threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(count):
        assert near.post_message(message)
    assert resident() - before < 8 * MIB
    assert threading.active_count() == threads
    # The file, and what is kept for large messages; never one for each message.
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 24
    held = sum(anonymous().values())
    assert held > 8 * MIB
    assert near.buffered_amount >= held
    far.close()
    while near.post_message(message):
        pass  # it looks every few dozen messages
    near.close()
    give_back(all_of_it=True)
    assert anonymous() == {}


@pytest.mark.parametrize("message", [SMALL, LARGE], ids=("small", "large"))
def test_with_max_buffered_a_reader_that_never_reads_costs_no_more_than_that(message: Any) -> None:
    near, far = mpchannel.MessageChannel[Any, Any]()
    near.max_buffered = 8 * MIB
    before = resident()
    accepted = refused = 0
    while refused < 1000:
        try:
            accepted += near.post_message(message)
        except mpchannel.BufferFull:
            refused += 1
        assert near.buffered_amount <= 8 * MIB + 64 * 1024
    assert accepted > 10
    assert resident() - before < 4 * MIB
    assert sum(anonymous().values()) < 32 * MIB
    assert [far.recv(5) == message for _ in range(accepted)] == [True] * accepted
    near.drain(5)
    assert near.post_message(message)
    assert far.recv(5) == message


def test_what_a_slow_reader_has_read_is_given_back_while_the_flood_goes_on() -> None:
    """The reader is as quick as the sender, but far behind: what is held is what is between them, ever."""
    near, far = mpchannel.MessageChannel[Any, Any]()
    body = bytes(4000)
    behind = 2000
    for number in range(behind):
        near.post_message((number, body))
    between = behind * 4096
    most = longest = 0
    for number in range(behind, 30_000):
        near.post_message((number, body))
        assert far.recv(5)[0] == number - behind
        if number % 500 == 0:
            most = max(most, sum(anonymous().values()))
            longest = max(longest, max((os.stat(f"/proc/self/fd/{name}").st_size for name in _memfds()), default=0))
    assert most < between + 4 * MIB, "what was read is not given back"
    assert longest > 60 * MIB, "this must have been one long file, with a hole at its beginning"
    for number in range(30_000 - behind, 30_000):
        assert far.recv(5)[0] == number
    assert near.buffered_amount == 0


def _memfds() -> list[str]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("/memfd:mpchannel"):
                found.append(name)
        except OSError:
            continue
    return found


def _drop(near: Port, far: Port) -> None:
    far.close()


def _read(near: Port, far: Port) -> None:
    while near.buffered_amount:
        far.recv(5)


def _move_and_read(near: Port, far: Port) -> None:
    out, into = mpchannel.MessageChannel[Any, Any]()
    out.post_message(None, [far])
    (far,) = into.receive(5).ports
    _read(near, far)


@pytest.mark.parametrize("end", [_read, _drop, _move_and_read])
def test_when_a_flood_is_over_the_whole_system_has_its_memory_back(end: Callable[[Port, Port], None]) -> None:
    near, far = mpchannel.MessageChannel[Any, Any]()
    before = shared()
    for number in range(100):
        near.post_message((number, LARGE))
    for number in range(100_000):
        near.post_message(number)
    assert shared() - before > 40 * MIB
    end(near, far)
    near.post_message("the sender notices")
    near.close()
    far.close()
    give_back(all_of_it=True)
    assert anonymous() == {}
    deadline = time.monotonic() + 20
    while shared() - before > 8 * MIB:  # others use some as well
        assert time.monotonic() < deadline, "it is held somewhere"
        time.sleep(0.01)


@pytest.mark.parametrize("reader", ["stopped", "never reads"])
def test_a_flood_to_another_process_costs_neither_of_them_memory_of_its_own(reader: str) -> None:
    near, theirs = mpchannel.MessageChannel[Any, Any]()
    with children.running(mpchannel.get_context("fork").Process(target=children.hold, args=(theirs,)), -9) as process:
        assert near.recv(20) == "ready"
        if reader == "stopped":
            os.kill(process.pid, signal.SIGSTOP)
        before, theirs_before = resident(), resident(process.pid)
        for _ in range(100_000):
            near.post_message(SMALL)
        assert resident() - before < 8 * MIB
        assert resident(process.pid) - theirs_before < 4 * MIB
        assert sum(anonymous().values()) > 4 * MIB
        process.kill()
        assert near.wait_closed(10)
        while near.post_message(SMALL):
            pass  # it looks every few dozen messages
        assert anonymous() == {}
