"""(message, transfer list) <-> packet: which pickler, by reference or by value, what travels beside the pickle.

A message that is only data becomes a bare pickle. One with transferables or large buffers becomes

    EXTENDED | counts | per transferable: code, descriptors, size, bytes | per buffer: size | pickle | aligned buffers

House rules: everything that can fail fails in ``pack``, before anything is detached. Pickling and loading run the
user's code: no lock is held, and an exception of a signal handler that comes up there is none of the message's. Plain
pickle does what it can; cloudpickle only what plain pickle cannot do, or would do wrong at the receiver (functions and
classes of a ``__main__`` that has no file: notebook, prompt). This room knows transferables only by their protocol.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import signal
import struct
import sys
import threading
import time
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from multiprocessing import BufferTooShort
from multiprocessing.reduction import ForkingPickler
from operator import itemgetter
from types import FunctionType
from typing import Any, ClassVar, Final, NamedTuple, Self

from ._culprit import find_culprit
from ._end import Buffer, SocketEnd
from ._kernel import Descriptors
from ._wire import PICKLE, Parcel
from .errors import DataCloneError, MessageError, PortDetachedError

loads = pickle.loads

_EXTENDED: Final = 0x10
_RAW: Final = 0x11  # the bytes of send_bytes(), where they would not look like a pickle: kind, size, bytes
_RAW_HEAD: Final = struct.Struct("<BQ")
_HEAD: Final = struct.Struct("<BIIQ")  # kind, transferables, buffers, size of the pickle
_ENTRY: Final = struct.Struct("<BII")  # code, descriptors, bytes
_SIZE: Final = struct.Struct("<Q")
_ALIGN: Final = 64
_OUT_OF_BAND: Final = 64 * 1024  # buffers from here on are not copied into the pickle; smaller ones are cheaper in it
_KEEP_BELOW: Final = 1 << 18  # bytes; a pickler that made more may have a large memo, and keep its memory: drop it


class Pickled(NamedTuple):
    """A pickle in pieces, the buffers that stayed out of it, and the transferables it refers to."""

    chunks: Sequence[Any]
    buffers: Sequence[memoryview]
    objects: Sequence[Transferable] = ()


class Entry(NamedTuple):
    """What a transferable leaves with: the code of its kind, its bytes, its descriptors (still the sender's own)."""

    code: int
    luggage: bytes
    numbers: Sequence[int]


_LOCK_ORDER: Final = itemgetter(0, 1)
_OURS: Final = ("mpchannel.", "multiprocessing.")  # modules whose lines are not where the user did something


class Departure:
    """Where a port went: for the errors of whoever still uses the old object."""

    __slots__ = ("_code", "_how", "_line", "_through", "_when")

    def __init__(self, how: str, through: Callable[[], str] | None = None) -> None:
        """*through*: what it left through. (Few departures are ever told of: as little as possible is done here.)"""
        self._how = how
        self._through = through
        self._when = time.time()
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_OURS):
            frame = frame.f_back
        self._code, self._line = frame.f_code, frame.f_lineno

    def __str__(self) -> str:
        how = self._how if self._through is None else f"{self._how} through {self._through()}"
        clock = time.strftime("%H:%M:%S", time.localtime(self._when))
        return f"{how} at {self._code.co_filename}:{self._line} ({clock}, {time.time() - self._when:.1f} s ago)"

    def error(self) -> PortDetachedError:
        return PortDetachedError(f"this port was {self}; only its new holder can use it")


