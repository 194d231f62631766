"""``MessagePort``, one end of a channel: the only object of a channel that users hold.

A message's way, each room once:

    process A                                                 process B
    port.post_message(message, transfer)                      listener | asyncio | receive() | for ... in port
      | 1  _clone.pack    message -> pickle. Raises before        ^ 6  _delivery: who runs listeners
      |    anything is detached                                   | 5  _clone.unpack  packet -> message, ports
      | 2  pack up each transferable -> bytes, descriptors        |    (user code: only where listeners run)
      v                                                           |
     3  _link.post ======== one packet in the kernel ======== 4  _link.take
           (the socket, or while it is full the _overflow file)

States of a port, and what each does with what can happen to it:

    state     | post                | take                | transfer        | close()  | other end goes
    ----------+---------------------+---------------------+-----------------+----------+---------------------------
    OPEN      | queued, True        | message, or waits   | -> DETACHED     | -> CLOSED| the kernel keeps the rest:
              |                     |                     |                 |          | post False, take goes on,
              |                     |                     |                 |          | when drained -> CLOSED
    DETACHED  | PortDetachedError   | PortDetachedError   | DataCloneError  | nothing  | the new holder's affair
    CLOSED    | packed, False       | PortClosedError     | DataCloneError  | nothing  | nothing

Beside the state there is one bit: the port message queue is disabled until ``start()`` enables it (HTML).

House rules. Locks: ``link.receiving``, then ``link.sending``, then the listener table's ``lock``, which also guards
the state, the bit and whom we told to watch the socket. No user code under any of them. A listener's message is
settled when it is taken: the row of listeners is read under the same lock as the message is taken.
"""

from __future__ import annotations

import enum
import errno
import os
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from multiprocessing import BufferTooShort
from typing import Any, Final, Generic, NoReturn, Self, TypeVar, cast

from ._clone import Entry, Moving, Pickled, Transferable, assemble, loads, message_error, pack, pack_bytes, register
from ._clone import unpack, unpack_bytes
from ._delivery import TURNS, Home, home, loop_home, running_loop
from ._kernel import Descriptors, exit_code
from ._link import End, Link, Loan, Parcel, Taken, give_back
from .errors import BufferFull, ChannelError, DataCloneError, MessageError, PortClosedError, PortDetachedError
from .events import CloseEvent, EventTarget, MessageErrorEvent, MessageEvent, _Listener

__all__ = ["MessagePort"]

SendT = TypeVar("SendT", contravariant=True)
RecvT = TypeVar("RecvT", covariant=True)

_NO_TRANSFER: Final[tuple[()]] = ()
_TROUBLE_PAUSE: Final = 0.05  # seconds until delivery tries again after a limit of the system was hit
_STALL_PAUSE: Final = 0.001  # seconds until it looks again at a large message that is being written
_LOOK_PAUSE: Final = 0.02  # seconds between two looks whether a port that is read by hand is over


_NOT_THE_USERS: Final = ("mpchannel.", "multiprocessing.")


class State(enum.Enum):
    """See the table above."""

    OPEN = "open"  # ours, and connected as far as we know
    DETACHED = "detached"  # moved away: somebody else holds this end
    CLOSED = "closed"  # over: closed here, or the other end is gone and all it sent was taken


class Watched(enum.IntEnum):
    """Whether a home gives this port turns."""

    NOT = 0
    FOR_CLOSE = 1  # held weakly: an unreferenced port may be collected
    FOR_MESSAGES = 2  # held strongly


class Departure:
    """Where a port went: for the errors of whoever still uses the old object."""

    __slots__ = ("how", "when", "where")

    def __init__(self, how: str) -> None:
        self.how = how
        self.when = time.time()
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_NOT_THE_USERS):
            frame = frame.f_back
        self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"

    def __str__(self) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(self.when))
        return f"{self.how} at {self.where} ({clock}, {time.time() - self.when:.1f} s ago)"

    def error(self) -> PortDetachedError:
        return PortDetachedError(f"this port was {self}; only its new holder can use it")


