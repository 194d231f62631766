"""For the tests of programs that use channels: leaks, deaths, delays, and channels without sockets.

    no_leaks        a context manager, and a pytest fixture: fails if ports, processes or descriptors are left
    kill_peer       SIGKILL to whoever holds the other end of a port
    DelayedChannel  a real channel whose messages come late, or not before ``resume()``
    FakeChannel     a channel in one thread: no sockets, no other process, the same order every time

In a ``conftest.py``: ``pytest_plugins = ["mpchannel.testing"]``; then a test asks for the fixture ``no_leaks``, or all
of a file do by ``pytestmark = pytest.mark.usefixtures("no_leaks")``. pytest is imported only when it looks for it.
"""

from __future__ import annotations

import errno
import gc
import itertools
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Self, final

from ._clone import Departure, Entry, Moving, Pickled, assemble, pack, pack_bytes, register, unpack, unpack_bytes
from ._delivery import delivery_thread, home, report, running_loop
from ._end import Buffer, spare_buffers
from ._endpoint import State, Watched, closed_error
from ._kernel import Descriptors, ProcessHandle
from ._link import open_links
from ._recycle import give_back
from ._wire import End, Parcel
from .channel import MessageChannel, wait
from .errors import BufferFull, DataCloneError, MessageError, PortClosedError
from .events import CloseEvent, EventTarget, MessageErrorEvent, MessageEvent
from .port import MessagePort
from .worker import Worker

__all__ = ["DelayedChannel", "FakeChannel", "FakePort", "deliver", "kill_peer", "no_leaks"]

AnyPort = MessagePort[Any, Any]


# Leaks


def _helpers() -> tuple[set[int], set[int]]:
    """Descriptors and processes of multiprocessing that stay once they are there."""
    tracker: Any = multiprocessing.resource_tracker._resource_tracker
    server: Any = multiprocessing.forkserver._forkserver
    numbers = {getattr(tracker, "_fd", None), getattr(server, "_forkserver_alive_fd", None)}
    pids = {getattr(tracker, "_pid", None), getattr(server, "_forkserver_pid", None)}
    return {each for each in numbers if each is not None}, {each for each in pids if each is not None}


def _descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the one that lists
    return found


def _children() -> set[int]:
    found: set[int] = set()
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/children") as file:
                found.update(map(int, file.read().split()))
        except (FileNotFoundError, ProcessLookupError):
            continue  # that thread has ended, before it was opened or before it was read
    return found


class _Belongings:
    """What this process has."""

    def __init__(self) -> None:
        numbers, pids = _helpers()
        self.links = {id(link): link for link in open_links()}
        self.names = {each.pid: each.name for each in multiprocessing.active_children()}
        self.children = (_children() | {pid for pid in self.names if pid is not None}) - pids
        sockets = {link._sock.fileno() for link in self.links.values() if link._sock is not None}
        self.descriptors = {
            (number, target)
            for number, target in _descriptors().items()
            if number not in numbers and number not in sockets
        }

    def beyond(self, before: _Belongings) -> list[str]:
        """What came since *before*, each in words."""
        ports = [link for key, link in self.links.items() if before.links.get(key) is not link]
        words = [f"port {(link.owner and link.owner()) or link!r}" for link in ports]
        words += [
            f"process {pid} {self.names.get(pid) or _command(pid)}" for pid in sorted(self.children - before.children)
        ]
        words += [
            f"descriptor {number} -> {target}" for number, target in sorted(self.descriptors - before.descriptors)
        ]
        return words


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().strip()
    except OSError:
        return "(ended)"


def _settle() -> None:
    """Start what lives as long as the process."""
    done = threading.Event()
    near, far = MessageChannel()
    far._set_handler("close", lambda _: done.set())
    far._start_at(delivery_thread)
    near.close()
    done.wait(10)