class Transferable:
    """What can be listed in ``transfer``: it leaves as some bytes and descriptors, and a new object arrives.

    A post takes the locks of all that leaves (each with its place in the order of locks), checks that all can leave,
    packs them up (which leaves them usable), sends, and tells them that they left.
    """

    __slots__ = ()

    _code: ClassVar[int]
    _shared: ClassVar[bool] = False
    """Whether it is never listed and always found: a copy goes with the message, and this object stays usable."""
    _in_ports: ClassVar[bool] = True
    """Whether the event's ``ports`` have it, if it is not shared."""
    _never_copied: ClassVar[str] = (
        "moves, it is never copied: list it in post_message(..., transfer=[...]), "
        "or give it to a Process as an argument"
    )

    @property
    def _channel(self) -> bytes:
        """The channel this is an end of, if it is one."""
        return b""

    def _locks(self) -> list[tuple[int, int, Any]]:
        raise NotImplementedError

    def _check_movable(self, name: str) -> None:
        """Raise ``DataCloneError``, speaking of *name*, if this cannot leave."""
        raise NotImplementedError

    def _found(self, explicit: bool) -> Transferable:
        """What travels if this is in a message and not in its transfer list. *explicit*: there is such a list."""
        if explicit and not self._shared:
            raise DataCloneError(f"{self!r} is in the message but not in the transfer list; add it to transfer=[...]")
        return self

    def _pack_up(self) -> Entry:
        raise NotImplementedError

    def _left(self, departure: Departure, pid: int | None, *, lost: bool = False) -> None:
        """This went to process *pid*, if known; or, *lost*, to where nobody will receive it."""
        raise NotImplementedError

    @classmethod
    def _arrive(cls, luggage: memoryview, descriptors: Descriptors) -> Self:
        """The new object at the receiver."""
        raise NotImplementedError

    def _undelivered(self) -> None:
        """The message this object came with cannot be delivered."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        moving: Moving | None = _here.packing
        if moving is None:
            raise TypeError(f"a {type(self).__name__} {self._never_copied}")
        return _arrived, (moving.place(self),)


_kinds: dict[int, type[Transferable]] = {}


def register(kind: type[Transferable]) -> None:
    """Make a kind of transferable known to receivers, by its ``_code``."""
    _kinds[kind._code] = kind


class Moving:
    """The transferables of one message. *listed*: only these may move with it; ``None``: all that are found do."""

    __slots__ = ("explicit", "found", "listed", "objects")

    def __init__(self, listed: Sequence[Transferable] | None) -> None:
        self.explicit = listed is not None
        self.listed = listed or ()
        self.objects = list(self.listed)  # what travels
        self.found = list(self.listed)  # what it travels for

    def forget_found(self) -> None:
        self.objects[:] = self.found[:] = self.listed

    def place(self, found: Transferable) -> int:
        for place, each in enumerate(self.found):
            if each is found:
                return place
        self.objects.append(found._found(self.explicit))
        self.found.append(found)
        return len(self.objects) - 1


class _Here(threading.local):
    packing: Moving | None = None
    arriving: Sequence[Transferable] | None = None


_here = _Here()


def _arrived(place: int) -> Transferable:
    if _here.arriving is None:
        raise pickle.UnpicklingError("this pickle is part of a channel's message and cannot be loaded on its own")
    return _here.arriving[place]


# Picklers


class _Reducers(dict[Any, Any]):
    """Reducers beside ``copyreg``'s: ours, and those registered with multiprocessing's pickler, whenever that was."""

    def __missing__(self, kind: type) -> Any:
        if not issubclass(kind, Transferable):
            found = _forking_reducers.get(kind) or copyreg.dispatch_table.get(kind)
            if found is not None:
                return found
        raise KeyError(kind)


def _reduce_view(view: memoryview) -> Any:
    return memoryview, (pickle.PickleBuffer(view if view.c_contiguous else view.tobytes()),)


_forking_reducers: dict[Any, Any] = ForkingPickler._extra_reducers  # type: ignore[attr-defined]
_reducers = _Reducers({memoryview: _reduce_view})


class _DoorReducers(dict[Any, Any]):
    """Reducers for multiprocessing's own doors: transferables leave by those registered with its pickler."""

    def __missing__(self, kind: type) -> Any:
        return _forking_reducers.get(kind) or copyreg.dispatch_table[kind]


_door_reducers = _DoorReducers({memoryview: _reduce_view})


