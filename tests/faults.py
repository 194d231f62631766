"""Faults at the seam of system calls: every call that ``mpchannel._kernel`` makes fails once, is short, or is the last
thing that its process does.

    python -m tests.faults                  all of it: a table of calls, errors, occurrences and outcomes, and the total
    python -m tests.faults ports overflow   these scenarios only
    python -m tests.faults --few            only at the first three and the last occurrence of each call

How. A scenario is a handful of steps (post, receive, move, close ...) and a model of what must come out. Run once
without a fault, it tells how often it makes each call; then it is run again, from the start, for each fault at each of
these occurrences. A step may do what it is for, or raise an ``OSError`` (``MemoryError``) that has the fault's number;
then nothing may have changed, and the same step must work at once. (What is posted may also be refused as if the
channel were closed, where the fault is the system's word for that.) In the end every message that was accepted has come
out once, in order, every port that moved works, and this process has the descriptors that it had before.
"""

from __future__ import annotations

import errno
import faulthandler
import gc
import mmap
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self

import mpchannel
from mpchannel import _clone, _kernel
from mpchannel._delivery import delivery_thread
from mpchannel._recycle import give_back

ANYWHERE = (
    errno.EINTR,
    errno.EAGAIN,
    errno.ENOBUFS,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENOSPC,
    errno.EPERM,
)
SENDING = (errno.EPIPE, errno.ECONNRESET, errno.ETOOMANYREFS, errno.EMSGSIZE)
GONE = (errno.EPIPE, errno.ECONNRESET)
SHORT, KILL, KILL_AFTER, EXIT, EXIT_AFTER = "short", "kill", "kill, done", "_exit", "_exit, done"
LAST = (KILL, KILL_AFTER, EXIT, EXIT_AFTER)
AND_ON = {f"{name}, on": getattr(errno, name) for name in ("EMFILE", "ENFILE", "ENOMEM", "ENOSPC", "EPERM")}
"""Errors that stay, until the step is tried again."""
Fault = int | str

_OS = (
    "close",
    "closerange",
    "eventfd",
    "eventfd_read",
    "eventfd_write",
    "fstat",
    "ftruncate",
    "lseek",
    "memfd_create",
    "open",
    "posix_fallocate",
    "preadv",
    "pwrite",
    "pwritev",
)
_SOCKET = ("recv_into", "recvmsg_into", "send", "sendmsg", "setsockopt", "shutdown")
_CAN_BE_SHORT = ("preadv", "pwrite", "pwritev", "recvmsg_into")
# What these say of a descriptor that is open, Linux says to nobody. (close(2) closes, whatever it says.)
_NEVER_FAIL = (
    "close",
    "closerange",
    "eventfd_read",
    "eventfd_write",
    "fcntl F_GET_SEALS",
    "fstat",
    "ioctl",
    "lseek",
    "setsockopt",
    "shutdown",
)


class Broken(AssertionError):
    """A promise was broken."""


