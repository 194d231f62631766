"""Memory of large messages, used again once nobody else has it: making the pages is most of what such a message costs.

How a sender knows: what travels is another open file of the same memory, and the kernel grants a write lease
(``F_SETLEASE``, fcntl(2)) only to the last open file there is. Descriptors, packets in flight and mappings hold one, in
whatever process; so the receiver gives memory back by dropping the message, or by dying, and need not say so.

    kept       memory that this process filled, from the second time on that about that size is wanted: what happens
               once leaves nothing behind. What was used last is tried first, so no more is in use than needed
    forgotten  after SECONDS without use, or beyond the bounds below, returned or not: it is gone with its last holder

House rules: no thread waits here. Time is looked at with each large message, and by whoever sleeps anyway
(``give_back`` tells when to come back). No lock: an entry is in the hands of whoever took it out of the list, and there
alone it is looked at or written to; a signal handler's exception that comes upon that loses it, and tears nothing.
"""

from __future__ import annotations

import errno
import functools
import os
import time
from collections.abc import Callable, Iterable
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any, Final

from ._kernel import SEAL_GROW, SEAL_SEAL, SEAL_SHRINK, Memory, descriptor_limit

if TYPE_CHECKING:
    import mmap

SECONDS: Final = 2.0
"""How long memory is kept without use, and a size remembered."""
_MOST: Final = 20  # a few more than may be queued in a socket
_TOO_LARGE: Final = 2  # times the size that is needed: what is not filled would only lie there
_AT_ONCE: Final = 1 << 20  # bytes copied without a chance for other threads
_ZEROS: Final = bytes(1 << 16)

_kept: list[_Kept] = []
_wanted: dict[int, float] = {}  # by the bits of a size: when one was last wanted
on_first: list[Callable[[], object]] = []
"""Called when something is kept and nothing was before."""


class _Kept:
    """Memory that was filled here at least once."""

    __slots__ = ("_filled", "_mapping", "capacity", "memory", "until")

    def __init__(self, memory: Memory, capacity: int, filled: int) -> None:
        memory.expect_leases()
        self.memory = memory
        self.capacity = capacity
        self.until = 0.0
        self._filled = filled
        self._mapping: mmap.mmap | None = None

    def write(self, parts: Iterable[Any], size: int) -> None:
        """Raises ``OSError``."""
        if size > self._filled:  # (through a mapping, want of memory would be a SIGBUS)
            self.memory.write(parts)
            self._filled = size
            return
        if self._mapping is None or len(self._mapping) < size:
            mapped = self.memory.map(self._filled)
            if isinstance(mapped, bytearray):  # no descriptor left
                self.memory.write(parts)
                return
            self._mapping = mapped
        at = 0
        with memoryview(self._mapping) as room:
            for part in parts:
                view = memoryview(part).cast("B")
                for start in range(0, view.nbytes, _AT_ONCE):
                    piece = view[start : start + _AT_ONCE]
                    room[at : at + piece.nbytes] = piece
                    at += piece.nbytes


def fill(parts: Iterable[Any], size: int) -> Memory:
    """Memory that holds *parts*, *size* bytes in all, and cannot shrink. Raises ``OSError``."""

    def fresh(memory: Memory) -> None:
        memory.resize(capacity)
        memory.write(parts)

    step = max(4096, 1 << max(0, size.bit_length() - 4))  # messages of nearly the same size shall fit in
    capacity = -(-size // step) * step
    return _get(size, capacity, size * _TOO_LARGE, parts, fresh)


def zeros(size: int) -> Memory:
    """Memory of *size* zeros that has this size for good. Raises ``OSError``, ``MemoryError``."""
    whole, rest = divmod(size, len(_ZEROS))
    parts = chain(repeat(_ZEROS, whole), (memoryview(_ZEROS)[:rest],))
    return _get(size, size, size, parts, lambda memory: memory.allocate(size))


def _get(size: int, capacity: int, most: int, parts: Iterable[Any], fresh: Callable[[Memory], object]) -> Memory:
    give_back()
    now, bits = time.monotonic(), size.bit_length()
    again, _wanted[bits] = now - _wanted.get(bits, -SECONDS) < SECONDS and size <= _most_bytes(), now
    try:
        kept = _take(size, most) if again else None
        if kept is None:
            return _make(capacity, size, fresh, keep=again)
        kept.write(parts, size)
        travels = kept.memory.reopened()
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.ENOMEM):
            raise
    else:
        _keep(kept)
        return travels
    kept = None
    give_back(all_of_it=True)
    return _make(capacity, size, fresh, keep=False)


def _make(capacity: int, size: int, fresh: Callable[[Memory], object], *, keep: bool) -> Memory:
    memory = Memory.create()
    fresh(memory)
    memory.seal(SEAL_SHRINK | SEAL_GROW | SEAL_SEAL)
    if not keep:
        return memory
    try:
        # Both: the kernel does not count what memfd_create itself opened.
        ours, travels = memory.reopened(), memory.reopened()
    except OSError:  # no /proc, or no descriptor left
        return memory
    if not ours.only_holder:  # else leases tell nothing here
        _keep(_Kept(ours, capacity, size))
    return travels


def _take(least: int, most: int) -> _Kept | None:
    for place in range(len(_kept) - 1, -1, -1):
        try:
            kept = _kept[place]
            if not least <= kept.capacity <= most:
                continue
            _kept.remove(kept)  # before it is looked at: another thread could be about to send it
        except (IndexError, ValueError):
            continue  # another thread was faster
        if kept.memory.only_holder:
            return kept
        _kept.insert(place, kept)
    return None


def _keep(kept: _Kept) -> None:
    kept.until = time.monotonic() + SECONDS
    first = not _kept
    _kept.append(kept)
    most = min(_MOST, descriptor_limit() // 32)
    while len(_kept) > most or sum(each.capacity for each in _kept.copy()) > _most_bytes():
        del _kept[:1]
    if first:
        for fn in on_first:
            fn()


def give_back(*, all_of_it: bool = False) -> float | None:
    """Forget what was not used for a while. Seconds until there is more to forget, ``None`` if nothing is kept."""
    if not _kept:
        return None
    if all_of_it:
        _kept.clear()
        return None
    now = time.monotonic()
    while _kept and _kept[0].until <= now:
        del _kept[:1]
    try:
        return _kept[0].until - now
    except IndexError:
        return None


@functools.cache
def _most_bytes() -> int:
    return min(1 << 30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE") // 16)