class MessagePort(EventTarget, Transferable, Generic[SendT, RecvT]):
    """One end of a channel. It lives in exactly one process; it moves, it is never copied. Made by ``MessageChannel``.

    What is promised: every message posted at one end is received exactly once, in order, by whoever then holds the
    other end; posting never waits for the receiver; what was posted survives the end of its sender, even a SIGKILL.
    ``post_message`` and ``receive`` may be called from any thread.

    Events: ``message``, ``messageerror``, ``close``. Listeners run on the asyncio loop of the thread that started the
    port, or on the process's delivery thread, one event at a time.
    """

    __slots__ = (
        "__weakref__",
        "_closing",
        "_departure",
        "_enabled",
        "_end",
        "_home",
        "_limit",
        "_link",
        "_look_due",
        "_parked",
        "_ref",
        "_state",
        "_takes",
        "_watched",
    )

    _code = 1
    event_types = ("message", "messageerror", "close")

    def __init__(self) -> None:
        raise TypeError("a MessagePort is made by MessageChannel(), which gives two connected ones")

    @classmethod
    def _of(cls, link: Link) -> Self:
        """The port around a link, as it is made or arrives: disabled, without listeners."""
        port = cls.__new__(cls)
        port._begin(link)
        return port

    def _begin(self, link: Link) -> None:
        EventTarget.__init__(self)
        self._link = link
        link.owner = weakref.ref(self)
        self._state = State.OPEN
        self._enabled = False
        self._home: Home | None = None
        self._watched = Watched.NOT
        self._parked = False  # a message is in the way of the close somebody waits for: look again after a take
        self._look_due = False
        self._closing: tuple[Callable[[], None], ...] = ()  # coroutines that wait for the close
        self._end: End | None = None
        self._departure: Departure | None = None
        self._limit: int | None = None
        self._ref = True
        self._takes = 0

    # Posting

    def post_message(self, message: SendT, transfer: Iterable[Any] | None = _NO_TRANSFER) -> bool:
        """Queue a copy of *message* for the other side and move everything in *transfer* there.

        Never waits for the receiver, however much is queued. The copy is made in the call: later changes to *message*
        are not seen. Returns ``True``, or ``False`` when it was dropped because the channel is closed already.

        *transfer*: an iterable of ports. They are detached here at once, and arrive as new objects in
        ``event.ports``, in this order, and wherever *message* refers to them. (HTML, "message port post message
        steps"; unlike there, nothing is transferred by being mentioned in the message alone.)

        Raises ``DataCloneError`` (nothing sent, nothing detached) for what cannot be pickled, with the path to it, and
        for a bad entry of *transfer*; ``TypeError`` if *transfer* is no iterable; ``PortDetachedError`` if this port
        was moved away; ``BufferFull`` above ``max_buffered``; ``OSError`` at a limit of the system, named in its text.
        """
        if transfer is not _NO_TRANSFER and transfer is not None:
            listed = self._check_list(transfer)
            if listed:
                return self._move(pack(message, Moving(listed)), listed, "posted")
        return self._post(pack(message))

    def _post(self, data: bytes | Pickled) -> bool:
        if type(data) is bytes:
            if self._limit is not None:
                self._check_room(len(data))
            return self._link.post(data)
        parts, size = assemble(data)
        self._check_room(size)
        return self._link.post_parts(parts, size)

    def _check_list(self, transfer: Iterable[Any]) -> Sequence[Transferable]:
        """The transfer list, each entry checked. Errors name the entry."""
        if isinstance(transfer, Transferable):
            raise TypeError(f"transfer must be an iterable of ports; for one port write transfer=[{transfer!r}]")
        if isinstance(transfer, (str, bytes, bytearray)) or not isinstance(transfer, Iterable):
            raise TypeError(f"transfer must be an iterable of ports, not {type(transfer).__name__}")
        if self._departure is not None:
            raise self._departure.error()
        listed = tuple(transfer)
        for place, each in enumerate(listed):
            name = f"transfer[{place}]"
            if each is self:
                raise DataCloneError(f"{name} is the port that posts: a port cannot be sent through itself")
            if not isinstance(each, Transferable):
                raise DataCloneError(f"{name} is {each!r}, which cannot be transferred; only ports can")
            if any(each is other for other in listed[:place]):
                raise DataCloneError(f"{name} is listed twice: {each!r}")
            each._check_movable(name)
        return listed

    def _move(self, pickled: bytes | Pickled, objects: Sequence[Transferable], how: str) -> bool:
        """Post a message with transferables: all or nothing."""
        link = self._link
        doomed = any(each._channel == link.channel for each in objects)
        if doomed:
            warnings.warn(
                f"{self!r} posts its own other end: the message is lost and the channel is closed",
                RuntimeWarning,
                stacklevel=4,
            )
        sent: list[int] = []
        locks = [lock for each in objects for lock in each._locks()]
        locks.append((id(link), 1, link.sending))
        locks.sort(key=lambda lock: lock[:2])
        with ExitStack() as held:
            for _, _, lock in locks:
                held.enter_context(lock)
            for place, each in enumerate(objects):
                each._check_movable(f"transfer[{place}]")  # another thread may have closed or moved it since
            entries = [each._pack_up() for each in objects]
            parts, size = assemble(pickled, entries)
            self._check_room(size)
            numbers = [number for entry in entries for number in entry.numbers]
            accepted = lost = False
            try:
                accepted = not doomed and link.post_parts(parts, size, numbers, sent)
                lost = not accepted
            finally:
                # An exception of a signal handler may come in right behind the call that sends.
                if sent or lost:
                    departure = Departure(f"{how} through {self!r}")
                    for each in objects:
                        each._left(departure, link.peer_pid, lost=lost)
        return accepted

    def _check_room(self, size: int) -> None:
        limit = self._limit
        if limit is not None and (held := self._link.buffered) + size > limit:
            raise BufferFull(
                f"a message of {size} bytes does not fit: {held} bytes are waiting to be taken and max_buffered is "
                f"{limit}; wait with drain() or adrain()"
            )

    @property
    def max_buffered(self) -> int | None:
        """Bytes that may wait to be taken before posting raises ``BufferFull``; ``None`` (default): no limit.

        It belongs to this object and does not travel with the port.
        """
        return self._limit

    @max_buffered.setter
    def max_buffered(self, limit: int | None) -> None:
        if limit is not None and (not isinstance(limit, int) or limit <= 0):
            raise ValueError(f"max_buffered must be a positive number of bytes, or None, not {limit!r}")
        self._limit = limit

    @property
    def buffered_amount(self) -> int:
        """Bytes of memory held by messages posted here and not yet taken by the other side.

        0 if and only if all were taken. Otherwise a measure, not a sum of message sizes: the kernel counts a small
        message as some 768 bytes, and large bodies count until the queue was seen empty. Costs the same however much
        is queued.
        """
        return self._link.buffered

    def drain(self, timeout: float | None = None) -> None:
        """Wait until all that was posted was taken, or the channel is closed. Raises ``TimeoutError``."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for pause in _growing_pauses():
            if not self._link.buffered:
                return
            if deadline is not None:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"{self._link.buffered} bytes were not taken in {timeout} s")
                pause = min(pause, left)
            time.sleep(pause)

    async def adrain(self) -> None:
        """``drain`` for asyncio."""
        import asyncio

        for pause in _growing_pauses():
            if not self._link.buffered:
                return
            await asyncio.sleep(pause)

    # Receiving: the pull side

    def receive(self, timeout: float | None = None) -> MessageEvent[RecvT]:
        """The next message as an event (``data``, ``ports``), waiting for it.

        Raises ``TimeoutError`` after *timeout* seconds; ``PortClosedError`` (an ``EOFError``) once the channel is
        closed and all was taken; ``PortDetachedError`` if the port is or gets moved away; ``MessageError`` for a
        message that cannot be loaded (the port stays usable). An exception of a signal handler loses no message.
        Works on a port that was never started.
        """
        message, ports = self._open(self._link.next(timeout))
        return MessageEvent(self, message, ports)

    def recv(self, timeout: float | None = None) -> RecvT:
        """The next message itself; else as ``receive``."""
        taken = self._link.next(timeout)
        if type(taken) is bytearray and not self._parked:
            try:
                message = loads(taken)
            except BaseException as error:
                self._not_loaded(error, taken)
            give_back(taken)
            return cast(RecvT, message)
        return cast(RecvT, self._open(taken)[0])

    def __iter__(self) -> Self:
        """Messages, until the channel closes."""
        return self

    def __next__(self) -> RecvT:
        try:
            return self.recv()
        except PortClosedError:
            raise StopIteration from None

    def _receive_now(self) -> MessageEvent[RecvT] | None:
        taken = self._take_now()
        if taken is None:
            return None
        message, ports = self._open(taken)
        return MessageEvent(self, message, ports)

    def _take_now(self) -> Taken | None:
        with self._link.receiving:
            return self._link.take()

    def _open(self, taken: Taken) -> tuple[Any, tuple[Any, ...]]:
        """What was taken, as (message, ports). The end becomes ``PortClosedError``."""
        if self._parked:
            self._taken_while_parked()
        if isinstance(taken, Parcel):
            return unpack(taken)
        if isinstance(taken, End):
            self._over(taken)
            raise _closed_error(taken)
        try:
            message = loads(taken)
        except BaseException as error:
            self._not_loaded(error, taken)
        if type(taken) is bytearray:
            give_back(taken)
        return message, ()

    def _not_loaded(self, error: BaseException, packet: bytearray | memoryview) -> NoReturn:
        bad = message_error(error, packet)
        if bad is None:
            with self._link.receiving:
                self._link.put_back(packet)
            raise error
        raise bad from error

    def poll(self, timeout: float | None = 0.0) -> bool:
        """Whether ``recv`` would not wait: a message is there, or the channel is over. Waits up to *timeout* seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                with self._link.receiving:
                    if self._link.ready:
                        return True
                if timeout == 0:
                    return False
                self._link.wait(deadline)
            except TimeoutError:
                return False
            except PortClosedError:
                return True

    def fileno(self) -> int:
        """The descriptor to wait on: readable when a message is there or the other end is gone. Do not read from it."""
        try:
            return self._link.fileno()
        except PortClosedError as error:
            raise OSError(errno.EBADF, "the port is closed") from error

    # The same for asyncio

    async def areceive(self) -> MessageEvent[RecvT]:
        """``receive`` for asyncio, on the socket itself: no helper thread. Cancelling it loses no message."""
        message, ports = self._open(await self._anext())
        return MessageEvent(self, message, ports)

    async def arecv(self) -> RecvT:
        """``recv`` for asyncio."""
        return cast(RecvT, self._open(await self._anext())[0])

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RecvT:
        try:
            return await self.arecv()
        except PortClosedError:
            raise StopAsyncIteration from None

    async def _anext(self) -> Taken:
        import asyncio

        loop = loop_home(asyncio.get_running_loop())
        self._takes += 1
        if self._takes % TURNS == 0:
            await asyncio.sleep(0)  # a port that always has something must not starve the loop
        while True:
            taken = self._take_now()
            if taken is not None:
                return taken
            sock = self._link.watched_by(loop)
            if sock is None or self._link.stalled:
                await asyncio.sleep(_STALL_PAUSE)
            else:
                await loop.readable(sock)

    # multiprocessing.connection.Connection's own interface

    def send(self, obj: SendT) -> None:
        """``Connection.send``: ports found in *obj* move. Raises ``OSError``/``BrokenPipeError`` on a closed channel."""
        moving = Moving(None)
        data = pack(obj, moving)
        if moving.objects:
            for place, each in enumerate(moving.objects):
                if each is self:
                    raise DataCloneError(f"{self!r} cannot be sent through itself")
                each._check_movable(f"port {place} in the message")
            accepted = self._move(data, moving.objects, "sent")
        else:
            accepted = self._post(data)
        self._check_sent(accepted)

    def send_bytes(self, buf: Any, offset: int = 0, size: int | None = None) -> None:
        """``Connection.send_bytes``. At the other end ``recv_bytes`` gives them, and ``recv`` unpickles them."""
        view = memoryview(buf).cast("B")
        if offset < 0:
            raise ValueError("offset is negative")
        if offset > len(view):
            raise ValueError("buffer length < offset")
        if size is not None and size < 0:
            raise ValueError("size is negative")
        if size is not None and offset + size > len(view):
            raise ValueError("buffer length < offset + size")
        parts, length = pack_bytes(view[offset:] if size is None else view[offset : offset + size])
        self._check_room(length)
        self._check_sent(self._link.post_parts(parts, length))

    def _check_sent(self, accepted: bool) -> None:
        if not accepted:
            if self._state is State.CLOSED and self._end is None:
                raise OSError("handle is closed")
            raise BrokenPipeError(errno.EPIPE, "the other end of the channel is gone")

    def recv_bytes(self, maxlength: int | None = None) -> bytes:
        """``Connection.recv_bytes``: what ``send_bytes`` sent, or the pickle of a message without ports."""
        if maxlength is not None and maxlength < 0:
            raise ValueError("negative maxlength")
        data = self._next_bytes()
        if maxlength is not None and len(data) > maxlength:
            raise OSError(f"a message of {len(data)} bytes came, more than maxlength={maxlength}")
        return data

    def recv_bytes_into(self, buf: Any, offset: int = 0) -> int:
        """``Connection.recv_bytes_into``: raises ``BufferTooShort``, with the message in it, if *buf* is too small."""
        view = memoryview(buf).cast("B")
        if offset < 0:
            raise ValueError("negative offset")
        if offset > len(view):
            raise ValueError("offset too large")
        data = self._next_bytes()
        if len(data) > len(view) - offset:
            raise BufferTooShort(data)
        view[offset : offset + len(data)] = data
        return len(data)

    def _next_bytes(self) -> bytes:
        taken, length = self._link.next_with_length()
        if self._parked:
            self._taken_while_parked()
        if isinstance(taken, Parcel):
            return bytes(unpack_bytes(taken.body))
        if isinstance(taken, End):
            self._over(taken)
            raise _closed_error(taken)
        data = bytes(memoryview(taken)[:length])
        if type(taken) is bytearray:
            give_back(taken)
        return data

    @property
    def readable(self) -> bool:
        return self._state is State.OPEN

    @property
    def writable(self) -> bool:
        return self._state is State.OPEN

    # Events: the push side

    @property
    def onmessage(self) -> Callable[[MessageEvent[RecvT]], Any] | None:
        """Handler of ``message`` events. Assigning a callable starts the port (HTML); ``None`` pauses without loss."""
        return self._handler("message")

    @onmessage.setter
    def onmessage(self, fn: Callable[[MessageEvent[RecvT]], Any] | None) -> None:
        self._set_handler("message", fn)
        if fn is not None:
            self.start()

    @property
    def onmessageerror(self) -> Callable[[MessageErrorEvent], Any] | None:
        """Handler of ``messageerror`` events. Does not start the port."""
        return self._handler("messageerror")

    @onmessageerror.setter
    def onmessageerror(self, fn: Callable[[MessageErrorEvent], Any] | None) -> None:
        self._set_handler("messageerror", fn)

    @property
    def onclose(self) -> Callable[[CloseEvent], Any] | None:
        """Handler of the ``close`` event. Does not start the port."""
        return self._handler("close")

    @onclose.setter
    def onclose(self, fn: Callable[[CloseEvent], Any] | None) -> None:
        self._set_handler("close", fn)

    def start(self) -> None:
        """Enable the port message queue: listeners get what is queued and what comes. Idempotent.

        Where they run is settled here: on the asyncio loop running in this thread, else on the delivery thread.
        """
        with self.lock:
            if self._state is not State.OPEN:
                return
            if not self._enabled or self._home is None or not self._home.usable:
                self._enabled = True
                self._settle_home(home())
            self._watch()

    def ref(self) -> None:
        """Let this port, once started and listened to, keep a ``Worker`` alive (the default). Never a plain script."""
        self._ref = True

    def unref(self) -> None:
        """Do not let this port keep a ``Worker`` alive."""
        self._ref = False

    def has_ref(self) -> bool:
        """Whether this port would keep a ``Worker`` alive once started and listened to."""
        return self._ref

    def turn(self) -> None:
        """For the home: the socket has something. Take and dispatch some of it."""
        for _ in range(TURNS):
            link = self._link
            if not link.receiving.acquire(blocking=False):
                return  # a thread is receiving this very moment: it gets it
            try:
                with self.lock:
                    row = self._listeners.get("message", ()) if self._enabled else ()
                    taken = link.take() if row else self._take_if_over()
            except ChannelError:
                return  # closed or moved away meanwhile
            except OSError as error:  # a limit of the system; nothing is lost, so tell and try again
                self._pause(_TROUBLE_PAUSE, error)
                return
            finally:
                link.receiving.release()
            if taken is None:
                if link.stalled:
                    self._pause(_STALL_PAUSE)
                return
            if not self._deliver(taken, row):
                return

    def _take_if_over(self) -> Taken | None:
        """Nobody listens for messages: take nothing but the end, and stop watching if a message is in the way."""
        ready = self._link.ready
        if ready is True:
            self._parked = True
            self._watch(Watched.NOT)
        return self._link.take() if isinstance(ready, End) else None

    def _pause(self, seconds: float, error: OSError | None = None) -> None:
        """No turns for a while: the socket is readable, but there is nothing to be had from it now."""
        at = self._home
        if at is not None:
            with self.lock:
                self._watch(Watched.NOT)
            if error is not None:
                at.report(error, self.turn)
            at.call_later(seconds, self._look_again)

    def _deliver(self, taken: Taken, row: tuple[_Listener, ...]) -> bool:
        """Dispatch what was taken. Whether to go on."""
        at = self._home
        if at is None:
            at = home()
        if isinstance(taken, End):
            self._over(taken, dispatch=True)
            return False
        event: MessageEvent[Any] | MessageErrorEvent
        try:
            event = MessageEvent(self, *self._open(taken))
        except MessageError as error:
            event = MessageErrorEvent(self, error)
            row = self._listeners.get("messageerror", ())
            if not row:
                at.report(error, self.turn)
        results = self._dispatch(event, row, at.report)
        if results:
            at.run(results)
        return self._state is State.OPEN

    def _listeners_changed(self, type: str, added: _Listener | None) -> None:
        if type == "close" and added is not None and self._end is not None:
            # Added after the channel closed: it still hears of it, once, and not in the midst of its registration.
            self._settle_home(self._home or home())
            assert self._home is not None
            self._home.call(partial(self._dispatch_close, (added,)))
        elif self._state is State.OPEN and (added is not None or self._watched):
            self._watch()

    def _settle_home(self, at: Home) -> None:
        """Listeners run at *at* from now on. Under ``lock``."""
        if self._home is not at:
            self._watch(Watched.NOT)
            self._home = at

    def _wanted(self) -> Watched:
        if self._state is not State.OPEN or self._link.lent is not None:
            return Watched.NOT
        if self._enabled and self._listeners.get("message"):
            return Watched.FOR_MESSAGES
        if self._listeners.get("close") or self._closing:
            return Watched.FOR_CLOSE
        return Watched.NOT

    def _watch(self, wanted: Watched | None = None) -> None:
        """Have the home watch the socket as is now *wanted*. Under ``lock``."""
        if wanted is None:
            wanted = self._wanted()
            self._parked = False
        if wanted is self._watched:
            return
        if self._home is None or not self._home.usable:
            self._home = home()
        link, at = self._link, self._home
        self._watched = wanted
        sock = link.watched_by(at)
        if sock is None:
            return
        if wanted:
            at.watch(sock, self, keep=wanted is Watched.FOR_MESSAGES)
            if not link.open:
                at.forget(sock)  # released by another thread in between; it could not know of us
        else:
            at.unwatch(sock)

    def _taken_while_parked(self) -> None:
        """A message was taken; maybe it was the one in the way. Now and then only: a look costs as much as a message."""
        self._link.ring()
        with self.lock:
            if self._home is None or self._look_due:
                return
            self._look_due = True
        self._home.call_later(_LOOK_PAUSE, partial(_look_again, weakref.ref(self)))

    def _look_again(self) -> None:
        with self.lock:
            self._look_due = False
            if self._state is State.OPEN:
                self._watch()

    # Closing

    def close(self) -> None:
        """Leave. Idempotent. The other side gets ``close`` after everything posted before; what is queued here is
        dropped, and no handler of this port runs for it.
        """
        with self.lock:
            if self._state is not State.OPEN:
                return
            self._state = State.CLOSED
            self._watch(Watched.NOT)
        self._link.close("closed")
        self._tell_closing()

    def _over(self, end: End, *, dispatch: bool = False) -> None:
        """The end was taken: the channel is over. *dispatch*: in this very turn; else listeners hear of it soon."""
        with self.lock:
            if self._state is not State.OPEN:
                return
            self._state = State.CLOSED
            self._end = end
            self._watch(Watched.NOT)
            row = self._listeners.get("close", ())
            if row and self._home is None:
                self._home = home()
            at = self._home
        self._link.drop(partial(_closed_error, end))
        self._tell_closing()
        if row and at is not None:
            if dispatch:
                self._dispatch_close(row)
            else:
                at.call(partial(self._dispatch_close, row))

    def _dispatch_close(self, row: tuple[_Listener, ...]) -> None:
        at, event = self._home, self._closed_event()
        if at is not None and event is not None:
            results = self._dispatch(event, row, at.report)
            if results:
                at.run(results)

    def _closed_event(self) -> CloseEvent | None:
        end = self._end
        return None if end is None else CloseEvent(self, end.reason, end.pid, partial(_exit_code_after, end))

    def wait_closed(self, timeout: float | None = None) -> CloseEvent | None:
        """Wait for the close event, which comes after every message was taken (by a listener, or another thread).

        Returns it, or ``None`` if the port was closed by its own holder. Raises ``TimeoutError`` after *timeout*
        seconds, ``PortDetachedError`` if the port is moved away, ``RuntimeError`` on the loop or thread that itself
        delivers the event.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        link = self._link
        while True:
            if self._departure is not None:
                raise self._departure.error()
            if self._state is State.CLOSED:
                return self._closed_event()
            if self._watched:
                if self._home is not None and self._home.here:
                    raise RuntimeError(
                        "wait_closed() would wait for itself: this thread delivers the port's events; "
                        "use `await port.await_closed()` on a loop, or onclose"
                    )
                link.wait(deadline, asleep_while=lambda: self._state is State.OPEN and bool(self._watched))
                continue
            try:
                with link.receiving:
                    ready = link.ready
                    taken = link.take() if isinstance(ready, End) else None
            except ChannelError:
                continue  # closed or moved away this very moment
            if isinstance(taken, End):
                self._over(taken)
            elif ready:
                self._parked = True
                link.wait(deadline, asleep_while=self._message_waits)
            else:
                link.wait(deadline)

    def _message_waits(self) -> bool:
        if self._state is not State.OPEN or self._watched:
            return False
        try:
            with self._link.receiving:
                return self._link.ready is True
        except ChannelError:
            return False

    async def await_closed(self) -> CloseEvent | None:
        """``wait_closed`` for asyncio."""
        import asyncio

        loop = asyncio.get_running_loop()
        closed: asyncio.Future[None] = loop.create_future()
        tell = partial(_settle_from_anywhere, loop, closed)
        with self.lock:
            self._closing += (tell,)
            if self._state is State.OPEN:
                self._watch()
            else:
                tell()
        try:
            await closed
        finally:
            with self.lock:
                self._closing = tuple(each for each in self._closing if each is not tell)
                if self._state is State.OPEN:
                    self._watch()
        if self._departure is not None:
            raise self._departure.error()
        return self._closed_event()

    def _tell_closing(self) -> None:
        for tell in self._closing:
            tell()

    @property
    def closed(self) -> bool:
        """Closed here, or the other end is gone and everything it sent was taken."""
        return self._state is State.CLOSED

    @property
    def detached(self) -> bool:
        """Moved away to another holder."""
        return self._state is State.DETACHED

    @property
    def started(self) -> bool:
        """Whether the port message queue is enabled."""
        return self._enabled

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        link = self._link
        number = int.from_bytes(link.channel[8:], "little")
        about = [f"{link.channel[:2].hex()}-{number}", self._state.value]
        if self._departure is not None:
            about[1:] = [str(self._departure)]
        elif self._state is State.OPEN:
            if self._enabled:
                about.append("started")
            if link.peer_pid:
                about.append(f"other end in process {link.peer_pid}")
        elif self._end is not None:
            about.append(f"the other end {_WORDS[self._end.reason]}")
        return f"<MessagePort {', '.join(about)}>"

    # Moving

    @property
    def _channel(self) -> bytes:
        return self._link.channel

    def _check_movable(self, name: str) -> None:
        """Raise ``DataCloneError`` if this port cannot be moved now."""
        if self._state is State.DETACHED:
            raise DataCloneError(f"{name} is a port that was {self._departure}")
        if self._state is State.CLOSED or not self._link.open:
            raise DataCloneError(f"{name} is a closed port: {self!r}")
        if self._link.lent is not None and self._link.lent.pending:
            raise DataCloneError(f"{name} is a port that is being given to a process right now")

    def _locks(self) -> list[tuple[int, int, Any]]:
        link = self._link
        return [(id(link), 0, link.receiving), (id(link), 1, link.sending)]

    def _pack_up(self) -> Entry:
        luggage, number = self._link.pack_up()
        return Entry(self._code, luggage, (number,))

    def _left(self, departure: Departure, pid: int | None, *, lost: bool = False, tell: bool = False) -> None:
        """This port was moved away; *lost*: to where nobody will receive it. *tell* the other end who holds it now."""
        link = self._link
        with self.lock:
            self._watch(Watched.NOT)
            self._state = State.DETACHED
            self._departure = departure
            self._clear_listeners()
        link.moved_to(pid, tell=tell)
        if lost:
            link.close("undeliverable")
        link.leave(departure.error)
        self._tell_closing()

    @classmethod
    def _arrive(cls, luggage: memoryview | bytes, descriptors: Descriptors) -> MessagePort[Any, Any]:
        return MessagePort._of(Link.unpack(descriptors.claim_socket(), luggage))

    # Crossing into a process

    def _lend(self, loan: Loan) -> tuple[bytes, int]:
        """A process is being started that this port is given to. Take nothing until that succeeded or failed."""
        link = self._link
        with link.receiving, link.sending:
            self._check_movable("the argument")
            luggage, number = link.pack_up()
            link.lend(loan)
        with self.lock:
            self._watch()
        return luggage, number

    def _given_back(self) -> None:
        """The start failed: nothing happened."""
        with self._link.receiving:
            self._link.lend(None)
        with self.lock:
            self._watch()
        self._link.ring()

    def _given_to(self, process: str, pid: int) -> None:
        """The start succeeded: the port is the child's."""
        link = self._link
        with link.receiving, link.sending:
            self._left(Departure(f"given to {process}, pid {pid},"), pid, tell=True)

    def _start_over(self) -> None:
        """In a forked child that was given this port: the port as it arrives."""
        self._begin(self._link.copy_after_fork())

    def _stay_behind(self, departure: Departure) -> None:
        """In a forked child that was not given this port."""
        link = self._link
        self._begin(link)
        self._state = State.DETACHED
        self._departure = departure
        link.stay_behind(departure.error)

    def _undelivered(self) -> None:
        self._left(Departure("lost with a message that could not be loaded"), None, lost=True)


register(MessagePort)

_WORDS: Final = {
    "closed": "was closed",
    "collected": "was garbage-collected",
    "exited": "ended with its process",
    "died": "died with its process",
    "undeliverable": "could not be delivered to a new holder",
}


def _closed_error(end: End) -> PortClosedError:
    by = f" (process {end.pid})" if end.pid else ""
    return PortClosedError(f"the channel is closed: the other end{by} {_WORDS[end.reason]}", end.reason)


def _look_again(reference: weakref.ref[MessagePort[Any, Any]]) -> None:
    port = reference()
    if port is not None:
        port._look_again()


def _exit_code_after(end: End) -> int | None:
    if end.pid is None or end.pid == os.getpid() or end.reason not in ("exited", "died"):
        return None
    return exit_code(end.pid)


def _growing_pauses() -> Iterable[float]:
    pause = 20e-6
    while True:
        yield pause
        pause = min(0.01, pause * 1.5)


def _settle_from_anywhere(loop: Any, future: Any) -> None:
    def settle() -> None:
        if not future.done():
            future.set_result(None)

    if running_loop() is loop:
        settle()
        return
    try:
        loop.call_soon_threadsafe(settle)
    except RuntimeError:
        pass  # the loop was closed, and whoever waited on it is gone