class Seam:
    """Stands between ``_kernel`` and the system."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.target: tuple[str, int] | None = None
        self.fault: Fault = 0
        self.armed = False
        self.fired = False

    def aim(self, call: str, occurrence: int, fault: Fault) -> None:
        self.calls.clear()
        self.target, self.fault, self.fired = (call, occurrence), fault, False

    def pass_on(self, call: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.armed:
            return real(*args, **kwargs)
        self.calls[call] += 1
        if self.target is None or call != self.target[0] or self.calls[call] < self.target[1]:
            return real(*args, **kwargs)
        fault: Fault = self.fault
        if self.calls[call] > self.target[1] and fault not in AND_ON:
            return real(*args, **kwargs)
        fault = AND_ON.get(fault, fault)  # type: ignore[call-overload]
        if fault == errno.EAGAIN and call == "recvmsg_into" and "descriptors" in _callers():
            return real(*args, **kwargs)  # what a ticket was read for was queued before it, always
        self.fired = True
        if isinstance(fault, int):
            raise OSError(fault, os.strerror(fault))
        if fault == SHORT:
            return self._short(call, real, *args)
        if fault in (KILL_AFTER, EXIT_AFTER):
            real(*args, **kwargs)
        if fault in (KILL, KILL_AFTER):
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)

    @staticmethod
    def _short(call: str, real: Callable[..., Any], *args: Any) -> Any:
        if call == "recvmsg_into":  # no room for descriptors
            buffers, _, flags = args
            return real(buffers, 0, flags)
        number, data, at = args
        if call == "pwrite":
            return real(number, data[: len(data) // 2], at)
        pieces = [memoryview(piece).cast("B") for piece in data]
        size = sum(piece.nbytes for piece in pieces) // 2
        some = []
        for piece in pieces:
            some.append(piece[:size])
            size -= some[-1].nbytes
        return real(number, [piece for piece in some if piece.nbytes], at)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """``_kernel`` makes its calls through here."""
        seam = self
        real_socket = _kernel.Socket

        def method(name: str) -> Callable[..., Any]:
            real = getattr(socket.SocketType, name)
            return lambda self, *args: seam.pass_on(name, real.__get__(self), *args)

        body = {name: method(name) for name in _SOCKET}
        Socket = type("Socket", (real_socket,), {"__slots__": (), **body})

        class Mapping(mmap.mmap):
            def __new__(cls, *args: Any, **kwargs: Any) -> Self:
                return seam.pass_on("mmap", lambda: mmap.mmap.__new__(cls, *args, **kwargs))  # type: ignore[no-any-return]

            def madvise(self, *args: Any) -> Any:
                return seam.pass_on("madvise", super().madvise, *args)

        class Poll:
            def __init__(self) -> None:
                real = seam_select.poll()
                self.register = real.register
                self._real = real

            def poll(self, *args: Any) -> Any:
                return seam.pass_on("poll", self._real.poll, *args)

        real_fcntl, seam_select = _kernel.fcntl, _kernel.select
        commands = {getattr(real_fcntl, name): name for name in dir(real_fcntl) if name.startswith("F_")}

        def control(descriptor: Any, command: int, *args: Any) -> Any:
            if command == real_fcntl.F_GETFD:  # counting, for the text of an error
                return real_fcntl.fcntl(descriptor, command, *args)
            return seam.pass_on(f"fcntl {commands[command]}", real_fcntl.fcntl, descriptor, command, *args)

        def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kwargs: seam.pass_on(name, real, *args, **kwargs)

        replaced: dict[str, Any] = {
            "Socket": Socket,
            "os": _Instead(os, {name: wrapped(name, getattr(os, name)) for name in _OS}),
            "fcntl": _Instead(real_fcntl, {"fcntl": control, "ioctl": wrapped("ioctl", real_fcntl.ioctl)}),
            "mmap": _Instead(mmap, {"mmap": Mapping}),
            "select": _Instead(seam_select, {"poll": Poll}),
            "_socket": _Instead(_kernel._socket, {"socketpair": wrapped("socketpair", _kernel._socket.socketpair)}),
        }
        before = {name: getattr(_kernel, name) for name in replaced}
        vars(_kernel).update(replaced)
        try:
            yield
        finally:
            vars(_kernel).update(before)


def _callers() -> set[str]:
    """The names of the functions that are being called."""
    names, frame = set(), sys._getframe(1)
    while frame is not None:
        names.add(frame.f_code.co_name)
        frame = frame.f_back  # type: ignore[assignment]
    return names


class _Instead:
    """A module, but for some of its functions."""

    def __init__(self, module: Any, functions: dict[str, Any]) -> None:
        self._module = module
        vars(self).update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class World:
    """What a scenario does its steps with; it knows what must come out."""

    def __init__(self, seam: Seam) -> None:
        self.seam = seam
        self.outcome = "no notice"

    def step(self, fn: Callable[[], Any], unchanged: Callable[[], bool] = lambda: True) -> Any:
        """What *fn* returns: at the first try, or at the second if a fault came upon the first."""
        if self.seam.target is None or (self.seam.fired and self.seam.fault not in AND_ON):
            return self._armed(fn)
        try:
            return self._armed(fn)
        except (OSError, MemoryError) as error:
            if not self.seam.fired:
                raise
            self._is_clear(error)
            if not unchanged():
                raise Broken(f"{error!r} changed something") from error
        self.seam.target = None
        self.outcome = "refused, then done"
        return fn()

    def _armed(self, fn: Callable[[], Any]) -> Any:
        self.seam.armed = True
        try:
            return fn()
        finally:
            self.seam.armed = False

    def _is_clear(self, error: OSError | MemoryError) -> None:
        fault = AND_ON.get(self.seam.fault, self.seam.fault)  # type: ignore[call-overload]
        if isinstance(error, OSError):
            # A short write is want of memory, descriptors without room are a limit, a new file that takes nothing too.
            assert error.errno in (fault, errno.EMFILE, errno.ENOBUFS) or fault == SHORT, repr(error)
        assert str(error), repr(error)

    def channel(self) -> tuple[Any, Any]:
        port1, port2 = self.step(mpchannel.MessageChannel)
        return port1, port2

    def post(self, port: Any, expected: deque[Any], message: Any, ports: tuple[Any, ...] = ()) -> bool:
        """Post *message*, and note it in *expected*."""

        def unchanged() -> bool:
            return not any(each.detached for each in ports)

        accepted: bool = self.step(lambda: port.post_message(message, ports), unchanged)
        assert all(each.detached for each in ports), "a half-detached port"
        if accepted:
            expected.append(message)
        else:
            if not self.seam.fired or self.seam.fault not in GONE:
                raise Broken("refused although nothing says that it is closed")
            self.outcome = "as if closed"
        return accepted

    def receive(self, port: Any, expected: deque[Any]) -> tuple[Any, ...]:
        """The ports of the next message, which must be the next of *expected*."""
        event = self.step(lambda: port.receive(5))
        assert event.data == expected.popleft(), "lost, or out of order"
        return tuple(event.ports)

    def works(self, near: Any, far: Any) -> None:
        """That a channel goes both ways; without faults."""
        near.post_message("there")
        assert far.recv(5) == "there"
        far.post_message("back")
        assert near.recv(5) == "back"

    def nothing_more(self, port: Any) -> None:
        assert mpchannel.receive_message_on_port(port) is None, "doubled"


# Scenarios


def small(world: World) -> None:
    """Create, post, receive, close."""
    near, far = world.channel()
    there, back = deque[Any](), deque[Any]()
    for number in range(3):
        world.post(near, there, number)
        world.post(far, back, -number)
    while there:
        world.receive(far, there)
    while back:
        world.receive(near, back)
    world.nothing_more(near)
    world.nothing_more(far)
    world.step(near.close)
    assert far.wait_closed(5).reason in ("closed", "died")
    far.close()


def large(world: World) -> None:
    """Bodies in memory of their own, fresh and used again."""
    near, far = world.channel()
    expected = deque[Any]()
    for size in (200_000, 200_001, 200_000):
        world.post(near, expected, bytes([size % 251]) * size)
        while expected:
            world.receive(far, expected)
    world.post(near, expected, [bytearray(b"y" * 200_000)])
    while expected:
        world.receive(far, expected)
    world.nothing_more(far)
    world.works(near, far)


def slots(world: World) -> None:
    """Packets of middling size, through memory that both ends share."""
    near, far = world.channel()
    expected = deque[Any]()
    for number in range(8):
        world.post(near, expected, bytes([number]) * 64_000)
        if number % 2:
            while expected:
                world.receive(far, expected)
    world.nothing_more(far)
    world.works(near, far)


def ports(world: World) -> None:
    """Ports move, with what is queued in them, and one that has moved moves again."""
    near, far = world.channel()
    mine, moving = mpchannel.MessageChannel()
    expected = deque[Any]()
    mine.post_message("queued")
    if world.post(near, expected, "a port", (moving,)):
        (arrived,) = world.receive(far, expected)
        if world.post(far, expected, "it moves again", (arrived,)):
            (again,) = world.receive(near, expected)
            assert again.recv(5) == "queued"
            world.works(mine, again)
    world.post(near, expected, "plain")
    while expected:
        world.receive(far, expected)
    world.nothing_more(far)
    world.works(near, far)


def many_ports(world: World) -> None:
    """More ports than one packet holds."""
    near, far = mpchannel.MessageChannel()
    pairs = [mpchannel.MessageChannel() for _ in range(254)]
    expected = deque[Any]()
    if world.post(near, expected, "ports", tuple(pair.port2 for pair in pairs)):
        arrived = world.receive(far, expected)
        for number in (0, 100, 253):
            world.works(pairs[number].port1, arrived[number])
    world.nothing_more(far)
    world.works(near, far)


def _full(port: Any, expected: deque[Any]) -> None:
    """Fill the socket, without faults: what is posted now overflows."""
    while port._link._outbox is None:
        port.post_message(len(expected))
        expected.append(len(expected))


def _nearly_full(port: Any, expected: deque[Any]) -> None:
    """Fill the socket, without faults: the next small message makes an overflow file."""
    for number in range(400):
        try:
            port._link._sock.send(pickle.dumps(number), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        expected.append(number)
    raise AssertionError("the socket does not get full")


def overflow(world: World) -> None:
    """An overflow file begins, takes small and large messages and ports, is read and left."""
    near, far = mpchannel.MessageChannel()
    mine, moving = mpchannel.MessageChannel()
    expected = deque[Any]()
    _nearly_full(near, expected)
    world.post(near, expected, "begins")
    world.post(near, expected, "goes on")
    world.post(near, expected, b"z" * 50_000)
    world.post(near, expected, b"z" * 300_000)
    moved = world.post(near, expected, "a port", (moving,))
    world.post(near, expected, "last")
    arrived: tuple[Any, ...] = ()
    while len(expected) > 8:
        assert far.recv(5) == expected.popleft()
    while expected:
        arrived += world.receive(far, expected)
    world.nothing_more(far)
    assert len(arrived) == moved
    if moved:
        world.works(mine, arrived[0])
    world.post(near, expected, "through the socket again")
    while expected:
        world.receive(far, expected)
    world.works(near, far)


def overflow_begins_with_a_port(world: World) -> None:
    """An overflow file whose first record has descriptors."""
    near, far = mpchannel.MessageChannel()
    mine, moving = mpchannel.MessageChannel()
    expected = deque[Any]()
    _nearly_full(near, expected)
    moved = world.post(near, expected, "a port", (moving,))
    world.post(near, expected, "last")
    while len(expected) > 4:
        assert far.recv(5) == expected.popleft()
    arrived: tuple[Any, ...] = ()
    while expected:
        arrived += world.receive(far, expected)
    world.nothing_more(far)
    if moved:
        world.works(mine, arrived[0])
    world.works(near, far)


def overflowing_port_moves(world: World) -> None:
    """Both ends of an overflow move while it is half read."""
    near, far = mpchannel.MessageChannel()
    out, into = mpchannel.MessageChannel()
    expected, carried = deque[Any](), deque[Any]()
    _full(near, expected)
    for _ in range(5):
        world.post(near, expected, len(expected))
    for _ in range(len(expected) - 4):
        assert far.recv(5) == expected.popleft()
    if world.post(out, carried, "the reader", (far,)):
        (far,) = world.receive(into, carried)
    else:
        far = None
    if world.post(out, carried, "the writer", (near,)):
        (near,) = world.receive(into, carried)
    else:
        near = None
    if far is None or near is None:
        return
    world.post(near, expected, "behind")
    while expected:
        world.receive(far, expected)
    world.nothing_more(far)
    world.works(near, far)


def waiting(world: World) -> None:
    """Waiting in vain, and asking, until something comes."""
    near, far = world.channel()
    expected = deque[Any]()

    def in_vain() -> None:
        try:
            far.receive(0.01)
        except TimeoutError as error:
            if error.errno is not None:
                raise
        else:
            raise AssertionError("nothing was posted")

    world.step(in_vain)
    assert world.step(far.poll) is False
    assert world.step(lambda: mpchannel.receive_message_on_port(far)) is None
    world.post(near, expected, 1)
    if expected:
        world.step(lambda: far.poll(5))
        world.receive(far, expected)
    world.step(lambda: near.buffered_amount)
    world.step(lambda: near.drain(1))
    world.nothing_more(far)
    world.works(near, far)


def closing(world: World) -> None:
    """An end closes with unread messages and ports, and one that overflows."""
    near, far = mpchannel.MessageChannel()
    mine, moving = mpchannel.MessageChannel()
    near.post_message("unread")
    near.post_message("a port", [moving])
    world.step(far.close)
    far.close()
    assert near.wait_closed(5).reason in ("closed", "died")
    assert mine.wait_closed(5).reason in ("undeliverable", "died")
    near, far = mpchannel.MessageChannel()
    expected = deque[Any]()
    _full(near, expected)
    world.step(near.close)
    near.close()
    while expected:
        assert far.recv(5) == expected.popleft()
    assert far.wait_closed(5).reason in ("closed", "died")


def shared_buffer(world: World) -> None:
    """A ``SharedBuffer`` is made, moves and is read."""
    near, far = mpchannel.MessageChannel()
    buffer = world.step(lambda: mpchannel.SharedBuffer(100_000))
    memoryview(buffer)[:4] = b"here"
    expected = deque[Any]()

    def post() -> bool:
        return near.post_message(buffer, [buffer])  # type: ignore[no-any-return]

    if world.step(post, lambda: bytes(memoryview(buffer)[:4]) == b"here"):
        event = world.step(lambda: far.receive(5))
        assert bytes(memoryview(event.data)[:4]) == b"here"
        event = None
    world.post(near, expected, "next")
    while expected:
        world.receive(far, expected)
    world.works(near, far)


def connection(world: World) -> None:
    """The ends of a ``Pipe``, which processes may share."""
    near, far = world.step(mpchannel.Pipe)

    def sends(message: Any) -> bool:
        try:
            near.send(message)
        except BrokenPipeError:
            if world.seam.fault not in GONE:
                raise
            world.outcome = "as if closed"
            return False
        return True

    with near, far:
        for message in ("small", b"m" * 64_000, b"l" * 400_000):
            if world.step(lambda message=message: sends(message)):
                assert world.step(far.recv) == message
        assert not far.poll()


def listening(world: World) -> None:
    """The delivery thread takes messages and a port; a fault that comes upon it there is reported."""
    heard: list[Any] = []
    done, closed, reported = threading.Event(), threading.Event(), []
    near, far = mpchannel.MessageChannel()
    mine, moving = mpchannel.MessageChannel()

    def listen(event: Any) -> None:
        heard.append((event.data, len(event.ports)))
        if event.data == "last":
            done.set()

    outer, threading.excepthook = threading.excepthook, reported.append
    try:
        near.post_message(1)
        near.post_message(b"l" * 400_000)
        near.post_message("a port", [moving])
        near.post_message("last")
        far.add_event_listener("message", listen)
        far.onclose = lambda event: closed.set()
        world.seam.armed = True
        far.start()
        assert done.wait(10), f"deaf: {heard}"
        near.close()
        assert closed.wait(10), "no close"
    except OSError:
        if not world.seam.fired:
            raise
        world.seam.armed = False
        world.outcome = "refused, then done"
        far.start()
        assert done.wait(10), f"deaf: {heard}"
        near.close()
        assert closed.wait(10), "no close"
    finally:
        world.seam.armed = False
        delivery_thread.catch_up()
        threading.excepthook = outer
    if reported:
        assert world.seam.fired, reported
        assert all(isinstance(each.exc_value, (OSError, MemoryError)) for each in reported), reported
        world.outcome = "reported, then done"
    assert heard == [(1, 0), (b"l" * 400_000, 0), ("a port", 1), ("last", 0)], heard
    reported.clear()
    assert mine.wait_closed(5)  # its other end was dropped


SCENARIOS: dict[str, Callable[[World], None]] = {
    scenario.__name__: scenario
    for scenario in (
        small,
        large,
        slots,
        ports,
        many_ports,
        overflow,
        overflow_begins_with_a_port,
        overflowing_port_moves,
        waiting,
        closing,
        shared_buffer,
        connection,
        listening,
    )
}


# Scenarios that a process of its own plays, and may not survive. It says on *log* how far it came.


def _messages(first: Any, second: Any) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Of every kind; from the middle on they overflow."""
    yield "small", ()
    yield b"l" * 400_000, ()
    yield b"m" * 400_000, ()
    yield "a port", (first,)
    for number in range(16):
        yield bytes([number]) * 64_000, ()
    yield "overflows", ()
    yield "another port", (second,)
    yield b"v" * 2_000_000, ()
    yield "last", ()


