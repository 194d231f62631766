"""Slots: memory that the two ends of a link share, through which packets of middling size go instead of the socket.

The kernel copies such a packet into pages that it takes from where they are cold, and out of them: 64 KiB cost some
16 us so, and 7 through pages that both sides have in their caches. Only the bytes go another way. For each packet a
small one (SLOT) takes its place in the socket, so order, room, polling and handing over are as ever.

    sender    claims a slot, fills it, and sends SLOT. With its first one, behind HEADS_UP, the memory's descriptor goes
    receiver  copies the packet into a buffer of its own, and sets the slot free, by a byte in the memory. If its end
              moves to another holder, the descriptor moves along

A slot whose receiver was interrupted before he set it free is lost, and nothing with it. House rules: a slot is claimed
under the sender's lock, and set free by whoever has taken its packet. Nothing here orders one processor's reads before
its writes, which those of x86-64 do by themselves: elsewhere there are no slots.
"""

from __future__ import annotations

import os
import struct
import weakref
from collections.abc import Sequence
from typing import Any, Final, Self

from ._kernel import PAGE, SEAL_GROW, SEAL_SEAL, SEAL_SHRINK, Memory, descriptor_limit

ROOM: Final = 164 * 1024
"""The largest packet that goes into a slot."""
COUNT: Final = 6  # the first free one is taken: those behind are only touched by who is behind
_SIZE: Final = PAGE + COUNT * ROOM
SLOT: Final = 6
"""The kind of the packet; see ``_wire``."""
HEAD: Final = struct.Struct("<B?HQQ")
"""The packet: kind, whether HEADS_UP stands before it, slot, inode of the memory, size."""
_ORDERED: Final = hasattr(os, "uname") and os.uname().machine == "x86_64"


def _full(known: weakref.WeakSet[Any]) -> bool:
    """Whether this process has as many as it should have."""
    return len(known) >= min(64, descriptor_limit() // 64)


class Slots:
    """The sender's side of the memory: a byte for each slot (0: free), then, from the next page on, the slots."""

    __slots__ = ("__weakref__", "_room", "announced", "inode", "memory")

    @classmethod
    def create(cls) -> Self | None:
        """``None`` if there can be none, or no more."""
        if not _ORDERED or _full(_senders):
            return None
        try:
            memory = Memory.create()
            memory.allocate(_SIZE)
            memory.seal(SEAL_SHRINK | SEAL_GROW | SEAL_SEAL)
            mapped = memory.map(_SIZE)
        except (OSError, MemoryError):
            return None
        return None if isinstance(mapped, bytearray) else cls(memory, memoryview(mapped))

    def __init__(self, memory: Memory, room: memoryview) -> None:
        self._room = room
        self.memory = memory
        self.inode = memory.inode
        self.announced = False  # the receiver has been sent its descriptor
        _senders.add(self)

    def claim(self) -> int | None:
        """A slot that was free."""
        for slot in range(COUNT):
            # (No call between the two: a signal handler may claim one as well.)
            if not self._room[slot]:
                self._room[slot] = 1
                return slot
        return None

    def free(self, slot: int) -> None:
        self._room[slot] = 0

    def fill(self, slot: int, parts: Sequence[Any], size: int) -> bytes:
        """Put a packet into it. The SLOT packet."""
        at = PAGE + slot * ROOM
        for part in parts:
            view = part if type(part) is bytes else memoryview(part).cast("B")
            end = at + len(view)
            self._room[at:end] = view
            at = end
        return HEAD.pack(SLOT, not self.announced, slot, self.inode, size)


class Slab:
    """The receiver's side. (Not mapped, where that cannot be, or costs one more descriptor than there should be.)"""

    __slots__ = ("__weakref__", "_room", "inode", "memory")

    def __init__(self, memory: Memory) -> None:
        """Raises ``ValueError`` for what are no slots."""
        if not memory.sealed(SEAL_SHRINK) or memory.size != _SIZE:
            raise ValueError("these are no slots")
        self.memory = memory
        self.inode = memory.inode
        try:
            mapped = None if _full(_receivers) else memory.map(_SIZE)
        except OSError:
            mapped = None  # no address space (RLIMIT_AS), or no mapping to spare: it can be read all the same
        self._room = memoryview(mapped) if mapped is not None and not isinstance(mapped, bytearray) else None
        _receivers.add(self)

    def fetch(self, slot: int, size: int, buffer: bytearray) -> None:
        """Copy a packet into *buffer*. Raises ``ValueError`` if there is no such slot or no such room."""
        if slot >= COUNT or size > ROOM:
            raise ValueError(f"there is no slot {slot} with {size} bytes")
        at = PAGE + slot * ROOM
        with memoryview(buffer) as into:
            if self._room is not None:
                into[:size] = self._room[at : at + size]
            else:
                self.memory.read_at(at, into[:size])

    def free(self, slot: int) -> None:
        if self._room is not None:
            self._room[slot] = 0
        else:
            self.memory.write_at(slot, b"\0")


_senders: Final[weakref.WeakSet[Slots]] = weakref.WeakSet()
_receivers: Final[weakref.WeakSet[Slab]] = weakref.WeakSet()
