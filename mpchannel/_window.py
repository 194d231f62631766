"""``window``, this process's own message target (HTML: ``window.postMessage``, ``window.onmessage``): code that runs
early hands a port to code that is loaded later, and neither imports the other.

It is a channel whose two ends are both here: messages are copied, ports move, and listeners run where those of ports
do, never inside ``post_message``. It keeps a ``Worker`` alive only while messages are on their way to a listener, since
nobody else can post here.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from typing import Any, Final, final

from ._delivery import home
from .channel import MessageChannel
from .events import MessageErrorEvent, MessageEvent, MessageTarget
from .port import MessagePort

__all__ = ["Window", "window"]

AnyPort = MessagePort[Any, Any]

KEPT: Final = 1000
"""Messages that are kept while nobody listens."""


class _WindowEvent(MessageEvent[Any]):
    __slots__ = ()

    @property
    def source(self) -> Any:
        return self.target


@final
class Window(MessageTarget):
    """See above. Events: ``message`` (with ``source``, this object), ``messageerror``. To listen starts the queue."""

    __slots__ = ("_far", "_near", "_on_their_way", "_pid")

    event_types = ("message", "messageerror")

    def __init__(self) -> None:
        super().__init__()
        self._pid = 0
        self._near: AnyPort | None = None
        self._far: AnyPort | None = None
        self._on_their_way = 0

    def post_message(self, message: Any, transfer: Iterable[Any] | None = ()) -> bool:
        """Queue a copy of *message* for the listeners of this process, and move *transfer* to them. Raises as
        ``MessagePort.post_message``. ``False``, with a ``RuntimeWarning``, when nobody listens and 1,000 messages wait.
        """
        near, far = self._ports()
        with self.lock:
            if self._on_their_way >= KEPT and not self._listeners.get("message"):
                full = True
            else:
                full = False
                self._on_their_way += 1
                far.ref()
        if full:
            warnings.warn(
                f"nobody listens to mpchannel.window: {KEPT} messages are kept, this one is dropped",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        try:
            return near.post_message(message, transfer)
        except BaseException:
            self._arrived()
            raise

    def _listeners_changed(self, type: str, added: Any) -> None:
        _, far = self._ports()
        far.onmessage = far.onmessageerror = self._forward if self._listeners.get("message") else None

    def _ports(self) -> tuple[AnyPort, AnyPort]:
        with self.lock:
            if self._near is None or self._far is None or self._pid != os.getpid():
                self._near, self._far = MessageChannel()
                self._far.unref()
                self._pid, self._on_their_way = os.getpid(), 0
            return self._near, self._far

    def _forward(self, event: MessageEvent[Any] | MessageErrorEvent) -> None:
        at = (self._far._home if self._far is not None else None) or home()
        row = self._listeners.get(event.type, ())
        if isinstance(event, MessageEvent):
            event = _WindowEvent(self, event.data, event.ports)
        else:
            event.target = self
            if not row:
                at.report(event.error, self._forward)
        try:
            results = self._dispatch(event, row, at.report)
            if results:
                at.run(results)
        finally:
            self._arrived()

    def _arrived(self) -> None:
        with self.lock:
            self._on_their_way -= 1
            if not self._on_their_way and self._far is not None:
                self._far.unref()

    def begin_in_child(self) -> None:
        """In a process that was started: if it was forked, what was registered is the parent's."""
        if self._pid not in (0, os.getpid()):
            self.__init__()

    def __reduce__(self) -> str:
        return "window"  # functions that travel refer to it; there, it is that process's own

    def __repr__(self) -> str:
        return f"<mpchannel.window of process {os.getpid()}>"


window: Final = Window()
