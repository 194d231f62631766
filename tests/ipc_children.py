"""What runs in the children of the tests of named channels. Imports nothing but the package, as ``children``."""

from __future__ import annotations

import os
import threading
from typing import Any

import mpchannel
from mpchannel import ipc, window


class Trouble(Exception):
    pass


def say_everything(port: Any = None) -> None:
    """All that a child can say."""
    ipc.parent.post_message("first", {"n": 1})
    ipc.parent.send("second", 1, "a", None)
    ipc.parent.send("nothing at all")
    mine, theirs = mpchannel.MessageChannel()
    ipc.parent.post_message("port", "a port", [theirs])
    assert mine.recv(20) == "through the port"
    ipc.parent.send("last")


def answer_by_name() -> None:
    """Reply to "ask" until there is "stop"."""

    def stop(_: Any) -> None:
        ipc.parent.off("ask", ask)
        ipc.parent.off("stop", stop)

    def ask(event: Any) -> None:
        channel = "block" if event.data == "block" else "answer"
        event.reply(channel, (event.data, event.args, len(event.ports), event.sender is ipc.parent), event.ports)

    ipc.parent.on("ask", ask)
    ipc.parent.on("stop", stop)


def invoke_each(port: Any, calls: list[Any], timeout: float | None) -> None:
    """Post what came of each call: its result, or its exception's class, text and cause."""
    for channel, args in calls:
        try:
            port.post_message(ipc.parent.invoke(channel, *args, timeout=timeout))
        except BaseException as error:  # noqa: BLE001  # that is what is asked for
            port.post_message((type(error), str(error), str(error.__cause__)))


async def ainvoke_each(port: Any, calls: list[Any], timeout: float | None) -> None:
    for channel, args in calls:
        try:
            port.post_message(await ipc.parent.ainvoke(channel, *args, timeout=timeout))
        except BaseException as error:  # noqa: BLE001
            port.post_message((type(error), str(error), str(error.__cause__)))


def invoke_without_patience(port: Any, calls: list[Any], timeout: float | None) -> None:
    ipc._PATIENCE = 0.3  # type: ignore[misc]
    invoke_each(port, calls, timeout)


def refuse_ports(port: Any) -> None:
    """Post the errors of what cannot be sent, and that the port is still here."""
    mine, theirs = mpchannel.MessageChannel()
    for post in (
        lambda: ipc.parent.send("x", 1, [theirs]),
        lambda: ipc.parent.invoke("x", theirs),
        lambda: ipc.parent.post_message("x", {"a": theirs}),
        lambda: ipc.parent.send("x", {"lock": threading.Lock()}),
        lambda: ipc.parent.post_message("x", {"lock": threading.Lock()}),
        lambda: ipc.parent.send(3),  # type: ignore[arg-type]
    ):
        try:
            post()
        except TypeError as error:
            port.post_message((type(error), str(error)))
    mine.post_message("unharmed")
    port.post_message(theirs.recv(20))


def say_much(count: int) -> None:
    for number in range(count):
        ipc.parent.send("numbers", number)
    ipc.parent.send("last")


def has_channels() -> tuple[type, str] | None:
    try:
        ipc.parent.send("x")
    except RuntimeError as error:
        return type(error), str(error)
    return None


def tell_of_channels(port: Any) -> None:
    port.post_message(has_channels())


def start_a_child_that_invokes(port: Any, context: Any) -> None:
    """A child of this child: what it invokes is for this process, which handles nothing."""
    child = mpchannel.get_context(context).Process(target=invoke_without_patience, args=(port, [("pid", ())], 20))
    child.ipc.on("something", print)
    child.start()
    child.join()


def listen_to_a_child_that_does_not_matter() -> None:
    child = mpchannel.Worker(answer_by_name)
    child.ipc.on("answer", print)
    child.unref()


def hand_over() -> None:
    """The preload script: a port that comes from the parent goes to the window."""
    assert mpchannel.worker_data() == "the data"
    ipc.parent.once("main-world-port", lambda event: window.post_message(event.channel, event.ports))


def main_world() -> None:
    def listen(event: Any) -> None:
        if event.source is window and event.data == "main-world-port":
            (port,) = event.ports
            port.onmessage = lambda event: (port.post_message((event.data, os.getpid())), port.close())

    window.onmessage = listen


def fail_early() -> None:
    raise Trouble("in the preload")


def nothing() -> None:
    pass


def keep_too_much_in_the_window(port: Any) -> None:
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        accepted = [window.post_message(number) for number in range(1002)]
    port.post_message((accepted.count(True), [str(each.message) for each in caught]))
    window.onmessage = lambda event: port.post_message(event.data)
