"""The only room that knows the operating system: sockets, packets with descriptors, memory, limits, processes.

House rules: every descriptor has one owner, an object of this room that closes it when it is dropped; nobody else
holds bare descriptor numbers across lines. A descriptor that is between the kernel and its owner is guarded by
``crossing``, which a fork waits for: a child must never inherit one that nobody knows of. Importing this room works on
every system; the first channel asks ``require()``, which says what is missing.
"""

from __future__ import annotations

import _socket
import errno
import multiprocessing.connection
import multiprocessing.process
import os
import select
import signal
import socket
import stat
import struct
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, compress, repeat, tee
from operator import attrgetter, call, itemgetter, methodcaller
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    import fcntl
    import mmap
    import resource
else:
    # Not on every system; require() names what is missing before anything here is used.
    try:
        import fcntl
    except ImportError:
        fcntl = None
    try:
        import mmap
    except ImportError:
        mmap = None
    try:
        import resource
    except ImportError:
        resource = None

MAX_DESCRIPTORS: Final = 253  # SCM_MAX_FD: the kernel takes no more in one packet
# Plain integers: the socket module's flags are enum members, whose `|` alone takes 0.4 us.
NOW: Final = int(getattr(socket, "MSG_DONTWAIT", 0))
"""Receive flag: do not wait. (Never O_NONBLOCK: that bit is shared with every process that holds the socket.)"""
PEEK: Final = int(getattr(socket, "MSG_PEEK", 0))
"""Receive flag: leave the packet where it is."""
SEND_NOW: Final = NOW | int(getattr(socket, "MSG_NOSIGNAL", 0))
_CLOEXEC: Final = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))
_CUT: Final = int(getattr(socket, "MSG_CTRUNC", 0))

_INTEGERS: Final = struct.Struct("i")
_RIGHTS_ROOM = 4 * 256 + 512  # room for the control data of one packet, even if its sender has others come along
_BRINGING: Final = frozenset({(socket.SOL_SOCKET, 1), (socket.SOL_SOCKET, 4)})  # descriptors: SCM_RIGHTS, SCM_PIDFD
_SIOCOUTQ, _SIOCINQ = 0x5411, 0x541B  # <linux/sockios.h>
_MFD_NOEXEC_SEAL = 0x0008  # Linux 6.3; without it newer kernels complain in their log, or refuse (vm.memfd_noexec=2)
_MADV_REMOVE = 9

crossing = threading.RLock()
"""Held while a descriptor is in nobody's hands. Taken last, held for system calls that do not wait."""

in_crossing: Final[Callable[[], bool]] = crossing._is_owned  # type: ignore[attr-defined]
"""Whether this thread holds it: then a finaliser of the user's runs, in a garbage collection that came just there. It
must not wait for a lock, whose holder may be waiting for this thread."""


def elsewhere(fn: Callable[[], object]) -> None:
    """Run *fn* in a thread of its own, for what must not wait here."""
    try:
        threading.Thread(target=fn, name="mpchannel close").start()
    except RuntimeError:
        pass  # the interpreter ends (or there is no thread to be had): all closes with the process, as after a kill


def missing() -> list[str]:
    """What this system lacks for channels, in words; an empty list where they work."""
    wanted = {
        "the fcntl module": fcntl is not None,
        "the mmap module": mmap is not None,
        "the resource module": resource is not None,
        "AF_UNIX sockets": hasattr(socket, "AF_UNIX"),
        "SOCK_SEQPACKET": hasattr(socket, "SOCK_SEQPACKET"),
        "descriptor passing (SCM_RIGHTS, MSG_CMSG_CLOEXEC)": hasattr(socket, "SCM_RIGHTS")
        and hasattr(socket, "MSG_CMSG_CLOEXEC"),
        "os.memfd_create": hasattr(os, "memfd_create"),
        "os.eventfd": hasattr(os, "eventfd"),
        "select.epoll": hasattr(select, "epoll"),
        "file seals (fcntl.F_ADD_SEALS)": hasattr(fcntl, "F_ADD_SEALS"),
        "os.preadv/os.pwritev": hasattr(os, "pwritev") and hasattr(os, "preadv"),
    }
    return [name for name, there in wanted.items() if not there]


def require() -> None:
    """Raise ``NotImplementedError`` naming what is missing, if channels cannot work on this system."""
    if _lacking:
        raise NotImplementedError(
            f"mpchannel channels need Linux kernel features that {sys.platform} lacks here: {', '.join(_lacking)}"
        )


_lacking: Final = missing()


