"""``SharedBuffer``: memory that several processes see. Posting it shares it; listing it in ``transfer`` moves it.

It is a memfd of a fixed size, all of its pages there from the beginning, and a mapping: nothing of it has a name or a
place in ``/dev/shm``, and it is gone with its last holder, however that ended. What travels is a descriptor, whatever
the size.

House rules: it is an ``mmap``, since before Python 3.12 only classes written in C have the buffer protocol, and because
only an ``mmap`` knows whether somebody still has a view of it: ``resize`` to the same size, and ``close``, refuse then.
That it can neither shrink nor grow is sealed, so no holder can make another one's memory end (SIGBUS).
"""

from __future__ import annotations

import errno
import math
import multiprocessing.reduction
import struct
import sys
import threading
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self, SupportsIndex, cast

from ._clone import Departure, Entry, Transferable, register
from ._kernel import SEAL_GROW, SEAL_SHRINK, Descriptors, Memory, explain, require
from ._recycle import zeros
from .errors import BufferInUseError, DataCloneError

if TYPE_CHECKING:
    import mmap

    _Mapping = mmap.mmap
else:
    try:
        import mmap

        _Mapping = mmap.mmap
    except ImportError:  # not on every system: require() says so when one is to be made

        class _Mapping:
            __slots__ = ()


__all__ = ["SharedBuffer"]

_SEALS: Final = SEAL_SHRINK | SEAL_GROW
_MADV_POPULATE_READ: Final = 22
_POPULATED: Final = 64 << 20  # bytes up to which an array is taken to be used as a whole
_LUGGAGE: Final = struct.Struct("<Q?")  # bytes, whether it is read-only


