"""``MessageChannel(codec=...)``: messages that are plain data, from a side that may send anything."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import json
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

import mpchannel
from mpchannel._clone import _EXTENDED, _HEAD, _RAW, _RAW_HEAD

from . import codec_children
from .children import running

HANG = 30
CODECS = ("json", "msgpack")

Pair = tuple[Any, Any]


@pytest.fixture(params=CODECS)
def pair(request: pytest.FixtureRequest) -> Any:
    channel: Any = mpchannel.MessageChannel(codec=request.param)
    yield channel.port1, channel.port2
    channel.port1.close()
    channel.port2.close()


PLAIN = [
    None,
    True,
    -7,
    2.5,
    "text with \u00e9 and \U0001f40d",
    [],
    {},
    [1, [2, {"a": [None]}]],
    {"id": 4711, "nested": {"path": "/usr", "list": [1.5, "x"]}},
    "x" * 100_000,
    ["y" * 1000] * 1000,
    "z" * 3_000_000,
]


@pytest.mark.parametrize("message", PLAIN, ids=lambda each: str(each)[:20])
def test_plain_data_arrives_as_it_was(pair: Pair, message: Any) -> None:
    pair[0].post_message(message)
    assert pair[1].recv(HANG) == message
    pair[1].send(message)
    assert pair[0].receive(HANG).data == message


def test_msgpack_has_bytes_and_numbers_as_keys() -> None:
    with mpchannel.MessageChannel(codec="msgpack") as channel:
        channel.port1.post_message({1: b"\x80\x05.", "a": bytes(100_000)})
        assert channel.port2.recv(HANG) == {1: b"\x80\x05.", "a": bytes(100_000)}


def test_a_tuple_arrives_as_a_list_and_later_changes_are_not_seen(pair: Pair) -> None:
    message = [(1, 2)]
    pair[0].post_message(message)
    message.append((3, 4))
    assert pair[1].recv(HANG) == [[1, 2]]


def test_many_messages_keep_their_order_also_in_overflow(pair: Pair) -> None:
    for number in range(5000):
        pair[0].post_message([number, "x" * (number % 300)])
    assert [pair[1].recv(HANG)[0] for _ in range(5000)] == list(range(5000))


class Colour(enum.IntEnum):
    RED = 1


@dataclasses.dataclass
class Point:
    x: int


class Text(str):
    __slots__ = ()


def itself() -> Any:
    message: list[Any] = []
    message.append(message)
    return message


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"a": [1, {2, 3}]}, r"message\['a'\]\[1\]: a set is no plain data"),
        ([Point(1)], r"message\[0\]: a Point is no plain data"),
        (Colour.RED, "message: a Colour is no plain data"),
        ([Text("x")], r"message\[0\]: a Text is no plain data"),
        ({"a": {None: 1}}, r"message\['a'\]: the key None is a NoneType; keys must be str"),
        (object(), "message: a object is no plain data"),
        (itself(), "contains itself"),
        ([2**70, "\ud800"], "message"),
    ],
)
def test_what_is_not_plain_is_refused_with_its_path_and_nothing_is_sent(pair: Pair, message: Any, words: str) -> None:
    if pair[0].codec == "json" and words == "message":
        pytest.skip("JSON has numbers of any size")
    with pytest.raises(mpchannel.DataCloneError, match=words):
        pair[0].post_message(message)
    assert not pair[1].poll()
    pair[0].post_message("next")
    assert pair[1].recv(HANG) == "next"


def test_json_keys_are_texts() -> None:
    with (
        mpchannel.MessageChannel(codec="json") as channel,
        pytest.raises(mpchannel.DataCloneError, match="key 1 is a int"),
    ):
        channel.port1.post_message({1: 2})


def test_every_way_of_receiving(pair: Pair) -> None:
    ours, theirs = pair
    for number in range(6):
        ours.post_message({"n": number})
    assert theirs.recv(HANG) == {"n": 0}
    assert theirs.receive(HANG).data == {"n": 1}
    assert next(theirs) == {"n": 2}
    event = mpchannel.receive_message_on_port(theirs)
    assert event is not None
    assert event.data == {"n": 3}
    assert asyncio.run(theirs.arecv()) == {"n": 4}
    got: list[Any] = []
    done = threading.Event()

    def note(event: Any) -> None:
        got.append(event.data)
        done.set()

    theirs.onmessage = note
    assert done.wait(HANG)
    assert got == [{"n": 5}]
    theirs.onmessage = None
    ours.post_message("text")
    decode = json.loads if ours.codec == "json" else msgspec.msgpack.decode
    assert decode(theirs.recv_bytes()) == "text"


def test_it_says_what_it_is(pair: Pair) -> None:
    assert pair[0].codec == pair[1].codec
    assert pair[0].codec in CODECS
    assert pair[0].max_message_size == 64 << 20
    assert isinstance(pair[0], mpchannel.MessagePort)
    with mpchannel.MessageChannel() as channel:
        assert channel.port1.codec is None
        assert channel.port1.max_message_size is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"codec": "pickle"}, "codec must be one of 'json', 'msgpack', or None, not 'pickle'"),
        ({"codec": ["json"]}, "codec must be one of"),
        ({"codec": "json", "max_message_size": 0}, "max_message_size must be a positive number of bytes"),
        ({"codec": "json", "max_message_size": "1"}, "max_message_size must be"),
        ({"max_message_size": 100}, "max_message_size needs a codec"),
    ],
)
def test_bad_options(options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mpchannel.MessageChannel(**options)


def test_without_msgspec_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from mpchannel import _plain

    monkeypatch.setattr(_plain, "_codecs", {})
    monkeypatch.setitem(__import__("sys").modules, "msgspec.msgpack", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mpchannel\[msgpack\]'"):
        mpchannel.MessageChannel(codec="msgpack")


# Moving


def test_both_ends_keep_their_codec_in_other_processes(context: Any) -> None:
    ours, theirs = mpchannel.MessageChannel(codec="json", max_message_size=1000)
    with running(context.Process(target=codec_children.tell_codec_and_echo, args=(theirs,))):
        assert ours.recv(HANG) == ["json", 1000]
        ours.post_message({"a": 1})
        assert ours.recv(HANG) == {"a": 1}
        ours.close()


def test_ports_with_a_codec_go_along(pair: Pair) -> None:
    with mpchannel.MessageChannel(codec="json") as inner, mpchannel.MessageChannel() as other:
        inner.port1.post_message(["queued"])
        pair[0].post_message({"a": "port"}, [inner.port2])
        event = pair[1].receive(HANG)
        assert event.data == {"a": "port"}
        (arrived,) = event.ports
        assert arrived.codec == "json"
        assert arrived.recv(HANG) == ["queued"]
        with pytest.raises(mpchannel.DataCloneError, match=r"transfer\[0\] is .* only ports with a codec may go along"):
            pair[0].post_message("x", [other.port2])
        assert not other.port2.detached
        with pytest.raises(mpchannel.DataCloneError, match=r"message\['port'\]: .* list it in transfer"):
            pair[0].post_message({"port": other.port2}, [])
        arrived.close()


def test_a_port_with_a_codec_may_go_through_one_without() -> None:
    with mpchannel.MessageChannel() as plain:
        inner = mpchannel.MessageChannel(codec="json", max_message_size=10)
        plain.port1.post_message([inner.port2], [inner.port2])
        (arrived,) = plain.port2.recv(HANG)
        assert (arrived.codec, arrived.max_message_size) == ("json", 10)
        inner.port1.post_message("x")
        assert arrived.recv(HANG) == "x"
        inner.port1.close()
        arrived.close()


# A side that does not keep to it


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def hostile_packets(path: Path) -> dict[str, bytes]:
    trap = pickle.dumps(Trap(path), 5)
    return {
        "a pickle": trap,
        "a pickle as raw bytes": _RAW_HEAD.pack(_RAW, len(trap)) + trap,
        "a pickle with heads": _HEAD.pack(_EXTENDED, 0, 0, len(trap)) + trap,
        "a pickle with a buffer": _HEAD.pack(_EXTENDED, 0, 1, len(trap)) + (8).to_bytes(8, "little") + trap + bytes(72),
        "no JSON": _RAW_HEAD.pack(_RAW, 3) + b"{,}",
        "cut off": _RAW_HEAD.pack(_RAW, 100) + b"[1",
        "deep": _RAW_HEAD.pack(_RAW, 200_000) + b"[" * 200_000,
        "garbage": bytes(range(0x20, 0x60)),
        "lies about ports": _HEAD.pack(_EXTENDED, 1 << 31, 0, 3) + b"[1]",
    }


@pytest.mark.parametrize("kind", hostile_packets(Path("x")))
@pytest.mark.parametrize("receive", ["recv", "recv_bytes", "listener", "large"])
def test_nothing_that_arrives_is_unpickled(pair: Pair, kind: str, receive: str, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    packet = hostile_packets(trap)[kind]
    if receive == "large":
        packet = packet + bytes(300_000)
    hostile, ours = pair
    hostile._link.post_parts((packet,), len(packet))
    hostile.post_message("a good one")
    if receive == "listener":
        errors: list[type] = []  # not the errors: the frames of their tracebacks hold the socket
        done = threading.Event()
        ours.onmessageerror = lambda event: errors.append(type(event.error))
        ours.onmessage = lambda event: done.set() if event.data == "a good one" else None
        assert done.wait(HANG)
        assert errors == [mpchannel.MessageError]
    elif receive == "recv_bytes":
        try:
            ours.recv_bytes()  # bytes are only bytes
        except mpchannel.MessageError:
            pass
        assert ours.recv(HANG) == "a good one"
    else:
        with pytest.raises(mpchannel.MessageError):
            ours.recv(HANG)
        assert ours.recv(HANG) == "a good one"
    assert not trap.exists()


def test_a_port_without_a_codec_that_is_pushed_through_is_closed(pair: Pair) -> None:
    """What the other side says of the port that it sends is not believed."""
    hostile, ours = pair
    inner = mpchannel.MessageChannel()
    data = b'["a port"]' if hostile.codec == "json" else msgspec.msgpack.encode(["a port"])
    hostile._move(data, [inner.port2], "posted")
    hostile.post_message("a good one")
    with pytest.raises(mpchannel.MessageError, match="a port with a codec does not take"):
        ours.recv(HANG)
    assert ours.recv(HANG) == "a good one"
    closed = inner.port1.wait_closed(HANG)
    assert closed is not None
    assert closed.reason == "undeliverable"


def test_a_buffer_that_is_pushed_through_is_refused(pair: Pair) -> None:
    hostile, ours = pair
    hostile._move(b"[1]", [mpchannel.SharedBuffer(100)], "posted")
    with pytest.raises(mpchannel.MessageError, match="a port with a codec does not take"):
        ours.recv(HANG)


# Size


def test_a_message_above_the_limit_is_refused_by_its_sender() -> None:
    with mpchannel.MessageChannel(codec="json", max_message_size=100) as channel:
        channel.port1.post_message("x" * 98)
        with pytest.raises(mpchannel.DataCloneError, match="it takes 101 bytes, and max_message_size is 100"):
            channel.port1.post_message("x" * 99)
        assert channel.port2.recv(HANG) == "x" * 98
        assert not channel.port2.poll()


@pytest.mark.parametrize("size", [200, 100_000, 5 << 20, 256 << 20], ids=["small", "slot", "memory", "huge"])
@pytest.mark.parametrize("behind", [False, True], ids=["socket", "overflow"])
def test_one_that_comes_nevertheless_is_not_read(size: int, behind: bool, memory_to_itself: None) -> None:
    with mpchannel.MessageChannel(codec="json", max_message_size=100) as channel:
        hostile, ours = channel
        queued = 1000 if behind else 0
        for number in range(queued):
            hostile.post_message(number)
        data = bytes(1 << 20)
        parts = [_RAW_HEAD.pack(_RAW, size), *[data] * (size >> 20), data[: size & 0xFFFFF]]
        hostile._link.post_parts(parts, _RAW_HEAD.size + size)
        hostile.post_message("a good one")
        assert [ours.recv(HANG) for _ in range(queued)] == list(range(queued))
        before = resident_peak()
        with pytest.raises(mpchannel.MessageError, match=r"has \d.* bytes, and max_message_size is 100") as caught:
            ours.recv(HANG)
        assert resident_peak() - before < 64 << 20
        assert len(caught.value.packet) < 300_000
        assert ours.recv(HANG) == "a good one"


def resident_peak() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) * 1024
