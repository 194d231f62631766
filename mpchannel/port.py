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

The states of a port, and its locks, are in ``_endpoint``.
"""

from __future__ import annotations

import errno
import time
import warnings
from _thread import _count as other_threads
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Generic, Self, TypeVar, final

from ._clone import (
    Departure,
    Moving,
    Pickled,
    Transferable,
    assemble,
    loads,
    pack,
    pack_bytes,
    post_moving,
    receive_into,
    register,
    transferables,
    unpack_bytes,
)
from ._delivery import TURNS, loop_home
from ._end import Buffer, Hand, Taken, spare_buffers
from ._endpoint import STALL_PAUSE, Endpoint, State, Watched, vigil
from ._link import Link
from ._plain import Plain, decode, encode
from ._wire import End, Parcel
from .errors import BufferFull, DataCloneError, MessageError, PortClosedError
from .events import REFUSED, CloseEvent, MessageErrorEvent, MessageEvent

__all__ = ["MessagePort"]

SendT = TypeVar("SendT", contravariant=True)
RecvT = TypeVar("RecvT", covariant=True)

_NO_TRANSFER: Final[tuple[()]] = ()


class MessagePort(Endpoint, Generic[SendT, RecvT]):
    """One end of a channel. It lives in exactly one process; it moves, it is never copied. Made by ``MessageChannel``
    (``MessagePort()`` raises ``TypeError``).

    What is promised: every message posted at one end is received exactly once, in order, by whoever then holds the
    other end; posting never waits for the receiver; what was posted survives the end of its sender, even a SIGKILL.
    ``post_message`` and ``receive`` may be called from any thread.

    Events: ``message``, ``messageerror``, ``close``. Listeners run on the asyncio loop of the thread that started the
    port, or on the process's delivery thread, one event at a time.
    """

    __slots__ = ("_limit", "_ref", "_takes")

    _code = 1

    def __init__(self) -> None:
        raise TypeError("a MessagePort is made by MessageChannel(), which gives two connected ones")

    def _begin(self, link: Link) -> None:
        super()._begin(link)
        self._limit: int | None = None
        self._ref = True
        self._takes = 0

    @classmethod
    def _of(cls, link: Link) -> Self:
        if link.plain is None:
            return super()._of(link)
        port: Self = PlainPort.__new__(PlainPort)  # type: ignore[assignment]
        port._begin(link)
        return port

    @property
    def codec(self) -> str | None:
        """What messages are encoded with, see ``MessageChannel``; ``None``: any object may be sent, by pickle."""
        plain = self._link.plain
        return None if plain is None else plain.codec

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
        if transfer is _NO_TRANSFER and self._limit is None:
            data = pack(message)
            return self._link.post(data) if type(data) is bytes else self._post(data)
        listed = () if transfer is None else self._check_list(transfer)
        return self._post(pack(message, Moving(listed) if listed else None))

    def _post(self, data: bytes | Pickled, how: str = "posted", sent: list[int] | None = None) -> bool:
        """*sent*: as ``SocketEnd.post_parts`` has it."""
        if isinstance(data, Pickled) and data.objects:
            return self._move(data, data.objects, how, sent)
        if type(data) is bytes and sent is None:
            if self._limit is not None:
                self._check_room(len(data))
            return self._link.post(data)
        parts, size = assemble(data)
        self._check_room(size)
        return self._link.post_parts(parts, size, (), sent)

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
            if each._shared:
                raise DataCloneError(f"{name} is {each!r}: a copy goes with the message by itself; do not list it")
            if any(each is other for other in listed[:place]):
                raise DataCloneError(f"{name} is listed twice: {each!r}")
            each._check_movable(name)
        return listed

    def _move(
        self, pickled: bytes | Pickled, objects: Sequence[Transferable], how: str, sent: list[int] | None = None
    ) -> bool:
        doomed = any(each._channel == self._link.channel for each in objects)
        if doomed:
            warnings.warn(
                f"{self!r} posts its own other end: the message is lost and the channel is closed",
                RuntimeWarning,
                stacklevel=4,
            )
        return post_moving(
            self._link,
            pickled,
            objects,
            Departure(how, self._describe()),
            doomed=doomed,
            check=self._check_room,
            sent=sent,
        )

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
        """Wait until all that was posted was taken, or the channel is closed.

        Raises ``TimeoutError`` after *timeout* seconds.
        """
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

    # Receiving

    def receive(self, timeout: float | None = None) -> MessageEvent[RecvT]:
        """The next message as an event (``data``, ``ports``), waiting for it.

        Raises ``TimeoutError`` after *timeout* seconds; ``PortClosedError`` (an ``EOFError``) once the channel is
        closed and all was taken; ``PortDetachedError`` if the port is or gets moved away; ``MessageError`` for a
        message that cannot be loaded (the port stays usable). An exception of a signal handler (Ctrl-C) loses no
        message, unless it comes up in the very loading of one that carries ports: these are then closed.
        Works on a port that was never started.
        """
        hand: Hand = []
        try:
            taken = self._link.next(hand, timeout)
            event = MessageEvent(self, *self._open(taken))
            pooled = type(taken) is Buffer
        except BaseException as error:
            self._link.dropped += (hand,)  # statements that no signal handler comes between: see Link.take
            self._link.slow = True
            self._fumbled(hand, error)
        if pooled:
            spare_buffers[:0] = hand  # no call from here on, so no signal handler: the event is as good as returned
        return event

    def recv(self, timeout: float | None = None) -> RecvT:
        """The next message itself; else as ``receive``."""
        hand: Hand = []
        try:
            link = self._link
            taken = None
            if link.hot or link.slow:  # next() would do the same a little later
                if not other_threads():
                    taken = link.take(hand)  # nobody to lock out, and the lock is a tenth of the whole cost
                else:
                    with link.receiving:
                        taken = link.take(hand)
            if taken is None:
                taken = link.next(hand, timeout, link.hot)
            kind = type(taken)
            pooled = kind is Buffer
            if (pooled or kind is memoryview) and not self._parked:
                message: RecvT = loads(taken)  # type: ignore[arg-type]
            else:
                message = self._open(taken)[0]
        except BaseException as error:
            self._link.dropped += (hand,)  # statements that no signal handler comes between: see Link.take
            self._link.slow = True
            self._fumbled(hand, error)
        if pooled:
            spare_buffers[:0] = hand  # as in receive()
        return message

    def __iter__(self) -> Self:
        """Messages, until the channel closes."""
        return self

    def __next__(self) -> RecvT:
        try:
            return self.recv()
        except PortClosedError:
            raise StopIteration from None

    def _receive_now(self) -> MessageEvent[RecvT] | None:
        hand: Hand = []
        try:
            taken = self._take_now(hand)
            event = None if taken is None else MessageEvent(self, *self._open(taken))
        except BaseException as error:
            self._link.dropped += (hand,)  # statements that no signal handler comes between: see Link.take
            self._link.slow = True
            self._fumbled(hand, error)
        return event

    def poll(self, timeout: float | None = 0.0) -> bool:
        """Whether ``recv`` would not wait: a message is there, or the channel is over. Waits up to *timeout* s."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                with self._link.receiving:
                    if self._link.ready:
                        return True
            except PortClosedError:
                return True
            if timeout == 0 or not self._link.wait(deadline):
                return False

    def fileno(self) -> int:
        """The descriptor to wait on: readable when a message is there or the other end is gone. Do not read from it.

        Raises ``OSError`` if the port is closed, ``PortDetachedError`` if it was moved away.
        """
        try:
            return self._link.fileno()
        except PortClosedError as error:
            raise OSError(errno.EBADF, "the port is closed") from error

    # Receiving with asyncio

    async def areceive(self) -> MessageEvent[RecvT]:
        """``receive`` for asyncio, on the socket itself: no helper thread. Cancelling it loses no message."""
        hand: Hand = []
        try:
            taken = await self._anext(hand)
            event = MessageEvent(self, *self._open(taken))
            pooled = type(taken) is Buffer
        except BaseException as error:
            self._link.dropped += (hand,)  # statements that no signal handler comes between: see Link.take
            self._link.slow = True
            self._fumbled(hand, error)
        if pooled:
            spare_buffers[:0] = hand  # as in receive()
        return event

    async def arecv(self) -> RecvT:
        """``recv`` for asyncio."""
        return (await self.areceive()).data

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RecvT:
        try:
            return await self.arecv()
        except PortClosedError:
            raise StopAsyncIteration from None

    async def _anext(self, hand: Hand) -> Taken:
        import asyncio

        loop = loop_home(asyncio.get_running_loop())
        self._takes += 1
        if self._takes % TURNS == 0:
            await asyncio.sleep(0)  # a port that always has something must not starve the loop
        while True:
            taken = self._take_now(hand)
            if taken is not None:
                return taken
            if self._link.stalled:
                await asyncio.sleep(STALL_PAUSE)
            else:
                await loop.readable(self._link)

    # multiprocessing.connection.Connection's own interface

    def send(self, obj: SendT) -> None:
        """``Connection.send``: ports found in *obj* move.

        Raises ``OSError`` on a channel that is closed, ``DataCloneError`` for what cannot be sent; nothing
        has moved then.
        """
        moving = Moving(None)
        data = pack(obj, moving)
        for place, each in enumerate(moving.objects):
            if each is self:
                raise DataCloneError(f"{self!r} cannot be sent through itself")
            each._check_movable(f"port {place} in the message")
        accepted = self._post(data, "sent")
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
        return receive_into(buf, offset, self._next_bytes)

    def _next_bytes(self) -> bytes:
        hand: Hand = []
        try:
            taken = self._link.next(hand)
            if isinstance(taken, End) or (isinstance(taken, Parcel) and transferables(taken)):
                ports = self._open(taken)[1]
                for each in ports:
                    each._undelivered()
                raise MessageError(f"a message with {len(ports)} ports cannot be received as bytes; use recv()")
            if self._parked:
                self._taken_while_parked()
            if isinstance(taken, Parcel):
                data = bytes(unpack_bytes(taken.body))
            elif isinstance(taken, Buffer):
                data = bytes(memoryview(taken)[: taken.size or None])
            else:
                data = bytes(taken)
        except BaseException as error:
            self._link.dropped += (hand,)  # statements that no signal handler comes between: see Link.take
            self._link.slow = True
            self._fumbled(hand, error)
        return data

    @property
    def readable(self) -> bool:
        """Whether it can still be used here: neither closed nor moved away."""
        return self._state is State.OPEN

    @property
    def writable(self) -> bool:
        """The same as ``readable``."""
        return self._state is State.OPEN

    # Listening (on, once, off and the rest are EventTarget's)

    @property
    def onmessage(self) -> Callable[[MessageEvent[RecvT]], Any] | None:
        """Handler of ``message`` events. Assigning a callable starts the port (HTML); ``None`` pauses without loss."""
        return self._handler("message")

    @onmessage.setter
    def onmessage(self, fn: Callable[[MessageEvent[RecvT]], Any] | None) -> None:
        before = self._handler("message")
        self._set_handler("message", fn)
        if fn is not None:
            try:
                self.start()
            except REFUSED:
                self._set_handler("message", before)
                raise

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

    def ref(self) -> None:
        """Let this port, once started and listened to, keep a ``Worker`` alive (the default). Never a plain script."""
        self._ref = True
        vigil.ring()

    def unref(self) -> None:
        """Do not let this port keep a ``Worker`` alive."""
        self._ref = False
        vigil.ring()

    def _keeps_alive(self) -> bool:
        return self._ref and self._wanted() is Watched.FOR_MESSAGES

    def has_ref(self) -> bool:
        """Whether this port would keep a ``Worker`` alive once started and listened to."""
        return self._ref

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