def posts(port: Any, first: Any, second: Any, log: int) -> None:
    for message, ports in _messages(first, second):
        if port.post_message(message, ports):
            os.write(log, b".")
    port.close()


def receives(port: Any, log: int) -> None:
    for message in port:
        os.write(log, b".")
        if message == "last":
            break
    port.close()


def moves(carrier: Any, port: Any, count: int, log: int) -> None:
    """*port* overflows; *count* messages are received here, and then it goes on."""
    for _ in range(count):
        port.recv()
        os.write(log, b".")
    carrier.post_message("it moves", [port])
    carrier.close()


class Doomed:
    """A child process that plays a scenario and ends at the fault; what it said before that."""

    def __init__(self, seam: Seam, target: Callable[..., None], *arguments: Any) -> None:
        out, into = os.pipe()

        def play() -> None:
            os.close(out)
            seam.armed = True
            target(*arguments, into)
            seam.armed = False
            os.write(into, pickle.dumps(seam.calls))

        process = mpchannel.get_context("fork").Process(target=play)
        process.start()
        os.close(into)
        with open(out, "rb") as log:
            said = log.read()
        process.join()
        self.exitcode = process.exitcode
        process.close()
        self.steps = len(said) - len(said.lstrip(b"."))
        """That it told of as done."""
        self.calls: Counter[str] = pickle.loads(said[self.steps :]) if said[self.steps :] else Counter()


