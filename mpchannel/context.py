"""Contexts: one per start method, with our ``Process``, ``Pipe`` and queues; all else is the standard library's.

The default context, and with it the start method, is mpchannel's own: nothing here changes what ``multiprocessing``
uses, and setting a start method there changes nothing here.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.context as stdlib
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import sys
from collections.abc import Iterator
from typing import Any, Final

from . import _clone, connection, process, queues

__all__ = ["DefaultContext", "ForkContext", "ForkProcess", "ForkServerContext", "ForkServerProcess", "Process"]
__all__ += ["SpawnContext", "SpawnProcess", "get_context"]


def __getattr__(name: str) -> Any:
    return getattr(stdlib, name)


# Processes


class Process(process.BaseProcess, stdlib.Process):
    """``multiprocessing.Process``: ports in ``target``, ``args``, ``kwargs`` and attributes move to the child.

    They are detached here when ``start()`` returned, and untouched when it raised.
    """

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        return default_context.get_context().Process._Popen(process_obj)

    @staticmethod
    def _after_fork() -> None:
        default_context.get_context().Process._after_fork()


class _OfOneMethod(process.BaseProcess):
    """In the child, the default start method is the one it was started by."""

    _start_method: str

    def _bootstrap(self, *args: Any, **options: Any) -> int:
        default_context.set_start_method(self._start_method, force=True)
        return super()._bootstrap(*args, **options)


class ForkProcess(_OfOneMethod, stdlib.ForkProcess):
    pass


class SpawnProcess(_OfOneMethod, stdlib.SpawnProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        return _launch(stdlib.SpawnProcess._Popen, process_obj)


class ForkServerProcess(_OfOneMethod, stdlib.ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        return _launch(stdlib.ForkServerProcess._Popen, process_obj)


def _launch(make: Any, process_obj: Any) -> Any:
    """Start a process that is pickled."""
    name = process_obj._name
    process_obj._name = starting = StartingName(name)
    starting.method = default_context.current._name
    try:
        with _undisturbed():
            return make(process_obj)
    finally:
        process_obj._name = name


def start_helpers(method: str) -> None:
    """Start what processes of *method* need beside them. (Else the first start does, and lets SIGINT through then.)"""
    if method != "fork":
        multiprocessing.resource_tracker.ensure_running()
    if method == "forkserver":
        with _undisturbed():
            multiprocessing.forkserver.ensure_running()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """While the standard library describes this process to another one.

    It settles its default context thereby: it is left as it was. And it has the other run the main module's file, which
    a script piped into Python has not.
    """
    main = sys.modules["__main__"]
    piped = vars(main).get("__file__") == _clone.STDIN
    if piped:
        del main.__file__
    theirs: Any = stdlib._default_context
    unset = theirs._actual_context is None
    try:
        yield
    finally:
        if piped:
            main.__file__ = _clone.STDIN
        if unset and theirs._actual_context is theirs._default_context:
            theirs._actual_context = None


class StartingName(str):
    """A process's name on its way to a child: the first thing that is loaded there, before the main module is."""

    __slots__ = ("method",)

    method: str  # the start method that is the child's default

    def __reduce__(self) -> Any:
        if process.here.packing is not None:
            return str, (str(self),)
        # An expression, because this package may only be found with the parent's path.
        traced = sys.modules.get("mpchannel._trace")
        spool = None if traced is None else traced.spool_of_trace()
        known = {"name": str(self), "method": self.method, "path": sys.path, "spool": spool}
        return eval, (_BEGIN, known)


_BEGIN: Final = (
    "(__import__('sys').path.__setitem__(slice(None), path), "
    "__import__('mpchannel.context', fromlist=['context'])._begin_in_child(name, method), "
    # A fork server may be older than a trace, and so its environment.
    "spool and __import__('mpchannel._trace', fromlist=['follow']).follow(spool))[1]"
)


def _begin_in_child(name: str, method: str) -> str:
    default_context.set_start_method(method, force=True)
    process.begin_in_child(name)
    return name


# Contexts


class _Ours(stdlib.BaseContext):
    """What differs from the standard library's contexts."""

    def Pipe(self, duplex: bool = True) -> Any:
        """Two connected ``Connection``s; with *duplex* false the first can only receive, the second only send."""
        return connection.Pipe(duplex)

    def Queue(self, maxsize: int = 0) -> Any:
        return queues.Queue(maxsize, ctx=self.get_context())

    def JoinableQueue(self, maxsize: int = 0) -> Any:
        return queues.JoinableQueue(maxsize, ctx=self.get_context())

    def SimpleQueue(self) -> Any:
        return queues.SimpleQueue(ctx=self.get_context())

    def get_context(self, method: str | None = None) -> Any:
        return self if method is None else _concrete(method)


class ForkContext(_Ours, stdlib.ForkContext):
    Process = ForkProcess


class SpawnContext(_Ours, stdlib.SpawnContext):
    Process = SpawnProcess


class ForkServerContext(_Ours, stdlib.ForkServerContext):
    Process = ForkServerProcess


_contexts: dict[str, Any] = {"fork": ForkContext(), "spawn": SpawnContext(), "forkserver": ForkServerContext()}


def _concrete(method: str) -> Any:
    try:
        context = _contexts[method]
    except KeyError:
        raise ValueError(f"cannot find context for {method!r}: use one of {', '.join(_contexts)}") from None
    context._check_available()
    return context


class DefaultContext(_Ours, stdlib.DefaultContext):
    """The context of the functions of this package itself; it becomes that of a start method when it is first used."""

    Process = Process
    _default_context: Any
    _actual_context: Any

    def get_context(self, method: str | None = None) -> Any:
        """The context of the start *method* ``fork``, ``spawn`` or ``forkserver``; default: the one that is set, or$
        else this Python's own default.

        Raises ``ValueError`` for an unknown method, as the standard library does.
        """
        if method is not None:
            return _concrete(method)
        self._actual_context = self.current
        return self._actual_context

    @property
    def current(self) -> Any:
        """What ``get_context()`` would give, without settling it."""
        return self._actual_context or self._default_context


default_context = DefaultContext(_contexts[multiprocessing.get_all_start_methods()[0]])
get_context = default_context.get_context
