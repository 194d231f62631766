"""A storm: ``python -m tests.storm [--seed N] [--seconds S] [--processes P]`` prints its figures; 1 if any is bad.

Some processes post, receive and hand over the ends of channels at random, close and drop them, fork, and lend them to
short-lived processes of their own; meanwhile others of them are killed, stopped and interrupted (Ctrl-C). What counts
messages is no participant's memory but a ledger in memory that all of them share, so that it outlives whoever is
killed. Per end of a channel it says how many posts began and succeeded there, how many messages were taken, who holds
it and where it is going. Messages are numbered, so each receive checks order, loss and doubling; when a channel closes,
the last holder checks that everything posted at the other end was taken, and the reason; and at the end of the storm
everything that is still on its way is brought home, and every end must be accounted for.

    begun >= posted                                      taken
    the poster writes them around post_message           the receiver writes it behind receive
         taken == posted, up to begun: who was killed in a post may or may not have posted

An interrupt may leave a post undecided: it is done again with the same number, and the other side accepts that number
once more. An interrupt in the loading of a message with ports or buffers may cost this message (``receive`` says so);
that is *given up*, and no loss. All decisions follow from the seed; when what happens is up to the system.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import pickle
import random
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import IntEnum, auto
from typing import Any

import mpchannel
from mpchannel._recycle import give_back

Port = mpchannel.MessagePort[Any, Any]

PACKAGE = os.path.dirname(os.path.abspath(mpchannel.__file__))
PATIENCE = 60
"""Seconds after which a process that says nothing hangs."""
CHANNELS = 10
"""That there are at a time."""
CHANNELS_A_SECOND = 40
LARGEST = 50_000_000
LUGGAGE = ("port", "shared", "moved")
"""Kinds of messages that carry more than bytes."""


# The ledger


class End(IntEnum):
    """What it says of one end of a channel."""

    BEGUN = 0
    POSTED = auto()
    PLAIN = auto()  # posts from this number on were messages with luggage
    TAKEN = auto()
    HOLDER = auto()  # generation of the process that has it
    BOUND_FOR = auto()  # generation of the process that it is being handed to
    HOPS_BEGUN = auto()
    HOPS_POSTED = auto()
    HOPS_ARRIVED = auto()
    LEFT = auto()  # how its holder parted with it
    LENT = auto()  # 1: its holder gave it to a process that ends by itself


class Left(IntEnum):
    NOT = 0
    CLOSED = auto()
    COLLECTED = auto()
    TOLD = auto()  # it received the close of the other end


class Life(IntEnum):
    """What it says of one process."""

    KILLED = 0
    ALIVE = auto()  # counts on while it lives
    MESSAGES = auto()
    BYTES = auto()
    RECEIVED = auto()
    HANDOVERS = auto()
    INTERRUPTS = auto()
    FINALISERS = auto()  # interrupts that came in one
    FORKS = auto()
    SOJOURNS = auto()
    AGAIN = auto()
    GIVEN_UP = auto()
    REFUSED = auto()
    LOSSES = auto()
    DOUBLES = auto()
    REORDERINGS = auto()
    DAMAGES = auto()


_FIELDS = 20


class Ledger:
    """Shared by all processes; each number is written by one of them at a time."""

    def __init__(self, buffer: mpchannel.SharedBuffer, channels: int) -> None:
        self.buffer = buffer
        self.channels = channels
        self._numbers: Any = memoryview(buffer).cast("q")

    @classmethod
    def create(cls, channels: int, lives: int) -> Ledger:
        return cls(mpchannel.SharedBuffer((2 * channels + lives) * _FIELDS * 8), channels)

    def __reduce__(self) -> Any:
        return Ledger, (self.buffer, self.channels)

    def end(self, name: int, side: int) -> Any:
        at = (2 * name + side) * _FIELDS
        return self._numbers[at : at + _FIELDS]

    def life(self, generation: int) -> Any:
        at = (2 * self.channels + generation) * _FIELDS
        return self._numbers[at : at + _FIELDS]

    def killed(self, generation: int) -> bool:
        return bool(self.life(generation)[Life.KILLED])

    def may_be_dead(self, end: Any) -> bool:
        """Whether the end may have gone with a process that was killed."""
        moving = end[End.HOPS_BEGUN] > end[End.HOPS_ARRIVED]
        return self.killed(end[End.HOLDER]) or (moving and self.killed(end[End.BOUND_FOR]))

    def must_be_dead(self, end: Any) -> bool:
        """Whether nobody can have it any more."""
        if end[End.LEFT]:
            return True
        if end[End.HOPS_BEGUN] > end[End.HOPS_ARRIVED]:
            return self.killed(end[End.BOUND_FOR])
        return self.killed(end[End.HOLDER])

    def accounted_for(self, end: Any) -> bool:
        """Whether it is known where an end went that nobody brought home."""
        if self.must_be_dead(end):
            return True
        # Its holder may have been killed before the handover was posted.
        return end[End.HOPS_POSTED] < end[End.HOPS_BEGUN] and self.killed(end[End.HOLDER])

    def close(self) -> None:
        self._numbers.release()
        self.buffer.close()


# Those who play


@dataclass
class Juggled:
    """An end on its travels: what its next holder must know."""

    name: int
    side: int
    attempt: int = 0  # posts of the next number that were interrupted
    accepted: int = 0  # which attempt the last message taken was
    interrupted: int = 0  # receives since then
    missing: tuple[int, ...] = ()


@dataclass
class Held:
    state: Juggled
    port: Port


def body_of(number: int, size: int) -> bytes:
    return (number.to_bytes(8, "little") * (size // 8 + 1))[:size]


_interruptible = [False]


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C counts in this block: what it interrupts in our own lines would be our own loss."""
    _interruptible[0] = True
    try:
        yield
    finally:
        _interruptible[0] = False


