"""Channels against a small model of what they promise, in all orders that hypothesis thinks of.

The model is a queue per end. Whatever happens to ends (posted to, received from, moved, closed, collected, given to a
process that is killed), after each step every end must be as the model has it, and each receive must give what the
model gives. More examples, and others each time: ``MPCHANNEL_MODEL_EXAMPLES=10000``.
"""

from __future__ import annotations

import gc
import os
import select
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

import mpchannel

pytestmark = pytest.mark.once

Port = mpchannel.MessagePort[Any, Any]

HANG = 20
EXAMPLES = int(os.environ.get("MPCHANNEL_MODEL_EXAMPLES", "0"))
MOST_ENDS = 6  # few, so that much happens to each
BURSTS = ((1, 10), (3, 3000), (2, 70_000), (1, 200_000), (400, 8), (900, 8), (20, 60_000))
"""Messages and their size: small ones, through a slot, through memory, and through the overflow file."""

pick = st.integers(0, 1 << 16)
picks = st.lists(pick, max_size=3)


@pytest.fixture(autouse=True, scope="module")
def no_callbacks_of_hypothesis() -> Iterator[None]:
    """Hypothesis has the collector call it, for good: signal handlers of other tests would raise in there."""
    before = list(gc.callbacks)
    yield
    gc.callbacks[:] = before


@dataclass(eq=False)
class End:
    """What the model knows of an end."""

    name: int
    other: End = None  # type: ignore[assignment]
    inbox: deque[tuple[Any, list[End]]] = field(default_factory=deque)
    """What is queued: messages, and the ends that come with them."""
    port: Port | None = None
    """If it is held in this process."""
    within: End | None = None
    """In whose inbox it is."""
    with_child: bool = False
    gone: frozenset[str] = frozenset()
    """The reasons that its close may have; none: it is open."""


