"""What runs in the pools of the tests. Imports nothing but the package, as ``children``."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import mpchannel


def square(number: int) -> int:
    return number * number


def own_pid(_: Any = None) -> int:
    return os.getpid()


def hold(port: Any, answer: Any = None) -> Any:
    """Tell that it runs, and go on when told."""
    port.post_message(os.getpid())
    port.recv()
    return answer


def fail(text: str) -> None:
    error = LookupError(text)
    error.add_note("a note")
    raise ExceptionGroup("several", [error, ValueError(text)])


def die(number: int) -> None:
    os.kill(os.getpid(), number)


def die_once(path: str) -> str:
    if not os.path.exists(path):
        with open(path, "w"):
            os._exit(3)
    return "the second time"


def spin(port: Any) -> None:
    port.post_message("spinning")
    while True:
        pass


def stop_when_asked(port: Any) -> None:
    port.post_message(os.getpid())
    while not mpchannel.cancelled():
        time.sleep(0.001)
    port.post_message("stopped by itself")


def tell_progress(count: int) -> str:
    for number in range(count):
        mpchannel.report(number, count, f"step {number}")
    return "done"


def count_up(count: int, port: Any = None) -> Iterator[int]:
    try:
        yield from range(count)
    finally:
        if port is not None:
            port.post_message("finally")


def count_and_fail(count: int) -> Iterator[int]:
    yield from range(count)
    raise LookupError("behind the last")


def count_and_die(count: int) -> Iterator[int]:
    yield from range(count)
    die(signal.SIGKILL)


def return_a_lock() -> Any:
    return threading.Lock()


class CannotBeLoaded:
    def __reduce__(self) -> Any:
        return int, ("not a number",)


def ignore(_: Any) -> None:
    pass


def return_what_cannot_be_loaded() -> Any:
    return CannotBeLoaded()


_state: dict[str, Any] = {}


def initialize(key: str, value: Any) -> None:
    _state[key] = value


def state(key: str) -> Any:
    return _state.get(key)


def wait_at(gate: Any) -> None:
    gate.recv()


def fail_to_initialize() -> None:
    raise LookupError("no such database")


def misbehave(kind: str, number: int) -> int:
    if kind == "raise":
        raise LookupError(number)
    if kind == "die":
        die(signal.SIGKILL)
    if kind == "exit":
        os._exit(7)
    if kind == "slow":
        time.sleep(0.02)
    while kind == "spin":
        pass
    return number


def answer_through(port: Any) -> Any:
    port.post_message("from the task")
    mine, theirs = mpchannel.MessageChannel()
    mine.post_message("from the result's port")
    return theirs


def note(path: str, number: int) -> int:
    """Write down that it was run."""
    with open(path, "a") as file:
        file.write(f"{number}\n")
    return number


def claim_all(claims: Any, count: int, port: Any) -> None:
    """Claim tasks as they are given, and tell which could begin."""
    begun, done = [], 0
    while done < count:
        upto = port.recv()
        begun += [number for number in range(done + 1, upto + 1) if claims.claim(number)]
        done = upto
    port.post_message(begun)


def wait_at_gate(gate: str) -> str:
    with open(gate) as file:
        file.read()
    return "through"


class WhenLoaded:
    """Large enough to go by itself; does something where it is loaded."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __reduce__(self) -> Any:
        return _when_loaded, (self.what, bytes(100_000))


def _when_loaded(what: str, _: bytes) -> None:
    if what == "die":
        os._exit(9)
    while what == "spin":
        pass


def fail_in_the_second(path: str) -> None:
    """An initializer."""
    try:
        os.mkdir(path)
    except FileExistsError:
        raise LookupError("no second one") from None


def echo_unloadable(count: int) -> Iterator[Any]:
    for number in range(count):
        yield NotLoadable() if number % 2 else number


class NotLoadable:
    def __reduce__(self) -> Any:
        return _fail_to_load, ()


def _fail_to_load() -> None:
    raise LookupError("it cannot be loaded here")


def raise_port_closed(count: int) -> Iterator[int]:
    yield from range(count)
    raise mpchannel.PortClosedError("of the generator")