class SharedBuffer(_Mapping, Transferable):
    """*nbytes* of zeroed memory that can be shared with other processes, and moved to them.

    It has the buffer protocol: ``memoryview(buffer)``, ``numpy.frombuffer``; ``buffer[i]`` is a byte, ``buffer[i:j]`` a
    view, and both can be assigned to. In a message (``post_message``, ``send``, arguments of processes and pools) it is
    *shared*: both sides see each other's changes at once, and are to agree on who writes when, by messages for example.
    Listed in ``transfer`` it *moves*: this object is detached, no byte is copied.

    Raises ``TypeError`` for what is no size, ``ValueError`` for one below 1, ``MemoryError`` if the system has not that
    much, ``OSError`` at a limit, ``NotImplementedError`` on a system without the kernel features that it needs.
    Moving or closing it while views of it are alive (slices, memoryviews, arrays) raises ``BufferError``, and nothing
    happened. It is never copied: ``bytes(buffer)`` copies what is in it.
    """

    __slots__ = ("_departure", "_lock", "_memory", "_populated", "_readonly")

    _code = 4
    _in_ports = False
    _never_copied = "is not copied: post_message shares it, or moves it if listed in transfer; bytes(buffer) copies"

    _memory: Memory
    _readonly: bool
    _populated: bool
    _departure: Departure | None
    _lock: threading.RLock  # type: ignore[valid-type,unused-ignore]

    def __new__(cls, nbytes: SupportsIndex) -> Self:
        try:
            size = nbytes.__index__()
        except AttributeError:
            raise TypeError(f"nbytes must be an int, not {nbytes!r}") from None
        if size < 1:
            raise ValueError(f"nbytes must be 1 or more, not {size}")
        require()
        return cls._of(zeros(size), size, readonly=False, fill=True)

    @classmethod
    def _of(cls, memory: Memory, size: int, *, readonly: bool, fill: bool = False) -> Self:
        """*fill*: it will be written to, so have all of its pages mapped at once."""
        flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if fill else 0)
        rights = mmap.PROT_READ | (0 if readonly else mmap.PROT_WRITE)
        options: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
        try:
            buffer = super().__new__(cls, memory.fileno(), size, flags, rights, **options)
        except OSError as error:  # up to Python 3.12 a mapping has a descriptor of its own
            raise explain(error, "map memory") from error
        buffer._memory, buffer._readonly, buffer._departure = memory, readonly, None
        buffer._lock, buffer._populated = threading.RLock(), fill
        return buffer

    @classmethod
    def from_buffer(cls, obj: Any) -> Self:
        """A new one with the bytes of *obj*, which has the buffer protocol: bytes, an array, a view.

        Raises ``ValueError`` if there are none, and else as the constructor.
        """
        with memoryview(obj) as view:
            if not view.nbytes:
                raise ValueError("obj has no bytes")
            buffer = cls(view.nbytes)
            with memoryview(buffer) as ours:
                ours[:] = view.cast("B") if view.c_contiguous else memoryview(view.tobytes())
        return buffer

    def asarray(self, dtype: Any = "uint8", shape: Any = None) -> Any:
        """A NumPy array on this memory, without a copy. *shape*: default, all there is of *dtype* in one dimension.

        Raises ``ImportError`` without NumPy, ``ValueError`` if *shape* does not fit. The array is a view.
        """
        import numpy

        if not self._populated and len(self) <= _POPULATED:
            self._populate()
        if shape is None:
            return numpy.frombuffer(self, dtype)
        count = shape.__index__() if hasattr(shape, "__index__") else math.prod(shape)
        return numpy.frombuffer(self, dtype, count).reshape(shape)

    def toreadonly(self) -> Self:
        """Another one on the same memory that cannot be written to, neither here nor by whoever receives it: the
        descriptor that travels is open for reading only.
        """
        self._check_usable("this")
        return self._of(self._memory.reopened(readonly=True), len(self), readonly=True)

    @property
    def readonly(self) -> bool:
        """Whether it cannot be written to here."""
        return self._readonly

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return len(self)

    @property
    def detached(self) -> bool:
        """Moved away to another holder."""
        return self._departure is not None

    def close(self) -> None:
        """Let go of it. Raises ``BufferError`` while views of it are alive."""
        super().close()
        self._memory.close()

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return memoryview(self)[key]
        return super().__getitem__(key)

    def resize(self, newsize: int) -> NoReturn:
        """There is no *newsize* for it: raises ``TypeError``."""
        raise TypeError("a SharedBuffer has one size: make another one")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._departure is not None:
            return f"<SharedBuffer, {self._departure}>"
        if self.closed:
            return "<SharedBuffer, closed>"
        return f"<SharedBuffer of {len(self):,} bytes{', read-only' if self._readonly else ''}>"

    def _populate(self) -> None:
        """Have all of its pages mapped at once, rather than by a page fault each."""
        self._populated = True
        try:
            self.madvise(_MADV_POPULATE_READ)
        except OSError as error:
            if error.errno != errno.EINVAL:  # Linux before 5.14
                raise

    def _check_usable(self, name: str) -> None:
        if self._departure is not None:
            raise DataCloneError(f"{name} is a SharedBuffer that was {self._departure}")
        if self.closed or not self._memory.open:
            raise DataCloneError(f"{name} is a closed SharedBuffer")

    # Transferable

    def _locks(self) -> list[tuple[int, int, Any]]:
        return [(id(self), 0, self._lock)]

    def _check_movable(self, name: str) -> None:
        self._check_usable(name)
        try:
            super().resize(len(self))
        except BufferError:
            raise BufferInUseError(
                f"{name} is {self!r}, which cannot move: views of it are alive (slices, memoryviews, arrays)"
            ) from None
        except (TypeError, ValueError, OSError):
            pass  # it cannot be resized at all, but nobody has a view

    def _found(self, explicit: bool) -> Transferable:
        return _Share(self)

    def _pack_up(self) -> Entry:
        return Entry(self._code, _LUGGAGE.pack(len(self), self._readonly), (self._memory.fileno(),))

    def _left(self, departure: Departure, pid: int | None, *, lost: bool = False) -> None:
        self._departure = departure
        try:
            self.close()
        except BufferError:  # a view that another thread made this very moment keeps the mapping, for itself
            self._memory.close()

    @classmethod
    def _arrive(cls, luggage: memoryview, descriptors: Descriptors) -> Self:
        return cls._received(descriptors.claim_memory(), *_LUGGAGE.unpack(luggage))

    @classmethod
    def _received(cls, memory: Memory, size: int, readonly: bool) -> Self:
        if not memory.sealed(_SEALS) or memory.size != size:
            raise ValueError("the memory of a SharedBuffer has not the size that was announced, or could change it")
        return cls._of(memory, size, readonly=readonly)

    def _undelivered(self) -> None:
        self.close()


class _Share(Transferable):
    """A ``SharedBuffer`` in a message that does not move it."""

    __slots__ = ("_buffer",)

    _shared = True

    def __init__(self, buffer: SharedBuffer) -> None:
        self._buffer = buffer

    def _locks(self) -> list[tuple[int, int, Any]]:
        return self._buffer._locks()

    def _check_movable(self, name: str) -> None:
        self._buffer._check_usable(name)

    def _pack_up(self) -> Entry:
        return self._buffer._pack_up()

    def _left(self, departure: Departure, pid: int | None, *, lost: bool = False) -> None:
        pass  # this holder stays


register(SharedBuffer)


# multiprocessing's own doors: arguments of processes, queues, pools


def _reduce(buffer: SharedBuffer) -> Any:
    buffer._check_usable("the message")
    copy = multiprocessing.reduction.DupFd(buffer._memory.fileno())
    return _rebuild, (copy, len(buffer), buffer._readonly)


def _rebuild(copy: Any, size: int, readonly: bool) -> SharedBuffer:
    return SharedBuffer._received(Memory(iter((copy.detach(),))), size, readonly)


multiprocessing.reduction.register(SharedBuffer, cast(Any, _reduce))