class _ByValueNeeded(Exception):
    """A function or class that the receiver could not find by its name."""


class _PlainPickler(pickle.Pickler):
    dispatch_table = _reducers


class _WaryPickler(_PlainPickler):
    """For a ``__main__`` without a file, which no other process can import."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (FunctionType, type)) and obj.__module__ in _MAIN:
            raise _ByValueNeeded(obj)
        return NotImplemented


STDIN: Final = "<stdin>"  # the ``__file__`` of a script that is piped into Python
_MAIN: Final = ("__main__", "__mp_main__")


def _main_has_file() -> bool:
    return getattr(sys.modules.get("__main__"), "__file__", STDIN) != STDIN


class _Sink:
    """The file a pickler writes to: a list."""

    __slots__ = ("write",)

    def __init__(self, write: Callable[[Any], object]) -> None:
        self.write = write


class _Packer:
    """A pickler with its output. Kept and used again: that is 0.4 us a message against 1.5 for a new one."""

    __slots__ = ("buffers", "chunks", "clear", "dump")

    def __init__(self, kind: Callable[..., Any]) -> None:
        self.chunks: list[Any] = []
        self.buffers: list[memoryview] = []
        pickler = kind(_Sink(self.chunks.append), 5, buffer_callback=partial(_keep_large, self.buffers))
        self.dump: Callable[[Any], None] = pickler.dump
        self.clear: Callable[[], None] = pickler.clear_memo


def _keep_large(buffers: list[memoryview], buffer: pickle.PickleBuffer) -> bool:
    """Called for each buffer; true means: into the pickle.

    No method of the packer: that would be a reference cycle, which keeps what was posted until a garbage collection
    (and CPython crashes when it collects a memoryview together with a view of its PickleBuffer).
    """
    raw = buffer.raw()
    if raw.nbytes < _OUT_OF_BAND:
        return True
    buffers.append(raw)
    return False


_free: list[_Packer] = []  # whoever packs takes one, so packing may re-enter; after an error it is not put back


def _plain_packer() -> _Packer:
    return _Packer(_PlainPickler if _main_has_file() else _WaryPickler)


_by_value_packer: Callable[[], _Packer] | None = None
_door_pickler: Callable[[Any], Any] | None = None
_give_identity: Callable[[type], object] = id


def prepare() -> None:
    """Import what packing may need. At the first channel: an import while packing could hang a forked child."""
    global _by_value_packer, _door_pickler, _give_identity
    if _by_value_packer is not None:
        return
    import logging

    import cloudpickle  # type: ignore[import-untyped]

    # cloudpickle would copy these by content, silently: an open file, a logger, a view.
    table = {
        kind: reduce
        for kind, reduce in dict(cloudpickle.Pickler.dispatch_table).items()
        if kind not in (io.TextIOWrapper, logging.Logger, logging.RootLogger, memoryview)
    }

    class ByValuePickler(cloudpickle.Pickler):  # type: ignore[misc]
        reducers: ClassVar[dict[Any, Any]] = _reducers

        def __init__(self, *args: Any, **options: Any) -> None:
            # Before super().__init__(), which is when the pickler looks for it.
            self.dispatch_table = ChainMap(self.reducers, table)
            super().__init__(*args, **options)

        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, (FunctionType, type)) and _main_has_file() and _found_in_main(obj):
                return NotImplemented  # by reference: its class must be the receiver's own
            return super().reducer_override(obj)

    class DoorPickler(ByValuePickler):
        reducers = _door_reducers

    _door_pickler = DoorPickler
    _give_identity = cloudpickle.cloudpickle._get_or_create_tracker_id
    _by_value_packer = partial(_Packer, ByValuePickler)


def know_classes() -> None:
    """Before a fork: give the classes of a ``__main__`` without a file the identity that they travel with, so that
    what either process sends back is of the other's own class.
    """
    if _door_pickler is not None and not _main_has_file():
        for thing in tuple(vars(sys.modules["__main__"]).values()):
            if isinstance(thing, type) and thing.__module__ in _MAIN:
                _give_identity(thing)


def _found_in_main(thing: Any) -> bool:
    if thing.__module__ not in _MAIN:
        return False
    found: Any = sys.modules["__main__"]
    for name in thing.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is thing


# Packing


def pack(message: Any, moving: Moving | None = None) -> bytes | Pickled:
    """Pickle a message. Raises ``DataCloneError`` with the path to the culprit, and nothing happened."""
    try:
        packer = _free.pop()
    except IndexError:
        packer = _plain_packer()
    try:
        if moving is None or not moving.explicit:
            packer.dump(message)
        else:
            _dump(packer, message, moving)
    except Exception as error:
        if not _is_the_messages_own(error):
            raise
        moving = moving or Moving(())
        moving.forget_found()
        packer = _pack_with_care(message, moving)
        return Pickled(packer.chunks, packer.buffers, moving.objects)
    packer.clear()
    if len(packer.chunks) == 1 and not packer.buffers:
        data: bytes = packer.chunks.pop()
        _free.append(packer)
        if moving is None or not moving.objects:
            return data
        return Pickled((data,), (), moving.objects)
    pickled = Pickled(packer.chunks.copy(), packer.buffers.copy(), moving.objects if moving else ())
    packer.chunks.clear()
    packer.buffers.clear()
    if sum(map(len, pickled.chunks)) < _KEEP_BELOW:
        _free.append(packer)
    return pickled


def _dump(packer: _Packer, message: Any, moving: Moving) -> None:
    outer, _here.packing = _here.packing, moving
    try:
        packer.dump(message)
    finally:
        _here.packing = outer


def _pack_with_care(message: Any, moving: Moving) -> _Packer:
    """After a plain pickler failed: with the transferables that were found, then by value, then the path to why."""
    if not moving.listed:
        packer = _plain_packer()
        try:
            _dump(packer, message, moving)
            return packer
        except Exception as error:
            if not _is_the_messages_own(error):
                raise
            moving.forget_found()
    prepare()
    assert _by_value_packer is not None
    packer = _by_value_packer()
    try:
        _dump(packer, message, moving)
    except Exception as error:
        if not _is_the_messages_own(error):
            raise
        path, cause = find_culprit(message, partial(_why_not, moving), Transferable)
        try:
            if isinstance(cause, DataCloneError):
                raise DataCloneError(f"{path}: {cause}") from None
            raise DataCloneError(f"{path}: {cause or error}") from (cause or error)
        finally:
            del cause  # see find_culprit
    return packer


def assemble(pickled: bytes | Pickled, entries: Sequence[Entry] = ()) -> tuple[Sequence[Any], int]:
    """The packet in pieces, and its size."""
    chunks, buffers = ((pickled,), ()) if isinstance(pickled, bytes) else pickled[:2]
    size = sum(map(len, chunks))
    if not entries and not buffers:
        return chunks, size
    head = [_HEAD.pack(_EXTENDED, len(entries), len(buffers), size)]
    for code, luggage, numbers in entries:
        head += (_ENTRY.pack(code, len(numbers), len(luggage)), luggage)
    head += (_SIZE.pack(buffer.nbytes) for buffer in buffers)
    parts: list[Any] = [b"".join(head), *chunks]
    size += len(parts[0])
    for buffer in buffers:
        padding = -size % _ALIGN
        parts += (bytes(padding), buffer)
        size += padding + buffer.nbytes
    return parts, size


def post_moving(
    end: SocketEnd,
    pickled: bytes | Pickled,
    objects: Sequence[Transferable],
    departure: Departure,
    *,
    doomed: bool = False,
    check: Callable[[int], object] | None = None,
    sent: list[int] | None = None,
) -> bool:
    """Post a message with transferables: all or nothing. Whether it was accepted.

    *doomed*: it cannot arrive, so it is not sent, and what moves is lost. *check*: may still refuse so many bytes.
    *sent*: as ``SocketEnd.post_parts`` has it.
    """
    sent = [] if sent is None else sent
    locks = [lock for each in objects for lock in each._locks()]
    locks.append((id(end), 1, end.sending))
    locks.sort(key=_LOCK_ORDER)
    post = partial(_post_held, end, pickled, objects, departure, doomed, check, sent)
    if len(locks) == 3:  # one port: an ExitStack takes longer than the sending
        with locks[0][2], locks[1][2], locks[2][2]:
            return post()
    with ExitStack() as held:
        for _, _, lock in locks:
            held.enter_context(lock)
        return post()


def _post_held(
    end: SocketEnd,
    pickled: bytes | Pickled,
    objects: Sequence[Transferable],
    departure: Departure,
    doomed: bool,
    check: Callable[[int], object] | None,
    sent: list[int],
) -> bool:
    """``post_moving`` with all locks held."""
    for place, each in enumerate(objects):
        each._check_movable(f"transfer[{place}]")  # another thread may have closed or moved it since
    entries = [each._pack_up() for each in objects]
    parts, size = assemble(pickled, entries)
    if check is not None:
        check(size)
    numbers = [number for entry in entries for number in entry.numbers]
    accepted = lost = False
    pending, interruption = list(objects), None
    try:
        accepted = not doomed and end.post_parts(parts, size, numbers, sent)
        lost = not accepted
    finally:
        # Exceptions of signal handlers may come right behind the call that sends, and behind any of these.
        while (sent or lost) and pending:
            try:
                pending[-1]._left(departure, end.peer_pid, lost=lost)
                pending.pop()
            except BaseException as error:
                interruption = error
    if interruption is not None:
        try:
            raise interruption
        finally:
            del interruption  # a frame that holds what it raises is a cycle
    return accepted


def pack_bytes(data: memoryview) -> tuple[Sequence[Any], int]:
    """A packet of bytes as they are: what looks like a pickle goes as one, as multiprocessing's connections have it."""
    if data.nbytes and data[0] == PICKLE and data[-1] == pickle.STOP[0]:
        return (data,), data.nbytes
    return (_RAW_HEAD.pack(_RAW, data.nbytes), data), _RAW_HEAD.size + data.nbytes


