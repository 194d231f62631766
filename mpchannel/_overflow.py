"""The overflow file: where packets go while a link's socket is full. One side writes records, the other reads them.

A record is 8 bytes (size << 2 | flags) and a packet. The file is in append mode, so a record's place is the kernel's
affair; the file offset is the reader's position alone, and travels with the descriptor. Descriptors of a record ride in
a side lane (a socket pair), with a ticket that stands before the packet too.

    writer   appends, until a write fails with EPERM: all before it was read, so back to the socket
    reader   reads to the end, lingers there while small records keep coming (a flood is quicker through the file than
             through the socket), seals the file against growing, looks once more, and leaves it

The kernel takes the same lock for a write and for the seal, so no record can slip in between. A record that could not
be written whole ends the file: the writer seals it, and a reader drops what is torn at the end of a sealed file. House
rules: this room knows nothing of ports, nor of what packets mean; its callers hold the link's lock of the direction
concerned, which is re-entrant: a signal handler may post, or receive, in the middle of everything here.
"""

from __future__ import annotations

import errno
import os
import struct
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, final

from ._kernel import (
    NOW,
    ONE_CALL_BYTES,
    ONE_CALL_PIECES,
    PAGE,
    PEEK,
    SEAL_GROW,
    SEAL_SHRINK,
    SEAL_WRITING,
    Descriptors,
    Memory,
    Socket,
    hung_up,
    receive_with,
    send_with,
    socket_pair,
    taking_off,
)

_HEADER: Final = struct.Struct("<Q")
_TICKET: Final = struct.Struct("<Q")
_DESCRIBED: Final = 1  # flag: a ticket for descriptors comes first
_CHUNK: Final = 256 * 1024  # bytes read at a time: some 3,000 small messages for one call
_JOIN_BELOW: Final = 16 * 1024  # joining the pieces of a small record costs less than handing over a list of them
_AHEAD: Final = 128  # records found at a time: in less time than there is between signals, which end that for nothing
_GIVE_BACK: Final = 1 << 20  # bytes read before their pages are given back: a mapping per MiB is not felt
_LINGER: Final = 32  # looks for another record, in some 40 us
_PATIENCE: Final = 64  # appends between two looks whether the reader still lives
_LARGEST: Final = 1 << 47  # bytes: no process has room for more
_WRONG: Final = (
    errno.EACCES,
    errno.EBADF,
    errno.EINVAL,
    errno.ENOTCONN,
    errno.ENOTSOCK,
    errno.EOPNOTSUPP,
    errno.ESPIPE,
)
"""What system calls say of a descriptor that is not what it should be; no limit of this system is among them."""


class Refused(OSError):
    """The other end sent what no end of a channel sends. ``strerror`` says what."""

    def __init__(self, what: str) -> None:
        super().__init__(errno.EBADMSG, what)


def refuse_wrong(error: OSError, memory: Memory | None = None, *seals: int) -> None:
    """Raise ``Refused`` if *error* is about a descriptor that is not what it should be, and would come again. What the
    system refuses for once (a security module may) is none: *memory* tells, which must not have these *seals*.
    """
    lasting = error.errno == errno.EPERM and memory is not None and memory.refuses(*seals, *SEAL_WRITING)
    if lasting or error.errno in _WRONG:
        raise Refused(f"a descriptor that is not what it should be ({error.strerror})") from error


