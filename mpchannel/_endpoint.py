"""An end of a channel: its state, who watches its socket, how it closes and moves. ``port`` adds what users type.

States, and what each does with what can happen to it:

    state     | post                | take                | transfer        | close()  | other end goes
    ----------+---------------------+---------------------+-----------------+----------+---------------------------
    OPEN      | queued, True        | message, or waits   | -> DETACHED     | -> CLOSED| the kernel keeps the rest:
              |                     |                     |                 |          | post False, take goes on,
              |                     |                     |                 |          | when drained -> CLOSED
    DETACHED  | PortDetachedError   | PortDetachedError   | DataCloneError  | nothing  | the new holder's affair
    CLOSED    | packed, False       | PortClosedError     | DataCloneError  | nothing  | nothing

Beside the state there is one bit: the port message queue is disabled until ``start()`` enables it (HTML).

House rules. Locks: ``link.receiving``, then ``link.sending``, then the listener table's ``lock``, which also guards
the state, the bit and whom we told to watch the socket. No user code under any of them. A listener's message is
settled when it is taken: the row of listeners is read under the same lock as the message is taken.
"""

from __future__ import annotations

import enum
import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, NoReturn, Self

from ._clone import Departure, Entry, Transferable, loads, message_error, unpack
from ._delivery import TURNS, Home, home, loop_home
from ._end import Buffer, Hand, Taken, spare_buffers
from ._kernel import Bell, Descriptors, Memory, Socket, elsewhere, exit_code, in_crossing
from ._link import INTERRUPTED, Link, Loan, rest_if_ending
from ._sockdiag import alive
from ._status import status
from ._wire import End, Parcel
from .errors import ChannelError, DataCloneError, MessageError, PortClosedError
from .events import CloseEvent, EventTarget, MessageErrorEvent, MessageEvent, _Listener

_TROUBLE_PAUSE: Final = 0.05  # seconds until delivery tries again after a limit of the system was hit
STALL_PAUSE: Final = 0.001  # seconds until somebody looks again at a large message that is being written
_FULL_TURNS: Final = 3  # so many full turns, and the next ones may be longer: one message at a time is what is usual
_LOOK_PAUSE: Final = 0.02  # seconds between two looks whether a port that is read by hand, or lent, is over


class _Vigil:
    """Rings while somebody waits for ports to begin or cease to be listened to."""

    bell: Bell | None = None

    @contextmanager
    def kept(self) -> Iterator[Bell]:
        self.bell = bell = Bell()
        try:
            yield bell
        finally:
            self.bell = None

    def ring(self) -> None:
        bell = self.bell
        if bell is not None:
            bell.ring()


vigil: Final = _Vigil()


class State(enum.Enum):
    """See the table above."""

    OPEN = "open"  # ours, and connected as far as we know
    DETACHED = "detached"  # moved away: somebody else holds this end
    CLOSED = "closed"  # over: closed here, or the other end is gone and all it sent was taken


class Watched(enum.IntEnum):
    """Whether a home gives this port turns."""

    NOT = 0
    FOR_CLOSE = 1  # held weakly: an unreferenced port may be collected
    FOR_MESSAGES = 2  # held strongly


