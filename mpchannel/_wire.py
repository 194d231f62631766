"""Packets as they go through a socket, and what is done with whole ones.

By the first byte:

    0x80         a bare pickle: a small message, sent as it is
    HEADS_UP     a packet with descriptors follows: look before you take, so that want of room loses nothing
    CARRIER      (descriptors) a packet with descriptors, or one too large for the socket: then its body is in memory
                 that comes along; more descriptors than one packet holds come in an envelope, a socket of their own
    ANNOUNCE     (descriptors) an overflow file; it stays at the head of the queue until the file is read, so the
                 socket stays readable and a travelling link needs nothing else
    CLOSE        the other end says goodbye: reason and process, and maybe in words why. End of file without it: its
                 holder died
    HELD         the other end is now held by that process
    SLOT         (descriptors) a packet whose bytes are in memory that the two ends share
    others       packets that ``_clone`` made, whole

House rule: nothing here has a state.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from ._kernel import NOW, SEAL_SHRINK, SEND_NOW, Descriptors, Memory, Socket, narrow, receive_with, shut, widen
from ._overflow import Outbox, Refused, refuse_wrong

PICKLE: Final = 0x80
HEADS_UP, ANNOUNCE, CLOSE, HELD, CARRIER = 1, 2, 3, 4, 5
HEADS_UP_PACKET: Final = bytes([HEADS_UP])
ANNOUNCEMENT: Final = struct.Struct("<BQ")  # kind, the file's inode number
PROCESS: Final = struct.Struct("<BBI")  # kind, reason (of CLOSE), pid
CARRIER_HEAD: Final = struct.Struct("<BBIQ")  # kind, flags, descriptors, size of the body
BODY_IN_MEMORY, IN_ENVELOPE = 1, 2
HANDOFF: Final = struct.Struct("<12sBIIBH")
"""Channel, side, pid of the other side, heads-ups taken whose packet is to come, OWES and SLOTS, packets put back."""
OWES: Final = 1  # a heads-up was sent whose packet is to come
SLOTS: Final = 2  # the memory of SLOT packets comes along
PLAIN: Final = 4  # a port with a codec
CODEC: Final = struct.Struct("<BQ")
"""Behind HANDOFF, of a port with a codec: the kind of its packets, bytes of the largest message."""

REASONS: Final = ("closed", "collected", "exited", "died", "undeliverable")

_WHY_MAX: Final = 1 << 15  # bytes; of a traceback, the end matters
_UNREAD_MOST: Final = 100_000  # packets: more than a socket holds, but some go on sending. (The kernel drops the rest)
_MAP_FROM: Final = 1 << 17  # below, reading costs less than mapping and its page faults


class End(NamedTuple):
    """The last thing taken from a link: the other end is gone."""

    reason: str
    pid: int | None
    why: str = ""  # the traceback, if it was lost in a process that could not start
    broken: str = ""  # what it sent that no end of a channel sends: this side has ended the channel


class Parcel(NamedTuple):
    """A packet that is more than a bare pickle, or lies in memory of its own; with its descriptors."""

    body: memoryview
    descriptors: Descriptors


def record(
    parts: Sequence[Any], size: int, numbers: Sequence[int], count: int, flags: int
) -> tuple[Sequence[Any], int, Sequence[int]]:
    """A packet as the overflow file takes it."""
    if not count:
        return parts, size, numbers
    return (CARRIER_HEAD.pack(CARRIER, flags, count, size), *parts), CARRIER_HEAD.size + size, numbers


def unwrap(packet: memoryview, descriptors: Descriptors, largest: int | None = None) -> Parcel:
    """A carrier's content. Raises ``Refused``, before anything is allocated for it.

    *largest*: it may be so many bytes, and bring no descriptors but that of its body.
    """
    memory: Memory | None = None
    try:
        _, flags, count, size = CARRIER_HEAD.unpack_from(packet)
        if largest is not None and (size > largest or count or flags & IN_ENVELOPE):
            told = "descriptors, where only data" if size <= largest else f"a packet of {size} bytes, where {largest}"
            raise Refused(f"{told} is allowed" if size <= largest else f"{told} are allowed")
        body = memoryview(bytearray(packet[CARRIER_HEAD.size :]))
        if flags & BODY_IN_MEMORY:
            memory = descriptors.claim_memory()
            if not memory.sealed(SEAL_SHRINK) or memory.size < size:
                raise Refused("a body that is shorter than announced, or could become so")
            if size >= _MAP_FROM and memory.held < size:
                raise Refused(f"a body of {size} bytes that were never written")
            body = memoryview(memory.read(size, 0) if size < _MAP_FROM else memory.map(size))
        if flags & IN_ENVELOPE:
            descriptors.expect_envelope(count)
    except (struct.error, ValueError, IndexError) as error:
        raise Refused("a packet that says it has descriptors, without them") from error
    except OSError as error:
        refuse_wrong(error, memory)
        raise
    return Parcel(body, descriptors)


def unwrap_or_nothing(packet: memoryview, descriptors: Descriptors) -> Parcel:
    """``unwrap`` for who cannot end the channel: what is refused comes out as an empty parcel, which will not load."""
    try:
        return unwrap(packet, descriptors)
    except Refused:
        return Parcel(memoryview(b""), descriptors)


def farewell(sock: Socket, outbox: Outbox | None, reason: str, why: str = "") -> None:
    packet = PROCESS.pack(CLOSE, REASONS.index(reason), os.getpid()) + why.encode(errors="replace")[-_WHY_MAX:]
    try:
        if outbox is not None:
            outbox.seal()
        try:
            sock.send(packet, SEND_NOW)
        except BlockingIOError:
            try:
                widen(sock)
                sock.send(packet, SEND_NOW)
            finally:
                narrow(sock)
    except OSError:
        pass  # the other end is gone, or reads nothing at all: end of file will have to do


def unread(sock: Socket, described: bool) -> Iterator[Descriptors]:
    """Take what is left in a socket that nobody will read; give the descriptors found. *described*: look for them even
    before the next heads-up.
    """
    buffer = bytearray(1)
    for _ in range(_UNREAD_MOST):
        try:
            if described:
                size, descriptors = receive_with(sock, buffer, NOW)
                if len(descriptors):
                    yield descriptors
            else:
                size = sock.recv_into(buffer, 1, NOW)
                described = buffer[0] == HEADS_UP
        except BlockingIOError:
            return
        except OSError as error:
            # A reset is told once; for what there is no room, the kernel closes the descriptors itself; and with the
            # socket, those of all that cannot be read at all. (This runs in finalisers, where nobody could be told.)
            if error.errno in (errno.ECONNRESET, errno.EMFILE, errno.ENFILE):
                continue
            return
        if not size:
            return


def lose(sock: Socket, why: str = "") -> Iterator[Descriptors]:
    """Nobody will ever receive this socket: tell the other end; and give what was queued in it."""
    farewell(sock, None, "undeliverable", why)
    shut(sock)
    return unread(sock, described=True)


def bounce(found: Iterator[Descriptors]) -> None:
    """Nobody will ever receive these: ``lose`` the sockets among them, and those queued in them."""
    pending = list(found)
    while pending:
        for sock in pending.pop().sockets():
            pending.extend(lose(sock))