@contextmanager
def no_leaks(patience: float = 5.0) -> Iterator[None]:
    """Raise ``AssertionError``, naming each, if open ports, child processes or descriptors are left behind by a block.

    What ends by itself is given *patience* seconds for it. Ports that nobody refers to any more are closed by a
    garbage collection, and are no leak. Raises nothing if the block itself raises.
    """
    _settle()
    give_back(all_of_it=True)
    gc.collect()
    before = _Belongings()
    yield
    deadline = time.monotonic() + patience
    while True:
        give_back(all_of_it=True)
        gc.collect()
        multiprocessing.active_children()  # reaps
        left = _Belongings().beyond(before)
        if not left:
            return
        if time.monotonic() > deadline:
            raise AssertionError("left behind: " + "; ".join(left))
        time.sleep(0.01)


def _make_fixture() -> Any:
    import pytest

    @pytest.fixture(name="no_leaks")
    def fixture_no_leaks() -> Iterator[None]:
        """Fails if the test leaves open ports, child processes or descriptors behind."""
        with no_leaks():
            yield

    return fixture_no_leaks


def __getattr__(name: str) -> Any:
    if name == "fixture_no_leaks":
        globals()[name] = made = _make_fixture()
        return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "fixture_no_leaks"})


# Deaths


def kill_peer(port: AnyPort | Worker, patience: float = 10.0) -> int:
    """SIGKILL to the process that holds the other end of *port*, or to a worker. Returns its pid, once it has ended.

    Raises ``ValueError`` if that is this process, or not known; ``PortClosedError`` if the channel is closed;
    ``ProcessLookupError`` if the process has ended already; ``TimeoutError`` if it has not after *patience* seconds.
    """
    pid = port.pid if isinstance(port, Worker) else _holder(port)
    handle = ProcessHandle(pid)
    try:
        signal.pidfd_send_signal(handle.fileno(), signal.SIGKILL)
        if not multiprocessing.connection.wait([handle.fileno()], patience):
            raise TimeoutError(f"process {pid} has not ended in {patience} s")
    finally:
        handle.close()
    return pid


def _holder(port: AnyPort) -> int:
    link = port._link
    with link.receiving:
        ready = link.ready  # and what the other end told of who holds it
    if isinstance(ready, End):
        raise closed_error(ready)
    pid = link.peer_pid
    if pid is None or pid == os.getpid():
        raise ValueError(f"there is no process to kill: {port!r}")
    return pid


# Delays


