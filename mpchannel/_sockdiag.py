"""What the kernel tells of UNIX sockets, those of other processes too, and of processes: nobody has to be asked.

House rules: looks, and changes nothing; nobody waits for anything here; works on processes that are stopped or stuck.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from ._kernel import crossing

_FAMILY: Final = 4  # NETLINK_SOCK_DIAG
_BY_FAMILY: Final = 20  # SOCK_DIAG_BY_FAMILY
_ERROR, _DONE = 2, 3  # NLMSG_ERROR, NLMSG_DONE
_REQUEST, _DUMP = 0x001, 0x301  # NLM_F_REQUEST, and with NLM_F_DUMP
_SHOW_PEER, _SHOW_QUEUES = 0x04, 0x10
_PEER, _QUEUES = 2, 4  # UNIX_DIAG_PEER, UNIX_DIAG_RQLEN
_HEAD: Final = struct.Struct("=IHHII")
_QUERY: Final = struct.Struct("=BBHIIIII")
_FOUND: Final = struct.Struct("=BBBBIII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_PAIR: Final = struct.Struct("=II")
_ANY: Final = 0xFFFFFFFF
_ROOM: Final = 1 << 17

SMALL_PACKET: Final = 768
"""Bytes of kernel memory that a packet takes at least: one of up to 192 bytes takes just that."""
_SMALL_PAYLOAD: Final = 192
_NEXT_PAYLOAD: Final = (
    579  # three packets of the next size have at least so many bytes, in the memory of five small ones
)


class UnixSocket(NamedTuple):
    """A socket, by the number of its inode."""

    inode: int
    kind: int  # SOCK_STREAM, SOCK_SEQPACKET ...
    peer: int  # the inode of the other end; 0: it is gone
    waiting: int  # bytes that can be received here
    held: int  # bytes of kernel memory of what was sent here and not yet received


def unix_sockets() -> dict[int, UnixSocket]:
    """All of this system (of this network namespace), by inode. Raises ``OSError`` where the kernel does not tell."""
    return {each.inode: each for each in _ask(_DUMP, 0)}


def unix_socket(inode: int) -> UnixSocket | None:
    """One of them; ``None`` if there is none of that number. Raises ``OSError`` where the kernel does not tell."""
    return next(_ask(_REQUEST, inode), None)


def _ask(flags: int, inode: int) -> Iterator[UnixSocket]:
    query = _QUERY.pack(socket.AF_UNIX, 0, 0, _ANY, inode, _SHOW_PEER | _SHOW_QUEUES, _ANY, _ANY)
    # A forked child must not inherit this socket. All it does is answered within the call that asks.
    with crossing, socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _FAMILY) as diagnosis:
        diagnosis.send(_HEAD.pack(_HEAD.size + len(query), _BY_FAMILY, flags, 1, 0) + query)
        found: list[UnixSocket] = []
        while _read(diagnosis.recv(_ROOM), found) and flags == _DUMP:
            pass
    return iter(found)


def _read(data: bytes, found: list[UnixSocket]) -> bool:
    """Whether there is more to come."""
    at = 0
    while at + _HEAD.size <= len(data):
        length, kind, *_ = _HEAD.unpack_from(data, at)
        if kind == _DONE:
            return False
        if kind == _ERROR:
            code = -struct.unpack_from("=i", data, at + _HEAD.size)[0]
            if code not in (0, errno.ENOENT):
                raise OSError(code, f"the kernel tells nothing of UNIX sockets: {os.strerror(code)}")
            return False
        found.append(_socket(data, at + _HEAD.size, at + length))
        at += (length + 3) & ~3
    return True


def _socket(data: bytes, at: int, end: int) -> UnixSocket:
    _, kind, _, _, inode, _, _ = _FOUND.unpack_from(data, at)
    at += _FOUND.size
    peer = waiting = held = 0
    while at + _ATTRIBUTE.size <= end:
        length, name = _ATTRIBUTE.unpack_from(data, at)
        if name == _PEER:
            peer = int.from_bytes(data[at + 4 : at + 8], "little" if struct.pack("=H", 1)[0] else "big")
        elif name == _QUEUES:
            waiting, held = _PAIR.unpack_from(data, at + 4)
        at += (length + 3) & ~3
    return UnixSocket(inode, kind, peer, waiting, held)


def packets(waiting: int, held: int) -> tuple[int, bool]:
    """How many packets wait that have so many bytes, and take so much memory; and whether it is just so many, or at
    most. (The kernel does not count them.)
    """
    most = held // SMALL_PACKET
    exact = held % SMALL_PACKET == 0 and waiting <= _SMALL_PAYLOAD * most
    return max(most, int(waiting > 0)), exact and (most < 5 or waiting < most - 5 + _NEXT_PAYLOAD)


# Processes


def process_state(pid: int) -> str:
    """The kernel's letter: R running, S sleeping, D waiting, T stopped, Z ended; ``""`` if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0].decode()
    except OSError:
        return ""


def alive(pid: int) -> bool:
    """Whether a process is there that has not ended."""
    return process_state(pid) not in ("", "Z", "X")