class Endpoint(EventTarget, Transferable):
    """One end of a channel, without the words of its users."""

    __slots__ = (
        "__weakref__",
        "_afterwards",
        "_born",
        "_closing",
        "_departure",
        "_enabled",
        "_end",
        "_full_turns",
        "_home",
        "_link",
        "_look_due",
        "_parked",
        "_state",
        "_turns",
        "_watched",
    )

    event_types = ("message", "messageerror", "close")

    @classmethod
    def _of(cls, link: Link) -> Self:
        """The port around a link, as it is made or arrives: disabled, without listeners."""
        port = cls.__new__(cls)
        port._begin(link)
        return port

    def _begin(self, link: Link) -> None:
        EventTarget.__init__(self)
        self._link = link
        self._born = time.monotonic()
        link.owner = weakref.ref(self)
        self._state = State.OPEN
        self._enabled = False
        self._home: Home | None = None
        self._watched = Watched.NOT
        self._turns = 1  # messages to take in one turn
        self._full_turns = 0  # turns in a row that found so many
        self._parked = False  # a message is in the way of the close somebody waits for: look again after a take
        self._look_due = False
        self._closing: tuple[partial[None], ...] = ()  # coroutines that wait for the close
        self._afterwards: tuple[Callable[[], None], ...] = ()  # called when this object is of no more use, anywhere
        self._end: End | None = None
        self._departure: Departure | None = None

    @property
    def closed(self) -> bool:
        """Closed here, or the other end is gone and everything it sent was taken."""
        return self._state is State.CLOSED

    @property
    def detached(self) -> bool:
        """Moved away to another holder."""
        return self._state is State.DETACHED

    @property
    def started(self) -> bool:
        """Whether the port message queue is enabled."""
        return self._enabled

    # Taking

    def _take_now(self, hand: Hand) -> Taken | None:
        with self._link.receiving:
            return self._link.take(hand)

    def _open(self, taken: Taken) -> tuple[Any, tuple[Any, ...]]:
        """What was taken, as (message, ports). The end becomes ``PortClosedError``."""
        if self._parked:
            self._taken_while_parked()
        if isinstance(taken, Parcel):
            return unpack(taken)
        if isinstance(taken, End):
            self._over(taken)
            raise closed_error(taken)
        return loads(taken), ()

    def _fumbled(self, hand: Hand, error: BaseException) -> NoReturn:
        """*error* came up between taking a packet and having its message; the hand is among the link's ``dropped``.
        Raise it, or what is to be made of it.
        """
        link = self._link
        taken = hand[0] if hand else None
        told = isinstance(error, MessageError)
        bad = None
        nothing_came = type(taken) is Buffer and taken[0] == 0
        if taken is not None and not nothing_came and not told and not isinstance(error, OSError):
            bad = message_error(error, taken)
        if told or bad is not None:
            hand.clear()  # the user is told; nobody gets it again
        with link.receiving:
            link.recover()
        # No readable socket tells of what was put back.
        if link.recovered:
            link.ring()
            with self.lock:
                if self._watched is Watched.FOR_MESSAGES and self._home is not None:
                    self._home.call(self.turn)
        try:
            if bad is None:
                raise error
            raise bad from error
        finally:
            del error, bad  # a frame that holds what it raises is a cycle, which would keep the message's ports open

    # Turns: taking and dispatching, at the home

    def start(self) -> None:
        """Enable the port message queue: listeners get what is queued and what comes. Idempotent.

        Where they run is settled here: on the asyncio loop running in this thread, else on the delivery thread.
        """
        self._start_at(None)

    def _start_at(self, at: Home | None) -> None:
        """``start``; where listeners run is settled by *at*, if that is usable."""
        with self.lock:
            if self._state is not State.OPEN:
                return
            if not self._enabled or self._home is None or not self._home.usable:
                self._enabled = True
                self._settle_home(home() if at is None or not at.usable else at)
            self._watch()

    def turn(self) -> None:
        """For the home: the socket has something. Take and dispatch some of it.

        As much as there was in the last turns, for to find nothing takes half as long as a message. A home asks again.
        """
        link = self._link
        turns = TURNS if link.slow else self._turns
        for _ in range(turns):
            hand: Hand = []
            if not link.receiving.acquire(False):
                return  # a thread is receiving this very moment: it gets it
            try:
                with self.lock:
                    row = self._listeners.get("message", ()) if self._enabled else ()
                    taken = link.take(hand) if row else self._take_if_over(hand)
            except ChannelError:
                return  # closed or moved away meanwhile
            except (OSError, MemoryError) as error:  # a limit of the system; nothing is lost, so tell and try again
                link.dropped += (hand,)
                link.slow = True
                self._pause(_TROUBLE_PAUSE, error)
                return
            except BaseException as error:
                link.dropped += (hand,)
                link.slow = True
                self._fumbled(hand, error)
            finally:
                link.receiving.release()
            if taken is None:
                self._turns, self._full_turns = 1, 0
                if link.stalled:
                    self._pause(STALL_PAUSE)
                return
            if not self._deliver(taken, row, hand):
                return
        self._full_turns += 1
        if self._full_turns > _FULL_TURNS:
            self._turns = min(2 * turns, TURNS)

    def _take_if_over(self, hand: Hand) -> Taken | None:
        """Nobody listens for messages: take nothing but the end, and stop watching if a message is in the way."""
        ready = self._link.ready
        if ready is True:
            self._parked = True
            self._watch(Watched.NOT)
        return self._link.take(hand) if isinstance(ready, End) else None

    def _pause(self, seconds: float, error: Exception | None = None) -> None:
        """No turns for a while: the socket is readable, but there is nothing to be had from it now."""
        at = self._home
        if at is not None:
            with self.lock:
                self._watch(Watched.NOT)
            if error is not None:
                at.report(error, self.turn)
            at.call_later(seconds, self._look_again)

    def _deliver(self, taken: Taken, row: tuple[_Listener, ...], hand: Hand) -> bool:
        """Dispatch what was taken. Whether to go on."""
        if isinstance(taken, End):
            self._over(taken, dispatch=True)
            return False
        at = self._home or home()
        event: MessageEvent[Any] | MessageErrorEvent
        pooled = type(taken) is Buffer
        try:
            try:
                if pooled and not self._parked:
                    event = MessageEvent(self, loads(taken))  # type: ignore[arg-type]
                else:
                    event = MessageEvent(self, *self._open(taken))
            except BaseException as error:
                self._link.dropped += (hand,)
                self._link.slow = True
                self._fumbled(hand, error)
        except MessageError as bad:
            event = MessageErrorEvent(self, bad)
            row = self._listeners.get("messageerror", ())
            if not row:
                at.report(bad, self.turn)
        except (OSError, MemoryError) as error:
            self._pause(_TROUBLE_PAUSE, error)
            return False
        if pooled:
            spare_buffers.append(taken)  # type: ignore[arg-type]
        results = self._dispatch(event, row, at.report)
        if results:
            at.run(results)
        return self._state is State.OPEN

    def _listeners_changed(self, type: str, added: _Listener | None) -> None:
        if type == "close" and added is not None and self._end is not None:
            # Added after the channel closed: it still hears of it, once, and not in the midst of its registration.
            self._usable_home().call(partial(self._dispatch_close, (added,)))
        elif self._state is State.OPEN and (added is not None or self._watched):
            self._watch()

    def _settle_home(self, at: Home) -> None:
        """Listeners run at *at* from now on. Under ``lock``."""
        if self._home is not at:
            self._watch(Watched.NOT)
            self._home = at

    def _usable_home(self) -> Home:
        """Where listeners run; another place than before if that was a loop that has ended. Under ``lock``."""
        at = self._home
        if at is None or not at.usable:
            if at is not None and self._watched:
                sock = self._link.watched_by(at)
                if sock is not None:
                    at.unwatch(sock)
                self._watched = Watched.NOT
            self._home = at = home()
        return at

    def _wanted(self) -> Watched:
        if self._state is not State.OPEN or self._link.lent is not None:
            return Watched.NOT
        if self._enabled and self._listeners.get("message"):
            return Watched.FOR_MESSAGES
        if self._listeners.get("close") or self._closing:
            return Watched.FOR_CLOSE
        return Watched.NOT

    def _watch(self, wanted: Watched | None = None) -> None:
        """Have the home watch the socket as is now *wanted*. Under ``lock``."""
        link = self._link
        if wanted is None:
            wanted = self._wanted()
            if link.lent is not None:
                self._look_later()
            if self._parked:
                self._parked = False
                link.ring()  # whoever waits for the close behind a message must ask to be told again
        if wanted is self._watched is Watched.NOT:
            return
        at = self._usable_home()
        if wanted is self._watched:
            return
        vigil.ring()
        sock = link.watched_by(at)
        if sock is None:
            self._watched = Watched.NOT
        elif wanted:
            at.watch(sock, self, keep=wanted is Watched.FOR_MESSAGES)
            self._watched = wanted
            if not link.open:
                at.forget(sock)  # released by another thread in between; it could not know of us
            elif link.recovered:
                at.call(self.turn)
        else:
            self._watched = Watched.NOT
            at.unwatch(sock)
            link.ring()  # whoever waits for the close slept because it was watched for

    def _taken_while_parked(self) -> None:
        """A message was taken; maybe it was the one in the way. Looking each time would cost as much as a message."""
        self._link.ring()
        with self.lock:
            self._look_later()

    def _look_later(self) -> None:
        """Under ``lock``."""
        if self._home is not None and not self._look_due:
            self._look_due = True
            self._home.call_later(_LOOK_PAUSE, partial(_look_again, weakref.ref(self)))

    def _look_again(self) -> None:
        self._lent_now()
        with self.lock:
            self._look_due = False
            if self._state is State.OPEN:
                self._watch()

    # Closing

    def close(self) -> None:
        """Leave. Idempotent. The other side gets ``close`` after everything posted before; what is queued here is
        dropped, and no handler of this port runs for it.
        """
        if State is None:  # called by a finaliser when the interpreter has cleared this module: it said goodbye before
            return
        if in_crossing():
            elsewhere(self._close_here)
        else:
            self._close_here()

    def _close_here(self) -> None:
        with self.lock:
            if self._state is State.DETACHED or self._end is not None:
                return
            self._state = State.CLOSED
            self._watch(Watched.NOT)
        self._link.close("closed")
        self._tell_closing()

    def _over(self, end: End, *, dispatch: bool = False) -> None:
        """The end was taken: the channel is over. *dispatch*: in this very turn; else listeners hear of it soon."""
        with self.lock:
            if self._state is not State.OPEN:
                return
            self._state = State.CLOSED
            self._end = end
            self._watch(Watched.NOT)
            row = self._listeners.get("close", ())
            at = self._usable_home() if row else None
        self._link.drop(partial(closed_error, end))
        self._tell_closing()
        if row and at is not None:
            if dispatch:
                self._dispatch_close(row)
            else:
                at.call(partial(self._dispatch_close, row))

    def _dispatch_close(self, row: tuple[_Listener, ...]) -> None:
        at, event = self._home, self._closed_event()
        if at is not None and event is not None:
            results = self._dispatch(event, row, at.report)
            if results:
                at.run(results)

    def _closed_event(self) -> CloseEvent | None:
        end = self._end
        return None if end is None else CloseEvent(self, end.reason, end.pid, partial(_exit_code_after, end))

    def wait_closed(self, timeout: float | None = None) -> CloseEvent | None:
        """Wait for the close event, which comes after every message was taken (by a listener, or another thread).

        Returns it, or ``None`` if the port was closed by its own holder. Raises ``TimeoutError`` after *timeout*
        seconds, ``PortDetachedError`` if the port is moved away, ``RuntimeError`` on the loop or thread that itself
        delivers the event.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        link = self._link
        while True:
            if self._departure is not None:
                raise self._departure.error()
            if self._state is State.CLOSED:
                return self._closed_event()
            with self.lock:
                if self._watched and self._home is not None and not self._home.usable:
                    self._watch(Watched.NOT)  # the loop that watched has ended
            if self._watched:
                if self._home is not None and self._home.here:
                    raise RuntimeError(
                        "wait_closed() would wait for itself: this thread delivers the port's events; "
                        "use `await port.await_closed()` on a loop, or onclose"
                    )
                in_time = link.wait(deadline, asleep_while=lambda: self._state is State.OPEN and bool(self._watched))
                self._check_time(in_time, timeout)
                continue
            try:
                with link.receiving:
                    ready = link.ready
                    taken = link.take([]) if isinstance(ready, End) else None
            except ChannelError:
                continue  # closed or moved away this very moment
            if isinstance(taken, End):
                self._over(taken)
            elif ready:
                self._parked = True
                self._check_time(link.wait(deadline, asleep_while=self._message_waits), timeout)
            else:
                self._check_time(link.wait(deadline), timeout)

    def _check_time(self, in_time: bool, timeout: float | None) -> None:
        if not in_time:
            raise TimeoutError(f"the channel did not close in {timeout} s")

    def _message_waits(self) -> bool:
        return self._state is State.OPEN and not self._watched and self._unread()

    def _unread(self) -> bool:
        try:
            with self._link.receiving:
                return self._link.ready is True
        except ChannelError:
            return False

    async def await_closed(self) -> CloseEvent | None:
        """``wait_closed`` for asyncio."""
        import asyncio

        loop = asyncio.get_running_loop()
        closed: asyncio.Future[None] = loop.create_future()
        tell = partial(_settle_from_anywhere, loop_home(loop), closed)
        with self.lock:
            self._closing += (tell,)
            if self._state is State.OPEN:
                self._watch()
            else:
                tell()
        try:
            await closed
        finally:
            with self.lock:
                self._closing = tuple(each for each in self._closing if each is not tell)
                if self._state is State.OPEN:
                    if self._closing and self._wanted() is Watched.FOR_CLOSE and not self._listeners.get("close"):
                        self._settle_home(self._closing[0].args[0])  # our loop may end; theirs has somebody waiting
                    self._watch()
        if self._departure is not None:
            raise self._departure.error()
        return self._closed_event()

    def _tell_closing(self) -> None:
        for tell in self._closing:
            tell()
        for call in self._afterwards:
            call()

    def _describe(self) -> Callable[[], str]:
        """What it is called, to be asked when it is gone."""
        return partial(_name, type(self).__name__, self._link.channel, self._link.side)

    def __repr__(self) -> str:
        about = [self._identity, self._state.value]
        if self._departure is not None:
            about[1:] = [str(self._departure)]
        elif self._state is State.OPEN:
            if self._enabled:
                about.append("started")
            about += self._surroundings()
        elif self._end is not None:
            broke = f"broke the rules of the channel: {self._end.broken}" if self._end.broken else ""
            about.append(f"the other end {broke or _WORDS[self._end.reason]}")
        return f"<{type(self).__name__} {', '.join(about)}>"

    def _surroundings(self) -> list[str]:
        """In words: who holds the other end, what waits, and for how long this port has been here."""
        about, link = [], self._link
        try:
            if link.peer_pid == os.getpid():
                about.append("other end in this process")
            elif link.peer_pid:
                ended = "" if alive(link.peer_pid) else ", which has ended"
                about.append(f"other end in process {link.peer_pid}{ended}")
            found = status(link)
            if found is not None:
                about += [
                    f"{way} {waiting}" for way, waiting in zip(("in", "out"), found, strict=True) if waiting.bytes
                ]
        except OSError:
            pass  # at a limit of the system, or closed this very moment: so this is all there is to say
        return [*about, f"{self.age:.1f} s old"]

    @property
    def _identity(self) -> str:
        """The channel, and which end of it."""
        return _id(self._link.channel, self._link.side)

    @property
    def age(self) -> float:
        """Seconds since this object was made, or arrived here."""
        return time.monotonic() - self._born

    # Moving

    @property
    def _channel(self) -> bytes:
        return self._link.channel

    def _check_movable(self, name: str) -> None:
        """Raise ``DataCloneError`` if this port cannot be moved now."""
        if self._state is State.DETACHED:
            raise DataCloneError(f"{name} is a port that was {self._departure}")
        if self._state is State.CLOSED or not self._link.open:
            raise DataCloneError(f"{name} is a closed port: {self!r}")
        if self._lent_now():
            raise DataCloneError(f"{name} is a port that is being given to a process right now")
        if not self._link.packable:
            raise DataCloneError(f"{name} cannot move yet: {INTERRUPTED}")

    def _lent_now(self) -> bool:
        loan = self._link.lent
        return loan is not None and loan.pending

    def _locks(self) -> list[tuple[int, int, Any]]:
        link = self._link
        return [(id(link), 0, link.receiving), (id(link), 1, link.sending)]

    def _pack_up(self) -> Entry:
        luggage, *owners = self._link.pack_up()
        return Entry(self._code, luggage, [each.fileno() for each in owners if each is not None])

    def _left(self, departure: Departure, pid: int | None, *, lost: bool = False, tell: bool = False) -> None:
        """This port was moved away; *lost*: to where nobody will receive it. *tell* the other end who holds it now."""
        link = self._link
        with self.lock:
            if self._watched:
                self._watch(Watched.NOT)
            self._state = State.DETACHED
            self._departure = departure
            if self._listeners:
                self._clear_listeners()
        link.moved_to(pid, tell=tell)
        if lost:
            link.close("undeliverable")
        link.leave(departure.error)
        self._tell_closing()

    @classmethod
    def _arrive(cls, luggage: memoryview | bytes, descriptors: Descriptors) -> Self:
        return cls._of(Link.unpack(descriptors.claim_socket(), luggage, descriptors.claim_memory))

    def _undelivered(self) -> None:
        self._left(Departure("lost with a message that could not be loaded"), None, lost=True)

    # Crossing into a process

    def _lend(self, loan: Loan) -> tuple[bytes, Socket, Memory | None]:
        """A process is being started that this port is given to. Take nothing until that succeeded or failed.

        Socket and memory are to be held until then: they must not close, even if the port does.
        """
        link = self._link
        with link.receiving, link.sending:
            self._check_movable("the argument")
            packed = link.pack_up()
            link.lend(loan)
        with self.lock:
            self._watch()
        return packed

    def _given_back(self) -> None:
        """The start failed: nothing happened. Takes no lock: it may be a finaliser that tells."""
        self._link.lend(None)
        self._link.ring()
        if self._home is not None:
            self._home.call(partial(_look_again, weakref.ref(self)))

    def _given_to(self, process: str, pid: int) -> None:
        """The start succeeded: the port is the child's."""
        link = self._link
        with link.receiving, link.sending:
            if not link.open:
                return  # closed meanwhile, which is what the child finds
            self._left(Departure(f"given to {process}, pid {pid},"), pid, tell=True)

    def _start_over(self) -> None:
        """In a forked child that was given this port: the port as it arrives."""
        self._begin(self._link.copy_after_fork())

    def _stay_behind(self, departure: Departure) -> None:
        """In a forked child that was not given this port."""
        link = self._link
        self._begin(link)
        self._state = State.DETACHED
        self._departure = departure
        link.stay_behind(departure.error)


