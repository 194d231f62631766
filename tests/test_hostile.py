"""An other end that keeps no rule: garbage, lies about lengths, descriptors of the wrong kind or number, files that are
not sealed. It costs a message or its own channel, with a reason; nothing else, and no descriptor.

What it sends goes into the raw socket of the other end: a peer can do no more than that. Small anonymous files stand
for large ones: what must not be allocated is counted, not waited for.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import pickle
import queue
import socket
import struct
import tracemalloc
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import mpchannel
from mpchannel import _clone, _link, _slots, _wire
from mpchannel._kernel import MAX_DESCRIPTORS

from . import fuzz_packets

TIMEOUT = 10
SPARSE = 256 << 20
"""Bytes that a file says it has, and has not."""
FEW = 32 << 20
"""Bytes: much less than ``SPARSE``, and more than is needed to find out."""
SHRINK, GROW, SEALING = fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SEAL
GOOD = pickle.dumps("good")


class Peer:
    """The other end of a channel, in the hands of somebody who knows how packets look."""

    def __init__(self, port: Any) -> None:
        self._port = port  # not used: it would say goodbye when it is collected
        self._sock = port._link._sock
        self._mine: list[int] = []  # descriptors
        self._kept: list[Any] = []

    def send(self, packet: bytes, *descriptors: int) -> None:
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
        self._sock.sendmsg((packet,), control, socket.MSG_DONTWAIT)

    def announced(self, packet: bytes, *descriptors: int) -> None:
        """Behind a heads-up, as what has descriptors should be."""
        self.send(_wire.HEADS_UP_PACKET)
        self.send(packet, *descriptors)

    def own(self, number: int) -> int:
        self._mine.append(number)
        return number

    def file(self, data: bytes = b"", *, size: int | None = None, seals: int = SHRINK) -> int:
        number = self.own(os.memfd_create("hostile", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        os.write(number, data)
        os.lseek(number, 0, os.SEEK_SET)
        if size is not None:
            os.ftruncate(number, size)
        if seals:
            fcntl.fcntl(number, fcntl.F_ADD_SEALS, seals)
        return number

    def pipe(self) -> int:
        reading, writing = os.pipe()
        self.own(writing)
        return self.own(reading)

    def socket(self, kind: int = socket.SOCK_SEQPACKET, *, listening: bool = False) -> int:
        sock = socket.socket(socket.AF_UNIX, kind)
        self._kept.append(sock)
        if listening:
            sock.bind("")  # the kernel gives an abstract name
            sock.listen()
        return sock.fileno()

    def pair(self) -> tuple[socket.socket, socket.socket]:
        ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._kept += ends
        return ends

    def overflow(self, *records: bytes, seals: int = SHRINK, lane: int | None = None, size: int | None = None) -> int:
        number = self.file(b"".join(records), seals=seals, size=size)
        packet = _wire.ANNOUNCEMENT.pack(_wire.ANNOUNCE, os.fstat(number).st_ino)
        self.announced(packet, number, *(() if lane is None else (lane,)))
        return number

    def close(self) -> None:
        for number in self._mine:
            os.close(number)
        for each in self._kept:
            each.close()
        self._mine, self._kept = [], []
        self._port.close()
        self._sock = None  # pytest keeps this object


def record(packet: bytes, *, size: int | None = None, ticket: int | None = None) -> bytes:
    """As an overflow file has it. *size*: what it says."""
    body = packet if ticket is None else struct.pack("<Q", ticket) + packet
    said = len(body) if size is None else size
    return struct.pack("<Q", said << 2 | (ticket is not None)) + body


def carrier(flags: int = 0, count: int = 0, size: int = 0, body: bytes = b"") -> bytes:
    return _wire.CARRIER_HEAD.pack(_wire.CARRIER, flags, count, size) + body


def extended(
    *entries: bytes, buffers: int = 0, count: int | None = None, pickled: bytes = GOOD, size: int | None = None
) -> bytes:
    """A message with transferables. *count*, *size*: what it says."""
    said = len(entries) if count is None else count
    head = _clone._HEAD.pack(_clone._EXTENDED, said, buffers, len(pickled) if size is None else size)
    return b"".join((head, *entries, pickled))


def entry(kind: type[Any], luggage: bytes, descriptors: int = 1, *, size: int | None = None) -> bytes:
    said = len(luggage) if size is None else size
    return _clone._ENTRY.pack(getattr(kind, "_code", 99), descriptors, said) + luggage


def handoff(*, pid: int = 0, expected: int = 0, flags: int = 0, back: int = 0, rest: bytes = b"") -> bytes:
    """What a port travels as."""
    return _wire.HANDOFF.pack(b"not a channel"[:12], 1, pid, expected, flags, back) + rest


def moved(peer: Peer, packet: bytes, *descriptors: int) -> None:
    """A message with transferables, in its carrier."""
    peer.announced(carrier(count=len(descriptors), size=len(packet), body=packet), *descriptors)


Attack = Callable[[Peer], object]
PORT, BUFFER = mpchannel.MessagePort, mpchannel.SharedBuffer
IN_MEMORY, ENVELOPE = _wire.BODY_IN_MEMORY, _wire.IN_ENVELOPE
LARGE = 1 << 20
NONSENSE = 0xFFFFFFFF


def no_slots(peer: Peer, seals: int = SHRINK, size: int = _slots._SIZE, slot: int = 0, said: int = 10) -> None:
    number = peer.file(size=size, seals=seals)
    peer.announced(_slots.HEAD.pack(_slots.SLOT, True, slot, os.fstat(number).st_ino, said), number)


def read_only(peer: Peer, size: int) -> int:
    number = peer.file(bytes(size))
    return peer.own(os.open(f"/proc/self/fd/{number}", os.O_RDONLY | os.O_CLOEXEC))


def no_file_at_all(peer: Peer) -> int:
    return peer.own(os.open("/", os.O_PATH | os.O_CLOEXEC))


def filled_envelope(peer: Peer, packets: int, descriptors: int) -> int:
    near, far = peer.pair()
    for _ in range(packets):
        number = peer.pipe()
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [number] * descriptors))] if descriptors else []
        near.sendmsg((b"+",), control)
    return far.fileno()


def credentials(peer: Peer) -> None:
    """A lane that has its sender's process and user ids come along, which look like descriptors 0 and up."""
    near, far = peer.pair()
    far.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    near.send(struct.pack("<Q", 1))
    peer.overflow(record(carrier(IN_MEMORY, 0, 10), ticket=1), lane=far.fileno())


