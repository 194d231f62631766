"""``demo channel``: a channel is made in one process, and one of its ports is received and used in another.

    worker  makes a channel, keeps one port, posts to it, and hands the other port over
    main    receives that in an event on the named channel "port", listens, and answers through it

After the first example of Electron's guide to MessagePorts.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import mpchannel
from mpchannel import ipc


def work() -> None:
    """The worker process."""
    port1, port2 = mpchannel.MessageChannel()
    # Nobody has the other port yet; the message waits in it, and moves with it.
    port1.post_message({"answer": 42})
    ipc.parent.post_message("port", f"a port made in process {os.getpid()}", [port2])
    heard = port1.recv()
    ipc.parent.send("heard", heard, port2.detached)
    port1.close()


def run(start_method: str | None) -> int:
    """The main process. Returns 0 if all came as it should."""
    told, closed = threading.Event(), threading.Event()

    def received(event: ipc.IpcEvent) -> None:
        print(f"main    received, on channel {event.channel!r}: {event.data}")
        (port,) = event.ports

        def heard(event: mpchannel.MessageEvent[Any]) -> None:
            print(f"main    its first message was posted before it moved: {event.data}")
            port.post_message(f"thanks, from process {os.getpid()}")

        def gone(event: mpchannel.CloseEvent) -> None:
            print(f"main    the channel is over: {event}")
            closed.set()

        port.on("message", heard)
        port.on("close", gone)
        port.start()

    def reported(event: ipc.IpcEvent) -> None:
        heard, detached = event.args
        print(f"worker  heard: {heard}")
        print(f"worker  the port that it gave away is detached there: {detached}")
        told.set()

    with mpchannel.Worker(work, context=start_method) as worker:
        print(f"main    process {os.getpid()}: started a worker, process {worker.pid}")
        worker.ipc.on("port", received)
        worker.ipc.on("heard", reported)
        right = told.wait(60) and closed.wait(60)
        worker.join(60)
    print(f"main    exit code of the worker: {worker.exitcode}")
    return 0 if right and worker.exitcode == 0 else 1