def explain(error: OSError, doing: str) -> OSError:
    """The same error with the limit that was hit, and the present count, in its text. Raises one that is none of the
    system's (a signal handler's ``TimeoutError``) as it is.
    """
    if error.errno is None:
        try:
            raise error
        finally:
            del error  # a frame that holds what it raises is a cycle
    if error.errno == errno.EMFILE:
        soft = descriptor_limit()
        text = (
            f"cannot {doing}: this process has {_count_descriptors(soft)} descriptors open and may have {soft} "
            "(RLIMIT_NOFILE, `ulimit -n`); close some or raise the limit"
        )
    elif error.errno == errno.ENFILE:
        text = f"cannot {doing}: the system's table of open files is full (fs.file-max)"
    elif error.errno == errno.ETOOMANYREFS:
        soft = descriptor_limit()
        text = (
            f"cannot {doing}: this user has more than {soft} descriptors in flight, sent and not yet received "
            "(RLIMIT_NOFILE bounds these too); let receivers catch up or raise the limit"
        )
    elif error.errno == errno.EAGAIN:
        text = f"cannot {doing}: the other side has not read for so long that not even control packets fit any more"
    else:
        text = f"cannot {doing}: {os.strerror(error.errno or 0)}"
    explained = OSError(error.errno, text)
    explained.__cause__ = error
    return explained


