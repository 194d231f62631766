"""Named channels between a parent and its children, as Electron's ipcMain and ipcRenderer: one port between the two.

    in the child                               in its parent
    parent.post_message, .send  =============> listeners of process.ipc (worker.ipc), then those of main
    parent.invoke, .ainvoke     =============> the function that handles it, of process.ipc or else of main;
                                <- - - - - - - its answer, through a port of its own
    listeners of parent         <============= process.ipc.post_message, .send; main's go to every child

A ``Worker`` always has them. A ``Process`` has them if its parent asked for ``process.ipc``, or registered anything at
``main``, before ``start()``: else they would cost each process a channel.

While nobody listens at an end, messages stay in its port. Once somebody does, on whatever channel, all are taken; those
of a channel without a listener are kept, ``KEPT`` at most, until it gets one. The port of a parent that listens to
nothing at all would leave an ``invoke`` waiting for ever: the child learns that it does listen from another port, which
is open until then.

House rules: listeners run where those of ports do. Locks: ``main``'s table before that of a child's end, then the
port's; none while user code runs.
"""

from __future__ import annotations

import os
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final, NoReturn, final

from ._answer import answer
from ._delivery import Home, home
from ._failure import unpack_error
from .channel import MessageChannel
from .errors import DataCloneError, PortClosedError
from .events import CloseEvent, Event, EventTarget, MessageEvent
from .port import MessagePort

__all__ = ["IpcEvent", "main", "parent"]

AnyPort = MessagePort[Any, Any]
Gift = tuple[AnyPort, AnyPort | None]
"""What a child is given: its port; and one that closes when the parent begins to listen (``None``: it does)."""

KEPT: Final = 1000
"""Messages that one end keeps for channels that nobody listens to yet."""
_PATIENCE: Final = 5.0  # seconds that invoke waits for a parent that listens to nothing

_POST, _SEND, _INVOKE = "post", "send", "invoke"
_NAMED: Final = {_POST: ("message[2][0]", "message"), _SEND: ("message[2]", "args"), _INVOKE: ("message[2]", "args")}


@final
class IpcEvent(Event):
    """A message on a named channel.

    ``channel`` (``type`` as well) is its name, ``args`` what was sent, ``data`` the first of these (the message of
    ``post_message``), ``ports`` a tuple of what was transferred. ``sender`` is the ``Worker`` or ``Process`` it came
    from, the very object: compare it before you trust a request; in a child it is ``ipc.parent``.
    """

    __slots__ = ("args", "ports", "sender", "type")

    def __init__(self, target: Any, channel: str, args: tuple[Any, ...], ports: tuple[Any, ...], sender: Any) -> None:
        self.target = target
        self.type = channel
        self.args = args
        self.ports = ports
        self.sender = sender

    @property
    def channel(self) -> str:
        """Its name."""
        return self.type

    @property
    def data(self) -> Any:
        """The first of ``args``; ``None`` if there are none."""
        return self.args[0] if self.args else None

    def reply(self, channel: str, message: Any = None, transfer: Iterable[Any] | None = ()) -> bool:
        """``post_message`` to whoever sent this."""
        accepted: bool = self.target.post_message(channel, message, transfer)
        return accepted

    def __repr__(self) -> str:
        return f"IpcEvent(channel={self.type!r}, args={self.args!r}, ports={self.ports!r}, sender={self.sender!r})"


def _check_channel(channel: Any) -> None:
    if not isinstance(channel, str):
        raise TypeError(f"channel must be a str, its name, not {channel!r}")


class _Named(EventTarget):
    """Listeners by the name of a channel: ``on(channel, fn)``, ``once``, ``off``; they get an ``IpcEvent``."""

    def _check_type(self, type: str) -> None:
        _check_channel(type)

    @property
    def _listening(self) -> bool:
        return any(self._listeners.values())