# What becomes of it: a MessageError in its place.
UNREADABLE: dict[str, Attack] = {
    "a packet of no known kind": lambda peer: peer.send(b"\x42 is no packet"),
    "a packet of one byte": lambda peer: peer.send(b"\x00"),
    "a pickle that is none": lambda peer: peer.send(b"\x80\x05\x00."),
    "a pickle that asks for an argument of another message": lambda peer: peer.send(
        b"\x80\x05cmpchannel._clone\n_arrived\nK\x00\x85R."
    ),
    "a goodbye that is cut": lambda peer: peer.send(bytes([_wire.CLOSE])),
    "news of the holder that are cut": lambda peer: peer.send(bytes([_wire.HELD, 0])),
    "a carrier without a heads-up": lambda peer: peer.send(carrier(size=len(GOOD), body=GOOD), peer.pipe()),
    "a carrier that is cut": lambda peer: peer.announced(bytes([_wire.CARRIER]), peer.pipe()),
    "a body in memory that did not come": lambda peer: peer.announced(carrier(IN_MEMORY, 0, 10)),
    "a body in a pipe": lambda peer: peer.announced(carrier(IN_MEMORY, 0, 10), peer.pipe()),
    "a body in a socket": lambda peer: peer.announced(carrier(IN_MEMORY, 0, 10), peer.socket()),
    "a body in a folder": lambda peer: peer.announced(carrier(IN_MEMORY, 0, 10), no_file_at_all(peer)),
    "a body that could shrink": lambda peer: peer.announced(
        carrier(IN_MEMORY, 0, LARGE), peer.file(GOOD, size=LARGE, seals=0)
    ),
    "a body shorter than announced": lambda peer: peer.announced(carrier(IN_MEMORY, 0, LARGE + 1), peer.file(GOOD)),
    "a body that is longer than there is memory": lambda peer: peer.announced(
        carrier(IN_MEMORY, 0, 2**64 - 1), peer.file(GOOD)
    ),
    "a body that is a hole": lambda peer: peer.announced(carrier(IN_MEMORY, 0, SPARSE), peer.file(GOOD, size=SPARSE)),
    "a body that is read-only": lambda peer: peer.announced(carrier(IN_MEMORY, 0, LARGE), read_only(peer, LARGE)),
    "a body of zeros": lambda peer: peer.announced(carrier(IN_MEMORY, 0, 10), peer.file(bytes(10))),
    "a body of nothing": lambda peer: peer.announced(carrier(IN_MEMORY, 0, 0), peer.file()),
    "an envelope that did not come": lambda peer: peer.announced(carrier(ENVELOPE, 300)),
    "an envelope that is a file": lambda peer: peer.announced(carrier(ENVELOPE, 300), peer.file()),
    "an envelope that listens": lambda peer: peer.announced(carrier(ENVELOPE, 300), peer.socket(listening=True)),
    "an envelope that is connected to nothing": lambda peer: peer.announced(carrier(ENVELOPE, 300), peer.socket()),
    "an empty envelope": lambda peer: peer.announced(carrier(ENVELOPE, 300), filled_envelope(peer, 0, 0)),
    "an envelope of empty packets": lambda peer: peer.announced(carrier(ENVELOPE, 300), filled_envelope(peer, 3, 0)),
    "an envelope that holds too few": lambda peer: peer.announced(carrier(ENVELOPE, 300), filled_envelope(peer, 2, 20)),
    "four billion transferables": lambda peer: moved(peer, extended(count=NONSENSE)),
    "four billion buffers": lambda peer: moved(peer, extended(buffers=NONSENSE)),
    "a pickle beyond the end": lambda peer: moved(peer, extended(pickled=b"", size=2**63)),
    "a head that is cut": lambda peer: moved(peer, extended()[:7]),
    "bytes that are fewer than announced": lambda peer: moved(peer, _clone._RAW_HEAD.pack(_clone._RAW, LARGE)),
    "a transferable of no known kind": lambda peer: moved(peer, extended(entry(object, b"what")), peer.pipe()),
    "a port without a socket": lambda peer: moved(peer, extended(entry(PORT, handoff(), 0))),
    "a port whose socket did not come": lambda peer: moved(peer, extended(entry(PORT, handoff()))),
    "a port of 200 sockets": lambda peer: moved(peer, extended(entry(PORT, handoff(), 200)), peer.pipe()),
    "a port that is cut": lambda peer: moved(peer, extended(entry(PORT, b"short")), peer.pair()[0].fileno()),
    "a port beyond the end": lambda peer: moved(
        peer, extended(entry(PORT, b"", size=NONSENSE)), peer.pair()[0].fileno()
    ),
    "a port that is a pipe": lambda peer: moved(peer, extended(entry(PORT, handoff())), peer.pipe()),
    "a port that listens": lambda peer: moved(peer, extended(entry(PORT, handoff())), peer.socket(listening=True)),
    "a port that is connected to nothing": lambda peer: moved(peer, extended(entry(PORT, handoff())), peer.socket()),
    "a port whose slots did not come": lambda peer: moved(
        peer, extended(entry(PORT, handoff(flags=_wire.SLOTS))), peer.pair()[0].fileno()
    ),
    "a port whose slots are a file": lambda peer: moved(
        peer, extended(entry(PORT, handoff(flags=_wire.SLOTS), 2)), peer.pair()[0].fileno(), peer.file(b"x")
    ),
    "a buffer that could shrink": lambda peer: moved(
        peer, extended(entry(BUFFER, struct.pack("<Q?", 100, False))), peer.file(bytes(100), seals=0)
    ),
    "a buffer larger than it is": lambda peer: moved(
        peer, extended(entry(BUFFER, struct.pack("<Q?", 2**40, False))), peer.file(bytes(100), seals=SHRINK | GROW)
    ),
    "a slot in no memory": lambda peer: peer.send(_slots.HEAD.pack(_slots.SLOT, False, 0, 1, 10)),
    "a slot in memory that did not come": lambda peer: peer.announced(_slots.HEAD.pack(_slots.SLOT, True, 0, 1, 10)),
    "a slot that is cut": lambda peer: peer.announced(bytes([_slots.SLOT, 1])),
    "slots that could shrink": lambda peer: no_slots(peer, seals=0),
    "slots of another size": lambda peer: no_slots(peer, size=4096),
    "a slot behind the last one": lambda peer: no_slots(peer, slot=_slots.COUNT),
    "a slot larger than it is": lambda peer: no_slots(peer, said=2**60),
    "a slot of zeros": no_slots,
    "an overflow file that did not come": lambda peer: peer.announced(_wire.ANNOUNCEMENT.pack(_wire.ANNOUNCE, 1)),
    "an overflow file without a heads-up": lambda peer: peer.send(
        _wire.ANNOUNCEMENT.pack(_wire.ANNOUNCE, 1), peer.file(record(GOOD))
    ),
    "an overflow file that is a pipe": lambda peer: peer.announced(
        _wire.ANNOUNCEMENT.pack(_wire.ANNOUNCE, 1), peer.pipe()
    ),
    "an overflow file that is a folder": lambda peer: peer.announced(bytes([_wire.ANNOUNCE]), no_file_at_all(peer)),
    "an overflow file that could shrink": lambda peer: peer.overflow(record(GOOD), seals=0),
    "an overflow file whose lane is a file": lambda peer: peer.overflow(record(GOOD), lane=peer.file()),
    "an overflow file whose lane listens": lambda peer: peer.overflow(record(GOOD), lane=peer.socket(listening=True)),
    "an overflow file with garbage": lambda peer: peer.overflow(record(b"\x42")),
    "a goodbye that is cut, in an overflow file": lambda peer: peer.overflow(record(bytes([_wire.CLOSE]))),
    "news of the holder that are cut, in an overflow file": lambda peer: peer.overflow(record(bytes([_wire.HELD]))),
    "a carrier that is cut, in an overflow file": lambda peer: peer.overflow(record(bytes([_wire.CARRIER]))),
    "an announcement in an overflow file": lambda peer: peer.overflow(record(bytes([_wire.ANNOUNCE]))),
    "descriptors that are not in the lane": lambda peer: peer.overflow(
        record(carrier(IN_MEMORY, 0, 10), ticket=1), lane=peer.pair()[0].fileno()
    ),
    "descriptors without a lane": lambda peer: peer.overflow(record(carrier(IN_MEMORY, 0, 10), ticket=1)),
    "user ids in place of descriptors": credentials,
}


