"""How ports cross into other processes by multiprocessing's own doors: process arguments, queues, pools, connections.

Under spawn and forkserver a port is pickled with its ``Process``; under fork the child inherits everything, keeps what
it was given and closes the rest with a plain ``close`` (never a ``shutdown`` or a goodbye, which would end the
parent's channels). *Given* means reachable from the process's target, arguments and attributes.

Nobody tells a reducer whether the start succeeded, and the stdlib's ``Process`` knows nothing of us. The moment is when
the Popen object gets its ``pid``: until then the ports are *lent*, which means that they take nothing; then they are
detached; if the Popen object goes without a pid, or its constructor is left, nothing happened.

House rules: everything here works for the stdlib's own ``Process`` as well. Hooks run at every fork of the program, so
they are quick, and they never raise.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import multiprocessing.popen_fork
import multiprocessing.process
import multiprocessing.queues
import multiprocessing.reduction
import multiprocessing.util
import os
import sys
import threading
import types
import weakref
from typing import Any, Final

from . import _clone, _delivery, _kernel
from ._clone import Departure
from ._given import AnyPort, connections_in_use, given_ports
from ._link import Link, begin_in_child, open_links
from ._recycle import give_back
from ._shared import SharedEnd, open_shared_ends
from ._wire import bounce, lose
from .port import MessagePort, PlainPort

__all__ = multiprocessing.reduction.__all__


def __getattr__(name: str) -> Any:
    return getattr(multiprocessing.reduction, name)


class _Start:
    """The start of one process: the ports lent to it, until it succeeded or failed."""

    def __init__(self, popen: Any, name: str) -> None:
        self.popen = weakref.ref(popen, self.failed)
        self.name = name
        self.thread = threading.get_ident()
        self.ports: list[AnyPort] = []
        self.sockets: list[Any] = []  # a port may close meanwhile; its descriptor's number must stay its own
        self.memory: list[Any] = []  # likewise

    def lend(self, port: AnyPort) -> tuple[bytes, list[int]]:
        luggage, sock, memory = port._lend(self)
        self.ports.append(port)
        self.sockets.append(sock)
        _kernel.mark(sock, True)
        if memory is None:
            return luggage, [sock.fileno()]
        self.memory.append(memory)
        return luggage, [sock.fileno(), memory.fileno()]

    @property
    def pending(self) -> bool:
        # If the thread is out of the call that starts, and the start was not seen to succeed, it failed.
        if self.ports and not _is_starting(self.thread, self.popen()):
            self.failed()
        return bool(self.ports)

    def failed(self, _: object = None) -> None:
        """Nothing happened. Takes no lock: a finaliser may call it."""
        while self.ports:
            self.ports[-1]._given_back()
            self.ports.pop()
        while self.sockets:
            _kernel.mark(self.sockets[-1], False)
            self.sockets.pop()
        self.memory.clear()

    def succeeded(self, pid: int) -> None:
        # Pending to the end: whoever uses one of them meanwhile must take nothing.
        for port in self.ports:
            port._given_to(self.name, pid)
        self.ports.clear()
        self.sockets.clear()
        self.memory.clear()


def starts_failed() -> None:
    """In this thread, a process could not be started."""
    for start in list(_starts.values()):
        if start.thread == threading.get_ident():
            start.failed()


_starts: weakref.WeakKeyDictionary[Any, _Start] = weakref.WeakKeyDictionary()


def _is_starting(thread: int, popen: Any) -> bool:
    """Whether *thread* is inside the ``Popen(...)`` call of *popen*."""
    frame: types.FrameType | None = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_name == "_launch" and frame.f_locals.get("self") is popen:
            return True
        frame = frame.f_back
    return False


def _start_of(popen: Any, process: Any) -> _Start:
    start = _starts.get(popen)
    if start is None:
        _starts[popen] = start = _Start(popen, repr(getattr(process, "name", "a process")))
        popen.__class__ = _watched_class(type(popen))
    return start


_watched_classes: dict[type, type] = {}


def _watched_class(kind: type) -> type:
    """*kind* with an eye on ``pid``: the one attribute that every Popen gets when, and only when, it has started."""

    def get(popen: Any) -> Any:
        try:
            return popen.__dict__["pid"]
        except KeyError:
            raise AttributeError("pid") from None

    def set(popen: Any, pid: int) -> None:
        popen.__dict__["pid"] = pid
        popen.__class__ = kind
        start = _starts.pop(popen, None)
        if start is not None and pid:
            start.succeeded(pid)

    found = _watched_classes.get(kind)
    if found is None:
        found = _watched_classes[kind] = type(kind.__name__, (kind,), {"pid": property(get, set)})
    return found


# spawn, forkserver, queues, pools, connections: by pickling


def _reduce_port(port: AnyPort) -> Any:
    popen = multiprocessing.context.get_spawning_popen()
    if popen is not None:
        start = _start_of(popen, _process_being_pickled())
        luggage, numbers = start.lend(port)
        return _arrive, (luggage, *map(multiprocessing.reduction.DupFd, numbers))
    port._check_movable("the message")
    with port._link.receiving, port._link.sending:
        entry = port._pack_up()
        # The resource sharer keeps a copy until somebody fetches it; if nobody does, it ends with this process.
        copies = list(map(multiprocessing.reduction.DupFd, entry.numbers))
        port._left(Departure("sent by multiprocessing's pickler"), None)
    return _arrive, (entry.luggage, *copies)


def _process_being_pickled() -> Any:
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_launch" and "process_obj" in frame.f_locals:
            return frame.f_locals["process_obj"]
        frame = frame.f_back
    return None


def _arrive(luggage: bytes, copy: Any, memory: Any = None) -> AnyPort:
    _clone.prepare()
    sock = _kernel.adopt_socket(copy.detach())
    _kernel.mark(sock, False)
    port: AnyPort = MessagePort._of(Link.unpack(sock, luggage, lambda: _kernel.Memory(iter((memory.detach(),)))))
    if _arrivals is not None:
        _arrivals.append(port)
    return port


# In a child that was not forked: until all that it was given is loaded, it may turn out that it cannot be.

_arrivals: list[AnyPort] | None = None


def expect_arrivals() -> None:
    """Before the main module is imported, and the process object loaded."""
    global _arrivals
    _arrivals = []


def expecting_arrivals() -> bool:
    return _arrivals is not None


def accept_arrivals() -> None:
    """All was loaded."""
    global _arrivals
    _arrivals = None


def lose_arrivals(why: str) -> None:
    """The child cannot start: what it was given is undeliverable. *why* goes to the other ends of what it has not
    loaded yet.
    """
    for port in _arrivals or ():
        port._undelivered()
    for sock in _kernel.marked_sockets():
        bounce(lose(sock, why))


multiprocessing.reduction.register(MessagePort, _reduce_port)
multiprocessing.reduction.register(PlainPort, _reduce_port)


# fork: by inheritance


def _forking_popen() -> tuple[Any, Any] | None:
    """(Popen object, process) if the fork under way is that of a multiprocessing process."""
    frame = sys._getframe(2)  # whoever called os.fork
    if frame.f_code is _LAUNCH:
        return frame.f_locals["self"], frame.f_locals["process_obj"]
    return None


_LAUNCH: Final[types.CodeType] = vars(multiprocessing.popen_fork.Popen)["_launch"].__code__


_NOT_GIVEN: Final = (
    "handle is closed: this Connection was inherited by a fork, but nothing that the process was given leads to it; "
    "pass it in args=(connection,)"
)
_given_by_fork: Final[dict[int, list[AnyPort]]] = {}  # by forking thread, from before its fork to after it


_kept_by_fork: Final[dict[int, list[SharedEnd]]] = {}  # likewise: the ends of pipes that the child shares


def _before_fork() -> None:
    try:
        _delivery.before_fork()
        _clone.know_classes()
        starting = _forking_popen()
        _kept_by_fork[threading.get_ident()] = ends = open_shared_ends()  # all, should the next line fail
        for end in ends:
            end.shared = True
        if starting is not None:
            _kept_by_fork[threading.get_ident()] = connections_in_use(starting[1], ends)
            if open_links():
                _lend_given(*starting)
    finally:
        _kernel.crossing.acquire()


def _lend_given(popen: Any, process: Any) -> None:
    ports = [port for port in given_ports(process) if not port.closed and not port.detached]
    if ports:
        start = _start_of(popen, process)
        _given_by_fork[threading.get_ident()] = ports
        for port in ports:
            start.lend(port)


def _after_fork_in_parent() -> None:
    _kernel.crossing.release()
    _given_by_fork.pop(threading.get_ident(), None)
    _kept_by_fork.pop(threading.get_ident(), None)
    _delivery.after_fork_in_parent(sys._getframe(1))


def _after_fork_in_child() -> None:
    _kernel.crossing.release()  # this thread holds it here as well
    given = _given_by_fork.pop(threading.get_ident(), [])
    _given_by_fork.clear()
    kept = {id(end) for end in _kept_by_fork.pop(threading.get_ident(), ())}
    _kept_by_fork.clear()
    _starts.clear()
    _delivery.after_fork_in_child()
    give_back(all_of_it=True)
    _sort_out(begin_in_child(), given)
    for end in open_shared_ends():
        if id(end) in kept:
            end.go_on_in_child()
        else:
            end.stay_behind(_NOT_GIVEN)
    sockets = {each._socket() for each in (*open_links(), *open_shared_ends())}
    _kernel.close_inherited(sockets, {link._slab.memory for link in open_links() if link._slab is not None})


def _sort_out(inherited: list[Link], given: list[AnyPort]) -> None:
    departure = Departure(f"left with process {os.getppid()}, which forked this one (pass it in args=(port,) instead),")
    for link in inherited:
        port: AnyPort | None = None if link.owner is None else link.owner()
        if port is not None and any(port is each for each in given):
            port._start_over()
        elif port is not None:
            port._stay_behind(departure)
        else:
            link.stay_behind(departure.error)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