def _id(channel: bytes, side: int) -> str:
    return f"{channel[:2].hex()}-{int.from_bytes(channel[8:], 'little')}/{side}"


def _name(kind: str, channel: bytes, side: int) -> str:
    return f"<{kind} {_id(channel, side)}>"


_WORDS: Final = {
    "closed": "was closed",
    "collected": "was garbage-collected",
    "exited": "ended with its process",
    "died": "died with its process",
    "undeliverable": "could not be delivered to a new holder",
}


def closed_error(end: End) -> PortClosedError:
    rest_if_ending()
    by = f" (process {end.pid})" if end.pid else ""
    if end.broken:
        return PortClosedError(f"the channel is closed: the other end{by} broke its rules: {end.broken}", end.reason)
    return PortClosedError(f"the channel is closed: the other end{by} {_WORDS[end.reason]}", end.reason)


def _look_again(reference: weakref.ref[Endpoint]) -> None:
    port = reference()
    if port is not None:
        port._look_again()


def _exit_code_after(end: End) -> int | None:
    if end.pid is None or end.pid == os.getpid() or end.reason not in ("exited", "died") or end.broken:
        return None
    if not 0 < end.pid < 1 << 31:
        return None  # the other end made it up
    return exit_code(end.pid)


def _settle_from_anywhere(at: Home, future: Any) -> None:
    def settle() -> None:
        if not future.done():
            future.set_result(None)

    if at.here:
        settle()
    else:
        at.call(settle)