def descriptor_limit() -> int:
    """How many descriptors this process may have."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _count_descriptors(limit: int) -> int:
    # Counted by asking for each: listing /proc/self/fd would itself need a descriptor.
    count = 0
    for number in range(min(limit, 1 << 16)):
        try:
            fcntl.fcntl(number, fcntl.F_GETFD)
        except OSError:
            continue
        count += 1
    return count


# Sockets


class Socket(socket.SocketType):
    """One end of a socket pair. Closed when its last reference goes, never by hand (but in a forked child).

    So a thread that is inside a call on it (a bound method on its stack) keeps the descriptor's number from being
    given to something else, without a counter.
    """

    __slots__ = ("__weakref__",)

    # A finaliser without a line of Python (see _Owner): what this gives is called, and it is the C method.
    __del__ = property(attrgetter("close"))


class _Entry(NamedTuple):
    sock: weakref.ref[Socket]
    identity: tuple[int, int]


# By descriptor number, from when it is made until the number is another's; so whoever closes one, be it a garbage
# collection that is under way in another thread, has nothing to tell, and at no moment of a fork is it forgotten.
_sockets: dict[int, _Entry] = {}


def close_inherited(kept: set[Socket], memory: set[Memory]) -> None:
    """In a forked child: close what nobody here would. (It is held by frames of threads that are not here.)"""
    for key, (owner, unowned) in list(loose.items()):
        each = owner()
        if each in memory:
            continue
        if each is not None:
            each.close()
        else:
            deque(map(os.close, unowned), 0)
        del loose[key]
    numbers = {sock.fileno() for sock in kept}
    for number, (reference, identity) in list(_sockets.items()):
        if number in numbers:
            continue
        del _sockets[number]
        sock = reference()
        if sock is not None and sock.fileno() == number:
            sock.close()
        elif _identity(number) == identity:
            os.close(number)  # another thread of the parent was just collecting or closing it


def _identity(number: int) -> tuple[int, int]:
    """Of the file that a descriptor stands for."""
    try:
        status = os.fstat(number)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        return -1, -1
    return status.st_dev, status.st_ino


def _kind() -> tuple[int, int, int]:
    return socket.AF_UNIX, socket.SOCK_SEQPACKET, 0


def _own(number: int) -> Socket:
    return _owned(Socket(*_kind(), number))


def _owned(sock: Socket, identity: tuple[int, int] | None = None) -> Socket:
    if sock.gettimeout() is not None:  # socket.setdefaulttimeout() was called; it would set O_NONBLOCK
        sock.settimeout(None)
    number = sock.fileno()
    _sockets[number] = _Entry(weakref.ref(sock), identity or _identity(number))
    return sock


def socket_pair() -> tuple[Socket, Socket]:
    """A connected pair that keeps packets whole, close-on-exec."""
    try:
        with crossing:
            pair = _socket.socketpair(*_kind())
            made: list[Socket] = []
            made.extend(map(Socket, *map(repeat, _kind()), map(socket.SocketType.detach, pair)))  # in one call
            return _owned(made[0]), _owned(made[1])
    except OSError as error:
        raise explain(error, "create a channel") from error


def adopt_socket(number: int) -> Socket:
    """Own a descriptor that another process passed to this one at its start."""
    os.set_inheritable(number, False)  # a spawned child gets it inheritable
    return _own(number)


def is_packet_socket(number: int) -> bool:
    """Whether a descriptor is a socket of the kind that is made here."""
    try:
        blocking = os.get_blocking(number)
        sock = socket.socket(fileno=number)
    except OSError:
        return False
    kind = sock.family, sock.type, sock.proto
    sock.detach()
    if blocking:  # with a socket.setdefaulttimeout() it is not any more
        os.set_blocking(number, True)
    return kind == _kind()


def renew(sock: Socket) -> Socket:
    """The same descriptor in a new owner; *sock* is left without. (Frames of threads that a fork left behind may hold
    references to it for ever.)
    """
    return _own(sock.detach())


class _Owner:
    """Owns descriptors, by number, and closes them at the latest when it is dropped.

    An exception of a signal handler may come up in the first line of a ``__del__`` too, and then nothing of it is done.
    So this one has no line of Python: it is a call into C, which no handler interrupts. What is done with the numbers
    here takes one call as well, or none.
    """

    __slots__ = ("__del__", "__weakref__", "_numbers")

    __del__: Callable[[], object]

    def __init__(self) -> None:
        self._numbers: list[int] = []
        # (Ranges of one: what somebody else has closed is no error here, where nobody can be told.)
        closes = map(partial, repeat(os.closerange), self._numbers, map((1).__add__, self._numbers))
        forgets = partial(loose.pop, id(self), None)
        self.__del__ = partial(deque, map(call, chain((crossing.acquire,), closes, (forgets, crossing.release))), 0)  # type: ignore[arg-type]
        loose[id(self)] = weakref.ref(self), self._numbers

    def close(self) -> None:
        with crossing:
            deque(map(os.close, map(list.pop, repeat(self._numbers, len(self._numbers)))), 0)


loose: dict[int, tuple[weakref.ref[_Owner], list[int]]] = {}
"""What holds descriptors beside the sockets, by ``id()``, and its descriptors."""


class Descriptors(_Owner):
    """Descriptors that came with a packet and that nobody has claimed yet; closes what is left.

    Those of an envelope are taken out when ``complete`` is called, which needs room for all of them.
    """

    __slots__ = ("_awaited", "_claimed", "_envelope", "made", "spent")

    def __init__(self) -> None:
        super().__init__()
        self._claimed: list[Socket] = []  # made, and not yet given to who claimed them
        self._envelope: Socket | None = None
        self._awaited = 0
        self.spent = False  # somebody began to make things of them
        self.made: list[Any] = []  # all of these, where the message then found no memory: for the next try

    def __len__(self) -> int:
        return len(self._numbers)

    def _pop(self, count: int = 1) -> Iterator[int]:
        """Lazily: the next *count* of them leave for whoever iterates, who owns them then."""
        return map(list.pop, repeat(self._numbers, count), repeat(0))

    def claim_socket(self) -> Socket:
        """The next one, as an end of a socket pair. Raises ``OSError`` if it is none."""
        status = os.fstat(self._numbers[0])
        if not stat.S_ISSOCK(status.st_mode):
            raise OSError(errno.ENOTSOCK, "a descriptor that came with a message is no socket")
        with crossing:
            self._claimed.extend(map(Socket, *map(repeat, _kind()), self._pop()))
            sock = _owned(self._claimed.pop(), (status.st_dev, status.st_ino))
        if sock.getpeername():  # raises if it is not connected
            raise OSError(errno.ENOTSOCK, "a socket that came with a message has a name")
        return sock

    def claim_pipe(self) -> Pipe:
        """The next one, as the reading end of a pipe. Raises ``IndexError`` if there is none."""
        return Pipe(self._pop())

    def claim_memory(self) -> Memory:
        """The next one, as memory. Raises ``IndexError`` if there is none."""
        return Memory(self._pop())

    def take(self, count: int) -> Descriptors:
        """The next *count* of them, in an owner of their own."""
        if count > len(self._numbers):
            raise ValueError(f"{count} descriptors were announced and {len(self._numbers)} came")
        self.spent = True
        if count == len(self._numbers):
            return self  # making another one takes longer than all else here
        some = Descriptors()
        some._numbers.extend(self._pop(count))
        return some

    def expect_envelope(self, count: int) -> None:
        """The next one is an envelope with *count* descriptors."""
        self._envelope, self._awaited = self.claim_socket(), count

    def complete(self) -> None:
        """Take what is in the envelope. Raises ``OSError(EMFILE)`` if there is no room, and can be called again."""
        envelope, mark = self._envelope, bytearray(1)
        while envelope is not None and len(self._numbers) < self._awaited:
            try:
                size, some = receive_with(envelope, mark, NOW | PEEK)
            except BlockingIOError:
                if not _readable(envelope):
                    raise ValueError("an envelope holds fewer descriptors than announced") from None
                raise
            if not size or not some._numbers:
                raise ValueError("an envelope holds fewer descriptors than announced")
            envelope.recv_into(mark, 1, NOW)
            self._numbers.extend(some._pop(len(some)))
        self._envelope = None

    def sockets(self) -> Iterator[Socket]:
        """Claim all, without waiting for room: give the sockets, and end what is memory."""
        if self._envelope is not None:
            yield self._envelope
        while self._numbers:
            if stat.S_ISSOCK(os.fstat(self._numbers[0]).st_mode):
                try:
                    yield self.claim_socket()
                except OSError as error:
                    if error.errno not in (errno.ENOTCONN, errno.ENOTSOCK):
                        raise
            else:
                try:
                    self.claim_memory().seal(SEAL_GROW)  # whoever still writes there must learn that nobody reads
                except OSError as error:
                    # No memory at all, not even a file, or sealed for good.
                    if error.errno not in (errno.EINVAL, errno.EBADF, errno.EPERM):
                        raise

    def receive(self, sock: Socket, buffer: bytearray, flags: int) -> tuple[int, int]:
        """Receive a packet into *buffer*, and what comes with it here: (bytes, flags)."""
        given, kept = tee(map(sock.recvmsg_into, ((buffer,),), (_RIGHTS_ROOM,), (flags,)))
        self._numbers.extend(_rights(given))
        size, _, got, _ = next(kept)
        return size, got

    def close(self) -> None:
        super().close()
        self._envelope = None


def _rights(received: Iterator[tuple[int, list[tuple[int, int, bytes]], int, Any]]) -> Iterator[int]:
    """Lazily: the descriptors in what recvmsg gave. (There is no other control data, unless somebody passed us a socket
    with options: SO_PASSCRED has user ids come along, which are no descriptors to close.)
    """
    controls, kinds = tee(chain.from_iterable(map(itemgetter(1), received)))
    bringing = compress(map(itemgetter(2), controls), map(_BRINGING.__contains__, map(itemgetter(0, 1), kinds)))
    return chain.from_iterable(chain.from_iterable(map(_INTEGERS.iter_unpack, bringing)))


def send_with(sock: Socket, parts: Sequence[Any], numbers: Sequence[int], sent: list[int] | None = None) -> None:
    """Send one packet of *parts* with descriptors, without waiting.

    *sent* is filled by the very call that sends, so that whoever is interrupted right after it still knows.
    """
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(numbers)}i", *numbers))] if numbers else []
    if len(parts) > 512:  # the kernel takes 1,024 pieces (IOV_MAX)
        parts = [b"".join(parts)]
    if sent is None:
        sock.sendmsg(parts, control, SEND_NOW)
    else:
        sent.extend(map(sock.sendmsg, (parts,), (control,), (SEND_NOW,)))


def receive_with(sock: Socket, buffer: bytearray, flags: int) -> tuple[int, Descriptors]:
    """Receive one packet with its descriptors: (bytes, descriptors). Raises ``OSError(EMFILE)`` if there is no room
    for them in this process; with ``PEEK`` among the flags nothing is lost by that.

    That the other end closed with packets of ours unread is told once (ECONNRESET), and at any moment; what it had
    sent before is still in the queue, so that is passed over.
    """
    with crossing:
        descriptors = Descriptors()
        try:
            size, got = descriptors.receive(sock, buffer, flags | _CLOEXEC)
        except ConnectionResetError:
            size, got = descriptors.receive(sock, buffer, flags | _CLOEXEC)
    if got & _CUT:
        descriptors.close()
        raise explain(OSError(errno.EMFILE, ""), "receive the descriptors that came with a message")
    return size, descriptors


def taking_off(sock: Socket) -> Iterator[int]:
    """Once iterated: takes one packet off, whatever it is, in one call that no signal handler comes in the midst of."""
    return map(sock.recv_into, (bytearray(8),), (0,), (NOW,))


def take_off(sock: Socket) -> None:
    """Take off one packet that was seen to be there, whatever it is. (For a reset see ``receive_with``.)"""
    try:
        deque(taking_off(sock), 0)
    except ConnectionResetError:
        deque(taking_off(sock), 0)


def enclose(numbers: Sequence[int]) -> Socket:
    """Queue any number of descriptors in a fresh socket pair; its read end stands for them all."""
    near, far = socket_pair()
    for start in range(0, len(numbers), MAX_DESCRIPTORS):
        send_with(near, (b"+",), numbers[start : start + MAX_DESCRIPTORS])
    return far


def queued(sock: Socket) -> int:
    """Bytes of kernel memory held by packets that were sent on *sock* and not yet received (0: all were)."""
    return int.from_bytes(fcntl.ioctl(sock.fileno(), _SIOCOUTQ, b"\0\0\0\0"), sys.byteorder)


def unread(sock: Socket) -> int:
    """Bytes of the packets that can be received from *sock*."""
    return int.from_bytes(fcntl.ioctl(sock.fileno(), _SIOCINQ, b"\0\0\0\0"), sys.byteorder)


# Room for a few packets that must get through a full socket; and back to what sockets have from the start, so that no
# interrupted step can make more room the usual. (The kernel gives what net.core.wmem_max allows, and doubles what it is
# told.) Both are one call into C: in ``try: widen(sock) ... finally: narrow(sock)`` no signal handler comes in between.
def _usual_room() -> int:
    with socket.socket(*_kind()) as fresh:
        return fresh.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2


widen: Final = methodcaller("setsockopt", socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 23)
narrow: Final = methodcaller("setsockopt", socket.SOL_SOCKET, socket.SO_SNDBUF, 0 if _lacking else _usual_room())


def set_receive_timeout(sock: Socket, seconds: float) -> None:
    """Let receive calls that wait give up after *seconds*."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6)))


