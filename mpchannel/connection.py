"""``Connection`` and ``Pipe``: the standard library's, over packets, without its deadlocks. The rest is forwarded.

The same: an end that is given to another process is shared, both copies are usable; ``EOFError`` when all copies of the
other end are closed; names, arguments, exceptions. Better: ``send`` never waits for the receiver, threads may share an
end, ``close()`` wakes a blocked ``recv``, large arrays travel beside the pickle, functions and classes of a notebook
can be sent, and so can ports, which move.
"""

from __future__ import annotations

import errno
import io
import multiprocessing.connection as stdlib
import multiprocessing.reduction
from _thread import _count as other_threads
from functools import partial
from typing import Any, Self, final

from . import _kernel
from ._clone import (
    Departure,
    Entry,
    Moving,
    Transferable,
    assemble,
    loads,
    pack,
    pack_bytes,
    post_moving,
    prepare,
    receive_into,
    register,
    transferables,
    unpack,
    unpack_bytes,
)
from ._end import Buffer, Hand, spare_buffers
from ._kernel import Descriptors, elsewhere, in_crossing
from ._shared import SharedEnd, open_shared_pair
from ._wire import End, Parcel
from .channel import wait
from .errors import DataCloneError, MessageError

__all__ = ["Client", "Connection", "Listener", "Pipe", "wait"]

Client = stdlib.Client
Listener = stdlib.Listener


def __getattr__(name: str) -> Any:
    return getattr(stdlib, name)


