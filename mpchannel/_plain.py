"""Codecs: messages as plain data, for a port whose other end nobody has to trust. No pickle is made or loaded here.

House rule: what is sent arrives unchanged, so what a codec would quietly turn into something else is refused.
"""

from __future__ import annotations

import importlib
import json
from typing import Any, Final, NamedTuple

from .errors import DataCloneError

KINDS: Final = {"json": 0x12, "msgpack": 0x13}
"""The first byte of a packet, by codec."""
LARGEST: Final = 64 << 20
"""Bytes of a message, unless ``max_message_size`` says otherwise."""

_EXACT: Final = (type(None), bool, int, float, str)


class Plain(NamedTuple):
    """What a port with a codec sends and takes."""

    codec: str
    largest: int


def check(codec: Any, largest: Any) -> Plain | None:
    """The arguments of ``MessageChannel``, checked. Raises ``ValueError``, and ``ImportError`` naming the extra."""
    if codec is None:
        if largest is not None:
            raise ValueError('max_message_size needs a codec: MessageChannel(codec="json", max_message_size=...)')
        return None
    if codec not in KINDS:
        raise ValueError(f"codec must be one of {', '.join(map(repr, KINDS))}, or None, not {codec!r}")
    if largest is None:
        largest = LARGEST
    if type(largest) is not int or not 0 < largest < 1 << 47:
        raise ValueError(f"max_message_size must be a positive number of bytes, not {largest!r}")
    _coder(codec)
    return Plain(codec, largest)


def _coder(codec: str) -> Any:
    if codec == "json":
        return json
    try:
        return importlib.import_module("msgspec.msgpack")
    except ImportError as error:
        raise ImportError('codec="msgpack" needs msgspec: pip install "mpchannel[msgpack]"') from error


def encode(plain: Plain, message: Any) -> bytes:
    """The packet. Raises ``DataCloneError`` for what is no plain data, with the path to it, or too large."""
    exact = (*_EXACT, bytes) if plain.codec == "msgpack" else _EXACT
    try:
        _check(message, "message", plain.codec, exact, set())
        if plain.codec == "json":
            data = json.dumps(message, separators=(",", ":")).encode("ascii")
        else:
            data = _coder(plain.codec).encode(message)
    except (RecursionError, OverflowError, ValueError) as error:
        raise DataCloneError(f"message: {error}, with codec={plain.codec!r}") from error
    if len(data) > plain.largest:
        raise DataCloneError(f"message: {len(data)} bytes, and max_message_size is {plain.largest}")
    return bytes((KINDS[plain.codec],)) + data


def _check(value: Any, path: str, codec: str, exact: tuple[type, ...], above: set[int]) -> None:
    kind = type(value)
    if kind in exact:
        return
    if kind is not list and kind is not dict:
        raise DataCloneError(f"{path}: {kind.__name__} is no plain data, which is all that codec={codec!r} sends")
    if id(value) in above:
        raise DataCloneError(f"{path}: contains itself, which codec={codec!r} cannot send")
    above.add(id(value))
    if kind is list:
        for place, part in enumerate(value):
            _check(part, f"{path}[{place}]", codec, exact, above)
    else:
        for key, part in value.items():
            if type(key) is not str:
                raise DataCloneError(f"the key {key!r} of {path}: keys must be str with codec={codec!r}")
            _check(part, f"{path}[{key!r}]", codec, exact, above)
    above.remove(id(value))


def decode(plain: Plain, body: memoryview) -> Any:
    """The message. Raises what decoding raises."""
    data = bytes(body[1:])  # a copy: the sender may still write where it is
    return json.loads(data) if plain.codec == "json" else _coder(plain.codec).decode(data)
