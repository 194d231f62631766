"""Event classes, and the listener table that every target of events has.

House rules: this room knows nothing of ports, links or threads' loops. A table is changed under its owner's lock
(``lock``) and never calls a listener while holding it. Order, ``once``, de-duplication and the snapshot rule follow
the DOM standard's EventTarget (dispatch skips listeners removed meanwhile); the on-handlers keep their place among
the listeners as HTML's event handler attributes do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar, final

__all__ = ["CloseEvent", "ErrorEvent", "Event", "EventTarget", "ExitEvent", "MessageErrorEvent", "MessageEvent"]
__all__ += ["MessageTarget", "Reporter"]

T = TypeVar("T")

REFUSED: Final = (OSError, RuntimeError)  # a limit of the system: descriptors, threads


class Event:
    """What a listener gets: ``type`` (its name) and ``target`` (the port that received it)."""

    __slots__ = ("target",)

    type = "event"
    target: Any

    def __init__(self, target: Any) -> None:
        self.target = target


class MessageEvent(Event, Generic[T]):
    """A message: ``data`` (the message), ``ports`` (tuple of the transferred objects, in list order). ``source`` is the
    ``window`` it was posted to, and ``None`` for ports (HTML).
    """

    __slots__ = ("data", "ports")

    type = "message"
    source: Any = None
    data: T
    ports: tuple[Any, ...]

    def __init__(self, target: Any, data: T, ports: tuple[Any, ...] = ()) -> None:
        self.target = target
        self.data = data
        self.ports = ports

    def __repr__(self) -> str:
        return f"MessageEvent(data={self.data!r}, ports={self.ports!r})"


@final
class MessageErrorEvent(Event):
    """A message that could not be loaded: ``error`` (a ``MessageError``), ``data`` is ``None``, ``ports`` is ``()``."""

    __slots__ = ("error",)

    type = "messageerror"
    data = None
    ports: tuple[Any, ...] = ()
    error: Exception

    def __init__(self, target: Any, error: Exception) -> None:
        self.target = target
        self.error = error

    def __repr__(self) -> str:
        return f"MessageErrorEvent(error={self.error!r})"


@final
class CloseEvent(Event):
    """The other end is gone, and all it had posted was taken.

    ``reason``: ``"closed"`` (``close()`` was called), ``"collected"`` (garbage-collected), ``"exited"`` (its process
    ended in order), ``"died"`` (killed or crashed), ``"undeliverable"`` (the end was lost on its way to a new holder).
    ``was_clean`` is true for the first three. ``pid`` is the last process known to have held it, or ``None``.
    ``exitcode`` is that process's exit code (``-N`` for signal N) if it was a child of this process and has ended,
    else ``None``; it is looked up when first asked for, which may wait for the child's very last steps (1 s at most).
    """

    __slots__ = ("_exitcode", "pid", "reason")

    type = "close"
    reason: str
    pid: int | None

    def __init__(self, target: Any, reason: str, pid: int | None, exitcode: Callable[[], int | None]) -> None:
        self.target = target
        self.reason = reason
        self.pid = pid
        self._exitcode: Callable[[], int | None] | int | None = exitcode

    @property
    def was_clean(self) -> bool:
        """True for the reasons ``closed``, ``collected`` and ``exited``."""
        return self.reason in ("closed", "collected", "exited")

    @property
    def exitcode(self) -> int | None:
        """Exit code of the process that held it, as told above."""
        found = self._exitcode
        if callable(found):
            self._exitcode = found = found()
        return found

    def __repr__(self) -> str:
        return f"CloseEvent(reason={self.reason!r}, was_clean={self.was_clean}, pid={self.pid})"


@final
class ErrorEvent(Event):
    """A worker failed: ``error`` is the exception that escaped there, or a ``WorkerStartError``."""

    __slots__ = ("error",)

    type = "error"
    error: BaseException

    def __init__(self, target: Any, error: BaseException) -> None:
        self.target = target
        self.error = error

    def __repr__(self) -> str:
        return f"ErrorEvent(error={self.error!r})"


@final
class ExitEvent(Event):
    """A worker ended: ``exitcode`` is its exit code, ``-N`` for signal N."""

    __slots__ = ("exitcode",)

    type = "exit"
    exitcode: int

    def __init__(self, target: Any, exitcode: int) -> None:
        self.target = target
        self.exitcode = exitcode

    def __repr__(self) -> str:
        return f"ExitEvent(exitcode={self.exitcode})"


class _Listener:
    """One registration. ``removed_by`` is the thread that removed it, so that only its own removals count at once."""

    __slots__ = ("call", "once", "removed_by")

    def __init__(self, call: Callable[[Any], Any] | None, once: bool) -> None:
        self.call = call
        self.once = once
        self.removed_by: int | None = None


Reporter = Callable[[BaseException, Callable[..., Any]], None]
"""Told of an exception that escaped a listener, and of the listener."""


class EventTarget:
    """The listener table behind both styles, ``on``/``once``/``off`` and ``add_event_listener``."""

    __slots__ = ("_handlers", "_listeners", "lock")

    event_types: tuple[str, ...] = ()

    def __init__(self) -> None:
        # Re-entrant: a signal handler or a finaliser may register or remove in the middle of a registration.
        self.lock = threading.RLock()
        self._listeners: dict[str, tuple[_Listener, ...]] = {}  # immutable rows: a snapshot is the row itself
        self._handlers: dict[str, _Listener] = {}

    # What users type

    def on(self, type: str, fn: Callable[[Any], Any]) -> Any:
        """Call *fn* with each event of *type*. Returns the target, for chaining. Registering twice counts once.

        Raises ``ValueError`` for an unknown type and ``TypeError`` if *fn* is not callable.
        """
        self._add(type, fn, once=False)
        return self

    def once(self, type: str, fn: Callable[[Any], Any]) -> Any:
        """Like ``on``, for the next event only."""
        self._add(type, fn, once=True)
        return self

    def off(self, type: str, fn: Callable[[Any], Any]) -> Any:
        """Undo ``on``, ``once`` or ``add_event_listener``. What was not registered is ignored."""
        self._check_type(type)
        with self.lock:
            for listener in self._listeners.get(type, ()):
                if listener.call == fn and listener is not self._handlers.get(type):
                    self._remove(type, listener)
                    break
            self._listeners_changed(type, None)
        return self

    def add_event_listener(self, type: str, fn: Callable[[Any], Any], *, once: bool = False) -> None:
        """The Web's spelling of ``on`` and ``once``; the first registration's options win (DOM standard)."""
        self._add(type, fn, once=once)

    def remove_event_listener(self, type: str, fn: Callable[[Any], Any]) -> None:
        """The Web's spelling of ``off``."""
        self.off(type, fn)

    # What owners use

    def _check_type(self, type: str) -> None:
        if type not in self.event_types:
            raise ValueError(f"unknown event type {type!r}: use one of {', '.join(map(repr, self.event_types))}")

    def _add(self, type: str, fn: Callable[[Any], Any], once: bool) -> None:
        self._check_type(type)
        if not callable(fn):
            raise TypeError(f"a listener must be callable, not {fn!r}")
        with self.lock:
            row = self._listeners.get(type, ())
            handler = self._handlers.get(type)
            if any(listener.call == fn for listener in row if listener is not handler):
                return
            listener = _Listener(fn, once)
            self._listeners[type] = (*row, listener)
            try:
                self._listeners_changed(type, listener)
            except REFUSED:  # it is as if it had not been added, and can be
                self._remove(type, listener)
                raise

    def _remove(self, type: str, listener: _Listener) -> None:
        with self.lock:
            listener.removed_by = threading.get_ident()
            self._listeners[type] = tuple(each for each in self._listeners.get(type, ()) if each is not listener)

    def _handler(self, type: str) -> Callable[[Any], Any] | None:
        found = self._handlers.get(type)
        return None if found is None else found.call

    def _set_handler(self, type: str, fn: Callable[[Any], Any] | None) -> None:
        """Set or clear the ``on...`` attribute: replaced in place, moved to the end when cleared and set again."""
        if fn is not None and not callable(fn):
            raise TypeError(f"on{type} must be a callable or None, not {fn!r}")
        with self.lock:
            handler = self._handlers.get(type)
            if fn is None:
                if handler is not None:
                    del self._handlers[type]
                    self._remove(type, handler)
                self._listeners_changed(type, None)
            elif handler is not None:
                before, handler.call = handler.call, fn
                try:
                    self._listeners_changed(type, handler)
                except REFUSED:
                    handler.call = before
                    raise
            else:
                self._handlers[type] = handler = _Listener(fn, once=False)
                self._listeners[type] = (*self._listeners.get(type, ()), handler)
                try:
                    self._listeners_changed(type, handler)
                except REFUSED:
                    del self._handlers[type]
                    self._remove(type, handler)
                    raise

    def _clear_listeners(self) -> None:
        with self.lock:
            me = threading.get_ident()
            for row in self._listeners.values():
                for listener in row:
                    listener.removed_by = me
            self._listeners.clear()
            self._handlers.clear()

    def _listeners_changed(self, type: str, added: _Listener | None) -> None:
        """For the owner: the row of *type* changed (*added* is new). Runs under the lock."""

    def _dispatch(self, event: Event, row: tuple[_Listener, ...], report: Reporter) -> list[Any]:
        """Call the listeners of a snapshot in order. An exception is reported and the rest still run.

        Returns what the listeners returned that is not ``None`` (coroutines, for an owner that can run them).
        """
        me = threading.get_ident()
        results = []
        for listener in row:
            if listener.removed_by == me:
                continue
            call = listener.call
            if call is None:
                continue
            if listener.once:
                with self.lock:
                    self._remove(event.type, listener)
                    self._listeners_changed(event.type, None)
            try:
                result = call(event)
            except BaseException as error:
                # Everything, KeyboardInterrupt too, is the reporter's to judge: it may raise again.
                report(error, call)
            else:
                if result is not None:
                    results.append(result)
        return results


class MessageTarget(EventTarget):
    """A target of messages that is no port: to listen is to start its queue."""

    __slots__ = ()

    @property
    def onmessage(self) -> Callable[[MessageEvent[Any]], Any] | None:
        """Called with each message; ``None`` by default, and messages wait."""
        return self._handler("message")

    @onmessage.setter
    def onmessage(self, fn: Callable[[MessageEvent[Any]], Any] | None) -> None:
        self._set_handler("message", fn)

    @property
    def onmessageerror(self) -> Callable[[MessageErrorEvent], Any] | None:
        """Called for a message that cannot be loaded here."""
        return self._handler("messageerror")

    @onmessageerror.setter
    def onmessageerror(self, fn: Callable[[MessageErrorEvent], Any] | None) -> None:
        self._set_handler("messageerror", fn)
