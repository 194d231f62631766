"""A link: what a port needs from its transport, and the local one. One socket of a pair, in every state.

House rules. Locks: ``receiving`` before ``sending``, several links in the order of ``id()``; never held while user
code runs. The two are re-entrant, because a signal handler may come at any line and use the very port it interrupted.
Release replaces ``_send`` and ``_recv_into`` by functions that raise, so the paths of messages check no state. Forget
first, close later: a socket closes when its last user lets go of it.

Where this leaves the plain design of one packet a message: packets with descriptors are announced by HEADS_UP, which
costs a handover three calls (3 us) and saves every small message the room for descriptors (0.5 of 2.8 us), and a
process at its descriptor limit loses nothing.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NoReturn, Protocol, final

from ._end import BUFFER, READ_AHEAD, SMALL, Buffer, Hand, SocketEnd, Taken, spare_buffers
from ._kernel import (
    NOW,
    PEEK,
    SEAL_SEAL,
    Descriptors,
    Memory,
    Socket,
    hung_up,
    receive_with,
    renew,
    require,
    shut,
    socket_pair,
    taking_off,
)
from ._overflow import Inbox, Refused, refuse_wrong
from ._plain import KINDS, Plain, check
from ._slots import HEAD, SLOT, Slab
from ._wire import (
    ANNOUNCE,
    CARRIER,
    CARRIER_HEAD,
    CLOSE,
    CODEC,
    HANDOFF,
    HEADS_UP,
    HELD,
    OWES,
    PICKLE,
    PLAIN,
    PROCESS,
    REASONS,
    SLOTS,
    End,
    Parcel,
    bounce,
    farewell,
    unread,
    unwrap,
)
from .errors import DataCloneError, PortClosedError

_LOAN_LOOK: Final = 0.02  # seconds between two looks whether the start of a process that a link is lent to has failed
_NOTES: Final = 1000  # packets without a message that are taken in a row
_GARBAGE: Final = 0xFF  # the kind of a packet that will not load
_DATA: Final = (0x10, 0x11, 0x12, 0x13, _GARBAGE)  # kinds of what ``_clone`` and ``_plain`` make, beside PICKLE
INTERRUPTED: Final = "a message with ports was about to be received here when a signal handler raised; receive it first"
# Every open link of this process, by id(). With its socket: what is referred to from here is not finalised with the
# garbage a link may be part of, so the link can still say goodbye.
_links: dict[int, tuple[weakref.ref[Link], Socket]] = {}
_this_process = os.getpid()
_ending = False
_channel_prefix = os.urandom(8)
_channel_numbers = itertools.count()


class Watcher(Protocol):
    """Somebody who waits on a link's socket (an event loop, the delivery thread)."""

    def forget(self, sock: Socket) -> None:
        """Stop waiting on *sock*, which is being released. Any thread; also from a finaliser."""

    @property
    def usable(self) -> bool:
        """Whether it still waits on anything."""


class Loan(Protocol):
    """The start of a process that links are given to."""

    @property
    def pending(self) -> bool:
        """Whether it is still open if the start succeeds."""


def open_pair(plain: Plain | None = None) -> tuple[Link, Link]:
    """Two new links, connected. Raises ``OSError`` (limits) or ``NotImplementedError`` (not this system)."""
    require()
    one, two = socket_pair()
    channel = _channel_prefix + next(_channel_numbers).to_bytes(4, "little")
    first = _link_of(plain, one, channel, 1, _this_process)
    second = _link_of(plain, two, channel, 2, _this_process)
    first.twin, second.twin = weakref.ref(second), weakref.ref(first)
    return first, second


def open_links() -> list[Link]:
    """Every open link of this process."""
    return [link for reference, _ in list(_links.values()) if (link := reference()) is not None]


def say_goodbye() -> None:
    """This process ends in order: tell the other ends of all its links."""
    global _ending
    _ending = True
    for link in open_links():
        link.close("exited", at_exit=True)


def begin_in_child() -> list[Link]:
    """In a forked child, at once: the links that were inherited. Their sockets are still open."""
    global _this_process, _channel_prefix, _ending
    _this_process, _ending = os.getpid(), False
    _channel_prefix = os.urandom(8)
    inherited = open_links()
    _links.clear()
    return inherited