def dumps(thing: Any) -> bytes:
    """A pickle for multiprocessing's own doors (processes, queues): by reference what the receiver can find, else by
    value. ``loads`` loads it. Raises what pickling raises.
    """
    prepare()
    assert _door_pickler is not None
    file = io.BytesIO()
    _door_pickler(file).dump(thing)
    return file.getvalue()


# Loading


def unpack(parcel: Parcel) -> tuple[Any, tuple[Any, ...]]:
    """(message, transferred objects). Raises ``MessageError``; then what came along was closed as undeliverable."""
    body, descriptors = parcel
    try:
        descriptors.complete()  # may find no room for them: then the parcel is as it was
    except ValueError as error:
        descriptors.close()
        raise MessageError(f"a message cannot be loaded: {error}", bytes(body)) from error
    arrived: list[Transferable] = []
    opened = False
    try:
        pickle_, buffers = _open(body, descriptors, arrived)
        opened = True
        outer, _here.arriving = _here.arriving, arrived
        try:
            return loads(pickle_, buffers=buffers), tuple(each for each in arrived if each._in_ports)
        finally:
            _here.arriving = outer
    except BaseException as error:
        if opened and isinstance(error, MemoryError):
            descriptors.made, descriptors.spent = arrived, False
            raise  # the parcel is as it was, but for what was made already
        bad = message_error(error, parcel)
        if bad is None and not descriptors.spent:
            raise  # nothing was made yet: the parcel is as it was
        for each in arrived:
            each._undelivered()
        descriptors.close()
        if bad is None:
            raise
        try:
            raise bad from error
        finally:
            del bad  # see Endpoint._fumbled


