"""A program to be looked at: ``python -m tests.top_children HOW START_METHOD``. It ends when its stdin does."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from typing import Any

import mpchannel

Port = Any


def serve(port: Port, how: str) -> None:
    """Take one message, and then do as told."""
    port.recv()
    port.post_message(os.getpid())
    if how == "deadlock":
        port.recv()  # so does the other one
    elif how in ("busy", "flood"):
        signal.pause()  # takes nothing more
    else:
        for message in port:
            port.post_message(message)


def main(how: str, method: str) -> None:
    context = mpchannel.get_context(method)
    ports, processes = [], []
    for _ in range(2):
        near, far = mpchannel.MessageChannel()
        process = context.Process(target=serve, args=(far, how), daemon=True)
        process.start()
        near.post_message("begin")
        near.recv(30)
        ports.append(near)
        processes.append(process)
    if how == "busy":
        for number in range(3):
            ports[0].post_message(number)
    if how == "flood":
        for number in range(50_000):
            ports[0].post_message(number)
    print(json.dumps({"pid": os.getpid(), "children": [each.pid for each in processes]}), flush=True)
    if how == "deadlock":
        threading.Thread(target=lambda: (sys.stdin.read(), os.kill(os.getpid(), signal.SIGKILL)), daemon=True).start()
        ports[0].recv()
    sys.stdin.read()
    for process in processes:
        process.kill()
        process.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
