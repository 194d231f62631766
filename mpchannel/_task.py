"""A worker of a pool, from within: it takes tasks from its parent port, one after the other, and answers each.

``control`` carries the numbers of tasks that were cancelled, which whoever runs them may ask for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ._failure import pack_error
from ._stream import write
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
    """In a task: how far it is. The caller's ``on_progress`` gets the same arguments. Nothing elsewhere."""
    port = parent_port()
    if _Here.control is not None and port is not None:
        port.post_message((REPORT, (done, total, text)))


def serve(control: AnyPort, initializer: Callable[..., Any] | None, initargs: tuple[Any, ...]) -> None:
    """What a worker of a pool runs."""
    port = parent_port()
    assert port is not None
    try:
        if initializer is not None:
            initializer(*initargs)
    except BaseException as error:
        port.post_message((BROKEN, pack_error(error)))
        return
    _Here.control = control
    port.post_message((READY, None))
    while True:
        _Here.number += 1
        try:
            task = port.recv()
        except PortClosedError:
            return
        except MessageError as error:  # the task cannot be loaded here
            port.post_message((FAILED, pack_error(error.__cause__ or error)))
            continue
        if task is None:
            return
        _Here.stop = False
        answer: tuple[str, Any]
        if cancelled():  # before it began
            port.post_message((DONE, None))
            continue
        try:
            fn, args, kwargs, *reader = task
            del task
            result = fn(*args, **kwargs)
            answer = DONE, write(iter(result), reader[0], cancelled) if reader else result
            del fn, args, kwargs, reader, result
        except BaseException as error:
            answer = FAILED, pack_error(error)
        try:
            port.send(answer)
        except BrokenPipeError:
            return  # nobody is there any more
        except Exception as error:  # whatever it is that cannot be sent: who called is told
            port.post_message((FAILED, pack_error(error)))
        del answer


def run_chunk(fn: Callable[..., T], chunk: list[tuple[Any, ...]]) -> list[T]:
    """A task of ``map``."""
    return [fn(*args) for args in chunk]