def last_posts(seam: Seam) -> Doomed:
    """What was posted arrives, in order, and then the close; a port in it works, one that is not is closed."""
    ours, theirs = mpchannel.MessageChannel()
    pairs = [mpchannel.MessageChannel() for _ in range(2)]
    doomed = Doomed(seam, posts, theirs, pairs[0].port2, pairs[1].port2)
    sent = [message for message, _ in _messages(None, None)]
    arrived: list[Any] = []
    came: list[Any] = []
    with suppress(mpchannel.PortClosedError):
        while True:
            event = ours.receive(5)
            arrived.append(event.data)
            came += event.ports
    assert arrived == sent[: len(arrived)], "lost, doubled or out of order"
    assert len(arrived) in (doomed.steps, doomed.steps + 1), f"{doomed.steps} posted, {len(arrived)} received"
    for pair, port in zip(pairs, came, strict=False):
        pair.port1.post_message("there")
        assert port.recv(5) == "there"
    for pair in pairs[len(came) :]:
        assert pair.port1.wait_closed(5)
    return doomed


def last_receives(seam: Seam) -> Doomed:
    """Whoever posted, or holds the other end of a port that was posted, learns of it."""
    ours, theirs = mpchannel.MessageChannel()
    pairs = [mpchannel.MessageChannel() for _ in range(2)]
    for message, ports in _messages(pairs[0].port2, pairs[1].port2):
        assert ours.post_message(message, ports)
    doomed = Doomed(seam, receives, theirs)
    assert ours.wait_closed(5).reason in ("died", "closed")
    assert not ours.post_message("in vain")
    assert ours.buffered_amount == 0
    for pair in pairs:
        assert pair.port1.wait_closed(5)
    return doomed