class Link(SocketEnd):
    """One end of a channel, as its port sees it."""

    __slots__ = (
        "__weakref__",
        "_back",
        "_end",
        "_expected",
        "_inbox",
        "_largest",
        "_looks",
        "_slab",
        "_taking",
        "channel",
        "dropped",
        "lent",
        "owner",
        "plain",
        "side",
        "twin",
        "watchers",
    )

    _has_slots = True

    def __init__(self, sock: Socket, channel: bytes, side: int, peer_pid: int | None, expected: int = 0) -> None:
        super().__init__(sock, peer_pid)  # without the socket itself, until all is there: see __del__
        self.channel = channel  # 12 bytes, the same at both ends and nowhere else
        self.side = side  # 1 or 2: which of the two
        self.lent: Loan | None = None
        self.plain: Plain | None = None  # the codec, of a port that has one
        self._largest: int | None = None  # see ``unwrap``
        self.owner: weakref.ref[Any] | None = None
        self.twin: weakref.ref[Link] | None = None  # the other end, as long as neither has moved
        self.watchers: tuple[Watcher, ...] = ()
        self._expected = expected  # heads-ups taken whose packet is still to come
        self._slab: Slab | None = None  # where the bytes of SLOT packets are
        self.slow = bool(expected)  # take with care: something below is set
        self.dropped: tuple[Hand, ...] = ()
        self._looks = 0  # how often the next packet was looked at: a signal handler may do so while somebody else does
        self._taking = False  # a packet is being taken as it comes, which a signal handler may be in the midst of
        self._inbox: Inbox | None = None
        self._back: list[bytearray | memoryview | Parcel] = []  # taken, and recovered
        self._end: End | None = None
        self._sock = sock
        # Called back when this object is gone, whatever interrupted its __del__: nothing else holds the socket.
        _links[id(self)] = weakref.ref(self, partial(_links.pop, id(self))), sock

    def __del__(self) -> None:
        # Twice: a signal handler's exception, which nobody gets here, may end the first (but for its first line).
        try:
            self._finalise()
        finally:
            self._finalise()

    def _finalise(self) -> None:
        if getattr(self, "_sock", None) is not None and os.getpid() == _this_process:  # (interrupted while made?)
            self.close("collected")
        # Else: a child was forked a moment ago and lost the state of the parent's other threads, even before any
        # at-fork hook. The channel is the parent's; begin_in_child() closes the copy.

    # Taking. The caller holds ``receiving`` (or is in the only thread there is), and gives a hand: an empty list.

    def take(self, hand: Hand, looks: int | None = None) -> Taken | None:
        """The next packet or the end; ``None`` if nothing is there.

        What is taken is in *hand* at the very moment it leaves the queue. So an exception of a signal handler, which
        may come up behind any call, loses nothing: whoever gets it adds the hand to ``dropped`` and sets ``slow``
        (statements behind which no handler runs), and whoever takes next finds it there.

        *looks* is for ``_take_slowly``: take as it comes, if these are all the looks at the next packet there were.
        """
        if looks is None and self.slow:
            if self.slow == READ_AHEAD and (inbox := self._inbox) is not None:
                # No call, and so no signal handler, in these. The last one that was read is for _take_overflowed.
                place = inbox.place
                if place < inbox.last:
                    ahead = inbox.packets[place - inbox.first]
                    if ahead[0] == PICKLE:
                        hand += (ahead,)
                        inbox.place = place + 1
                        return ahead  # type: ignore[return-value]
            return self._take_slowly(hand)
        try:
            buffer = spare_buffers.pop()
        except IndexError:
            buffer = Buffer(BUFFER)
        buffer[0] = buffer.size = 0
        hand.append(buffer)
        # From this test on, no call until the packet is taken: a signal handler may take as well, behind any call.
        if (self.slow or self._taking) if looks is None else self._looks != looks:
            hand.clear()
            spare_buffers.append(buffer)
            return self._take_slowly(hand)
        taking, self._taking, slab = self._taking, True, self._slab
        try:
            size = buffer.size = self._recv_into(buffer, 0, NOW)
            if buffer[0] == PICKLE:
                return buffer
            if buffer[0] == SLOT:
                size = _fetch(buffer, slab)
                if buffer[0] == PICKLE:
                    return buffer
            noted = self._keep_house(buffer, size)
            if not noted and buffer[0] not in _DATA:
                raise Refused(_of_no_kind(buffer[0]))
        except Refused as error:
            hand.clear()
            return self._break_off(error)
        except BlockingIOError:
            hand.clear()
            spare_buffers.append(buffer)
            return None
        except ConnectionResetError:
            # The other end closed with messages of ours unread. What it had sent before is still in the queue.
            hand.clear()
            return self.take(hand)
        finally:
            self._taking = taking
        if noted:
            hand.clear()
            spare_buffers.append(buffer)
            return self._end or self.take(hand)
        hand[0] = parcel = Parcel(memoryview(buffer)[:size], Descriptors())
        return parcel

    def recover(self) -> None:
        """Put back what is in ``dropped``: the hands of those whom an exception came upon."""
        with self.receiving:
            while self.dropped:
                hand, back = self.dropped[-1], []
                for taken in hand:
                    if type(taken) is Buffer and taken[0] == SLOT:
                        _fetch(taken, self._slab)
                    if type(taken) is Buffer and taken[0] != PICKLE:
                        size = taken.size or len(taken)  # the exception came before its size was noted
                        try:
                            if taken[0] == 0 or self._keep_house(taken, size):
                                continue  # nothing had come, or nothing with a message
                        except Refused as error:
                            self._break_off(error)
                            continue
                        taken = Parcel(memoryview(taken)[:size], Descriptors())
                    if isinstance(taken, Parcel) and taken.descriptors.spent:
                        continue  # its ports were made, and closed, in vain
                    back.append(taken)
                # Without a call, so that it is put back once, whatever signal handlers do.
                if self.dropped and self.dropped[-1] is hand:
                    self._back, self.dropped = back + self._back, self.dropped[:-1]

    @property
    def recovered(self) -> bool:
        """Whether something was put back: no readable socket tells of it."""
        return bool(self._back or self.dropped)

    def _keep_house(self, buffer: bytearray | memoryview, size: int) -> bool:
        """Note what a packet without a message says. ``False`` if it has a message."""
        kind = buffer[0] if size else 0
        self._looks += 1
        if kind in (CLOSE, HELD) and size < PROCESS.size:
            raise Refused("a note that is cut off")
        if not size or kind == CLOSE:
            end = self._end_told_by(buffer, size)
            self.slow, self._end = True, end
        elif kind == HEADS_UP:
            self.slow, self._expected = True, self._expected + 1
        elif kind == HELD:
            self.peer_pid = PROCESS.unpack_from(buffer)[2]
        else:
            return False
        return True

    def _end_told_by(self, buffer: bytearray | memoryview, size: int) -> End:
        if not size:
            self._socket()  # raises if it was closed or moved away here, while we looked at it
            return End("died", self.peer_pid)
        _, reason, pid = PROCESS.unpack_from(buffer)
        why = bytes(buffer[PROCESS.size : size]).decode(errors="replace")
        return End(REASONS[min(reason, len(REASONS) - 1)], pid, why)

    def _break_off(self, error: Refused) -> End:
        """The other end sent what no end of a channel sends: nothing more of it is taken, and the channel is over."""
        self._inbox = None
        self.slow, self._end = True, End("died", self.peer_pid, "", str(error.strerror))
        if self._sock is not None:
            shut(self._sock)
        return self._end

    def _set_pace(self) -> None:
        # Without a call: what a signal handler sets meanwhile must not be overwritten.
        slow = self.dropped or self._back or self._expected or self._end or self._inbox or self.lent
        self.slow = not not slow  # noqa: SIM208

    def _take_slowly(self, hand: Hand) -> Taken | None:
        """``take`` while something is put back, announced, over or lent."""
        while True:
            if self.dropped:
                self.recover()
            if self._back:
                # Two statements without a call: no signal handler runs between them.
                hand += (self._back[0],)
                del self._back[0]
                taken: Taken = hand[0]
                return taken
            if self.lent is not None and self.lent.pending:
                return None
            if self._end is not None:
                return self._end
            if self._inbox is not None:
                # Without a call: what a signal handler sets meanwhile must not be overwritten.
                if not (self.dropped or self._back or self._end or self.lent):
                    self.slow = READ_AHEAD
                try:
                    found = self._take_overflowed(self._inbox, hand)
                except Refused as error:
                    end = self._break_off(error)
                    return hand[0] if hand else end
                if found is not None or self._inbox is not None:
                    return found
            elif not self._expected and not self._taking:
                looks = self._looks
                self._set_pace()
                return self.take(hand) if self.slow else self.take(hand, looks)
            else:
                try:
                    found = self._look(hand)
                except Refused as error:
                    hand.clear()
                    return self._break_off(error)
                if found is not None or self._inbox is None:
                    return found

    def _look(self, hand: Hand) -> Taken | None:
        """Take the next packet off the socket only when its descriptors are safe in hand."""
        sock = self._socket()
        self._looks = looks = self._looks + 1
        try:
            buffer = spare_buffers.pop()
        except IndexError:
            buffer = Buffer(BUFFER)
        try:
            size, descriptors = receive_with(sock, buffer, NOW | PEEK)
        except BlockingIOError:
            spare_buffers.append(buffer)
            return None
        kind = buffer[0] if size else 0
        if kind == SLOT and self._has_news(buffer):
            slab = _slab_of(descriptors)
            if self._looks != looks:
                return self._take_slowly(hand)  # a signal handler saw it, and took it
            # Without a call: who looks at it once more, behind this, sees nothing new.
            self._slab, self._expected = slab or self._slab, self._expected - 1 if self._expected else 0
        if kind not in (ANNOUNCE, CARRIER):
            spare_buffers.append(buffer)
            return self.take(hand, looks)
        if kind == CARRIER:
            parcel = unwrap(memoryview(buffer)[:size], descriptors, self._largest)
            spare_buffers.append(buffer)
        else:
            spare_buffers.append(buffer)
            try:
                inbox = self._open_inbox(descriptors)
            except IndexError as error:
                raise Refused("an overflow file that is none") from error
            except OSError as error:
                refuse_wrong(error)
                raise
            if self._looks != looks:
                return self._take_slowly(hand)  # a signal handler saw it, and maybe the end of it
            self._inbox, self.slow = inbox, True
            return None
        # One call that takes the packet off and, if it did, puts the parcel in hand.
        taking = itertools.compress((parcel,), taking_off(sock))
        if self._looks != looks:
            return self._take_slowly(hand)  # a signal handler took it
        try:
            hand.extend(taking)
        except ConnectionResetError:  # it comes between any two calls: that one took nothing
            return self._look(hand)
        self._expected = self._expected - 1 if self._expected else 0
        return parcel

    def _has_news(self, packet: Buffer) -> bool:
        """Whether a SLOT packet brings memory, behind a heads-up."""
        _, announced, _, inode, _ = HEAD.unpack_from(packet)
        return announced and (self._slab is None or self._slab.inode != inode)

    def _open_inbox(self, descriptors: Descriptors) -> Inbox:
        return Inbox(descriptors)

    def _take_overflowed(self, inbox: Inbox, hand: Hand) -> Taken | None:
        """The next packet of the overflow file; ``None`` if there is none, and then maybe no file either."""
        try:
            return self._take_record(inbox, hand)
        except OSError as error:
            refuse_wrong(error, inbox.memory, SEAL_SEAL)
            raise

    def _take_record(self, inbox: Inbox, hand: Hand) -> Taken | None:
        for _ in range(_NOTES):
            record = inbox.next()
            if record is None:
                self._socket()  # raises if a signal handler closed it
                self._leave_if_exhausted(inbox)
                return None
            packet = record.packet
            taken: Taken | None = packet
            if packet[0] == CARRIER:
                taken = unwrap(packet, inbox.descriptors(record), self._largest)
            elif packet[0] != PICKLE:
                noted = self._keep_house(packet, len(packet))
                if not noted and packet[0] not in _DATA:
                    raise Refused(_of_no_kind(packet[0]))
                taken = None if noted else Parcel(memoryview(bytearray(packet)), Descriptors())
            if inbox.place != record.place:
                return self._take_slowly(hand)  # a signal handler took it
            # No call, and so no signal handler, in the next three statements.
            if taken is not None:
                hand += (taken,)
            inbox.place = record.place + 1
            inbox.drop_aside(record)
            self._leave_if_exhausted(inbox, len(packet))
            if taken is not None:
                return taken
            if self._inbox is not inbox or self._end is not None:
                return self._take_slowly(hand)
        return None  # whoever sends nothing but notes holds up nobody else

    def _leave_if_exhausted(self, inbox: Inbox, taken: int = 0) -> None:
        """*taken*: the size of the packet just taken from it, if there was one."""
        # At once when the last packet is taken, so that "readable" means that a message is there. But first
        # linger: while small messages keep coming, both sides are quicker with the file than with the socket.
        sock = self._sock
        if sock is None:
            return
        if not inbox.left and not inbox.exhausted(linger=0 < taken < SMALL, writer_gone=not taken and hung_up(sock)):
            return
        while not inbox.left:
            # The announcement; the socket has the rest. (A reset comes first, and once, if the other end died.)
            taking = taking_off(sock)
            if inbox.left:
                break  # a signal handler took it
            try:
                inbox.left.extend(taking)
            except ConnectionResetError:
                continue
        if self._inbox is inbox:
            self._inbox, self._expected = None, self._expected - 1 if self._expected else 0
        self._set_pace()

    @property
    def ready(self) -> End | bool:
        """Without taking it: whether a message is there (``True``), nothing (``False``), or the end."""
        try:
            return self._look_ahead()
        except Refused as error:
            return self._break_off(error)
        except OSError as error:
            try:
                refuse_wrong(error, None if self._inbox is None else self._inbox.memory, SEAL_SEAL)
            except Refused as refused:
                return self._break_off(refused)
            raise

    def _look_ahead(self) -> End | bool:
        peek = bytearray(8)
        while True:
            if self.recovered:
                self.recover()
                if self._back:
                    return True
            if self.lent is not None and self.lent.pending:
                return False
            if self._end is not None:
                return self._end
            if self._inbox is not None:
                if self._inbox.next() is not None:
                    return True
                self._leave_if_exhausted(self._inbox)
            sock = self._socket()
            if self._inbox is not None:
                return False
            looks = self._looks
            try:
                size = sock.recv_into(peek, 0, NOW | PEEK)
            except BlockingIOError:
                return False
            except ConnectionResetError:
                continue
            if not size or (peek[0] == CLOSE and size >= PROCESS.size):
                return self._end_told_by(peek, size)  # left where it is: it moves with the link
            if not self._keep_house(peek, size):
                return True
            taking = taking_off(sock)
            while self._looks == looks + 1:  # else a signal handler took it
                try:
                    deque(taking, 0)
                    break
                except ConnectionResetError:
                    taking = taking_off(sock)

    def watched_by(self, watcher: Watcher) -> Socket | None:
        """The socket for *watcher* to wait on; it is told to ``forget`` it at its release. ``None``: it is released."""
        if self._sock is not None and watcher not in self.watchers:
            self.watchers = (*(each for each in self.watchers if each.usable), watcher)
        return self._sock

    @property
    def stalled(self) -> bool:
        """After a take that gave nothing: whether the socket is readable all the same. (A large record is being
        written, or a process is being started with this link.)
        """
        return self._inbox is not None or self.lent is not None

    def _blind_for(self) -> float | None:
        if self._inbox is not None:
            return 0.0005  # a large record is being written; the socket is readable all the while
        if self.lent is not None:
            return _LOAN_LOOK  # nothing tells of a start that failed, only a look; one that succeeded rings
        return None

    # Leaving

    def close(self, reason: str, *, at_exit: bool = False) -> None:
        """Say goodbye and let go. Again: nothing. Ports in unread packets go back as undeliverable.

        *at_exit*: other threads may be blocked on the socket and must not be woken; the process closes it anyway.
        """
        with self.sending:
            sock = self._sock
            if sock is None:
                return
            farewell(sock, self._outbox, reason)  # first: interrupted behind it, a second close() does the rest
            self._release(_refuse_posts, _closed_here)
        if at_exit:
            if self.receiving.acquire(blocking=False):
                try:
                    bounce(unread(sock, self._expected > 0))
                finally:
                    self.receiving.release()
            # A daemon thread that is inside one of these when the interpreter ends stays there, and finalisers that use
            # the port come later still. There is nothing left to guard.
            self.receiving, self.sending = threading.RLock(), threading.RLock()
            return
        shut(sock)
        self._let_go(sock)
        with self.receiving:
            described = self._expected > 0
            self._drop_received()
            bounce(unread(sock, described))

    def drop(self, error: Callable[[], Exception]) -> None:
        """The end was taken: let go. Taking from now on raises *error*; posting gives ``False``."""
        with self.receiving, self.sending:
            sock = self._sock
            if sock is not None:
                self._release(_refuse_posts, error)
                self._drop_received()
        if sock is not None:
            self._let_go(sock)

    def pack_up(self) -> tuple[bytes, Socket, Memory | None]:
        """What another process needs to go on with this link: some bytes, and one or two descriptors.

        The caller holds both locks. The link stays usable, so a handoff that fails needs no undoing.
        """
        if self._end is not None:
            raise DataCloneError("the channel of this port is closed, which its holder is just being told")
        back = []
        for packet in self._back:
            if isinstance(packet, Parcel):
                raise DataCloneError(INTERRUPTED)
            body = memoryview(packet)[: packet.size or None] if isinstance(packet, Buffer) else packet
            back.append(b"".join((len(body).to_bytes(4, "little"), body)))
        self._leave_outbox()
        if self._inbox is not None:
            self._inbox.rewind()
            self._inbox = None
        plain = self.plain
        flags = self._owes * OWES | (self._slab is not None) * SLOTS | (plain is not None) * PLAIN
        head = HANDOFF.pack(self.channel, self.side, self.peer_pid or 0, self._expected, flags, len(back))
        if plain is not None:
            head += CODEC.pack(KINDS[plain.codec], plain.largest)
        return b"".join((head, *back)), self._socket(), None if self._slab is None else self._slab.memory

    @property
    def packable(self) -> bool:
        """Whether ``pack_up`` would not have to refuse, as things are."""
        return not self._back or not any(isinstance(packet, Parcel) for packet in self._back)

    def lend(self, loan: Loan | None) -> None:
        """A process is being started that may take this link over: take nothing meanwhile. ``None``: it did not."""
        self.lent = loan
        self.slow = True  # whoever takes next finds out

    @staticmethod
    def unpack(sock: Socket, luggage: bytes | memoryview, memory: Callable[[], Memory]) -> Link:
        """The link that ``pack_up`` packed, at its new holder. Raises ``struct.error`` for what is none."""
        channel, side, pid, expected, flags, count = HANDOFF.unpack_from(luggage)
        at, plain = HANDOFF.size, None
        if flags & PLAIN:
            kind, largest = CODEC.unpack_from(luggage, at)
            at += CODEC.size
            plain = check(next((codec for codec in KINDS if KINDS[codec] == kind), ""), largest)
        link = _link_of(plain, sock, channel, side, pid or None, expected)
        link._owes = bool(flags & OWES)
        if flags & SLOTS:
            link._slab = Slab(memory())
        back = []
        for _ in range(count):
            size = int.from_bytes(luggage[at : at + 4], "little")
            back.append(memoryview(luggage)[at + 4 : at + 4 + size])
            at += 4 + size
        link._back.extend(back)
        link.slow = link.slow or bool(back)
        return link

    def leave(self, error: Callable[[], Exception]) -> None:
        """The link went to another holder: let go without a word. Posting and taking raise *error* from now on."""
        with self.receiving, self.sending:
            sock = self._sock
            self._leave_outbox()
            self._release(_refuse(error), error)
            self._drop_received()
        if sock is not None:
            self._let_go(sock)

    def stay_behind(self, error: Callable[[], Exception]) -> None:
        """In a forked child that was not given this link: be as if it had moved away. What it held is closed later."""
        # Threads of the parent may have held the locks at the fork; here they would never be released.
        self.receiving, self.sending = threading.RLock(), threading.RLock()
        self._release(_refuse(error), error)
        self._drop_received()
        self._bells, self.watchers = [], ()

    def copy_after_fork(self) -> Link:
        """In a forked child that was given this link: the same, with locks and waiters of its own."""
        link = _link_of(self.plain, renew(self._socket()), self.channel, self.side, self.peer_pid, self._expected)
        link._owes = self._owes
        link._back, link.slow, link._slab = self._back, True, self._slab
        self._back = []
        self.stay_behind(_closed_here)
        return link

    def moved_to(self, pid: int | None, *, tell: bool = False) -> None:
        """Before ``leave``: note at the other end, if it never left this process, who holds this end now. *tell* it
        through the channel otherwise.
        """
        twin = None if self.twin is None else self.twin()
        if twin is not None and twin.open:
            twin.peer_pid = pid or twin.peer_pid
        elif tell and pid:
            self.post(PROCESS.pack(HELD, 0, pid))

    def _release(self, post: Callable[..., Any], error: Callable[[], Exception]) -> None:
        self._sock = None
        self._outbox = self._slots = None
        self._send = post
        self._recv_into = _refuse(error)
        self.slow = False

    def _drop_received(self) -> None:
        self._inbox = self._end = self._slab = None
        self._expected = 0
        self._back = []
        self.dropped = ()
        self.slow = False

    def _let_go(self, sock: Socket) -> None:
        _links.pop(id(self), None)
        for watcher in self.watchers:
            watcher.forget(sock)
        self.watchers = ()
        self.ring()