@final
class PlainPort(MessagePort[SendT, RecvT]):
    """A port with a codec: what it sends and takes is plain data alone. (A class of its own, so that other ports pay
    nothing for it. Its link gives packets of its codec only.)
    """

    __slots__ = ()

    @property
    def _plain(self) -> Plain:
        plain = self._link.plain
        assert plain is not None
        return plain

    def post_message(self, message: SendT, transfer: Iterable[Any] | None = _NO_TRANSFER) -> bool:
        if transfer is not _NO_TRANSFER and transfer is not None and self._check_list(transfer):
            raise DataCloneError(f"transfer[0]: a port with codec={self.codec!r} sends plain data, and moves nothing")
        if self._departure is not None:
            raise self._departure.error()
        return self._post(encode(self._plain, message))

    def send(self, obj: SendT) -> None:
        self._check_sent(self.post_message(obj))

    def send_bytes(self, buf: Any, offset: int = 0, size: int | None = None) -> None:
        raise TypeError(f"a port with codec={self.codec!r} sends messages, not bytes; use post_message()")

    def _next_bytes(self) -> bytes:
        raise TypeError(f"a port with codec={self.codec!r} receives messages, not bytes; use recv()")

    def _open(self, taken: Taken) -> tuple[Any, tuple[Any, ...]]:
        if isinstance(taken, Parcel):
            if self._parked:
                self._taken_while_parked()
            return decode(self._plain, taken.body), ()
        if isinstance(taken, End):
            return super()._open(taken)
        raise AssertionError("a pickle on a port with a codec")  # see PlainLink

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, codec={self.codec!r}>"


register(MessagePort)


def _growing_pauses() -> Iterable[float]:
    pause = 20e-6
    while True:
        yield pause
        pause = min(0.01, pause * 1.5)