@final
class DelayedChannel:
    """A channel whose messages are on their way for *delay* seconds, both ways; ``port1`` and ``port2`` are real ports.

    ``pause()`` holds all of them back until ``resume()``; ``delay`` can be set at any time, for messages to come.
    What one end posted before its holder died arrives all the same, and then the close event with its reason.
    Messages are not loaded in between. The process that made the channel has to live, as a thread of it carries them.
    ``close()``, or leaving a ``with`` block, loses what is on its way.
    """

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        self.port1: AnyPort
        self.port2: AnyPort
        self.port1, near = MessageChannel()
        self.port2, far = MessageChannel()
        self._wake, woken = MessageChannel()
        self._paused = False
        self._thread = threading.Thread(
            target=_carry, args=(weakref.proxy(self), near, far, woken), name="mpchannel delayed channel", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[AnyPort]:
        yield self.port1
        yield self.port2

    @property
    def paused(self) -> bool:
        """Whether messages are held back."""
        return self._paused

    def pause(self) -> None:
        """Hold back what is on its way, and what comes."""
        self._paused = True
        self._wake.post_message(None)

    def resume(self) -> None:
        """Go on; what has waited for its time comes at once."""
        self._paused = False
        self._wake.post_message(None)

    def close(self) -> None:
        """Close both ends, those that have moved too, and end the thread. Idempotent."""
        self._wake.close()
        self.port1.close()
        self.port2.close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _carry(channel: DelayedChannel, near: AnyPort, far: AnyPort, woken: AnyPort) -> None:
    """The thread of a ``DelayedChannel``."""
    under_way: dict[AnyPort, deque[tuple[float, Any]]] = {near: deque(), far: deque()}  # by where it came from
    to = {near: far, far: near}
    listening = [near, far]
    with near, far, woken:
        while not (near.closed and far.closed):
            try:
                paused = channel._paused
            except ReferenceError:
                return
            dues = []
            for source, waiting in under_way.items():
                while waiting and not paused and waiting[0][0] <= time.monotonic():
                    _forward(waiting.popleft()[1], source, to[source])
                if waiting and not paused:
                    dues.append(waiting[0][0])
            timeout = max(0.0, min(dues) - time.monotonic()) if dues else None
            for source in wait([*(each for each in listening if not each.closed), woken], timeout):
                try:
                    delay = channel.delay
                    while (taken := source._take_now([])) is not None:
                        if source is woken:
                            if isinstance(taken, End):
                                return
                            continue
                        waiting = under_way[source]
                        due = time.monotonic() + delay
                        waiting.append((max(due, waiting[-1][0]) if waiting else due, taken))
                        if isinstance(taken, End):
                            listening.remove(source)
                            break
                except PortClosedError:
                    continue  # closed this very moment: that was forwarded already
                except ReferenceError:
                    return


def _forward(taken: Any, source: AnyPort, to: AnyPort) -> None:
    if isinstance(taken, End):
        to._link.close(taken.reason)
        to.close()
        source.close()
    elif isinstance(taken, Parcel):
        taken.descriptors.complete()
        to._link.post_parts((taken.body,), taken.body.nbytes, tuple(taken.descriptors._numbers))
    elif isinstance(taken, Buffer):
        to._link.post(bytes(memoryview(taken)[: taken.size or None]))
        spare_buffers.append(taken)
    else:
        to._link.post(bytes(taken))


# Fakes


class _Half:
    """One end of a fake channel, whoever holds it."""

    def __init__(self, channel: FakeChannel, name: str) -> None:
        self.channel = channel
        self.name = name
        self.queue: deque[_Item] = deque()
        self.other: _Half
        self.port: FakePort | None = None
        self.gone = False  # nobody holds it any more


class _Item:
    """A message on its way, or the end."""

    def __init__(self, body: bytes, moving: tuple[_Half, ...] = (), end: End | None = None) -> None:
        self.body = body
        self.moving = moving
        self.end = end


_numbers: Final = itertools.count(1)
_moving: Final[dict[int, _Half]] = {}
_due: Final[deque[_Half]] = deque()  # who may have something to deliver, in the order of posting
_FAKE: Final = 250


def deliver(count: int | None = None) -> int:
    """Run the listeners of all fake ports for what waits, in the order of posting, and for what they post in turn; at
    most *count* events. Returns how many there were.

    On an asyncio loop this happens by itself, and whenever ``receive`` or ``recv`` has to wait.
    """
    done = 0
    while (count is None or done < count) and _step():
        done += 1
    return done


def _step() -> bool:
    """Deliver one event, if one waits."""
    while _due:
        half = _due.popleft()
        port = half.port
        if port is not None and port._state is State.OPEN and port._turn():
            return True
    return False


class FakePort(MessagePort[Any, Any]):
    """One end of a ``FakeChannel``: all that a ``MessagePort`` has, but ``fileno``.

    ``receive``, ``recv`` and ``wait_closed`` run the listeners of other fake ports while they have nothing; if then
    nothing came they raise ``TimeoutError`` at once, whatever *timeout* is: nobody else could post.
    """

    __slots__ = ("_half", "_waiters")

    _code = _FAKE
    _half: _Half
    _waiters: list[Any]

    @classmethod
    def _at(cls, half: _Half) -> Self:
        port = cls.__new__(cls)
        EventTarget.__init__(port)
        port._half = half
        half.port = port
        port._state, port._enabled, port._watched = State.OPEN, False, Watched.NOT
        port._home = port._end = port._departure = port._limit = None
        port._closing, port._afterwards, port._parked = (), (), False
        port._ref, port._takes = True, 0
        port._waiters = []
        return port

    def __del__(self) -> None:
        half = getattr(self, "_half", None)
        if half is not None and half.port is self and self._state is State.OPEN:
            _end_half(half, "collected")

    def __repr__(self) -> str:
        state = str(self._departure) if self._departure is not None else self._state.value
        return f"<FakePort {self._half.name}, {state}>"

    # Posting

    def post_message(self, message: Any, transfer: Iterable[Any] | None = ()) -> bool:
        listed = () if transfer is None else self._check_list(transfer)
        return self._post(pack(message, Moving(listed) if listed else None))

    def _post(self, data: bytes | Pickled, how: str = "posted", sent: list[int] | None = None) -> bool:
        if self._departure is not None:
            raise self._departure.error()
        objects = data.objects if isinstance(data, Pickled) else ()
        for place, each in enumerate(objects):
            if not isinstance(each, FakePort):
                raise DataCloneError(f"transfer[{place}] is {each!r}: a fake channel carries no real ports or memory")
            each._check_movable(f"transfer[{place}]")
        parts, size = assemble(data, [each._pack_up() for each in objects])
        self._check_room(size)
        halves = tuple(each._half for each in objects if isinstance(each, FakePort))
        for each in objects:
            each._left(Departure(how, lambda: repr(self)), None)
        item = _Item(b"".join(parts), halves)
        if self._state is State.CLOSED or self._half.other.gone:
            _lose(item)
            return False
        _put(self._half, item)
        return True

    def _check_room(self, size: int) -> None:
        held = self.buffered_amount
        if self._limit is not None and held + size > self._limit:
            raise BufferFull(f"a message of {size} bytes does not fit: {held} wait and max_buffered is {self._limit}")

    def send(self, obj: Any) -> None:
        data = pack(obj, Moving(None))
        self._check_sent(self._post(data, "sent"))

    def send_bytes(self, buf: Any, offset: int = 0, size: int | None = None) -> None:
        view = memoryview(buf).cast("B")
        if offset < 0 or (size or 0) < 0 or offset + (size or 0) > len(view):
            raise ValueError("offset and size must lie in the buffer")
        parts, _ = pack_bytes(view[offset:] if size is None else view[offset : offset + size])
        self._check_sent(self._post(b"".join(parts)))

    @property
    def buffered_amount(self) -> int:
        """Bytes of the pickles that were posted here and not yet taken."""
        half = self._half
        return sum(len(item.body) for item in (*half.other.queue, *half.channel._held_from(half)))

    def drain(self, timeout: float | None = None) -> None:
        """Run listeners until all that was posted was taken. Raises ``TimeoutError`` at once, whatever *timeout* is, if
        nobody is there to take it.
        """
        while self.buffered_amount:
            if not _step():
                raise TimeoutError(f"{self.buffered_amount} bytes were not taken, and nobody is there to take them")

    async def adrain(self) -> None:
        """``drain`` for asyncio."""
        self.drain()

    # Receiving

    def _take(self) -> _Item | None:
        """The next message; the end raises ``PortClosedError``."""
        if self._departure is not None:
            raise self._departure.error()
        if self._state is State.CLOSED:
            if self._end is not None:
                raise closed_error(self._end)
            raise PortClosedError("this port was closed by its own holder")
        queue = self._half.queue
        if not queue:
            return None
        item = queue.popleft()
        if item.end is not None:
            self._over(item.end)
            raise closed_error(item.end)
        return item

    def _wait(self) -> _Item:
        while (item := self._take()) is None:
            if not _step():
                raise TimeoutError("no message came, and nobody is left who could post one: see mpchannel.testing")
        return item

    def receive(self, timeout: float | None = None) -> MessageEvent[Any]:
        return MessageEvent(self, *_opened(self._wait()))

    def recv(self, timeout: float | None = None) -> Any:
        return _opened(self._wait())[0]

    def _receive_now(self) -> MessageEvent[Any] | None:
        item = self._take()
        return None if item is None else MessageEvent(self, *_opened(item))

    async def areceive(self) -> MessageEvent[Any]:
        import asyncio

        while (item := self._take()) is None:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            _soon()
            try:
                await waiter
            finally:
                self._waiters.remove(waiter)
        return MessageEvent(self, *_opened(item))

    def poll(self, timeout: float | None = 0.0) -> bool:
        while not self._half.queue and self._state is State.OPEN:
            if timeout == 0.0 or not _step():
                return False
        return True

    def recv_bytes(self, maxlength: int | None = None) -> bytes:
        data = self._next_bytes()
        if maxlength is not None and len(data) > maxlength:
            raise OSError(f"a message of {len(data)} bytes came, more than maxlength={maxlength}")
        return data

    def _next_bytes(self) -> bytes:
        item = self._wait()
        if item.moving:
            _lose(item)
            raise MessageError("a message with ports cannot be received as bytes; use recv()")
        return bytes(unpack_bytes(memoryview(item.body)))

    def fileno(self) -> int:
        """Raises ``OSError``: it has none."""
        raise OSError(errno.EBADF, "a fake port has no descriptor to wait on")

    # Listening

    def start(self) -> None:
        if self._state is State.OPEN and not self._enabled:
            self._enabled = True
            self._look()

    def _listeners_changed(self, type: str, added: Any) -> None:
        if type == "close" and added is not None and self._end is not None:
            self._dispatch_close((added,))
        else:
            self._look()

    def _look(self) -> None:
        """Have all that waits here delivered."""
        _due.extend([self._half] * len(self._half.queue))
        _soon()

    def _turn(self) -> bool:
        """Deliver one event, if one is to be delivered here."""
        for waiter in self._waiters:
            if self._half.queue and not waiter.done():
                waiter.set_result(None)
                return True
        queue = self._half.queue
        listening = self._enabled and bool(self._listeners.get("message"))
        if not queue or not (listening or (queue[0].end is not None and self._listeners.get("close"))):
            return False
        item = queue.popleft()
        if item.end is not None:
            self._over(item.end)
            return True
        event: MessageEvent[Any] | MessageErrorEvent
        row = self._listeners.get("message", ())
        try:
            event = MessageEvent(self, *_opened(item))
        except MessageError as error:
            event, row = MessageErrorEvent(self, error), self._listeners.get("messageerror", ())
            if not row:
                report(error)
        self._emit(event, row)
        return True

    def _emit(self, event: Any, row: Any) -> None:
        at = home()
        results = self._dispatch(event, row, at.report)
        if results:
            at.run(results)

    # Closing and moving

    def _over(self, end: End, *, dispatch: bool = False) -> None:
        self._state, self._end = State.CLOSED, end
        _end_half(self._half, "closed")
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._dispatch_close(self._listeners.get("close", ()))

    def _dispatch_close(self, row: Any) -> None:
        if row:
            self._emit(self._closed_event(), row)

    def _closed_event(self) -> CloseEvent | None:
        end = self._end
        return None if end is None else CloseEvent(self, end.reason, end.pid, lambda: None)

    def close(self) -> None:
        if self._state is State.OPEN:
            self._state = State.CLOSED
            _end_half(self._half, "closed")
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_result(None)

    def wait_closed(self, timeout: float | None = None) -> CloseEvent | None:
        while self._state is State.OPEN:
            if self._half.queue and self._half.queue[0].end is not None:
                self._over(self._half.queue.popleft().end or End("closed", None))
            elif not _step():
                raise TimeoutError("the channel did not close, and nobody is left who could close it")
        if self._departure is not None:
            raise self._departure.error()
        return self._closed_event()

    async def await_closed(self) -> CloseEvent | None:
        import asyncio

        while self._state is State.OPEN and not (self._half.queue and self._half.queue[0].end is not None):
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
                await asyncio.sleep(0)  # a message is there: it is somebody else's to take
            finally:
                self._waiters.remove(waiter)
        return self.wait_closed()

    @property
    def _channel(self) -> bytes:
        return self._half.channel._id

    def _check_movable(self, name: str) -> None:
        if self._state is State.DETACHED:
            raise DataCloneError(f"{name} is a port that was {self._departure}")
        if self._state is State.CLOSED:
            raise DataCloneError(f"{name} is a closed port: {self!r}")

    def _locks(self) -> list[tuple[int, int, Any]]:
        raise DataCloneError(f"{self!r} can only move through a fake channel")

    def _pack_up(self) -> Entry:
        number = next(_numbers)
        _moving[number] = self._half
        return Entry(_FAKE, number.to_bytes(8, "little"), ())

    def _left(self, departure: Departure, pid: int | None, *, lost: bool = False, tell: bool = False) -> None:
        self._state, self._departure = State.DETACHED, departure
        self._half.port = None
        self._clear_listeners()

    @classmethod
    def _arrive(cls, luggage: memoryview | bytes, descriptors: Descriptors) -> Self:
        return cls._at(_moving.pop(int.from_bytes(luggage, "little")))

    def _undelivered(self) -> None:
        self._state = State.DETACHED
        _end_half(self._half, "undeliverable")


register(FakePort)


def _opened(item: _Item) -> tuple[Any, tuple[Any, ...]]:
    return unpack(Parcel(memoryview(bytearray(item.body)), Descriptors()))


def _put(half: _Half, item: _Item) -> None:
    """Send *item* from *half* to the other one."""
    if half.channel._paused:
        half.channel._held.append((half, item))
        return
    other = half.other
    if other.gone:
        _lose(item)
        return
    other.queue.append(item)
    _due.append(other)
    _soon()


def _lose(item: _Item) -> None:
    for half in item.moving:
        _end_half(half, "undeliverable")


def _end_half(half: _Half, reason: str) -> None:
    if not half.gone:
        half.gone = True
        for item in half.queue:
            _lose(item)
        half.queue.clear()
        if not half.other.gone:
            _put(half, _Item(b"", end=End(reason, os.getpid())))


def _soon() -> None:
    """On a loop: deliver in its next turn."""
    loop = running_loop()
    if loop is not None and _due:
        loop.call_soon(_deliver_on_loop)


def _deliver_on_loop() -> None:
    if _step():
        _soon()


@final
class FakeChannel:
    """Two connected ports in one thread, as ``MessageChannel`` has them: messages are copied, ports move, errors are
    raised as real ones would be. Nothing runs by itself but on an asyncio loop: ``deliver()`` runs listeners, in the
    order of posting. ``pause()`` holds messages back until ``resume()``.
    """

    def __init__(self) -> None:
        number = next(_numbers)
        self._id = b"fake" + number.to_bytes(8, "little")
        self._paused = False
        self._held: deque[tuple[_Half, _Item]] = deque()
        one, other = _Half(self, f"{number}/1"), _Half(self, f"{number}/2")
        one.other, other.other = other, one
        self.port1: FakePort = FakePort._at(one)
        self.port2: FakePort = FakePort._at(other)

    def __iter__(self) -> Iterator[FakePort]:
        yield self.port1
        yield self.port2

    def _held_from(self, half: _Half) -> list[_Item]:
        return [item for source, item in self._held if source is half]

    def pause(self) -> None:
        """Hold back what is posted from now on, and the close event too."""
        self._paused = True

    def resume(self) -> None:
        """Let what was held back arrive, in its order."""
        self._paused = False
        while self._held:
            _put(*self._held.popleft())

    def kill(self, port: FakePort, reason: str = "died") -> None:
        """As if the process that holds *port* had been killed: the other side gets a close event with *reason*."""
        if port._state is State.OPEN:
            port._state = State.CLOSED
            _end_half(port._half, reason)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.port1.close()
        self.port2.close()