@final
class Outbox:
    """The writer's side of one file."""

    __slots__ = ("_appends", "_busy", "_lane", "_tickets", "far_lane", "memory")

    def __init__(self, *, with_lane: bool) -> None:
        self.memory = Memory.create(append=True)
        self._lane: Socket | None = None
        self.far_lane: Socket | None = None
        if with_lane:
            self._lane, self.far_lane = socket_pair()
        self._appends = 0
        self._tickets = 0
        self._busy = False  # with a record that takes several steps

    def append(self, parts: Sequence[Any], size: int, numbers: Sequence[int], sent: list[int] | None) -> bool:
        """Write a record. ``False`` if this file cannot take it: sealed by the reader, its lane full or missing, or a
        signal handler came in between the steps of another record.

        Raises ``OSError`` when there is no memory for it; then the file is at its end. *sent* is filled by the very
        call that completes the record. An exception of a signal handler comes before or behind that call: a record
        written by one call is never torn by it.
        """
        if self._busy:
            return False
        header = _HEADER.pack(size << 2)
        if not numbers and size < _JOIN_BELOW and sent is None:
            pieces: Sequence[Any] = (b"".join((header, *parts)),)
        else:
            self._busy = True
            pieces = (header, *parts)
        try:
            if numbers:
                self._tickets += 1
                if not self._send_aside(numbers):
                    return False
                size += _TICKET.size
                pieces = (_HEADER.pack(size << 2 | _DESCRIBED), _TICKET.pack(self._tickets), *parts)
            self.memory.append(pieces, 8 + size, sent)
        except BaseException as error:
            if isinstance(error, OSError) and error.errno == errno.EPERM:
                return False
            if isinstance(error, OSError) or len(pieces) > ONE_CALL_PIECES or size + 64 > ONE_CALL_BYTES:
                self.seal()
            raise
        finally:
            self._busy = False
        return True

    def append_small(self, data: bytes) -> bool:
        """``append`` for most packets, in half the time. ``False``: it is for ``append`` to do, or to say why not."""
        size, appends = len(data), self._appends + 1
        if self._busy or size >= _JOIN_BELOW or appends % _PATIENCE == 0:
            return False
        self._appends = appends
        try:
            self.memory.append_whole(_HEADER.pack(size << 2) + data, 8 + size)
        except OSError as error:
            if error.errno == errno.EPERM:
                return False
            self.seal()
            raise
        return True

    def _send_aside(self, numbers: Sequence[int]) -> bool:
        if self._lane is None:
            return False
        try:
            send_with(self._lane, (_TICKET.pack(self._tickets),), numbers)
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            return False  # full; or the reader left this file
        return True

    def abandoned(self, sock: Socket) -> bool:
        """Whether the reader is gone; really asked only every few dozen times."""
        self._appends += 1
        return self._appends % _PATIENCE == 0 and hung_up(sock)

    def close(self) -> None:
        """Let go at once (in a forked child; elsewhere it closes with its last reference)."""
        self.memory.close()
        for lane in (self._lane, self.far_lane):
            if lane is not None:
                lane.close()

    @property
    def sealed(self) -> bool:
        return not self.memory.open or self.memory.sealed(SEAL_GROW)

    def seal(self) -> None:
        """No more records: what follows goes through the socket, behind this file."""
        if self.memory.open:  # a collection of garbage may have finalised it before its link
            self.memory.seal(SEAL_GROW)


class Record(NamedTuple):
    """A record that was read: it stays the next one until ``place`` is one more."""

    packet: memoryview
    place: int
    ticket: int = 0  # there is none: it has no descriptors