class Player:
    """A process of the storm, or one that it lends an end to."""

    def __init__(self, generation: int, ledger: Ledger, tell: Port, seed: str, largest: int) -> None:
        self.generation = generation
        self.ledger = ledger
        self.life = ledger.life(generation)
        self.tell = tell
        self.dice = random.Random(seed)
        self.largest = largest
        self.held: list[Held] = []

    def fail(self, what: Life | None, text: str) -> None:
        if what is not None:
            self.life[what] += 1
        self.tell.post_message(("failure", f"process {self.generation}: {text}"))

    # Posting

    def post(self, held: Held) -> bool:
        """Post the next message. ``False`` if the channel is over, or cannot take more now."""
        state, port = held.state, held.port
        end = self.ledger.end(state.name, state.side)
        waiting = port.buffered_amount
        kind, size = self._choose(waiting)
        if waiting > 8_000_000 or (size > 1_000_000 and waiting):
            return False
        number = end[End.POSTED]
        transfer: list[Any] = []
        body: Any = body_of(number, size)
        if kind == "buffer":
            body = pickle.PickleBuffer(bytearray(body))
        elif kind == "port":
            near, far = mpchannel.MessageChannel()
            near.post_message(number)
            near.close()
            transfer = [far]
        elif kind in ("shared", "moved"):
            body = mpchannel.SharedBuffer.from_buffer(body)
            transfer = [body] if kind == "moved" else []
        message = (number, state.attempt, end[End.PLAIN], kind, size, body)
        end[End.BEGUN] = number + 1
        try:
            with interruptible():
                accepted = port.post_message(message, transfer)
        except KeyboardInterrupt:
            state.attempt += 1
            return True
        except OSError:
            self.life[Life.REFUSED] += 1  # too many descriptors in flight, for one: nothing was posted
            return False
        if not accepted:
            return False
        if kind not in LUGGAGE:
            end[End.PLAIN] = number + 1
        end[End.POSTED] = number + 1
        state.attempt = 0
        self.life[Life.MESSAGES] += 1
        self.life[Life.BYTES] += size
        return True

    def _choose(self, waiting: int) -> tuple[str, int]:
        chance = self.dice.random()
        if chance < 0.06 and waiting < 50_000:
            return self.dice.choice(LUGGAGE), self.dice.choice((10, 5000, 300_000))
        kind = "buffer" if chance > 0.9 else "plain"
        place = self.dice.random()
        if place < 0.8:
            return kind, self.dice.randrange(10, 3000)
        if place < 0.97:
            return kind, self.dice.randrange(3000, 200_000)
        if place < 0.997:
            return kind, self.dice.randrange(200_000, 4_000_000)
        return kind, self.dice.randrange(1_000_000, self.largest)

    # Taking

    def take(self, held: Held) -> bool:
        """Take a message. ``False`` if there is none, or the channel is over."""
        try:
            with interruptible():
                if self.dice.random() < 0.5:
                    event = mpchannel.receive_message_on_port(held.port)
                    if event is None and held.port.closed:
                        held.port.receive()  # says why
                else:
                    event = held.port.receive(0)
        except KeyboardInterrupt:
            held.state.interrupted += 1
            return True
        except TimeoutError:
            return False
        except mpchannel.PortClosedError as error:
            self.told(held, str(error.reason))
            return False
        except mpchannel.MessageError as error:
            self.fail(Life.DAMAGES, f"{held.state}: {error!r}")
            return True
        if event is None:
            return False
        self.accept(held, event)
        return True

    def accept(self, held: Held, event: Any) -> None:
        state = held.state
        number, attempt, plain, kind, size, body = event.data
        end = self.ledger.end(state.name, state.side)
        taken = end[End.TAKEN]
        if number == taken - 1 and attempt > state.accepted:
            state.accepted = attempt  # the same again, as its poster could not know whether it was posted
            self.life[Life.AGAIN] += 1
        elif number in state.missing:
            state.missing = tuple(each for each in state.missing if each != number)
            self.life[Life.LOSSES] -= 1
            self.fail(Life.REORDERINGS, f"{state}: {number} came behind {taken - 1}")
        elif number < taken:
            self.fail(Life.DOUBLES, f"{state}: {number} came again behind {taken - 1}, attempt {attempt}")
        else:
            if number > taken and plain <= taken and number - taken <= state.interrupted:
                self.life[Life.GIVEN_UP] += number - taken
            elif number > taken:
                self.life[Life.LOSSES] += number - taken
                state.missing += tuple(range(taken, min(number, taken + 1000)))
                self.fail(None, f"{state}: {number} came behind {taken - 1}; none is missing from {plain} on")
            end[End.TAKEN] = number + 1
            state.accepted, state.interrupted = attempt, 0
            self.life[Life.RECEIVED] += 1
        expected = body_of(number, size)
        try:
            good = bytes(body) == expected and len(event.ports) == (kind == "port")
            for port in event.ports:
                good = good and list(port) == [number]
        except (mpchannel.ChannelError, OSError, ValueError) as error:
            good = False
            self.fail(None, repr(error))
        if not good:
            self.fail(Life.DAMAGES, f"{state}: {number} of kind {kind} came with {len(bytes(body))} of {size} bytes")

    def told(self, held: Held, reason: str) -> None:
        """The close of the other end was received: was everything else received before?"""
        state = held.state
        mine, other = self.ledger.end(state.name, state.side), self.ledger.end(state.name, 1 - state.side)
        lost = other[End.POSTED] - mine[End.TAKEN]
        if lost > 0 and other[End.PLAIN] <= mine[End.TAKEN] and lost <= state.interrupted:
            self.life[Life.GIVEN_UP] += lost
        elif lost > 0:
            self.life[Life.LOSSES] += lost
            self.fail(None, f"{state}: {lost} of {other[End.POSTED]} messages did not come before {reason!r}")
        if mine[End.TAKEN] > other[End.BEGUN]:
            self.fail(Life.DOUBLES, f"{state}: {mine[End.TAKEN]} messages came, and {other[End.BEGUN]} were posted")
        reasons = {Left.CLOSED: {"closed"}, Left.COLLECTED: {"collected"}}.get(other[End.LEFT], set())
        if self.ledger.may_be_dead(other):
            reasons = reasons | {"died", "undeliverable"} | ({"exited"} if other[End.LENT] else set())
        if reason not in reasons:
            self.fail(Life.DAMAGES, f"{state}: the other end is {reason!r}, and not {reasons}: {list(other)}")
        mine[End.LEFT] = Left.TOLD
        self.held.remove(held)
        self.tell.post_message(("over", state.name))

    def arrived(self, state: Juggled, port: Port) -> None:
        end = self.ledger.end(state.name, state.side)
        end[End.HOLDER] = self.generation
        end[End.HOPS_ARRIVED] = end[End.HOPS_BEGUN]
        self.held.append(Held(state, port))

    def burst(self, held: Held) -> None:
        if self.dice.random() < 0.5:
            for _ in range(self.dice.choice((1, 5, 30, 300))):
                if not self.post(held):
                    break
        else:
            for _ in range(self.dice.choice((1, 5, 30, 600))):
                if not self.take(held):
                    break