@final
class Connection(Transferable, stdlib.Connection):
    """One end of a ``Pipe()``: ``multiprocessing.connection.Connection``, over packets.

    *handle*: the descriptor of an end of such a pipe, which it takes over; *readable*, *writable*: what it may be used
    for. Raises ``ValueError`` if that is no descriptor, or if it may be used for neither.
    """

    _end: SharedEnd
    _readable: bool
    _writable: bool

    def __new__(cls, handle: int, readable: bool = True, writable: bool = True) -> Any:
        """For the descriptor of an end of our ``Pipe()``; any other's connection is the standard library's."""
        number = handle.__index__()
        if number >= 0 and not _kernel.is_packet_socket(number):
            return stdlib.Connection(number, readable, writable)
        return super().__new__(cls)

    def __init__(self, handle: int, readable: bool = True, writable: bool = True) -> None:
        number = handle.__index__()
        if number < 0:
            raise ValueError("invalid handle")
        if not readable and not writable:
            raise ValueError("at least one of `readable` and `writable` must be True")
        prepare()
        self._begin(SharedEnd(_kernel.adopt_socket(number), shared=True), readable, writable)

    @classmethod
    def _of(cls, end: SharedEnd, readable: bool, writable: bool) -> Self:
        self = object.__new__(cls)
        self._begin(end, readable, writable)
        return self

    def _begin(self, end: SharedEnd, readable: bool, writable: bool) -> None:
        self._end, self._readable, self._writable = end, readable, writable

    def __del__(self) -> None:
        pass  # the socket closes with its last reference

    @property
    def _handle(self) -> int | None:
        return self._end.fileno() if self._end.open else None

    def _check_closed(self) -> None:
        self._end.fileno()  # raises, with the reason

    def _close(self) -> None:
        self._end.close()

    def close(self) -> None:
        """Close this process's copy. Whoever is blocked in ``recv`` on it here gets ``OSError``."""
        if in_crossing():
            elsewhere(self._end.close)
        else:
            self._end.close()

    def fileno(self) -> int:
        """The descriptor to wait on; not to be read from. (A copy of it is one more holder of this end.)"""
        return self._end.share()

    @property
    def closed(self) -> bool:
        """Whether this process's copy is closed."""
        return not self._end.open

    def __repr__(self) -> str:
        ways = "both ways" if self._readable and self._writable else "read-only" if self._readable else "write-only"
        state = f"fd {self._end.fileno()}, {ways}" if self._end.open else "closed"
        return f"<{type(self).__module__}.{type(self).__qualname__}, {state}>"

    # In messages of our own links: a copy of the descriptor goes along.

    _code = 2
    _shared = True
    _in_ports = False
    _never_copied = (
        "is pickled only on its way to another process: give it to a Process as an argument, "
        "or send it through a Queue, a Connection or a port"
    )

    def _locks(self) -> list[tuple[int, int, Any]]:
        return [(id(self._end), 1, self._end.sending)]

    def _check_movable(self, name: str) -> None:
        if not self._end.open:
            raise DataCloneError(f"{name} is a closed Connection") from OSError("handle is closed")

    def _pack_up(self) -> Entry:
        return Entry(self._code, bytes((self._readable, self._writable)), (self._end.share(),))

    def _left(self, departure: Departure, pid: int | None, *, lost: bool = False) -> None:
        pass  # this copy stays

    @classmethod
    def _arrive(cls, luggage: memoryview, descriptors: Descriptors) -> Self:
        return cls._of(SharedEnd(descriptors.claim_socket(), shared=True), bool(luggage[0]), bool(luggage[1]))

    def _undelivered(self) -> None:
        self.close()

    # Sending

    def send(self, obj: Any) -> None:
        """Send a picklable object. Never waits for the receiver; ports found in *obj* move.

        Raises ``BrokenPipeError`` if nobody has the other end any more, ``OSError`` if this one is closed or for
        reading only, and what the pickler raises, with the path to what cannot be sent.
        """
        end = self._end
        if not (self._writable and end.open):
            self._check_closed()
            self._check_writable()  # type: ignore[attr-defined]
        moving = Moving(None)
        try:
            data = pack(obj, moving)
            for place, each in enumerate(moving.objects):
                each._check_movable(f"port {place} in the message")
        except DataCloneError as error:
            raise _as_raised(error) from None
        if type(data) is bytes:
            accepted = end.post(data)
        elif moving.objects:
            accepted = post_moving(end, data, moving.objects, Departure("sent", partial(str, repr(self))))
        else:
            accepted = end.post_parts(*assemble(data))
        if not accepted:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    def _send_bytes(self, buf: memoryview) -> None:
        parts, size = pack_bytes(buf.cast("B"))
        if not self._end.post_parts(parts, size):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    # Receiving

    def recv(self) -> Any:
        """The next object. Raises ``EOFError`` when nothing is left and all copies of the other end are closed."""
        if not (self._readable and self._end.open):
            self._check_closed()
            self._check_readable()  # type: ignore[attr-defined]
        hand: Hand = []
        end = self._end
        taken = None
        if end.hot:  # next() would do the same a little later
            if not other_threads():
                taken = end.take(hand)
            else:
                with end.receiving:
                    taken = end.take(hand)
        if taken is None:
            taken = end.next(hand, None, end.hot)
        kind = type(taken)
        if kind is Buffer:
            message = loads(taken)  # type: ignore[arg-type]
            spare_buffers.append(taken)  # type: ignore[arg-type]
            return message
        if kind is memoryview:
            return loads(taken)  # type: ignore[arg-type]
        if isinstance(taken, End):
            raise EOFError
        try:
            return unpack(taken)[0]  # type: ignore[arg-type]
        except MessageError as error:
            raise error.__cause__ or error from None

    def recv_bytes(self, maxlength: int | None = None) -> bytes:
        """The bytes that ``send_bytes`` sent, or the pickle of what ``send`` sent."""
        self._check_closed()
        self._check_readable()  # type: ignore[attr-defined]
        if maxlength is not None and maxlength < 0:
            raise ValueError("negative maxlength")
        data = self._next_bytes()
        if maxlength is not None and len(data) > maxlength:
            self._bad_message_length()  # type: ignore[attr-defined]
        return data

    def recv_bytes_into(self, buf: Any, offset: int = 0) -> int:
        """Receive bytes into a writable buffer, from *offset* on; how many. ``BufferTooShort`` has them if it is."""
        self._check_closed()
        self._check_readable()  # type: ignore[attr-defined]
        return receive_into(buf, offset, self._next_bytes)

    def _recv_bytes(self, maxsize: int | None = None) -> io.BytesIO | None:
        # Not used here; programs reach for it in the standard library's.
        data = self._next_bytes()
        if maxsize is not None and len(data) > maxsize:
            return None
        file = io.BytesIO()
        file.write(data)
        return file

    def _next_bytes(self) -> bytes:
        hand: Hand = []
        taken = self._end.next(hand)
        if isinstance(taken, End):
            raise EOFError
        if isinstance(taken, Buffer):
            data = bytes(memoryview(taken)[: taken.size])
            spare_buffers.append(taken)
            return data
        if isinstance(taken, Parcel):
            ports = transferables(taken)
            if ports:
                raise MessageError(f"a message with {ports} ports cannot be received as bytes; use recv()")
            return bytes(unpack_bytes(taken.body))
        return bytes(taken)

    def _poll(self, timeout: float | None) -> bool:
        return self._end.poll(timeout)


def _as_raised(error: DataCloneError) -> BaseException:
    """What the standard library raises for a message that cannot be pickled: the very error, with a note where."""
    cause = error.__cause__
    if cause is None:
        return error
    cause.add_note(str(error))
    return cause


def Pipe(duplex: bool = True) -> tuple[Connection, Connection]:
    """Two connected ends: (one, other), or with *duplex* false (receiving end, sending end).

    Raises ``OSError`` at a limit of the system, ``NotImplementedError`` where the kernel features are missing.
    """
    prepare()
    one, other = open_shared_pair()
    return Connection._of(one, True, duplex), Connection._of(other, duplex, True)


def _reduce(connection: Connection) -> Any:
    copy = multiprocessing.reduction.DupFd(connection._end.share())
    return _rebuild, (copy, connection.readable, connection.writable)


def _rebuild(copy: Any, readable: bool, writable: bool) -> Connection:
    return Connection(copy.detach(), readable, writable)


multiprocessing.reduction.register(Connection, _reduce)
register(Connection)
