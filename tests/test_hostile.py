"""What the process at the other end could send if it wanted harm: its own channel closes and says why, and nothing
else is touched.
"""

from __future__ import annotations

import fcntl
import os
import random
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mpchannel
from mpchannel import MessageChannel, MessageError, PortClosedError
from mpchannel._kernel import SEAL_SHRINK
from mpchannel._wire import (
    ANNOUNCE,
    ANNOUNCEMENT,
    BODY_IN_MEMORY,
    CARRIER,
    CARRIER_HEAD,
    CLOSE,
    HEADS_UP_PACKET,
    HELD,
    IN_ENVELOPE,
    PROCESS,
)

RECORD = struct.Struct("<Q")
HUGE = 1 << 40


def memory(*parts: bytes, size: int | None = None, seals: int = SEAL_SHRINK) -> int:
    """A memfd with *parts* in it, and then *size* bytes long; the caller's."""
    number = os.memfd_create("hostile", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.write(number, b"".join(parts))
    if size is not None:
        os.ftruncate(number, size)
    os.lseek(number, 0, os.SEEK_SET)
    if seals:
        fcntl.fcntl(number, fcntl.F_ADD_SEALS, seals)
    return number


class Villain:
    """A port's other end, as a bare socket."""

    def __init__(self, port: Any) -> None:
        self.sock = socket.socket(fileno=os.dup(port.fileno()))
        self.sock.setblocking(True)

    def send(self, packet: bytes, *numbers: int, announced: bool = True) -> None:
        """One packet, with copies of *numbers*, which are closed."""
        if numbers and announced:
            self.sock.send(HEADS_UP_PACKET)
        socket.send_fds(self.sock, [packet], list(numbers))
        for number in numbers:
            os.close(number)

    def overflow(self, *parts: bytes, lane: bool = False, **options: Any) -> None:
        """Announce an overflow file with *parts* in it."""
        number = memory(*parts, **options)
        self.send(ANNOUNCEMENT.pack(ANNOUNCE, os.fstat(number).st_ino), number)

    def is_cut_off(self) -> bool:
        try:
            return self.sock.recv(10) == b""
        except ConnectionResetError:  # told once: what it sent was not read
            return self.sock.recv(10) == b""


@pytest.fixture
def villains() -> Iterator[Callable[[Any], Villain]]:
    made: list[Villain] = []

    def make(port: Any) -> Villain:
        made.append(Villain(port))
        return made[-1]

    yield make
    for villain in made:
        villain.sock.close()


def record(packet: bytes, flags: int = 0) -> bytes:
    return RECORD.pack(len(packet) << 2 | flags) + packet


def read_only() -> int:
    number = memory(record(b"\x80\x05K\x07."))
    try:
        return os.open(f"/proc/self/fd/{number}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(number)


BREAKS: dict[str, Callable[[Villain], None]] = {
    "an unknown kind": lambda v: v.send(b"GET / HTTP/1.1\r\n\r\n"),
    "a zero kind": lambda v: v.send(b"\0\0\0\0"),
    "a cut goodbye": lambda v: v.send(bytes([CLOSE])),
    "a cut note": lambda v: v.send(bytes([HELD, 0])),
    "a carrier that was not announced": lambda v: v.send(CARRIER_HEAD.pack(CARRIER, 0, 1, 4) + b"\x80\x05K\x07."),
    "a cut carrier": lambda v: v.send(bytes([CARRIER]), os.open(os.devnull, os.O_RDONLY)),
    "a body that is a device": lambda v: v.send(
        CARRIER_HEAD.pack(CARRIER, BODY_IN_MEMORY, 0, 10), os.open("/dev/zero", os.O_RDONLY)
    ),
    "a body that is a pipe": lambda v: v.send(CARRIER_HEAD.pack(CARRIER, BODY_IN_MEMORY, 0, 10), *os.pipe()),
    "a body that can shrink": lambda v: v.send(
        CARRIER_HEAD.pack(CARRIER, BODY_IN_MEMORY, 0, 1 << 20), memory(bytes(1 << 20), seals=0)
    ),
    "a body that was cut": lambda v: v.send(
        CARRIER_HEAD.pack(CARRIER, BODY_IN_MEMORY, 0, 1 << 20), memory(bytes(1 << 20), size=4096)
    ),
    "a body that was never written": lambda v: v.send(
        CARRIER_HEAD.pack(CARRIER, BODY_IN_MEMORY, 0, HUGE), memory(size=HUGE)
    ),
    "a body larger than anything": lambda v: v.send(
        CARRIER_HEAD.pack(CARRIER, BODY_IN_MEMORY, 0, (1 << 64) - 1), memory(b"x")
    ),
    "no body": lambda v: (v.sock.send(HEADS_UP_PACKET), v.send(CARRIER_HEAD.pack(CARRIER, BODY_IN_MEMORY, 0, 10)))[1],
    "an envelope that is none": lambda v: v.send(
        CARRIER_HEAD.pack(CARRIER, IN_ENVELOPE, 1 << 31, 4) + b"\x80\x05K\x07.", os.open(os.devnull, os.O_RDONLY)
    ),
    "a file that can shrink": lambda v: v.overflow(record(b"\x80\x05K\x07."), seals=0),
    "a file that is a device": lambda v: v.send(ANNOUNCEMENT.pack(ANNOUNCE, 1), os.open("/dev/zero", os.O_RDONLY)),
    "a file for reading only": lambda v: v.send(ANNOUNCEMENT.pack(ANNOUNCE, 1), read_only()),
    "no file": lambda v: (v.sock.send(HEADS_UP_PACKET), v.send(ANNOUNCEMENT.pack(ANNOUNCE, 1)))[1],
    "an empty record": lambda v: v.overflow(record(b"")),
    "an empty record behind a good one": lambda v: v.overflow(record(b"\x80\x05K\x07."), record(b"")),
    "an empty record with a ticket": lambda v: v.overflow(record(bytes(8), 1)),
    "a cut ticket": lambda v: v.overflow(record(b"abc", 1)),
    "a record of no kind": lambda v: v.overflow(record(b"hello")),
    "a cut goodbye in a file": lambda v: v.overflow(record(bytes([CLOSE]))),
    "a cut note in a file": lambda v: v.overflow(record(bytes([HELD]))),
    "a record larger than anything": lambda v: v.overflow(RECORD.pack((1 << 62) - 1 << 2), b"abc"),
    "a record that was never written": lambda v: v.overflow(RECORD.pack((HUGE - 8) << 2), size=HUGE),
}


def wait_by_receive(port: Any) -> str:
    while True:
        try:
            assert port.recv(20) == 7
        except PortClosedError as error:
            return str(error)


def wait_by_listener(port: Any) -> str:
    port.onmessage = lambda event: None
    event = port.wait_closed(20)
    assert event.reason == "died"
    assert not event.was_clean
    return repr(port)


@pytest.mark.parametrize("wait", [wait_by_receive, wait_by_listener])
@pytest.mark.parametrize("what", BREAKS)
def test_what_no_end_of_a_channel_sends_closes_that_channel_alone(
    what: str, wait: Callable[[Any], str], villains: Any
) -> None:
    one, other = MessageChannel()
    with one, other, mpchannel.MessageChannel() as neighbours:
        villain = villains(one)
        neighbours.port1.post_message("before")
        BREAKS[what](villain)
        assert "rules" in wait(other)
        assert other.closed
        neighbours.port1.post_message("after")
        assert [neighbours.port2.recv(20), neighbours.port2.recv(20)] == ["before", "after"]
        assert villain.is_cut_off()


@pytest.mark.parametrize("what", ["a cut goodbye", "a cut note"])
def test_poll_and_wait_closed_see_it_too(what: str, villains: Any) -> None:
    one, other = MessageChannel()
    with one, other:
        villain = villains(one)
        BREAKS[what](villain)
        assert other.poll(20)
        event = other.wait_closed(20)
        assert (event.reason, event.exitcode) == ("died", None)


def test_a_message_that_does_not_load_costs_only_itself(villains: Any) -> None:
    one, other = MessageChannel()
    with one, other:
        villain = villains(one)
        for packet in (b"\x80garbage", b"\x10", b"\x10" + b"\xff" * 30, b"\x11", b"\x80"):
            villain.send(packet)
            with pytest.raises(MessageError):
                other.recv(20)
        one.post_message("good")
        assert other.recv(20) == "good"


@pytest.mark.parametrize("announced", [False, True])
@pytest.mark.parametrize("count", [1, 253])
def test_descriptors_that_nobody_asked_for_are_closed(announced: bool, count: int, villains: Any) -> None:
    one, other = MessageChannel()
    with one, other:
        villain = villains(one)
        before = set(os.listdir("/proc/self/fd"))
        for _ in range(3):
            villain.send(b"\x80\x05K\x07.", *(os.dup(0) for _ in range(count)), announced=announced)
            assert other.recv(20) == 7
        assert set(os.listdir("/proc/self/fd")) <= before  # (what others left open may have closed)
        one.post_message("good")
        assert other.recv(20) == "good"


# What anybody else could find


def names() -> set[str]:
    """Sockets of this process that have a name or listen."""
    with open("/proc/net/unix") as file:
        rows = [line.split() for line in file][1:]
    numbers = [f"/proc/self/fd/{each}" for each in os.listdir("/proc/self/fd")]
    mine = {os.readlink(each) for each in numbers if os.path.islink(each)}
    # A socket that listens has the flag 0x10000.
    return {row[6] for row in rows if f"socket:[{row[6]}]" in mine and (len(row) > 7 or int(row[3], 16) & 0x10000)}


def test_nothing_has_a_name_and_every_descriptor_closes_on_exec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    before, old = names(), set(os.listdir("/proc/self/fd"))
    with MessageChannel() as channel, MessageChannel() as other:
        one, two = channel
        for message in ("small", "x" * 100_000, "y" * 1_000_000):
            for _ in range(8):
                one.post_message(message)
        for _ in range(3000):  # into an overflow file
            one.post_message("z" * 1000)
        one.post_message("port", [other.port1])
        one.post_message(mpchannel.SharedBuffer(10_000))
        kept = [two.receive(20) for _ in range(24 + 3000 + 2)]
        new = [int(fd) for fd in os.listdir("/proc/self/fd") if fd not in old]
        inheritable = [fd for fd in new if os.path.islink(f"/proc/self/fd/{fd}") and os.get_inheritable(fd)]
        assert len(new) > 5
        assert not inheritable
        paths = [os.readlink(f"/proc/self/fd/{fd}") for fd in new if os.path.islink(f"/proc/self/fd/{fd}")]
        assert [path for path in paths if path.startswith("/") and not path.startswith(("/memfd:", "/proc/"))] == []
        assert names() <= before
        assert not os.listdir(tmp_path)
        kept[-2].ports[0].close()
        kept.clear()


def test_mutated_packets_give_a_message_an_error_or_the_end_and_nothing_else(villains: Any) -> None:
    """On a port with a codec, as a mutated pickle might do anything."""
    chance = random.Random(8)
    seeds = [
        b'\x12{"a":[1,2.5,null]}',
        CARRIER_HEAD.pack(CARRIER, BODY_IN_MEMORY, 0, 3),
        ANNOUNCEMENT.pack(ANNOUNCE, 1),
        bytes([CLOSE, 0, 1, 0, 0, 0]),
        bytes([HELD, 0, 1, 0, 0, 0]),
    ]
    for _ in range(1500):
        packet = bytearray(chance.choice(seeds))
        for _ in range(chance.randrange(4)):
            packet[chance.randrange(len(packet))] = chance.choice((0, 1, 4, 0x12, 0x80, 0xFF, chance.randrange(256)))
        del packet[chance.randrange(1, len(packet) + 1) :]
        content = chance.choice((b"\x121", record(packet), record(b"\x121") + packet, packet))
        with MessageChannel(codec="json", max_message_size=10_000) as channel:
            one, other = channel
            villain = villains(one)
            if chance.random() < 0.5:
                villain.send(bytes(packet), memory(content, seals=chance.choice((0, SEAL_SHRINK))))
            else:
                villain.send(bytes(packet))
            for _ in range(3):
                try:
                    mpchannel.receive_message_on_port(other)
                except MessageError:
                    pass
            villain.sock.close()


def test_a_flood_of_notes_ends_nothing_and_holds_up_nobody() -> None:
    near, far = mpchannel.MessageChannel()
    near.post_message("first")
    note = PROCESS.pack(HELD, 0, os.getpid())
    for _ in range(20_000):
        near._link.post_parts((note,), len(note))
    near.post_message("last")
    assert far.recv(10) == "first"
    assert mpchannel.receive_message_on_port(far) is None  # not all of them at once
    assert far.recv(30) == "last"
    near.close()
    far.close()