def _open(body: memoryview, descriptors: Descriptors, arrived: list[Transferable]) -> tuple[Any, Iterator[Any]]:
    """The pickle and the buffers of a packet; fills *arrived*."""
    kind = body[0] if len(body) else 0
    if kind == PICKLE:
        return body, iter(())
    if kind == _RAW:
        _, size = _RAW_HEAD.unpack_from(body)
        return body[_RAW_HEAD.size : _RAW_HEAD.size + size], iter(())
    if kind != _EXTENDED:
        raise pickle.UnpicklingError("not a packet of mpchannel")
    _, transferables, count, size = _HEAD.unpack_from(body)
    at = _HEAD.size
    for _ in range(transferables):
        code, numbers, length = _ENTRY.unpack_from(body, at)
        at += _ENTRY.size
        if not descriptors.made:
            arrived.append(_kinds[code]._arrive(body[at : at + length], descriptors.take(numbers)))
        at += length
    arrived += descriptors.made
    sizes = [_SIZE.unpack_from(body, at + 8 * each)[0] for each in range(count)]
    at += 8 * count
    pickle_ = body[at : at + size]
    at += size
    buffers = []
    for length in sizes:
        at += -at % _ALIGN
        buffers.append(body[at : at + length])
        at += length
    return pickle_, iter(buffers)