def body_of(number: int, size: int) -> bytes:
    return (number.to_bytes(8, "little") * (size // 8 + 1))[:size]


def obey(control: Port) -> None:
    """A process that holds ends, and does with them what it is told."""
    held: dict[int, Port] = {}
    for kind, name, *what in iter_events(control, held):
        answer = None
        if kind == "post":
            for message in what:
                held[name].post_message(message)
        elif kind == "receive":
            answer = held[name].recv(HANG)
        elif kind == "close":
            held.pop(name).close()
        elif kind == "give back":
            control.post_message(name, [held.pop(name)])
            continue
        control.post_message(answer)


def iter_events(control: Port, held: dict[int, Port]) -> Iterator[Any]:
    while True:
        try:
            event = control.receive()
        except mpchannel.PortClosedError:
            return
        if event.data[0] == "hold":
            (held[event.data[1]],) = event.ports
        del event.ports
        yield event.data


class Channels(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.ends: list[End] = []
        self.numbers = 0
        self.old: deque[Port] = deque(maxlen=3)
        self.child: Any = None
        self.control: Port | None = None

    # What there is

    @property
    def held(self) -> list[End]:
        return [end for end in self.ends if end.port is not None]

    @property
    def lent(self) -> list[End]:
        return [end for end in self.ends if end.with_child]

    def chosen(self, number: int) -> End:
        return self.held[number % len(self.held)]

    def movable(self, by: End, numbers: list[int]) -> list[End]:
        """Some ends that can be posted through an end: not its own channel, and none that it would carry itself."""
        excluded = {by, by.other}
        carrier: End | None = by.other
        while carrier is not None:
            excluded |= {carrier}
            carrier = carrier.within
        # An end whose channel is over was told so only when that was received; until then it moves.
        there = [end for end in self.held if end not in excluded]
        return list(dict.fromkeys(there[number % len(there)] for number in numbers)) if there else []

    def lose(self, end: End, *reasons: str) -> None:
        """The end is no more; with it goes what was queued there."""
        end.gone = frozenset(reasons)
        end.port, end.within, end.with_child = None, None, False
        nested = {"undeliverable"} | ({"died"} if "died" in reasons else set())
        for _, ends in end.inbox:
            for each in ends:
                self.lose(each, *nested)
        end.inbox.clear()
        if end in self.ends:
            self.ends.remove(end)

    def arrived(self, end: End, port: Port) -> None:
        assert not port.started
        assert not port.closed
        end.port, end.within, end.with_child = port, None, False
        if end.other.gone:
            self.await_hang_up(port)

    def await_hang_up(self, port: Port) -> None:
        """The kernel may take its time with what a dead process had."""
        poll = select.poll()
        poll.register(port.fileno(), 0)
        assert poll.poll(HANG * 1000), "the other end is still there"

    def went(self, end: End) -> None:
        assert end.port is not None
        assert end.port.detached
        self.old.append(end.port)
        end.port = None

    # What may happen

    @precondition(lambda self: len(self.ends) < MOST_ENDS)
    @rule()
    def make(self) -> None:
        one, two = End(2 * self.numbers), End(2 * self.numbers + 1)
        self.numbers += 1
        one.other, two.other = two, one
        one.port, two.port = mpchannel.MessageChannel()
        self.ends += (one, two)

    @precondition(lambda self: self.held)
    @rule(which=pick, burst=st.sampled_from(BURSTS))
    def post(self, which: int, burst: tuple[int, int]) -> None:
        self.post_burst(self.chosen(which), *burst)

    def post_burst(self, end: End, count: int, size: int) -> None:
        assert end.port is not None
        for _ in range(count):
            self.numbers += 1
            message = self.numbers, body_of(self.numbers, size)
            overflows = end.port._link._outbox is not None
            # (An overflow file asks only now and then whether its reader lives.)
            assert end.port.post_message(message) is not bool(end.other.gone) or overflows
            if not end.other.gone:
                end.other.inbox.append((message, []))

    @precondition(lambda self: self.held)
    @rule(which=pick, moving=picks, size=st.sampled_from((1, 5000, 300_000)), way=st.sampled_from(("list", "send")))
    def move(self, which: int, moving: list[int], size: int, way: str) -> None:
        """Post some ends."""
        end = self.chosen(which)
        self.post_ends(end, self.movable(end, moving), size, way)

    def post_ends(self, end: End, ends: list[End], size: int, way: str) -> None:
        assert end.port is not None
        ports = [each.port for each in ends]
        self.numbers += 1
        message = self.numbers, body_of(self.numbers, size)
        if way == "list" or end.other.gone:
            overflows = end.port._link._outbox is not None
            assert end.port.post_message(message, ports) is not bool(end.other.gone) or overflows
        else:
            end.port.send((*message, ports))
        del ports
        for each in ends:
            self.went(each)
            if end.other.gone:
                self.lose(each, "undeliverable")
            else:
                each.within = end.other
        if not end.other.gone:
            end.other.inbox.append((message, ends))

    @precondition(lambda self: self.held)
    @rule(which=pick, read=st.sampled_from((0, 1, 300, 600)), carrier=pick)
    def overflow_read_and_move(self, which: int, read: int, carrier: int) -> None:
        """Move an end in the midst of what piled up for it."""
        end = self.chosen(which)
        if end.other.port is None:
            return
        self.post_burst(end.other, 900, 8)
        self.receive_some(end, read, "now")
        carriers = [each for each in self.held if end in self.movable(each, list(range(len(self.held))))]
        if carriers and end.port is not None:
            self.post_ends(carriers[carrier % len(carriers)], [end], 1, "list")

    @precondition(lambda self: self.held)
    @rule(which=pick)
    def move_what_cannot_be(self, which: int) -> None:
        """A post that raises changes nothing."""
        end = self.chosen(which)
        assert end.port is not None
        others = [each.port for each in self.held if each not in (end, end.other)]
        for bad, error in ((end.port, mpchannel.DataCloneError), (None, mpchannel.DataCloneError)):
            with pytest.raises(error):
                end.port.post_message("never", [*others, bad])
        with pytest.raises(mpchannel.DataCloneError):
            end.port.post_message(threading.Lock(), others)

    @precondition(lambda self: self.held)
    @rule(which=pick, count=st.sampled_from((1, 1, 5, 250, 1000)), way=st.sampled_from(("receive", "now", "poll")))
    def receive(self, which: int, count: int, way: str) -> None:
        self.receive_some(self.chosen(which), count, way)

    def receive_some(self, end: End, count: int, way: str) -> None:
        assert end.port is not None
        for _ in range(count):
            if not end.inbox:
                self.receive_nothing(end, way)
                return
            if way == "poll":
                assert end.port.poll()
            event = mpchannel.receive_message_on_port(end.port) if way == "now" else end.port.receive(HANG)
            assert event is not None
            self.check(end, event)

    def check(self, end: End, event: Any) -> None:
        message, ends = end.inbox.popleft()
        assert event.data[:2] == message
        assert len(event.ports) == len(ends)
        if len(event.data) == 3:
            assert all(one is two for one, two in zip(event.data[2], event.ports, strict=True))
        for each, port in zip(ends, event.ports, strict=True):
            self.arrived(each, port)

    def receive_nothing(self, end: End, way: str) -> None:
        port = end.port
        assert port is not None
        if not end.other.gone:
            assert not port.poll()
            assert mpchannel.receive_message_on_port(port) is None
            with pytest.raises(TimeoutError):
                port.receive(0)
            return
        with pytest.raises(mpchannel.PortClosedError) as raised:
            port.receive(HANG)
        assert raised.value.reason in end.other.gone
        event = port.wait_closed(HANG)
        assert event is not None
        assert event.reason == raised.value.reason
        assert port.closed
        assert not port.post_message("to nobody")
        self.lose(end, "told")

    @precondition(lambda self: self.held)
    @rule(which=pick)
    def listen(self, which: int) -> None:
        """A listener hears all that is queued."""
        end = self.chosen(which)
        if end.other.gone:
            return
        assert end.port is not None
        heard: list[Any] = []
        enough, expected = threading.Event(), len(end.inbox)

        def hear(event: Any) -> None:
            heard.append(event)
            if len(heard) >= expected:
                enough.set()

        end.port.onmessage = hear
        assert not expected or enough.wait(HANG)
        end.port.onmessage = None
        assert end.port.started
        assert len(heard) == expected
        for event in heard:
            self.check(end, event)

    @precondition(lambda self: self.held)
    @rule(which=pick)
    def close(self, which: int) -> None:
        end = self.chosen(which)
        port = end.port
        assert port is not None
        port.close()
        port.close()
        assert port.closed
        assert not port.post_message("to nobody")
        with pytest.raises(mpchannel.PortClosedError):
            port.receive(0)
        self.lose(end, "closed")

    @precondition(lambda self: self.held)
    @rule(which=pick, cycle=st.booleans())
    def drop(self, which: int, cycle: bool) -> None:
        end = self.chosen(which)
        if cycle:
            ring: list[Any] = [end.port]
            ring.append(ring)
            del ring
        self.lose(end, "collected")
        gc.collect()

    @precondition(lambda self: self.held)
    @rule()
    def fork(self) -> None:
        """A child inherits no end, and its own end changes nothing."""
        pid = os.fork()
        if not pid:
            code = 1
            try:
                for end in self.held:
                    assert end.port is not None
                    assert end.port.detached
                    end.port.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0

    # Another process

    def told(self, *what: Any, transfer: Any = ()) -> Any:
        """What the child answers."""
        assert self.control is not None
        self.control.post_message(what, transfer)
        return self.control.receive(HANG)

    @precondition(lambda self: self.held and len(self.lent) < 3)
    @rule(which=pick, as_argument=st.booleans())
    def lend(self, which: int, as_argument: bool) -> None:
        end = self.chosen(which)
        if self.child is None:
            self.control, far = mpchannel.MessageChannel()
            self.child = mpchannel.get_context("fork").Process(target=obey, args=(far,))
            self.child.start()
        self.told("hold", end.name, transfer=[end.port])
        self.went(end)
        end.with_child = True

    @precondition(lambda self: self.lent)
    @rule(which=pick, burst=st.sampled_from(BURSTS))
    def let_post(self, which: int, burst: tuple[int, int]) -> None:
        end = self.lent[which % len(self.lent)]
        count, size = burst
        messages = []
        for _ in range(count):
            self.numbers += 1
            messages.append((self.numbers, body_of(self.numbers, size)))
        self.told("post", end.name, *messages)
        if not end.other.gone:
            end.other.inbox += ((message, []) for message in messages)

    @precondition(lambda self: any(end.inbox and not end.inbox[0][1] for end in self.lent))
    @rule(which=pick)
    def let_receive(self, which: int) -> None:
        ready = [end for end in self.lent if end.inbox and not end.inbox[0][1]]
        end = ready[which % len(ready)]
        assert self.told("receive", end.name).data[:2] == end.inbox.popleft()[0]

    @precondition(lambda self: self.lent)
    @rule(which=pick)
    def let_close(self, which: int) -> None:
        end = self.lent[which % len(self.lent)]
        self.told("close", end.name)
        self.lose(end, "closed")

    @precondition(lambda self: self.lent)
    @rule(which=pick)
    def fetch_back(self, which: int) -> None:
        end = self.lent[which % len(self.lent)]
        event = self.told("give back", end.name)
        assert event.data == end.name
        self.arrived(end, *event.ports)

    @precondition(lambda self: self.child is not None)
    @rule()
    def kill(self) -> None:
        lent = self.lent
        self.child.kill()
        self.child.join(HANG)
        self.child.close()
        assert self.control is not None
        event = self.control.wait_closed(HANG)
        assert event is not None
        assert event.reason == "died"
        self.child = self.control = None
        for end in lent:
            self.lose(end, "died")
        for end in self.held:
            if end.other.gone:
                assert end.port is not None
                self.await_hang_up(end.port)

    # What always holds

    @invariant()
    def ends_are_as_the_model_has_them(self) -> None:
        for end in self.held:
            port = end.port
            assert port is not None
            assert not port.closed
            assert not port.detached
            assert port.poll() is bool(end.inbox or end.other.gone)
            if not end.other.gone:
                assert (port.buffered_amount == 0) is (not end.other.inbox)

    @invariant()
    def old_objects_are_of_no_use(self) -> None:
        for port in self.old:
            assert port.detached
            with pytest.raises(mpchannel.PortDetachedError):
                port.post_message("never")
            with pytest.raises(mpchannel.PortDetachedError):
                port.receive(0)

    def teardown(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child.join(HANG)
            self.child.close()
        for end in self.held:
            assert end.port is not None
            end.port.close()
        if self.control is not None:
            self.control.close()
        self.old.clear()
        self.ends.clear()


def test_channels_do_what_a_model_of_queues_does() -> None:
    run_state_machine_as_test(
        Channels,
        settings=settings(
            max_examples=EXAMPLES or 30,
            stateful_step_count=40,
            derandomize=not EXAMPLES,
            phases=(Phase.generate, Phase.shrink) if EXAMPLES else (Phase.generate,),  # shrinking takes minutes
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
