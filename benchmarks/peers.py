"""Other ways of passing messages, as kinds of ``mpchannel.bench``. Libraries are loaded where they are measured."""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import multiprocessing.queues
import selectors
import sys
import threading
import uuid
from collections.abc import Callable, Sequence
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any, Final

from mpchannel.bench.channels import run_side
from mpchannel.bench.kinds import PIPE, Group, Kind, OnMessage

_TALK: Final = frozenset({Group.TALK})
_BURST: Final = frozenset({Group.BURST})
_ROOM: Final = 16 << 20  # bytes of a faster-fifo queue: for a whole burst. Its default has no room for 1 MiB
_LINGER: Final = 10_000  # milliseconds that the last message of a ZeroMQ socket has to get out


class TwoQueues:
    """An end made of two queues, one for each direction."""

    def __init__(self, out: Any, into: Any) -> None:
        self.out, self.into = out, into

    def send(self, message: Any) -> None:
        self.out.put(message)

    def recv(self) -> Any:
        return self.into.get()

    def close(self) -> None:
        """The other end has the same queues: they go with the last reference."""


def _two_queues(make: Callable[[], Any]) -> Any:
    one, other = make(), make()
    return TwoQueues(one, other), TwoQueues(other, one)


def _bare(end: TwoQueues, near: bool) -> Any:
    """Spares the two calls in between."""
    end.send, end.recv = end.out.put, end.into.get  # type: ignore[method-assign]
    return end


# The standard library's


def _queues() -> Any:
    return _two_queues(multiprocessing.get_context("forkserver").Queue)


def _simple_queues() -> Any:
    return _two_queues(multiprocessing.get_context("forkserver").SimpleQueue)


def _writer_of(end: TwoQueues) -> int:
    descriptor: int = end.out._writer.fileno()
    return descriptor


class HandleReceiver:
    """An end of a Pipe at which bare descriptors come."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def recv(self) -> Connection:
        return Connection(reduction.recv_handle(self._connection))

    def send(self, message: Any) -> None:
        self._connection.send(message)

    def close(self) -> None:
        self._connection.close()


def _receive_handles(end: Connection, near: bool) -> Any:
    return end if near else HandleReceiver(end)


def _send_handle(through: Connection, end: Connection) -> None:
    reduction.send_handle(through, end.fileno(), None)
    end.close()


def _serve_with_selector(until: Any, ends: Sequence[Any], on_message: OnMessage) -> None:
    with selectors.DefaultSelector() as selector:
        for each in (*ends, until):
            selector.register(each, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                end: Any = key.fileobj
                if end is until:
                    until.recv()
                    return
                on_message(end, end.recv())


def _react_in_thread(end: Any, on_message: OnMessage) -> None:
    def run() -> None:
        while not on_message(end, end.recv()):
            pass

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


# pyzmq: a pair of PAIR sockets. An end is an address until its process opens it


class Address(str):
    """Of the abstract namespace, so that no file is left behind."""

    def close(self) -> None:
        """Nothing is open yet."""


def _addresses() -> Any:
    address = Address(f"ipc://@mpchannel-benchmarks-{uuid.uuid4()}")
    return address, address


class ZmqEnd:
    def __init__(self, address: str, near: bool, limit: int | None) -> None:
        zmq = importlib.import_module("zmq")
        self._socket: Any = zmq.Context.instance().socket(zmq.PAIR)
        socket = self._socket
        if limit is not None:
            socket.set_hwm(limit)
        (socket.bind if near else socket.connect)(address)
        self.send, self.recv = socket.send_pyobj, socket.recv_pyobj
        self._linger = 0 if near else _LINGER

    def close(self) -> None:
        """Only then is it certain that the last message is on its way: multiprocessing's children end abruptly."""
        context = self._socket.context
        self._socket.close(self._linger)
        context.term()


def _open_zmq(end: str, near: bool) -> Any:
    return ZmqEnd(end, near, None)


def _open_zmq_without_limit(end: str, near: bool) -> Any:
    return ZmqEnd(end, near, 0)


# faster-fifo


def _faster_fifos() -> Any:
    faster_fifo = importlib.import_module("faster_fifo")
    return _two_queues(lambda: faster_fifo.Queue(_ROOM))


# execnet starts the other side itself


class ExecnetEnd:
    def __init__(self, channel: Any) -> None:
        self.channel = channel
        self.send, self.recv = channel.send, channel.receive

    def close(self) -> None:
        self.channel.gateway.exit()


def _no_ends() -> Any:
    return Address(), Address()


def _open_execnet(end: Any, near: bool) -> Any:
    if not near:
        return None
    return ExecnetEnd(importlib.import_module("execnet").makegateway("popen").remote_exec(_FAR))


_FAR: Final = """
import sys
sys.path[:] = channel.receive()
from benchmarks.peers import execnet_far
execnet_far(channel)
"""


def _start_execnet_far(end: ExecnetEnd, place: int, scale: float) -> Any:
    signal = end.channel.gateway.newchannel()
    end.send(sys.path)
    end.send((place, scale, signal))
    return ExecnetEnd(signal)


def execnet_far(channel: Any) -> None:
    """In the process that execnet started."""
    place, scale, signal = channel.receive()
    run_side(place, scale, EXECNET, ExecnetEnd(channel), ExecnetEnd(signal), near=False)


EXECNET: Final = Kind(
    "execnet", _no_ends, _TALK | _BURST, open=_open_execnet, start_far=_start_execnet_far, library="execnet"
)
PEERS: Final = (
    Kind("Queue", _queues, _TALK | _BURST, open=_bare),
    Kind("SimpleQueue", _simple_queues, _TALK | _BURST, open=_bare, blocks_at=_writer_of),
    Kind("pyzmq", _addresses, _TALK, open=_open_zmq, library="zmq"),
    Kind("pyzmq", _addresses, _BURST, open=_open_zmq_without_limit, library="zmq"),
    Kind("faster-fifo", _faster_fifos, _TALK | _BURST, open=_bare, library="faster_fifo"),
    EXECNET,
    PIPE._replace(
        name="Pipe, send_handle",
        groups=frozenset({Group.HAND_OVER}),
        open=_receive_handles,
        hand_over=_send_handle,
    ),
    PIPE._replace(name="Pipe, selector", groups=frozenset({Group.MANY}), serve=_serve_with_selector),
    PIPE._replace(name="Pipe, thread", groups=frozenset({Group.EVENTS}), react=_react_in_thread),
)


def present() -> list[Kind]:
    """Those whose library is installed."""
    return [kind for kind in PEERS if kind.library is None or importlib.util.find_spec(kind.library) is not None]
