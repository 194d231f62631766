"""What the tests of ``SharedBuffer`` run in other processes."""

from __future__ import annotations

import hashlib
import os
import signal
from typing import Any


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
