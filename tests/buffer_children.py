"""What the tests of ``SharedBuffer`` run in other processes."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from pathlib import Path
from typing import Any


def meminfo(name: str) -> int:
    """Of the whole system, in bytes."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def wait_for_shmem_below(limit: int) -> None:
    """Others use this machine as well, but not for ever."""
    deadline = time.monotonic() + 100
    while meminfo("Shmem") >= limit:
        if time.monotonic() > deadline:
            raise AssertionError(f"{meminfo('Shmem')} bytes of shared memory are in use, not less than {limit}")
        time.sleep(0.01)


def add_one(buffer: Any) -> Any:
    """Change it where it is, and give it back."""
    buffer[0] = (buffer[0] + 1) % 256
    return buffer


def serve(port: Any) -> None:
    """Answer each buffer by what it is here; then do with it what the message says."""
    for what, buffer in port:
        port.post_message((len(buffer), buffer.readonly, hashlib.sha256(buffer).hexdigest()))
        if what == "write":
            try:
                buffer[0] = 255
            except TypeError as error:
                port.post_message(str(error))
            else:
                port.post_message("written")
        elif what == "back":
            port.post_message(buffer, [buffer])
        del buffer


def reopen(port: Any) -> None:
    """Try to write to memory that is shared for reading only, past the object."""
    buffer = port.recv()
    try:
        os.pwrite(buffer._memory.fileno(), b"x", 0)
    except OSError as error:
        port.post_message(error.errno)
    else:
        port.post_message("written")


def hold(port: Any, how: str) -> None:
    buffer = port.recv()
    port.post_message(len(buffer))
    port.recv()
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def fill_and_move(port: Any, count: int, size: int) -> None:
    import mpchannel

    for number in range(count):
        buffer = mpchannel.SharedBuffer(size)
        buffer[0] = number % 256
        buffer[size - 1] = number % 256
        port.post_message(buffer, [buffer])
        port.recv()


def in_process(buffer: Any, port: Any) -> None:
    """As an argument of a process."""
    buffer[0] = 42
    port.post_message(len(buffer))


def say_sum_when_asked(port: Any, array: Any) -> None:
    port.recv()
    port.post_message(int(array.sum()))


def drop_and_hold(port: Any, how: str) -> None:
    """Answer arrays with their sum, dropping them before; hold the one behind "hold this" until "end" comes."""
    while True:
        message = port.recv()
        if isinstance(message, str):
            break
        total = int(message.sum())
        del message
        port.post_message(total)
    held = port.recv()
    port.post_message(f"held {len(held)}")
    port.recv()
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


# Of test_large


def flip_and_return(port: Any) -> None:
    """Give each message back, its first and last byte changed."""
    for message in port:
        kind = type(message)
        if kind is bytes:
            # (Joined: one copy, and the message itself is gone before the next one is made.)
            message = b"".join((b"first", memoryview(message)[5:-4], b"last"))
        else:
            message[0], message[-1] = 1, 2
        port.post_message(message)
        del message


def post_for_ever(port: Any, size: int) -> None:
    """Arrays and buffers in turn, never more than two ahead of the receiver."""
    import numpy

    import mpchannel

    array, number = numpy.zeros(size, numpy.uint8), 0
    while True:
        array[:] = number % 251
        buffer = mpchannel.SharedBuffer(size)
        buffer[0] = buffer[size - 1] = number % 251
        port.post_message((number, array, buffer), transfer=[buffer])
        number += 1
        if number > 2:
            port.recv()


def take_for_ever(port: Any, told: Any) -> None:
    """Tell *told* of each message that came whole, and end with an assertion for one that did not."""
    for number, array, buffer in port:
        assert (array == number % 251).all()
        assert buffer[0] == buffer[len(buffer) - 1] == number % 251
        port.post_message(number)
        told.post_message(number)


def memory_of_a_post(port: Any, size: int) -> None:
    """Post an array; tell by how many bytes this process grew, and what waits in the channel."""
    import resource

    import numpy

    array = numpy.ones(size // 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    port.post_message(array)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    port.post_message((grown, port.buffered_amount))


# Of test_slots


def middling(number: int, size: int = 64 * 1024) -> bytes:
    """Bytes that are told from those of any other number at every place."""
    return number.to_bytes(8, "little") * (size // 8)


def expect_middling(port: Any, numbers: range, size: int) -> None:
    """Take them, and say how many came; end with an assertion for one that is not as it was posted."""
    for number in numbers:
        assert port.recv() == middling(number, size)
    port.post_message(len(numbers))


def pass_on(port: Any) -> None:
    """Take a port, and give it back as it is."""
    moved = port.recv()
    port.post_message("had it", transfer=[moved])
    port.post_message(moved.detached)


def post_middling(port: Any, numbers: range, size: int) -> None:
    for number in numbers:
        port.post_message(middling(number, size))
    port.post_message("all posted")
    port.recv()


def post_through(port: Any, numbers: range) -> None:
    """Take a port, and post on it."""
    moved = port.recv()
    for number in numbers:
        moved.post_message(middling(number))
    port.post_message("posted", transfer=[moved])
    port.recv()


def give_back(port: Any, through: Any, number: int) -> None:
    """Take one message from a port that was given at the start, and hand it on."""
    assert port.recv() == middling(number)
    through.post_message(None, [port])
    through.recv()
