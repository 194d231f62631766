"""``demo channel``: both ends of a channel in one process. Everything else in this package is more of the same."""

from __future__ import annotations

import threading
from typing import Any

import mpchannel


def run() -> int:
    over = threading.Event()
    port1, port2 = mpchannel.MessageChannel()
    print(f"1   a channel has two ports: {port1}")
    print(f"2                       and: {port2}")

    def heard(event: mpchannel.MessageEvent[Any]) -> None:
        print(f"6   port2's listener, on thread {threading.current_thread().name!r}, heard: {event.data}")
        port2.post_message({"result": event.data["number"] * 2})

    def gone(event: mpchannel.CloseEvent) -> None:
        print(f"10  port2's close event: reason {event.reason!r}, clean: {event.was_clean}, by process {event.pid}")
        over.set()

    job = {"job": "double", "number": 21}
    print(f"3   port1.post_message({job}) returned {port1.post_message(job)}")
    job["number"] = 0
    print(f"4   it was copied as it was posted; here it is now {job}")
    print(f"5   nobody listens yet, so it waits: port1.buffered_amount is {port1.buffered_amount} bytes")
    port2.onclose = gone
    port2.onmessage = heard  # starts port2
    print(f"7   port1.recv() returned {port1.recv(timeout=10)}")
    print(f"8   port1 again: {port1}")
    print("9   port1.close()")
    port1.close()
    return 0 if over.wait(timeout=10) else 1