def many_notes(peer: Peer) -> None:
    note = _wire.PROCESS.pack(_wire.HELD, 0, NONSENSE)
    peer.overflow(*[record(note)] * 20_000)


def beyond_the_end(peer: Peer) -> None:
    number = peer.overflow(record(GOOD))
    os.lseek(number, 1 << 40, os.SEEK_SET)


def strays_in_the_lane(peer: Peer) -> None:
    near, far = peer.pair()
    near.send(b"")  # the end of it, so it seems
    near.send(struct.pack("<Q", 0))
    peer.overflow(record(GOOD, ticket=7), lane=far.fileno())


# What becomes of it: nothing, or messages as good as others.
HARMLESS: dict[str, Attack] = {
    "nothing but heads-ups": lambda peer: [peer.send(_wire.HEADS_UP_PACKET) for _ in range(200)],
    "a nonsensical holder": lambda peer: peer.send(_wire.PROCESS.pack(_wire.HELD, 0, NONSENSE)),
    "20,000 notes in an overflow file": many_notes,
    "heads-ups in an overflow file": lambda peer: peer.overflow(*[record(_wire.HEADS_UP_PACKET)] * 5_000),
    "descriptors that nobody announced": lambda peer: peer.send(GOOD, *[peer.pipe()] * MAX_DESCRIPTORS),
    "a pickle with descriptors": lambda peer: peer.announced(GOOD, *[peer.pipe()] * MAX_DESCRIPTORS),
    "more descriptors than are of use": lambda peer: moved(peer, extended(), *[peer.pipe()] * MAX_DESCRIPTORS),
    "more descriptors with an overflow file": lambda peer: peer.announced(
        _wire.ANNOUNCEMENT.pack(_wire.ANNOUNCE, 1),
        peer.file(record(GOOD)),
        peer.pair()[0].fileno(),
        *[peer.pipe()] * (MAX_DESCRIPTORS - 2),
    ),
    "an overflow file read beyond its end": beyond_the_end,
    "an empty overflow file": lambda peer: peer.overflow(),
    "a torn record at the end of a sealed file": lambda peer: peer.overflow(
        record(GOOD), record(GOOD, size=2**61), seals=SHRINK | GROW
    ),
    "an overflow file that is read-only, and sealed": lambda peer: peer.overflow(
        record(GOOD), seals=SHRINK | GROW | SEALING | fcntl.F_SEAL_WRITE
    ),
    "a message with descriptors in the lane that it does not have": strays_in_the_lane,
}


