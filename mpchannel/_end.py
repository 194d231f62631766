"""What every kind of end needs: posting packets, into an overflow file while the socket is full, and sleeping until
something comes.

House rules. A packet is queued whole or not at all. ``sending`` is re-entrant, because a signal handler may come at any
line and post as well. ``_send`` is replaced at release by a function that raises, so the path of small messages checks
no state.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from _thread import _count as other_threads
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final

from ._kernel import (
    MAX_DESCRIPTORS,
    PEEK,
    SEAL_SHRINK,
    SEND_NOW,
    Bell,
    Socket,
    enclose,
    explain,
    narrow,
    queued,
    send_with,
    set_receive_timeout,
    wait_readable,
    wait_writable,
    widen,
)
from ._overflow import Outbox
from ._recycle import fill, give_back
from ._slots import Slots
from ._wire import (
    ANNOUNCE,
    ANNOUNCEMENT,
    BODY_IN_MEMORY,
    CARRIER,
    CARRIER_HEAD,
    HEADS_UP_PACKET,
    IN_ENVELOPE,
    End,
    Parcel,
    record,
)

INLINE_MAX: Final = 160 * 1024
"""Largest packet sent through the socket itself (its usual limit is 212,960 bytes). Up to there a copy through the
socket costs a quarter of one through fresh memory: 11 against 74 us for 128 KiB."""
BUFFER: Final = INLINE_MAX + 64
SMALL: Final = 4096
"""Larger packets cost less in the socket than in the overflow file, which needs fresh pages. A flood of smaller ones is
quicker through the file: its reader needs one call for thousands. So nobody waits for room in the socket for these."""
SLOT_FROM: Final = 48 * 1024
"""Smallest packet that goes through a slot."""
_SLOT_TRIES: Final = 64
_SLOTS_AFTER: Final = 4  # such packets before there are slots
_ROOM_TRIES: Final = 20  # times to ask for room before opening an overflow file, which costs about 40 us
_ROOM_TRY: Final = 256  # bytes for each further try: a large packet takes him longer, and costs more in a file
_ROOM_PATIENCE: Final = 0.005  # seconds after which no further try is made
_ROOM_WAIT: Final = 1  # ms to wait for a receiver that was seen to take something
_BODY_PACKETS: Final = 2 * 768  # bytes that the socket counts for a body in memory of its own: two packets
_BODIES_MOST: Final = 16  # that may wait so, as the descriptors that a user has in flight are limited; then: overflow
_BODIES_FEW: Final = 2
_BODIES_CACHED: Final = 2 << 20  # bytes of bodies that are better queued than waited for
_BODY_PATIENCE: Final = 0.25e-3 / (1 << 20)  # seconds for each byte
_BODY_PATIENCE_MOST: Final = 0.025
_BODY_LOOK: Final = 0.002  # seconds in which a receiver that is at work takes something
_BODY_PAUSE: Final = 50e-6
_NO_ROOM: Final = (errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.EMSGSIZE)

GONE: Final = (BrokenPipeError, ConnectionResetError)

_BLOCK: Final = 0.004  # seconds a receive call may hold the lock; a transfer or another reader waits that long
SPIN: Final = 60e-6  # seconds a port that was quick last time is asked again and again before its thread sleeps:
QUICK: Final = 200e-6  # a sleeping thread on another core takes some 50 us to wake
SAME_CORE: Final = 8  # messages in a row that came as soon as this thread yielded: both share a core, and to ask again
OTHER_CORE: Final = 100  # is in vain (else a round trip takes 1.2 times as long); so many more if that was an error
SWITCH_LEAST, SWITCH_MOST = 3e-6, 60e-6  # seconds for the other's answer if it was none


class Buffer(bytearray):
    """Where a packet is received; it knows how much of it that packet is."""

    __slots__ = ("size",)

    size: int


spare_buffers: list[Buffer] = []
"""Whoever takes a bare pickle in a ``Buffer`` owns that until he puts it here again."""

READ_AHEAD: Final = 2
"""``slow`` of an end that is at an overflow file, with nothing else to see to. 1, or ``True``: take with care, there is
something that is no bare pickle in the socket. 0, or ``False``: there is none."""

Taken = Buffer | memoryview | Parcel | End
"""What ``take`` gives: a bare pickle (in a buffer of ours, or elsewhere), a parcel, the end."""


Hand = list[Any]
"""What a receiver has taken and not yet made a message of."""


class SocketEnd:
    """A socket to post on, and to wait on."""

    __slots__ = (
        "_bells",
        "_bodies",
        "_middling",
        "_outbox",
        "_owes",
        "_recv_into",
        "_send",
        "_slots",
        "_sock",
        "_timed",
        "_waiting",
        "_yielded",
        "hot",
        "peer_pid",
        "receiving",
        "sending",
        "slow",
    )

    _has_slots: ClassVar[bool] = False

    def __init__(self, sock: Socket, peer_pid: int | None = None) -> None:
        """The socket is set by who inherits from this, once all else is there."""
        self.peer_pid = peer_pid  # last process known to hold the other end
        self.receiving = threading.RLock()
        self.sending = threading.RLock()
        self._sock: Socket | None = None
        self._send: Callable[..., Any] = sock.send
        self._recv_into: Callable[..., int] = sock.recv_into
        self._outbox: Outbox | None = None
        self._owes = False  # a heads-up was sent whose packet is still to be sent
        self._bodies = 0  # bytes of bodies sent in memory since the queue was last seen empty
        self._slots: Slots | None = None
        self._middling = 0  # packets that could have gone through a slot, while there was none
        self._bells: list[Bell] = []
        self.slow = 0  # how to take: see READ_AHEAD. Whoever sets it says True
        self.hot = True  # the last message came quickly, or the first one may: a reply to what is just being sent
        self._yielded = 0  # messages in a row that came at the first yield
        self._timed = False
        self._waiting = False  # for room: still set at the next post, if a signal handler's exception ended that

    @property
    def open(self) -> bool:
        return self._sock is not None

    @property
    def number(self) -> int | None:
        """The descriptor to wait on; ``None`` if it tells nothing: the end is released, or something was put back."""
        sock = self._sock
        return None if sock is None or (self.slow and self.recovered) else sock.fileno()

    def fileno(self) -> int:
        sock = self._sock
        if sock is None:
            self._recv_into()  # raises, with the reason
            raise AssertionError("unreachable")
        return sock.fileno()

    def _socket(self) -> Socket:
        sock = self._sock
        if sock is None:
            self._recv_into()  # raises: closed, or detached
            raise AssertionError("unreachable")
        return sock

    # Posting

    def post(self, data: bytes) -> bool:
        """Queue one packet. ``False`` if the channel is closed. Raises ``OSError`` (limits), with nothing queued."""
        outbox = self._outbox
        if outbox is not None:
            try:
                if not other_threads():  # nobody to lock out, as in MessagePort.recv
                    appended = outbox.append_small(data)
                else:
                    with self.sending:
                        appended = outbox.append_small(data)
            except OSError as error:
                raise explain(error, f"post a message of {len(data)} bytes") from error
            if appended:
                return True
        elif len(data) < SLOT_FROM:
            # Without the lock, which would be a tenth of the whole cost.
            try:
                self._send(data, SEND_NOW)
            except GONE:
                return False
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
            else:
                if self._outbox is not None:
                    # Another thread began an overflow file meanwhile, and this packet may be queued behind it: so
                    # must be all that this thread posts from now on.
                    with self.sending:
                        self._leave_outbox()
                return True
        return self.post_parts((data,), len(data))

    def post_parts(
        self, parts: Sequence[Any], size: int, numbers: Sequence[int] = (), sent: list[int] | None = None
    ) -> bool:
        """``post`` for a packet in pieces, with the descriptors *numbers* (copies travel; the caller keeps his).

        *sent* is filled as soon as the packet is queued, even if a signal handler raises right then.
        """
        if size <= INLINE_MAX and not numbers and sent is None and self._post_at_once(parts, size):
            return True
        with self.sending:
            sock = self._sock
            if sock is None:
                return self._refuse_post()
            try:
                count, flags, envelope = len(numbers), 0, None
                if count >= MAX_DESCRIPTORS:
                    envelope = enclose(numbers)
                    numbers, flags = (envelope.fileno(),), IN_ENVELOPE
                outbox = self._outbox
                if outbox is not None:
                    if outbox.abandoned(sock):
                        self._outbox = None
                        return False
                    try:
                        if outbox.append(*record(parts, size, numbers, count, flags), sent):
                            return True
                    except OSError:
                        self._leave_outbox()  # it ended with a record that is not whole
                        raise
                    self._leave_outbox()
                if self._post_by_socket(sock, parts, size, numbers, count, flags, sent):
                    self._leave_outbox()  # one that a signal handler opened in between: this packet is behind it
                else:
                    self._open_outbox(sock, record(parts, size, numbers, count, flags), sent)
                return True
            except GONE:
                return False
            except OSError as error:
                with_them = f" and {count} descriptors" if count else ""
                raise explain(error, f"post a message of {size} bytes{with_them}") from error

    def _post_at_once(self, parts: Sequence[Any], size: int) -> bool:
        """As ``post`` does it, or through a slot: ``False`` if there is no room, or no end."""
        sock = self._sock
        if sock is None or self._outbox is not None:
            return False
        if size >= SLOT_FROM and self._has_slots and self._post_by_slot(sock, parts, size):
            return True
        try:
            sock.sendmsg(parts, (), SEND_NOW)
        except OSError as error:
            if error.errno not in _NO_ROOM and not isinstance(error, GONE):
                raise
            return False
        if self._outbox is not None:
            with self.sending:
                self._leave_outbox()
        return True

    def _post_by_slot(self, sock: Socket, parts: Sequence[Any], size: int) -> bool:
        """``False`` if that cannot be now."""
        with self.sending:
            slots = self._slots
            if slots is None:
                self._middling += 1
                if self._middling % _SLOTS_AFTER:
                    return False
                slots = self._slots = Slots.create()
            if slots is None:
                return False
            slot, tries = slots.claim(), 0
            while slot is None and tries < _SLOT_TRIES:  # the receiver is at work: it will be a few microseconds
                os.sched_yield()
                slot, tries = slots.claim(), tries + 1
            if slot is None:
                if not queued(sock):
                    self._slots = None  # lost: whoever took their packets was interrupted. There will be others
                return False
            if self._outbox is not None:
                slots.free(slot)
                return False
            sent: list[int] = []
            try:
                head = slots.fill(slot, parts, size)
                if slots.announced:
                    sent.extend(map(sock.send, (head,), (SEND_NOW,)))
                else:
                    self._send_described(sock, (head,), (slots.memory.fileno(),), sent)
            except OSError as error:
                if error.errno not in (*_NO_ROOM, errno.ETOOMANYREFS) and not isinstance(error, GONE):
                    raise
            finally:
                # Statements: an exception of a signal handler may come behind the call that sends, and none from here.
                if sent:
                    slots.announced = True
                else:
                    slots.free(slot)
            self._bodies += size if sent else 0
            if sent and self._outbox is not None:
                self._leave_outbox()  # one that a signal handler opened in between: this packet is behind it
            return bool(sent)

    def _refuse_post(self) -> bool:
        try:
            self._send()
        except GONE:
            pass
        return False

    def _post_by_socket(
        self,
        sock: Socket,
        parts: Sequence[Any],
        size: int,
        numbers: Sequence[int],
        count: int,
        flags: int,
        sent: list[int] | None,
    ) -> bool:
        """Send a packet through the socket, waiting for room for an instant. ``False`` if there is none."""
        memory = None
        # On a busy machine every yield takes milliseconds: no second wait after one that a signal handler ended, or
        # signals that come often would keep the thread here for ever.
        at_once, self._waiting = self._waiting or (size < SMALL and not numbers), False
        tries = 1 if at_once else _ROOM_TRIES + min(size, INLINE_MAX) // _ROOM_TRY
        until = time.perf_counter() + _ROOM_PATIENCE
        for _ in range(tries):
            try:
                if size > INLINE_MAX and memory is None:
                    if not self._room_for_body(sock, size, wait=tries > 1):
                        return False
                    memory = fill(parts, size)
                    parts, numbers, flags = (), (memory.fileno(), *numbers), flags | BODY_IN_MEMORY
                if numbers:
                    self._send_described(sock, (CARRIER_HEAD.pack(CARRIER, flags, count, size), *parts), numbers, sent)
                    self._bodies += size if memory is not None else 0
                    return True
                send_with(sock, parts, (), sent)
                return True
            except OSError as error:
                if error.errno == errno.ETOOMANYREFS and not count:
                    return False  # plain data must not use up the user's descriptors in flight
                if error.errno not in _NO_ROOM:
                    raise
            if at_once:
                return False
            self._waiting = True
            waiting = queued(sock)
            os.sched_yield()
            # If the receiver is at work, room comes soon, and asking for it all the while would slow him down.
            in_vain = queued(sock) < waiting and not wait_writable(sock, _ROOM_WAIT)
            self._waiting = False
            if in_vain or time.perf_counter() > until:
                return False
        return False

    def _room_for_body(self, sock: Socket, size: int, *, wait: bool) -> bool:
        """Whether one more body may be queued in memory of its own.

        Waits for the receiver, if that is at work, no longer than the body would take in fresh memory: what he gives
        back has its pages, and those of the last few bodies are still in a cache.
        """
        few = _BODY_PACKETS * min(_BODIES_MOST, max(_BODIES_FEW, _BODIES_CACHED // size))
        waiting = queued(sock)
        if waiting >= few and wait:
            now = time.perf_counter()
            until, look = now + min(_BODY_PATIENCE * size, _BODY_PATIENCE_MOST), now + _BODY_LOOK
            self._waiting = True
            while waiting >= few and now < until and now < look:
                time.sleep(_BODY_PAUSE)
                now, before, waiting = time.perf_counter(), waiting, queued(sock)
                if waiting < before:
                    look = now + _BODY_LOOK
            self._waiting = False
        return waiting < _BODY_PACKETS * _BODIES_MOST

    def _send_described(
        self, sock: Socket, parts: Sequence[Any], numbers: Sequence[int], sent: list[int] | None
    ) -> None:
        if not self._owes:
            sock.send(HEADS_UP_PACKET, SEND_NOW)
        # Interrupted here, one heads-up too many costs the reader a look; one too few would cost descriptors.
        self._owes = False
        try:
            send_with(sock, parts, numbers, sent)
        except OSError:
            self._owes = True
            raise

    def _open_outbox(
        self, sock: Socket, first: tuple[Sequence[Any], int, Sequence[int]], sent: list[int] | None
    ) -> None:
        """The socket is full: begin an overflow file with the record *first*."""
        outbox = Outbox(with_lane=bool(first[2]))
        if not outbox.append(*first, None):
            raise OSError(errno.ENOBUFS, "a new overflow file takes nothing")
        outbox.memory.seal(SEAL_SHRINK)
        numbers = [outbox.memory.fileno()]
        if outbox.far_lane is not None:
            numbers.append(outbox.far_lane.fileno())
        # Set before it is announced: who posts without the lock, and behind the announcement, must see it.
        self._outbox = outbox
        announced: list[int] = [] if sent is None else sent
        try:
            widen(sock)
            self._send_described(sock, (ANNOUNCEMENT.pack(ANNOUNCE, outbox.memory.inode),), numbers, announced)
        finally:  # the call comes last, as a signal handler's exception may come behind it
            outbox.far_lane = None
            if not announced:
                self._outbox = None
            narrow(sock)

    def _leave_outbox(self) -> None:
        """What is posted from now on goes through the socket, behind the overflow file."""
        outbox, self._outbox = self._outbox, None
        if outbox is not None:
            outbox.seal()

    @property
    def buffered(self) -> int:
        """Bytes of memory held by what was posted and not yet taken; 0 if and only if all was taken."""
        sock, outbox = self._sock, self._outbox
        waiting = 0 if sock is None else queued(sock)
        if not waiting:
            self._bodies = 0
            return 0
        if outbox is not None and not outbox.sealed:
            waiting += outbox.memory.held
        return waiting + self._bodies

    # Taking and sleeping

    def take(self, hand: Hand) -> Taken | None:
        """The next packet or the end; ``None`` if nothing is there. What was taken is in *hand*, an empty list.

        The caller holds ``receiving`` (or is in the only thread there is).
        """
        raise NotImplementedError

    def next(self, hand: Hand, timeout: float | None = None, tried: bool = False) -> Taken:
        """Take the next packet, or the end, waiting for it. Raises ``TimeoutError``. *tried*: nothing was there yet.

        A port that was quick last time is asked again for some 60 us before its thread sleeps, unless the other end's
        thread seems to need this very core; then the socket itself waits for some milliseconds, which wakes sooner than
        ``poll``; only then comes that, which a transfer can wake.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        brief = timeout is not None and timeout < 2 * _BLOCK
        while True:
            with self.receiving:
                taken = self.take(hand) if brief else self._take_soon(hand, tried)
            if taken is not None:
                return taken
            if not self.wait(deadline):
                raise TimeoutError(f"no message came in {timeout} s")

    def _take_soon(self, hand: Hand, tried: bool) -> Taken | None:
        if self.hot:
            until, yields = time.perf_counter() + SPIN, 0
            while time.perf_counter() < until:
                if tried:
                    os.sched_yield()
                    yields += 1
                taken = self.take(hand)
                if taken is not None:
                    self._yielded = self._yielded + 1 if yields == 1 else min(self._yielded, 0)
                    self.hot = self._yielded < SAME_CORE
                    return taken
                tried = True
        if self.slow:
            return self.take(hand)
        sock = self._socket()
        if not self._timed:
            set_receive_timeout(sock, _BLOCK)
            self._timed = True
        self.hot = False
        began = time.perf_counter()
        try:
            # Waits here, without taking: a signal handler that receives as well is called in the midst of it.
            sock.recv_into(bytearray(1), 1, PEEK)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            pass  # see take
        taken = self.take(hand)
        took = time.perf_counter() - began
        if self._yielded < SAME_CORE:
            self.hot = taken is not None and took < QUICK
        elif not SWITCH_LEAST < took < SWITCH_MOST:
            self.hot, self._yielded = taken is not None and took < QUICK, -OTHER_CORE
        return taken

    def wait(self, deadline: float | None, *, asleep_while: Callable[[], bool] | None = None) -> bool:
        """Sleep until the socket has something, or somebody rings. No lock is held. ``False``, at once, if *deadline*
        (on the monotonic clock) has passed.

        *asleep_while*: do not look at the socket, only wait for a ring, unless this is false once the bell hangs.
        """
        seconds = None
        if deadline is not None:
            seconds = deadline - time.monotonic()
            if seconds <= 0:
                return False
        due = give_back()
        if due is not None:
            seconds = due if seconds is None else min(seconds, due)
        try:
            bell = Bell()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            # No descriptor left for a bell: look again every now and then.
            time.sleep(min(_BLOCK, _BLOCK if seconds is None else seconds))
            return True
        self.hang(bell)
        try:
            sock = self._sock
            number = -1 if sock is None else sock.fileno()
            sock = None
            if number < 0 or self.recovered:
                return True
            if asleep_while is not None:
                if asleep_while():
                    wait_readable(None, bell, seconds)
            else:
                blind = self._blind_for()
                if blind is None:
                    wait_readable(number, bell, seconds)
                else:
                    wait_readable(None, bell, blind if seconds is None else min(seconds, blind))
        finally:
            self.take_down(bell)
        return True

    def hang(self, bell: Bell) -> None:
        """Have *bell* rung when this link is closed, moved away or given back, or something was put back."""
        self._bells.append(bell)

    def take_down(self, bell: Bell) -> None:
        if bell in self._bells:
            self._bells.remove(bell)

    def ring(self) -> None:
        """Wake every thread that sleeps in ``wait``."""
        for bell in tuple(self._bells):
            bell.ring()

    @property
    def recovered(self) -> bool:
        """Whether something is there that no readable socket tells of."""
        return False

    def _blind_for(self) -> float | None:
        """Seconds to sleep without looking at the socket, which is readable although nothing can be taken yet."""
        return None
