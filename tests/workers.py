"""What runs in the workers of the tests. Imports nothing but the package, as ``children``."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from typing import Any

import mpchannel


def port() -> mpchannel.MessagePort[Any, Any]:
    found = mpchannel.parent_port()
    assert found is not None
    return found


def echo(*about: Any) -> None:
    """Answer each message, until there is ``"stop"``."""

    def answer(event: Any) -> None:
        if event.data == "stop":
            port().close()
        else:
            port().post_message((event.data, *about, mpchannel.worker_data()), event.ports)

    port().onmessage = answer


def give_back(ports: list[Any]) -> None:
    """All ports that this worker was given, and those of one message."""
    ports = [*ports, *mpchannel.worker_data()["ports"]]
    event = port().receive()
    port().post_message(event.data, [*ports, *event.ports])


def answer_once() -> None:
    port().once("message", lambda event: port().post_message(event.data))
    port().start()


def post(*messages: Any) -> None:
    for each in messages:
        port().post_message(each)


def post_and_fail(*messages: Any) -> None:
    post(*messages)
    fail(LookupError())


def post_what_cannot_be_loaded() -> None:
    post(CannotBeLoaded(), "good")


class Oops(Exception):
    def __init__(self, one: str, other: int) -> None:
        super().__init__(f"{one}, {other}")  # pickle calls it with one argument


class EndsWhoLoadsIt(Exception):
    def __reduce__(self) -> Any:
        return sys.exit, (9,)


class Refuses(Exception):
    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(name)


class AsksWhoLoadsIt(Exception):
    ask = staticmethod(int)

    def __setstate__(self, _: Any) -> None:
        self.ask()

    def __reduce__(self) -> Any:
        return type(self), (), 1


class Base(BaseException):
    pass


def fail_as(name: str) -> None:
    raise globals()[name]()


def fail(error: BaseException | None = None) -> None:
    raise error or Oops("cannot be loaded", 1)


class CannotBeLoaded:
    def __reduce__(self) -> Any:
        return int, ("not a number",)


def fail_in_a_listener() -> None:
    def listen(event: Any) -> None:
        port().post_message(event.data)
        if event.data == "last":
            port().close()
        raise LookupError("in a listener")

    port().onmessage = listen


def close_and_finish_slowly() -> None:
    mine, theirs = mpchannel.MessageChannel()
    port().post_message("a port", [theirs])

    def listen(event: Any) -> None:
        port().close()
        time.sleep(1.5)  # longer than an exit waits for a listener
        mine.post_message("finished")

    port().onmessage = listen


async def answer_in_a_coroutine() -> None:
    message = await port().arecv()
    port().onmessage = lambda event: (port().post_message(event.data), port().close())
    port().post_message(message)


def be_busy() -> None:
    while True:
        pass


def ignore_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    port().post_message("ready")
    be_busy()


def leave_one_that_ignores_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    process = mpchannel.get_context("fork").Process(target=signal.pause)
    process.start()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    post(process.pid)
    be_busy()


def found_a_family() -> None:
    """Be busy, with a worker and a process that are busy as well; post their process ids."""
    warnings.simplefilter("error")
    worker = mpchannel.Worker(be_busy)
    process = mpchannel.Process(target=be_busy)
    process.start()
    port().post_message([os.getpid(), worker.pid, process.pid])
    be_busy()


def start_a_worker(unref: bool = False) -> None:
    """Live for a worker of one's own, which talks to who started this one."""
    mine, theirs = mpchannel.MessageChannel()
    worker = mpchannel.Worker(talk, theirs)
    if unref:
        worker.unref()
    port().post_message("a port", [mine])


def talk(channel: Any) -> None:
    for message in channel:
        channel.post_message(message)


def tell_whether_interrupts_are_held_back() -> None:
    print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()), flush=True)


def ask_in_a_forked_process() -> None:
    results, into = mpchannel.Pipe(False)
    process = mpchannel.get_context("fork").Process(target=tell_what_is_here, args=(into,))
    process.start()
    port().post_message(results.recv())
    process.join()


def tell_what_is_here(into: Any) -> None:
    into.send((mpchannel.parent_port(), mpchannel.worker_data()))
