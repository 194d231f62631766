"""Ports with a codec: plain data alone, whoever is at the other end."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mpchannel
from mpchannel import DataCloneError, MessageChannel, MessageError, PortClosedError

from .test_hostile import Villain, memory, record

CODECS = ("json", "msgpack")
MESSAGES: list[Any] = [
    None,
    True,
    0,
    -1.5,
    "",
    "ä\n",
    [],
    {},
    {"a": [1, {"b": None}]},
    "x" * 100_000,
    ["y" * 1_000_000],
]


@pytest.fixture(params=CODECS)
def codec(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def channel(codec: str) -> Iterator[Any]:
    with MessageChannel(codec=codec, max_message_size=2_000_000) as made:
        yield made


def echo(port: Any) -> None:
    for message in port:
        port.post_message([message, port.codec])


def test_plain_data_arrives_unchanged(channel: Any) -> None:
    one, other = channel
    for message in MESSAGES * 2:
        assert one.post_message(message)
        assert other.recv(20) == message
    for message in MESSAGES * 10:  # through an overflow file as well
        one.post_message(message)
    assert [other.receive(20).data for _ in MESSAGES * 10] == MESSAGES * 10


def test_the_codec_goes_with_the_port(channel: Any, codec: str, context: Any) -> None:
    one, other = channel
    carrier, far = MessageChannel()
    with carrier, far:
        carrier.post_message(other, [other])
        moved = far.recv(20)
    assert moved.codec == one.codec == codec
    assert repr(codec) in repr(moved)
    process = context.Process(target=echo, args=(moved,))
    process.start()
    one.post_message({"a": 1})
    assert one.recv(20) == [{"a": 1}, codec]
    one.close()
    process.join(20)
    assert process.exitcode == 0


@pytest.mark.parametrize(
    ("message", "path"),
    [
        ((1, 2), "message: tuple"),
        ({"a": [0, {1}]}, "message['a'][1]: set"),
        ({1: 2}, "the key 1 of message"),
        ([object()], "message[0]: object"),
        ([print], "message[0]: builtin_function_or_method"),
    ],
)
def test_what_is_no_plain_data_is_refused_with_its_path(channel: Any, message: Any, path: str) -> None:
    one, other = channel
    with pytest.raises(DataCloneError) as caught:
        one.post_message(message)
    assert str(caught.value).startswith(path)
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(DataCloneError, match="contains itself"):
        one.send(circle)
    one.post_message("next")
    assert other.recv(20) == "next"


def test_ports_do_not_move_through_it(channel: Any) -> None:
    one, _ = channel
    port, far = MessageChannel()
    with port, far:
        with pytest.raises(DataCloneError, match="moves nothing"):
            one.post_message(None, [port])
        with pytest.raises(DataCloneError, match="MessagePort is no plain data"):
            one.send(port)
        far.post_message("still here")
        assert port.recv(20) == "still here"


def test_a_message_that_is_too_large_is_refused_and_nothing_is_lost(channel: Any) -> None:
    one, other = channel
    with pytest.raises(DataCloneError, match="max_message_size is 2000000"):
        one.post_message("x" * 2_000_000)
    one.post_message("next")
    assert other.recv(20) == "next"


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("way", ["socket", "body", "file", "extended", "listener"])
def test_a_pickle_is_never_loaded(channel: Any, tmp_path: Path, way: str) -> None:
    one, other = channel
    trap = pickle.dumps(Trap(tmp_path / "sprung"), 5)
    villain = Villain(one)
    if way == "body":
        villain.send(mpchannel._wire.CARRIER_HEAD.pack(5, 1, 0, len(trap)), memory(trap))
    elif way == "file":
        villain.overflow(record(trap) * 3)
    elif way == "extended":
        villain.send(mpchannel._clone._HEAD.pack(0x10, 0, 0, len(trap)) + trap)
    else:
        villain.send(trap)
    if way == "listener":
        other.onmessage = print
        assert other.wait_closed(20).reason == "died"
    else:
        with pytest.raises(PortClosedError, match="broke its rules"):
            other.recv(20)
    assert not os.listdir(tmp_path)
    villain.sock.close()


@pytest.mark.parametrize("way", ["socket", "body", "file"])
def test_a_peer_that_exceeds_the_limit_ends_the_channel(codec: str, way: str) -> None:
    with MessageChannel(codec=codec, max_message_size=1000) as channel:
        one, other = channel
        packet = bytes([0x12 if codec == "json" else 0x13]) + b"1" * 1001
        villain = Villain(one)
        if way == "body":
            villain.send(mpchannel._wire.CARRIER_HEAD.pack(5, 1, 0, len(packet)), memory(packet))
        elif way == "file":
            villain.overflow(record(packet))
        else:
            villain.send(packet)
        with pytest.raises(PortClosedError, match=r"100[012]"):
            other.recv(20)
        villain.sock.close()


def test_what_does_not_decode_costs_only_itself(channel: Any, codec: str) -> None:
    one, other = channel
    villain = Villain(one)
    villain.send(bytes([0x12 if codec == "json" else 0x13]) + b"\xc1{")
    with pytest.raises(MessageError):
        other.recv(20)
    one.post_message("next")
    assert other.recv(20) == "next"
    villain.sock.close()


def test_wrong_arguments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="json"):
        MessageChannel(codec="pickle")
    with pytest.raises(ValueError, match="positive"):
        MessageChannel(codec="json", max_message_size=0)
    with pytest.raises(ValueError, match="needs a codec"):
        MessageChannel(max_message_size=1)
    monkeypatch.setitem(sys.modules, "msgspec.msgpack", None)
    with pytest.raises(ImportError, match=r"mpchannel\[msgpack\]"):
        MessageChannel(codec="msgpack")
    with MessageChannel() as channel:
        port, _ = channel
        assert port.codec is None


def test_the_example_of_the_security_page_prints_what_it_says() -> None:
    text = (Path(__file__).parents[1] / "SECURITY.md").read_text()
    code, shown = (text.split(f"```{kind}\n")[1].split("```")[0] for kind in ("python", "text"))
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout == shown