@final
class PlainLink(Link):
    """The link of a port with a codec: gives whole packets of that codec, and refuses all others."""

    __slots__ = ()

    def take(self, hand: Hand, looks: int | None = None) -> Taken | None:
        taken = super().take(hand, looks)
        if taken is None or isinstance(taken, End):
            return taken
        plain = self.plain
        assert plain is not None
        if not isinstance(taken, Parcel):
            error = Refused(f"a pickle, where codec={plain.codec!r} is all that is taken")
        elif not len(taken.body) or taken.body[0] != KINDS[plain.codec] or len(taken.descriptors):
            error = Refused(f"a packet that is not of codec={plain.codec!r}, which is all that is taken")
        elif len(taken.body) > plain.largest + 1:
            error = Refused(f"a message of {len(taken.body) - 1} bytes, and max_message_size is {plain.largest}")
        else:
            return taken
        hand.clear()
        return self._break_off(error)

    def _open_inbox(self, descriptors: Descriptors) -> Inbox:
        assert self._largest is not None
        return Inbox(descriptors, self._largest + CARRIER_HEAD.size)


def _link_of(
    plain: Plain | None, sock: Socket, channel: bytes, side: int, peer_pid: int | None, expected: int = 0
) -> Link:
    if plain is None:
        return Link(sock, channel, side, peer_pid, expected)
    link = PlainLink(sock, channel, side, peer_pid, expected)
    link.plain, link._largest = plain, plain.largest + 1
    return link