# What becomes of it: the channel closes, and says why.
CLOSES: dict[str, tuple[Attack, str]] = {
    "an empty packet": (lambda peer: peer.send(b""), "an empty packet"),
    "an empty packet behind a heads-up": (lambda peer: peer.announced(b"", peer.pipe()), "an empty packet"),
    "a goodbye for no known reason": (
        lambda peer: peer.send(_wire.PROCESS.pack(_wire.CLOSE, 255, NONSENSE) + b"\xff" * 1000),
        "could not be delivered",
    ),
    "the death of no process": (
        lambda peer: peer.send(_wire.PROCESS.pack(_wire.CLOSE, _wire.REASONS.index("died"), NONSENSE)),
        "died with its process",
    ),
    "the death of process 0": (
        lambda peer: peer.send(_wire.PROCESS.pack(_wire.CLOSE, _wire.REASONS.index("died"), 0)),
        "died with its process",
    ),
    "an empty record": (lambda peer: peer.overflow(record(b"")), "an empty record"),
    "an empty record behind a good one": (lambda peer: peer.overflow(record(GOOD), record(b"")), "an empty record"),
    "an empty record among 1,000": (
        lambda peer: peer.overflow(*[record(GOOD)] * 500, record(b""), *[record(GOOD)] * 500),
        "an empty record",
    ),
    "an empty record with descriptors": (lambda peer: peer.overflow(record(b"", ticket=1)), "an empty record"),
    "a record too short for its ticket": (
        lambda peer: peer.overflow(record(GOOD), struct.pack("<QI", 4 << 2 | 1, 1), record(GOOD)),
        "an empty record",
    ),
    "an overflow file of zeros": (lambda peer: peer.overflow(bytes(100)), "an empty record"),
    "a record that is a hole": (
        lambda peer: peer.overflow(record(GOOD), record(GOOD, size=SPARSE), size=SPARSE + 1000),
        f"a record of {SPARSE + 8} bytes",
    ),
    "an overflow file that cannot be sealed": (
        lambda peer: peer.overflow(record(GOOD), seals=SHRINK | SEALING),
        "cannot be sealed",
    ),
    "a read-only overflow file": (
        lambda peer: peer.announced(
            _wire.ANNOUNCEMENT.pack(_wire.ANNOUNCE, 1),
            peer.own(os.open(f"/proc/self/fd/{peer.file(record(GOOD))}", os.O_RDONLY | os.O_CLOEXEC)),
        ),
        "cannot be sealed",
    ),
}


