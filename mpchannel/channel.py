"""``MessageChannel``, and the functions that take ports: ``receive_message_on_port`` and ``wait``."""

from __future__ import annotations

import select
import time
from collections.abc import Iterable, Iterator
from typing import Any, Generic, Self, TypeVar, final

from ._clone import prepare
from ._endpoint import STALL_PAUSE
from ._kernel import Bell, explain, wait_readable
from ._link import open_pair
from ._plain import check
from .errors import PortClosedError
from .events import MessageEvent
from .port import MessagePort

__all__ = ["MessageChannel", "receive_message_on_port", "wait"]

One = TypeVar("One")
Other = TypeVar("Other")
T = TypeVar("T")


@final
class MessageChannel(Generic[One, Other]):
    """A new channel: two connected ports, ``port1`` and ``port2``. ``port1, port2 = MessageChannel()`` works too.

    For type checkers ``MessageChannel[Request, Reply]()`` is one whose ``port1`` posts requests and receives replies.

    *codec*: ``"json"``, or ``"msgpack"`` (the extra ``msgpack``): both ports, wherever they move, send and take plain
    data alone, so nothing that the other end sends is ever unpickled. That is ``None``, ``bool``, ``int``, ``float``,
    ``str``, lists, dicts with ``str`` keys, and with msgpack ``bytes``; all else is a ``DataCloneError`` with the path
    to it. Ports do not move through such a port. *max_message_size*: bytes of an encoded message (default 64 MiB); a
    larger one is a ``DataCloneError`` at the sender, and ends the channel at the receiver, before memory is allocated
    for it.

    Raises ``ValueError`` for another codec, ``ImportError`` naming the extra that is missing,
    ``OSError`` at a limit of the system (named in its text, nothing left behind) and ``NotImplementedError``
    on a system without the kernel features that channels need.
    """

    __slots__ = ("port1", "port2")

    port1: MessagePort[One, Other]
    port2: MessagePort[Other, One]

    def __init__(self, *, codec: str | None = None, max_message_size: int | None = None) -> None:
        plain = check(codec, max_message_size)
        try:
            prepare()
        except OSError as error:
            raise explain(error, "create a channel") from error  # not even the files of an import could be opened
        one, two = open_pair(plain)
        self.port1 = MessagePort._of(one)
        self.port2 = MessagePort._of(two)

    def __iter__(self) -> Iterator[Any]:
        yield self.port1
        yield self.port2

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close both ends (those that have not moved away)."""
        self.port1.close()
        self.port2.close()

    def __repr__(self) -> str:
        return f"MessageChannel(port1={self.port1!r}, port2={self.port2!r})"


def receive_message_on_port(port: MessagePort[Any, T]) -> MessageEvent[T] | None:
    """Take one message of *port* if there is one; ``None`` if there is none, or the channel is closed.

    Works on a port that was never started. A message goes either here or to listeners. Raises ``TypeError`` for what
    is not a port, ``MessageError`` and ``PortDetachedError`` as ``MessagePort.receive``.
    """
    if not isinstance(port, MessagePort):
        raise TypeError(f"receive_message_on_port takes a MessagePort, not {type(port).__name__}")
    try:
        return port._receive_now()
    except PortClosedError:
        return None


def wait(object_list: Iterable[Any], timeout: float | None = None) -> list[Any]:
    """Those in *object_list* (ports, connections, sockets, process sentinels) that are ready, waiting until one is.

    As ``multiprocessing.connection.wait``: a port is ready when ``recv`` would not wait. An empty list after *timeout*
    seconds.
    """
    waiting = list(object_list)
    ready = _ready(waiting, 0.0)  # most often there is something, and no bell to hang on a thousand ports
    if ready or timeout == 0:
        return ready
    deadline = None if timeout is None else time.monotonic() + timeout
    bell = Bell()  # a port may be moved away or closed by another thread while this one sleeps
    links = [each._link for each in waiting if isinstance(each, MessagePort)]
    try:
        for link in links:
            link.hang(bell)
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            ready = _ready(waiting, left, bell)
            if ready or (left is not None and left <= 0):
                return ready
    finally:
        for link in links:
            link.take_down(bell)


def _ready(waiting: list[Any], seconds: float | None, bell: Bell | None = None) -> list[Any]:
    """Those that are ready, once one is, *bell* rings or *seconds* have passed; maybe none. One call of ``poll``."""
    poller = select.poll()
    asked: dict[int, Any] = {}
    over: list[Any] = []
    for each in waiting:
        if isinstance(each, MessagePort):
            number = each._link.number
            if number is None:
                if each.detached:
                    each.fileno()  # raises, and says where it went
                over.append(each)
                continue
        else:
            number = _number(each)
        if number in asked:
            raise KeyError(f"{each!r} (descriptor {number}) is listed twice")
        asked[number] = each
        poller.register(number, select.POLLIN)
    if bell is not None:
        poller.register(bell, select.POLLIN)
    if over:
        seconds = 0.0
    told = poller.poll(None if seconds is None else min(max(0.0, seconds), 86_400) * 1000)
    if not told and not over:
        return []
    idle = False
    found = set(map(id, over))
    for number, _ in told:
        each = asked.get(number)
        if each is None:
            if bell is not None:
                bell.hush()
        elif not isinstance(each, MessagePort) or each.poll():
            found.add(id(each))
        else:
            idle = idle or each._link.stalled  # its socket is readable, and there is nothing to be had from it yet
    if idle and not found and bell is not None:
        wait_readable(None, bell, STALL_PAUSE)
    return [each for each in waiting if id(each) in found]


def _number(each: Any) -> int:
    """The descriptor of what is not a port, with the errors of ``selectors``."""
    try:
        number = each if isinstance(each, int) else int(each.fileno())
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"Invalid file object: {each!r}") from None
    if number < 0:
        raise ValueError(f"Invalid file descriptor: {number}")
    return number