def _of_no_kind(kind: int) -> str:
    return f"a packet of no known kind (0x{kind:02x}), or one whose descriptors were not announced"


def _slab_of(descriptors: Descriptors) -> Slab | None:
    try:
        return Slab(descriptors.claim_memory())
    except (OSError, ValueError, IndexError):
        return None  # it is not what it should be: what it is for will not load


def _fetch(buffer: Buffer, slab: Slab | None) -> int:
    """Put the packet in place of the SLOT packet that was taken for it: its size."""
    try:
        size: int
        _, _, slot, inode, size = HEAD.unpack_from(buffer)
        if slab is None or slab.inode != inode or 0 < buffer.size < HEAD.size:
            raise ValueError("it is in memory that nobody told of")
        buffer.size = size  # first: what is in the buffer behind the copy is the packet, whatever comes up
        slab.fetch(slot, size, buffer)
    except ValueError:
        buffer[0], buffer.size = _GARBAGE, 1
        return 1
    slab.free(slot)
    return size


def _refuse(error: Callable[[], Exception]) -> Callable[..., NoReturn]:
    def refuse(*_: object) -> NoReturn:
        raise error()

    return refuse


_refuse_posts = _refuse(lambda: BrokenPipeError(errno.EPIPE, "the channel is closed"))


def _closed_here() -> PortClosedError:
    rest_if_ending()
    return PortClosedError("this port was closed by its own holder")


def rest_if_ending() -> None:
    """Do not return, in a daemon thread of a process that ends: it was waiting for a message, has nothing more to do,
    and nobody to tell that the channel is closed.
    """
    while _ending and threading.current_thread().daemon:
        time.sleep(3600)
