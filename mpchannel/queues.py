"""Queues: the standard library's, that also carry functions and classes which plain pickle cannot find at the receiver.

What is put is pickled where the standard library does it (by the feeder thread of a ``Queue``, by ``put`` of a
``SimpleQueue``), only by value where that is needed. The receiving side is unchanged.
"""

from __future__ import annotations

import multiprocessing.connection
import multiprocessing.queues as stdlib
import multiprocessing.reduction
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from . import _clone

__all__ = ["JoinableQueue", "Queue", "SimpleQueue"]


def __getattr__(name: str) -> Any:
    return getattr(stdlib, name)


_Queue: Any = stdlib.Queue
_JoinableQueue: Any = stdlib.JoinableQueue
_SimpleQueue: Any = stdlib.SimpleQueue


class _ByValue:
    """Something on its way through a queue's feeder thread."""

    __slots__ = ("thing",)

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __reduce__(self) -> Any:
        return _clone.loads, (_clone.dumps(self.thing),)


def _put(put: Callable[..., None], obj: Any, block: bool = True, timeout: float | None = None) -> None:
    put(_ByValue(obj), block, timeout)


def _report(report: Callable[..., None], error: BaseException, obj: Any) -> None:
    report(error, obj.thing if isinstance(obj, _ByValue) else obj)


class Queue(_Queue):  # type: ignore[misc]
    """``multiprocessing.Queue``."""

    def __init__(self, maxsize: int = 0, *, ctx: Any) -> None:
        _clone.prepare()
        super().__init__(maxsize, ctx=ctx)

    def put(self, obj: Any, block: bool = True, timeout: float | None = None) -> None:
        _put(super().put, obj, block, timeout)

    def _start_thread(self) -> None:
        _tell_what_was_put(self)
        super()._start_thread()


class JoinableQueue(Queue, _JoinableQueue):  # type: ignore[misc]
    """``multiprocessing.JoinableQueue``."""


def _tell_what_was_put(queue: Any) -> None:
    """Have errors of the feeder thread speak of what was put, not of what is wrapped around it."""
    if "_on_queue_feeder_error" not in vars(queue):
        queue._on_queue_feeder_error = partial(_report, queue._on_queue_feeder_error)


def carry_by_value(queue: Any) -> None:
    """Have a queue of the standard library's classes (an executor made it, with a context of ours) do the same."""
    if isinstance(queue, Queue) or "put" in vars(queue):
        return
    _clone.prepare()
    _tell_what_was_put(queue)
    queue.put = partial(_put, queue.put)


class _Writer(multiprocessing.connection.Connection):
    """The sending end of a ``SimpleQueue``. (A pool sends its tasks on it directly.)"""

    def send(self, obj: Any) -> None:
        self._check_closed()  # type: ignore[attr-defined]
        self._check_writable()  # type: ignore[attr-defined]
        self._send_bytes(_clone.dumps(obj))  # type: ignore[attr-defined]


_reduce_connection: Final[Any] = multiprocessing.connection.reduce_connection  # type: ignore[attr-defined]
multiprocessing.reduction.register(_Writer, _reduce_connection)


class SimpleQueue(_SimpleQueue):  # type: ignore[misc]
    """``multiprocessing.SimpleQueue``."""

    def __init__(self, *, ctx: Any) -> None:
        _clone.prepare()
        super().__init__(ctx=ctx)
        self._writer.__class__ = _Writer

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self._writer.__class__ = _Writer

    def put(self, obj: Any) -> None:
        data = _clone.dumps(obj)
        if self._wlock is None:  # writes to a message oriented pipe are atomic
            self._writer.send_bytes(data)
        else:
            with self._wlock:
                self._writer.send_bytes(data)
