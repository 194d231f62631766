"""The overflow file: where packets go while a link's socket is full. One side writes records, the other reads them.

A record is 8 bytes (size << 2 | flags) and a packet. The reader's position is the file offset, which travels with the
descriptor; the writer writes at positions of its own and never touches that offset. Descriptors of a record ride in a
side lane (a socket pair), with a ticket that stands before the packet too. (A ticket is used once. Positions would not
do: a post that failed behind its descriptors leaves the position to the next.)

    writer   appends, until a write fails with EPERM: all before it was read, so back to the socket
    reader   reads to the end, seals the file against growing, looks once more, and leaves it

The kernel takes the same lock for a write and for the seal, so no record can slip in between. House rules: this room
knows nothing of ports, nor of what packets mean; its callers hold the link's lock of the direction concerned.
"""

from __future__ import annotations

import errno
import struct
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, final

from ._kernel import (
    NOW,
    PAGE,
    PEEK,
    SEAL_GROW,
    SEAL_SHRINK,
    Descriptors,
    Memory,
    Socket,
    hung_up,
    receive_with,
    send_with,
    socket_pair,
)

_HEADER: Final = struct.Struct("<Q")
_TICKET: Final = struct.Struct("<Q")
_WITH_DESCRIPTORS: Final = 1
_VOID: Final = 2  # in place of a record that could not be written whole
_CHUNK: Final = 256 * 1024  # bytes read at a time: some 3,000 small messages for one call
_JOIN_BELOW: Final = 16 * 1024  # joining the pieces of a small record costs less than handing over a list of them
_GIVE_BACK: Final = 1 << 20  # bytes read before their pages are given back: a mapping per MiB is not felt
_PATIENCE: Final = 64  # appends between two looks whether the reader still lives


@final
class Outbox:
    """The writer's side of one file."""

    __slots__ = ("_appends", "_end", "_lane", "_tickets", "far_lane", "memory")

    def __init__(self, *, with_lane: bool) -> None:
        self.memory = Memory.create()
        self._lane: Socket | None = None
        self.far_lane: Socket | None = None
        if with_lane:
            self._lane, self.far_lane = socket_pair()
        self._end = 0
        self._appends = 0
        self._tickets = 0

    def append(self, parts: Sequence[Any], size: int, numbers: Sequence[int], sent: list[int] | None) -> bool:
        """Write a record. ``False`` if this file cannot take it: sealed by the reader, or its lane is full or missing.

        Raises ``OSError`` when there is no memory for it; then the file is as before. *sent* is filled when the
        record is in the file, also when an exception of a signal handler flies out of this call.
        """
        at = self._end
        if numbers:
            self._tickets += 1
            if not self._send_aside(numbers):
                return False
            size += _TICKET.size
            header = _HEADER.pack(size << 2 | _WITH_DESCRIPTORS) + _TICKET.pack(self._tickets)
        else:
            header = _HEADER.pack(size << 2)
        pieces = (b"".join((header, *parts)),) if size < _JOIN_BELOW else (header, *parts)
        try:
            self.memory.write(pieces, at)
            self._end = at + 8 + size
        except OSError as error:
            if error.errno == errno.EPERM:
                return False
            self._mend(at, size, sent)
            raise
        except BaseException:
            self._mend(at, size, sent)
            raise
        if sent is not None:
            sent.append(size)
        return True

    def _mend(self, at: int, size: int, sent: list[int] | None) -> None:
        written = self.memory.size - at
        if written >= 8 + size:
            self._end = at + 8 + size
            if sent is not None:
                sent.append(size)
        elif written > 0:
            void = max(0, written - 8)
            self.memory.write((_HEADER.pack(void << 2 | _VOID),), at)
            self._end = at + 8 + void

    def _send_aside(self, numbers: Sequence[int]) -> bool:
        if self._lane is None:
            return False
        try:
            send_with(self._lane, (_TICKET.pack(self._tickets),), numbers)
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError):
            pass  # the reader left this file: the write will say so
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


