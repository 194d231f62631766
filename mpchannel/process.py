"""Processes: the standard library's, whose arguments may hold ports, connections, and what plain pickle cannot find.

Added to the standard library's: a closed or moved port among the arguments makes ``start()`` raise under fork too; the
goodbye of the child's ports comes after its last thread has ended; under spawn and forkserver, functions and classes
that the child could not import (of a notebook, nested ones, lambdas) go by value; and when a child cannot load what it
was given, its ports are ``undeliverable``, and its traceback says what to do; and named channels to the parent.
"""

from __future__ import annotations

import multiprocessing.context
import multiprocessing.process as stdlib
import multiprocessing.queues
import sys
import threading
from collections.abc import Callable
from functools import cached_property, partial
from types import TracebackType
from typing import Any

from . import _clone, ipc
from ._delivery import say_goodbye
from ._given import given_ports
from ._window import window
from .ipc import ChildIpc
from .queues import carry_by_value
from .reduction import accept_arrivals, expect_arrivals, expecting_arrivals, lose_arrivals, starts_failed

__all__ = ["BaseProcess", "active_children", "current_process", "parent_process"]

active_children = stdlib.active_children
current_process = stdlib.current_process
parent_process = stdlib.parent_process


def __getattr__(name: str) -> Any:
    return getattr(stdlib, name)


class Here(threading.local):
    packing: BaseProcess | None = None  # the process whose content is being packed


here = Here()


class BaseProcess(stdlib.BaseProcess):
    """What the processes of every start method have in common."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for each in (*self._args, *self._kwargs.values()):  # type: ignore[attr-defined]
            if isinstance(each, multiprocessing.queues.Queue):
                carry_by_value(each)

    @cached_property  # not a property: classes of users may have an attribute of this name
    def ipc(self) -> ChildIpc:
        """Named channels to this process. Raises ``RuntimeError`` if it was started without (see ``mpchannel.ipc``)."""
        if getattr(self, "_popen", None) is not None:
            raise RuntimeError(
                f"{self.name} was started without named channels: ask for process.ipc, or register at ipc.main, before "
                "start()"
            )
        return ChildIpc(self)

    def start(self) -> None:
        named = vars(self).pop("ipc", None)  # it stays here, with all that its listeners refer to
        near = named if isinstance(named, ChildIpc) else ChildIpc(self) if ipc.main._listening else None
        try:
            if near is not None:
                self._ipc_gift = near._open()
            for port in given_ports(self):
                port._check_movable("an argument of the process")
            super().start()
        except BaseException:  # whatever it is, Ctrl-C too: the ports stay here, and it goes on its way
            starts_failed()
            if near is not None:
                near._not_opened()
            raise
        finally:
            vars(self).pop("_ipc_gift", None)
            if named is not None or near is not None:
                vars(self)["ipc"] = near if named is None else named
        if near is not None:
            near._opened()

    def _bootstrap(self, *args: Any, **options: Any) -> int:
        window.begin_in_child()
        ipc.begin_in_child(vars(self).pop("_ipc_gift", None))
        _started()
        try:
            code: int = super()._bootstrap(*args, **options)  # type: ignore[misc]
            return code
        finally:
            say_goodbye()

    def __reduce_ex__(self, protocol: Any) -> Any:
        if here.packing is self or multiprocessing.context.get_spawning_popen() is None:
            return super().__reduce_ex__(protocol)
        outer, here.packing = here.packing, self
        try:
            return _load, (_clone.dumps(self),)
        finally:
            here.packing = outer


def begin_in_child(name: str) -> None:
    """In a child that was not forked, before anything is imported there for the user."""
    expect_arrivals()
    sys.excepthook = partial(_cannot_start, name, sys.excepthook)


def _load(data: bytes) -> BaseProcess:
    """In the child: what ``__reduce_ex__`` packed."""
    process: BaseProcess = _clone.loads(data)
    _started()
    return process


def _started() -> None:
    """In the child: all was loaded."""
    hook = sys.excepthook
    if isinstance(hook, partial) and hook.func is _cannot_start:
        sys.excepthook = hook.args[1]
    accept_arrivals()


def _cannot_start(
    name: str,
    before: Callable[..., Any],
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType | None,
) -> None:
    """The exception hook of a child that has not loaded its process object yet."""
    if not expecting_arrivals():  # somebody kept this hook, and calls it later
        before(kind, error, trace)
        return
    sys.excepthook = before
    import traceback  # which takes as long to import as half of mpchannel

    lose_arrivals("".join(traceback.format_exception(kind, error, trace)))
    error.add_note(
        f"{name} could not start: what it was given could not be loaded in the new process. It imports the main module "
        'first: that must be importable, start processes only under `if __name__ == "__main__":`, and what it '
        "defines must be found there by its name."
    )
    before(kind, error, trace)
