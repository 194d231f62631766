"""Ports whose messages are plain data only: what arrives is parsed, never unpickled, whatever the other side sends.

For a worker that runs code you do not trust. Its end has the codec as well, but what counts is that ours has: a codec
belongs to an end and goes with it wherever that moves, and a port that comes through such an end must have one too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple, final

from ._clone import message_error, open_plain, pack_bytes
from ._end import Hand
from ._endpoint import Endpoint
from ._wire import CODECS, End, Parcel
from .errors import DataCloneError, MessageError
from .port import _NO_TRANSFER, MessagePort, RecvT, SendT

DEFAULT_LIMIT: Final = 64 << 20  # bytes

_SCALARS: Final = (type(None), bool, int, float, str)
_DEEPEST: Final = 200  # both parsers go deeper; nobody's plain data does


class _Codec(NamedTuple):
    encode: Callable[[Any], bytes]
    decode: Callable[[Any], Any]
    scalars: tuple[type, ...]
    keys: tuple[type, ...]


_codecs: dict[str, _Codec] = {}


def check(codec: Any, limit: Any) -> None:
    """Raise what ``MessageChannel`` raises for a codec or a limit that cannot be."""
    if codec not in CODECS:
        raise ValueError(f"codec must be one of {', '.join(map(repr, CODECS))}, or None, not {codec!r}")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or not 0 < limit < 1 << 63):
        raise ValueError(f"max_message_size must be a positive number of bytes, or None, not {limit!r}")
    _codec(codec)


def _codec(name: str) -> _Codec:
    found = _codecs.get(name)
    if found is None:
        if name == "json":
            json = importlib.import_module("json")
            encode = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode
            found = _Codec(
                lambda message: encode(message).encode(), lambda data: json.loads(bytes(data)), _SCALARS, (str,)
            )
        else:
            try:
                msgpack = importlib.import_module("msgspec.msgpack")
            except ModuleNotFoundError:
                raise ModuleNotFoundError(
                    "codec='msgpack' needs msgspec: pip install 'mpchannel[msgpack]'", name="msgspec"
                ) from None
            found = _Codec(msgpack.encode, msgpack.decode, (*_SCALARS, bytes), (str, int))
        _codecs[name] = found
    return found


def _check_plain(value: Any, codec: _Codec, path: str, depth: int = 0) -> None:
    """Raise ``DataCloneError``, with the path to it, for what is not plain data. (Codecs would take some of it, and
    make something else of it: a number that is a key, a set, a dataclass.)
    """
    kind = type(value)
    if kind in codec.scalars:
        return
    if depth > _DEEPEST:
        raise DataCloneError(f"{path}: it is nested more than {_DEEPEST} deep, or contains itself")
    if kind is dict:
        for key, each in value.items():
            if type(key) not in codec.keys:
                names = " or ".join(known.__name__ for known in codec.keys)
                raise DataCloneError(f"{path}: the key {key!r} is a {type(key).__name__}; keys must be {names}")
            _check_plain(each, codec, f"{path}[{key!r}]", depth + 1)
    elif kind in (list, tuple):
        for place, each in enumerate(value):
            _check_plain(each, codec, f"{path}[{place}]", depth + 1)
    elif isinstance(value, Endpoint):
        raise DataCloneError(f"{path}: {value!r} is no plain data; list it in transfer, it arrives in event.ports")
    else:
        names = ", ".join(known.__name__ for known in (*codec.scalars[1:], list, dict))
        raise DataCloneError(f"{path}: a {kind.__name__} is no plain data: {names} and None are")


@final
class PlainPort(MessagePort[SendT, RecvT]):
    """A ``MessagePort`` whose messages are plain data: see ``MessageChannel(codec=...)``."""

    __slots__ = ()

    _unpickles = False

    @property
    def codec(self) -> str | None:
        return self._link.codec

    @property
    def max_message_size(self) -> int | None:
        return self._link.max_message

    def post_message(self, message: SendT, transfer: Iterable[Any] | None = _NO_TRANSFER) -> bool:
        data = self._encoded(message)
        listed = () if transfer is None else self._check_list(transfer)
        for place, each in enumerate(listed):
            if not isinstance(each, PlainPort):
                raise DataCloneError(f"transfer[{place}] is {each!r}: only ports with a codec may go along")
        if listed:
            return self._move(data, listed, "posted")
        parts, size = pack_bytes(memoryview(data))
        self._check_room(size)
        return self._link.post_parts(parts, size)

    def send(self, obj: SendT) -> None:
        self._check_sent(self.post_message(obj))

    def _encoded(self, message: Any) -> bytes:
        codec = _codec(self.codec or "")
        _check_plain(message, codec, "message")
        try:
            data = codec.encode(message)
        except (ValueError, OverflowError) as error:  # an integer or a text that the format has no room for
            raise DataCloneError(f"message: {error}") from error
        limit = self._link.max_message
        if limit is not None and len(data) > limit:
            raise DataCloneError(f"message: it takes {len(data):,} bytes, and max_message_size is {limit:,}")
        return data

    # What arrives

    def recv(self, timeout: float | None = None) -> RecvT:
        return self.receive(timeout).data

    def _open(self, taken: Any) -> tuple[Any, tuple[Any, ...]]:
        if isinstance(taken, End):
            return super()._open(taken)
        if self._parked:
            self._taken_while_parked()
        parcel = taken if isinstance(taken, Parcel) else None
        data, ports = open_plain(parcel, PlainPort)
        try:
            limit = self._link.max_message
            if limit is not None and len(data) > limit:
                raise ValueError(f"it has {len(data):,} bytes, and max_message_size is {limit:,}")
            return _codec(self.codec or "").decode(data), ports
        except Exception as error:
            for port in ports:
                port._undelivered()
            bad = message_error(error, taken)
            if bad is None:
                raise
            raise bad from error

    def _next_bytes(self) -> bytes:
        hand: Hand = []
        try:
            taken = self._link.next(hand)
            if isinstance(taken, End):
                super()._open(taken)
            if self._parked:
                self._taken_while_parked()
            view, ports = open_plain(taken if isinstance(taken, Parcel) else None, PlainPort)
            if ports:
                for port in ports:
                    port._undelivered()
                raise MessageError(f"a message with {len(ports)} ports cannot be received as bytes; use recv()")
            data = bytes(view)
        except BaseException as error:
            self._link.dropped += (hand,)  # statements that no signal handler comes between: see Link.take
            self._link.slow = True
            self._fumbled(hand, error)
        return data


MessagePort._coded = PlainPort
