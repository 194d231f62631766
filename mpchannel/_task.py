"""A worker of a pool, from within: it takes tasks from its parent port, one after the other, and answers each.

parent port   <== [(number, task), ...]: packed tasks, to be run in this order
              <== a task by itself, then [(number, None)]: one with ports, or large
              ==> kind, number, value
claims        what may begin: the rest was taken back
control       <== numbers of running tasks that were cancelled, which whoever runs them may ask for
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ._claims import Claims
from ._clone import loads
from ._failure import pack_error
from ._stream import write
from ._wire import End, Parcel, bounce
from .errors import MessageError, PortClosedError
from .port import MessagePort
from .worker import parent_port

T = TypeVar("T")
AnyPort = MessagePort[Any, Any]

READY, BROKEN, DONE, FAILED, REPORT = "ready", "broken", "done", "failed", "report"


class _Here:
    """The task that this worker is at."""

    control: AnyPort | None = None
    number = 0
    stop = False


def cancelled() -> bool:
    """In a task: whether it was cancelled, or has run out of time, and should end. ``False`` elsewhere."""
    control = _Here.control
    while control is not None and not _Here.stop and control.poll():
        _Here.stop = control.recv() == _Here.number
    return _Here.stop


def report(done: float, total: float | None = None, text: str = "") -> None:
    """In a task: how far it is, *done* of *total* (if that is known), and a *text* to show.

    The caller's ``on_progress`` gets the same three. Elsewhere it does nothing.
    """
    port = parent_port()
    if _Here.control is not None and port is not None:
        port.post_message((REPORT, _Here.number, (done, total, text)))


def serve(claims: Claims, control: AnyPort, initializer: Callable[..., Any] | None, initargs: tuple[Any, ...]) -> None:
    """What a worker of a pool runs."""
    port = parent_port()
    assert port is not None
    try:
        if initializer is not None:
            initializer(*initargs)
    except BaseException as error:
        port.post_message((BROKEN, 0, pack_error(error)))
        return
    _Here.control = control
    port.post_message((READY, 0, None))
    while True:
        try:
            packet = port.recv()
        except PortClosedError:
            return
        if packet is None:
            return
        for number, task in packet:
            begins = claims.claim(number)
            if begins:
                _Here.number, _Here.stop = number, False
            if not (_run(task, port) if begins else task is not None or _skip(port)):
                return


def _skip(port: AnyPort) -> bool:
    """Take a task that was taken back, without loading it."""
    hand: list[Any] = []
    taken = port._link.next(hand)
    if isinstance(taken, Parcel):
        bounce(iter([taken.descriptors]))
    return not isinstance(taken, End)


def _run(task: Any, port: AnyPort) -> bool:
    """Run a task, which comes by itself if it is ``None``, and answer. ``False`` if nobody is there any more."""
    answer: tuple[str, int, Any]
    try:
        task = _received(port) if task is None else loads(task)
        if not task:
            return True  # it could not be sent
        fn, args, kwargs, *reader = task
        del task
        result = fn(*args, **kwargs)
        answer = DONE, _Here.number, write(iter(result), reader[0], cancelled) if reader else result
        del fn, args, kwargs, reader, result
    except BaseException as error:
        answer = FAILED, _Here.number, pack_error(error)
    try:
        port.send(answer)
    except BrokenPipeError:
        return False
    except Exception as error:  # whatever it is that cannot be sent: who called is told
        port.post_message((FAILED, _Here.number, pack_error(error)))
    return True


def _received(port: AnyPort) -> Any:
    try:
        return port.recv()
    except MessageError as error:
        raise error.__cause__ or error from None


def run_chunk(fn: Callable[..., T], chunk: list[tuple[Any, ...]]) -> list[T]:
    """A task of ``map``."""
    return [fn(*args) for args in chunk]
