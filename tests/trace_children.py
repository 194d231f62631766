"""Functions that run in traced processes."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import mpchannel


def double(port: Any) -> None:
    for number in port:
        port.post_message(2 * number)


def refuse() -> None:
    raise ValueError("cannot be loaded")


def pass_on(port: Any) -> None:
    """Take two ports, and hand the first one on through the second one."""
    moving, relay = port.receive(20).ports
    relay.post_message("a port", [moving])
    port.wait_closed(20)


def answer_at(port: Any) -> None:
    """Take a port, and answer what comes there with a listener."""
    done = threading.Event()
    (here,) = port.receive(20).ports
    here.onmessage = lambda event: here.post_message(event.data + 1)
    here.onclose = lambda event: done.set()
    assert done.wait(20)


def post_and_die(port: Any) -> None:
    port.post_message("the last word")
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """A program that knows nothing of traces."""
    near, far = mpchannel.MessageChannel()
    process = mpchannel.get_context("spawn").Process(target=double, args=(far,), name="doubler")
    process.start()
    near.post_message(21)
    assert near.recv(20) == 42
    near.close()
    process.join(20)


if __name__ == "__main__":
    main()