def transferables(parcel: Parcel) -> int:
    """How many come with a packet."""
    body = parcel.body
    count: int = _HEAD.unpack_from(body)[1] if len(body) >= _HEAD.size and body[0] == _EXTENDED else 0
    return count


def unpack_bytes(body: memoryview) -> memoryview:
    """What ``recv_bytes`` gives for a packet: the bytes that were sent, or the pickle of the message."""
    pickle_, buffers = _open(body, Descriptors(), [])
    if next(buffers, None) is not None:
        pickle_ = memoryview(ForkingPickler.dumps(unpack(Parcel(body, Descriptors()))[0]))
    return memoryview(pickle_)


def receive_into(buf: Any, offset: int, receive: Callable[[], bytes]) -> int:
    """Put what *receive* gives into a writable buffer, from *offset* on; its size. Raises ``ValueError`` before
    anything is received, ``BufferTooShort`` with the bytes in it. (``Connection.recv_bytes_into``.)
    """
    with memoryview(buf) as view, view.cast("B") as room:
        if offset < 0:
            raise ValueError("negative offset")
        if offset > len(room):
            raise ValueError("offset too large")
        data = receive()
        if len(data) > len(room) - offset:
            raise BufferTooShort(data)
        room[offset : offset + len(data)] = data
        return len(data)


def message_error(error: BaseException, packet: Buffer | memoryview | Parcel) -> MessageError | None:
    """What the user gets for a message that cannot be loaded; ``None`` if *error* is none of the message's."""
    if not _is_the_messages_own(error):
        return None
    size = packet.size if isinstance(packet, Buffer) else None
    packed = bytes(packet.body if isinstance(packet, Parcel) else memoryview(packet)[: size or None])
    return MessageError(f"a message cannot be loaded: {type(error).__name__}: {error}", packed)


def _is_the_messages_own(error: BaseException) -> bool:
    """Whether an error that came up in pickling or loading is about the message. (Memory may have run out, or a
    Python signal handler may have run in the middle of it.)
    """
    if isinstance(error, MemoryError):
        return False
    if threading.current_thread() is not threading.main_thread():
        return True
    if isinstance(error, KeyboardInterrupt):
        return False
    handlers = {getattr(signal.getsignal(number), "__code__", None) for number in signal.valid_signals()} - {None}
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in handlers:
            return False
        trace = trace.tb_next
    return True


def _why_not(moving: Moving, value: Any) -> Exception | None:
    """Why *value*, a part of a message, cannot be pickled; ``None`` if it can."""
    assert _by_value_packer is not None
    allowed = Moving(moving.listed if moving.explicit else None)
    try:
        _dump(_by_value_packer(), value, allowed)
    except Exception as error:
        return error
    return None