class _Answering(_Named):
    """Functions that answer ``invoke``, by the name of a channel."""

    def __init__(self) -> None:
        super().__init__()
        self._functions: dict[str, Callable[..., Any]] = {}

    def handle(self, channel: str, fn: Callable[..., Any]) -> None:
        """Have ``ipc.parent.invoke(channel, *args)`` of this *channel* answered by ``fn(event, *args)``: with what it
        returns, or by its exception. On an asyncio loop it may be a coroutine function.

        Raises ``ValueError`` if that channel is handled here already, ``TypeError`` if *fn* is not callable.
        """
        _check_channel(channel)
        if not callable(fn):
            raise TypeError(f"fn must be callable, not {fn!r}")
        with self.lock:
            if channel in self._functions:
                raise ValueError(f"channel {channel!r} is handled already, by {self._functions[channel]!r}")
            self._functions[channel] = fn
            self._listeners_changed(channel, None)

    def remove_handler(self, channel: str) -> None:
        """Undo ``handle``. What was not handled is ignored."""
        _check_channel(channel)
        with self.lock:
            self._functions.pop(channel, None)
            self._listeners_changed(channel, None)

    @property
    def _listening(self) -> bool:
        return bool(self._functions) or super()._listening


class _End(_Named):
    """One end: it posts through its port, and takes what comes by it."""

    def __init__(self) -> None:
        super().__init__()
        self._port: AnyPort | None = None
        self._kept: dict[str, deque[IpcEvent]] = {}
        self._warned: set[str] = set()

    def post_message(self, channel: str, message: Any = None, transfer: Iterable[Any] | None = ()) -> bool:
        """Queue a copy of *message* on *channel* and move *transfer*. Returns and raises as
        ``MessagePort.post_message``; ``RuntimeError`` if there are no named channels to the other side.
        """
        return self._post(_POST, channel, (message,), transfer)

    def send(self, channel: str, *args: Any) -> bool:
        """``post_message`` for any number of *args* (``event.args``). Ports are refused with ``DataCloneError``, as in
        Electron: only ``post_message`` moves them.
        """
        return self._post(_SEND, channel, args, ())

    def _post(self, kind: str, channel: str, args: tuple[Any, ...], transfer: Iterable[Any] | None) -> bool:
        _check_channel(channel)
        port = self._port or self._raise_unconnected()
        try:
            return port.post_message((kind, channel, args), transfer)
        except DataCloneError as error:
            text = str(error).replace(*_NAMED[kind], 1)
            if kind != _POST and "transfer list" in text:
                text = (
                    f"{text.partition(': ')[0]}: {kind}() moves no ports; use post_message(channel, message, transfer)"
                )
            raise DataCloneError(text) from error.__cause__

    def _raise_unconnected(self) -> NoReturn:
        raise NotImplementedError

    @property
    def _sender(self) -> Any:
        return self

    # Taking

    def _attend(self, at: Home | None = None) -> None:
        """Take what comes if somebody listens, where *at* says; and hand out what was kept. Under ``lock``."""
        port = self._port
        if port is None:
            return
        if self._attended:
            if port.onmessage is None:
                port._set_handler("message", self._receive)
            port._start_at(at)
            if self._kept and port._home is not None:
                port._home.call(self._hand_out)
        elif port.onmessage is not None:
            port.onmessage = None

    @property
    def _attended(self) -> bool:
        return self._listening

    def _listeners_changed(self, type: str, added: Any) -> None:
        self._attend()

    def _receive(self, event: MessageEvent[Any]) -> None:
        kind, channel, args = event.data
        if kind == _INVOKE:
            self._answer(IpcEvent(self, channel, args, (), self._sender), event.ports[0])
            return
        named = IpcEvent(self, channel, args, event.ports, self._sender)
        if channel not in self._kept and self._dispatch_to_all(named):
            return
        if sum(map(len, self._kept.values())) < KEPT:
            self._kept.setdefault(channel, deque()).append(named)
            return
        for port in event.ports:
            port._undelivered()
        if channel not in self._warned:
            self._warned.add(channel)
            warnings.warn(
                f"nobody listens to channel {channel!r}: {KEPT} messages are kept, those that follow are dropped",
                RuntimeWarning,
                stacklevel=2,
            )

    def _hand_out(self) -> None:
        """At the home: what was kept, to those who listen now."""
        for channel, events in list(self._kept.items()):
            while events and self._dispatch_to_all(events[0]):
                events.popleft()
            if not events:
                self._kept.pop(channel, None)

    def _dispatch_to_all(self, event: IpcEvent) -> bool:
        """Whether anybody listened."""
        return self._dispatch_here(self, event)

    def _dispatch_here(self, table: _Named, event: IpcEvent) -> bool:
        row = table._listeners.get(event.type)
        if row:
            at = self._at
            results = table._dispatch(event, row, at.report)
            if results:
                at.run(results)
        return bool(row)

    @property
    def _at(self) -> Home:
        return (self._port and self._port._home) or home()

    def _answer(self, event: IpcEvent, reply: AnyPort) -> None:
        raise NotImplementedError