def last_moves(seam: Seam) -> Doomed:
    """The port is here, with all that was not received there, or is closed."""
    ours, theirs = mpchannel.MessageChannel()
    near, far = mpchannel.MessageChannel()
    expected = deque[Any]()
    _full(near, expected)
    for message in ("last but one", "last"):
        near.post_message(message)
        expected.append(message)
    count = len(expected) - 2  # of which the last one is in the file
    doomed = Doomed(seam, moves, theirs, far, count)
    try:
        (port,) = ours.receive(5).ports
    except mpchannel.PortClosedError:
        assert near.wait_closed(5)
    else:
        assert doomed.steps == count
        assert [port.recv(5), port.recv(5)] == ["last but one", "last"]
        near.post_message("works")
        assert port.recv(5) == "works"
    return doomed


LAST_SCENARIOS: dict[str, Callable[[Seam], Doomed]] = {
    scenario.__name__: scenario for scenario in (last_posts, last_receives, last_moves)
}


# Running them


def _descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def _settled(before: list[str]) -> bool:
    for _ in range(500):
        if _descriptors() == before:
            return True
        gc.collect()
        give_back(all_of_it=True)
        time.sleep(0.002)  # the delivery thread lets go of what it heard
    return False


def run(seam: Seam, scenario: Callable[[World], None]) -> str:
    """One run; its outcome. Raises what was broken."""
    world = World(seam)
    checked(seam, lambda: scenario(world))
    return world.outcome


