"""An end that several processes may hold at once, as those of ``Pipe()`` are.

No process owns it, so none may keep what the others would need to know; and none says goodbye, because the other side
sees the end of file when the last copy is closed.

    taking    looks at the next packet before it takes anything. So no heads-up comes before descriptors, and an
              overflow file stays announced, at the head of the queue, until whoever reads its last record takes that
              away. The position in the file is the descriptor's own, which all readers share; what one of them has
              read ahead is only content, which does not change
    posting   a file is continued only by the process that began it, and only if no other posted in between: the end's
              owner (``F_SETOWN``, kept by the kernel with the open socket) says who that is

House rules: receiving processes take turns, under a lock of the user's, and sending ones too, as the standard library
demands; ``poll`` needs none. Threads need not take turns. An exception of a signal handler may cost the message it
comes upon, as it does there.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any, Final, NoReturn, final

from ._end import BUFFER, Buffer, Hand, SocketEnd, Taken, spare_buffers
from ._kernel import (
    NOW,
    PEEK,
    Descriptors,
    Socket,
    hung_up,
    owner_of,
    receive_with,
    renew,
    require,
    send_with,
    set_owner,
    socket_pair,
    take_off,
)
from ._overflow import Inbox
from ._wire import ANNOUNCE, ANNOUNCEMENT, CARRIER, PICKLE, End, Parcel, unwrap_or_nothing

_OVER: Final = End("closed", None)
_LOOK: Final = NOW | PEEK

_ends: Final[dict[int, weakref.ref[SharedEnd]]] = {}  # all that are open in this process, by id()


def open_shared_pair() -> tuple[SharedEnd, SharedEnd]:
    """Two connected ends. Raises ``OSError`` (limits) or ``NotImplementedError`` (not this system)."""
    require()
    one, two = socket_pair()
    return SharedEnd(one), SharedEnd(two)


def open_shared_ends() -> list[SharedEnd]:
    """Every open one of this process."""
    return [end for reference in list(_ends.values()) if (end := reference()) is not None and end.open]


@final
class SharedEnd(SocketEnd):
    """One end of a pipe, as a ``Connection`` sees it."""

    __slots__ = ("__weakref__", "_inbox", "_overtaken", "_stuck", "_why_closed", "shared")

    def __init__(self, sock: Socket, *, shared: bool = False) -> None:
        super().__init__(sock)
        self.shared = shared  # another process may hold a copy
        self._inbox: Inbox | None = None  # the file that was announced when last looked at
        self._stuck = False  # its next record is not there as a whole
        self._overtaken = False  # another copy of this end in this process began a file after this one
        self._why_closed = "handle is closed"
        self._sock = sock
        _ends[id(self)] = weakref.ref(self, _forgetter(id(self)))

    # Posting

    def post(self, data: bytes) -> bool:
        if not self.shared:
            return super().post(data)
        with self.sending:
            self._take_turn()
            return super().post(data)

    def post_parts(
        self, parts: Sequence[Any], size: int, numbers: Sequence[int] = (), sent: list[int] | None = None
    ) -> bool:
        with self.sending:
            self._take_turn()
            return super().post_parts(parts, size, numbers, sent)

    def _take_turn(self) -> None:
        """If another copy was posted to since this one began a file, or may have one: that is not continued."""
        if not self.shared or self._sock is None:
            return
        owner = owner_of(self._sock)
        if self._outbox is not None:
            if owner != os.getpid() or self._overtaken:
                self._leave_outbox()
        elif owner:
            set_owner(self._sock, 0)

    def _open_outbox(
        self, sock: Socket, first: tuple[Sequence[Any], int, Sequence[int]], sent: list[int] | None
    ) -> None:
        set_owner(sock, os.getpid())
        self._overtaken = False
        for end in open_shared_ends():
            if end is not self and end._outbox is not None and end._sock is not None:
                end._overtaken = end._overtaken or os.path.sameopenfile(end._sock.fileno(), sock.fileno())
        super()._open_outbox(sock, first, sent)

    def _send_described(
        self, sock: Socket, parts: Sequence[Any], numbers: Sequence[int], sent: list[int] | None
    ) -> None:
        send_with(sock, parts, numbers, sent)

    # Taking

    def take(self, hand: Hand) -> Taken | None:
        self._stuck = False
        mark = bytearray(ANNOUNCEMENT.size)
        try:
            size = self._recv_into(mark, 0, _LOOK)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            return self.take(hand)  # told once, before what the other end had sent
        if not size:
            return _OVER
        if mark[0] == ANNOUNCE:
            return self._take_announced(hand, ANNOUNCEMENT.unpack(mark)[1])
        if mark[0] == CARRIER:
            return self._take_described(hand)
        try:
            buffer = spare_buffers.pop()
        except IndexError:
            buffer = Buffer(BUFFER)
        try:
            size = buffer.size = self._recv_into(buffer, 0, NOW)
        except BlockingIOError:  # another process was quicker
            spare_buffers.append(buffer)
            return None
        except ConnectionResetError:
            return self.take(hand)
        if not size:
            return _OVER
        hand.append(buffer)
        return buffer if buffer[0] == PICKLE else Parcel(memoryview(buffer)[:size], Descriptors())

    def _take_announced(self, hand: Hand, inode: int) -> Taken | None:
        inbox = self._open_inbox(inode)
        taken = None if inbox is None else self._take_overflowed(inbox, hand)
        return taken if taken is not None or self._stuck else self.take(hand)

    def _look(self) -> tuple[int | None, int]:
        """The kind of the next packet (-1: the end, ``None``: nothing there), and which file it announces if any."""
        mark = bytearray(ANNOUNCEMENT.size)
        while True:
            try:
                size = self._recv_into(mark, 0, _LOOK)
            except BlockingIOError:
                return None, 0
            except ConnectionResetError:
                continue  # told once, before what the other end had sent
            if not size:
                return -1, 0
            return mark[0], ANNOUNCEMENT.unpack(mark)[1] if mark[0] == ANNOUNCE else 0

    def _take_described(self, hand: Hand) -> Taken | None:
        sock, buffer = self._socket(), bytearray(BUFFER)
        try:
            size, descriptors = receive_with(sock, buffer, NOW | PEEK)
        except BlockingIOError:
            return None
        parcel = unwrap_or_nothing(memoryview(buffer)[:size], descriptors)
        take_off(sock)
        hand.append(parcel)
        return parcel

    def _open_inbox(self, inode: int) -> Inbox | None:
        """The announced file; ``None`` if it is not announced any more."""
        inbox = self._inbox
        if inbox is None or inbox.inode != inode:
            try:
                size, descriptors = receive_with(self._socket(), bytearray(1), NOW | PEEK)
            except BlockingIOError:
                return None
            if not size or not len(descriptors):
                return None
            inbox = Inbox(descriptors)
            if inbox.inode != inode:
                return None
            self._inbox = inbox
        return inbox

    def _take_overflowed(self, inbox: Inbox, hand: Hand) -> Taken | None:
        inbox.wind()
        if inbox.place < inbox.last:
            ahead = inbox.packets[inbox.place - inbox.first]
            if ahead[0] == PICKLE:
                inbox.place += 1
                inbox.rewind()
                hand.append(ahead)
                return ahead  # type: ignore[return-value]
        record = inbox.next()
        if record is None:
            if not self._leave_if_exhausted(inbox, linger=False):
                self._stuck = True
            return None
        packet = record.packet
        taken: Taken = packet
        if packet[0] == CARRIER:
            taken = unwrap_or_nothing(packet, inbox.descriptors(record))
        elif packet[0] != PICKLE:
            taken = Parcel(packet, Descriptors())
        inbox.place = record.place + 1
        inbox.rewind()
        hand.append(taken)
        inbox.drop_aside(record)
        self._leave_if_exhausted(inbox, linger=True)
        return taken

    def _leave_if_exhausted(self, inbox: Inbox, *, linger: bool) -> bool:
        """Take the announcement away if all of its file was read, so that "readable" means that a message is there."""
        sock = self._socket()
        if not inbox.exhausted(linger=linger, writer_gone=not linger and hung_up(sock)):
            return False
        # Other processes may poll meanwhile, without the lock that the user's receivers have, and find the same.
        if not inbox.lock(True):
            return False
        try:
            if self._look() == (ANNOUNCE, inbox.inode):
                take_off(sock)
        finally:
            inbox.lock(False)
        self._inbox = None
        return True

    def poll(self, timeout: float | None) -> bool:
        """Whether something can be taken, or the end, within *timeout* seconds (``None``: wait for it)."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with self.receiving:
                if self._ready():
                    return True
            if not self.wait(deadline):
                return False

    def _ready(self) -> bool:
        self._stuck = False
        while True:
            kind, inode = self._look()
            if kind is None:
                return False
            if kind != ANNOUNCE:
                return True
            inbox = self._open_inbox(inode)
            if inbox is not None:
                inbox.wind()
                if inbox.next() is not None:
                    return True
                if not self._leave_if_exhausted(inbox, linger=False):
                    self._stuck = True
                    return False

    def _blind_for(self) -> float | None:
        return 0.0005 if self._stuck else None

    # Leaving, sharing

    def close(self) -> None:
        """Close this process's copy, and wake whoever waits on it here."""
        with self.sending:
            self._leave_outbox()
            self._release("handle is closed")
        self.ring()

    def _release(self, why: str) -> None:
        self._why_closed = why
        self._send = self._recv_into = self._refuse
        self._sock = self._inbox = self._outbox = None
        _ends.pop(id(self), None)

    def _refuse(self, *_: object) -> NoReturn:
        raise OSError(self._why_closed)

    def share(self) -> int:
        """The descriptor, for another process to get a copy of."""
        self.shared = True
        return self.fileno()

    def go_on_in_child(self) -> None:
        """In a forked child: the same end, with locks and waiters of its own."""
        sock = renew(self._socket())
        self.receiving, self.sending = threading.RLock(), threading.RLock()
        self._sock, self._send, self._recv_into = sock, sock.send, sock.recv_into
        self._outbox = self._inbox = None
        self._bells = []
        self.shared = True

    def stay_behind(self, why: str) -> None:
        """In a forked child that shall not have it. What it held is closed later."""
        self.receiving, self.sending = threading.RLock(), threading.RLock()
        self._release(why)
        self._bells = []


def _forgetter(key: int) -> Any:
    def forget(_: object) -> None:
        _ends.pop(key, None)

    return forget