@final
class ChildIpc(_Answering, _End):
    """``process.ipc``, ``worker.ipc``: named channels to one child."""

    def __init__(self, child: Any) -> None:
        super().__init__()
        self._child = weakref.ref(child)  # it holds this
        self._attended_child: Any = None  # held while messages of it may come
        self._quiet: AnyPort | None = None

    def _open(self) -> Gift:
        """New channels to a child that is being started: what is given to it."""
        self._port, far = MessageChannel()
        gift: Gift = (far, None)
        if not self._attended:
            self._quiet, quiet = MessageChannel()
            gift = (far, quiet)
        for each in (self._port, self._quiet):
            if each is not None:
                each.unref()  # it is the child that keeps alive a worker that started it, or not
        return gift

    def _opened(self) -> None:
        """The child was started."""
        with main.lock:
            main._children.add(self)
        with self.lock:
            self._attend(main._home)

    def _not_opened(self) -> None:
        """It could not be started."""
        for each in (self._port, self._quiet):
            if each is not None:
                each.close()
        self._port = self._quiet = None

    def _attend(self, at: Home | None = None) -> None:
        super()._attend(at)
        port = self._port
        if port is None or not self._attended:
            return
        self._break_silence()
        if self._attended_child is None and not port.closed:
            self._attended_child = self._child()
            port.once("close", self._over)

    def _break_silence(self) -> None:
        """Nobody has to know any more whether somebody listens here."""
        if self._quiet is not None:
            self._quiet.close()
            self._quiet = None

    def _over(self, event: CloseEvent) -> None:
        self._attended_child = None
        event.target._clear_listeners()  # a port that refers to us is a cycle

    @property
    def _attended(self) -> bool:
        return self._listening or main._listening

    @property
    def _sender(self) -> Any:
        return self._child()

    def _raise_unconnected(self) -> NoReturn:
        raise RuntimeError(f"{self._child()!r} has not been started yet")

    def _dispatch_to_all(self, event: IpcEvent) -> bool:
        here, there = self._dispatch_here(self, event), self._dispatch_here(main, event)
        return here or there

    def _answer(self, event: IpcEvent, reply: AnyPort) -> None:
        def call() -> Any:
            fn = self._functions.get(event.type) or main._functions.get(event.type)
            if fn is None:
                handled = ", ".join(map(repr, sorted({*self._functions, *main._functions}))) or "none"
                raise LookupError(f"no function handles {event.type!r} in process {os.getpid()}; handled: {handled}")
            return fn(event, *event.args)

        answer(call, lambda good, result: reply.post_message((good, result)), self._at, f"what handles {event.type!r}")

    def __repr__(self) -> str:
        return f"<ipc of {self._child()!r}>"


@final
class Main(_Answering):
    """``ipc.main``: named channels to all children of this process. What a child's own ``ipc`` handles comes there."""

    def __init__(self) -> None:
        super().__init__()
        self._pid = 0  # where something was registered
        self._home: Home | None = None
        self._children: weakref.WeakSet[ChildIpc] = weakref.WeakSet()

    def post_message(self, channel: str, message: Any = None, transfer: Iterable[Any] | None = ()) -> bool:
        """Post *message* on *channel* to every child that has named channels. Whether any took it. A port can go to one
        child only, so *transfer* must be empty, or it is a ``DataCloneError``: use ``worker.ipc.post_message``.
        """
        if transfer is not None and list(transfer):
            raise DataCloneError("ports can move to one child only: use post_message of worker.ipc or process.ipc")
        return self._to_all(lambda child: child.post_message(channel, message))

    def send(self, channel: str, *args: Any) -> bool:
        """Send *args* on *channel* to every child that has named channels. Whether any took it."""
        _check_channel(channel)
        return self._to_all(lambda child: child.send(channel, *args))

    def _to_all(self, post: Callable[[ChildIpc], bool]) -> bool:
        with self.lock:
            children = [child for child in self._children if child._port is not None]
        taken = [post(child) for child in children]
        return any(taken)

    def _listeners_changed(self, type: str, added: Any) -> None:
        self._pid = os.getpid()
        if self._home is None or not self._home.usable:
            self._home = home()
        for child in list(self._children):
            with child.lock:
                child._attend(self._home)

    def _begin_in_child(self) -> None:
        if self._pid not in (0, os.getpid()):
            self.__init__()  # forked: what was registered is for the parent's children

    def __reduce__(self) -> str:
        return "main"  # functions that travel refer to it; there, it is that process's own

    def __repr__(self) -> str:
        return f"<ipc.main of process {os.getpid()}>"


