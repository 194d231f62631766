"""``demo worlds``: main hands a port to code in a worker that it shares nothing with, by way of a preload function.

    main        makes a channel, and posts one port to the worker on the named channel "main-world-port"
    preload     runs in the worker before the target is loaded; passes the port on to the worker's window
    main world  the target: finds the port at its window, and talks with main. It knows no named channel, and main
                knows nothing of the window; neither imports the other

After the last example of Electron's guide to MessagePorts, on context isolation.
"""

from __future__ import annotations

import os
import queue
from typing import Any

import mpchannel
from mpchannel import ipc, window


def preload() -> None:
    ipc.parent.once("main-world-port", pass_on)


def pass_on(event: ipc.IpcEvent) -> None:
    window.post_message(event.channel, event.ports)
    event.reply("passed-on", os.getpid())


def main_world() -> None:
    def arrived(event: mpchannel.MessageEvent[Any]) -> None:
        # Only this process itself can post to its window; a port of the world outside would have no source.
        if event.source is not window or event.data != "main-world-port":
            return
        (port,) = event.ports

        def answer(event: mpchannel.MessageEvent[Any]) -> None:
            port.post_message((os.getpid(), event.data.upper()))

        port.onmessage = answer  # the worker lives until this port is closed

    window.onmessage = arrived


def run(start_method: str | None) -> int:
    """The main process. Returns 0 if all came as it should."""
    port1, port2 = mpchannel.MessageChannel()
    with mpchannel.Worker(main_world, preload=preload, context=start_method) as worker, port1:
        print(f"main        process {os.getpid()}: started a worker with a preload function, process {worker.pid}")
        passed_on: queue.SimpleQueue[ipc.IpcEvent] = queue.SimpleQueue()
        worker.ipc.once("passed-on", passed_on.put)
        worker.ipc.post_message("main-world-port", None, [port2])
        print(f"preload     process {passed_on.get(timeout=60).data}: passed the port on to the window")
        answers = []
        for word in ("hello", "world"):
            port1.post_message(word)
            answers.append(port1.recv(60))
            print(f"main world  process {answers[-1][0]}: got {word!r}, answered {answers[-1][1]!r}")
        port1.close()
        worker.join(60)
    print(f"main        exit code of the worker: {worker.exitcode}")
    right = answers == [(worker.pid, "HELLO"), (worker.pid, "WORLD")]
    return 0 if right and worker.exitcode == 0 else 1