@final
class Inbox:
    """The reader's side of one file."""

    __slots__ = ("_given_back", "_lane", "_memory", "_parsed", "ahead")

    def __init__(self, descriptors: Descriptors) -> None:
        """*descriptors*: the file, and the lane if there is one. Raises ``OSError`` if they are no such things."""
        self._memory = descriptors.claim_memory()
        self._lane = descriptors.claim_socket() if len(descriptors) else None
        if not self._memory.sealed(SEAL_SHRINK):
            raise OSError(errno.EINVAL, "an overflow file must be sealed against shrinking")
        self._parsed = self._memory.offset
        self._given_back = -(-self._parsed // PAGE) * PAGE
        # Records read and not yet taken: (position, packet, ticket or 0). The reader deletes what he takes.
        self.ahead: deque[tuple[int, memoryview, int]] = deque()

    def first(self) -> tuple[memoryview, Descriptors | None] | None:
        """The next packet with (copies of) its descriptors, left in its place; ``None`` if no whole record is there.

        To take it away: ``del ahead[0]``, then ``drop_aside()`` if there were descriptors. Raises ``OSError(EMFILE)``
        if this process has no room for the descriptors.
        """
        if not self.ahead:
            self._read()
            if not self.ahead:
                return None
        _, packet, ticket = self.ahead[0]
        return packet, self._aside(ticket) if ticket else None

    def drop_aside(self) -> None:
        """The packet that ``first`` gave was taken away: its descriptors go too."""
        if self._lane is not None:
            self._lane.recv_into(bytearray(8), 8, NOW)

    def close(self) -> None:
        """Let go at once (in a forked child; elsewhere it closes with its last reference)."""
        self._memory.close()
        if self._lane is not None:
            self._lane.close()

    def _read(self) -> None:
        if self._parsed - self._given_back >= _GIVE_BACK:
            end = self._parsed // PAGE * PAGE
            self._memory.discard(self._given_back, end)
            self._given_back = end
        unread = self._memory.size - self._parsed
        if unread < 8:
            return
        data = self._memory.read(min(unread, _CHUNK), self._parsed)
        first = 8 + (_HEADER.unpack_from(data)[0] >> 2)
        if len(data) < first <= unread:
            data = self._memory.read(first, self._parsed)
        view = memoryview(data)
        found: deque[tuple[int, memoryview, int]] = deque()
        at, end, start = 0, len(data), self._parsed
        while at + 8 <= end:
            word = _HEADER.unpack_from(data, at)[0]
            stop = at + 8 + (word >> 2)
            if stop > end:
                break
            if word & _WITH_DESCRIPTORS:
                found.append((start + at, view[at + 16 : stop], _TICKET.unpack_from(data, at + 8)[0]))
            elif not word & _VOID:
                found.append((start + at, view[at + 8 : stop], 0))
            at = stop
        self.ahead, self._parsed = found, start + at  # together: a signal handler may raise at any call above

    def _aside(self, ticket: int) -> Descriptors | None:
        mark = bytearray(8)
        while self._lane is not None:
            try:
                _, descriptors = receive_with(self._lane, mark, NOW | PEEK)
            except BlockingIOError:
                break
            found = _TICKET.unpack(mark)[0]
            if found == ticket:
                return descriptors
            descriptors.close()
            if found > ticket:
                break
            self._lane.recv_into(mark, 8, NOW)  # left by a post that failed before its record was written
        return None

    @property
    def waiting(self) -> bool:
        """Whether a whole packet is there."""
        if not self.ahead:
            self._read()
        return bool(self.ahead)

    def exhausted(self, *, writer_gone: bool = False) -> bool:
        """Whether all was read; if so the file was sealed and the writer is back at the socket."""
        if self.ahead:
            return False
        if self._memory.size > self._parsed and not writer_gone and not self._memory.sealed(SEAL_GROW):
            return False  # more to read, or a large record that is being written
        self._memory.seal(SEAL_GROW)
        self._read()  # what came in before the seal; a torn rest belongs to a writer that died
        return not self.ahead

    def rewind(self) -> None:
        """Put the shared position before the first packet not taken, so that another holder can go on."""
        self._memory.offset = self.ahead[0][0] if self.ahead else self._parsed
        self.ahead.clear()