@final
class Parent(_End):
    """``ipc.parent``: named channels to the process that started this one."""

    def __init__(self) -> None:
        super().__init__()
        self._quiet: AnyPort | None = None
        self._asked: weakref.WeakKeyDictionary[AnyPort, str] = weakref.WeakKeyDictionary()  # for who looks inside

    def invoke(self, channel: str, *args: Any, timeout: float | None = None) -> Any:
        """What the function that the parent handles *channel* with returns for *args*.

        Raises that function's exception as it was, with the traceback there as its ``__cause__``; ``LookupError`` if
        nobody handles *channel*, with what is handled (also if the parent does not listen to anything for 5 s);
        ``TimeoutError`` after *timeout* seconds (the function may still run); ``PortClosedError`` at once if the parent
        is gone; ``DataCloneError`` for what cannot be sent, ports too.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._ask(channel, args) as answer:
            while True:
                try:
                    return self._result(channel, answer.recv(self._pause(deadline)))
                except TimeoutError:
                    self._check_waiting(channel, timeout, deadline)
                except PortClosedError as error:
                    raise self._unanswered(channel, error) from error

    async def ainvoke(self, channel: str, *args: Any, timeout: float | None = None) -> Any:
        """``invoke`` for asyncio."""
        import asyncio

        deadline = None if timeout is None else time.monotonic() + timeout
        with self._ask(channel, args) as answer:
            while True:
                try:
                    async with asyncio.timeout(self._pause(deadline)):
                        packed = await answer.arecv()
                except TimeoutError:
                    self._check_waiting(channel, timeout, deadline)
                except PortClosedError as error:
                    raise self._unanswered(channel, error) from error
                else:
                    return self._result(channel, packed)

    def _ask(self, channel: str, args: tuple[Any, ...]) -> AnyPort:
        answer: AnyPort
        answer, theirs = MessageChannel()
        self._asked[answer] = channel
        try:
            self._post(_INVOKE, channel, args, (theirs,))
        except BaseException:
            answer.close()
            theirs.close()
            raise
        return answer

    def _pause(self, deadline: float | None) -> float | None:
        """Seconds until somebody should look whether to wait on."""
        if deadline is not None:
            return max(0.0, min(_PATIENCE, deadline - time.monotonic()))
        return _PATIENCE if self._unheard else None

    @property
    def _unheard(self) -> bool:
        """Whether the parent does not listen to anything."""
        quiet = self._quiet
        if quiet is not None and quiet.poll():
            quiet.close()
            self._quiet = quiet = None
        return quiet is not None

    def _check_waiting(self, channel: str, timeout: float | None, deadline: float | None) -> None:
        if deadline is not None and deadline - time.monotonic() <= 0:
            raise TimeoutError(f"invoke({channel!r}) was not answered in {timeout} s")
        if self._unheard:
            raise LookupError(
                f"nobody handles {channel!r}: the parent has listened to nothing for {_PATIENCE:g} s; there, call "
                f"ipc.main.handle({channel!r}, fn) or worker.ipc.handle"
            )

    def _result(self, channel: str, packed: tuple[bool, Any]) -> Any:
        good, result = packed
        if good:
            return result
        raise unpack_error(result)

    def _unanswered(self, channel: str, error: PortClosedError) -> PortClosedError:
        return PortClosedError(f"invoke({channel!r}) will not be answered: {error}", error.reason)

    def _connect(self, gift: Gift | None) -> None:
        """In a child that begins: it was given this by its parent."""
        if self._port is not None:
            self.__init__()  # forked: what was registered is for the parent's own parent
        if gift is not None:
            self._port, self._quiet = gift
            with self.lock:
                self._attend()

    def _raise_unconnected(self) -> NoReturn:
        raise RuntimeError(
            "this process has no named channels to a parent: it is the main program, or it is a process whose parent "
            "neither asked for process.ipc nor registered anything at ipc.main before start()"
        )

    def __reduce__(self) -> str:
        return "parent"

    def __repr__(self) -> str:
        return f"<ipc.parent of process {os.getpid()}>"


main: Final = Main()
parent: Final = Parent()


def begin_in_child(gift: Gift | None) -> None:
    """In a process that was started; *gift* is what its parent gave it for this."""
    main._begin_in_child()
    parent._connect(gift)