@final
class Inbox:
    """The reader's side of one file."""

    __slots__ = (
        "_data",
        "_ends",
        "_given_back",
        "_inode",
        "_lane",
        "_largest",
        "_memory",
        "_start",
        "first",
        "last",
        "left",
        "packets",
        "place",
    )

    def __init__(self, descriptors: Descriptors, largest: int = _LARGEST) -> None:
        """*descriptors*: the file, and the lane if there is one. Raises ``OSError`` if they are no such things.

        *largest*: bytes of a record; for more, nothing is allocated. Its methods raise ``Refused``.
        """
        self._largest = largest
        self._memory = descriptors.claim_memory()
        self._lane = descriptors.claim_socket() if len(descriptors) else None
        if not self._memory.sealed(SEAL_SHRINK):
            raise OSError(errno.EINVAL, "an overflow file must be sealed against shrinking")
        self._inode = self._memory.inode
        self.place = 0
        """The number of the next record. Whoever takes that away adds one."""
        at = self._memory.offset
        self.packets: list[memoryview | Record] = []
        """What was read ahead: a packet, or its record if it has descriptors."""
        self.first, self.last = 0, -1  # the numbers of the first of these, and of the last
        self._ends = [at]  # where in the file the first begins, and where each of them ends
        self._data, self._start = memoryview(b""), at  # a piece of the file, and where it begins
        self.left: list[int] = []  # not empty: its announcement was taken off the socket
        self._given_back = -(-at // PAGE) * PAGE

    @property
    def _at(self) -> int:
        """Where in the file the next record begins."""
        return self._ends[self.place - self.first]

    def next(self) -> Record | None:
        """The next record; ``None`` if no whole one is there."""
        while True:
            place, first, packets = self.place, self.first, self.packets
            if place - first < len(packets):
                packet = packets[place - first]
                return packet if isinstance(packet, Record) else Record(packet, place)
            if not self._read():
                return None

    def _read(self) -> bool:
        """Read on from the next record. Whether that is there."""
        place, at, data, start = self.place, self._at, self._data, self._start
        begin = at - start
        if begin + 8 > len(data) or begin + 8 + (_HEADER.unpack_from(data, begin)[0] >> 2) > len(data):
            if at - self._given_back >= _GIVE_BACK:
                end = at // PAGE * PAGE
                self._memory.discard(self._given_back, end)
                self._given_back = end
            unread = self._memory.size - at
            if unread < 8:
                return False
            read = self._memory.read(min(unread, _CHUNK), at)
            size = 8 + (_HEADER.unpack_from(read)[0] >> 2)
            if size - 8 > self._largest:
                raise Refused(f"a packet of {size - 8} bytes, where {self._largest} are allowed")
            if size > unread:
                return False
            if size > len(read):
                if size > self._memory.held:
                    raise Refused(f"a packet of {size - 8} bytes that were never written")
                read = self._memory.read(size, at)
            data, start, begin = memoryview(read), at, 0
        packets: list[memoryview | Record] = []
        ends, header = [at], _HEADER.unpack_from
        while begin + 8 <= len(data) and len(packets) < _AHEAD:
            (word,) = header(data, begin)
            end = begin + 8 + (word >> 2)
            if end > len(data):
                break
            if word < 4 or (word & _DESCRIBED and word >> 2 <= _TICKET.size):
                raise Refused("an empty packet")
            if word & _DESCRIBED:
                ticket = _TICKET.unpack_from(data, begin + 8)[0]
                packets.append(Record(data[begin + 16 : end], place + len(packets), ticket))
            else:
                packets.append(data[begin + 8 : end])
            ends.append(start + end)
            begin = end
        last = place + len(packets) - 1
        if self.place == place:  # else a signal handler took some, and what was read for it is right
            self.packets, self.first, self.last, self._ends = packets, place, last, ends
            self._data, self._start = data, start
        return True

    def descriptors(self, record: Record) -> Descriptors:
        """(Copies of) the record's descriptors. Raises ``OSError(EMFILE)`` if this process has no room for them."""
        mark = bytearray(8)
        while record.ticket and self._lane is not None:
            try:
                size, found = receive_with(self._lane, mark, NOW | PEEK)
            except BlockingIOError:
                break
            if not size:
                break
            if _TICKET.unpack(mark)[0] == record.ticket:
                return found
            found.close()
            if _TICKET.unpack(mark)[0] > record.ticket:
                break
            dropping = taking_off(self._lane)  # left by a post that failed before its record was written
            if self.place != record.place:
                break  # a signal handler took it all
            deque(dropping, 0)
        return Descriptors()

    def drop_aside(self, record: Record) -> None:
        """The record was taken away: so are its descriptors in the lane."""
        mark = bytearray(8)
        while record.ticket and self._lane is not None:
            try:
                size = self._lane.recv_into(mark, 8, NOW | PEEK)
            except BlockingIOError:
                return
            if not size:
                return
            if _TICKET.unpack(mark)[0] > record.ticket:
                return
            dropping = taking_off(self._lane)
            if self.place != record.place + 1:
                return  # a signal handler took more, and dropped more
            deque(dropping, 0)

    def exhausted(self, *, linger: bool = False, writer_gone: bool = False) -> bool:
        """Whether all was read; if so the file was sealed and the writer is back at the socket.

        *linger*: wait for an instant whether another record comes.
        """
        if self.place <= self.last and not writer_gone:
            return False  # it goes on in what was read already
        for look in range(_LINGER if linger else 1):
            if look:
                os.sched_yield()
            if self.next() is not None:
                return False
        if self._memory.size > self._at and not writer_gone and not self._memory.sealed(SEAL_GROW):
            return False  # a large record is being written
        self._memory.seal(SEAL_GROW)
        return self.next() is None  # what came in before the seal; a torn rest belongs to a writer that failed

    @property
    def inode(self) -> int:
        return self._inode

    @property
    def memory(self) -> Memory:
        """The file itself."""
        return self._memory

    def lock(self, on: bool) -> bool:
        """Lock the file against the other processes that read it: ``False`` if one of them has."""
        return self._memory.lock(on)

    def wind(self) -> None:
        """Go to where the last of those left off who share the file."""
        at = self._memory.offset
        if at != self._at:
            self.packets, self.first, self.last, self._ends = [], self.place, self.place - 1, [at]
            self._data, self._start = memoryview(b""), at

    def rewind(self) -> None:
        """Put the shared position before the first record not taken, so that another holder can go on."""
        self._memory.offset = self._at

    def close(self) -> None:
        """Let go at once (in a forked child; elsewhere it closes with its last reference)."""
        self._memory.close()
        if self._lane is not None:
            self._lane.close()