def checked(seam: Seam, play: Callable[[], Any]) -> Any:
    """What *play* returns. Raises ``Broken`` if it left something open, or something could be told to nobody."""
    unraisable: list[str] = []
    sys.unraisablehook = lambda details: unraisable.append(f"{details.exc_value!r} in {details.object!r}")
    before = _descriptors()
    try:
        result = play()
    finally:
        seam.armed = False
        sys.unraisablehook = sys.__unraisablehook__
    give_back(all_of_it=True)
    if not _settled(before):
        raise Broken(f"left open: {set(_descriptors()) - set(before)}")
    if unraisable:
        raise Broken(f"raised where nobody can be told: {unraisable}")
    return result


def faults_of(call: str) -> tuple[Fault, ...]:
    """What may happen at *call*."""
    if call in _NEVER_FAIL:
        return ()
    faults: tuple[Fault, ...] = (*ANYWHERE, *AND_ON)
    if call in ("send", "sendmsg"):
        faults += SENDING
    if call in ("recv_into", "recvmsg_into"):
        # Descriptors for which there is no room are cut off, which is SHORT; never is that an error.
        full = (errno.EMFILE, errno.ENFILE, "EMFILE, on", "ENFILE, on")
        faults = (*(fault for fault in faults if fault not in full), errno.ECONNRESET)
    return (*faults, SHORT) if call in _CAN_BE_SHORT else faults


