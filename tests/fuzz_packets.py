"""Random packets for a port: ``python -m tests.fuzz_packets --seconds 300`` (guided by coverage; needs ``atheris``).

An input is a list of steps, each one byte (what), two bytes (size), and so many bytes of data:

    what & 3   0  send the data as a packet
               1  send it behind a heads-up, with the descriptors that were made before
               2  announce it as an overflow file (with those descriptors); what >> 2 are seals
               3  make a descriptor of it: what >> 2 says of which kind

Then the port is read until it gives nothing more. It may give messages, ``MessageError`` and ``PortClosedError``; every
other exception, and a descriptor that is left, is a finding. What a *pickle* may do is no affair of this decoder: none
is loaded; a pickle is read to its end, and so are its buffers.

``tests/corpus`` has an input for each kind of packet, and each that found something. Ordinary tests replay it, and some
thousand mutations of it that are the same each time.

    --replay FILE ...   these inputs, and what comes of each
    --write-corpus      the inputs of ``seeds()`` into tests/corpus
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import os
import pickle
import random
import re
import socket
import struct
import sys
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any

import mpchannel
from mpchannel import _clone, _endpoint, _slots, _wire, port

CORPUS = Path(__file__).parent / "corpus"
MOST_STEPS = 64
MOST_MESSAGES = 1000
STEP = struct.Struct("<BH")
PACKET, DESCRIBED, OVERFLOW, DESCRIPTOR = range(4)
SEALED, OPEN, SPARSE, PIPE, LANE, READ_ONLY, SLOTS, LISTENING = range(8)
SHRINK, GROW, SEALING = fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SEAL


# Playing an input


def steps(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    for _ in range(MOST_STEPS):
        if at + STEP.size > len(data):
            return
        what, size = STEP.unpack_from(data, at)
        at += STEP.size + size
        yield what, data[at - size : at]


def memory(data: bytes, *, size: int | None = None, seals: int = SHRINK) -> int:
    number = os.memfd_create("fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.pwrite(number, data, 0)
    if size is not None:
        os.ftruncate(number, size)
    if seals:
        fcntl.fcntl(number, fcntl.F_ADD_SEALS, seals)
    return number


def made(kind: int, data: bytes, left: ExitStack) -> int:
    """A descriptor; *left* closes it, and what belongs to it."""
    if kind == PIPE:
        reading, writing = os.pipe()
        left.callback(os.close, writing)
        number = reading
    elif kind == LANE:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for each in (near, one, two):
            left.enter_context(each)
        for start in range(0, len(data), 8):
            send(near, data[start : start + 8], [two.fileno()])
        number = far.detach()
    elif kind == LISTENING:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.bind("")
        sock.listen()
        number = sock.detach()
    elif kind == READ_ONLY:
        writable = memory(data.ljust(1 << 17, b"\0"))
        number = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
        os.close(writable)
    elif kind == SLOTS:
        number = memory(bytes(_slots.PAGE) + data, size=_slots._SIZE)
    elif kind == SPARSE:
        number = memory(data, size=len(data) + (1 << 20))
    else:
        number = memory(data, seals=SHRINK | GROW if kind == SEALED else 0)
    left.callback(os.close, number)
    return number


def send(sock: Any, packet: bytes, descriptors: Sequence[int] = ()) -> None:
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
    try:
        sock.sendmsg((packet,), control, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except BlockingIOError:
        pass  # full: what came before will do


def play(data: bytes, left: ExitStack, sock: Any) -> None:
    pending: list[int] = []
    for what, piece in steps(data):
        kind, more = what & 3, what >> 2
        if kind == PACKET:
            send(sock, piece)
        elif kind == DESCRIPTOR:
            pending.append(made(more & 7, piece, left))
        else:
            send(sock, _wire.HEADS_UP_PACKET)
            if kind == OVERFLOW:
                seals = SHRINK * (not more & 1) | GROW * (more >> 1 & 1) | SEALING * (more >> 2 & 1)
                number = memory(piece, seals=seals)
                left.callback(os.close, number)
                pending.insert(0, number)
                piece = _wire.ANNOUNCEMENT.pack(_wire.ANNOUNCE, os.fstat(number).st_ino)
            elif piece[:1] == bytes([_slots.SLOT]) and len(piece) >= _slots.HEAD.size and pending:
                head = list(_slots.HEAD.unpack_from(piece))
                head[3] = os.fstat(pending[0]).st_ino  # chance would not find that
                piece = _slots.HEAD.pack(*head)
            send(sock, piece, pending[:250])
            pending.clear()


def read(data: Any, buffers: Any = ()) -> tuple[bytes, list[bytes]]:
    """In place of ``pickle.loads``."""
    found, rest = bytes(data), [bytes(buffer) for buffer in buffers]
    if found[:1] != b"\x80":
        raise pickle.UnpicklingError("no pickle")
    return found, rest


@contextmanager
def no_pickle_loaded() -> Iterator[None]:
    rooms: tuple[Any, ...] = (_clone, _endpoint, port)
    for room in rooms:
        room.loads = read
    try:
        yield
    finally:
        for room in rooms:
            room.loads = pickle.loads


def read_all(port: Any, found: Counter[str]) -> None:
    """All that a port gives, and those that come with it."""
    for number in range(MOST_MESSAGES):
        try:
            if number == 1:
                port.poll()
            event = mpchannel.receive_message_on_port(port) or port.receive(0)
        except mpchannel.MessageError:
            found["bad"] += 1
            continue
        except mpchannel.PortClosedError as error:
            found[re.sub(r"\d+", "N", str(error))] += 1
            return
        except TimeoutError:
            return
        found["message"] += 1
        found["port"] += len(event.ports)
        for each in event.ports:
            if isinstance(each, mpchannel.MessagePort):
                read_all(each, found)
            each.close()


def run_input(data: bytes) -> Counter[str]:
    """What came of it. Raises whatever must not be raised. (Under ``no_pickle_loaded``.)"""
    before = os.listdir("/proc/self/fd")
    found: Counter[str] = Counter()
    with ExitStack() as left:
        port1, port2 = mpchannel.MessageChannel()
        left.callback(port1.close)
        left.callback(port2.close)
        play(data, left, port1._link._sock)
        read_all(port2, found)
    del port1, port2
    if len(os.listdir("/proc/self/fd")) != len(before):
        gc.collect()
        after = os.listdir("/proc/self/fd")
        assert len(after) <= len(before), f"descriptors left: {set(after) - set(before)}"
    return found


# Inputs


def step(what: int, data: bytes = b"", more: int = 0) -> bytes:
    return STEP.pack(what | more << 2, len(data)) + data


def seeds() -> dict[str, bytes]:
    """One input for each kind of packet, by name."""
    good, head = pickle.dumps("good"), _wire.CARRIER_HEAD.pack
    port1, port2 = mpchannel.MessageChannel()
    luggage = port1._link.pack_up()[0]
    port1.close()
    port2.close()

    def record(packet: bytes, flag: int = 0, size: int | None = None) -> bytes:
        return struct.pack("<Q", (len(packet) if size is None else size) << 2 | flag) + packet

    def extended(transferables: int, buffers: int, *parts: bytes) -> bytes:
        return _clone._HEAD.pack(_clone._EXTENDED, transferables, buffers, len(good)) + b"".join(parts) + good

    def entry(code: int, descriptors: int, data: bytes) -> bytes:
        return _clone._ENTRY.pack(code, descriptors, len(data)) + data

    moving = extended(1, 0, entry(mpchannel.MessagePort._code, 1, luggage))
    with_slots = luggage[:21] + struct.pack("<BH", _wire.SLOTS, 1) + struct.pack("<I", len(good)) + good
    buffered = extended(0, 1, struct.pack("<Q", 3))
    buffered += bytes(-len(buffered) % 64) + b"abc"
    shared = extended(1, 0, entry(mpchannel.SharedBuffer._code, 1, struct.pack("<Q?", 3, False)))
    slot = _slots.HEAD.pack(_slots.SLOT, True, 0, 0, 20)
    ticket = struct.pack("<Q", 1)
    return {
        "pickle": step(PACKET, good),
        "raw": step(PACKET, _clone._RAW_HEAD.pack(_clone._RAW, 3) + b"abc"),
        "buffers": step(PACKET, buffered),
        "close": step(PACKET, good) + step(PACKET, _wire.PROCESS.pack(_wire.CLOSE, 0, 1) + b"why"),
        "held": step(PACKET, _wire.PROCESS.pack(_wire.HELD, 0, 1)) + step(PACKET, good),
        "empty": step(PACKET, b""),
        "port": step(DESCRIPTOR, b"", LANE) + step(DESCRIBED, head(_wire.CARRIER, 0, 1, len(moving)) + moving),
        "port-with-messages": step(DESCRIPTOR, good, LANE)
        + step(DESCRIPTOR, good, SLOTS)
        + step(
            DESCRIBED,
            head(_wire.CARRIER, 0, 2, 0) + extended(1, 0, entry(mpchannel.MessagePort._code, 2, with_slots)),
        ),
        "buffer": step(DESCRIPTOR, b"abc", SEALED) + step(DESCRIBED, head(_wire.CARRIER, 0, 1, len(shared)) + shared),
        "body": step(DESCRIPTOR, good, SEALED)
        + step(DESCRIBED, head(_wire.CARRIER, _wire.BODY_IN_MEMORY, 0, len(good))),
        "body-sparse": step(DESCRIPTOR, good, SPARSE)
        + step(DESCRIBED, head(_wire.CARRIER, _wire.BODY_IN_MEMORY, 0, 1 << 20)),
        "body-read-only": step(DESCRIPTOR, good, READ_ONLY)
        + step(DESCRIBED, head(_wire.CARRIER, _wire.BODY_IN_MEMORY, 0, 1 << 17)),
        "envelope": step(DESCRIPTOR, b"+" * 8, LANE)
        + step(DESCRIBED, head(_wire.CARRIER, _wire.IN_ENVELOPE, 1, len(moving)) + moving),
        "envelope-listening": step(DESCRIPTOR, b"", LISTENING)
        + step(DESCRIBED, head(_wire.CARRIER, _wire.IN_ENVELOPE, 1, len(moving)) + moving),
        "slot": step(DESCRIPTOR, good, SLOTS) + step(DESCRIBED, slot),
        "overflow": step(OVERFLOW, record(good) * 3 + record(_wire.HEADS_UP_PACKET)) + step(PACKET, good),
        "overflow-open": step(OVERFLOW, record(good), 1) + step(PACKET, good),
        "overflow-torn": step(OVERFLOW, record(good) + record(good, size=1 << 40), 2) + step(PACKET, good),
        "overflow-empty-record": step(OVERFLOW, record(good) + record(b"") + record(good)),
        "overflow-no-seals": step(OVERFLOW, record(good), 4),
        "overflow-lane": step(DESCRIPTOR, ticket, LANE)
        + step(OVERFLOW, record(ticket + head(_wire.CARRIER, 0, 1, len(moving)) + moving, 1)),
        "overflow-close": step(OVERFLOW, record(_wire.PROCESS.pack(_wire.CLOSE, 1, 1))),
    }


def corpus() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(CORPUS.iterdir())}


INTERESTING = (0, 1, 2, 3, 4, 5, 6, 0x10, 0x11, 0x7F, 0x80, 0xFF)


def mutated(data: bytes, others: Sequence[bytes], dice: random.Random) -> bytes:
    """Some bytes of it changed, left out, put in, or followed by another input."""
    found = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(found) + 1)
        choice = dice.randrange(6)
        if choice == 0 and at < len(found):
            found[at] = dice.randrange(256)
        elif choice == 1 and at < len(found):
            found[at] = dice.choice(INTERESTING)
        elif choice == 2:
            size = dice.choice((2, 4, 8))
            found[at : at + size] = dice.choice((b"\xff", b"\x00")) * size
        elif choice == 3:
            del found[at : at + dice.randint(1, 8)]
        elif choice == 4:
            found[at:at] = dice.randbytes(dice.randint(1, 8))
        else:
            found += dice.choice(others)
    return bytes(found)


def mutations(count: int, seed: int = 8) -> Iterator[bytes]:
    """The same *count* inputs each time."""
    dice, inputs = random.Random(seed), list(corpus().values())
    for number in range(count):
        yield mutated(inputs[number % len(inputs)], inputs, dice)


# By hand


def fuzz(seconds: int) -> None:
    import atheris

    for room in [each for name, each in sys.modules.items() if name.startswith("mpchannel.")]:
        for thing in tuple(vars(room).values()):
            for function in (thing, *vars(thing).values()) if isinstance(thing, type) else (thing,):
                if isinstance(function, FunctionType) and function.__module__ == room.__name__:
                    atheris.instrument_func(function)
    found = tempfile.mkdtemp(prefix="fuzz-packets-")
    print(f"new inputs and findings: {found}")
    options = (
        f"-max_total_time={seconds}",
        f"-artifact_prefix={found}/finding-",
        "-rss_limit_mb=1024",
        "-max_len=4096",
    )

    def one(data: bytes) -> None:
        run_input(data)

    with no_pickle_loaded():
        atheris.Setup([sys.argv[0], found, str(CORPUS), *options, "-timeout=10", "-print_final_stats=1"], one)
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_packets", description="Random packets for a port.")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument(
        "--random", type=int, metavar="SEED", help="without atheris: mutations by chance, from this seed"
    )
    parser.add_argument("--replay", nargs="+", metavar="FILE")
    parser.add_argument("--write-corpus", action="store_true")
    options = parser.parse_args()
    if options.write_corpus:
        CORPUS.mkdir(exist_ok=True)
        for name, data in seeds().items():
            (CORPUS / name).write_bytes(data)
    elif options.replay:
        with no_pickle_loaded():
            for name in options.replay:
                print(name, dict(run_input(Path(name).read_bytes())))
    elif options.random is not None:
        until, count = time.monotonic() + options.seconds, 0
        with no_pickle_loaded():
            for data in mutations(sys.maxsize, options.random):
                try:
                    run_input(data)
                except BaseException:
                    print(f"after {count} inputs: {data!r}")
                    raise
                count += 1
                if time.monotonic() > until:
                    break
        print(f"{count} inputs, nothing found")
    else:
        fuzz(options.seconds)


if __name__ == "__main__":
    main()
