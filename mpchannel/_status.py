"""What there is to say of a link: what waits in it, who holds its other end. For ``repr(port)`` and ``inspect()``.

House rules: all is looked up when somebody asks, nothing is kept for it; no lock is taken, so a link that is in use,
or in the midst of something, may be told of as it was a moment ago.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from ._kernel import queued, unread
from ._link import Link
from ._sockdiag import UnixSocket, alive, packets, unix_socket


class Waiting(NamedTuple):
    """What was posted one way and not yet taken."""

    messages: int | None
    """Packets: a message is one, one with ports or a large one two. ``None``: nobody knows (an overflow file)."""
    exact: bool
    """Whether it is just so many messages, or at most."""
    bytes: int

    def __str__(self) -> str:
        if self.messages is None:
            return f"{self.bytes:,} bytes"
        few = "" if self.exact else "<= "
        return f"{few}{self.messages:,} message{'s' * (self.messages != 1)} ({self.bytes:,} bytes)"


class Status(NamedTuple):
    """Of an open link."""

    incoming: Waiting
    outgoing: Waiting


def status(link: Link) -> Status | None:
    """``None`` if it is not open. Raises ``OSError`` at a limit of the system."""
    sock = link._sock
    if sock is None:
        return None
    far = _far(os.fstat(sock.fileno()).st_ino)
    inbox, outbox, back = link._inbox, link._outbox, len(link._back)
    size = unread(sock)
    incoming = Waiting(back + (size > 0), not size, size)
    if far is not None:
        count, exact = packets(size, far.held)
        incoming = Waiting(back + count, exact, size)
    if inbox is not None:
        incoming = Waiting(None, False, size + max(0, inbox._memory.size - inbox._at))
    held = queued(sock)
    if not held:
        outgoing = Waiting(0, True, 0)
    elif outbox is not None and not outbox.sealed:
        outgoing = Waiting(None, False, link.buffered)
    elif far is not None:
        outgoing = Waiting(*packets(far.waiting, held), far.waiting + link._bodies)
    else:
        outgoing = Waiting(None, False, link.buffered)
    return Status(incoming, outgoing)


def _far(inode: int) -> UnixSocket | None:
    """The other end of a socket, wherever it is."""
    try:
        near = unix_socket(inode)
        return None if near is None or not near.peer else unix_socket(near.peer)
    except OSError:
        return None  # the kernel does not tell of sockets, or there is no descriptor left to ask with


def peer(link: Link) -> dict[str, Any]:
    """Who is known to hold the other end, and whether that process lives."""
    pid = link.peer_pid
    return {"pid": pid, "here": pid == os.getpid(), "alive": None if pid is None else alive(pid)}