def occurrences(count: int, few: bool) -> list[int]:
    """The first eight, the last, and some between; *few*: the first three, and the last."""
    if few:
        return sorted({*range(1, min(count, 3) + 1), count})
    return sorted({*range(1, min(count, 8) + 1), count, *range(8, count, max(1, count // 6))})


def try_all(name: str, few: bool, table: Counter[tuple[str, str, str]], broken: list[str]) -> None:
    """All faults of one scenario, or a *few*."""
    seam = Seam()
    last = LAST_SCENARIOS.get(name)
    with seam.installed():
        calls = _calls_of(seam, name)
        for call, count in sorted(calls.items()):
            for occurrence in occurrences(count, few):
                for fault in faults_of(call) if last is None else LAST:
                    if fault in AND_ON and (occurrence > 3 or name == "listening"):  # nobody there tries again
                        continue
                    seam.aim(call, occurrence, fault)
                    word = errno.errorcode[fault] if isinstance(fault, int) else fault
                    faulthandler.dump_traceback_later(60, exit=True)
                    try:
                        if last is None:
                            outcome = run(seam, SCENARIOS[name])
                        else:
                            doomed = checked(seam, lambda: last(seam))
                            seam.fired = doomed.exitcode == -signal.SIGKILL or not doomed.calls
                            outcome = "told to the others"
                    except BaseException as error:  # noqa: BLE001  # all of them are told at the end
                        outcome, seam.fired = "BROKEN", True
                        broken.append(f"{name}: {call} #{occurrence} {word}: {type(error).__name__}: {error}")
                        del error
                        gc.collect()
                        give_back(all_of_it=True)
                    if seam.fired:
                        table[call, word, outcome] += 1
        faulthandler.cancel_dump_traceback_later()


def _calls_of(seam: Seam, name: str) -> Counter[str]:
    """How often a scenario makes each call."""
    last = LAST_SCENARIOS.get(name)
    if last is not None:
        with suppress(Broken):
            checked(seam, lambda: last(seam))  # makes what is made once
        doomed: Doomed = checked(seam, lambda: last(seam))
        assert doomed.calls
        return doomed.calls
    with suppress(Broken):
        run(seam, SCENARIOS[name])
    seam.calls.clear()
    run(seam, SCENARIOS[name])
    return seam.calls.copy()


def show(table: Counter[tuple[str, str, str]]) -> None:
    outcomes = sorted({outcome for _, _, outcome in table})
    print(f"{'call':22}{'fault':14}" + "".join(f"{outcome:>20}" for outcome in outcomes))
    for call, word in sorted({(call, word) for call, word, _ in table}):
        counts = (table[call, word, outcome] for outcome in outcomes)
        print(f"{call:22}{word:14}" + "".join(f"{count or '':>20}" for count in counts))
    print(f"{sum(table.values())} faults injected")


def main(*names: str) -> int:
    table: Counter[tuple[str, str, str]] = Counter()
    broken: list[str] = []
    _clone.prepare()
    few = "--few" in names
    for name in [name for name in names if name != "--few"] or (*SCENARIOS, *LAST_SCENARIOS):
        try_all(name, few, table, broken)
    show(table)
    for each in broken:
        print("BROKEN", each)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