class Process(Player):
    """One of those that may be killed at any moment."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.mesh: dict[int, Port] = {}
        self.stopped = False
        self.finished = False
        self.forked: list[int] = []
        near, self.far_fence = mpchannel.MessageChannel()
        self.fence_passed = threading.Event()
        self.far_fence.onmessage = lambda event: self.fence_passed.set()
        self.fence = near
        self.pass_fence()
        self.descriptors = len(os.listdir("/proc/self/fd"))

    def pass_fence(self) -> None:
        """Wait until listeners that were running have returned."""
        self.fence_passed.clear()
        self.fence.post_message(None)
        if not self.fence_passed.wait(PATIENCE):
            self.fail(None, "listeners do not run")

    def run(self) -> None:
        while not self.finished:
            self.life[Life.ALIVE] += 1
            doors = [self.tell, *self.mesh.values()]
            for door in doors:
                while (event := mpchannel.receive_message_on_port(door)) is not None:
                    self.hear(*event.data, event.ports)
            if self.tell.closed:
                return
            self.mesh = {generation: port for generation, port in self.mesh.items() if not port.closed}
            self.reap()
            if self.stopped or not self.held:
                del doors[:]
                mpchannel.wait([self.tell, *self.mesh.values()], 0.05)
            else:
                self.play()

    def hear(self, kind: str, what: Any, ports: Sequence[Port]) -> None:
        if kind == "end":
            self.arrived(what, *ports)
        elif kind == "peer":
            (self.mesh[what],) = ports
        elif kind == "stop":
            self.stopped = True
            self.tell.post_message(("stopped", None))
        elif kind == "settle":
            self.settle()

    def play(self) -> None:
        held = self.dice.choice(self.held)
        chance = self.dice.random()
        if chance < 0.80:
            self.burst(held)
        elif chance < 0.92:
            self.hand_over(held)
        elif chance < 0.94:
            self.listen(held)
        elif chance < 0.955:
            self.part(held, Left.CLOSED)
        elif chance < 0.97:
            self.part(held, Left.COLLECTED)
        elif chance < 0.98:
            gc.collect()
        elif chance < 0.992:
            self.fork()
        else:
            self.lend(held)

    def hand_over(self, held: Held) -> None:
        if not self.mesh:
            return
        generation = self.dice.choice(list(self.mesh))
        end = self.ledger.end(held.state.name, held.state.side)
        hop = end[End.HOPS_BEGUN] + 1
        end[End.BOUND_FOR] = generation
        end[End.HOPS_BEGUN] = hop
        try:
            with interruptible():
                self.mesh[generation].post_message(("end", held.state), [held.port])
        except KeyboardInterrupt:
            pass
        except (mpchannel.DataCloneError, OSError):
            self.life[Life.REFUSED] += 1  # it is closed, or an interrupted message must be received first
        if held.port.detached:
            end[End.HOPS_POSTED] = max(hop, end[End.HOPS_POSTED])
            self.held.remove(held)
            self.life[Life.HANDOVERS] += 1
        else:
            end[End.HOPS_BEGUN] = hop - 1

    def listen(self, held: Held) -> None:
        """Let a listener take what comes for a while."""
        heard: deque[Any] = deque()
        bad: deque[Any] = deque()
        held.port.onmessageerror = bad.append
        held.port.onmessage = heard.append
        time.sleep(self.dice.random() * 0.003)
        held.port.onmessage = None
        held.port.onmessageerror = None
        self.pass_fence()
        for event in heard:
            self.accept(held, event)
        for event in bad:
            self.fail(Life.DAMAGES, f"{held.state}: {event}")

    def part(self, held: Held, how: Left) -> None:
        self.ledger.end(held.state.name, held.state.side)[End.LEFT] = how
        self.held.remove(held)
        if how is Left.CLOSED:
            held.port.close()
        else:
            cycle: list[Any] = [held.port]
            cycle.append(cycle)
            held.port = None  # type: ignore[assignment]
            del cycle
            gc.collect()

    def fork(self) -> None:
        """A child that was given nothing and stays a while: it must not hold any end."""
        seconds = self.dice.random() * 0.05
        self.life[Life.FORKS] += 1
        pid = os.fork()
        if not pid:
            code = 1
            try:
                code = 0 if all(each.port.detached for each in self.held if not each.port.closed) else 2
                time.sleep(seconds)
            finally:
                os._exit(code)
        self.forked.append(pid)

    def reap(self, *, wait: bool = False) -> None:
        for pid in tuple(self.forked):
            ended, status = os.waitpid(pid, 0 if wait else os.WNOHANG)
            if ended:
                self.forked.remove(pid)
                if status:
                    self.fail(None, f"a forked child ended with {status}")

    def lend(self, held: Held) -> None:
        """Give the end to a process that plays with it and sends it back."""
        if held.port.closed:
            return
        self.life[Life.SOJOURNS] += 1
        home, away = mpchannel.MessageChannel()
        arguments = (self.generation, self.ledger, away, repr(self.dice.random()), self.largest, held.state, held.port)
        # (Ours: the standard library's cannot be refused; a port that cannot go stays here, and stderr tells.)
        process = mpchannel.get_context("fork").Process(target=sojourn, args=arguments)
        end = self.ledger.end(held.state.name, held.state.side)
        end[End.LENT] = 1
        try:
            process.start()
        except mpchannel.ChannelError:  # closed, or an interrupted message must be received first
            end[End.LENT] = 0
            self.life[Life.REFUSED] += 1
            return
        self.held.remove(held)
        try:
            while True:
                event = home.receive(PATIENCE)
                kind, what = event.data
                if kind == "end":
                    end[End.LENT] = 0
                    self.held.append(Held(what, *event.ports))
                else:
                    self.tell.post_message((kind, what))
        except mpchannel.PortClosedError:
            pass
        except TimeoutError:
            self.fail(None, f"{held.state} does not come back from {process}")
        process.join()
        if process.exitcode:
            self.fail(None, f"{process} ended with {process.exitcode}")
        process.close()

    def settle(self) -> None:
        """Everybody has stopped: bring home what is held and what is queued in the mesh, and look for leaks."""
        while self.mesh:
            _, port = self.mesh.popitem()
            while (event := mpchannel.receive_message_on_port(port)) is not None:
                self.hear(*event.data, event.ports)
            port.close()
            del port, event
        self.reap(wait=True)
        while self.held:
            held = self.held.pop()
            if held.port.closed:
                self.held.append(held)
                self.take(held)  # the close
            else:
                end = self.ledger.end(held.state.name, held.state.side)
                end[End.BOUND_FOR], end[End.HOPS_BEGUN] = 0, end[End.HOPS_BEGUN] + 1
                try:
                    self.tell.post_message(("end", held.state), [held.port])
                except mpchannel.DataCloneError:  # an interrupted message must be received first, or it just closed
                    end[End.HOPS_BEGUN] -= 1
                    self.held.append(held)
                    self.take(held)
                else:
                    end[End.HOPS_POSTED] = end[End.HOPS_BEGUN]
            del held
        give_back(all_of_it=True)
        deadline = time.monotonic() + 5
        while True:
            gc.collect()
            leaked = len(os.listdir("/proc/self/fd")) - self.descriptors
            if leaked <= 0 or time.monotonic() > deadline:
                break
            time.sleep(0.01)
        if leaked > 0:
            kinds = [os.readlink(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd")[:-1]]
            self.fail(None, f"{leaked} descriptors more than at the beginning: {kinds}")
        self.finished = True
        self.tell.post_message(("settled", max(0, leaked)))
        self.tell.wait_closed(PATIENCE)


def sojourn(generation: int, ledger: Ledger, home: Port, seed: str, largest: int, state: Juggled, port: Port) -> None:
    """The life of a process that an end is lent to."""
    player = Player(generation, ledger, home, seed, largest)
    held = Held(state, port)
    player.held.append(held)
    for _ in range(player.dice.randrange(4)):
        if held in player.held:
            player.burst(held)
    if held in player.held:
        if port.closed:
            player.take(held)
        else:
            try:
                home.post_message(("end", state), [port])
            except mpchannel.DataCloneError:
                player.take(held)  # it closed this very moment


def work(generation: int, ledger: Ledger, tell: Port, seed: str, largest: int, lifeline: Any) -> None:
    """The life of a process of the storm. *lifeline* is held open until it ends, and by all that it forks."""
    faulthandler.register(signal.SIGUSR1)
    life = ledger.life(generation)

    def interrupt(_: int, frame: Any) -> None:
        if _interruptible[0] and frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
            life[Life.INTERRUPTS] += 1
            while frame is not None:
                life[Life.FINALISERS] += frame.f_code.co_name == "__del__"
                frame = frame.f_back
            raise KeyboardInterrupt

    def unraisable(details: Any) -> None:
        # An interrupt may come in a finaliser, and between opening a file and the block that closes it.
        if not isinstance(details.exc_value, (KeyboardInterrupt, ResourceWarning)):
            tell.post_message(("failure", f"process {generation}: {details.exc_value!r} in {details.object!r}"))

    sys.unraisablehook = unraisable
    signal.signal(signal.SIGINT, interrupt)
    tell.post_message(("ready", None))
    try:
        Process(generation, ledger, tell, seed, largest).run()
    except BaseException:  # noqa: BLE001 (it is told)
        tell.post_message(("failure", f"process {generation}: {traceback.format_exc()}"))
    assert lifeline is not None


# Who conducts


@dataclass
class Figures:
    """What came of it."""

    seed: int
    processes: int
    seconds: float = 0
    channels: int = 0
    messages: int = 0
    bytes: int = 0
    received: int = 0
    handovers: int = 0
    kills: int = 0
    stops: int = 0
    interrupts: int = 0
    finalisers: int = 0
    forks: int = 0
    sojourns: int = 0
    again: int = 0
    given_up: int = 0
    refused: int = 0
    losses: int = 0
    doubles: int = 0
    reorderings: int = 0
    damages: int = 0
    leaked_descriptors: int = 0
    leaked_processes: int = 0
    leaked_memory: int = 0
    failures: list[str] = field(default_factory=list)

    BAD = (
        *("losses", "doubles", "reorderings", "damages"),
        *("leaked_descriptors", "leaked_processes", "leaked_memory", "failures"),
    )

    @property
    def bad(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.BAD if getattr(self, name)}

    def __str__(self) -> str:
        lines = []
        for name, value in asdict(self).items():
            if name != "failures":
                lines.append(f"{name.replace('_', ' '):20} {value:>16,.0f}" if name != "seed" else f"seed {value}")
        return "\n".join([*lines, *self.failures])


class Storm:
    def __init__(self, seed: int, processes: int, seconds: float, method: str, largest: int) -> None:
        if method != "fork":  # helpers that stay
            multiprocessing.resource_tracker.ensure_running()
            multiprocessing.forkserver.ensure_running()
        self.figures = Figures(seed, processes)
        self.memory, self.descriptors = shared_memory(), len(os.listdir("/proc/self/fd"))
        self.dice = random.Random(seed)
        self.seconds = seconds
        self.context = mpchannel.get_context(method)
        self.largest = largest
        channels, lives = int(100 + CHANNELS_A_SECOND * (seconds + 10)), int(100 + 10 * (seconds + 10))
        self.most_channels, self.most_lives = channels, lives
        self.ledger = Ledger.create(channels, lives)
        self.running: dict[int, tuple[Any, Port]] = {}
        self.generation = 0
        self.live: set[int] = set()
        self.stopped: dict[int, float] = {}
        self.seen: dict[int, tuple[int, float]] = {}
        self.home: dict[tuple[int, int], Held] = {}

    # Processes

    def start(self, lifeline: Any) -> None:
        self.generation += 1
        generation = self.generation
        ours, theirs = mpchannel.MessageChannel()
        arguments = (generation, self.ledger, theirs, f"{self.figures.seed}/{generation}", self.largest, lifeline)
        process = self.context.Process(target=work, args=arguments)
        process.start()
        if ours.recv(PATIENCE) != ("ready", None):
            raise AssertionError("it must say that it is ready first")
        for other, (_, control) in self.running.items():
            near, far = mpchannel.MessageChannel()
            control.post_message(("peer", generation), [near])
            ours.post_message(("peer", other), [far])
        self.running[generation] = process, ours

    def kill(self) -> None:
        generation = self.dice.choice(list(self.running))
        process, control = self.running.pop(generation)
        self.ledger.life(generation)[Life.KILLED] = 1
        process.kill()
        process.join(PATIENCE)
        if process.exitcode != -signal.SIGKILL:
            self.figures.failures.append(f"process {generation} ended with {process.exitcode}, not by SIGKILL")
        self.figures.kills += 1
        self.stopped.pop(generation, None)
        self.listen(generation, control)  # what it said before
        control.close()
        process.close()
        for name in tuple(self.live):  # nobody is left to say that these are over
            if all(self.ledger.must_be_dead(self.ledger.end(name, side)) for side in (0, 1)):
                self.live.discard(name)

    def signal(self, generation: int, number: int) -> None:
        os.kill(self.running[generation][0].pid, number)

    def listen(self, generation: int, control: Port) -> Iterator[tuple[str, Any]]:
        """All that a process says, but what is dealt with here."""
        said = []
        while (event := mpchannel.receive_message_on_port(control)) is not None:
            kind, what = event.data
            if kind == "failure":
                self.figures.failures.append(what)
            elif kind == "over":
                self.live.discard(what)
            elif kind == "end":
                self.home[what.name, what.side] = Held(what, *event.ports)
            else:
                said.append((kind, what))
        if control.closed and not self.ledger.killed(generation):
            self.figures.failures.append(f"process {generation} ended by itself")
            self.running.pop(generation, None)
        return iter(said)

    def give_channel(self) -> None:
        name = self.figures.channels
        self.figures.channels += 1
        self.live.add(name)
        for side, port in enumerate(mpchannel.MessageChannel()):
            generation = self.dice.choice(list(self.running))
            end = self.ledger.end(name, side)
            end[End.BOUND_FOR], end[End.HOPS_BEGUN] = generation, 1
            self.running[generation][1].post_message(("end", Juggled(name, side)), [port])
            end[End.HOPS_POSTED] = 1

    # The storm itself

    def rage(self) -> Figures:
        figures = self.figures
        reader, lifeline = multiprocessing.Pipe(duplex=False)
        began = time.monotonic()
        try:
            for _ in range(figures.processes):
                self.start(lifeline)
            self.conduct(began, lifeline)
            figures.seconds = time.monotonic() - began
            if not figures.failures:
                self.bring_home()
        finally:
            for process, control in self.running.values():
                control.close()
                if figures.failures:
                    process.kill()
                process.join(PATIENCE)
                if process.exitcode is None:
                    figures.failures.append(f"{process} does not end")
                    process.kill()
                    process.join()
                process.close()
        lifeline.close()
        if not reader.poll(10):  # end of file: nobody has the other end
            figures.leaked_processes = count_holders(os.readlink(f"/proc/self/fd/{reader.fileno()}")) - 1
        reader.close()
        self.add_up()
        self.running.clear()
        self.home.clear()
        self.ledger.close()
        give_back(all_of_it=True)
        gc.collect()
        figures.leaked_descriptors += max(0, len(os.listdir("/proc/self/fd")) - self.descriptors)
        figures.leaked_memory = memory_left(self.memory)
        return figures

    def conduct(self, began: float, lifeline: Any) -> None:
        until = began + self.seconds
        next_kill, next_stop, next_channel = (began + self.dice.random() for _ in range(3))
        while (now := time.monotonic()) < until and not self.figures.failures:
            for control in mpchannel.wait([control for _, control in self.running.values()], 0.005):
                for generation, (_, each) in tuple(self.running.items()):
                    if each is control:
                        for kind, _ in self.listen(generation, control):
                            self.figures.failures.append(f"process {generation} says {kind!r}")
            if now > next_channel and len(self.live) < CHANNELS and self.figures.channels < self.most_channels:
                next_channel = now + 1 / CHANNELS_A_SECOND
                self.give_channel()
            if now > next_kill and self.generation < self.most_lives - 1:
                next_kill = now + self.dice.expovariate(2)
                self.kill()
                self.start(lifeline)
            if now > next_stop:
                next_stop = now + self.dice.expovariate(8)
                generation = self.dice.choice(list(self.running))
                if generation not in self.stopped:
                    self.signal(generation, signal.SIGSTOP)
                    self.stopped[generation] = now + self.dice.random() * 0.2
                    self.figures.stops += 1
            for generation, when in tuple(self.stopped.items()):
                if now > when:
                    del self.stopped[generation]
                    self.signal(generation, signal.SIGCONT)
            for generation in self.running:
                if self.dice.random() < 0.5:
                    self.signal(generation, signal.SIGINT)
            self.watch(now)
        for generation in self.stopped:
            self.signal(generation, signal.SIGCONT)

    def watch(self, now: float) -> None:
        """Find who hangs."""
        for generation in self.running:
            count = self.ledger.life(generation)[Life.ALIVE]
            before, since = self.seen.get(generation, (-1, now))
            if count != before or generation in self.stopped:
                self.seen[generation] = count, now
            elif now - since > PATIENCE:
                self.signal(generation, signal.SIGUSR1)  # to say where
                time.sleep(1)
                self.figures.failures.append(f"process {generation} hangs")

    # Its end

    def ask(self, question: str, answer: str) -> dict[int, Any]:
        """What each process answers."""
        answers: dict[int, Any] = {}
        for _, control in self.running.values():
            control.post_message((question, None))
        deadline = time.monotonic() + PATIENCE
        while len(answers) < len(self.running) and not self.figures.failures:
            for generation, (_, control) in tuple(self.running.items()):
                for kind, what in self.listen(generation, control):
                    if kind == answer:
                        answers[generation] = what
            if time.monotonic() > deadline:
                for generation in set(self.running) - set(answers):
                    self.figures.failures.append(f"process {generation} does not answer to {question!r}")
                    self.signal(generation, signal.SIGUSR1)
                time.sleep(1)
            mpchannel.wait([control for _, control in self.running.values()], 0.05)
        return answers

    def bring_home(self) -> None:
        """Everybody stops and sends home what he has: is it all that there must be?"""
        self.ask("stop", "stopped")
        self.figures.leaked_descriptors += sum(self.ask("settle", "settled").values())
        if self.figures.failures:
            return
        ours, ears = mpchannel.MessageChannel()
        player = Player(0, self.ledger, ours, "home", self.largest)
        for held in self.home.values():
            player.arrived(held.state, held.port)
        for held in self.home.values():
            while player.take(held):
                pass
        for held in tuple(player.held):  # those whose other end is here as well, or went without a word
            here, other = (self.ledger.end(held.state.name, side) for side in (held.state.side, 1 - held.state.side))
            if (held.state.name, 1 - held.state.side) not in self.home:
                self.await_close(player, held)
            elif here[End.TAKEN] < other[End.POSTED]:
                lost = other[End.POSTED] - here[End.TAKEN]
                if other[End.PLAIN] <= here[End.TAKEN] and lost <= held.state.interrupted:
                    self.figures.given_up += lost
                else:
                    self.figures.losses += lost
                    self.figures.failures.append(f"{held.state}: {lost} of {other[End.POSTED]} messages are lost")
            elif here[End.TAKEN] > other[End.BEGUN]:
                self.figures.doubles += 1
                self.figures.failures.append(f"{held.state}: {list(here)} took more than was posted: {list(other)}")
        for name in range(self.figures.channels):
            for side in (0, 1):
                end = self.ledger.end(name, side)
                if (name, side) not in self.home and not self.ledger.accounted_for(end):
                    self.figures.losses += 1
                    self.figures.failures.append(f"channel {name}, side {side} is lost: {list(end)}")
        for held in self.home.values():
            held.port.close()
        while (event := mpchannel.receive_message_on_port(ears)) is not None:
            if event.data[0] == "failure":
                self.figures.failures.append(event.data[1])
        ours.close()

    def await_close(self, player: Player, held: Held) -> None:
        """The other end is gone: its close must come."""
        deadline = time.monotonic() + PATIENCE
        while held in player.held:
            mpchannel.wait([held.port], 1)
            player.take(held)
            if time.monotonic() > deadline:
                self.figures.failures.append(f"{held.state}: the close of the other end did not come")
                return

    def add_up(self) -> None:
        figures = self.figures
        for generation in range(self.generation + 1):
            life = self.ledger.life(generation)
            for each in Life:
                if each not in (Life.KILLED, Life.ALIVE):
                    name = each.name.lower()
                    setattr(figures, name, getattr(figures, name) + life[each])


def shared_memory() -> int:
    """Bytes of memory of this kind in the whole system."""
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Shmem:"))


def memory_left(before: int) -> int:
    """Bytes of shared memory that are there now and were not *before*; others on this system may have some as well."""
    deadline = time.monotonic() + 5
    while (more := shared_memory() - before) > 1 << 20 and time.monotonic() < deadline:
        time.sleep(0.05)
    return max(0, more) if more > 1 << 20 else 0


def count_holders(pipe: str) -> int:
    """How many processes have a pipe open."""
    count = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            count += any(os.readlink(f"/proc/{pid}/fd/{each}") == pipe for each in os.listdir(f"/proc/{pid}/fd"))
        except OSError:
            continue  # it ended, or is not ours
    return count


def rage(seed: int, seconds: float, processes: int, method: str = "fork", largest: int = LARGEST) -> Figures:
    """Let a storm rage; its figures."""
    return Storm(seed, processes, seconds, method, largest).rage()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.storm", description="Let a storm rage.")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--processes", type=int, default=6, choices=range(4, 9))
    parser.add_argument("--method", default="fork", choices=("fork", "spawn", "forkserver"))
    parser.add_argument("--largest", type=int, default=LARGEST, help="bytes of a message")
    chosen = parser.parse_args(arguments)
    print(f"seed {chosen.seed}", flush=True)
    figures = rage(chosen.seed, chosen.seconds, chosen.processes, chosen.method, chosen.largest)
    print(figures)
    return 1 if figures.bad else 0


if __name__ == "__main__":
    from tests import storm  # under the name that its children find it by

    sys.exit(storm.main())