@pytest.fixture
def peer(channel: tuple[Any, Any]) -> Iterator[Peer]:
    peer = Peer(channel[0])
    yield peer
    peer.close()


@pytest.fixture
def bystander() -> Iterator[Callable[[], None]]:
    """Another channel of this process, with a listener; call it to see that it goes on."""
    heard: queue.Queue[int] = queue.Queue()
    port1, port2 = mpchannel.MessageChannel()
    port2.onmessage = lambda event: heard.put(event.data)

    def goes_on() -> None:
        for number in range(10):
            port1.post_message(number)
        assert [heard.get(timeout=TIMEOUT) for _ in range(10)] == list(range(10))

    goes_on()
    yield goes_on
    port1.close()
    port2.close()


@contextmanager
def little_memory() -> Iterator[None]:
    """What is taken meanwhile by Python objects is much less than a peer said it sends."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < FEW
    finally:
        tracemalloc.stop()


def table(rows: dict[str, Any]) -> Any:
    return pytest.mark.parametrize("row", rows.values(), ids=rows)


def received(port: Any) -> list[Any]:
    """All until the message "after", or the end: messages, and the kinds of what was none."""
    found: list[Any] = []
    while "after" not in found:
        try:
            found.append(port.recv(TIMEOUT))
        except mpchannel.MessageError:
            found.append(mpchannel.MessageError)
        except mpchannel.PortClosedError as error:
            return [*found, error]
    return found


def listened(port: Any) -> list[Any]:
    """The same, by listeners."""
    heard: queue.Queue[Any] = queue.Queue()
    port.onmessageerror = lambda event: heard.put(mpchannel.MessageError)
    port.onclose = heard.put
    port.onmessage = lambda event: heard.put(event.data)
    found: list[Any] = []
    while "after" not in found and not (found and isinstance(found[-1], mpchannel.CloseEvent)):
        found.append(heard.get(timeout=TIMEOUT))
    port.onmessage = port.onmessageerror = port.onclose = None
    return found


@table(UNREADABLE)
@pytest.mark.parametrize("how", [received, listened])
def test_garbage_becomes_a_message_error_in_its_place(
    channel: tuple[Any, Any], peer: Peer, bystander: Callable[[], None], row: Attack, how: Callable[[Any], list[Any]]
) -> None:
    peer.send(pickle.dumps("before"))
    row(peer)
    peer.send(pickle.dumps("after"))
    with little_memory():
        assert how(channel[1]) == ["before", mpchannel.MessageError, "after"]
    bystander()
    assert channel[1].post_message("still open")


@table(HARMLESS)
@pytest.mark.parametrize("how", [received, listened])
def test_more_than_is_needed_does_no_harm(
    channel: tuple[Any, Any], peer: Peer, bystander: Callable[[], None], row: Attack, how: Callable[[Any], list[Any]]
) -> None:
    row(peer)
    peer.send(pickle.dumps("after"))
    with little_memory():
        found = how(channel[1])
    assert found in (["after"], ["good", "after"])
    bystander()
    assert channel[1].post_message("still open")


@table(CLOSES)
def test_what_cannot_be_passed_over_closes_the_channel_and_says_why(
    channel: tuple[Any, Any], peer: Peer, bystander: Callable[[], None], row: tuple[Attack, str]
) -> None:
    row[0](peer)
    peer.send(pickle.dumps("after"))
    with little_memory():
        *messages, error = received(channel[1])
    assert set(messages) <= {"good"}
    assert isinstance(error, mpchannel.PortClosedError)
    assert row[1] in str(error)
    assert channel[1].closed
    bystander()
    with pytest.raises(OSError, match=r"Broken pipe|reset"):
        peer.send(GOOD)


@table(CLOSES)
def test_a_listener_hears_of_it_as_a_close(
    channel: tuple[Any, Any], peer: Peer, bystander: Callable[[], None], row: tuple[Attack, str]
) -> None:
    row[0](peer)
    *messages, event = listened(channel[1])
    assert set(messages) <= {"good"}
    assert event.type == "close"
    assert not event.was_clean
    assert event.exitcode is None
    bystander()


@table(CLOSES)
def test_waiting_for_the_close_finds_it_too(channel: tuple[Any, Any], peer: Peer, row: tuple[Attack, str]) -> None:
    row[0](peer)
    while mpchannel.receive_message_on_port(channel[1]):
        pass
    event = channel[1].wait_closed(TIMEOUT)
    assert event is not None
    assert not event.was_clean


def test_a_record_that_is_announced_and_does_not_come_holds_nobody_up_and_takes_no_memory(
    channel: tuple[Any, Any], peer: Peer, bystander: Callable[[], None]
) -> None:
    number = peer.overflow(record(GOOD), record(GOOD, size=2**61))
    heard: queue.Queue[Any] = queue.Queue()
    with little_memory():
        channel[1].onclose = heard.put
        channel[1].onmessage = heard.put
        assert heard.get(timeout=TIMEOUT).data == "good"
        bystander()
        assert heard.empty()
        peer.close()
        assert heard.get(timeout=TIMEOUT).reason == "closed"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


@pytest.mark.parametrize("size", [100, LARGE], ids=("read", "mapped"))
def test_a_body_cannot_be_truncated_under_its_reader(channel: tuple[Any, Any], peer: Peer, size: int) -> None:
    body = pickle.dumps(bytes(size))
    number = peer.file(body)
    peer.announced(carrier(IN_MEMORY, 0, len(body)), number)
    with pytest.raises(PermissionError):
        os.ftruncate(number, 0)
    assert channel[1].recv(TIMEOUT) == bytes(size)


def test_a_hole_punched_into_a_body_is_no_bus_error(channel: tuple[Any, Any], peer: Peer) -> None:
    body = bytearray(LARGE)
    packet = extended(
        struct.pack("<Q", LARGE),
        buffers=1,
        count=0,
        pickled=pickle.dumps(pickle.PickleBuffer(body), 5, buffer_callback=lambda _: None),
    )
    packet += bytes(-len(packet) % 64) + b"x" * LARGE
    number = peer.file(packet)
    peer.announced(carrier(IN_MEMORY, 0, len(packet)), number)
    view = channel[1].recv(TIMEOUT)
    assert view[-1] == ord("x")
    libc = ctypes.CDLL(None, use_errno=True)
    punch = 3  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
    assert libc.fallocate(number, punch, ctypes.c_long(0), ctypes.c_long(len(packet))) == 0
    assert view[-1] == 0  # its own peer's doing; and it is there


def test_ports_of_a_message_that_is_a_lie_are_closed(channel: tuple[Any, Any], peer: Peer) -> None:
    mine, theirs = mpchannel.MessageChannel()
    luggage = theirs._link.pack_up()[0]
    moved(peer, extended(entry(PORT, luggage), pickled=b"\x80\x05no pickle"), theirs._link._sock.fileno())
    theirs._link.leave(lambda: mpchannel.PortDetachedError("moved"))
    with pytest.raises(mpchannel.MessageError):
        channel[1].recv(TIMEOUT)
    event = mine.wait_closed(TIMEOUT)
    assert event is not None
    assert event.reason == "undeliverable"


def test_a_port_with_nonsensical_luggage_is_a_port_that_is_of_no_use(channel: tuple[Any, Any], peer: Peer) -> None:
    near, far = peer.pair()
    luggage = handoff(pid=NONSENSE, expected=NONSENSE, back=3, rest=struct.pack("<I", NONSENSE) + b"abc")
    moved(peer, extended(entry(PORT, luggage)), far.fileno())
    (port,) = channel[1].receive(TIMEOUT).ports
    for _ in range(3):
        with pytest.raises(mpchannel.MessageError):
            port.recv(TIMEOUT)
    near.send(GOOD)
    assert port.recv(TIMEOUT) == "good"
    near.close()
    far.close()
    event = port.wait_closed(TIMEOUT)
    assert event is not None
    assert (event.reason, event.exitcode) == ("died", None)


def test_a_peer_that_does_not_stop_sending_notes_holds_up_no_other_port(
    channel: tuple[Any, Any], peer: Peer, bystander: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_link, "_NOTES", 50)
    note = _wire.PROCESS.pack(_wire.HELD, 0, 1)
    look, taken = _link.Link._keep_house, 0

    def and_one_more(self: Any, *packet: Any) -> bool:
        nonlocal taken
        taken += 1
        if taken < 1000:
            peer.send(note)  # there is always one more
        return look(self, *packet)

    monkeypatch.setattr(_link.Link, "_keep_house", and_one_more)
    peer.send(note)
    assert mpchannel.receive_message_on_port(channel[1]) is None
    assert taken < 1000
    assert not channel[1].poll()
    channel[1].onmessage = lambda event: None
    bystander()


# By chance (see fuzz_packets)


@pytest.mark.parametrize("name", fuzz_packets.corpus())
def test_the_corpus_finds_nothing(name: str) -> None:
    with fuzz_packets.no_pickle_loaded():
        fuzz_packets.run_input(fuzz_packets.corpus()[name])


def test_2000_mutations_of_the_corpus_find_nothing_and_come_to_every_outcome() -> None:
    outcomes: Counter[str] = Counter()
    with fuzz_packets.no_pickle_loaded():
        for data in fuzz_packets.mutations(2000):
            try:
                outcomes |= fuzz_packets.run_input(data)
            except BaseException as error:
                raise AssertionError(f"found by {data!r}") from error
    assert min(outcomes["message"], outcomes["bad"], outcomes["port"]) > 0
    assert any("an empty record" in outcome for outcome in outcomes)
    assert any("an empty packet" in outcome for outcome in outcomes)


def test_the_corpus_is_what_its_seeds_are_and_what_was_found() -> None:
    inputs, seeds = fuzz_packets.corpus(), fuzz_packets.seeds()
    assert seeds.keys() <= inputs.keys()
    with fuzz_packets.no_pickle_loaded():
        for name, data in seeds.items():
            assert fuzz_packets.run_input(data).keys() == fuzz_packets.run_input(inputs[name]).keys(), name