def owner_of(sock: Socket) -> int:
    """A process id that ``set_owner`` noted, in whatever process (0: none, or it has ended)."""
    return fcntl.fcntl(sock, fcntl.F_GETOWN)


def set_owner(sock: Socket, pid: int) -> None:
    """Note a process id with the open socket, for all who hold copies of it. (It would get SIGIO, were that on.)"""
    fcntl.fcntl(sock, fcntl.F_SETOWN, pid)


_MARK: Final = int(signal.SIGURG)


def mark(sock: Socket, on: bool) -> None:
    """Note with the open socket, for all who hold copies of it, that it is on its way into a process being started.

    (As the signal it would send, ``F_SETSIG``, were asynchronous notification on: one of few words that it has room
    for.)
    """
    fcntl.fcntl(sock, fcntl.F_SETSIG, _MARK if on else 0)


def marked_sockets() -> Iterator[Socket]:
    """Those among this process's descriptors that are marked, and owned by nobody yet."""
    for name in os.listdir("/proc/self/fd"):
        number = int(name)
        if is_packet_socket(number) and fcntl.fcntl(number, fcntl.F_GETSIG) == _MARK:
            yield adopt_socket(number)


def end_with(sock: Socket) -> None:
    """Become the leader of a process group, and have the kernel kill it all (SIGKILL) once *sock* has something, or its
    other end is gone.

    (Signal-driven I/O, fcntl(2): no thread waits, no timer runs, and code that never returns to the interpreter is hit
    too. A parent-death signal, prctl(2), would come when the *thread* that started this process ends.)
    """
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    fcntl.fcntl(sock, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(sock, fcntl.F_SETOWN, -os.getpid())
    fcntl.fcntl(sock, fcntl.F_SETFL, fcntl.fcntl(sock, fcntl.F_GETFL) | os.O_ASYNC)
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    if poller.poll(0):  # before the kernel was told
        os.killpg(0, signal.SIGKILL)


def shut(sock: Socket) -> None:
    """End the connection for both sides, whoever else holds copies. What is queued can still be read."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise


def _readable(sock: Socket) -> bool:
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(0))


def hung_up(sock: Socket) -> bool:
    """Whether the other end is gone."""
    poller = select.poll()
    poller.register(sock, 0)
    return bool(poller.poll(0))


def wait_writable(sock: Socket, milliseconds: int) -> bool:
    """Wait until a quarter of the room or less is taken, or the other end is gone. Whether that came in time."""
    poller = select.poll()
    poller.register(sock, select.POLLOUT)
    return bool(poller.poll(milliseconds))


def wait_readable(number: int | None, bell: Bell, seconds: float | None) -> None:
    """Wait until the socket with that *number* (if any) has something or *bell* rings. (The number alone, so that a
    wait, or the traceback of one, keeps nothing open. Whoever closes it rings.)
    """
    poller = select.poll()
    if number is not None:
        poller.register(number, select.POLLIN)
    poller.register(bell, select.POLLIN)
    poller.poll(None if seconds is None else min(max(0.0, seconds), 86_400) * 1000)  # the kernel's limit is 24 days


class _File(_Owner):
    """One descriptor."""

    __slots__ = ("_number",)

    def __init__(self, making: Iterator[int]) -> None:
        """*making* makes, or gives, the descriptor when it is iterated."""
        super().__init__()
        self._number = -1
        self._numbers.extend(making)
        self._number = self._numbers[0]

    def fileno(self) -> int:
        return self._number

    @property
    def open(self) -> bool:
        """``False`` too if it was finalised, with the garbage that something it belongs to is part of as well."""
        return self._number >= 0 and id(self) in loose

    def close(self) -> None:
        self._number = -1
        super().close()


class Bell(_File):
    """Wakes one waiting thread from any other, or from a signal handler (an eventfd)."""

    __slots__ = ()

    def __init__(self) -> None:
        try:
            with crossing:
                super().__init__(map(os.eventfd, (0,), (os.EFD_CLOEXEC | os.EFD_NONBLOCK,)))
        except OSError as error:
            raise explain(error, "wait for messages") from error

    def ring(self) -> None:
        os.eventfd_write(self._number, 1)

    def hush(self) -> None:
        """Forget past rings."""
        try:
            os.eventfd_read(self._number)
        except BlockingIOError:
            pass  # nobody rang


class Pipe(_Owner):
    """A pipe that never waits: its reading end, and maybe the writing one."""

    __slots__ = ()

    def __init__(self, making: Iterator[int]) -> None:
        super().__init__()
        self._numbers.extend(making)

    @classmethod
    def create(cls) -> Pipe:
        """Raises ``OSError``."""
        try:
            with crossing:
                return cls(chain.from_iterable(map(os.pipe2, (os.O_NONBLOCK | os.O_CLOEXEC,))))
        except OSError as error:
            raise explain(error, "open a pipe") from error

    def fileno(self) -> int:
        """Of the reading end."""
        return self._numbers[0]

    def put(self, data: bytes) -> None:
        """All of *data*, which has to fit."""
        os.write(self._numbers[1], data)

    def take(self, size: int) -> bytes:
        """At most *size* bytes; none if there are none. Of several processes that take, each byte goes to one."""
        try:
            return os.read(self._numbers[0], size)
        except BlockingIOError:
            return b""


class ProcessHandle(_File):
    """Readable once a process has ended (a pidfd). Raises ``ProcessLookupError`` if it was reaped already."""

    __slots__ = ()

    def __init__(self, pid: int) -> None:
        try:
            with crossing:
                super().__init__(map(os.pidfd_open, (pid,)))
        except ProcessLookupError:
            raise
        except OSError as error:
            raise explain(error, "watch a process") from error


# Memory

ONE_CALL_PIECES: Final = 512
ONE_CALL_BYTES: Final = 1 << 30
"""What is written by one call: the kernel takes 1,024 pieces (IOV_MAX), and less than 2 GiB."""


class Memory(_File):
    """A piece of anonymous memory with a descriptor (memfd): no name, not in /dev/shm, gone with its last holder."""

    __slots__ = ()

    @classmethod
    def create(cls, *, append: bool = False) -> Memory:
        """New and empty; it can grow until somebody seals it. *append*: written by ``append`` only.

        Raises ``OSError``.
        """
        global _memory_flags
        with crossing:
            try:
                try:
                    memory = cls(map(os.memfd_create, ("mpchannel",), (_memory_flags,)))
                except OSError as error:
                    if error.errno != errno.EINVAL or not _memory_flags & _MFD_NOEXEC_SEAL:
                        raise
                    _memory_flags &= ~_MFD_NOEXEC_SEAL
                    memory = cls(map(os.memfd_create, ("mpchannel",), (_memory_flags,)))
                if append:
                    fcntl.fcntl(memory, fcntl.F_SETFL, os.O_RDWR | os.O_APPEND)
                return memory
            except OSError as error:
                raise explain(error, "allocate memory for a message") from error

    @property
    def size(self) -> int:
        return os.fstat(self._number).st_size

    @property
    def inode(self) -> int:
        return os.fstat(self._number).st_ino

    @property
    def held(self) -> int:
        """Bytes of memory it really occupies."""
        return os.fstat(self._number).st_blocks * 512

    def allocate(self, size: int) -> None:
        """Give it *size* bytes of zeros, all of whose pages are there. Raises ``MemoryError``, ``OSError``."""
        available = _available_memory()
        if available is not None and size > available:  # the kernel would give it, and then end processes for it
            raise MemoryError(f"{size:,} bytes were asked for, and {available:,} are available")
        try:
            os.posix_fallocate(self._number, 0, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
                raise MemoryError(f"the system has no {size:,} bytes: {error.strerror}") from error
            raise explain(error, "allocate memory") from error

    def reopened(self, *, readonly: bool = False) -> Memory:
        """The same memory as another open file: with a position, and rights, of its own. Raises ``OSError``."""
        try:
            path = f"/proc/self/fd/{self._number}"
            with crossing:
                return Memory(map(os.open, (path,), ((os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC,)))
        except OSError as error:
            raise explain(error, "open memory once more") from error

    def expect_leases(self) -> None:
        """Before ``only_holder``: whoever opens it at the instant of a lease has the kernel send a signal here. Let it
        be one that does nothing (SIGIO ends a process).
        """
        fcntl.fcntl(self._number, fcntl.F_SETSIG, _MARK)

    @property
    def only_holder(self) -> bool:
        """Whether no other open file of it is left: in no process, mapping or packet.

        Only of what is ``reopened``, and one thread at a time. (The kernel grants a write lease to the last open file
        alone; since Linux 5.3 it counts them. What ``memfd_create`` opened does not count.)
        """
        try:
            fcntl.fcntl(self._number, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError:
            return False  # somebody has it; or there are no leases here, and nobody can know
        fcntl.fcntl(self._number, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return True

    def resize(self, size: int) -> None:
        """As many bytes, zeros, whose pages come when they are used."""
        os.ftruncate(self._number, size)

    def write(self, parts: Iterable[Any]) -> None:
        """Fill it with all *parts*. Raises ``OSError``."""
        at = 0
        for pieces in _in_portions(parts):
            while pieces:
                done = os.pwritev(self._number, pieces, at)
                at += done
                pieces = _rest(pieces, done)

    def append(self, parts: Sequence[Any], size: int, written: list[int] | None) -> None:
        """Write all *parts*, *size* bytes, at the end, wherever that is; one call, if it can be one. *written* is
        filled by the call that completes them.

        Raises ``OSError``: ``EPERM`` if it was sealed against growing, ``ENOSPC`` if there was no memory for all.
        """
        if len(parts) == 1 and written is None:
            self.append_whole(parts[0], size)
            return
        *portions, last = _in_portions(parts)
        for pieces in portions:
            if os.pwritev(self._number, pieces, 0) != sum(piece.nbytes for piece in pieces):
                raise OSError(errno.ENOSPC, "no memory for a whole message")
        completed = [] if written is None else written
        completed.extend(map(os.pwritev, (self._number,), (last,), (0,)))
        if completed[-1] != sum(piece.nbytes for piece in last):
            completed.clear()
            raise OSError(errno.ENOSPC, "no memory for a whole message")

    def append_whole(self, data: bytes, size: int) -> None:
        """``append`` for *size* bytes in one piece, in one call."""
        # (In append mode the kernel ignores the position, and pwrite leaves the file offset alone.)
        if os.pwrite(self._number, data, 0) != size:
            raise OSError(errno.ENOSPC, "no memory for a whole message")

    def read(self, size: int, at: int) -> bytearray:
        """*size* bytes from offset *at* (fewer at the end)."""
        data = bytearray(size)
        view = memoryview(data)
        done = 0
        while done < size:
            got = os.preadv(self._number, (view[done : done + (1 << 30)],), at + done)
            if not got:
                view.release()
                del data[done:]
                return data
            done += got
        return data

    def read_at(self, at: int, into: memoryview) -> None:
        """Fill *into* with what is at offset *at*, where there is enough."""
        while into.nbytes:
            done = os.preadv(self._number, (into,), at)
            at, into = at + done, into[done:]

    def write_at(self, at: int, data: bytes) -> None:
        os.pwrite(self._number, data, at)

    def map(self, size: int) -> mmap.mmap | bytearray:
        """The first *size* bytes as memory of this process, writable. Only safe once it cannot shrink.

        A copy of them, where a mapping needs a descriptor (up to Python 3.12) and there is none left. (Populated: one
        by one, the page faults would cost more than the whole.)
        """
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        if sys.version_info >= (3, 13):
            return mmap.mmap(self._number, size, flags, trackfd=False)
        try:
            return mmap.mmap(self._number, size, flags)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            return self.read(size, 0)

    @property
    def offset(self) -> int:
        """The file offset, which travels with the descriptor."""
        return os.lseek(self._number, 0, os.SEEK_CUR)

    @offset.setter
    def offset(self, position: int) -> None:
        os.lseek(self._number, position, os.SEEK_SET)

    def seal(self, seals: int) -> None:
        fcntl.fcntl(self._number, fcntl.F_ADD_SEALS, seals)

    def lock(self, on: bool) -> bool:
        """Lock it against other processes, and their threads only; without waiting: ``False`` if another has."""
        try:
            fcntl.lockf(self._number, fcntl.LOCK_EX | fcntl.LOCK_NB if on else fcntl.LOCK_UN)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            return False
        return True

    def sealed(self, seals: int) -> bool:
        """Whether all of *seals* are set (never on what is no memory at all)."""
        try:
            return fcntl.fcntl(self._number, fcntl.F_GET_SEALS) & seals == seals
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False

    def refuses(self, *seals: int) -> bool:
        """Whether it is read-only for whoever has this descriptor, or has one of *seals*."""
        readonly = fcntl.fcntl(self._number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        return readonly or any(map(self.sealed, seals))

    def discard(self, start: int, end: int) -> None:
        """Give the pages between two offsets (multiples of the page size) back to the system."""
        try:
            mapping = mmap.mmap(self._number, end - start, offset=start)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                return  # no descriptor to spare for mapping: the memory is given back with the file
            raise
        with mapping:
            mapping.madvise(_MADV_REMOVE)


def _available_memory() -> int | None:
    """Bytes that processes can still get; ``None`` where that is not known."""
    try:
        with open("/proc/meminfo", "rb") as file:
            lines = dict(line.split(b":") for line in file)
        return 1024 * sum(int(lines[name].split()[0]) for name in (b"MemAvailable", b"SwapFree"))
    except (OSError, KeyError, ValueError):
        return None


def _in_portions(parts: Iterable[Any]) -> list[list[memoryview]]:
    """*parts* as pieces for one call each: at most 1,024 of them (IOV_MAX), together less than 2 GiB."""
    portions: list[list[memoryview]] = [[]]
    room, limit = ONE_CALL_PIECES, ONE_CALL_BYTES
    total = 0
    for part in parts:
        view = memoryview(part).cast("B")
        for start in range(0, view.nbytes, limit):
            piece = view[start : start + limit]
            if total + piece.nbytes > limit or len(portions[-1]) == room:
                portions.append([])
                total = 0
            portions[-1].append(piece)
            total += piece.nbytes
    return portions


def _rest(pieces: list[memoryview], done: int) -> list[memoryview]:
    """What is left of *pieces* after *done* bytes."""
    while pieces and done >= pieces[0].nbytes:
        done -= pieces[0].nbytes
        pieces = pieces[1:]
    return [pieces[0][done:], *pieces[1:]] if pieces and done else pieces


def _first_memory_flags() -> int:
    if not hasattr(os, "memfd_create"):
        return 0
    return os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | _MFD_NOEXEC_SEAL


_memory_flags = _first_memory_flags()
SEAL_SHRINK: Final[int] = getattr(fcntl, "F_SEAL_SHRINK", 0)
SEAL_GROW: Final[int] = getattr(fcntl, "F_SEAL_GROW", 0)
SEAL_WRITING: Final[tuple[int, int]] = getattr(fcntl, "F_SEAL_WRITE", 0), 0x10  # F_SEAL_FUTURE_WRITE
SEAL_SEAL: Final[int] = getattr(fcntl, "F_SEAL_SEAL", 0)
PAGE: Final[int] = getattr(mmap, "PAGESIZE", 4096)


# Processes


def exit_code(pid: int, patience: float = 1.0) -> int | None:
    """The exit code of a child of this process (``-N`` for signal N), waiting at most *patience* seconds for its very
    end; ``None`` if it is no child of ours or lives on. Takes nothing from whoever joins the child later.
    """
    deadline = time.monotonic() + patience
    pause = 0.0005
    while True:
        process = next((each for each in _known_processes() if each.ident == pid), None)
        popen = getattr(process, "_popen", None)
        known: int | None = getattr(popen, "returncode", None)
        if known is not None:
            return known
        try:
            status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            # Not a direct child: started by the fork server, or joined by somebody else this very moment.
            if process is None:
                return None
            if multiprocessing.connection.wait([process.sentinel], max(0.0, deadline - time.monotonic())):
                return process.exitcode
            return None
        if status is not None:
            return status.si_status if status.si_code == os.CLD_EXITED else -status.si_status
        if time.monotonic() > deadline:
            return None
        time.sleep(pause)
        pause = min(0.02, pause * 2)


def _known_processes() -> list[multiprocessing.process.BaseProcess]:
    # Processes that somebody still refers to, joined or not. Ours only: a forked child inherits the whole set.
    known: Any = getattr(multiprocessing.process, "_dangling", ())
    me = os.getpid()
    return [each for each in list(known) if getattr(each, "_parent_pid", None) == me]
