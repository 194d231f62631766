"""Functions that run in processes that are looked at."""

from __future__ import annotations

import sys
import time
from typing import Any

import mpchannel


def wait_for_a_message(port: Any) -> None:
    port.recv()


def sleep(port: Any) -> None:
    time.sleep(60)


def main(method: str) -> None:
    """A program whose first child waits for a message, as the program does, and whose second one reads nothing."""
    context = mpchannel.get_context(method)
    first, for_first = mpchannel.MessageChannel()
    second, for_second = mpchannel.MessageChannel()
    inside = mpchannel.MessageChannel()
    for target, port in ((wait_for_a_message, for_first), (sleep, for_second)):
        process = context.Process(target=target, args=(port,), daemon=True)
        process.start()
        print(process.pid, flush=True)
    for _ in range(1000):
        second.post_message("x" * 50)
    inside.port1.post_message("kept")
    print("ready", flush=True)
    first.recv()


if __name__ == "__main__":
    main(sys.argv[1])
